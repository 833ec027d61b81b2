"""Last layers learnt from a few images of each class, for many episodes at once.

Shapes: E episodes, C classes, K support images of each, N images, U unlabelled ones, D features (1,568).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from augmentation import warp
from optimizer import Optimizer

Extract = Callable[[torch.Tensor], torch.Tensor]  # uint8 images (N, 1, 28, 28) -> float32 features (N, D)

STRETCH = 0.4  # of the height, either way, with the sole where it is: a shaft may be high or low
SHIFT = 2.0  # pixels, either way
GAMMA = 2.0  # grey values to the power of 1/2 to 2: leather may be light or dark
VIEWS = 8  # distorted copies of each support image
SHARPNESS = 300.0  # logit of a discriminant of 1: on the pool, confidence is accuracy


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each uint8 image `(N, 1, 28, 28)` stretched upwards, shifted and its grey values bent, by chance."""

    def between(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    height = between(1 - STRETCH, 1 + STRETCH)
    right, down = between(-SHIFT, SHIFT) / 14, between(-SHIFT, SHIFT) / 14  # an image is 2 wide: 14 pixels are 1
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    theta = torch.stack([one, zero, right, zero, 1 / height, 1 - 1 / height + down], 1).view(-1, 2, 3)  # y = 1 stays
    bent = warp(images.float() / 255, theta) ** (GAMMA ** between(-1, 1)).view(-1, 1, 1, 1)
    return (bent * 255).round().to(torch.uint8)


class FisherLearner:
    """Fisher's discriminant, with the within-class scatter of distorted images, and help from unlabelled ones.

    Four images can't say which differences between them matter. Two things can, and need no label: how features move
    when an image is distorted in ways that never change its class, and where other images of the same kind lie.
    Features are centred on the unlabelled images' mean and scaled to unit length; the directions in which distortions
    move them are shrunk by `shrink * (scatter + shrink)^-1` (Hastie et al., The Elements of Statistical Learning, 4.3).
    Each round lets the unlabelled images choose a class, softly, and moves each class mean half way to the mean of
    those that chose it (soft k-means: Ren et al. 2018, arXiv 1803.00676, 3.1.1).
    """

    def __init__(self, extract: Extract, unlabelled: torch.Tensor, seed: int, shrink: float, rounds: int):
        self.extract, self.rounds = extract, rounds
        self.generator = torch.Generator().manual_seed(seed)
        features = extract(unlabelled)
        self.mean = features.mean(0)
        self.length = (features - self.mean).norm(dim=1).mean()
        self.unlabelled = self._place(features)  # (U, D)
        moved = self._place(extract(distort(unlabelled, self.generator))) - self.unlabelled
        scatter = moved.T @ moved / len(moved)
        self.metric = shrink * torch.linalg.inv(scatter + shrink * torch.eye(len(scatter)))  # (D, D)

    def _place(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features - self.mean, dim=-1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """What `fit` wants of support images: `(N, D)`, the mean over each one's distorted copies."""
        copies = [images, *(distort(images, self.generator) for _ in range(VIEWS))]
        return torch.stack([self._place(self.extract(copy)) for copy in copies]).mean(0)

    def fit(self, supports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `(E, C, D)` and biases `(E, C)`, for raw features, from embedded supports `(E, C, K, D)`."""
        prototypes = means = supports.mean(2)  # (E, C, D)
        for _ in range(self.rounds):
            directions, offsets = self._discriminants(means)
            scores = torch.einsum("ud,ecd->euc", self.unlabelled, directions) + offsets.unsqueeze(1)
            chosen = (SHARPNESS * scores).softmax(2)  # (E, U, C)
            theirs = torch.einsum("euc,ud->ecd", chosen, self.unlabelled) / chosen.sum(1).unsqueeze(2)
            means = (prototypes + theirs) / 2
        directions, offsets = self._discriminants(means)
        weights = SHARPNESS / self.length * directions
        return weights, SHARPNESS * offsets - weights @ self.mean

    def _discriminants(self, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions `(E, C, D)` and offsets `(E, C)`: the boundary between two classes runs half way between their means."""
        middle = means.mean(1, keepdim=True)
        apart = means - middle
        directions = apart @ self.metric
        return directions, -(directions * (middle + apart / 2)).sum(2)


class AdamLearner:
    """Adam on the supports' raw features, every step all of them, as the reference does; starts from the layer `first`."""

    def __init__(self, extract: Extract, first: nn.Linear, steps: int, lr: float):
        self.extract, self.first, self.steps, self.lr = extract, first, steps, lr

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.extract(images)

    def fit(self, supports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As FisherLearner's."""
        episodes, classes, shots, size = supports.shape
        x = supports.reshape(episodes, classes * shots, size)
        labels = torch.arange(classes).repeat_interleave(shots).repeat(episodes)  # (E * C * K,)
        weights = self.first.weight.detach().repeat(episodes, 1, 1).requires_grad_()
        biases = self.first.bias.detach().repeat(episodes, 1).requires_grad_()
        optimizer = Optimizer("adam", [weights, biases], self.lr)
        for _ in range(self.steps):
            logits = (x @ weights.transpose(1, 2) + biases.unsqueeze(1)).flatten(0, 1)  # (E * C * K, C)
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels, reduction="sum") / (classes * shots)).backward()  # each episode's mean loss
            optimizer.step()
        return weights.detach(), biases.detach()
