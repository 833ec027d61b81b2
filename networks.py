"""The networks: one function each, named as the setting `architecture` names it.

Each network is two parts: `features` maps normalised float32 images `(N, 1, 28, 28)` to `(N, D)`, `classifier`, one
linear layer, maps those to logits `(N, output_dim)`. Task 2 freezes the first, the pictures of features show its output.

Max-pooling stands before the ReLU, which then has a quarter of the work and the same result. Every network has a
dropout layer before its classifier, if only with probability 0, so that `dropout` means something for each.
"""

from collections.abc import Callable

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, features: nn.Sequential, feature_dim: int, output_dim: int):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(feature_dim, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def cnn(output_dim: int) -> Network:
    """Task 1's: two 5x5 convolutions. 16,386 parameters for two classes, 28,938 for ten."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.MaxPool2d(2),  # 28 -> 14
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.MaxPool2d(2),  # 14 -> 7
        nn.ReLU(inplace=True),
        nn.Flatten(),  # (N, 32, 7, 7) -> (N, 1568)
        nn.Dropout(0.0),
    )
    return Network(features, 32 * 7 * 7, output_dim)


def mlp(output_dim: int) -> Network:
    """Fully connected (System 3). 235,146 parameters."""
    features = nn.Sequential(
        nn.Flatten(),  # (N, 1, 28, 28) -> (N, 784)
        nn.Linear(28 * 28, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.0),
        nn.Linear(256, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.0),
    )
    return Network(features, 128, output_dim)


def deep_cnn(output_dim: int) -> Network:
    """System 2, version A. 243,786 parameters."""
    features = nn.Sequential(
        nn.Conv2d(1, 64, 3),
        nn.MaxPool2d(2),  # 26 -> 13
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3),
        nn.MaxPool2d(2),  # 11 -> 5
        nn.ReLU(inplace=True),
        nn.Flatten(),  # (N, 64, 5, 5) -> (N, 1600)
        nn.Linear(64 * 5 * 5, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
    )
    return Network(features, 128, output_dim)


def deep_cnn_dropout(output_dim: int) -> Network:
    """System 2, version B, against overfitting. 225,034 parameters."""
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.MaxPool2d(2),  # 26 -> 13
        nn.ReLU(inplace=True),
        nn.Dropout(0.25),
        nn.Conv2d(32, 64, 3),
        nn.MaxPool2d(2),  # 11 -> 5
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),  # (N, 64, 5, 5) -> (N, 1600)
        nn.Linear(64 * 5 * 5, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
    )
    return Network(features, 128, output_dim)


def compact_cnn(output_dim: int) -> Network:
    """System 4: at most 100,000 parameters; 98,442."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.MaxPool2d(2),  # 28 -> 14
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.MaxPool2d(2),  # 14 -> 7
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.MaxPool2d(2),  # 7 -> 3
        nn.ReLU(inplace=True),
        nn.Flatten(),  # (N, 64, 3, 3) -> (N, 576)
        nn.Linear(64 * 3 * 3, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.0),
    )
    return Network(features, 128, output_dim)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes. He et al. 2016,
    arXiv 1512.03385, section 3.2 and option B."""

    def __init__(self, channels: int, output_channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, output_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(output_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(output_channels, output_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(output_channels),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != output_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, output_channels, 1, stride, bias=False), nn.BatchNorm2d(output_channels)
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.residual(x).add_(self.shortcut(x)))


def _resnet(output_dim: int, *stages: tuple[int, ...]) -> Network:
    """A 3x3 convolution to 16 channels, then stages of residual blocks with so many channels each, halving the side
    from one stage to the next: 28, 14, 7."""
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    channels = 16
    for number, blocks in enumerate(stages):
        for place, wanted in enumerate(blocks):
            layers.append(ResidualBlock(channels, wanted, stride=2 if number > 0 and place == 0 else 1))
            channels = wanted
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0)]  # (N, channels, 7, 7) -> (N, channels)
    return Network(nn.Sequential(*layers), channels, output_dim)


def resnet8(output_dim: int) -> Network:
    """System 5's, from scratch. 77,754 parameters."""
    return _resnet(output_dim, (16,), (32,), (64,))


def resnet14(output_dim: int) -> Network:
    """Two blocks a stage, and narrower at the end, to stay under 100,000 parameters: 99,418."""
    return _resnet(output_dim, (16, 16), (32, 32), (40, 40))


def wide_resnet(output_dim: int) -> Network:
    """Wide where the images are small, after Zagoruyko & Komodakis 2016, arXiv 1605.07146. 653,178 parameters."""
    return _resnet(output_dim, (16,), (64, 64), (128, 128))


def resnet18(output_dim: int) -> Network:
    """torchvision's, with one input channel. 11,175,370 parameters."""
    from torchvision.models import resnet18  # here, because torchvision takes a second to import

    theirs = resnet18()
    first = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as theirs
    features = nn.Sequential(
        first,  # 28 -> 14
        theirs.bn1,
        theirs.relu,
        theirs.maxpool,  # 14 -> 7
        theirs.layer1,
        theirs.layer2,  # 7 -> 4
        theirs.layer3,  # 4 -> 2
        theirs.layer4,  # 2 -> 1
        theirs.avgpool,
        nn.Flatten(),  # (N, 512, 1, 1) -> (N, 512)
        nn.Dropout(0.0),
    )
    return Network(features, 512, output_dim)


def resnet18_56(output_dim: int) -> Network:
    """resnet18 on images enlarged to 56x56: its first two layers, made for large images, halve them twice."""
    network = resnet18(output_dim)
    network.features.insert(0, nn.Upsample(scale_factor=2, mode="bilinear"))  # 28 -> 56
    return network


def fast_cnn(output_dim: int) -> Network:
    """Learns most from one look at each image: batch normalisation and few multiply-adds. 29,178 parameters."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.MaxPool2d(2),  # 28 -> 14
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.MaxPool2d(2),  # 14 -> 7
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.MaxPool2d(2),  # 7 -> 3
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Flatten(),  # (N, 64, 3, 3) -> (N, 576)
        nn.Dropout(0.0),
    )
    return Network(features, 64 * 3 * 3, output_dim)


NETWORKS: dict[str, Callable[[int], Network]] = {
    network.__name__: network
    for network in (
        cnn,
        mlp,
        deep_cnn,
        deep_cnn_dropout,
        compact_cnn,
        resnet8,
        resnet14,
        resnet18,
        resnet18_56,
        wide_resnet,
        fast_cnn,
    )
}
