"""Every picture, drawn from arrays and from the history file. Figures go to files; no display is needed."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw

from checkpoint import lowest, read_history, write_atomically

MOST_MISTAKES = 100  # in one picture
MOST_PREDICTIONS = 20  # rows in one picture
MOST_IN_SHEET = 200  # images in one picture
BLUE, ORANGE, RED, GREEN = "#1f6fb2", "#e07b00", "#c0392b", "#2e8b57"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _draw_by_epoch(axes: Axes, history: list[dict], key: str, colour: str, label: str) -> None:
    """The mean over runs of a history's values by epoch, in a band from the lowest to the highest, as long as all go on."""
    of_all: dict[int, list[float]] = {}
    for line in history:
        of_all.setdefault(line["epoch"], []).append(line[key])
    by_epoch = {number: values for number, values in of_all.items() if len(values) == len(of_all[1])}
    numbers = list(by_epoch)
    style = "o-" if len(numbers) < 30 else "-"
    axes.plot(numbers, [np.mean(values) for values in by_epoch.values()], style, color=colour, markersize=3, label=label)
    if len(by_epoch[1]) > 1:
        low, high = (list(map(end, by_epoch.values())) for end in (min, max))
        axes.fill_between(numbers, low, high, color=colour, alpha=0.15, lw=0)


def draw_curves(history_path: Path, path: Path) -> None:
    """Loss (log scale) and accuracy of training and validation by epoch, the best epoch marked; of several runs or folds
    the mean, in a band from the lowest to the highest, until the first of them has ended."""
    settings, history = read_history(history_path)
    runs = settings["folds"] or settings["runs"]
    trained_on = "training" if settings["first_share"] == settings["hard_share"] == 1 else "training (on the harder images)"
    best = lowest(history)
    figure = Figure(figsize=(9, 3.6))
    loss, accuracy = figure.subplots(1, 2)
    figure.subplots_adjust(0.09, 0.14, 0.98, 0.9, wspace=0.3)  # a computed layout would draw everything twice
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        for part, colour, label in (("train", ORANGE, trained_on), ("valid", BLUE, "validation")):
            _draw_by_epoch(axes, history, f"{part}_{quantity}", colour, label)
        told = f"best (run {best['run']}, epoch {best['epoch']})" if runs > 1 else f"best (epoch {best['epoch']})"
        axes.axvline(best["epoch"], color="0.7", linestyle=":", label=told)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    of = "" if runs == 1 else f" of {runs} {'folds' if settings['folds'] else 'runs'}"
    loss.set(yscale="log", xlabel="epoch", ylabel="cross-entropy (nats)", title=f"Loss{of}")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("")
    accuracy.set(xlabel="epoch", ylabel="accuracy", title=f"Accuracy{of}")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    accuracy.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_overfitting(histories: dict[str, list[dict]], path: Path) -> None:
    """Training and validation loss by epoch of several recipes, as `draw_curves` has them."""
    figure = Figure(figsize=(4.5 * len(histories), 3.8), layout="constrained")
    for axes, (name, history) in zip(figure.subplots(1, len(histories), sharey=True, squeeze=False)[0], histories.items()):
        for part, colour, label in (("train", ORANGE, "training"), ("valid", BLUE, "validation")):
            _draw_by_epoch(axes, history, f"{part}_loss", colour, label)
        runs = len({line.get("run", 1) for line in history})
        axes.set(title=f"{name} ({runs} splits: mean, lowest to highest)" if runs > 1 else name, xlabel="epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylim=(0, None), ylabel="cross-entropy (nats)")  # when all is drawn: it ends the automatic limits
    figure.axes[-1].legend(frameon=False, loc="upper right")
    _save(figure, path)


def draw_classes(counts: dict[str, Sequence[int]], class_names: Sequence[str], levels: np.ndarray, path: Path) -> None:
    """Images of each class in each part, and how often each grey level 0..255 occurs, `levels` `(256,)`."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, histogram = figure.subplots(1, 2)
    height = 0.8 / len(counts)
    for number, ((part, values), colour) in enumerate(zip(counts.items(), (BLUE, ORANGE, GREEN))):
        places = np.arange(len(class_names)) + (number - (len(counts) - 1) / 2) * height
        bars.barh(places, values, height, color=colour, label=f"{part} ({sum(values):,})")
    bars.set_yticks(range(len(class_names)), class_names)
    bars.invert_yaxis()
    bars.set(xlabel="images", title="Classes")
    bars.xaxis.set_major_formatter("{x:,.0f}")
    bars.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.3), ncols=len(counts))
    histogram.bar(range(256), levels / levels.sum(), width=1, color=BLUE)
    histogram.set(yscale="log", xlabel="grey level", ylabel="share of all pixels", title="Grey levels of the training images")
    histogram.yaxis.set_major_formatter("{x:.1%}")
    for axes in (bars, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x" if axes is bars else "y")
        axes.set_axisbelow(True)
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
    turned: dict = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if size > 2 else {}
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
    told = f"All {shown} mistakes" if shown == len(images) else f"The {shown} most confident of {len(images)} mistakes"
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
        title = "\n".join(line if len(line) <= 24 else f"{line[:23]}…" for line in title.split("\n"))  # as wide as a column
        axes.text(left + 14, top - 0.7, title, fontsize=7.5, color=colour, ha="center", va="bottom", parse_math=False)
    axes.set(xlim=(0, columns * width), ylim=(rows * height, 0), aspect="equal")
    axes.axis("off")
    _save(figure, path)


def _tile(images: np.ndarray, rows: int, gap: int = 2) -> np.ndarray:
    """Images `(rows * columns, 28, 28)` as one, `gap` black pixels apart."""
    tiles = np.pad(images.reshape(rows, -1, 28, 28), ((0, 0), (0, 0), (0, gap), (0, gap)))
    return tiles.transpose(0, 2, 1, 3).reshape(rows * (28 + gap), -1)  # (rows, 30, columns, 30) -> one picture


def draw_grid(images: np.ndarray, row_names: Sequence[str], heading: str, path: Path) -> None:
    """Images `(rows * columns, 28, 28)`, grey 0..255, a row for each name."""
    tiles = _tile(images, len(row_names))
    figure = Figure(figsize=(1.3 + tiles.shape[1] / 55, 0.4 + tiles.shape[0] / 55), layout="constrained")
    axes = figure.subplots()
    axes.imshow(tiles, cmap="gray", vmin=0, vmax=255)
    axes.set_yticks(np.arange(len(row_names)) * 30 + 14, row_names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(heading, fontsize=10)
    _save(figure, path)


def animate_grids(grids: Sequence[np.ndarray], rows: int, path: Path) -> None:
    """A grid `(rows * columns, 28, 28)` for each epoch, one after another, the last one longer: a GIF of 12 s at most."""
    frames = []
    for epoch, grid in enumerate(grids, 1):
        tiled = _tile(grid, rows) // 16 * 17  # 16 greys make a quarter of the file
        frame = Image.fromarray(np.pad(tiled, ((14, 0), (0, 0))))
        ImageDraw.Draw(frame).text((2, 1), f"epoch {epoch}", fill=255)
        frames.append(frame)
    buffer = io.BytesIO()
    milliseconds = [min(250, 9000 // len(frames))] * (len(frames) - 1) + [3000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_atomically(path, buffer.getvalue())


def draw_features(
    points: np.ndarray,
    shares: Sequence[float],
    labels: np.ndarray,
    class_names: Sequence[str],
    images: np.ndarray,
    path: Path,
) -> None:
    """Points `(N, 2)` coloured by class, and as many of the images `(N, 28, 28)` at their points as don't overlap.

    `shares`: of the features' variance, in 0..1, that each of the two axes shows.
    """
    side, room = 1_100, 32  # pixels of the raster that holds the images, and from one image to the next
    low, high = np.quantile(points, [0.002, 0.998], axis=0)  # a few outliers would squeeze all others together
    places = ((points - low) / (high - low) * [1, -1] + [0, 1]) * (side - room)  # (N, 2): left to right, top to bottom
    colours = colormaps["tab10"](range(len(class_names)))[:, :3] * 0.85
    raster, is_free = np.zeros((side, side, 4), np.uint8), np.ones((side, side), bool)
    for (left, top), label, image in zip(places.astype(int), labels, images):
        if 0 <= left <= side - room and 0 <= top <= side - room and is_free[top : top + room, left : left + room].all():
            is_free[top : top + room, left : left + room] = False
            raster[top : top + 28, left : left + 28, :3] = colours[label] * (140 + 0.45 * image[:, :, None])
            raster[top : top + 28, left : left + 28, 3] = np.where(image > 10, 255, 0)
    figure = Figure(figsize=(9, 9.6))
    axes = figure.add_axes((0.04, 0.1, 0.94, 0.86))  # a computed layout would draw everything twice
    x, y = (places + 14).T
    axes.scatter(x, y, s=3, c=colours[labels], alpha=0.25, lw=0)
    axes.imshow(raster, extent=(0, side, side, 0), interpolation="none", zorder=2)  # over the points
    for name, colour in zip(class_names, colours):
        axes.scatter([], [], color=colour, label=name)
    axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[], title="Features before the last layer, in two dimensions")
    axes.set(xlabel=f"first principal component, {shares[0]:.0%} of the variance", ylabel=f"second, {shares[1]:.0%}")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.025), ncols=5)
    _save(figure, path)


def draw_reliability(
    counts: Sequence[int], confidences: Sequence[float], accuracies: Sequence[float], error: float, path: Path
) -> None:
    """How often predictions of each confidence are right: bins of equal width, their images, and the mean confidence and
    accuracy of those of 10 images or more, because fewer say nothing."""
    bins = len(counts)
    middles = (np.arange(bins) + 0.5) / bins
    known = np.array(counts) >= 10
    right_share, sureness = np.array(accuracies)[known], np.array(confidences)[known]
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    right, many = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    right.bar(middles[known], right_share, 0.9 / bins, color=BLUE, label="accuracy")
    right.plot(middles[known], sureness, "o", color=ORANGE, markersize=4, label="mean confidence")
    right.plot([0, 1], [0, 1], ":", color="0.4", label="as sure as right")
    right.set(ylim=(0, 1), ylabel="share", title=f"Reliability: calibration error {error:.2%}")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(frameon=False, loc="upper left")
    many.bar(middles, counts, 0.9 / bins, color="0.6")
    many.set(xlim=(0, 1), yscale="log", xlabel="confidence", ylabel="images")
    many.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in (right, many):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_accuracy_by_count(
    rows: Mapping[str, Mapping[int, Sequence[float]]], counted: str, heading: str, path: Path, *, bands: int, band: str
) -> None:
    """Mean accuracy by number of images, a line for each way in `rows[way][count]`, the accuracies of its trials; around
    the first `bands` lines a band from the worst to the best of them, which `band` names."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, ((way, by_count), colour) in enumerate(zip(rows.items(), (BLUE, ORANGE, GREEN, "0.5"))):
        counts = sorted(by_count)
        axes.plot(counts, [np.mean(by_count[count]) for count in counts], "o-", color=colour, markersize=4, label=way)
        if number < bands:
            low, high = ([extreme(by_count[count]) for count in counts] for extreme in (min, max))
            axes.fill_between(counts, low, high, color=colour, alpha=0.12, label=None if number else band)
    axes.set(xlabel=counted, ylabel="accuracy", title=heading, xscale="log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_search(trials: Sequence[tuple[int, float | None, bool]], weights: dict[str, float], path: Path) -> None:
    """A search's trials (number, validation loss, whether it was given up), the best so far, and what mattered: each
    setting's share of the variance, in 0..1."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    history, importance = figure.subplots(1, 2, width_ratios=(3, 2))
    for is_pruned, colour, label in ((False, BLUE, "trained to the end"), (True, "0.7", "given up")):
        chosen = [(number, loss) for number, loss, pruned in trials if pruned == is_pruned and loss is not None]
        history.plot(*zip(*chosen), "o", color=colour, markersize=4, label=label) if chosen else None
    ended = [(number, loss) for number, loss, pruned in sorted(trials) if not pruned and loss is not None]
    lowest_so_far = np.minimum.accumulate([loss for _, loss in ended])
    history.step([number for number, _ in ended], lowest_so_far, where="post", color=ORANGE, label="lowest so far")
    history.set(xlabel="trial", ylabel="validation loss (nats)", title="Search", yscale="log")
    history.legend(frameon=False)
    names = sorted(weights, key=weights.__getitem__)
    importance.barh(names, [weights[name] for name in names], color=BLUE)
    importance.set(title="What mattered", xlabel="share of the variance of the loss")
    for axes in (history, importance):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_time_to_accuracy(
    recipes: dict[str, tuple[float, float]], ours: Sequence[str], ordinary: Sequence[tuple[float, float]], path: Path
) -> None:
    """Minutes of training (log scale) and accuracy of each recipe, `ours` in a colour of their own, and the best within so
    many minutes; of ordinary training the same by epoch."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*ordinary), "o-", color="0.6", markersize=3, label="resnet8 through DataLoader, validation, by epoch")
    minutes, accuracies = np.array(sorted(recipes.values())).T
    axes.step(
        minutes, np.maximum.accumulate(accuracies), where="post", color="0.85", lw=4, label="the best of the points", zorder=0
    )
    colours = {name: GREEN if name in ours else BLUE if name.endswith("_plus") else ORANGE for name in recipes}
    for name, point in recipes.items():
        axes.plot(*point, "o", color=colours[name], markersize=6)
    for colour, label in ((ORANGE, "a reference's way"), (BLUE, "the same network our way"), (GREEN, "our own networks")):
        axes.plot([], [], "o", color=colour, label=f"{label}, test")
    axes.set(xscale="log", xlabel="minutes of training, on one core or two", ylabel="accuracy", title="What accuracy costs")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14)
    axes.set_ylim(min(accuracies) - 0.03)  # where the points lie; ordinary training may begin below
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.draw_without_rendering()  # from here on it is known where the points lie
    taken = []  # boxes (left, bottom, right, top) in points
    for x, y in (axes.transData.transform(point) * 72 / figure.dpi for point in recipes.values()):
        taken.append((x - 4, y - 4, x + 4, y + 4))
    from_the_right = sorted(zip(recipes, taken), key=lambda named: named[1], reverse=True)  # the long trainings crowd there
    for name, (left, bottom, right, top) in from_the_right:
        width = 4.9 * len(name)
        beside, middle = left - width, (left + right - width) / 2
        places = (
            (right, top - 2),
            (right, bottom - 6),
            (beside, top - 2),
            (beside, bottom - 6),
            (middle, top),
            (middle, bottom - 8),
        )
        for x, y in places:
            if all(x >= b[2] or x + width <= b[0] or y >= b[3] or y + 8 <= b[1] for b in taken):
                break
        taken.append((x, y, x + width, y + 8))
        axes.annotate(name, (x, y), xycoords="figure points", fontsize=8, color=colours[name])
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
        bars.set_yticks(range(len(class_names)), class_names, parse_math=False)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1), xlabel="probability")
        bars.xaxis.set_major_formatter(PercentFormatter(1))
        told = f"predicted {class_names[winner]}" + ("" if truth is None else f", true {class_names[truth]}")
        bars.set_title(told, fontsize=9, parse_math=False)
        bars.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
