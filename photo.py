"""Photographs of any size, colour mode and background, brought to Fashion-MNIST's format."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from config import ROOT, UserError
from data_preprocessing import SHOES, task_labels
from model import load_model
from trainer import infer

MAX_PIXELS = 50_000_000  # a larger image is refused before it is decoded; a JPEG can be decoded smaller than it is
MIN_SIDE = 8  # pixels
MIN_CONTRAST = 32  # grey levels above the background that an object must reach
WORKING_SIDE = 448  # pixels: a larger photograph is reduced to this before its background is looked at


def read_photographs(paths: Sequence[Path]) -> tuple[list[np.ndarray], torch.Tensor]:
    """Image files as RGB `(H, W, 3)`, reduced for pictures, and in Fashion-MNIST's format, uint8 `(N, 28, 28)`.

    Raises UserError, naming the file, if one can't be read or shows nothing.
    """
    originals, views = [], []
    for path in paths:  # one at a time: a phone's photograph is large
        image = open_image(path)
        views.append(to_fashion_mnist(image, str(path)))
        image.thumbnail((WORKING_SIDE, WORKING_SIDE))
        originals.append(np.asarray(image))
    return originals, torch.from_numpy(np.stack(views))


def printable(name: str) -> str:
    """A file's name in characters that can be printed and drawn: not every file system's names are Unicode."""
    return os.fsencode(name).decode(errors="replace")


def face_left(views: torch.Tensor) -> torch.Tensor:
    """Each view, uint8 `(N, 28, 28)`, or its horizontal flip: the one to which Task 1's model gives more probability of a shoe.

    Every shoe in the data set points to the left, and a model that never saw another one classifies most that point to the
    right as clothes; clothes and bags look much the same both ways.
    """
    model = load_model(ROOT / "best_model.pt")
    both = torch.stack([views, views.flip(-1)])  # (2, N, 28, 28)
    logits = infer(model, both.flatten(0, 1).unsqueeze(1))  # (2 * N, C)
    shoes = task_labels(torch.tensor(SHOES), model.metadata["output_dim"]).unique()
    probability = logits.softmax(1)[:, shoes].sum(1).view(2, -1)  # (2, N)
    return both[probability.argmax(0), torch.arange(len(views))]


def open_image(path: Path) -> Image.Image:
    """The first frame of an image file, upright, as RGB. Raises UserError if that can't be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's: damaged metadata, many pixels; what matters is checked here
            return _upright_rgb(path)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has too many pixels; save it smaller") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception:  # Pillow's readers raise a dozen types for files that are damaged, foreign or of a rare kind
        raise UserError(f"{path}: is no readable image; PNG, JPEG, GIF, BMP, TIFF and WebP are") from None


def _upright_rgb(path: Path) -> Image.Image:
    image: Image.Image
    with Image.open(path) as image:
        if min(image.size) < MIN_SIDE:
            raise UserError(f"{path}: {image.width} x {image.height} pixels show nothing; at least {MIN_SIDE} each way")
        image.draft("RGB", (2 * WORKING_SIDE, 2 * WORKING_SIDE))  # a JPEG is decoded at a fraction of its size
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{path}: {image.width} x {image.height} pixels are too many; at most {MAX_PIXELS:,}")
        image.load()
        if image.mode == "F":
            raise UserError(f"{path}: floating point pixels have no known range; save it with 8 bits per channel")
        ImageOps.exif_transpose(image, in_place=True)  # first: the conversions below lose the orientation
        if image.mode.startswith("I"):  # 8, 12 or 16 bits in a wider pixel, by its largest value
            pixels = np.asarray(image).clip(0, 65535)
            bits = next(bits for bits in (8, 12, 16) if pixels.max() < 2**bits)
            image = Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))
        if image.mode in ("P", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
        elif image.mode == "1":
            image = image.convert("L")
        image = image.reduce(max(1, min(image.size) // (2 * WORKING_SIDE)))  # the copies below would take a gigabyte
        if image.mode in ("RGBA", "LA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def to_fashion_mnist(image: Image.Image, name: str) -> np.ndarray:
    """An RGB image as the data set's authors would have made it: uint8 `(28, 28)`, garment bright on black.

    Their steps (arXiv 1708.07747, figure 1): trim the edges that have the corners' colour, resize the longest edge to
    28, sharpen, extend the shortest edge to 28, negate, grey. Ours differ where a photograph differs from their
    catalogue pictures: the background's colour and noise are measured along the whole border; resizing averages
    instead of skipping pixels; the background becomes exactly black; an object brighter than the background is not
    negated. An image that is 28x28 on black already is returned unchanged. Raises UserError if no object stands out.
    """
    nothing = UserError(f"{name}: nothing stands out from the background; photograph the object on a plain, contrasting one")
    if image.size == (28, 28):
        grey = np.asarray(image.convert("L"))
        if np.median(_border(grey)) < 8 and grey.max() >= MIN_CONTRAST:
            return grey
    image = image.copy()
    image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image).astype(np.float32)  # (H, W, 3)
    edge = _border(pixels)  # (2W + 2H, 3)
    background = np.median(edge, axis=0)
    # 5 % of the largest distance, as in the paper, or above the border's own noise (its object may touch the edge)
    tolerance = max(0.05 * 255 * 3**0.5, 2.5 * np.median(np.linalg.norm(edge - background, axis=1)))
    stands_out = np.linalg.norm(pixels - background, axis=2) > tolerance
    rows = np.flatnonzero(stands_out.mean(1) > 0.01)  # one pixel in a hundred: specks don't count
    columns = np.flatnonzero(stands_out.mean(0) > 0.01)
    if not len(rows) or not len(columns):
        raise nothing
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    scale = 28 / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    image = image.convert("L").filter(ImageFilter.UnsharpMask(radius=1, percent=50, threshold=0))
    grey = np.asarray(image).astype(np.float32)
    to_grey = (0.299, 0.587, 0.114)  # as in convert("L")
    ground = float(background @ to_grey)
    is_darker = (pixels[stands_out] @ to_grey).mean() < ground
    distance = (ground - grey) * 255 / ground if is_darker else (grey - ground) * 255 / (255 - ground)
    view = np.zeros((28, 28), dtype=np.uint8)
    top, left = (28 - grey.shape[0]) // 2, (28 - grey.shape[1]) // 2
    view[top : top + grey.shape[0], left : left + grey.shape[1]] = distance.clip(0, 255).round()
    if view.max() < MIN_CONTRAST:  # of another colour, but as bright as the background
        raise nothing
    return view


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
