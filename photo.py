"""Photographs of any size, colour mode and background, brought to Fashion-MNIST's format.

A photograph becomes five views: `CUT_OUT`, cut out as the data set's authors did it; `WHOLE`, all of it in grey; `DISTANCE`,
how far each pixel's colour is from the background's; `CUT_BY_COLOUR`, the same, zero where it is near; `CHROMA`, the middle
square's distance without lightness, which a shadow changes. What a model makes of them: views.py.
"""

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFilter, ImageOps
from tqdm import tqdm

from config import UserError

MAX_PIXELS = 50_000_000  # a larger image is refused before it is decoded; a JPEG can be decoded smaller than it is
MIN_SIDE = 8  # pixels
MIN_CONTRAST = 32  # grey levels above the background that an object must reach
WORKING_SIDE = 448  # pixels: a larger photograph is reduced to this before its background is looked at
COLOUR_SIDE = 224  # pixels: the same, before its colours are
CALM = 22  # grey levels from the border's median, within which at least 98 % of a plain background's border lie
VIEWS = 5
CUT_OUT, CUT_BY_COLOUR, WHOLE, DISTANCE, CHROMA = range(VIEWS)


class Photograph(NamedTuple):
    picture: np.ndarray  # RGB (H, W, 3), small, to be drawn
    views: torch.Tensor  # uint8 (V, 28, 28): five, in the order of CUT_OUT to CHROMA, or the one that `prepare=resize` makes
    warning: str  # why the answer may be wrong; empty if nothing speaks against it


def read_photograph(path: Path, preparation: str = "photo") -> Photograph:
    """`preparation`: the setting `prepare` of a training. Raises UserError, naming the file, if it can't be read."""
    image = open_image(path)
    views, warning = ([resize(image)], "") if preparation == "resize" else prepare(image)
    image.thumbnail((WORKING_SIDE // 2, WORKING_SIDE // 2))
    return Photograph(np.asarray(image), torch.from_numpy(np.stack(views)), warning)


def read_views(path: Path, preparation: str) -> torch.Tensor:
    """The views, uint8 `(V, 28, 28)`, that a model learns from: all with `prepare=views`, else the first one, without the time
    that the others take. Raises UserError if the file can't be read."""
    if preparation == "views":
        return read_photograph(path).views
    image = open_image(path)
    view = resize(image) if preparation == "resize" else to_fashion_mnist(image)
    return torch.from_numpy(view)[None] if view is not None else read_photograph(path).views[[CUT_OUT]]


def resize(image: Image.Image) -> np.ndarray:
    """An RGB image in grey, uint8 `(28, 28)`, with nothing cut out or negated."""
    return np.array(image.convert("L").resize((28, 28), Image.Resampling.BILINEAR))


def read_photographs(paths: list[Path], preparation: str = "photo") -> tuple[list[Path], list[Photograph]]:
    """The photographs and their files, without those that can't be read: a line on stderr names each of them."""
    files, photographs = [], []
    for path in tqdm(paths, "photographs", disable=None if len(paths) > 10 else True, leave=False):
        try:
            photographs.append(read_photograph(path, preparation))
            files.append(path)
        except UserError as error:
            tqdm.write(printable(str(error)), file=sys.stderr)
    return files, photographs


def prepare(image: Image.Image) -> tuple[list[np.ndarray], str]:
    """The views, uint8 `(28, 28)` each, of an RGB image, and a warning."""
    cut_out = to_fashion_mnist(image)
    if image.size == (28, 28) and cut_out is not None and (cut_out == np.asarray(image.convert("L"))).all():
        return [cut_out] * VIEWS, ""
    image = image.copy()
    image.thumbnail((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    grey, colours = np.asarray(image.convert("L")).astype(np.float32), to_lab(image)
    difference = colours - np.median(_border(colours), axis=0)  # (H, W, 3)
    distance, chroma = np.linalg.norm(difference, axis=2), np.linalg.norm(difference[..., 1:], axis=2)
    cut_by_colour, objects = cut_out_distance(distance)
    found = []
    if cut_out is None:
        cut_out = cut_by_colour
        found.append("nothing stands out from the background")
    elif (np.abs(_border(grey) - np.median(_border(grey))) > CALM).mean() > 0.02:
        found.append("the background is busy")
    if objects > 1:
        found.append("there are two objects")
    side = min(grey.shape)
    top, left = (grey.shape[0] - side) // 2, (grey.shape[1] - side) // 2
    views = [_square(grey), _square(distance), _square(1.5 * chroma[top : top + side, left : left + side])]
    return [cut_out, cut_by_colour, *views], "; ".join(found)


def to_lab(image: Image.Image) -> np.ndarray:
    """An RGB image in CIELAB, where equal distances look equally large: float32 `(H, W, 3)`. Lightness is in 0..255, and the
    other coordinates, red against green and yellow against blue, are on the same scale."""
    lab = np.asarray(ImageCms.applyTransform(image, _lab_transform()))  # uint8; the last two are signed, of lightness in 0..100
    return np.dstack([lab[..., :1], lab[..., 1:].view(np.int8) * np.float32(2.55)])


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def cut_out_distance(distance: np.ndarray) -> tuple[np.ndarray, int]:
    """Distances `(H, W)` of what stands out from the border, on black, uint8 `(28, 28)`; the number of large parts."""
    from scipy import ndimage  # here: only photographs need it

    parts, count = ndimage.label(distance > max(20, 2.5 * np.median(_border(distance))))
    if not count:
        return _square(distance, 0), 0
    areas = np.bincount(parts.flat)[1:]
    is_object = np.isin(parts, 1 + np.flatnonzero(areas >= 0.1 * areas.max()))
    rows, columns = np.flatnonzero(is_object.any(1)), np.flatnonzero(is_object.any(0))
    cut = (distance * is_object)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _square(cut, 0), int((areas >= 0.3 * areas.max()).sum())


def _square(values: np.ndarray, background: float | None = None) -> np.ndarray:
    """Values `(H, W)`, extended to a square by `background`, their border's median by default, as uint8 `(28, 28)`."""
    side = max(values.shape)
    square = np.full((side, side), np.median(_border(values)) if background is None else background, np.float32)
    top, left = (side - values.shape[0]) // 2, (side - values.shape[1]) // 2
    square[top : top + values.shape[0], left : left + values.shape[1]] = values
    resized = Image.fromarray(square).resize((28, 28), Image.Resampling.BOX)
    return np.asarray(resized).round().clip(0, 255).astype(np.uint8)


def printable(name: str) -> str:
    """A file's name in one line of characters that can be printed and drawn: not every file system's names are Unicode."""
    return os.fsencode(name).decode(errors="replace").replace("\n", " ")


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
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder in which no file was read; name its files") from None
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


def to_fashion_mnist(image: Image.Image) -> np.ndarray | None:
    """An RGB image as the data set's authors would have made it: uint8 `(28, 28)`, garment bright on black.

    Their steps (arXiv 1708.07747, figure 1): trim the edges that have the corners' colour, resize the longest edge to
    28, sharpen, extend the shortest edge to 28, negate, grey. Ours differ where a photograph differs from their
    catalogue pictures: the background's colour and noise are measured along the whole border; resizing averages
    instead of skipping pixels; the background becomes exactly black; an object brighter than the background is not
    negated. An image that is 28x28 on black already is returned unchanged. None if no object stands out.
    """
    if image.size == (28, 28):
        grey = np.array(image.convert("L"))
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
        return None
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
    return view if view.max() >= MIN_CONTRAST else None  # of another colour, but as bright as the background


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
