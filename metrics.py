"""What a test says: confusion matrix, precision, recall, F1, calibration error, confidence interval; and what images
say of each other: nearest neighbours, pairwise and Fréchet distances.

scikit-learn has the test's figures too, and ours are compared with them; importing it would take half of what test.py takes.
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


def nearest(queries: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the image nearest to each query, and its distance: root mean square difference in grey levels.

    Both uint8 `(N, 1, 28, 28)`. Distances are those of integers, exact up to the final division and root.
    """
    flat = images.flatten(1).float()  # (N, 784)
    squares = flat.square().sum(1)
    found = []
    for chunk in tqdm(queries.flatten(1).float().split(500), desc="nearest pairs", disable=None, leave=False):
        found.append((squares - 2 * chunk @ flat.T).argmin(1))  # the query's own square is the same for all
    indices = torch.cat(found)
    apart = queries.flatten(1).double() - images[indices].flatten(1)
    return indices, apart.square().mean(1).sqrt()


def mean_distance(images: torch.Tensor) -> float:
    """Mean over all pairs of uint8 images `(N, 1, 28, 28)`: root mean square difference in grey levels."""
    return (torch.pdist(images.flatten(1).float()) / images[0].numel() ** 0.5).mean().item()


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Between normal distributions with the means and covariances of two sets of features `(N, D)` and `(M, D)`.

    Heusel et al. 2017, arXiv 1706.08500, equation 6, there with the features of another network.
    """
    one, other = one.double(), other.double()
    covariances = one.T.cov(), other.T.cov()
    root_trace = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return (apart + covariances[0].trace() + covariances[1].trace() - 2 * root_trace).item()
