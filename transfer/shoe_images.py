"""The images of Task 2 by part and class: ankle boots of the data set, or folders PART/CLASS/*; drawing supports from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from config import FASHION_MNIST, ROOT, UserError
from data_preprocessing import load_images, read_class_folders, training_settings
from model import Classifier
from photo import printable, read_views
from views import select_views


class Part(NamedTuple):
    """The images of one part, class by class."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    names: list[str]
    images: torch.Tensor  # uint8 (N, V, 28, 28): V views of each
    labels: torch.Tensor  # int64 (N,)


def make_part(classes: Sequence[str], names: Sequence[list[str]], images: torch.Tensor) -> Part:
    """`names` are lists, one per class, of the names of its images."""
    counts = tuple(map(len, names))
    titles = [printable(f"{label} {name}") for label, class_names in zip(classes, names) for name in class_names]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Part(tuple(map(printable, classes)), counts, titles, images, labels)


def load_shoes(parts: Sequence[str], data_path: Path) -> dict[str, Part]:
    """The named parts of flats and heels among Fashion-MNIST's ankle boots, which transfer/shoes/indices.json lists."""
    indices = json.loads((ROOT / "transfer" / "shoes" / "indices.json").read_text())
    images = {split: load_images(split, data_path)[0] for split in {indices[part]["split"] for part in parts}}
    shoes = {}
    for part in parts:
        by_class = [sorted(indices[part][label]) for label in ("flats", "heels")]
        names = [[f"{index:05}" for index in members] for members in by_class]
        shoes[part] = make_part(("flats", "heels"), names, images[indices[part]["split"]][by_class[0] + by_class[1]])
    return shoes


def read_part(folder: Path, model: Classifier) -> Part:
    """Photographs in CLASS/*, as `read_class_folders` reads them, with the views that the model can read."""
    trained = training_settings(model.metadata)
    prepare = "views" if trained["data"] == FASHION_MNIST else trained["prepare"]
    classes = read_class_folders(folder, lambda path: read_views(path, prepare))
    views = torch.stack([views for files in classes.values() for views in files.values()])  # (N, V, 28, 28)
    names = [[path.stem for path in files] for files in classes.values()]
    return make_part(list(classes), names, select_views(model, views))


def read_parts(folder: Path, names: tuple[str, ...], model: Classifier) -> dict[str, Part]:
    """The named parts that exist. Raises UserError if one of the first two is missing, or their classes differ."""
    parts = {name: read_part(folder / name, model) for name in names if name in names[:2] or (folder / name).is_dir()}
    classes = parts["train"].classes
    for name, part in parts.items():
        if part.classes != classes:
            raise UserError(f"{folder / name}: has the classes {', '.join(part.classes)}; train/ has {', '.join(classes)}")
    return parts


def draw_picks(counts: tuple[int, ...], shots: int, episodes: int, generator: torch.Generator | None) -> torch.Tensor:
    """Indices `(E, C, K)` of support images into a Part with these counts: drawn at random without replacement, or, without
    a generator, the first of each class."""
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    orders = (torch.randperm(count, generator=generator) if generator else torch.arange(count) for count in counts * episodes)
    picks = [order[:shots] for order in orders]
    return torch.stack(picks).view(episodes, len(counts), shots) + starts.unsqueeze(1)
