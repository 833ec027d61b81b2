"""Explore the data: `python explore.py [recipe=NAME] [key=value ...]`.

Draws into out_dir/plots: classes.png (images per class and split, grey levels), samples.png, means.png (the mean image of each
class), augmented.png (training images under the setting `augment`), pairs.png (the test images nearest to a training image).
Prints how many test images are in the training set, exactly or nearly. It reads the test images' pixels and labels, but no
model: nothing here may choose a setting.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import plots
from augmentation import augment
from config import Augment, DataSettings, RecipeSettings, parse_augment, setting
from data_preprocessing import Dataset, as_task, count_levels, load_data, shuffle, split_indices
from metrics import nearest
from script import load_settings, run_script

NEAR = (1, 5, 10)  # grey levels, root mean square over an image's pixels, within which pairs are counted
COLUMNS = 10  # images of a class, or versions of an image, in a row
PAIRS = 30  # in the picture


class ExploreSettings(DataSettings, RecipeSettings):
    """Exploration"""

    valid_ratio: float = setting(0.1, "fraction of the training images used for validation", ge=0, lt=1)
    augment: Augment = ""


def count_copies(images: torch.Tensor) -> int:
    """How many images are byte for byte another one's copy, not counting the first of each."""
    return len(images) - len({image.numpy().tobytes() for image in images})


def draw_images(data: Dataset, train: torch.Tensor, settings: ExploreSettings, folder: Path) -> None:
    """Samples, mean images and augmented images of the training set, whose indices are in `train`."""
    images, by_class = data.images, [train[data.labels[train] == label] for label in range(len(data.class_names))]
    samples = torch.cat([images[indices[:COLUMNS], 0] for indices in by_class])
    titles = [name for name, indices in zip(data.class_names, by_class) for _ in indices[:COLUMNS]]
    plots.draw_sheet(samples.numpy(), titles, COLUMNS, "Training images", folder / "samples.png")
    means = {name: images[indices].float().mean((0, 1)) for name, indices in zip(data.class_names, by_class) if len(indices)}
    plots.draw_sheet(torch.stack([*means.values()]).numpy(), [*means], 5, "Mean image of each class", folder / "means.png")
    firsts = torch.cat([indices[:1] for indices in by_class]).repeat_interleave(COLUMNS)
    generator = torch.Generator().manual_seed(settings.seed)
    order = shuffle(torch.arange(len(firsts)), generator)  # the last images of a batch become scenes
    grid, chosen = torch.empty_like(images[firsts, :1]), firsts[order]  # (C * COLUMNS, 1, 28, 28)
    grid[order] = augment(images[chosen, :1], data.labels[chosen], settings.augment, generator)
    grid[::COLUMNS] = images[firsts[::COLUMNS], :1]
    titles = ["original", *[""] * (COLUMNS - 1)] * (len(grid) // COLUMNS)
    heading = f"Augmented training images: augment={settings.augment or '(none)'}"
    heading += ", without the generated images" if "gan" in parse_augment(settings.augment) else ""
    plots.draw_sheet(grid[:, 0].numpy(), titles, COLUMNS, heading, folder / "augmented.png")


def report_copies(data: Dataset, test: Dataset, path: Path) -> None:
    """Print how many test images are in the training set, and draw the nearest pairs."""
    images, test_images, names = data.images, test.images, data.class_names
    for split, split_images in (("training", images), ("test", test_images)):
        print(f"copies within the {len(split_images):,} {split} images: {count_copies(split_images)}")
    indices, distances = nearest(test_images, images)
    for limit in (0, *NEAR):
        is_near = distances <= limit
        differ = (data.labels[indices] != test.labels)[is_near].sum()
        name = f"within {limit} grey levels" if limit else "exactly"
        print(f"test images in the training set {name}: {is_near.sum()}, {differ} of them with another label")
    pairs, titles = [], []
    for query in distances.argsort(stable=True)[:PAIRS].tolist():
        match = indices[query]
        pairs += [test_images[query, 0], images[match, 0]]
        titles.append(f"test {query}\n{names[test.labels[query]]}")
        titles.append(f"train {match}, {distances[query]:.1f}\n{names[data.labels[match]]}")
    heading = "Test images nearest to a training image, and the distance (root mean square, in grey levels)"
    plots.draw_sheet(torch.stack(pairs).numpy(), titles, 10, heading, path)


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, ExploreSettings)
    print("settings:", settings)
    folder = settings.out_path / "plots"
    data, test = (load_data(split, settings.data_path, settings.model_dump()) for split in ("train", "test"))
    train, valid = split_indices(data.labels, settings.valid_ratio, settings.seed)
    train = train[: settings.limit or None]

    task, test_task = (as_task(split, settings.output_dim) for split in (data, test))
    names = task.class_names
    splits = {"training": task.labels[train], "validation": task.labels[valid], "test": test_task.labels}
    counts = {split: split_labels.bincount(minlength=len(names)).tolist() for split, split_labels in splits.items()}
    print(f"{'class':12}" + "".join(f"{split:>12}" for split in counts))
    for name, *row in zip(names, *counts.values()):
        print(f"{name:12}" + "".join(f"{count:12,}" for count in row))
    plots.draw_classes(counts, names, count_levels(data.images, train).numpy(), folder / "classes.png")
    draw_images(data, train, settings, folder)
    report_copies(data, test, folder / "pairs.png")
    print(f"wrote classes.png, samples.png, means.png, augmented.png, pairs.png to {folder}")


if __name__ == "__main__":
    run_script(main)
