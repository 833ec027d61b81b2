"""Measure a GAN's samples against validation images: `python gan/score.py [key=value ...]`.

Writes scores.json and plots/nearest.png into out_dir, runs/gan by default. The test images are not read.
GAN-test: Shmelkov et al. 2018, arXiv 1807.09499; GAN-train: Ravuri & Vinyals 2019, arXiv 1905.10887.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import plots
from config import Settings, TrainSettings, UserError, resolve, setting
from data_preprocessing import CLASS_NAMES, Split, load_data, split_indices
from device import choose_device, choose_precision, move
from gan.networks import CLASSES, draw, load_generator
from metrics import mean_distance, nearest
from model import load_model
from script import load_settings, run_script
from trainer import Trainer, infer, loss_and_accuracy

CLASSIFIED = 10_000  # samples that the classifier classifies
COMPARED = 1_000  # samples that are compared with all training images
PAIRS = 20  # in the picture
LEARNER = ["recipe=deep_cnn_dropout", "schedule=linear", "lr=0.003", "epochs=10"]  # trained on samples alone


class ScoreSettings(Settings):
    """Scores"""

    out_dir: str = setting("runs/gan", "folder with generator.pt, for everything that a run writes", min_length=1)
    noise_std: float = setting(1.0, "standard deviation of the noise; below 1, less varied", gt=0, le=3)
    classifier: str = setting("runs/resnet14/best_model.pt", "the model that classifies the samples")


def accuracy_after_training(split: Split, settings: ScoreSettings) -> float:
    """Validation accuracy of a fresh LEARNER."""
    learner = load_settings([*LEARNER, f"seed={settings.seed}"], TrainSettings)
    device = choose_device(settings.device)
    split = Split(split.data.to(device), split.train.to(device), split.valid.to(device))
    trainer = Trainer(learner, learner.seed, split, choose_precision(settings.precision, device))
    lines = [trainer.run_epoch(epoch, []) for epoch in range(1, learner.epochs + 1)]
    return lines[-1]["valid_accuracy"]


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, ScoreSettings)
    print("settings:", settings)
    out, path, device = settings.out_path, resolve(settings.classifier), choose_device(settings.device)
    generator, generator_settings = load_generator(out / "generator.pt")
    classifier = move(load_model(path), device)
    if tuple(classifier.metadata["class_names"]) != CLASS_NAMES:
        raise UserError(f"classifier={settings.classifier}: has not Fashion-MNIST's ten classes; name another")
    seed, valid_ratio = generator_settings["seed"], generator_settings["valid_ratio"]
    checkpoint.check_same_split(path, classifier.metadata.get("settings", {}), seed, valid_ratio)
    data = load_data("train", settings.data_path, {})
    images, labels = data.images, data.labels
    train, valid = split_indices(labels, valid_ratio, seed)
    train = train[: settings.limit or None]
    count = min(CLASSIFIED, len(train) // 2)
    if labels[train[:count]].bincount(minlength=CLASSES).min() < 2:
        raise UserError(f"limit={settings.limit}: leaves fewer than two images of some class to compare with; raise it")
    sample_labels = torch.arange(len(train)) % CLASSES
    samples = draw(generator.to(device), sample_labels, settings.seed, settings.noise_std).cpu()
    subset, subset_labels = samples[:count], sample_labels[:count]

    scores: dict = {"n": count, "classifier": settings.classifier}
    # GAN-test: is a sample classified as its class?
    scores["gan_test"] = loss_and_accuracy(infer(classifier, subset), subset_labels)[1]
    scores["real_test"] = loss_and_accuracy(infer(classifier, images[valid]), labels[valid])[1]
    # variety within each class, relative to real images
    real, real_labels = images[train[:count]], labels[train[:count]]
    scores["variety"] = {
        name: mean_distance(subset[subset_labels == label]) / mean_distance(real[real_labels == label])
        for label, name in enumerate(CLASS_NAMES)
    }
    # copies of training images
    matches, distances = nearest(subset[:COMPARED], images[train])
    valid_distances = nearest(images[valid[:COMPARED]], images[train])[1]
    scores["nearest_distance"] = {"generated": distances.median().item(), "validation": valid_distances.median().item()}
    pairs = torch.stack([subset[:PAIRS], images[train[matches[:PAIRS]]]], 1).flatten(0, 2)  # (P, 2, 1, 28, 28) -> (2P, 28, 28)
    titles = [title for label, far in zip(subset_labels, distances[:PAIRS]) for title in (CLASS_NAMES[label], f"{far:.0f}")]
    heading = "Generated, and the nearest training image with its distance (root mean square, in grey levels)"
    plots.draw_sheet(pairs.numpy(), titles, 10, heading, out / "plots" / "nearest.png")
    # GAN-train: what does a classifier learn from samples alone?
    indices = torch.arange(len(train) + len(valid)).split([len(train), len(valid)])
    mixed_labels = torch.cat([sample_labels, labels[valid]])
    mixed = data._replace(images=torch.cat([samples, images[valid]]), labels=mixed_labels, fine_labels=mixed_labels)
    scores["gan_train"] = accuracy_after_training(Split(mixed, *indices), settings)
    scores["real_train"] = accuracy_after_training(Split(data, train, valid), settings)

    scores |= {"versions": checkpoint.versions(), "settings": settings.model_dump()}
    scores["seconds"] = round(time.perf_counter() - started, 3)
    checkpoint.save_json(out / "scores.json", scores)
    print(f"GAN-test: {scores['gan_test']:.2%} of samples classified as intended ({scores['real_test']:.2%} of real images)")
    print(f"GAN-train: {scores['gan_train']:.2%} after training on samples alone ({scores['real_train']:.2%} on real images)")
    print("variety relative to real images:", ", ".join(f"{name} {value:.0%}" for name, value in scores["variety"].items()))
    medians = "{generated:.1f} grey levels, of validation images {validation:.1f}".format(**scores["nearest_distance"])
    print(f"nearest training image: median distance {medians}; wrote {out / 'scores.json'}")


if __name__ == "__main__":
    run_script(main)
