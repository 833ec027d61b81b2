"""Every picture, drawn from arrays and from the history file. Figures go to files; no display is needed."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from checkpoint import write_atomically

MOST_MISTAKES = 100  # in one picture
MOST_PREDICTIONS = 20  # rows in one picture
MOST_IN_SHEET = 200  # images in one picture
BLUE, ORANGE, RED, GREEN = "#1f6fb2", "#e07b00", "#c0392b", "#2e8b57"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def draw_curves(history_path: Path, path: Path) -> None:
    """Loss (log scale) and error rate of training and validation by epoch, the best epoch marked."""
    settings, *epochs = [json.loads(line) for line in history_path.read_text().splitlines()]
    trained_on = "training" if settings["first_share"] == settings["hard_share"] == 1 else "training (on the harder images)"
    number = [epoch["epoch"] for epoch in epochs]
    best = min(epochs, key=lambda epoch: epoch["valid_loss"])
    figure = Figure(figsize=(9, 3.6))
    loss, accuracy = figure.subplots(1, 2)
    figure.subplots_adjust(0.08, 0.14, 0.98, 0.9, wspace=0.25)  # a computed layout would draw everything twice
    for part, colour, label in (("train", ORANGE, trained_on), ("valid", BLUE, "validation")):
        loss.plot(number, [epoch[f"{part}_loss"] for epoch in epochs], "o-", color=colour, markersize=3, label=label)
        accuracy.plot(number, [epoch[f"{part}_accuracy"] for epoch in epochs], "o-", color=colour, markersize=3, label=label)
    loss.set(yscale="log", xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    accuracy.set(xlabel="epoch", ylabel="accuracy", title="Accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    for axes in (loss, accuracy):
        axes.axvline(best["epoch"], color="0.7", linestyle=":", label=f"best (epoch {best['epoch']})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Counts `(C, C)`, true classes in rows, shaded by their share of the row."""
    size = len(class_names)
    figure = Figure(figsize=(2.2 + 0.62 * size, 1.8 + 0.56 * size), layout="constrained")
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(size):
        for column in range(size):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center", color=colour, fontsize=9)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if size > 2 else {}
    axes.set_xticks(range(size), class_names, **turned)
    axes.set_yticks(range(size), class_names)
    axes.set(xlabel="predicted", ylabel="true")
    wrong = int(confusion.sum() - np.trace(confusion))
    axes.set_title(f"{confusion.sum():,} test images, {wrong:,} wrong", fontsize=10)
    _save(figure, path)


def draw_mistakes(
    images: np.ndarray,
    indices: Sequence[int],
    true: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    path: Path,
) -> None:
    """The wrongly classified images `(M, 28, 28)`, each with its index, true and predicted class and the latter's
    probability: every one up to MOST_MISTAKES, the first so many beyond."""
    shown = min(len(images), MOST_MISTAKES)
    told = f"Every mistake: {shown}" if shown == len(images) else f"The {shown} most confident of {len(images)} mistakes"
    titles = [
        f"test {index}\n{is_}\ntaken for {seems}\n{probability:.1%}"
        for index, is_, seems, probability in zip(indices, true, predicted, probabilities)
    ]
    draw_sheet(images[:shown], titles, 5 if shown <= 20 else 10, f"{told} on the test images", path)


def draw_sheet(
    images: np.ndarray, titles: Sequence[str], columns: int, heading: str, path: Path, colours: Sequence[str] | None = None
) -> None:
    """Images `(M, 28, 28)`, grey 0..255, up to MOST_IN_SHEET, in rows of `columns`, each under its title, in its colour
    if there are any."""
    if len(images) > MOST_IN_SHEET:
        images, heading = images[:MOST_IN_SHEET], f"{heading} (the first {MOST_IN_SHEET} are shown)"
    columns = min(max(len(images), 1), columns)
    rows = max(1, -(-len(images) // columns))
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    inch, title_height = 0.045, 2.9 * lines + 2  # an image's pixel is so wide; heights and widths below are in its pixels
    width, height = 28 + 4, 28 + title_height
    size = (max(columns * width * inch, 4), rows * height * inch + 0.5)
    figure = Figure(figsize=size)
    figure.suptitle(heading, fontsize=11, y=1 - 0.12 / size[1], va="top")
    axes = figure.add_axes((0, 0, 1, 1 - 0.45 / size[1]))  # one for all images: a hundred would take seconds
    for number, (image, title, colour) in enumerate(zip(images, titles, colours or ["black"] * len(images))):
        left, top = number % columns * width + 2, number // columns * height + title_height
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(left, left + 28, top + 28, top))
        axes.text(left + 14, top - 0.7, title, fontsize=7.5, color=colour, ha="center", va="bottom", parse_math=False)
    axes.set(xlim=(0, columns * width), ylim=(rows * height, 0), aspect="equal")
    axes.axis("off")
    _save(figure, path)


def draw_accuracy_by_shots(rows: dict[str, dict[int, Sequence[float]]], heading: str, path: Path) -> None:
    """Mean accuracy by number of support images, a line for each method in `rows[method][shots]`, the accuracies of its
    episodes; the band of the first goes from its worst to its best episode."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, ((method, by_shots), colour) in enumerate(zip(rows.items(), (BLUE, ORANGE, GREEN, "0.5"))):
        shots = sorted(by_shots)
        axes.plot(shots, [np.mean(by_shots[k]) for k in shots], "o-", color=colour, markersize=4, label=method)
        if number == 0:
            low, high = ([extreme(by_shots[k]) for k in shots] for extreme in (min, max))
            axes.fill_between(shots, low, high, color=colour, alpha=0.12, label="its worst to its best episode")
    axes.set(xlabel="support images of each class", ylabel="accuracy", title=heading, xscale="log")
    axes.set_xticks(shots, shots)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_predictions(
    originals: Sequence[np.ndarray],
    views: np.ndarray,
    titles: Sequence[str],
    probabilities: np.ndarray,
    class_names: Sequence[str],
    true: Sequence[int | None],
    path: Path,
) -> None:
    """A row per sample, up to MOST_PREDICTIONS: the original, the network's view of it, the probability of each class.

    `originals` are grey `(H, W)` or RGB `(H, W, 3)` uint8, `views` uint8 `(M, 28, 28)`, `probabilities` `(M, C)` in
    0..1. The bar of the true class is green where it is known, that of a wrong prediction red.
    """
    rows, height = min(len(views), MOST_PREDICTIONS), max(2.4, 0.6 + 0.27 * len(class_names))
    figure = Figure(figsize=(8.5, height * rows), layout="constrained")
    for (before, seen, bars), original, view, title, probability, truth in zip(
        figure.subplots(rows, 3, squeeze=False, width_ratios=(1, 1, 1.3)), originals, views, titles, probabilities, true
    ):
        before.imshow(original, cmap="gray", vmin=0, vmax=255)
        before.set_title(title, fontsize=9, parse_math=False)
        seen.imshow(view, cmap="gray", vmin=0, vmax=255)
        seen.set_title("as the network sees it", fontsize=9)
        before.axis("off")
        seen.axis("off")
        winner = int(probability.argmax())
        colours = ["0.75"] * len(class_names)
        colours[winner] = BLUE if truth is None else RED
        if truth is not None:
            colours[truth] = GREEN
        bars.barh(range(len(class_names)), probability, color=colours)
        for place, value in enumerate(probability):
            inside = value > 0.8
            place_x, colour = (value - 0.02, "white") if inside else (value + 0.02, "black")
            bars.text(place_x, place, f"{value:.1%}", va="center", ha="right" if inside else "left", color=colour, fontsize=8)
        bars.set_yticks(range(len(class_names)), class_names)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1))
        bars.xaxis.set_major_formatter(PercentFormatter(1))
        told = f"predicted {class_names[winner]}" + ("" if truth is None else f", true {class_names[truth]}")
        bars.set_title(told, fontsize=9)
        bars.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
