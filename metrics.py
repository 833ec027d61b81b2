"""What a test says: confusion matrix, precision, recall, F1, calibration error, confidence interval.

scikit-learn has the same figures, and the tests compare with them; importing it would take half of what test.py takes.
"""

import math
from typing import NamedTuple

import torch


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
    scores = {}
    for index, name in enumerate(class_names):
        hit, true, predicted = confusion[index, index].item(), confusion[index].sum().item(), confusion[:, index].sum().item()
        scores[name] = {
            "precision": hit / predicted if predicted else 0.0,
            "recall": hit / true if true else 0.0,
            "f1": 2 * hit / (true + predicted) if true + predicted else 0.0,
            "n": true,
        }
    return scores


class Calibration(NamedTuple):
    """Predictions in bins of equal confidence, bin m of M holding ((m - 1) / M, m / M]."""

    counts: list[int]
    confidences: list[float]  # mean of each bin, 0 where it is empty
    accuracies: list[float]
    error: float  # expected calibration error, in 0..1: mean distance of the two, weighted by the bins' counts


def calibration(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> Calibration:
    """Of probabilities `(N, C)` and labels `(N,)`. Guo et al. 2017, arXiv 1706.04599, section 2 and equation 3."""
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights, bins) for weights in (confidence, (predicted == labels).double())]
    confidences, accuracies = (total / counts.clamp(1) for total in sums)
    error = (counts * (confidences - accuracies).abs()).sum().item() / len(labels)
    return Calibration(counts.tolist(), confidences.tolist(), accuracies.tolist(), error)
