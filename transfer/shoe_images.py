"""Folders PART/CLASS/* of images for Task 2: written from the data set, read, and drawn from for episodes."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

import checkpoint
from config import ROOT, UserError
from data_preprocessing import load_images
from photo import read_photographs, shown, turned_left

SHOES_DIR = ROOT / "transfer" / "shoes"  # its indices.json lists the images; the folders are written from the data set


def write_shoes(names: Sequence[str], data_path: Path) -> None:
    """transfer/shoes/PART/{flats,heels}/INDEX.png of the named parts, those that are missing, from the verified data."""
    indices = json.loads((SHOES_DIR / "indices.json").read_text())
    parts = {name: indices[name] for name in names}
    wanted = [
        (SHOES_DIR / name / label / f"{index:05}.png", part["split"], index)
        for name, part in parts.items()
        for label in ("flats", "heels")
        for index in part[label]
    ]
    for split in ("train", "t10k"):
        missing = [(path, index) for path, its_split, index in wanted if its_split == split and not path.exists()]
        if not missing:
            continue
        images, _ = load_images(split, data_path)
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
        return [shown(f"{self.files[index].parent.name} {self.files[index].stem}") for index in indices]


def read_part(folder: Path, are_photographs: bool) -> Part | None:
    """None if there is no such folder. Raises UserError if a class has no image, or an image can't be read."""
    classes = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    if not classes:
        return None
    by_class = [sorted(path for path in label.iterdir() if not path.name.startswith(".")) for label in classes]
    for label, its_files in zip(classes, by_class):
        if not its_files:
            raise UserError(f"{label}: has no image; put some there, or remove the folder")
    counts = tuple(map(len, by_class))
    files = [path for its_files in by_class for path in its_files]
    views = torch.cat([read_photographs([path])[1] for path in files])  # one at a time: a phone's photograph is large
    images = (turned_left(views) if are_photographs else views).unsqueeze(1)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Part(tuple(shown(path.name) for path in classes), counts, files, images, labels)


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
