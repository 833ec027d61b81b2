"""Layers that torch.nn lacks, and batch normalisation that is fused into the weights for inference."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from config import UserError

SomeModel = TypeVar("SomeModel", bound=nn.Module)


class WhitenedConv2d(nn.Conv2d):
    """A first convolution whose filters are computed, not learned: the principal components of image patches, scaled to
    unit variance, each with both signs. Jordan 2024, arXiv 2404.00498, section 3.2."""

    @torch.no_grad()
    def fit(self, x: torch.Tensor) -> None:
        """Set the filters from normalised images `x` `(N, 1, 28, 28)` and freeze them."""
        size = self.kernel_size[0]
        patches = F.unfold(x, size).mT.reshape(-1, size * size)  # (N, k*k, positions) -> (N*positions, k*k)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending; components are columns
        filters = (components / (variances + 0.01).sqrt()).T.flip(0)[: len(self.weight) // 2].view(-1, 1, size, size)
        self.weight[: 2 * len(filters)] = torch.cat([filters, -filters])
        self.requires_grad_(False)


class StandardizedConv2d(nn.Conv2d):
    """A first convolution that brings each image to mean 0 and deviation 1 by itself: instance normalisation, Ulyanov et al.
    2016, arXiv 1607.08022. A photograph may be dark, pale, or light on dark."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.instance_norm(x, eps=0.02))  # an image of one grey stays nearly black


def conv3x3(channels: int, output_channels: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, output_channels, 3, stride, padding=1, bias=False)


def separable_conv3x3(channels: int, output_channels: int, stride: int = 1) -> nn.Module:
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels: about a seventh of the parameters.
    Chollet 2017, arXiv 1610.02357."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        # strided here, which computes the same: on a CPU, the gradient of the other one with a stride takes six times as long
        nn.Conv2d(channels, output_channels, 1, stride, bias=False),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes. He et al. 2016,
    arXiv 1512.03385, section 3.2 and option B."""

    def __init__(self, channels: int, output_channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels, output_channels, stride),
            nn.BatchNorm2d(output_channels),
            nn.ReLU(),
            conv3x3(output_channels, output_channels),
            nn.BatchNorm2d(output_channels),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != output_channels:
            self.shortcut.append(nn.Conv2d(channels, output_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(output_channels))
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.residual(x).add_(self.shortcut(x)))


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, beside a shortcut, which is a 1x1 convolution of the
    activated input where the shape changes. He et al. 2016, arXiv 1603.05027, section 4."""

    def __init__(self, channels: int, output_channels: int, stride: int, convolution: Callable[..., nn.Module] = conv3x3):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.residual = nn.Sequential(
            convolution(channels, output_channels, stride),
            nn.BatchNorm2d(output_channels),
            nn.ReLU(),
            convolution(output_channels, output_channels),
        )
        self.shortcut = None
        if stride > 1 or channels != output_channels:
            self.shortcut = nn.Conv2d(channels, output_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.activation(x)
        return self.residual(activated).add_(x if self.shortcut is None else self.shortcut(activated))


class Concatenation(nn.Module):
    """The features `(N, D)` of several networks, side by side, `sizes` of them, each multiplied by its scale.

    Of images with several views, `(N, V, 28, 28)`, each network reads as many of the first as `views` says, one by one, and
    its features are their mean.
    """

    def __init__(self, networks: Sequence[nn.Module], sizes: Sequence[int], scales: Sequence[float], views: Sequence[int]):
        super().__init__()
        self.networks, self.sizes, self.scales, self.views = nn.ModuleList(networks), sizes, scales, views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = []
        for network, scale, count in zip(self.networks, self.scales, self.views):
            first_views = x[:, :count]
            rows = network(first_views.flatten(0, 1).unsqueeze(1))  # (N * V, D)
            features.append(scale * rows.unflatten(0, first_views.shape[:2]).mean(1))
        return torch.cat(features, 1)


class ConvBN(nn.Sequential):
    """A convolution or a linear layer, and batch normalisation of its output."""


def add_batch_norm(model: nn.Module) -> None:
    """Put batch normalisation after every convolution and hidden linear layer. Ioffe & Szegedy 2015, arXiv 1502.03167.

    Raises UserError if the model has batch normalisation already.
    """
    if any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in model.modules()):
        raise UserError("batch_norm=true: this architecture has batch normalisation of its own; leave it out")
    features = model.get_submodule("features")
    for name, layer in list(features.named_children()):
        if isinstance(layer, nn.Conv2d):
            setattr(features, name, ConvBN(layer, nn.BatchNorm2d(layer.out_channels)))
        elif isinstance(layer, nn.Linear):
            setattr(features, name, ConvBN(layer, nn.BatchNorm1d(layer.out_features)))


def fuse_batch_norm(model: SomeModel) -> SomeModel:
    """A copy in evaluation mode, with the batch normalisation of `add_batch_norm` fused into the weights before it: the
    same logits from the layers that `build_model` makes. Ding et al. 2021, arXiv 2101.03697, section 3.3."""
    model = copy.deepcopy(model).eval()
    features = model.get_submodule("features")
    for name, layer in list(features.named_children()):
        if isinstance(layer, ConvBN):
            fuse: Callable = fuse_conv_bn_eval if isinstance(layer[0], nn.Conv2d) else fuse_linear_bn_eval
            setattr(features, name, fuse(layer[0], layer[1]))
    return model
