"""The images of Task 2 by part and class: ankle boots of the data set, or folders PART/CLASS/*; drawing supports from them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from config import ROOT, UserError
from data_preprocessing import load_images
from photo import WHOLE, face_left, printable, read_photograph


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


def read_part(folder: Path) -> Part | None:
    """Photographs in CLASS/*, in the order of their names; None if there is no such folder. Whatever else lies there is passed
    over with a line on stderr. Raises UserError if a class has no image that can be read."""
    entries = sorted(folder.glob("*"))
    classes = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    if not classes:
        return None
    for path in entries:
        if path not in classes:
            print(" ".join(f"{path}: passed over; images are expected in {folder}/CLASS/".split()), file=sys.stderr)
    names: list[list[str]] = [[] for _ in classes]
    views = []
    for label, stems in zip(classes, names):
        for path in sorted(label.iterdir()):  # one at a time: a phone's photograph is large
            try:
                views.append(read_photograph(path).views[:WHOLE])  # (2, 28, 28): cut out in two ways
                stems.append(path.stem)
            except UserError as error:
                print(" ".join(str(error).split()), file=sys.stderr)
        if not stems:
            raise UserError(f"{label}: has no image that can be read; put some there, or remove the folder")
    return make_part([path.name for path in classes], names, face_left(torch.cat(views)).unflatten(0, (-1, WHOLE)))


def read_parts(folder: Path, names: tuple[str, ...]) -> dict[str, Part]:
    """The named parts that exist. Raises UserError if one of the first two is missing, or their classes differ or are one."""
    parts = {name: part for name in names if (part := read_part(folder / name))}
    for name in names[:2]:
        if name not in parts:
            raise UserError(f"{folder / name}: has no class folders; images are expected in {folder / name}/CLASS/")
    classes = parts["train"].classes
    if len(classes) < 2:
        raise UserError(f"{folder / 'train'}: has one class only, {classes[0]}; at least two are needed")
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
