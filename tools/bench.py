"""Benchmarks of speed and accuracy: `python tools/bench.py part=NAME [repeats=N] [key=value ...]`.

    part=train     `python train.py` against the same model trained with DataLoader: ten epochs, as the reference has it, of
                   which the one with the lowest validation loss is kept
    part=valid     validation accuracy over seeds 0 to N-1, each with its own split; for choosing settings
    part=accuracy  test accuracy over seeds 0 to N-1, and seconds of training (reads the test images N times)
    part=ladder    the same of the recipes in RUNGS, beside two models trained with DataLoader; draws plots/ladder.png
    part=photos    accuracy, on the photographs in photos=FOLDER, of Task 1 and of the model in out_dir or recipe= (photo)

Prints a row of figures per repeat, then each figure's mean, median and range. Sides that are compared alternate, each in a
fresh process. Leave the machine alone meanwhile.
"""

import json
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
from data_preprocessing import SHOES, split_indices
from idx import IDX_FILES, find_idx
from model import build_model
from script import load_settings, run_script
from tools import photos
from trainer import loss_and_accuracy

ORDINARY = {"cnn": (54, 0.001, 10), "resnet8": (64, 0.0001, 12), "deep_cnn": (32, 0.001, 8)}  # batch size, lr, epochs
RUNGS = {"fast": 10, "fast93": 5, "fast94": 5}  # recipes of the ladder -> seeds
Commands = dict[str, list[str]]  # of "train.py" and "test.py", which write to a folder of ours
Row = dict[str, float]  # name of a figure -> its value; accuracies in 0..1


class BenchSettings(TrainSettings):
    """Benchmark"""

    part: Literal["train", "valid", "accuracy", "ladder", "photos"] = setting("train", "what to measure")
    photos: str = setting("", "part=photos: folder with CLASS/* photographs")
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

    `architecture`: "cnn" for Task 1, "resnet8" or "deep_cnn" for ten classes.
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
        for number, line in enumerate(process.stdout, 1):
            seconds, (loss, accuracy) = time.perf_counter() - started, map(float, line.split())
            print(f"ordinary, epoch {number}: {seconds:.1f} s, loss {loss:.5f}, accuracy {accuracy:.3%}", flush=True)
            yield seconds, loss, accuracy


def copy_images(settings: Settings, folder: str) -> None:
    """Put the data set where torchvision looks for it."""
    raw = Path(folder) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        (raw / name).write_bytes(find_idx(name, settings.data_path))


def over_seeds(settings: BenchSettings, folder: str, commands: Commands) -> Iterator[Row]:
    """Train with seeds 0 to repeats-1: the best epoch's loss and accuracy or, if the part reads them, test images'."""
    for seed in range(settings.repeats):
        seconds = run(*commands["train.py"], f"seed={seed}")
        if settings.part in ("accuracy", "ladder"):
            run(*commands["test.py"])
            scores = json.loads(Path(folder, "ours", "scores.json").read_text())
            print(f"seed {seed}: {len(scores['mistakes'])} mistakes, the first {scores['mistakes'][:10]}")
            yield {"seconds": seconds, "test loss": scores["loss"], "accuracy": scores["accuracy"]}
        else:
            best = best_epoch(read_history(Path(folder, "ours", "history.jsonl"))[1])
            yield {"seconds": seconds, "validation loss": best["valid_loss"], "accuracy": best["valid_accuracy"]}


def compare_with_ordinary(settings: BenchSettings, folder: str, commands: Commands) -> Iterator[Row]:
    """Task 1: our training and `ordinary_training`, of which the epoch with the lowest validation loss is kept."""
    copy_images(settings, folder)
    run(*commands["train.py"])  # a warm-up
    for seed, ours in enumerate(over_seeds(settings, folder, commands)):
        epochs = list(ordinary_epochs(folder, seed, "cnn"))
        _, loss, accuracy = min(epochs, key=lambda epoch: epoch[1])
        seconds = epochs[-1][0]
        ordinary = {"ordinary seconds": seconds, "ordinary loss": loss, "ordinary accuracy": accuracy}
        yield ours | ordinary | {"ratio": seconds / ours["seconds"]}


def ladder(settings: BenchSettings, folder: str, commands: Commands) -> Iterator[Row]:
    """Seconds and test accuracy of RUNGS; seconds and validation accuracy of two models trained with DataLoader."""
    rungs: dict[str, list[Row]] = {recipe: [] for recipe in RUNGS}
    for recipe, seeds in RUNGS.items():
        named = {script: [*words, f"recipe={recipe}"] for script, words in commands.items()}
        for row in over_seeds(settings.model_copy(update={"repeats": seeds}), folder, named):
            rungs[recipe].append(row)
            yield {f"{recipe}, {name}": value for name, value in row.items()}
    copy_images(settings, folder)
    ordinary = {name: list(ordinary_epochs(folder, 0, name)) for name in ("resnet8", "deep_cnn")}
    plots.draw_ladder(rungs, ordinary, ROOT / "plots" / "ladder.png")


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, BenchSettings)
    print("settings:", settings)
    if settings.part == "photos":
        run_folder = settings.out_path if settings.recipe or settings.out_dir else ROOT / "runs" / "photo"
        return photos.measure(run_folder / "best_model.pt", settings.photos)
    measured = {"ladder": ", ".join(RUNGS), "train": "Task 1"}.get(settings.part)
    if measured and settings.recipe:
        raise UserError(f"recipe={settings.recipe}: part={settings.part} measures {measured}; use part=accuracy, or no recipe")
    if settings.part in ("train", "valid") and not settings.valid_ratio:
        raise UserError(f"part={settings.part}: needs validation images; use a valid_ratio above 0")
    for key in {"seed", "out_dir"} & settings.model_fields_set:
        raise UserError(f"{key}={getattr(settings, key)}: seeds are 0 to repeats-1, each in a folder of its own; leave it out")
    words = [word for word in arguments if word.partition("=")[0] not in ("part", "repeats")]
    tested = [word for word in words if word.partition("=")[0] in Settings.model_fields]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        out = f"out_dir={folder}/ours"
        commands = {"train.py": ["train.py", *words, out], "test.py": ["test.py", *tested, out]}
        part = {"train": compare_with_ordinary, "ladder": ladder}.get(settings.part, over_seeds)
        for row in part(settings, folder, commands):
            print(", ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            rows.append(row)
    for name in dict.fromkeys(name for row in rows for name in row):
        values = sorted(row[name] for row in rows if name in row)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        spread = f"median {statistics.median(values):.5g}, {values[0]:.5g} to {values[-1]:.5g}"
        print(f"{name}: mean {statistics.mean(values):.5g} ± {std:.2g}, {spread} (n={len(values)})")


if __name__ == "__main__":
    run_script(main)
