"""Accuracy on labelled photographs: `python tools/bench.py part=photos photos=FOLDER`, with photographs in FOLDER/CLASS/.

CLASS is one of Fashion-MNIST's, in any writing ("ankle_boot"), or one of the CC0 data set clothing-dataset-small, of which
`shoes` are right as any shoe and `shorts` and `skirt` count for clothes or shoe only. An index.json in FOLDER or above it, with
`file` and `background` of each photograph, adds a column for each background. An unreadable photograph counts as wrong.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import plots
from config import ROOT, UserError, resolve
from data_preprocessing import CLASS_NAMES, SHOES
from model import load_model
from photo import read_photographs
from views import classify, clothes_or_shoe, select_views

ALIASES = {"pants": "trouser", "longsleeve": "pullover", "outwear": "coat", "t-shirt": "t-shirt/top"}
CLOTHES_ONLY = ("shorts", "skirt")
SURE = 0.9  # a probability from which on an answer is called sure


def accepted_labels(folder: str) -> set[int]:
    """The fine labels that are right for photographs in this folder; none if the data set has no such class."""
    name = folder.lower().replace("_", " ")
    names = [class_name.lower() for class_name in CLASS_NAMES]
    if name == "shoes":
        return set(SHOES)
    return {names.index(ALIASES.get(name, name))} if ALIASES.get(name, name) in names else set()


def read_backgrounds(folder: Path) -> dict[Path, str]:
    for root in (folder, folder.parent):
        if (root / "index.json").exists():
            groups = json.loads((root / "index.json").read_text()).values()
            return {root / entry["file"]: entry["background"] for group in groups for entry in group}
    return {}


def print_table(name: str, is_right: np.ndarray, confidence: np.ndarray, groups: dict[str, np.ndarray], refused: int) -> None:
    """A row of accuracies by group, refused ones counted as wrong in "all", and what sure answers are worth."""
    is_sure = confidence >= SURE
    cells = [
        f"{group} {is_right[members].mean():.1%} (n={members.sum()})" for group, members in groups.items() if members.any()
    ]
    print(f"{name}: all {is_right.sum() / (len(is_right) + refused):.1%} (n={len(is_right) + refused}), {', '.join(cells)}")
    sure_right = is_right[is_sure].mean() if is_sure.any() else float("nan")
    sure_wrong = (is_sure & ~is_right).sum() / max(1, (~is_right).sum())
    print(f"  probability >= {SURE}: {is_sure.mean():.1%} of them, {sure_right:.1%} right; {sure_wrong:.1%} of all mistakes")
    print(f"  mean probability {confidence.mean():.1%}, accuracy {is_right.mean():.1%}")


def measure(path: Path, folder: str) -> None:
    """Print the tables of the model in `path` and draw its most confident mistakes in plots/photos.png.

    Raises UserError if there is no photograph, no model, or one without the ten classes."""
    root, model_name = resolve(folder), path.parent.name
    names = [path.name for path in sorted(root.glob("*")) if accepted_labels(path.name) or path.name in CLOTHES_ONLY]
    paths = [path for name in names for path in sorted((root / name).iterdir()) if not path.name.startswith(".")]
    task_1, ten = load_model(ROOT / "best_model.pt"), load_model(path)
    if tuple(ten.metadata["class_names"]) != CLASS_NAMES:
        raise UserError(f"{path}: has not Fashion-MNIST's ten classes; name another recipe or out_dir")
    files, photographs = read_photographs(paths)
    if not files:
        raise UserError(f"{root}: has no photographs in folders named as Fashion-MNIST's classes")
    views = torch.stack([photograph.views for photograph in photographs])
    refused, backgrounds = len(paths) - len(files), read_backgrounds(root)
    ground = np.array([backgrounds.get(path, "") for path in files])
    groups = {name: ground == name for name in ("plain", "busy", "worn")}
    is_warned = np.array([bool(photograph.warning) for photograph in photographs])
    groups |= {"without a warning": ~is_warned, "with a warning": is_warned}
    accepted = [accepted_labels(path.parent.name) for path in files]

    by_task_1, by_ten = (classify(model, select_views(model, views)) for model in (task_1, ten))
    is_shoe = torch.tensor([labels <= set(SHOES) and bool(labels) for labels in accepted]).long()
    for name, probabilities in (("Task 1", by_task_1), (model_name, clothes_or_shoe(by_ten))):
        confidence, predicted = probabilities.max(1)
        print_table(f"{name}, clothes or shoe", (predicted == is_shoe).numpy(), confidence.numpy(), groups, refused)
    probability, predicted = by_ten.max(1)
    counts = np.array([bool(labels) for labels in accepted])
    is_right = np.array([label in labels for label, labels in zip(predicted.tolist(), accepted)])
    groups |= {name: np.array([path.parent.name == name for path in files]) for name in names}
    groups = {name: members[counts] for name, members in groups.items()}
    refused = sum(bool(accepted_labels(path.parent.name)) for path in paths) - counts.sum()
    print_table(f"{model_name}, ten classes", is_right[counts], probability[counts].numpy(), groups, refused)
    mistakes = sorted(np.flatnonzero(counts & ~is_right), key=lambda i: -probability[i])[:60]
    squares = [np.asarray(Image.fromarray(photographs[i].picture).resize((112, 112))) for i in mistakes]
    titles = [f"{files[i].parent.name}, predicted\n{CLASS_NAMES[predicted[i]]} {probability[i]:.0%}" for i in mistakes]
    plots.draw_sheet(np.array(squares), titles, 10, "The most confident mistakes", ROOT / "plots" / "photos.png")
