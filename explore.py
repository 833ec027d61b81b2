"""Look at the data: `python explore.py [recipe=NAME] [key=value ...]`.

Draws into out_dir/plots: classes.png (images of each class and part, grey levels), samples.png, means.png (the mean image
of each class), augmented.png (training images as the network sees them under the setting `augment`), pairs.png (the
test images nearest to a training image). Prints how many test images stand in the training set, exactly or nearly.
It reads the test images' pixels and labels, and no network: nothing here may choose a setting.
"""

import torch

import plots
from augmentation import augment
from config import OF_TRAINING, Settings, load_settings, parse_augment, run_script
from data_preprocessing import GARMENTS, class_names, labels_of, load_images, split_indices
from metrics import nearest
from model import keep_freed_memory

NEAR = (1, 5, 10)  # grey levels, root mean square over an image's pixels, within which pairs are counted
EACH = 10  # images of a class, or versions of an image, in a row
PAIRS = 30  # in the picture


class ExploreSettings(Settings):
    UNREAD = OF_TRAINING - {"output_dim", "valid_ratio", "augment"}


def count_copies(images: torch.Tensor) -> int:
    """How many images are byte for byte another one's copy, the first of each left out."""
    return len(images) - len({image.numpy().tobytes() for image in images})


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, ExploreSettings)
    print("settings:", settings)
    folder = settings.out_path / "plots"
    keep_freed_memory()
    images, garments = load_images("train", settings.data_path)
    test_images, test_garments = load_images("t10k", settings.data_path)
    train, valid = split_indices(garments, settings.valid_ratio, settings.seed)
    train = train[: settings.limit or None]
    names = class_names(settings.output_dim)

    # ---- classes and grey levels ---------------------------------------------------------------------------------------
    parts = {"training": garments[train], "validation": garments[valid], "test": test_garments}
    counts = {
        part: torch.bincount(labels_of(of_part, settings.output_dim), minlength=len(names)) for part, of_part in parts.items()
    }
    print(f"{'class':12}" + "".join(f"{part:>12}" for part in counts))
    for label, name in enumerate(names):
        print(f"{name:12}" + "".join(f"{count[label].item():12,}" for count in counts.values()))
    levels = torch.bincount(images[train].flatten().int(), minlength=256)
    plots.draw_classes({part: count.tolist() for part, count in counts.items()}, names, levels.numpy(), folder / "classes.png")

    # ---- images ----------------------------------------------------------------------------------------------------------
    of_class = [train[garments[train] == garment] for garment in range(len(GARMENTS))]
    rows = torch.cat([images[indices[:EACH], 0] for indices in of_class])
    titles = [name for name, indices in zip(GARMENTS, of_class) for _ in indices[:EACH]]
    plots.draw_sheet(rows.numpy(), titles, EACH, "Training images", folder / "samples.png")
    means = torch.stack([images[indices].float().mean((0, 1)) for indices in of_class if len(indices)])
    kept = [name for name, indices in zip(GARMENTS, of_class) if len(indices)]
    plots.draw_sheet(means.numpy(), kept, 5, "Mean image of each class", folder / "means.png")
    shown = torch.cat([images[indices[:1]] for indices in of_class])
    generator = torch.Generator().manual_seed(settings.seed)
    versions = [shown, *(augment(shown, settings.augment, generator) for _ in range(EACH - 1))]
    grid = torch.stack(versions, 1).flatten(0, 2)  # (10, EACH, 1, 28, 28) -> (10 * EACH, 28, 28)
    titles = ["as it is" if place == 0 else "" for _ in shown for place in range(EACH)]
    heading = f"What training sees: augment={settings.augment or '(none)'}"
    heading += ", without the generated images" if "gan" in parse_augment(settings.augment) else ""
    plots.draw_sheet(grid.numpy(), titles, EACH, heading, folder / "augmented.png")

    # ---- duplicates ------------------------------------------------------------------------------------------------------
    indices, distances = nearest(test_images, images)
    for part, of_part in (("training", images), ("test", test_images)):
        print(f"copies within the {len(of_part):,} {part} images: {count_copies(of_part)}")
    for told, is_near in [("exactly", distances == 0), *((f"within {near} grey levels", distances <= near) for near in NEAR)]:
        differ = (garments[indices] != test_garments)[is_near].sum().item()
        print(
            f"test images that stand in the training set {told}: {is_near.sum().item()}, {differ} of them under another label"
        )
    pairs, titles = [], []
    for query in map(int, distances.argsort(stable=True)[:PAIRS]):
        match = int(indices[query])
        pairs += [test_images[query, 0], images[match, 0]]
        titles += [
            f"test {query}\n{GARMENTS[test_garments[query]]}",
            f"train {match}, {distances[query]:.1f}\n{GARMENTS[garments[match]]}",
        ]
    heading = "Test images nearest to a training image, and the distance (root mean square, in grey levels)"
    plots.draw_sheet(torch.stack(pairs).numpy(), titles, 10, heading, folder / "pairs.png")
    print(f"wrote {', '.join(f'{name}.png' for name in ('classes', 'samples', 'means', 'augmented', 'pairs'))} to {folder}")


if __name__ == "__main__":
    run_script(main)
