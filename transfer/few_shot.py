"""Few-shot learners of the last layer, for many episodes at once.

Shapes: E episodes, C classes, K support images of each, N images, U unlabelled ones, D features (1,568).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from augmentation import uniform, warp
from optimizer import FusedOptimizer

Extract = Callable[[torch.Tensor], torch.Tensor]  # uint8 images (N, 1, 28, 28) -> float32 features (N, D)

STRETCH = 0.4  # of the height, either way, with the sole in place: a shaft may be high or low
SHIFT = 2.0  # pixels, either way
GAMMA = 2.0  # grey values to the power of 1/2 to 2: leather may be light or dark
VIEWS = 8  # distorted copies of each support image
SHARPNESS = 300.0  # logit of a discriminant of 1: calibrated on the pool


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each uint8 image `(N, 1, 28, 28)` stretched upwards, shifted and gamma-corrected at random."""
    count = len(images)
    height = uniform(count, 1 - STRETCH, 1 + STRETCH, generator)
    right, down = (uniform(count, -SHIFT, SHIFT, generator) / 14 for _ in range(2))  # an image is 2 wide: 14 pixels are 1
    one, zero = torch.ones(count), torch.zeros(count)
    warped = warp(images, one, zero, right, zero, 1 / height, 1 - 1 / height + down)  # y = 1 stays
    gamma = GAMMA ** uniform(count, -1, 1, generator)
    return (warped ** gamma.view(-1, 1, 1, 1) * 255).round().to(torch.uint8)


class FisherLearner:
    """Fisher's discriminant whose within-class scatter comes from distorted images, refined on unlabelled images.

    A few images can't tell which differences between them matter. Unlabelled images can: distortions that never change a
    class show which directions of the feature space to shrink, by `shrink * (scatter + shrink)^-1` (Hastie et al., The
    Elements of Statistical Learning, 4.3). Features are centred on the unlabelled images' mean and scaled to unit length.
    Each round assigns the unlabelled images softly to the classes, and moves each class mean half way to the mean of the
    images assigned to it (soft k-means: Ren et al. 2018, arXiv 1803.00676, 3.1.1).
    """

    def __init__(self, extract: Extract, unlabelled: torch.Tensor, seed: int, shrink: float, rounds: int):
        self.extract, self.rounds = extract, rounds
        self.generator = torch.Generator().manual_seed(seed)
        features = extract(unlabelled)
        self.mean = features.mean(0)
        self.length = (features - self.mean).norm(dim=1).mean()
        self.unlabelled = self._normalize(features)  # (U, D)
        differences = self._normalize(extract(distort(unlabelled, self.generator))) - self.unlabelled
        scatter = differences.T @ differences / len(differences)
        self.metric = shrink * torch.linalg.inv(scatter + shrink * torch.eye(len(scatter)))  # (D, D)

    def _normalize(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features - self.mean, dim=-1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """The input of `fit` from support images: `(N, D)`, the mean features of each one's distorted copies."""
        copies = [images, *(distort(images, self.generator) for _ in range(VIEWS))]
        return torch.stack([self._normalize(self.extract(copy)) for copy in copies]).mean(0)

    def fit(self, supports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `(E, C, D)` and biases `(E, C)`, for raw features, from embedded supports `(E, C, K, D)`."""
        prototypes = means = supports.mean(2)  # (E, C, D)
        for _ in range(self.rounds):
            directions, offsets = self._discriminants(means)
            scores = torch.einsum("ud,ecd->euc", self.unlabelled, directions) + offsets.unsqueeze(1)
            weights = (SHARPNESS * scores).softmax(2)  # (E, U, C)
            unlabelled_means = torch.einsum("euc,ud->ecd", weights, self.unlabelled) / weights.sum(1).unsqueeze(2)
            means = (prototypes + unlabelled_means) / 2
        directions, offsets = self._discriminants(means)
        weights = SHARPNESS / self.length * directions
        return weights, SHARPNESS * offsets - weights @ self.mean

    def _discriminants(self, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions `(E, C, D)` and offsets `(E, C)`: the boundary between two classes is half way between their means."""
        centre = means.mean(1, keepdim=True)
        deviations = means - centre
        directions = deviations @ self.metric
        return directions, -(directions * (centre + deviations / 2)).sum(2)


class AdamLearner:
    """The reference's way: full-batch Adam on the supports' features, from the layer `first`."""

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
        optimizer = FusedOptimizer("adam", [weights, biases], self.lr)
        for _ in range(self.steps):
            logits = (x @ weights.transpose(1, 2) + biases.unsqueeze(1)).flatten(0, 1)  # (E * C * K, C)
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels, reduction="sum") / (classes * shots)).backward()  # each episode's mean loss
            optimizer.step()
        return weights.detach(), biases.detach()
