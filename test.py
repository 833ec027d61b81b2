"""Evaluate best_model.pt on the test images of its data set: `python test.py [recipe=NAME] [checkpoint=FILE] [key=value ...]`.

Writes scores.json and plots (confusion matrix, mistakes, features in two dimensions, reliability, one random test image as
predict.py draws it) into out_dir.
"""

import random
import sys
import time
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import checkpoint
import plots
import predict
from config import TITLES, ModelFileSettings, setting
from data_preprocessing import load_test_data, training_settings
from device import choose_device, move
from metrics import balanced_accuracy, calibration, confusion_matrix, per_class_scores, wilson_interval
from model import Classifier, count_parameters, load_model, summarize
from script import load_settings, run_script
from trainer import infer, loss_and_accuracy

MAX_MISTAKES = 100  # in one picture


class TestSettings(ModelFileSettings):
    """Test"""

    tta: Literal["none", "hflip"] = setting("none", "test-time augmentation: hflip = mean of each image and its flip")


@torch.inference_mode()
def logits_and_features(
    model: Classifier, images: torch.Tensor, precision: torch.dtype, tta: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(N, C)`, with `tta` those of the mean probability, and the features of the images as they are `(N, D)`."""
    views = [images, images.flip(-1)] if tta == "hflip" else [images]
    features = [infer(model, view, precision, features=True) for view in views]
    logits = torch.stack([model.classifier(view.to(model.mean.device)).cpu() for view in features])  # (views, N, C)
    return logits[0] if len(views) == 1 else logits.log_softmax(2).logsumexp(0), features[0]  # up to a constant


def draw_pictures(
    scores: dict, images: torch.Tensor, labels: torch.Tensor, probabilities: torch.Tensor, features: torch.Tensor, folder: Path
) -> None:
    class_names, wrong = tuple(scores["per_class"]), torch.tensor(scores["mistakes"], dtype=torch.long)
    confidence, predicted = probabilities.max(1)
    plots.draw_confusion(torch.tensor(scores["confusion"]).numpy(), class_names, folder / "confusion.png")
    titles = [
        f"test {index}\n{class_names[labels[index]]}\npredicted {class_names[predicted[index]]}\n{confidence[index]:.1%}"
        for index in wrong[:MAX_MISTAKES].tolist()
    ]
    first = f"The {MAX_MISTAKES} most confident of" if len(wrong) > MAX_MISTAKES else "All"
    heading, columns = f"{first} {len(wrong)} mistakes on the test images", 5 if len(wrong) <= 20 else 10
    plots.draw_sheet(images[wrong[:MAX_MISTAKES], 0].numpy(), titles, columns, heading, folder / "mistakes.png")
    torch.manual_seed(0)  # of the decomposition's random start
    components, lengths, _ = torch.pca_lowrank(features)
    explained = (lengths[:2].square() / features.var(0).sum() / (len(features) - 1)).tolist()
    points = (components[:, :2] * lengths[:2]).numpy()
    plots.draw_features(points, explained, labels.numpy(), class_names, images[:, 0].numpy(), folder / "features.png")
    plots.draw_reliability(*calibration(probabilities, labels), folder / "reliability.png")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TestSettings)
    print("settings:", settings)
    out = settings.out_path
    path = settings.model_path
    model = move(load_model(path), choose_device(settings.device))
    class_names = tuple(model.metadata["class_names"])
    images, labels, *_ = load_test_data(model.metadata, settings)
    name, classes = training_settings(model.metadata, settings)["data"], len(class_names)
    precision = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32  # auto: the same figures everywhere
    logits, features = logits_and_features(model, images, precision, settings.tta)

    loss, accuracy = loss_and_accuracy(logits, labels)
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    confusion = confusion_matrix(labels, predicted, classes)
    wrong = torch.nonzero(predicted != labels).squeeze(1)
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    correct = len(labels) - len(wrong)
    low, high = wilson_interval(correct, len(labels))
    scores = {
        "task": " or ".join(class_names) if classes == 2 else f"{classes}-class {TITLES.get(name, name)}",
        "architecture": model.metadata["architecture"],
        "parameters": count_parameters(model),
        "macs": sum(layer.macs for layer in summarize(model)),
        "tta": settings.tta,
        "n": len(labels),
        "correct": correct,
        "accuracy": accuracy,
        "accuracy_ci95": [low, high],
        "balanced_accuracy": balanced_accuracy(confusion),
        "loss": loss,
        "calibration_error": calibration(probabilities, labels).error,
        "per_class": per_class_scores(confusion, class_names),
        "confusion": confusion.tolist(),
        "mistakes": wrong.tolist(),
    }
    print(f"{path}: epoch {model.metadata['epoch']}, {scores['architecture']}, {scores['parameters']:,} parameters")
    print(f"{'class':12} precision  recall     f1      n")
    for name, row in scores["per_class"].items():
        print(f"{name:12} {row['precision']:9.3%} {row['recall']:7.3%} {row['f1']:7.3%} {row['n']:6,}")
    print(f"balanced accuracy {scores['balanced_accuracy']:.2%}: the mean recall")
    draw_pictures(scores, images, labels, probabilities, features, out / "plots")
    scores["seconds"] = round(time.perf_counter() - started, 3)
    scores["versions"] = checkpoint.versions()
    checkpoint.save_json(out / "scores.json", scores)
    index = random.Random(settings.seed).randrange(len(images))
    predict.predict_test_image(model, images, labels, index, out / "plots" / "prediction.png")
    print(
        f"test accuracy {accuracy:.2%} ({correct:,} of {len(labels):,}, 95 % interval {low:.2%} to {high:.2%}), "
        f"loss {loss:.5f}, calibration error {scores['calibration_error']:.3%}; wrote {out / 'scores.json'}"
    )


if __name__ == "__main__":
    run_script(main)
