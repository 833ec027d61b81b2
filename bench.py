"""What the README says of speed, memory and accuracy, measured anew: `python bench.py part=NAME [repeats=N]`.

    part=train     `python train.py` against the same network trained the usual way: ten epochs, as the reference has it,
                   of which the one with the lowest validation loss is kept; also where its mean accuracy first passes ours
    part=test      `python test.py` against `python -c "import torch"` (reads the test images)
    part=memory    peak memory of training against that of holding the images
    part=valid     validation accuracy over seeds 0 to N-1, each with a split of its own: what settings are chosen by
    part=feed      steps of training, images drawn, augmented and normalised, against steps on one batch that is ready
    part=accuracy  test accuracy over seeds 0 to N-1 (reads the test images N times)

Each side runs in a fresh process, in turn. Leave the machine alone meanwhile.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from checkpoint import lowest, read_history
from config import ROOT, Settings, UserError, load_settings, run_script
from data_preprocessing import IDX_FILES, find_idx

ORDINARY_EPOCHS = 10  # the reference's number
FEED_STEPS = 50


class BenchSettings(Settings):
    part: Literal["train", "test", "memory", "valid", "feed", "accuracy"] = Field("train", description="what to measure")
    repeats: int = Field(3, ge=1, le=100, description="runs of each side, or seeds")


def run(*command: str) -> tuple[float, float]:
    """Wall seconds and peak memory, in MB, of a command in a fresh process. Raises UserError if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    complaint = process.stderr.read().decode(errors="replace")  # until the process closes it
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"python {' '.join(command)} failed: {complaint.strip().splitlines()[-1:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def ordinary_training(data_root: str, seed: int) -> None:
    """Task 1's network trained the usual way; prints validation loss and accuracy, in 0..1, after each epoch."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    from data_preprocessing import SHOES, split_indices
    from model import evaluate

    torch.manual_seed(seed)
    transform = Compose([ToTensor(), Normalize((0.2860,), (0.3530,))])
    dataset = FashionMNIST(data_root, transform=transform, target_transform=lambda garment: int(garment in SHOES))
    train, valid = split_indices(dataset.targets, valid_ratio=0.1, seed=seed)
    train_loader = DataLoader(Subset(dataset, train.tolist()), batch_size=54, shuffle=True)
    valid_loader = DataLoader(Subset(dataset, valid.tolist()), batch_size=54)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 2),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    criterion = nn.CrossEntropyLoss()
    for _ in range(ORDINARY_EPOCHS):
        network.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            criterion(network(x), y).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            logits, labels = map(torch.cat, zip(*((network(x), y) for x, y in valid_loader)))
        print(*evaluate(logits, labels), flush=True)


def feed(settings: BenchSettings) -> None:
    """Prints images a second of the training loop, and of the same network on one batch that is ready on the device."""
    import torch
    import torch.nn.functional as F

    from data_preprocessing import batches, load_images, normalise, split_indices
    from model import choose_device, choose_precision, keep_freed_memory
    from train import Training

    keep_freed_memory()
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    images, garments = load_images("train", settings.data_path)
    train, valid = split_indices(garments, settings.valid_ratio, settings.seed)
    split = images.to(device), garments.to(device), train.to(device), valid.to(device)
    training = Training(settings, settings.seed, *split, precision)
    x = normalise(training.images[training.train[: settings.batch_size]], training.mean, training.std)
    labels = training.labels[training.train[: settings.batch_size]]
    orders = batches(training.train, settings.batch_size)[:FEED_STEPS]

    def step(*_: object) -> None:
        training.optimizer.step()
        training.optimizer.zero_grad()

    def ready() -> None:
        training.network.train()
        for _ in orders:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = F.cross_entropy(training.network(x), labels)
            loss.backward()
            step()
        loss.item()  # waits for the device

    rates = {"training": [], "one batch that is ready": []}
    for _ in range(settings.repeats + 1):
        for values, passes in zip(rates.values(), (lambda: training.train_on(orders, step), ready)):
            started = time.perf_counter()
            passes()
            values.append(len(orders) * settings.batch_size / (time.perf_counter() - started))
    for name, values in rates.items():
        print(told(name, values[1:], "images/s"))  # the first pass is uncounted
    print(told("ratio", [mine / other for mine, other in list(zip(*rates.values()))[1:]], ""))


def told(name: str, values: list[float], unit: str) -> str:
    return f"{name}: median {statistics.median(values):.2f} {unit}, {min(values):.2f} to {max(values):.2f} (n={len(values)})"


def in_turn(repeats: int, ours: list[str], other: list[str], figure: int) -> None:
    """Run both in turn and print both medians and that of the pairs' ratio. `figure`: 0 seconds, 1 memory in MB."""
    for command in (ours, other):
        run(*command)  # once uncounted: files come from disk, fonts are cached
    pairs = [(run(*ours)[figure], run(*other)[figure]) for _ in range(repeats)]
    unit = ("s", "MB")[figure]
    print(told(f"python {ours[0]}", [a for a, _ in pairs], unit))
    print(told(f"python {other[0]} ...", [b for _, b in pairs], unit))
    print(told("ratio", [a / b for a, b in pairs], "times"))


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, BenchSettings)
    if settings.part == "feed":
        return feed(settings)
    words = [word for word in arguments if word.partition("=")[0] not in ("part", "repeats", "out_dir", "seed")]
    with tempfile.TemporaryDirectory() as folder:
        train = ["train.py", *words, f"out_dir={folder}/ours"]
        if settings.part == "train":
            raw = Path(folder) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for name in IDX_FILES:
                (raw / name).write_bytes(find_idx(name, settings.data_path))
            ours, theirs = [], []  # per seed: (seconds, loss, accuracy), and a list of such triples by epoch
            run(*train)  # once uncounted
            for seed in range(settings.repeats):
                seconds, _ = run(*train, f"seed={seed}")
                best = lowest(read_history(Path(folder, "ours", "history.jsonl"))[1])
                ours.append((seconds, best["valid_loss"], best["valid_accuracy"]))
                call = f"import bench; bench.ordinary_training({folder!r}, {seed})"
                started = time.perf_counter()
                with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
                    theirs.append([(time.perf_counter() - started, *map(float, line.split())) for line in process.stdout])
                for name, (seconds, loss, accuracy) in [("ours", ours[-1]), *enumerate(theirs[-1], 1)]:
                    print(
                        f"seed {seed}: {name}: {seconds:.1f} s, validation loss {loss:.5f}, accuracy {accuracy:.3%}", flush=True
                    )
            kept = [min(epochs, key=lambda epoch: epoch[1]) for epochs in theirs]
            for name, triples in (("ours", ours), ("ordinary training", kept)):
                loss, accuracy = (statistics.mean(triple[place] for triple in triples) for place in (1, 2))
                print(f"{name}: kept epochs' mean validation loss {loss:.5f}, accuracy {accuracy:.3%}")
            target = statistics.mean(triple[2] for triple in ours)
            means = [statistics.mean(triple[2] for triple in epoch) for epoch in zip(*theirs)]
            print("ordinary training's mean validation accuracy by epoch:", *(f"{mean:.3%}" for mean in means))
            print(told("python train.py", [seconds for seconds, _, _ in ours], "s"))
            passes = next((number for number, mean in enumerate(means) if mean >= target), None)
            for epoch in filter(lambda number: number is not None, (ORDINARY_EPOCHS - 1, passes)):
                seconds = [epochs[epoch][0] for epochs in theirs]
                print(told(f"ordinary training, {epoch + 1} epochs", seconds, "s"))
                print(told("  ratio", [other / mine[0] for other, mine in zip(seconds, ours)], "times"))
        elif settings.part == "test":
            in_turn(settings.repeats, ["test.py", *words], ["-c", "import torch"], 0)
        elif settings.part == "memory":
            hold = "import torch; x = torch.ones(70_000, 1, 28, 28, dtype=torch.uint8)"
            in_turn(settings.repeats, train, ["-c", hold], 1)
        else:
            accuracies = []
            for seed in range(settings.repeats):
                run(*train, f"seed={seed}")
                if settings.part == "valid":
                    best = lowest(read_history(Path(folder, "ours", "history.jsonl"))[1])
                    accuracies.append(best["valid_accuracy"])
                    print(f"seed {seed}: {best['valid_accuracy']:.3%}, loss {best['valid_loss']:.5f}", flush=True)
                else:
                    run("test.py", *words, f"out_dir={folder}/ours")
                    scores = json.loads(Path(f"{folder}/ours/scores.json").read_text())
                    accuracies.append(scores["accuracy"])
                    print(f"seed {seed}: {scores['accuracy']:.2%}, mistakes {scores['mistakes']}", flush=True)
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            print(
                f"{settings.part}: mean {statistics.mean(accuracies):.3%}, standard deviation {spread:.3%}, "
                f"{min(accuracies):.3%} to {max(accuracies):.3%} (n={len(accuracies)})"
            )


if __name__ == "__main__":
    run_script(main)
