"""Data sets: read them; labels, splits, folds, mean and standard deviation.

`load_data` reads Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747), MNIST, KMNIST (Clanuwat et al. 2018, arXiv
1812.01718) or a folder of images. The images stay one uint8 tensor `(N, 1, 28, 28)`, objects bright on black; the model turns a
batch into floating point. `task_labels` makes Task 1's two classes of Fashion-MNIST's ten, which are then `fine_labels`.
"""

import gzip
import hashlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from config import FASHION_MNIST, TITLES, UserError, resolve
from idx import IDX_FILES, fetch_with_torchvision, find_idx, read_idx

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLOTHES_OR_SHOE = ("clothes", "shoe")  # Task 1's classes
SHOES = (5, 7, 9)  # fine labels
DEFAULTS = {"data": FASHION_MNIST, "prepare": "photo", "augment": ""}  # of settings that older files lack
TEST_RATIO = 0.1  # of a folder without test/, kept for testing


class Dataset(NamedTuple):
    """One split of a data set: images, uint8 `(N, 1, 28, 28)`, and labels, int64 `(N,)`, which number the classes.
    With `prepare=views`, `(N, 5, 28, 28)`.

    `fine_labels` are the labels of the data set's own classes, of which a task's class may have several.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    fine_labels: torch.Tensor

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.images.to(device), self.labels.to(device), self.class_names, self.fine_labels.to(device))


def load_data(split: str, data_path: Path, settings: Mapping) -> Dataset:
    """The "train" or "test" split of the data set that a training's `settings` name, with all its classes.

    Raises UserError if the data set is not there, or not as it should be.
    """
    settings = {**DEFAULTS, **settings}
    name, prepare = settings["data"], settings["prepare"]
    if name not in TITLES:
        return _load_folder(name, split, prepare)
    split = {"train": "train", "test": "t10k"}[split]
    if name == FASHION_MNIST:
        images, labels = load_images(split, data_path)
        return Dataset(images, labels, CLASS_NAMES, labels)
    return _load_with_torchvision(TITLES[name], split, data_path)


def as_task(data: Dataset, output_dim: int) -> Dataset:
    """The data set with `output_dim` classes; 0 = all, 2 = clothes or shoe for Fashion-MNIST. Raises UserError on other
    numbers than that of its classes."""
    if output_dim in (0, len(data.class_names)):
        return data
    if output_dim == 2 and data.class_names == CLASS_NAMES:
        return data._replace(labels=task_labels(data.labels, 2), class_names=CLOTHES_OR_SHOE)
    raise UserError(f"output_dim={output_dim}: the data set has {len(data.class_names)} classes; output_dim=0 takes all")


def load_images(split: str, data_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Fashion-MNIST's images, uint8 `(N, 1, 28, 28)`, and labels, int64 `(N,)` in 0..9, of `split`, "train" or "t10k".

    Looks in `data_path`/FashionMNIST/raw, then in Debian's folder, then downloads, and uses a file only if its
    decompressed contents have the known digest. Raises UserError where no source gives it.
    """
    names = [name for name in IDX_FILES if name.startswith(split)]
    images, labels = (read_idx(find_idx(name, data_path), IDX_FILES[name][0], name) for name in names)
    return images.unsqueeze(1), labels.long()  # (N, 28, 28) -> (N, 1, 28, 28)


def _load_with_torchvision(title: str, split: str, data_path: Path) -> Dataset:
    """MNIST or KMNIST. torchvision knows their servers, classes, and MD5 sums of the gzipped files; no others are read."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    source, raw = getattr(datasets, title), data_path / title / "raw"
    files = {raw / name: md5 for name, md5 in source.resources if name.startswith(split)}
    for path, md5 in files.items():
        if check_integrity(path, md5):
            continue
        problem = f"{path}: {'is damaged, its MD5 sum is not the published one' if path.exists() else 'is not there'}"
        print(f"{problem}; trying torchvision's download ...", file=sys.stderr)
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw) as folder:
                for fetched in fetch_with_torchvision(Path(folder), title).glob("*.gz"):
                    os.replace(fetched, raw / fetched.name)
        except Exception as error:  # whatever a downloader raises
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{problem}, and can't be downloaded ({reason}); put {title}'s gzipped files there") from None
    unpacked = {path.stem: bytearray(gzip.decompress(path.read_bytes())) for path in files}
    images, labels = (read_idx(contents, IDX_FILES[name][0], name) for name, contents in unpacked.items())
    return Dataset(images.unsqueeze(1), labels.long(), tuple(source.classes), labels.long())


Classes = dict[str, dict[Path, torch.Tensor]]  # name of a class -> its files and what was read of them


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def read_class_folders(folder: Path, read: Callable[[Path], torch.Tensor]) -> Classes:
    """What `read` makes of each file in `folder`/CLASS/*, in the order of the names.

    A file of which it raises UserError, or that lies elsewhere, is skipped with a warning on stderr. Raises UserError, naming
    what to mend, if there are fewer than two classes, two with names that differ by case only, or one without an image.
    """
    folders = _class_folders(folder)
    if not folders:
        state = "has no class folders" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder}: {state}; put images into {folder}/CLASS/")
    if len(folders) < 2:
        raise UserError(f"{folder}: has one class only, {folders[0].name}; at least two are needed")
    by_name = {path.name.casefold(): path for path in folders}
    for path in folders:
        if (other := by_name[path.name.casefold()]) != path:
            raise UserError(f"{folder}: the classes {path.name} and {other.name} differ by case only; rename one or merge them")
    for path in sorted(folder.glob("*")):
        if path not in folders:
            print(" ".join(f"{path}: passed over; images are expected in {folder}/CLASS/".split()), file=sys.stderr)

    classes: Classes = {path.name: {} for path in folders}
    files = [file for path in folders for file in sorted(path.iterdir())]
    for file in tqdm(files, f"images in {folder.name}", delay=1, disable=None, leave=False):  # a phone's photograph is large
        try:
            classes[file.parent.name][file] = read(file)
        except UserError as error:
            tqdm.write(" ".join(str(error).split()), file=sys.stderr)
    for path in folders:
        if not classes[path.name]:
            raise UserError(f"{path}: has no image that can be read; put some there, or remove the folder")
    return classes


def _load_folder(name: str, split: str, prepare: str) -> Dataset:
    """The images in `name`/train/CLASS and `name`/test/CLASS; without test/, a tenth of each class of train/."""
    from photo import printable, read_views  # here, because only folders need Pillow

    folder = resolve(name)
    if not folder.is_dir():
        raise UserError(
            f"data={name}: is neither one of {', '.join(TITLES)} nor a folder; put images into {folder}/train/CLASS/"
        )
    if not (folder / "train").is_dir():
        raise UserError(f"{folder}: has no folder train; put images into {folder}/train/CLASS/")
    has_test = (folder / "test").is_dir()
    if has_test:  # before an hour of training
        test, train = (", ".join(path.name for path in _class_folders(folder / part)) for part in ("test", "train"))
        if test != train:
            raise UserError(f"{folder / 'test'}: has the classes {test or '(none)'}; train has {train}")
    classes = read_class_folders(folder / (split if has_test else "train"), lambda path: read_views(path, prepare))
    images = torch.stack([views for files in classes.values() for views in files.values()])  # (N, V, 28, 28)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))
    if not has_test:
        is_test = torch.cat([tenth_by_name([*files]) for files in classes.values()])
        print(f"{folder}: has no folder test; {is_test.sum():,} of {len(labels):,} images are kept for testing")
        members = is_test if split == "test" else ~is_test
        images, labels = images[members], labels[members]
    return Dataset(images, labels, tuple(map(printable, classes)), labels)


def tenth_by_name(files: Sequence[Path]) -> torch.Tensor:
    """Which of a class's files, bool `(N,)`, are kept for testing: those whose names have the smallest hashes.

    They are the same for every seed, so that no training has seen the test images of another. A new file changes one at most.
    Raises UserError if there is one file only.
    """
    if len(files) == 1:
        raise UserError(f"{files[0].parent}: has one image only, and there is no folder test; add another image")
    hashes = [hashlib.sha256(os.fsencode(file.name)).digest() for file in files]
    last = sorted(hashes)[max(1, round(TEST_RATIO * len(files))) - 1]
    return torch.tensor([digest <= last for digest in hashes])


def task_labels(fine_labels: torch.Tensor, output_dim: int) -> torch.Tensor:
    """Fashion-MNIST's labels 0..9 -> the task's, int64: for two classes, 1 for a shoe and 0 for the rest; else the same."""
    return torch.isin(fine_labels, torch.tensor(SHOES, device=fine_labels.device)).long() if output_dim == 2 else fine_labels


def load_test_data(metadata: Mapping, settings) -> Dataset:
    """The test split of `settings.data` or, if that is empty, of the data set in the model's `metadata`, with labels of the
    model's classes. Raises UserError if the data set has other classes."""
    data = load_data("test", settings.data_path, training_settings(metadata, settings))
    names = tuple(metadata["class_names"])
    data = as_task(data, 2) if data.class_names == CLASS_NAMES and names == CLOTHES_OR_SHOE else data
    if names != data.class_names:
        raise UserError(f"this model has the classes {', '.join(names)}, the test images have others; name image files instead")
    return data


def training_settings(metadata: Mapping, settings=None) -> dict:
    """The settings with which a model with this metadata was trained; `settings.data` replaces `data` unless it is empty."""
    named = getattr(settings, "data", "")
    return DEFAULTS | metadata.get("settings", {}) | ({"data": named} if named else {})


def shuffle(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return indices[torch.randperm(len(indices), generator=generator, device=indices.device)]


def split_indices(fine_labels: torch.Tensor, valid_ratio: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled training indices and sorted validation indices, stratified by fine label, the same for the same seed.

    Each side gets an image of each class at least; with a ratio of 0 there are no validation images. Raises UserError if a
    class has one image only.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []  # of each class: validation, training
    for label in fine_labels.unique():
        members = shuffle(torch.nonzero(fine_labels == label).squeeze(1), generator)
        if valid_ratio and len(members) == 1:
            raise UserError(f"valid_ratio={valid_ratio}: a class has one image only; give it another")
        n_valid = min(max(1, round(valid_ratio * len(members))), len(members) - 1) if valid_ratio else 0
        parts.append(members.tensor_split([n_valid]))
    valid, train = map(torch.cat, zip(*parts))
    return shuffle(train, generator), valid.sort().values


def fold_indices(fine_labels: torch.Tensor, folds: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The splits of a cross-validation, in the form of `split_indices`: every image is in one validation set."""
    from sklearn.model_selection import StratifiedKFold  # here: it takes a second to import

    if (fewest := fine_labels.bincount().min()) < folds:
        raise UserError(f"folds={folds}: a class has only {fewest} training images; use fewer folds")
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(fine_labels, fine_labels)
    generator = torch.Generator().manual_seed(seed)
    return [(shuffle(torch.from_numpy(train), generator), torch.from_numpy(valid)) for train, valid in splits]


class Split(NamedTuple):
    """The training images on a device, and indices into them."""

    data: Dataset
    train: torch.Tensor
    valid: torch.Tensor
    generated: int = 0  # how many of `train`, the last ones, a GAN has drawn


def load_splits(settings, device: torch.device, folds: int = 0, runs: int = 1) -> list[Split]:
    """The training images and, for each model, a split of them: one of `folds` folds, else one of `runs` random splits.

    `settings` has data_path, valid_ratio, seed and limit, and what `load_data` and `as_task` need. Raises UserError as they and
    `split_indices` do.
    """
    data = as_task(load_data("train", settings.data_path, settings.model_dump()), getattr(settings, "output_dim", 0))
    indices = fold_indices(data.fine_labels, folds, settings.seed) if folds else []
    indices = indices or [split_indices(data.fine_labels, settings.valid_ratio, settings.seed + run) for run in range(runs)]
    data, limit = data.to(device), settings.limit or None
    return [Split(data, train[:limit].to(device), valid.to(device)) for train, valid in indices]


def count_levels(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """How many pixels of the uint8 images at `indices` have each grey level: int64 `(256,)`, on the CPU."""
    chunks = indices.split(4096)  # all at once would be another 42 MB
    return torch.stack([images[chunk].cpu().flatten().bincount(minlength=256) for chunk in chunks]).sum(0)


def mean_and_std(images: torch.Tensor, indices: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels of the uint8 images at `indices`, on the scale where 255 is 1."""
    levels, counts = torch.arange(256), count_levels(images, indices)
    total = counts.sum().item()
    mean = (counts * levels).sum().item() / total
    return mean / 255, math.sqrt((counts * levels**2).sum().item() / total - mean**2) / 255
