"""Benchmarks of speed and accuracy: `python tools/bench.py part=NAME [repeats=N] [key=value ...]`.

    part=train     `python train.py` against the same model trained with DataLoader: ten epochs, as the reference has it, of
                   which the one with the lowest validation loss is kept; also when its mean accuracy first passes ours
    part=test      `python test.py` against `python -c "import torch"` (reads the test images)
    part=valid     validation accuracy over seeds 0 to N-1, each with its own split; for choosing settings
    part=feed      images per second of training against those on one batch that is ready on the device
    part=accuracy  test accuracy over seeds 0 to N-1 (reads the test images N times)
    part=fast      part=accuracy of recipe=fast, and its seconds against those of ResNet-8, trained as its authors do, until it
                   has their accuracy on validation images

The two sides alternate, each in a fresh process. Leave the machine alone meanwhile.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import plots
from checkpoint import best_epoch, read_history
from config import ROOT, Settings, TrainSettings, UserError, setting
from data_preprocessing import IDX_FILES, SHOES, find_idx, load_splits, split_indices
from device import autocast, choose_device, choose_precision, keep_freed_memory
from model import build_model, load_model
from script import load_settings, run_script
from tools.results import OURS, RECIPES, REFERENCES, minutes_and_accuracy, read_seeds
from trainer import Trainer, loss_and_accuracy

ORDINARY = {"cnn": (54, 0.001, 10), "resnet8": (64, 0.0001, 1000)}  # the references' batch size, learning rate, epochs
FEED_STEPS = 50


class BenchSettings(TrainSettings):
    """Benchmark"""

    part: Literal["train", "test", "valid", "feed", "accuracy", "fast"] = setting("train", "what to measure")
    repeats: int = setting(3, "runs of each side, or seeds", ge=1, le=100)


def run(*command: str) -> float:
    """Wall-clock seconds of a command in a fresh process. Raises UserError if it fails."""
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, errors="replace")
    if ended.returncode:
        raise UserError(f"python {' '.join(command)} failed: {ended.stderr.strip().splitlines()[-1:]}")
    return time.perf_counter() - started


def ordinary_training(data_root: str, seed: int, architecture: str) -> None:
    """A model trained with DataLoader in float32; prints validation loss and accuracy, in 0..1, after each epoch.

    `architecture`: "cnn" for Task 1, "resnet8" for ten classes.
    """
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    batch_size, lr, epochs = ORDINARY[architecture]
    torch.manual_seed(seed)
    transform = Compose([ToTensor(), Normalize((0.2860,), (0.3530,))])
    label = (lambda fine_label: int(fine_label in SHOES)) if architecture == "cnn" else None
    dataset = FashionMNIST(data_root, transform=transform, target_transform=label)
    train, valid = split_indices(dataset.targets, valid_ratio=0.1, seed=seed)
    train_loader = DataLoader(Subset(dataset, train.tolist()), batch_size, shuffle=True)
    valid_loader = DataLoader(Subset(dataset, valid.tolist()), batch_size)
    if architecture == "cnn":
        layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 7 * 7, 2)]
    else:
        built = build_model(architecture, 10)
        layers = [built.features, built.classifier]
    model = nn.Sequential(*layers).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits, labels = map(torch.cat, zip(*((model(x), y) for x, y in valid_loader)))
        print(*loss_and_accuracy(logits, labels), flush=True)


def ordinary_epochs(folder: str, seed: int, architecture: str) -> Iterator[tuple[float, float, float]]:
    """Seconds from the start, validation loss and accuracy after each epoch of `ordinary_training` in a fresh process."""
    call = f"from tools import bench; bench.ordinary_training({folder!r}, {seed}, {architecture!r})"
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                loss, accuracy = map(float, line.split())
                yield time.perf_counter() - started, loss, accuracy
        finally:
            process.kill()  # the reader has seen enough


def copy_images(settings: Settings, folder: str) -> None:
    """Put the data set where torchvision looks for it."""
    raw = Path(folder) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        (raw / name).write_bytes(find_idx(name, settings.data_path))


def feed(settings: BenchSettings) -> None:
    """Print images per second of the training loop, and of the same model on one batch that is ready on the device."""
    keep_freed_memory()
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    split = load_splits(settings, device)[0]
    split = split._replace(train=split.train[: FEED_STEPS * settings.batch_size])
    trainer = Trainer(settings, settings.seed, *split, precision)
    steps, indices = trainer.steps[0], trainer.train[: settings.batch_size]
    x, labels = trainer.model.normalize(trainer.images[indices]), trainer.labels[indices]

    def train_on_ready_batch() -> None:
        trainer.model.train()
        for _ in range(steps):
            with autocast(device, precision):
                loss = F.cross_entropy(trainer.model.classifier(trainer.model.features(x)), labels)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        loss.item()  # waits for the device

    rates: dict[str, list[float]] = {"training": [], "one batch that is ready": []}
    for _ in range(settings.repeats + 1):
        for values, run_steps in zip(rates.values(), (lambda: trainer.train_epoch(1, []), train_on_ready_batch)):
            started = time.perf_counter()
            run_steps()
            values.append(steps * settings.batch_size / (time.perf_counter() - started))
    for name, values in rates.items():
        print(summary(name, values[1:], "images/s"))  # the first one is a warm-up
    print(summary("ratio", [loop / ready for loop, ready in list(zip(*rates.values()))[1:]], ""))


def summary(name: str, values: list[float], unit: str) -> str:
    return f"{name}: median {statistics.median(values):.2f} {unit}, {min(values):.2f} to {max(values):.2f} (n={len(values)})"


def kept_epoch(folder: str) -> dict:
    return best_epoch(read_history(Path(folder, "ours", "history.jsonl"))[1])


def test_time(settings: BenchSettings, folder: str, test: list[str]) -> None:
    """Seconds of `python test.py` and of importing torch."""
    path = settings.out_path / "best_model.pt"
    load_model(path)  # raises UserError if there is none
    Path(folder, "ours").mkdir()
    shutil.copy(path, f"{folder}/ours")
    commands = test, ["-c", "import torch"]
    pairs = [tuple(run(*command) for command in commands) for _ in range(settings.repeats + 1)][1:]  # the first is a warm-up
    for name, values in zip(("python test.py", "import torch"), zip(*pairs)):
        print(summary(name, list(values), "s"))
    print(summary("ratio", [ours / other for ours, other in pairs], "times"))


def compare_with_ordinary(settings: BenchSettings, folder: str, train: list[str]) -> None:
    """Task 1: seconds and validation accuracy of our training and of `ordinary_training`, seed by seed."""
    ours, ordinary = [], []  # per seed: (seconds, loss, accuracy), and a list of such triples by epoch
    run(*train)  # a warm-up
    for seed in range(settings.repeats):
        seconds = run(*train, f"seed={seed}")
        best = kept_epoch(folder)
        ours.append((seconds, best["valid_loss"], best["valid_accuracy"]))
        ordinary.append(list(ordinary_epochs(folder, seed, "cnn")))
        for name, (seconds, loss, accuracy) in [("ours", ours[-1]), *enumerate(ordinary[-1], 1)]:
            print(f"seed {seed}: {name}: {seconds:.1f} s, validation loss {loss:.5f}, accuracy {accuracy:.3%}", flush=True)
    kept = [min(epochs, key=lambda epoch: epoch[1]) for epochs in ordinary]
    for name, triples in (("ours", ours), ("ordinary training", kept)):
        _, loss, accuracy = map(statistics.mean, zip(*triples))
        print(f"{name}: kept epochs' mean validation loss {loss:.5f}, accuracy {accuracy:.3%}")
    means = [statistics.mean(triple[2] for triple in epoch) for epoch in zip(*ordinary)]
    print("ordinary training's mean validation accuracy by epoch:", *(f"{mean:.3%}" for mean in means))
    print(summary("python train.py", [seconds for seconds, _, _ in ours], "s"))
    target = statistics.mean(triple[2] for triple in ours)
    matching = [number for number, mean in enumerate(means) if mean >= target][:1]
    for number in (len(means) - 1, *matching):
        all_seconds = [epochs[number][0] for epochs in ordinary]
        print(summary(f"ordinary training, {number + 1} epochs", all_seconds, "s"))
        print(summary("  ratio", [seconds / our[0] for seconds, our in zip(all_seconds, ours)], "times"))


def over_seeds(settings: BenchSettings, folder: str, train: list[str], test: list[str]) -> tuple[list[float], list[float]]:
    """Train with seeds 0 to repeats-1; seconds and validation accuracy, or, with a command `test`, test accuracy, of each."""
    accuracies, all_seconds = [], []
    for seed in range(settings.repeats):
        all_seconds.append(run(*train, f"seed={seed}"))
        if test:
            run(*test)
            scores = json.loads(Path(f"{folder}/ours/scores.json").read_text())
            accuracies.append(scores["accuracy"])
            note = f"mistakes {scores['mistakes'] if len(scores['mistakes']) < 20 else len(scores['mistakes'])}"
        else:
            accuracies.append(kept_epoch(folder)["valid_accuracy"])
            note = f"loss {kept_epoch(folder)['valid_loss']:.5f}"
        print(f"seed {seed}: {all_seconds[-1]:.1f} s, {accuracies[-1]:.3%}, {note}", flush=True)
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(
        f"{'test' if test else 'validation'}: mean {statistics.mean(accuracies):.3%}, standard deviation {std:.3%}, "
        f"{min(accuracies):.3%} to {max(accuracies):.3%} (n={len(accuracies)})"
    )
    print(summary(" ".join(("python", *train[:-1])), all_seconds, "s"))
    return all_seconds, accuracies


def fast(settings: BenchSettings, folder: str, train: list[str], test: list[str]) -> None:
    """Seconds to an accuracy: recipe=fast, and ResNet-8 trained as its authors do until it has their accuracy."""
    ours, accuracies = over_seeds(settings, folder, train, test)
    ordinary = []
    for seconds, _, accuracy in ordinary_epochs(folder, 0, "resnet8"):
        ordinary.append((seconds / 60, accuracy))
        print(f"ordinary training of resnet8, epoch {len(ordinary)}: {seconds:.0f} s, {accuracy:.2%}", flush=True)
        if accuracy >= REFERENCES["resnet8"]:
            break
    print(summary("ratio", [ordinary[-1][0] * 60 / seconds for seconds in ours], "times"))
    recipes = {recipe: minutes_and_accuracy(seeds) for recipe in RECIPES if (seeds := read_seeds(recipe))}
    recipes["fast"] = (statistics.mean(ours) / 60, statistics.mean(accuracies))
    path = ROOT / "plots" / "time_to_accuracy.png"
    plots.draw_time_to_accuracy(recipes, OURS, ordinary, path)
    print(f"wrote {path}")


def main(arguments: list[str]) -> None:
    if "part=fast" in arguments and not any(word.startswith("recipe=") for word in arguments):
        arguments = ["recipe=fast", *arguments]
    settings = load_settings(arguments, BenchSettings)
    if settings.part == "feed":
        return feed(settings)
    words = [word for word in arguments if word.partition("=")[0] not in ("part", "repeats", "out_dir", "seed")]
    with tempfile.TemporaryDirectory() as folder:
        out = f"out_dir={folder}/ours"
        train = ["train.py", *words, out]
        test = ["test.py", *(word for word in words if word.partition("=")[0] in Settings.model_fields), out]
        if settings.part in ("train", "fast"):
            copy_images(settings, folder)
        if settings.part == "train":
            compare_with_ordinary(settings, folder, train)
        elif settings.part == "test":
            test_time(settings, folder, test)
        elif settings.part == "fast":
            fast(settings, folder, train, test)
        else:
            over_seeds(settings, folder, train, test if settings.part == "accuracy" else [])


if __name__ == "__main__":
    run_script(main)
