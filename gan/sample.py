"""Draw samples from the trained generator: `python gan/sample.py [per_class=N] [classes=Sneaker,Bag] [key=value ...]`.

Writes out_dir/samples/CLASS/NUMBER.png and plots/generated.png; the generator is out_dir/generator.pt, from gan/train.py.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

from config import Settings, UserError, nearest_name, setting
from data_preprocessing import CLASS_NAMES
from device import choose_device
from gan.grids import draw_grid
from gan.networks import draw, load_generator
from script import load_settings, run_script

COLUMNS = 10  # of the picture


def _known_classes(text: str) -> str:
    for name in text.split(",") if text else []:
        if name not in CLASS_NAMES:
            near = nearest_name(name, CLASS_NAMES)
            raise ValueError(f"there is no class {name!r}, the nearest is {near!r}; known: {', '.join(CLASS_NAMES)}")
    return text


class SampleSettings(Settings):
    """Sampling"""

    out_dir: str = setting("runs/gan", "folder with generator.pt, for everything that a run writes", min_length=1)
    per_class: int = setting(100, "images of each class", ge=1, le=100_000)
    classes: Annotated[str, AfterValidator(_known_classes)] = setting("", "e.g. Sneaker,Bag; empty = all ten")
    noise_std: float = setting(1.0, "standard deviation of the noise; below 1, less varied", gt=0, le=3)


def write_images(images: np.ndarray, folders: list[str], target: Path) -> None:
    """Write grey images `(F, M, 28, 28)` as target/FOLDER/NUMBER.png, in the place of an earlier call's.

    Raises UserError if `target` has anything else, or can't be written."""
    part = target.with_name(f".{target.name}")
    try:
        for path in target.glob("[!.]*"):
            if path.name not in {folder_name(name) for name in CLASS_NAMES}:
                raise UserError(f"{path}: is no folder of a class, and only those belong there; move it")
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        for folder, members in zip(folders, images):
            (part / folder).mkdir(parents=True)
            for number, image in enumerate(members):
                Image.fromarray(image).save(part / folder / f"{number:05d}.png", compress_level=1)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{target}: can't be written ({error.strerror}); free some space or choose another out_dir") from None


def folder_name(class_name: str) -> str:
    return class_name.replace("/", "-")


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, SampleSettings)
    out = settings.out_path
    generator = load_generator(out / "generator.pt")[0].to(choose_device(settings.device))
    names = [name for name in CLASS_NAMES if not settings.classes or name in settings.classes.split(",")]
    labels = torch.tensor([CLASS_NAMES.index(name) for name in names]).repeat_interleave(settings.per_class)
    images = draw(generator, labels, settings.seed, settings.noise_std).view(len(names), -1, 28, 28).cpu().numpy()
    write_images(images, list(map(folder_name, names)), out / "samples")
    draw_grid(images[:, :COLUMNS].reshape(-1, 28, 28), names, "generated", out / "plots" / "generated.png")
    print(f"wrote {len(labels):,} images to {out / 'samples'}, some of them to {out / 'plots' / 'generated.png'}")


if __name__ == "__main__":
    run_script(main)
