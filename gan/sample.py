"""Draw samples from the trained generator: `python gan/sample.py [per_class=N] [key=value ...]`.

Writes out_dir/samples/CLASS/NUMBER.png and plots/generated.png; the generator is out_dir/generator.pt, from gan/train.py.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import plots
from config import Settings, UserError, setting
from data_preprocessing import CLASS_NAMES
from device import choose_device
from gan.networks import CLASSES, draw, load_generator
from script import load_settings, run_script

COLUMNS = 10  # of the picture


class SampleSettings(Settings):
    """Sampling"""

    out_dir: str = setting("runs/gan", "folder with generator.pt, for everything that a run writes", min_length=1)
    per_class: int = setting(100, "images of each class", ge=1, le=100_000)
    noise_std: float = setting(1.0, "standard deviation of the noise; below 1, less varied", gt=0, le=3)


def write_images(images: np.ndarray, target: Path) -> None:
    """Write grey images `(10, M, 28, 28)` as target/CLASS/NUMBER.png, in the place of an earlier call's.

    Raises UserError if `target` has anything else, or can't be written."""
    part, folders = target.with_name(f".{target.name}"), [name.replace("/", "-") for name in CLASS_NAMES]
    try:
        for path in target.glob("[!.]*"):
            if path.name not in folders:
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


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, SampleSettings)
    print("settings:", settings)
    out = settings.out_path
    generator = load_generator(out / "generator.pt")[0].to(choose_device(settings.device))
    labels = torch.arange(CLASSES).repeat_interleave(settings.per_class)
    images = draw(generator, labels, settings.seed, settings.noise_std).view(CLASSES, -1, 28, 28).cpu()
    write_images(images.numpy(), out / "samples")
    titles = [name for name in CLASS_NAMES for _ in images[0, :COLUMNS]]
    sheet = images[:, :COLUMNS].flatten(0, 1).numpy()
    plots.draw_sheet(sheet, titles, COLUMNS, "Generated images", out / "plots" / "generated.png")
    print(f"wrote {len(labels):,} images to {out / 'samples'}, some of them to {out / 'plots' / 'generated.png'}")


if __name__ == "__main__":
    run_script(main)
