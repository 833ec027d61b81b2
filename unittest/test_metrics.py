"""Metrics: equal to scikit-learn's or to a value computed by hand."""

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

import metrics
from trainer import loss_and_accuracy


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2_000, 5, generator=generator) * 2
    labels = torch.randint(0, 4, (2_000,), generator=generator)  # class 4 is never true
    return logits, labels


def test_loss_and_accuracy_are_scikit_learns(sample):
    logits, labels = sample
    loss, accuracy = loss_and_accuracy(logits, labels)
    assert loss == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(5)), rel=1e-5)
    assert accuracy == accuracy_score(labels, logits.argmax(1))


def test_confusion_precision_recall_and_f1_are_scikit_learns(sample):
    logits, labels = sample
    confusion = metrics.confusion_matrix(labels, logits.argmax(1), 5)
    assert (confusion.numpy() == confusion_matrix(labels, logits.argmax(1))).all()
    ours = metrics.per_class_scores(confusion, tuple("abcde"))
    reference = precision_recall_fscore_support(labels, logits.argmax(1), zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "n"), reference):
        assert [ours[name][key] for name in "abcde"] == pytest.approx(values.tolist())


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_is_scikit_learns(sample):
    logits, labels = sample
    predicted = logits.argmax(1).where(labels > 0, 0)  # one class is always right, another one never true
    ours = metrics.balanced_accuracy(metrics.confusion_matrix(labels, predicted, 5))
    assert ours == pytest.approx(balanced_accuracy_score(labels, predicted)) and ours > 0.3


@pytest.mark.parametrize("correct, n", [(9_993, 10_000), (10_000, 10_000), (0, 20), (18, 20)])
def test_wilson_bounds_are_1_96_standard_deviations_from_the_observed_proportion(correct, n):
    low, high = metrics.wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        deviation = (bound * (1 - bound) / n) ** 0.5
        assert abs(correct / n - bound) / deviation == pytest.approx(1.96, abs=1e-3)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    probabilities = torch.tensor([[0.85, 0.15]] * 10 + [[0.45, 0.55]] * 10)
    labels = torch.tensor([0] * 7 + [1] * 3 + [1] * 8 + [0] * 2)  # 70 % right at 0.85, 80 % right at 0.55
    calibrated = metrics.calibration(probabilities, labels, bins=10)
    assert calibrated.error == pytest.approx((0.15 + 0.25) / 2, abs=1e-6)
    assert calibrated.counts == [0] * 5 + [10, 0, 0, 10, 0]
    assert (calibrated.confidences[5], calibrated.accuracies[5]) == pytest.approx((0.55, 0.8))


def test_mean_distance_is_in_grey_levels():
    images = torch.tensor([0, 10, 40], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    assert metrics.mean_distance(images) == pytest.approx((10 + 40 + 30) / 3)


def test_nearest_finds_planted_near_copies(train_data):
    images = train_data[0][:2_000]
    queries = images[[1_234, 56, 789]].clone()
    pixel = queries[1, 0, 14, 14]
    pixel += 28 if pixel < 128 else -28  # one pixel of 784 changed by 28 levels: root mean square 28 / sqrt(784) = 1
    indices, distances = metrics.nearest(queries, images)
    assert indices.tolist() == [1_234, 56, 789]
    assert distances.tolist() == pytest.approx([0, 1, 0])
