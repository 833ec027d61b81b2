"""Grids of generated images: a picture, and an animation over the epochs."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import plots
from checkpoint import write_atomically


def _tile(images: np.ndarray, rows: int, gap: int = 2) -> np.ndarray:
    """Images `(rows * columns, 28, 28)` as one, `gap` black pixels apart."""
    tiles = np.pad(images.reshape(rows, -1, 28, 28), ((0, 0), (0, 0), (0, gap), (0, gap)))
    return tiles.transpose(0, 2, 1, 3).reshape(rows * (28 + gap), -1)  # (rows, 30, columns, 30) -> one picture


def draw_grid(images: np.ndarray, row_names: Sequence[str], heading: str, path: Path) -> None:
    """Images `(rows * columns, 28, 28)`, grey 0..255, a row for each name."""
    tiles = _tile(images, len(row_names))
    with plots.picture(path, (1.3 + tiles.shape[1] / 55, 0.4 + tiles.shape[0] / 55)) as figure:
        axes = figure.subplots()
        axes.imshow(tiles, cmap="gray", vmin=0, vmax=255)
        axes.set_yticks(np.arange(len(row_names)) * 30 + 14, row_names)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(heading, fontsize=10)


def animate_grids(grids: Sequence[np.ndarray], rows: int, path: Path) -> None:
    """A grid `(rows * columns, 28, 28)` for each epoch, one after another, the last one longer: a GIF of 12 s at most."""
    # 16 greys make a quarter of the file
    frames = [Image.fromarray(np.pad(_tile(grid, rows) // 16 * 17, ((14, 0), (0, 0)))) for grid in grids]
    for epoch, frame in enumerate(frames, 1):
        ImageDraw.Draw(frame).text((2, 1), f"epoch {epoch}", fill=255)
    buffer = io.BytesIO()
    milliseconds = [min(250, 9000 // len(frames))] * (len(frames) - 1) + [3000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_atomically(path, buffer.getvalue())
