"""Every picture, drawn from arrays and from history files into PNG files; no display is needed."""

import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

try:
    import matplotlib  # noqa: F401
except ValueError:  # MPLBACKEND names a backend that is not installed here, as in a process that a notebook has started
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[name]
    os.environ["MPLBACKEND"] = "agg"
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from checkpoint import best_epoch, read_history, write_atomically

MAX_PREDICTIONS, MAX_IN_SHEET = 10, 200  # rows and images in one picture
FULL_COLOUR = 0.4  # change of a probability that has the full colour in a map of what mattered
LEGEND = f"covering a red part lowers the probability, a blue one raises it; in full colour by {FULL_COLOUR * 100:.0f} points"
BLUE, ORANGE, RED, GREEN = "#1f6fb2", "#e07b00", "#c0392b", "#2e8b57"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25, "legend.frameon": False}
STYLE |= {"axes.titley": 1.0}  # else each title is laid out around ticks, which takes a third of the time


@contextmanager
def picture(path: Path, size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Iterator[Figure]:
    """A figure of `size` inches, saved as PNG at the end, in our style over matplotlib's defaults, whatever the user's are."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, about characters that its font lacks
        figure = Figure(figsize=size, layout=layout)
        yield figure
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(buffer, dpi=110)
    write_atomically(path, buffer.getvalue())


def _draw_by_epoch(axes: Axes, history: list[dict], quantity: str, train_label: str = "training") -> None:
    """Loss or accuracy of training and validation by epoch: the runs' mean, in a band of their range, until the first ends."""
    parts = (("train", ORANGE, train_label), ("valid", BLUE, "validation"))
    for part, colour, label in parts if "valid_loss" in history[0] else parts[:1]:
        by_epoch: dict[int, list[float]] = {}
        for line in history:
            by_epoch.setdefault(line["epoch"], []).append(line[f"{part}_{quantity}"])
        values = np.array([values for values in by_epoch.values() if len(values) == len(by_epoch[1])])  # (epochs, runs)
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values.mean(1), "o-" if len(values) < 30 else "-", color=colour, markersize=3, label=label)
        if values.shape[1] > 1:
            axes.fill_between(epochs, values.min(1), values.max(1), color=colour, alpha=0.15, lw=0)


def draw_curves(history_path: Path, path: Path) -> None:
    """Loss (log scale) and accuracy by epoch, as `_draw_by_epoch` has them, the best epoch marked."""
    settings, history = read_history(history_path)
    runs = settings["folds"] or settings["runs"]
    is_full = settings["first_epoch_fraction"] == settings["hard_fraction"] == 1
    best = best_epoch(history)
    run = f"run {best['run']}, " if runs > 1 else ""
    label = f"{'best' if 'valid_loss' in best else 'last'} ({run}epoch {best['epoch']})"
    with picture(path, (9, 3.6), layout=None) as figure:
        loss, accuracy = figure.subplots(1, 2)
        figure.subplots_adjust(0.09, 0.14, 0.98, 0.9, wspace=0.3)  # a computed layout would draw everything twice
        for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
            _draw_by_epoch(axes, history, quantity, "training" if is_full else "training (hard images)")
            axes.axvline(best["epoch"], color="0.7", linestyle=":", label=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid()
        of = "" if runs == 1 else f" of {runs} {'folds' if settings['folds'] else 'runs'}"
        loss.set(yscale="log", xlabel="epoch", ylabel="cross-entropy (nats)", title=f"Loss{of}")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter("")
        accuracy.set(xlabel="epoch", ylabel="accuracy", title=f"Accuracy{of}")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        accuracy.legend(loc="lower right")


def draw_overfitting(histories: dict[str, list[dict]], path: Path) -> None:
    """Training and validation loss by epoch of several recipes, as `_draw_by_epoch` has them."""
    with picture(path, (4.5 * len(histories), 3.8)) as figure:
        for axes, (name, history) in zip(figure.subplots(1, len(histories), sharey=True, squeeze=False)[0], histories.items()):
            _draw_by_epoch(axes, history, "loss")
            runs = len({line.get("run", 1) for line in history})
            axes.set(title=f"{name} ({runs} splits: mean, lowest to highest)" if runs > 1 else name, xlabel="epoch")
            axes.grid()
        figure.axes[0].set(ylim=(0, None), ylabel="cross-entropy (nats)")  # when all is drawn: it ends the automatic limits
        figure.axes[-1].legend(loc="upper right")


def draw_classes(counts: Mapping[str, Sequence[int]], class_names: Sequence[str], levels: np.ndarray, path: Path) -> None:
    """Images of each class in each part, and how often each grey level 0..255 occurs, `levels` `(256,)`."""
    with picture(path, (11, max(4, 0.25 * len(class_names)))) as figure:
        bars, histogram = figure.subplots(1, 2)
        height = 0.8 / len(counts)
        for number, ((part, values), colour) in enumerate(zip(counts.items(), (BLUE, ORANGE, GREEN))):
            y = np.arange(len(class_names)) + (number - (len(counts) - 1) / 2) * height
            bars.barh(y, values, height, color=colour, label=f"{part} ({sum(values):,})")
        bars.set_yticks(range(len(class_names)), class_names)
        bars.invert_yaxis()
        bars.set(xlabel="images", title="Classes")
        bars.xaxis.set_major_formatter("{x:,.0f}")
        bars.legend(loc="lower center", bbox_to_anchor=(0.5, -0.3), ncols=len(counts))
        histogram.bar(range(256), levels / levels.sum(), width=1, color=BLUE)
        histogram.set(yscale="log", xlabel="grey level", ylabel="fraction of all pixels")
        histogram.set_title("Grey levels of the training images")
        histogram.yaxis.set_major_formatter("{x:.1%}")
        for axes in (bars, histogram):
            axes.grid(axis="x" if axes is bars else "y")
            axes.set_axisbelow(True)


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Counts `(C, C)`, true classes in rows, shaded by their fraction of the row."""
    size = len(class_names)
    with picture(path, (2.2 + 0.62 * size, 1.8 + 0.56 * size)) as figure:
        axes = figure.subplots()
        fraction = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if fraction[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
        rotated: dict = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if size > 2 else {}
        axes.set_xticks(range(size), class_names, **rotated)
        axes.set_yticks(range(size), class_names)
        axes.set(xlabel="predicted", ylabel="true")
        wrong = int(confusion.sum() - np.trace(confusion))
        axes.set_title(f"{confusion.sum():,} test images, {wrong:,} wrong", fontsize=10)


def draw_sheet(
    images: np.ndarray, titles: Sequence[str], columns: int, heading: str, path: Path, colours: Sequence[str] | None = None
) -> None:
    """Images `(M, 28, 28)`, grey 0..255, up to MAX_IN_SHEET, in rows of `columns`, each under its title, perhaps coloured."""
    if len(images) > MAX_IN_SHEET:
        images, heading = images[:MAX_IN_SHEET], f"{heading} (the first {MAX_IN_SHEET} are shown)"
    columns = min(max(len(images), 1), columns)
    rows = max(1, -(-len(images) // columns))
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    inch, title_height = 0.045, 2.9 * lines + 2  # an image's pixel is so wide; heights and widths below are in its pixels
    width, height = 28 + 4, 28 + title_height
    size = (max(columns * width * inch, 4), rows * height * inch + 0.5)
    with picture(path, size, layout=None) as figure:
        figure.suptitle(heading, fontsize=11, y=1 - 0.12 / size[1], va="top")
        axes = figure.add_axes((0, 0, 1, 1 - 0.45 / size[1]))  # one for all images: a hundred would take seconds
        for number, (image, title, colour) in enumerate(zip(images, titles, colours or ["black"] * len(images))):
            left, top = number % columns * width + 2, number // columns * height + title_height
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(left, left + 28, top + 28, top))
            title = "\n".join(line if len(line) <= 24 else f"{line[:23]}…" for line in title.split("\n"))  # as wide as a column
            axes.text(left + 14, top - 0.7, title, fontsize=7.5, color=colour, ha="center", va="bottom", parse_math=False)
        axes.set(xlim=(0, columns * width), ylim=(rows * height, 0), aspect="equal")
        axes.axis("off")


def animate_grids(grids: Sequence[torch.Tensor], columns: int, path: Path) -> None:
    """Grids of uint8 images `(M, 28, 28)` in rows of `columns`, one per epoch, the last one longer: a GIF of 12 s at most."""
    from torchvision.utils import make_grid  # here: torchvision takes a second to import

    frames = []
    for epoch, images in enumerate(grids, 1):
        tiles = make_grid(images.unsqueeze(1), columns, padding=2)[0] // 16 * 17  # 16 greys make a quarter of the file
        frames.append(Image.fromarray(np.pad(tiles.numpy(), ((14, 0), (0, 0)))))
        ImageDraw.Draw(frames[-1]).text((2, 1), f"epoch {epoch}", fill=255)
    buffer = io.BytesIO()
    milliseconds = [min(250, 9000 // len(frames))] * (len(frames) - 1) + [3000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_atomically(path, buffer.getvalue())


def draw_features(
    points: np.ndarray, explained: list[float], labels: np.ndarray, class_names: Sequence[str], images: np.ndarray, path: Path
) -> None:
    """Points `(N, 2)` coloured by class, and as many of the images `(N, 28, 28)` at their points as don't overlap.

    `explained`: the fraction of the features' variance, in 0..1, on each of the two axes.
    """
    side, room = 1_100, 32  # pixels of the raster that holds the images, and from one image to the next
    low, high = np.quantile(points, [0.002, 0.998], axis=0)  # a few outliers would squeeze all others together
    positions = ((points - low) / (high - low).clip(1e-9) * [1, -1] + [0, 1]) * (side - room)  # (N, 2): to the right, down
    count = len(class_names)
    colours = colormaps["tab10"](range(count)) if count <= 10 else colormaps["gist_rainbow"](np.linspace(0, 1, count))
    colours = colours[:, :3] * 0.85
    raster, is_free = np.zeros((side, side, 4), np.uint8), np.ones((side, side), bool)
    for (left, top), label, image in zip(positions.astype(int), labels, images):
        if 0 <= left <= side - room and 0 <= top <= side - room and is_free[top : top + room, left : left + room].all():
            is_free[top : top + room, left : left + room] = False
            raster[top : top + 28, left : left + 28, :3] = colours[label] * (140 + 0.45 * image[:, :, None])
            raster[top : top + 28, left : left + 28, 3] = np.where(image > 10, 255, 0)
    with picture(path, (9, 9.6), layout=None) as figure:
        axes = figure.add_axes((0.04, 0.1, 0.94, 0.86))  # a computed layout would draw everything twice
        x, y = (positions + 14).T
        axes.scatter(x, y, s=3, c=colours[labels], alpha=0.25, lw=0)
        axes.imshow(raster, extent=(0, side, side, 0), interpolation="none", zorder=2)  # over the points
        for name, colour in zip(class_names, colours):
            axes.scatter([], [], color=colour, label=name)
        axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
        axes.set_title("Features before the last layer, in two dimensions")
        axes.set(xlabel=f"first principal component, {explained[0]:.0%} of the variance", ylabel=f"second, {explained[1]:.0%}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.025), ncols=5)


def draw_reliability(counts: list[int], confidences: list[float], accuracies: list[float], error: float, path: Path) -> None:
    """Reliability diagram: accuracy and mean confidence of bins of equal confidence, of 10 images or more, and their counts."""
    bins = len(counts)
    middles = (np.arange(bins) + 0.5) / bins
    known = np.array(counts) >= 10
    accuracy, confidence = np.array(accuracies)[known], np.array(confidences)[known]
    with picture(path, (5.2, 5.4)) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        top.bar(middles[known], accuracy, 0.9 / bins, color=BLUE, label="accuracy")
        top.plot(middles[known], confidence, "o", color=ORANGE, markersize=4, label="mean confidence")
        top.plot([0, 1], [0, 1], ":", color="0.4", label="perfect calibration")
        top.set(ylim=(0, 1), ylabel="accuracy", title=f"Reliability: calibration error {error:.2%}")
        top.yaxis.set_major_formatter(PercentFormatter(1))
        top.legend(loc="upper left")
        bottom.bar(middles, counts, 0.9 / bins, color="0.6")
        bottom.set(xlim=(0, 1), yscale="log", xlabel="confidence", ylabel="images")
        bottom.xaxis.set_major_formatter(PercentFormatter(1))


def draw_accuracy_by_count(rows: Mapping[str, Mapping[int, Sequence[float]]], counted: str, heading: str, path: Path) -> None:
    """Mean accuracy by number of images, a line per method in `rows[method][count]`, the accuracies of its episodes; around
    the first method's line a band from its worst to its best episode."""
    with picture(path, (7, 4.2)) as figure:
        axes = figure.subplots()
        for number, ((method, by_count), colour) in enumerate(zip(rows.items(), (BLUE, ORANGE, GREEN, "0.5"))):
            counts = sorted(by_count)
            axes.plot(counts, [np.mean(by_count[count]) for count in counts], "o-", color=colour, markersize=4, label=method)
            if number == 0:
                low, high = ([extreme(by_count[count]) for count in counts] for extreme in (min, max))
                axes.fill_between(counts, low, high, color=colour, alpha=0.12, label="its worst to its best episode")
        axes.set(xlabel=counted, ylabel="accuracy", title=heading, xscale="log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid()
        axes.legend(loc="lower right")


def draw_search(trials: Sequence[tuple[int, float | None, bool]], weights: dict[str, float], path: Path) -> None:
    """A search's trials (number, validation loss, whether it was pruned), the best so far, and each setting's importance:
    its fraction of the variance, in 0..1."""
    with picture(path, (10, 4)) as figure:
        history, importance = figure.subplots(1, 2, width_ratios=(3, 2))
        numbers, losses, is_pruned = np.array(sorted(trials), dtype=float).T  # no loss becomes NaN, which is not drawn
        completed = is_pruned == 0
        for chosen, colour, label in ((completed, BLUE, "completed"), (~completed, "0.7", "pruned")):
            history.plot(numbers[chosen], losses[chosen], "o", color=colour, markersize=4, label=label)
        lowest_so_far = np.fmin.accumulate(losses[completed])
        history.step(numbers[completed], lowest_so_far, where="post", color=ORANGE, label="lowest so far")
        history.set(xlabel="trial", ylabel="validation loss (nats)", title="Hyperparameter search", yscale="log")
        history.legend()
        names = sorted(weights, key=weights.__getitem__)
        importance.barh(names, [weights[name] for name in names], color=BLUE)
        importance.set(title="Importance", xlabel="fraction of the variance of the loss")


def draw_ladder(rungs: Mapping[str, Sequence[dict]], ordinary: Mapping[str, Sequence[tuple]], path: Path) -> None:
    """Seconds (log scale) and test accuracy of each recipe's seeds; seconds and validation accuracy, by epoch, of models that
    were trained with DataLoader, from their (seconds, loss, accuracy)."""
    with picture(path, (8, 5)) as figure:
        axes = figure.subplots()
        for (name, epochs), colour in zip(ordinary.items(), ("0.4", "0.7")):
            seconds, _, accuracies = zip(*epochs)
            axes.plot(seconds, accuracies, "o-", color=colour, markersize=3, label=f"{name}, DataLoader, validation")
        for name, rows in rungs.items():
            points = np.array([(row["seconds"], row["accuracy"]) for row in rows])
            axes.plot(*points.T, "o", color=BLUE, markersize=4)
            x, y = points.mean(0)
            axes.annotate(f"{name}: {y:.2%} in {x:.3g} s", (x, y), (0, 12), textcoords="offset points", color=BLUE, ha="center")
        axes.set(xscale="log", xlabel="seconds of the whole process, two cores", ylabel="accuracy", title="Accuracy and time")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.margins(0.12)
        axes.grid()
        axes.legend(loc="lower right")


def overlay_map(view: np.ndarray, fall: np.ndarray) -> np.ndarray:
    """RGB in 0..1, `(28, 28, 3)`: the view, uint8 `(28, 28)`, in pale grey; red where covering it lowers the probability, blue
    where it raises it. `fall` `(28, 28)` is of occlusion.py, in -1..1; from FULL_COLOUR on, the colour is full."""
    grey, fall = 0.4 + 0.5 * view[..., None] / 255, fall[..., None]
    strength = 0.9 * np.minimum(np.abs(fall) / FULL_COLOUR, 1)
    return (1 - strength) * grey + strength * np.where(fall > 0, to_rgb(RED), to_rgb(BLUE))


def tile(views: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """RGB in 0..1, `(H, W, 3)`: views, uint8 `(V, 28, 28)`, and what mattered in each, of occlusion.py, `(V, 28, 28)`."""
    tiles = [np.repeat(view[..., None] / 255, 3, 2) for view in views] + list(map(overlay_map, views, maps))
    tiles = [np.pad(tile, ((0, 0), (1, 1), (0, 0)), constant_values=1) for tile in tiles]
    columns = max(2, len(views))  # a single view has its map beside it, several have theirs below them
    return np.concatenate([np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)])


def draw_predictions(
    originals: Sequence[np.ndarray],
    views: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    titles: Sequence[str],
    probabilities: np.ndarray,
    class_names: Sequence[str],
    true: Sequence[int | None],
    path: Path,
) -> None:
    """A row per sample, up to MAX_PREDICTIONS: the original; the model's views and maps of what mattered in them; the
    probability of each class or, of several samples, of the three most probable ones.

    `originals` are grey `(H, W)` or RGB `(H, W, 3)` uint8, `views` uint8 `(V, 28, 28)`, `maps` float `(V, 28, 28)` as
    `overlay_map` has them, `probabilities` `(M, C)` in 0..1. The bar of the true class is green where it is known, that of a
    wrong prediction red.
    """
    rows = min(len(views), MAX_PREDICTIONS)
    count = len(class_names) if rows == 1 else min(3, len(class_names))  # bars
    with picture(path, (8.5, max(2.4 if rows == 1 else 2.1, 0.6 + 0.27 * count) * rows)) as figure:
        grid = figure.subplots(rows, 3, squeeze=False, width_ratios=(1, 1.2, 1.1))
        figure.supxlabel(f"What mattered: {LEGEND}", fontsize=8)
        for (before, after, bars), original, view, fall, title, probability, truth in zip(
            grid, originals, views, maps, titles, probabilities, true
        ):
            for axes, image, heading in ((before, original, title), (after, tile(view, fall), "model input; what mattered")):
                axes.imshow(image, cmap="gray", vmin=0, vmax=255)
                axes.set_title(heading, fontsize=9, parse_math=False)
                axes.axis("off")
            order = np.argsort(-probability, kind="stable")
            winner, labels = order[0], range(count) if rows == 1 else order[:count].tolist()
            bars.set_yticks(range(count), [class_names[label] for label in labels], parse_math=False)
            for y, label in enumerate(labels):
                value, is_winner = probability[label], label == winner
                colour = GREEN if label == truth else "0.75" if not is_winner else BLUE if truth is None else RED
                bars.barh(y, value, color=colour)
                x, side, colour = (value - 0.02, "right", "white") if value > 0.8 else (value + 0.02, "left", "black")
                bars.text(x, y, f"{value:.1%}", va="center", ha=side, color=colour, fontsize=8)
            bars.set(xlim=(0, 1), ylim=(count - 0.5, -0.5), xlabel="probability")  # the first above
            bars.xaxis.set_major_formatter(PercentFormatter(1))
            bars.xaxis.set_visible(rows == 1)  # of many rows, laying out the ticks would take long
            title = f"predicted {class_names[winner]}" + ("" if truth is None else f", true {class_names[truth]}")
            title += f"\nrunner-up {class_names[order[1]]}" if len(class_names) > 2 else ""
            bars.set_title(title, fontsize=9, parse_math=False)
