"""What the README says of speed, memory and accuracy, measured anew: `python bench.py part=NAME [repeats=N]`.

    part=train     `python train.py` against the same network trained the usual way: ten epochs, as the reference has it,
                   of which the one with the lowest validation loss is kept; also where its mean accuracy first passes ours
    part=test      `python test.py` against `python -c "import torch"` (reads the test images)
    part=memory    peak memory of training against that of holding the images
    part=valid     validation accuracy over seeds 0 to N-1, each with a split of its own: what settings are chosen by
    part=feed      steps of training, images drawn, augmented and normalised, against steps on one batch that is ready, and
                   their arithmetic against a large matrix product's
    part=accuracy  test accuracy over seeds 0 to N-1 (reads the test images N times)
    part=fast      part=accuracy of recipe=fast, and its seconds against those in which ResNet-8, trained as its authors do,
                   reaches their accuracy on validation images
    part=parallel  epochs of one process with all threads against those of as many processes, of one thread each
    part=few       validation accuracy of deep_cnn_dropout after training on few images, of N seeds: with and without
                   augmentation and images of a GAN that learnt from the same few. What has ended is kept in runs/few, so
                   that calling again goes on

Each side runs in a fresh process, in turn. Leave the machine alone meanwhile.
"""

import json
import os
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
from pydantic import Field
from torch import nn

import checkpoint
import plots
from checkpoint import lowest, read_history
from config import OF_TRAINING, ROOT, Settings, UserError, load_settings, run_script
from data_preprocessing import IDX_FILES, SHOES, batches, find_idx, load_images, normalise, split_indices
from model import autocast, build, choose_device, choose_precision, evaluate, keep_freed_memory, layers, zero_sums
from results import OURS, RECIPES, REFERENCES, minutes_and_accuracy, read_seeds
from training import Training

ORDINARY = {  # architecture -> batch size, learning rate and epochs of its reference
    "cnn": (54, 0.001, 10),
    "resnet8": (64, 0.0001, 1000),
}
FEED_STEPS = 50
FEW = {  # training images -> epochs of the classifier, steps of the GAN
    100: (150, 2_000),
    500: (80, 2_000),
    1_000: (60, 2_000),
    5_000: (30, 2_000),
    54_000: (8, 4_000),
}
FEW_WAYS = {
    "as they are": "",
    "cropped, mirrored, erased": "crop,hflip,erase",
    "with generated ones": "gan",
    "both": "crop,hflip,erase,gan",
}


class BenchSettings(Settings):
    part: Literal["train", "test", "memory", "valid", "feed", "accuracy", "fast", "parallel", "few"] = Field(
        "train", description="what to measure"
    )
    repeats: int = Field(3, ge=1, le=100, description="runs of each side, or seeds")


def run(*command: str) -> tuple[float, float]:
    """Wall seconds and peak memory, in MB, of a command in a fresh process. Raises UserError if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    complaint = process.stderr.read().decode(errors="replace")  # until the process closes it
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"python {' '.join(command)} failed: {complaint.strip().splitlines()[-1:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def ordinary_training(data_root: str, seed: int, architecture: str) -> None:
    """A network trained the usual way; prints validation loss and accuracy, in 0..1, after each epoch.

    `architecture`: "cnn" on Task 1, "resnet8" on the ten garments.
    """
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    batch_size, lr, epochs = ORDINARY[architecture]
    torch.manual_seed(seed)
    transform = Compose([ToTensor(), Normalize((0.2860,), (0.3530,))])
    label = (lambda garment: int(garment in SHOES)) if architecture == "cnn" else None
    dataset = FashionMNIST(data_root, transform=transform, target_transform=label)
    train, valid = split_indices(dataset.targets, valid_ratio=0.1, seed=seed)
    train_loader = DataLoader(Subset(dataset, train.tolist()), batch_size, shuffle=True)
    valid_loader = DataLoader(Subset(dataset, valid.tolist()), batch_size)
    if architecture == "cnn":
        network: nn.Module = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 2),
        )
    else:
        network = build(architecture, 10).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        network.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            criterion(network(x), y).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            logits, labels = map(torch.cat, zip(*((network(x), y) for x, y in valid_loader)))
        print(*evaluate(logits, labels), flush=True)


def ordinary_epochs(folder: str, seed: int, architecture: str) -> Iterator[tuple[float, float, float]]:
    """Seconds from the start, validation loss and accuracy after each epoch of `ordinary_training` in a fresh process."""
    call = f"import bench; bench.ordinary_training({folder!r}, {seed}, {architecture!r})"
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                loss, accuracy = map(float, line.split())
                yield time.perf_counter() - started, loss, accuracy
        finally:
            process.kill()  # where its reader has seen enough


def copy_images(settings: Settings, folder: str) -> None:
    """Put the data set where torchvision looks for it."""
    raw = Path(folder) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        (raw / name).write_bytes(find_idx(name, settings.data_path))


def multiply_adds(network) -> int:
    """Those of a training step, an image: forward, the weights' gradient where they learn, the input's but for the first."""
    passed = [layer for layer in layers(network) if layer.multiply_adds]
    learns = {name.rpartition(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    return sum(layer.multiply_adds * (1 + (layer.name in learns) + (layer is not passed[0])) for layer in passed)


def matrix_rate(device, precision) -> float:
    """Multiply-adds a second of a product of two 2048 x 2048 matrices: the fastest of 20."""
    a = torch.randn(2048, 2048, device=device).to(precision)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2048**3 / min(seconds)


def feed(settings: BenchSettings) -> None:
    """Prints images a second of the training loop, and of the same network on one batch that is ready on the device."""
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
    sums = zero_sums(3, device)

    def step() -> None:
        training.optimizer.step()
        training.optimizer.zero_grad()

    def ready() -> None:
        training.network.train()
        for _ in orders:
            with autocast(device, precision):
                loss = F.cross_entropy(training.network(x), labels)
            loss.backward()
            step()
        loss.item()  # waits for the device

    rates: dict[str, list[float]] = {"training": [], "one batch that is ready": []}
    for _ in range(settings.repeats + 1):
        for values, passes in zip(rates.values(), (lambda: training.train_on(orders, sums, step), ready)):
            started = time.perf_counter()
            passes()
            values.append(len(orders) * settings.batch_size / (time.perf_counter() - started))
    for name, values in rates.items():
        print(told(name, values[1:], "images/s"))  # the first pass is uncounted
    print(told("ratio", [mine / other for mine, other in list(zip(*rates.values()))[1:]], ""))
    work, limit = multiply_adds(training.network), matrix_rate(device, precision)
    shares = [images_a_second * work / limit for images_a_second in rates["training"][1:]]
    print(f"{work / 1e6:.2f} M multiply-adds an image and step; a matrix product does {limit / 1e9:.0f} G a second")
    print(told("share of the matrix product's rate", shares, ""))


def told(name: str, values: list[float], unit: str) -> str:
    return f"{name}: median {statistics.median(values):.2f} {unit}, {min(values):.2f} to {max(values):.2f} (n={len(values)})"


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def in_turn(repeats: int, ours: list[str], other: list[str], figure: int) -> None:
    """Run both in turn and print both medians and that of the pairs' ratio. `figure`: 0 seconds, 1 memory in MB."""
    for command in (ours, other):
        run(*command)  # once uncounted: files come from disk, fonts are cached
    pairs = [(run(*ours)[figure], run(*other)[figure]) for _ in range(repeats)]
    unit = ("s", "MB")[figure]
    print(told(f"python {ours[0]}", [a for a, _ in pairs], unit))
    print(told(f"python {other[0]} ...", [b for _, b in pairs], unit))
    print(told("ratio", [a / b for a, b in pairs], "times"))


def against_ordinary(settings: BenchSettings, folder: str, train: list[str]) -> None:
    """Task 1: seconds and validation accuracy of our training and of the usual one, seed by seed."""
    ours, theirs = [], []  # per seed: (seconds, loss, accuracy), and a list of such triples by epoch
    run(*train)  # once uncounted
    for seed in range(settings.repeats):
        seconds, _ = run(*train, f"seed={seed}")
        best = lowest(read_history(Path(folder, "ours", "history.jsonl"))[1])
        ours.append((seconds, best["valid_loss"], best["valid_accuracy"]))
        theirs.append(list(ordinary_epochs(folder, seed, "cnn")))
        for name, (seconds, loss, accuracy) in [("ours", ours[-1]), *enumerate(theirs[-1], 1)]:
            print(f"seed {seed}: {name}: {seconds:.1f} s, validation loss {loss:.5f}, accuracy {accuracy:.3%}", flush=True)
    kept = [min(epochs, key=lambda epoch: epoch[1]) for epochs in theirs]
    for name, triples in (("ours", ours), ("ordinary training", kept)):
        loss, accuracy = (statistics.mean(triple[place] for triple in triples) for place in (1, 2))
        print(f"{name}: kept epochs' mean validation loss {loss:.5f}, accuracy {accuracy:.3%}")
    target = statistics.mean(triple[2] for triple in ours)
    means = [statistics.mean(triple[2] for triple in epoch) for epoch in zip(*theirs)]
    print("ordinary training's mean validation accuracy by epoch:", *(f"{mean:.3%}" for mean in means))
    print(told("python train.py", [seconds for seconds, _, _ in ours], "s"))
    passes = next((number for number, mean in enumerate(means) if mean >= target), None)
    for place in (len(means) - 1, *([] if passes is None else [passes])):
        taken = [epochs[place][0] for epochs in theirs]
        print(told(f"ordinary training, {place + 1} epochs", taken, "s"))
        print(told("  ratio", [other / mine[0] for other, mine in zip(taken, ours)], "times"))


def testing(train: list[str]) -> list[str]:
    """The command that tests what the command `train` has made."""
    return ["test.py", *(word for word in train[1:] if word.partition("=")[0] not in OF_TRAINING)]


def over_seeds(settings: BenchSettings, folder: str, train: list[str], *, test: bool) -> tuple[list[float], list[float]]:
    """Train with seeds 0 to repeats-1; seconds and validation accuracy, or test accuracy if `test`, of each."""
    accuracies, all_seconds = [], []
    for seed in range(settings.repeats):
        seconds, _ = run(*train, f"seed={seed}")
        all_seconds.append(seconds)
        if test:
            run(*testing(train))
            scores = json.loads(Path(f"{folder}/ours/scores.json").read_text())
            accuracies.append(scores["accuracy"])
            mistakes = scores["mistakes"] if len(scores["mistakes"]) < 20 else len(scores["mistakes"])
            print(f"seed {seed}: {seconds:.1f} s, {scores['accuracy']:.2%}, mistakes {mistakes}", flush=True)
        else:
            best = lowest(read_history(Path(folder, "ours", "history.jsonl"))[1])
            accuracies.append(best["valid_accuracy"])
            print(f"seed {seed}: {seconds:.1f} s, {best['valid_accuracy']:.3%}, loss {best['valid_loss']:.5f}", flush=True)
    print(
        f"{'test' if test else 'validation'}: mean {statistics.mean(accuracies):.3%}, "
        f"standard deviation {spread(accuracies):.3%}, "
        f"{min(accuracies):.3%} to {max(accuracies):.3%} (n={len(accuracies)})"
    )
    print(told(" ".join(("python", *train[:-1])), all_seconds, "s"))
    return all_seconds, accuracies


def side_by_side(settings: BenchSettings, folder: str, words: list[str]) -> None:
    """Seconds of training's third epoch, of one process and of several, in turn."""
    count = torch.get_num_threads()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    sides = {f"one process with {count} threads": [], f"{count} processes with one thread": torchrun}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(settings.repeats):
        for name, start in sides.items():
            run(*start, "train.py", *words, "epochs=3", "patience=0", f"out_dir={folder}/{name}")
            seconds[name].append(read_history(Path(folder, name, "history.jsonl"))[1][-1]["seconds"])
    for name, values in seconds.items():
        print(told(name, values, "s an epoch"))
    one, several = seconds.values()
    print(told("ratio", [a / b for a, b in zip(one, several)], "times"))
    parameters = sum(layer.parameters for layer in layers(build(settings.architecture, settings.output_dim)))
    print(f"gradients: {parameters * 4 / 1e6:.2f} MB a step of {settings.batch_size} images")


def few(settings: BenchSettings) -> None:
    """What a GAN's images are worth when there are few others."""
    folder = ROOT / "runs" / "few"

    def lines(out: Path, *command: str) -> list[dict]:
        """The epochs of a run of this command, which goes on if there is one."""
        resume = ["resume=true"] if (out / "checkpoint.pt").exists() else []
        run(*command, "valid_ratio=0.1", f"out_dir={out}", *resume)
        return read_history(out / "history.jsonl")[1]

    accuracies: dict[str, dict[int, list[float]]] = {way: {count: [] for count in FEW} for way in FEW_WAYS}
    for seed in range(settings.repeats):
        for count, (epochs, gan_steps) in FEW.items():
            data = [f"seed={seed}", f"limit={count}"]
            data += [f"{key}={getattr(settings, key)}" for key in ("data_dir", "device", "precision")]
            made = folder / f"gan_{count}_{seed}"
            passes = max(1, 6_400 // count)  # so that an epoch has 100 batches at least
            gan_epochs = round(gan_steps / (passes * count // 64))
            lines(made, "gan.py", "train", *data, "batch_size=64", f"passes={passes}", f"epochs={gan_epochs}")
            for number, (way, augmentations) in enumerate(FEW_WAYS.items()):
                words = [
                    f"augment={augmentations}",
                    "gan_share=0.5",
                    "gan_fresh=true",
                    f"generator={made / 'generator.pt'}",
                    f"epochs={epochs}",
                ]
                words += ["recipe=deep_cnn_dropout", "schedule=one_cycle", f"batch_size={50 if count < 5_000 else 128}"]
                epoch = lowest(lines(folder / f"{count}_{number}_{seed}", "train.py", *data, *words))
                accuracies[way][count].append(epoch["valid_accuracy"])
                print(f"seed {seed}, {count:,} images, {way}: {epoch['valid_accuracy']:.2%}", flush=True)
    print("| training images |", " | ".join(FEW_WAYS), "|")
    for count in FEW:
        cells = [accuracies[way][count] for way in FEW_WAYS]
        print(f"| {count:,} |", " | ".join(f"{statistics.mean(cell):.1%} ± {spread(cell):.1%}" for cell in cells), "|")
    path = ROOT / "plots" / "few_images.png"
    heading = f"deep_cnn_dropout on validation images, {settings.repeats} seeds"
    band = "lowest to highest seed"
    plots.draw_accuracy_by_count(accuracies, "training images", heading, path, bands=len(FEW_WAYS), band=band)
    print(f"wrote {path}")


def fast(settings: BenchSettings, folder: str, train: list[str]) -> None:
    """Seconds to an accuracy: recipe=fast, and ResNet-8 trained as its authors do until it has theirs."""
    ours, accuracies = over_seeds(settings, folder, train, test=True)
    ordinary = []
    for seconds, _, accuracy in ordinary_epochs(folder, 0, "resnet8"):
        ordinary.append((seconds / 60, accuracy))
        print(f"ordinary training of resnet8, epoch {len(ordinary)}: {seconds:.0f} s, {accuracy:.2%}", flush=True)
        if accuracy >= REFERENCES["resnet8"]:
            break
    print(told("ratio", [ordinary[-1][0] * 60 / mine for mine in ours], "times"))
    recipes = {recipe: minutes_and_accuracy(seeds) for recipe in RECIPES if (seeds := read_seeds(recipe))}
    recipes["fast"] = (statistics.mean(ours) / 60, statistics.mean(accuracies))
    path = ROOT / "plots" / "time_to_accuracy.png"
    plots.draw_time_to_accuracy(recipes, OURS, ordinary, path)
    print(f"wrote {path}")


def main(arguments: list[str]) -> None:
    if "part=fast" in arguments and not any(word.startswith("recipe=") for word in arguments):
        arguments = ["recipe=fast", *arguments]
    settings = load_settings(arguments, BenchSettings)
    if settings.part in ("feed", "few"):
        return {"feed": feed, "few": few}[settings.part](settings)
    words = [word for word in arguments if word.partition("=")[0] not in ("part", "repeats", "out_dir", "seed")]
    with tempfile.TemporaryDirectory() as folder:
        train = ["train.py", *words, f"out_dir={folder}/ours"]
        if settings.part in ("train", "fast"):
            copy_images(settings, folder)
        if settings.part == "train":
            against_ordinary(settings, folder, train)
        elif settings.part == "parallel":
            side_by_side(settings, folder, words)
        elif settings.part == "fast":
            fast(settings, folder, train)
        elif settings.part == "test":
            Path(folder, "ours").mkdir()
            path = settings.out_path / "best_model.pt"
            checkpoint.load(path, "best_model")  # refuses what is not there, or no such file
            shutil.copy(path, f"{folder}/ours")
            in_turn(settings.repeats, testing(train), ["-c", "import torch"], 0)
        elif settings.part == "memory":
            hold = "import torch; x = torch.ones(70_000, 1, 28, 28, dtype=torch.uint8)"
            in_turn(settings.repeats, train, ["-c", hold], 1)
        else:
            over_seeds(settings, folder, train, test=settings.part == "accuracy")


if __name__ == "__main__":
    run_script(main)
