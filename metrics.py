"""Metrics of a classifier: confusion matrix, precision, recall, F1, balanced accuracy, calibration error, confidence interval;
distances between images: nearest neighbours, mean pairwise distance.

The tests compare the classifier's metrics with scikit-learn's, whose import would take half as long as test.py.
"""

import math
from typing import NamedTuple

import torch
from tqdm import tqdm


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion, in 0..1. Wilson 1927, JASA 22(158)."""
    z = 1.959964
    centre = (correct + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * math.sqrt(correct * (n - correct) / n + z**2 / 4)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts, int64 `(classes, classes)`: true classes in rows, predicted ones in columns."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class_scores(confusion: torch.Tensor, class_names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1, in 0..1 (0 where there is nothing to divide by), and the number of true images."""
    counts = zip(class_names, confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist())
    return {
        name: {"precision": hit / max(predicted, 1), "recall": hit / max(n, 1), "f1": 2 * hit / max(n + predicted, 1), "n": n}
        for name, hit, n, predicted in counts
    }


def balanced_accuracy(confusion: torch.Tensor) -> float:
    """The mean recall, in 0..1, of the classes that have images: what accuracy would be if all had as many."""
    counts = confusion.sum(1)
    return (confusion.diag().double() / counts)[counts > 0].mean().item()


class Calibration(NamedTuple):
    """Predictions in bins of equal confidence, bin m of M holding ((m - 1) / M, m / M]."""

    counts: list[int]
    confidences: list[float]  # mean of each bin, 0 where it is empty
    accuracies: list[float]
    error: float  # expected calibration error, in 0..1: mean distance of the two, weighted by the bins' counts


def calibration(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> Calibration:
    """Of probabilities `(N, C)` and labels `(N,)`. Guo et al. 2017, arXiv 1706.04599, section 2 and equation 3."""
    confidence, predicted = probabilities.double().max(1)
    bin_index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(bin_index, minlength=bins)
    sums = [torch.bincount(bin_index, weights, bins) for weights in (confidence, (predicted == labels).double())]
    confidences, accuracies = (total / counts.clamp(1) for total in sums)
    error = (counts * (confidences - accuracies).abs()).sum().item() / len(labels)
    return Calibration(counts.tolist(), confidences.tolist(), accuracies.tolist(), error)


def nearest(queries: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the image nearest to each query, and its distance: root mean square difference in grey levels.

    Both uint8 `(N, V, 28, 28)`. Distances are those of integers, exact up to the final division and root.
    """
    flat = images.flatten(1).float()  # (N, 784)
    squares = flat.square().sum(1)
    chunks = tqdm(queries.flatten(1).float().split(500), "nearest pairs", disable=None, leave=False)
    indices = torch.cat([(squares - 2 * chunk @ flat.T).argmin(1) for chunk in chunks])  # a query's own square is constant
    return indices, (queries.flatten(1).double() - images[indices].flatten(1)).square().mean(1).sqrt()


def mean_distance(images: torch.Tensor) -> float:
    """Mean over all pairs of uint8 images `(N, 1, 28, 28)`: root mean square difference in grey levels."""
    return (torch.pdist(images.flatten(1).float()) / images[0].numel() ** 0.5).mean().item()
