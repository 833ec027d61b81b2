"""Task 2: tell flats from heels, or the classes of your own photographs, with Task 1's convolutions frozen.

`python transfer/train_eval.py [shots=K episodes=N] [shoes_dir=FOLDER] [key=value ...]` retrains the last layer on the
images in FOLDER/train/CLASS, tests it on FOLDER/test/CLASS, and writes best_model.pt, scores.json and plots/*.png into
out_dir. `episodes=N` repeats that with N random draws of K images a class, because one draw means little.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import plots
from config import ROOT, Settings, UserError, load_settings, run_script
from data_preprocessing import GARMENTS, load_images
from metrics import wilson_interval
from model import build, freeze, infer
from photo import read_photographs, turned_left
from transfer.few_shot import AdamLearner, FisherLearner

SHOES_DIR = ROOT / "transfer" / "shoes"  # its indices.json lists the images; the folders are written from the data set
UNLABELLED = 1_500  # training images of one garment, to learn from without their labels
BY_SHOTS = (1, 2, 3, 5, 10)  # in the picture
OURS, REFERENCE, UNTRAINED, PIXELS = "this repository", "the reference's way", "untrained convolutions", "raw pixels"


class TransferSettings(Settings):
    shoes_dir: str = Field("", description="folder with train/CLASS/* and test/CLASS/* images; empty = transfer/shoes")
    out_dir: str = Field("transfer", min_length=1, description="folder for all that a run writes")
    shots: int = Field(0, ge=0, description="support images of each class; 0 = as many as the smallest folder in train/ has")
    episodes: int = Field(1, ge=1, le=10_000, description="N > 1: N random draws from pool/ (train/ without one)")
    query: Literal["test", "pool"] = Field(
        "test", description="episodes are tested on test/ and extended/, or, to choose settings, on the rest of pool/"
    )
    task1: str = Field("checkpoint.pt", description="Task 1's checkpoint, whose convolutions are used")
    unlabelled: Literal[GARMENTS] = Field("Ankle boot", description="garment whose training images, unlabelled, help")
    shrink: float = Field(0.001, gt=0, description="how little a feature may move under distortions to count in full")
    rounds: int = Field(3, ge=0, le=100, description="of soft k-means over the unlabelled images; 0 = none")


def write_shoes(data_path: Path) -> None:
    """transfer/shoes/{train,test,pool,extended}/{flats,heels}/INDEX.png, those that are missing, from the verified data."""
    from PIL import Image

    parts = {name: part for name, part in json.loads((SHOES_DIR / "indices.json").read_text()).items() if name != "source"}
    wanted = [
        (SHOES_DIR / name / label / f"{index:05}.png", part["split"], index)
        for name, part in parts.items()
        for label in ("flats", "heels")
        for index in part[label]
    ]
    for split in ("train", "t10k"):
        missing = [(path, index) for path, its_split, index in wanted if its_split == split and not path.exists()]
        images = load_images(split, data_path)[0] if missing else None
        for path, index in missing:
            buffer = io.BytesIO()
            Image.fromarray(images[index, 0].numpy()).save(buffer, format="png")
            checkpoint.write_atomically(path, buffer.getvalue())


class Part(NamedTuple):
    """The images of FOLDER/PART/CLASS/*, class by class, in the order of their names."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    files: list[Path]
    images: torch.Tensor  # uint8 (N, 1, 28, 28)
    labels: torch.Tensor  # int64 (N,)

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"{self.files[index].parent.name} {self.files[index].stem}" for index in indices]


def read_part(folder: Path, are_photographs: bool) -> Part | None:
    """None if there is no such folder. Raises UserError if a class has no image, or an image can't be read."""
    classes = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    if not classes:
        return None
    files = [sorted(path for path in label.iterdir() if not path.name.startswith(".")) for label in classes]
    for label, its_files in zip(classes, files):
        if not its_files:
            raise UserError(f"{label}: has no image; put some there, or remove the folder")
    counts = tuple(map(len, files))
    files = [path for its_files in files for path in its_files]
    views = read_photographs(files)[1]
    images = (turned_left(views) if are_photographs else views).unsqueeze(1)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Part(tuple(path.name for path in classes), counts, files, images, labels)


def read_parts(folder: Path, names: tuple[str, ...], are_photographs: bool) -> dict[str, Part]:
    """Raises UserError if train/ or test/ is missing or has one class only, or if others have other classes."""
    parts = {name: part for name in names if (part := read_part(folder / name, are_photographs))}
    for name in names[:2]:
        if name not in parts:
            raise UserError(f"{folder / name}: has no class folders; images are expected in {folder / name}/CLASS/")
    classes = parts["train"].classes
    if len(classes) < 2:
        raise UserError(f"{folder / 'train'}: has one class only, {classes[0]}; two or more can be told apart")
    for name, part in parts.items():
        if part.classes != classes:
            raise UserError(f"{folder / name}: has the classes {', '.join(part.classes)}; train/ has {', '.join(classes)}")
    return parts


def draw_picks(counts: tuple[int, ...], shots: int, episodes: int, generator: torch.Generator | None) -> torch.Tensor:
    """Indices `(E, C, K)` of supports into a Part with these counts: random ones, none twice in an episode, or, without
    a generator, the first of each class."""
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    picks = [
        torch.randperm(count, generator=generator)[:shots] if generator else torch.arange(shots)
        for _ in range(episodes)
        for count in counts
    ]
    return torch.stack(picks).view(episodes, len(counts), shots) + starts.unsqueeze(1)


def accuracies(
    features: torch.Tensor, labels: torch.Tensor, layers: tuple[torch.Tensor, torch.Tensor], left_out: torch.Tensor | None
) -> list[float]:
    """Accuracy of each episode's layer on queries `(N, D)`; `left_out` `(E, C, K)`: indices of those that don't count."""
    weights, biases = layers
    is_right = (torch.einsum("nd,ecd->enc", features, weights) + biases.unsqueeze(1)).argmax(2) == labels  # (E, N)
    counts = torch.ones_like(is_right)
    if left_out is not None:
        counts.scatter_(1, left_out.flatten(1), False)
    return ((is_right & counts).sum(1).double() / counts.sum(1)).tolist()


def check_frozen(network: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless the last layer alone could be trained and all else has the bits it had before."""
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    frozen = {name: tensor for name, tensor in network.state_dict().items() if name not in trained}
    changed = [name for name, tensor in frozen.items() if not tensor.equal(before[name])]
    if trained != ["classifier.weight", "classifier.bias"] or changed:
        raise RuntimeError(f"trained {', '.join(trained)}; changed although frozen: {', '.join(changed) or 'nothing'}")
    print(f"trained {', '.join(trained)}; the {len(frozen)} frozen tensors have the bits that the checkpoint has")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TransferSettings)
    out = settings.out_path
    pictures = out / "plots"
    path = ROOT / Path(settings.task1).expanduser()
    saved = checkpoint.load(path, "checkpoint")
    network = checkpoint.rebuild(saved, path)

    # ---- images ---------------------------------------------------------------------------------------------------
    if not settings.shoes_dir:
        write_shoes(settings.data_path)
    folder = ROOT / Path(settings.shoes_dir).expanduser() if settings.shoes_dir else SHOES_DIR
    names = ("train", "test", "pool", "extended") if settings.query == "test" else ("train", "pool")
    parts = read_parts(folder, names, are_photographs=bool(settings.shoes_dir))
    classes = parts["train"].classes
    shots = settings.shots or min(parts["train"].counts)
    pool = "pool" if "pool" in parts else "train"
    support = "train" if min(parts["train"].counts) >= shots else pool
    drawn = pool if settings.episodes > 1 or settings.query == "pool" else support
    for name in {support, drawn}:
        fewest, label = min(zip(parts[name].counts, classes))
        if fewest < shots:
            raise UserError(f"shots={shots}: {folder / name / label} has only {fewest} images; add some or lower shots")
    images, garments = load_images("train", settings.data_path)
    unlabelled = torch.nonzero(garments == GARMENTS.index(settings.unlabelled)).squeeze(1)
    generator = torch.Generator().manual_seed(settings.seed)
    unlabelled = images[unlabelled[torch.randperm(len(unlabelled), generator=generator)[:UNLABELLED]]]

    # ---- ways to learn the last layer; the first is ours, the others show what it is worth ------------------------------
    freeze(network.features)
    torch.manual_seed(settings.seed)
    untrained = build(saved["architecture"], len(classes))

    def trained_features(images: torch.Tensor) -> torch.Tensor:
        return infer(network.features, images, saved["mean"], saved["std"])

    def untrained_features(images: torch.Tensor) -> torch.Tensor:
        return infer(untrained.features, images, saved["mean"], saved["std"])

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255

    first = network.classifier if saved["output_dim"] == len(classes) else untrained.classifier
    fisher = (unlabelled, settings.seed, settings.shrink, settings.rounds)
    learners = {
        OURS: FisherLearner(trained_features, *fisher),
        REFERENCE: AdamLearner(trained_features, first, steps=100, lr=0.001),
        UNTRAINED: FisherLearner(untrained_features, *fisher),
        PIXELS: FisherLearner(pixels, *fisher),
    }

    # ---- the last layer that is kept ------------------------------------------------------------------------------------
    ours = learners[OURS]
    picks = draw_picks(parts[support].counts, shots, 1, None)
    weights, biases = ours.layers(ours.embed(parts[support].images)[picks])
    network.classifier = nn.Linear(weights.shape[2], len(classes))
    network.classifier.load_state_dict({"weight": weights[0], "bias": biases[0]})
    check_frozen(network, saved["parameters"])
    checkpoint.save(
        out / "best_model.pt",
        {
            "kind": "best_model",
            **{key: saved[key] for key in ("architecture", "mean", "std", "epoch")},
            "output_dim": len(classes),
            "class_names": list(classes),
            "parameters": network.state_dict(),
            "settings": settings.model_dump(),
            "versions": checkpoint.versions(),
        },
    )
    picks = picks.flatten().tolist()
    supports = parts[support].images[picks].squeeze(1).numpy()
    plots.draw_sheet(supports, parts[support].names(picks), shots, "What the last layer learns from", pictures / "support.png")

    # ---- episodes -------------------------------------------------------------------------------------------------------
    asked = [pool] if settings.query == "pool" else ["test", "extended"] if settings.episodes > 1 else ["test"]
    images, labels = (torch.cat([parts[name][field] for name in asked if name in parts]) for field in (3, 4))
    embedded = {method: learner.embed(parts[drawn].images) for method, learner in learners.items()}
    queries = {method: learner.extract(images) for method, learner in learners.items()}
    rows = {method: {} for method in learners}  # method -> shots -> accuracy of each episode
    wanted = {shots} if settings.episodes == 1 else {shots, *(k for k in BY_SHOTS if k <= min(parts[drawn].counts))}
    for k in sorted(wanted):
        generator = torch.Generator().manual_seed(settings.seed)
        picks = draw_picks(parts[drawn].counts, k, settings.episodes, None if drawn == support else generator)
        for method, learner in learners.items():
            layers = learner.layers(embedded[method][picks])
            rows[method][k] = accuracies(queries[method], labels, layers, picks if settings.query == "pool" else None)
    print(f"{settings.episodes} x {shots} images of each class; accuracy on {len(labels)} images")
    print(f"{'':22}    mean  std     min      max      95 % interval of the mean")
    report = {}
    for method, by_shots in rows.items():
        values = by_shots[shots]
        mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        low, high = mean - 1.96 * std / len(values) ** 0.5, mean + 1.96 * std / len(values) ** 0.5
        if len(values) == 1:
            low, high = wilson_interval(round(mean * len(labels)), len(labels))
        report[method] = {"mean": mean, "std": std, "min": min(values), "max": max(values), "ci95": [low, high]}
        print(f"{method:22} {mean:7.2%} {std:6.2%} {min(values):7.2%} {max(values):8.2%}  {low:.2%} to {high:.2%}")
    if settings.episodes > 1:
        heading = f"{settings.episodes} episodes, {len(labels)} images: accuracy by number of shots"
        plots.draw_accuracy_by_shots(rows, heading, pictures / "accuracy_by_shots.png")
    if settings.query == "pool":
        return

    # ---- the test images, with the layer that is kept -------------------------------------------------------------------
    test = parts["test"]
    confidence, predicted = infer(network, test.images, saved["mean"], saved["std"]).softmax(1).max(1)
    is_right = predicted == test.labels
    titles = []
    for name, label, probability in zip(test.names(range(len(test.files))), predicted.tolist(), confidence.tolist()):
        titles.append(f"{name}\n{classes[label]}, {probability:.1%}")
        print(f"test {name}: predicted {classes[label]} ({probability:.2%})")
    colours = [plots.GREEN if right else plots.RED for right in is_right.tolist()]
    heading = f"{int(is_right.sum())} of {len(test.files)} test images right"
    plots.draw_sheet(test.images.squeeze(1).numpy(), titles, 5, heading, pictures / "predictions.png", colours)
    ours = report.pop(OURS)
    scores = {
        "task": " or ".join(classes),
        "shots": shots,
        "episodes": settings.episodes,
        "test_images": len(labels),
        **{f"accuracy_{name}": value for name, value in ours.items()},
        "per_episode": rows[OURS][shots],
        "accuracy_by_shots": {k: statistics.mean(values) for k, values in rows[OURS].items()},
        "other_ways": report,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": checkpoint.versions(),
    }
    checkpoint.write_atomically(out / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    print(
        f"test accuracy {ours['mean']:.2%} (standard deviation {ours['std']:.2%}, {ours['min']:.2%} to {ours['max']:.2%}; "
        f"{len(labels)} images, {settings.episodes} x {shots} shots); wrote {out / 'scores.json'}"
    )


if __name__ == "__main__":
    run_script(main)
