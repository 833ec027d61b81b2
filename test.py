"""Evaluate best_model.pt on the 10,000 test images: `python test.py [recipe=NAME] [key=value ...]`.

Writes scores.json and plots (confusion matrix, mistakes, features in two dimensions, reliability, one random test image as
predict.py shows it) into out_dir. The network and how its input is normalised come from best_model.pt.
"""

import random
import time
from typing import Literal

import torch
from pydantic import Field

import checkpoint
import plots
import predict
from config import OF_TRAINING, Settings, load_settings, run_script
from data_preprocessing import labels_by_name, load_images
from metrics import calibration, confusion_matrix, per_class_scores, wilson_interval
from model import choose_device, count_parameters, evaluate, infer, layers
from networks import Network

TASKS = {2: "clothes or shoe", 10: "ten garments"}


class TestSettings(Settings):
    UNREAD = OF_TRAINING
    tta: Literal["none", "mirror"] = Field(
        "none", description="test-time averaging: mirror = the mean probability of each image and its mirror image"
    )


@torch.inference_mode()
def classify(network: Network, features: torch.Tensor) -> torch.Tensor:
    """Logits, float32 on the CPU, of what `network.features` gave."""
    return network.classifier(features.to(network.classifier.weight.device)).cpu()


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TestSettings)
    print("settings:", settings)
    out = settings.out_path
    device = choose_device(settings.device)
    path = out / "best_model.pt"
    saved = checkpoint.load(path, "best_model")
    network = checkpoint.rebuild(saved, path).to(device)
    class_names = tuple(saved["class_names"])

    images, garments = load_images("t10k", settings.data_path)
    labels = labels_by_name(garments, class_names)
    precision = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32  # auto: the same figures everywhere
    features = infer(network.features, images, saved["mean"], saved["std"], precision)  # (10000, D)
    logits = classify(network, features)
    if settings.tta == "mirror":
        mirrored = classify(network, infer(network.features, images.flip(-1), saved["mean"], saved["std"], precision))
        logits = torch.stack([logits.log_softmax(1), mirrored.log_softmax(1)]).logsumexp(0)  # up to a constant

    loss, accuracy = evaluate(logits, labels)
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    calibrated = calibration(probabilities, labels)
    confusion = confusion_matrix(labels, predicted, len(class_names))
    wrong = torch.nonzero(predicted != labels).squeeze(1)
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    correct = len(labels) - len(wrong)
    low, high = wilson_interval(correct, len(labels))
    scores = {
        "task": TASKS[saved["output_dim"]],
        "architecture": saved["architecture"],
        "parameters": count_parameters(network),
        "multiply_adds": sum(layer.multiply_adds for layer in layers(network)),
        "tta": settings.tta,
        "n": len(labels),
        "correct": correct,
        "accuracy": accuracy,
        "accuracy_ci95": [low, high],
        "loss": loss,
        "calibration_error": calibrated.error,
        "per_class": per_class_scores(confusion, class_names),
        "confusion": confusion.tolist(),
        "mistakes": wrong.tolist(),
    }
    print(f"{path}: epoch {saved['epoch']}, {saved['architecture']}, {scores['parameters']:,} parameters")
    print(f"{'class':12} precision  recall     f1      n")
    for name, row in scores["per_class"].items():
        print(f"{name:12} {row['precision']:9.3%} {row['recall']:7.3%} {row['f1']:7.3%} {row['n']:6,}")
    plots.draw_confusion(confusion.numpy(), class_names, out / "plots" / "confusion.png")
    plots.draw_mistakes(
        images[wrong].squeeze(1).numpy(),
        wrong.tolist(),
        [class_names[label] for label in labels[wrong]],
        [class_names[label] for label in predicted[wrong]],
        confidence[wrong].tolist(),
        out / "plots" / "mistakes.png",
    )
    torch.manual_seed(0)  # of the random start of the decomposition
    components, lengths, _ = torch.pca_lowrank(features)
    plots.draw_features(
        (components[:, :2] * lengths[:2]).numpy(),
        (lengths[:2].square() / features.var(0).sum() / (len(features) - 1)).tolist(),
        labels.numpy(),
        class_names,
        images.squeeze(1).numpy(),
        out / "plots" / "features.png",
    )
    plots.draw_reliability(*calibrated, out / "plots" / "reliability.png")
    scores["seconds"] = round(time.perf_counter() - started, 3)
    scores["versions"] = checkpoint.versions()
    checkpoint.save_json(out / "scores.json", scores)
    sample = random.Random(settings.seed).randrange(len(images))
    predict.predict_test_image(network, saved, images, labels, sample, out / "plots" / "prediction.png")
    print(
        f"test accuracy {accuracy:.2%} ({correct:,} of {len(labels):,}, 95 % interval {low:.2%} to {high:.2%}), "
        f"loss {loss:.5f}, calibration error {scores['calibration_error']:.3%}; wrote {out / 'scores.json'}"
    )


if __name__ == "__main__":
    run_script(main)
