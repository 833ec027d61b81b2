"""The models: architectures, building one by name, loading, freezing, summary.

A model takes uint8 images `(N, 1, 28, 28)`, garment bright on black, and returns logits `(N, output_dim)`:

    normalisation           pixels / 255, minus `mean`, divided by `std`: two buffers of the model
    features                float32 `(N, 1, 28, 28)` -> `(N, D)`
    classifier              one linear layer, `(N, D)` -> `(N, output_dim)`

Task 2 freezes `features`. Max-pooling stands before the activation, which then has a quarter of the work; with ReLU the result
is the same. Every architecture has a dropout layer before the classifier, if only with probability 0, so that `dropout`
applies to each.

| architecture | parameters, 10 classes | source |
|---|---|---|
| cnn | 28,938 (2 classes: 16,386) | System 1 |
| mlp | 235,146 | System 3 |
| deep_cnn, deep_cnn_dropout | 243,786, 225,034 | System 2, versions A and B |
| compact_cnn | 98,442 | System 4 |
| resnet8, resnet14 | 77,754, 99,418 | System 5; He et al. 2016, arXiv 1512.03385 |
| resnet20, resnet20_wide, resnet20_wider | 271,994, 1,083,626, 4,325,834 | pre-activation; He et al. 2016, arXiv 1603.05027 |
| separable14, separable14_photo, separable14_thin | 95,146, 95,146, 19,026 | separable: Chollet 2017, arXiv 1610.02357 |
| separable20 | 270,546 | the same, three blocks a stage |
| resnet18, resnet18_56 | 11,175,370 | torchvision's; its input resized to 56x56 |
| cnn_photo | 124,074 | cnn's features and separable14_photo's, for photographs of new classes (transfer/) |
| fast_cnn, fast_cnn_wide, fast_cnn_deep | 29,178, 95,034, 279,738 | whitened first layer: Jordan 2024, arXiv 2404.00498 |
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import checkpoint
from config import UserError
from layers import (
    Concatenation,
    PreActivationBlock,
    ResidualBlock,
    SomeModel,
    StandardizedConv2d,
    WhitenedConv2d,
    add_batch_norm,
    conv3x3,
    fuse_batch_norm,
    separable_conv3x3,
)


class Classifier(nn.Module):
    """uint8 images `(N, V, 28, 28)`, V views of each, one by default -> logits `(N, output_dim)`."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, features: nn.Sequential, feature_dim: int, output_dim: int):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(feature_dim, output_dim)
        # of the training images' pixels, in 0..1; float64, because the model computes with 1 / std
        self.register_buffer("mean", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(0.5, dtype=torch.float64))
        self.metadata: dict = {}  # what its file says of it

    def set_statistics(self, mean: float, std: float, images: torch.Tensor) -> None:
        """Set the normalisation, and compute a whitened first layer's filters from uint8 `images` `(N, V, 28, 28)`, of which
        it takes the first view."""
        self.mean.fill_(mean)
        self.std.fill_(std)
        if isinstance(self.features[0], WhitenedConv2d):
            self.features[0].fit(self.normalize(images[:, :1]))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(N, V, 28, 28)` -> float32, channels last."""
        pixels = images.float() * (1 / (255 * self.std)) - self.mean / self.std
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(N, V, 28, 28)` -> `(N, D)`, the input of the last layer: the mean over the views."""
        if images.shape[1] == 1 or isinstance(self.features[0], Concatenation):  # which takes several views
            return self.features(self.normalize(images))
        features = self.features(self.normalize(images.flatten(0, 1).unsqueeze(1)))  # (N * V, D)
        return features.unflatten(0, images.shape[:2]).mean(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.forward_features(images))


def _conv_pool(channels: int, output_channels: int, size: int, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(channels, output_channels, size, padding=padding), nn.MaxPool2d(2), nn.ReLU()]


def _dense(dim: int, output_dim: int, dropout: float = 0.0) -> list[nn.Module]:
    return [nn.Linear(dim, output_dim), nn.ReLU(), nn.Dropout(dropout)]


def cnn(output_dim: int) -> Classifier:
    """Task 1's: two 5x5 convolutions."""
    features = nn.Sequential(
        *_conv_pool(1, 16, 5, padding=2),  # 28 -> 14
        *_conv_pool(16, 32, 5, padding=2),  # 14 -> 7
        nn.Flatten(),  # (N, 32, 7, 7) -> (N, 1568)
        nn.Dropout(0.0),
    )
    return Classifier(features, 32 * 7 * 7, output_dim)


def mlp(output_dim: int) -> Classifier:
    """Fully connected, of System 3."""
    features = nn.Sequential(
        nn.Flatten(),  # (N, 1, 28, 28) -> (N, 784)
        *_dense(28 * 28, 256),
        *_dense(256, 128),
    )
    return Classifier(features, 128, output_dim)


def deep_cnn(output_dim: int) -> Classifier:
    """System 2, version A."""
    features = nn.Sequential(
        *_conv_pool(1, 64, 3),  # 28 -> 26 -> 13
        *_conv_pool(64, 64, 3),  # 13 -> 11 -> 5
        nn.Flatten(),  # (N, 64, 5, 5) -> (N, 1600)
        *_dense(64 * 5 * 5, 128, dropout=0.2),
    )
    return Classifier(features, 128, output_dim)


def deep_cnn_dropout(output_dim: int) -> Classifier:
    """System 2, version B, with dropout against overfitting."""
    features = nn.Sequential(
        *_conv_pool(1, 32, 3),  # 28 -> 26 -> 13
        nn.Dropout(0.25),
        *_conv_pool(32, 64, 3),  # 13 -> 11 -> 5
        nn.Dropout(0.3),
        nn.Flatten(),  # (N, 64, 5, 5) -> (N, 1600)
        *_dense(64 * 5 * 5, 128, dropout=0.3),
    )
    return Classifier(features, 128, output_dim)


def compact_cnn(output_dim: int) -> Classifier:
    """System 4: at most 100,000 parameters."""
    features = nn.Sequential(
        *_conv_pool(1, 16, 3, padding=1),  # 28 -> 14
        *_conv_pool(16, 32, 3, padding=1),  # 14 -> 7
        *_conv_pool(32, 64, 3, padding=1),  # 7 -> 3
        nn.Flatten(),  # (N, 64, 3, 3) -> (N, 576)
        *_dense(64 * 3 * 3, 128),
    )
    return Classifier(features, 128, output_dim)


def _resnet(output_dim: int, *stages: tuple[int, ...]) -> Classifier:
    """A 3x3 convolution to 16 channels, then stages of residual blocks; a stage lists the channels of its blocks. The side
    halves from one stage to the next: 28, 14, 7."""
    layers: list[nn.Module] = [conv3x3(1, 16), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for stage, blocks in enumerate(stages):
        for block, output_channels in enumerate(blocks):
            layers.append(ResidualBlock(channels, output_channels, stride=2 if stage > 0 and block == 0 else 1))
            channels = output_channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0)]  # (N, channels, 7, 7) -> (N, channels)
    return Classifier(nn.Sequential(*layers), channels, output_dim)


def _preactivation_resnet(
    output_dim: int,
    channels: tuple[int, int, int],
    blocks: int,
    convolution: Callable[..., nn.Module] = conv3x3,
    first: type[nn.Conv2d] = nn.Conv2d,
) -> Classifier:
    """A 3x3 convolution, then three stages: stage i has `blocks` pre-activation blocks of two such convolutions, with
    `channels[i]` channels. The side halves from one stage to the next: 28, 14, 7."""
    layers: list[nn.Module] = [first(1, channels[0], 3, padding=1, bias=False)]
    for before, after, stride in zip((channels[0], *channels), channels, (1, 2, 2)):
        layers.append(PreActivationBlock(before, after, stride, convolution))
        layers += [PreActivationBlock(after, after, 1, convolution) for _ in range(blocks - 1)]
    layers += [nn.BatchNorm2d(channels[-1]), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0)]  # (N, channels, 7, 7) -> (N, channels)
    return Classifier(nn.Sequential(*layers), channels[-1], output_dim)


def resnet18(output_dim: int) -> Classifier:
    """torchvision's, with one input channel."""
    from torchvision.models import resnet18  # here, because torchvision takes a second to import

    others = list(resnet18().children())[1:-1]  # without the first convolution and the last layer
    first = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    # 28 -> 14, max-pooling -> 7, four stages -> 7, 4, 2, 1; (N, 512, 1, 1) -> (N, 512)
    features = nn.Sequential(first, *others, nn.Flatten(), nn.Dropout(0.0))
    return Classifier(features, 512, output_dim)


def resnet18_56(output_dim: int) -> Classifier:
    """resnet18 on images resized to 56x56: its first two layers, made for large images, halve them twice."""
    model = resnet18(output_dim)
    model.features.insert(0, nn.Upsample(scale_factor=2, mode="bilinear"))  # 28 -> 56
    return model


def _fast_cnn(output_dim: int, *stages: tuple[int, ...]) -> Classifier:
    """A whitened first layer and max-pooling, then stages of 3x3 convolutions with batch normalisation; a stage lists their
    channels, and its last one is pooled. The side halves from one stage to the next: 14, 7, 3."""
    layers: list[nn.Module] = []
    channels = 1
    for stage in ((16,), *stages):
        for number, output_channels in enumerate(stage, 1):
            convolution = nn.Conv2d if layers else WhitenedConv2d
            layers.append(convolution(channels, output_channels, 3, padding=1, bias=False))
            if number == len(stage):
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(output_channels), nn.ReLU()]
            channels = output_channels
    layers += [nn.Flatten(), nn.Dropout(0.0)]  # (N, channels, 3, 3) -> (N, channels * 9)
    return Classifier(nn.Sequential(*layers), channels * 3 * 3, output_dim)


def cnn_photo(output_dim: int) -> Classifier:
    """The features of Task 1's network, which keep positions, of a photograph's cut-outs, beside `photo`'s, which know
    backgrounds and are scaled to twice the length, of all its views."""
    networks = [ARCHITECTURES[name](1) for name in ("cnn", "separable14_photo")]
    sizes = [network.classifier.in_features for network in networks]
    features = Concatenation([network.features for network in networks], sizes, scales=(1.0, 6.0), views=(2, 5))
    return Classifier(nn.Sequential(features), sum(sizes), output_dim)


ARCHITECTURES: dict[str, Callable[[int], Classifier]] = {
    **{function.__name__: function for function in (cnn, mlp, deep_cnn, deep_cnn_dropout, compact_cnn, resnet18, resnet18_56)},
    "cnn_photo": cnn_photo,
    "resnet8": lambda n: _resnet(n, (16,), (32,), (64,)),
    "resnet14": lambda n: _resnet(n, (16, 16), (32, 32), (40, 40)),  # 40: at most 100,000 parameters
    "separable14": lambda n: _preactivation_resnet(n, (56, 80, 96), 2, separable_conv3x3),  # at most 100,000 parameters
    "separable14_photo": lambda n: _preactivation_resnet(n, (56, 80, 96), 2, separable_conv3x3, StandardizedConv2d),
    "separable14_thin": lambda n: _preactivation_resnet(n, (24, 32, 40), 2, separable_conv3x3),  # at most 20,000 parameters
    "separable20": lambda n: _preactivation_resnet(n, (72, 104, 152), 3, separable_conv3x3),
    "resnet20": lambda n: _preactivation_resnet(n, (16, 32, 64), blocks=3),
    "resnet20_wide": lambda n: _preactivation_resnet(n, (32, 64, 128), blocks=3),
    "resnet20_wider": lambda n: _preactivation_resnet(n, (64, 128, 256), blocks=3),
    "fast_cnn": lambda n: _fast_cnn(n, (32,), (64,)),
    "fast_cnn_wide": lambda n: _fast_cnn(n, (64,), (128,)),
    "fast_cnn_deep": lambda n: _fast_cnn(n, (64, 64), (128, 128)),
}


ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
INITS = {  # of convolutional and linear weights; the biases are then 0
    "he": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def build_model(
    architecture: str, output_dim: int, *, dropout: float = -1.0, activation: str = "relu", init: str = "default"
) -> Classifier:
    """A model with fresh parameters, channels last. `architecture` is a name in ARCHITECTURES.

    `dropout` is the probability in all its dropout layers, -1 keeps the architecture's own; `init="default"` is PyTorch's.
    """
    model = ARCHITECTURES[architecture](output_dim)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(parent, name, ACTIVATIONS[activation]())
            elif isinstance(layer, nn.Dropout) and dropout >= 0:
                layer.p = dropout
            elif isinstance(layer, nn.Conv2d | nn.Linear) and init != "default":
                INITS[init](layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model.to(memory_format=torch.channels_last)


def load_model(path: Path) -> Classifier:
    """The model in a best_model.pt or a checkpoint.pt, on the CPU, in evaluation mode; `metadata` has what the file says of it.

    Raises UserError if the file is missing, damaged, foreign or from an older version, or if its parameters don't fit.
    """
    contents = checkpoint.load(path, "best_model", "checkpoint")
    try:
        model = build_model(contents["architecture"], contents["output_dim"], activation=contents["activation"])
        if contents["kind"] == "checkpoint" and contents["settings"].get("batch_norm"):  # best_model.pt has it fused
            add_batch_norm(model)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path}: names no model that is known here; train again") from None
    checkpoint.load_parameters(model, contents.get("ema") or contents["model"], path)
    model = fuse_batch_norm(model)
    model.metadata = {key: contents[key] for key in checkpoint.METADATA & contents.keys()}
    return model


def load_imagenet_weights(model: Classifier) -> None:
    """Give a `resnet18` or `resnet18_56` model the features that torchvision trained on ImageNet.

    The first filters are summed over the colours, which gives a grey image the response of the same image in RGB.
    Raises UserError if the weights can't be downloaded.
    """
    from torchvision.models import ResNet18_Weights, resnet18

    try:
        pretrained = resnet18(weights=ResNet18_Weights.DEFAULT, progress=False)
    except Exception as error:  # whatever a downloader raises
        raise UserError(f"pretrained=true: torchvision can't fetch its weights ({error}); use pretrained=false") from None
    pretrained.conv1.weight = nn.Parameter(pretrained.conv1.weight.sum(1, keepdim=True))  # (64, 3, 7, 7) -> (64, 1, 7, 7)
    layers = [layer for layer in model.features if not isinstance(layer, nn.Upsample)]
    for layer, source in zip(layers, list(pretrained.children())[:-1]):
        layer.load_state_dict(source.state_dict())


def freeze(module: SomeModel) -> SomeModel:
    """No gradients, and evaluation mode, so that the running statistics of batch normalisation don't change either."""
    return module.requires_grad_(False).eval()


class LayerSummary(NamedTuple):
    name: str
    kind: str
    output_shape: tuple[int, ...]  # without the batch dimension
    parameters: int
    macs: int  # multiply-accumulates for one image, of convolutional and linear layers only


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def summarize(model: nn.Module) -> list[LayerSummary]:
    """A row per layer, in the order of the forward pass."""
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules() if not list(module.children())}
    rows = []

    def append_row(layer: nn.Module, _: tuple, output: torch.Tensor) -> None:
        weights = layer.weight.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        positions = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1  # at which the weights are applied
        shape = tuple(output.shape[1:])
        rows.append(LayerSummary(names[layer], type(layer).__name__, shape, count_parameters(layer), weights * positions))

    for layer in names:
        layer.register_forward_hook(append_row)
    model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8, device=next(model.parameters()).device))
    return rows


def print_summary(model: nn.Module) -> None:
    rows = [row for row in summarize(model) if row.kind not in ("Dropout", "Sequential")]
    print(f"{'layer':28} {'kind':18} {'output':>14} {'parameters':>12} {'MACs':>14}")
    for row in rows:
        shape = " x ".join(map(str, row.output_shape))
        print(f"{row.name:28} {row.kind:18} {shape:>14} {row.parameters:12,} {row.macs:14,}")
    print(f"{'total, per image':62} {count_parameters(model):12,} {sum(row.macs for row in rows):14,}")
