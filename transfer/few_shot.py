"""Few-shot learners of the last layer, for many episodes at once.

Shapes: E episodes, C classes, K support images of each, N images, V views of each, U unlabelled ones, D features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from augmentation import uniform, warp
from optimizer import FusedOptimizer

Extract = Callable[[torch.Tensor], torch.Tensor]  # uint8 images (N, V, 28, 28) -> float32 features (N, D)

SHIFT = 2.0  # pixels, either way
GAMMA = 2.0  # grey values to the power of 1/2 to 2: leather may be light or dark
SHRINKAGE = 0.001  # of the directions in which distortions move the features
PENALTY = 0.0003  # of the squared weights in LogisticLearner; chosen, as SPREAD, on photographs
SPREAD = 2.4  # standard deviation of MeanLearner's logits over the unlabelled images
RESEMBLANCE = 0.7  # standard deviations: the pool's boots are at 0.2 to 0.3, photographs from elsewhere at 1.4 to 3.4


class Source(NamedTuple):
    """How images of one source vary within a class, what unlabelled images tell about them, and how sure one can be."""

    stretch: float  # of the height, either way, with the sole in place: a shaft may be high or low
    tilt: float  # degrees, either way
    size: float  # natural logarithm, either way
    hflip: float  # probability
    rounds: int  # of soft k-means over the unlabelled images
    copies: int  # distorted, of each support image
    sharpness: float  # inverse temperature of the discriminants, calibrated


DATA_SET = Source(stretch=0.4, tilt=0, size=0, hflip=0, rounds=3, copies=32, sharpness=300)  # chosen on the pool
PHOTOGRAPHS = Source(stretch=0.2, tilt=8, size=0.2, hflip=0.5, rounds=0, copies=8, sharpness=75)  # chosen on photographs


def distort(images: torch.Tensor, source: Source, generator: torch.Generator) -> torch.Tensor:
    """Each uint8 image `(N, V, 28, 28)` stretched upwards, shifted, gamma-corrected, tilted, resized and flipped at random."""
    count = len(images)
    height = uniform(count, 1 - source.stretch, 1 + source.stretch, generator)
    right, down = (uniform(count, -SHIFT, SHIFT, generator) / 14 for _ in range(2))  # an image is 2 wide: 14 pixels are 1
    gamma = GAMMA ** uniform(count, -1, 1, generator)
    angle = uniform(count, -source.tilt, source.tilt, generator).deg2rad()
    size = uniform(count, -source.size, source.size, generator).exp()
    sign = (uniform(count, 0, 1, generator) >= source.hflip) * 2 - 1
    cos, sin = angle.cos() / size, angle.sin() / size
    warped = warp(images, sign * cos, -sign * sin, right, sin / height, cos / height, 1 - 1 / height + down)  # y = 1 stays
    return (warped ** gamma.view(-1, 1, 1, 1) * 255).round().to(torch.uint8)


def similar_class(images: torch.Tensor, examples: torch.Tensor) -> int | None:
    """Features `(N, D)` of images and `(L, M, D)` of examples of L classes -> the class that the images come from, or None.

    They come from a class if they are, on average, less than RESEMBLANCE farther from its mean than its own examples.
    """
    centre = examples.mean((0, 1))
    images, examples = (F.normalize(features - centre, dim=-1) for features in (images, examples))
    means = examples.mean(1, keepdim=True)  # (L, 1, D)
    own = (examples - means).norm(dim=2)  # (L, M)
    excess = ((images - means).norm(dim=2).mean(1) - own.mean(1)) / own.std(1)  # (L,)
    return int(excess.argmin()) if excess.min() < RESEMBLANCE else None


class FisherLearner:
    """Fisher's discriminant whose within-class scatter comes from distorted images, refined on unlabelled images.

    A few images can't tell which differences between them matter. Unlabelled images can: distortions that never change a
    class show which directions of the feature space to shrink, by `s * (scatter + s)^-1` with the shrinkage s (Hastie et
    al., The Elements of Statistical Learning, 4.3). Features are centred on the unlabelled images' mean and scaled to unit
    length. Each round, where the source has any, assigns the unlabelled images softly to the classes, and moves each class
    mean half way to the mean of the images assigned to it (soft k-means: Ren et al. 2018, arXiv 1803.00676, 3.1.1).
    """

    def __init__(
        self, extract: Extract, unlabelled: torch.Tensor, source: Source, seed: int, features: torch.Tensor | None = None
    ):
        """`features`: of the unlabelled images, if they are known."""
        self.extract, self.source = extract, source
        self.generator = torch.Generator().manual_seed(seed)
        features = extract(unlabelled) if features is None else features
        self.mean = features.mean(0)
        self.length = (features - self.mean).norm(dim=1).mean()
        self.unlabelled = self._normalize(features)  # (U, D)
        differences = self._normalize(extract(distort(unlabelled, source, self.generator))) - self.unlabelled
        scatter = differences.T @ differences / len(differences)
        self.metric = SHRINKAGE * torch.linalg.inv(scatter + SHRINKAGE * torch.eye(len(scatter)))  # (D, D)

    def _normalize(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features - self.mean, dim=-1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """The input of `fit` from support images: `(N, D)`, the mean features of each one's distorted copies."""
        copies = [images, *(distort(images, self.source, self.generator) for _ in range(self.source.copies))]
        return torch.stack([self._normalize(self.extract(copy)) for copy in copies]).mean(0)

    def fit(self, supports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `(E, C, D)` and biases `(E, C)`, for raw features, from embedded supports `(E, C, K, D)`."""
        prototypes = means = supports.mean(2)  # (E, C, D)
        for _ in range(self.source.rounds):
            directions, offsets = self._discriminants(means)
            scores = torch.einsum("ud,ecd->euc", self.unlabelled, directions) + offsets.unsqueeze(1)
            weights = (self.source.sharpness * scores).softmax(2)  # (E, U, C)
            unlabelled_means = torch.einsum("euc,ud->ecd", weights, self.unlabelled) / weights.sum(1).unsqueeze(2)
            means = (prototypes + unlabelled_means) / 2
        directions, offsets = self._discriminants(means)
        weights = self.source.sharpness / self.length * directions
        return weights, self.source.sharpness * offsets - weights @ self.mean

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


class LogisticLearner:
    """Logistic regression on features of several networks, each network's weighed by how well they tell the supports apart.

    A network's features are scaled to unit length, on average over the unlabelled images, and by r - 1, where r is the mean
    squared distance between two supports of different classes, divided by that between two of the same class: a network that
    doesn't know the difference adds noise only.
    """

    def __init__(self, unlabelled: torch.Tensor, sizes: Sequence[int]):
        """`unlabelled`: features `(U, D)`; `sizes`: how many each network has, D in all."""
        self.mean, self.sizes = unlabelled.mean(0), sizes
        self.lengths = [part.square().sum(1).mean().sqrt() for part in (unlabelled - self.mean).split(sizes, 1)]

    def fit(self, supports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As FisherLearner's, from supports' features."""
        from sklearn.linear_model import LogisticRegression  # here: it takes a second to import

        _, classes, shots, _ = supports.shape
        labels = torch.arange(classes).repeat_interleave(shots)  # (C * K,)
        x = (supports - self.mean).flatten(1, 2)  # (E, C * K, D)
        scales = self._scales(x, labels)  # (E, D)
        layers = []
        for rows in x * scales.unsqueeze(1):
            regression = LogisticRegression(C=1 / (PENALTY * len(labels)), max_iter=1_000).fit(rows.numpy(), labels.numpy())
            layer = torch.from_numpy(np.column_stack([regression.coef_, regression.intercept_])).float()  # (C, D + 1)
            layers.append(layer if classes > 2 else torch.cat([-layer, layer]) / 2)  # of two classes it has one row
        weights = torch.stack(layers)[:, :, :-1] * scales.unsqueeze(1)  # (E, C, D)
        return weights, torch.stack(layers)[:, :, -1] - weights @ self.mean

    def _scales(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What to multiply the supports' features `(E, C * K, D)` by, `(E, D)`."""
        is_same = labels == labels.unsqueeze(1)
        is_pair = is_same & ~torch.eye(len(labels), dtype=torch.bool)
        excesses = []
        for part in x.split(self.sizes, 2):
            distances = torch.cdist(part, part).square()  # (E, C * K, C * K)
            ratio = distances[:, ~is_same].mean(1) / distances[:, is_pair].mean(1)  # not a number for one image of each class
            excesses.append((ratio - 1).clamp(0.02, 100).nan_to_num(1))
        total = torch.stack(excesses).square().sum(0).sqrt()  # (E,)
        parts = zip(excesses, self.lengths, self.sizes)
        return torch.cat([(excess / total / length).unsqueeze(1).expand(-1, size) for excess, length, size in parts], 1)


class MeanLearner:
    """The mean of three learners' logits, for photographs: the learners fail on different ones.

    Each one's logits are scaled to the same standard deviation over the unlabelled images.
    """

    def __init__(self, fisher: FisherLearner, adam: AdamLearner, logistic: LogisticLearner, unlabelled: torch.Tensor):
        """`unlabelled`: features `(U, D)`."""
        self.fisher, self.others, self.unlabelled = fisher, (adam, logistic), unlabelled
        self.extract = fisher.extract

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fisher.embed(images), self.extract(images)], 1)  # (N, 2 * D)

    def fit(self, supports: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As FisherLearner's, from supports `(E, C, K, 2 * D)`."""
        own, features = supports.chunk(2, 3)
        all_weights, all_biases = [], []
        for weights, biases in (self.fisher.fit(own), *(learner.fit(features) for learner in self.others)):
            logits = torch.einsum("ud,ecd->euc", self.unlabelled, weights) + biases.unsqueeze(1)
            spread = (logits - logits.mean(2, keepdim=True)).flatten(1).std(1)  # (E,); 0 if all classes have the same images
            scale = SPREAD / spread.clamp(min=1e-6)
            all_weights.append(weights * scale.view(-1, 1, 1))
            all_biases.append(biases * scale.view(-1, 1))
        return torch.stack(all_weights).mean(0), torch.stack(all_biases).mean(0)
