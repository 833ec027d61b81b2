"""Data sets: find, download, verify and read them; labels, splits, folds, mean and standard deviation.

`load_data` reads Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747), MNIST, KMNIST (Clanuwat et al. 2018, arXiv
1812.01718) or a folder of images. The images stay one uint8 tensor `(N, 1, 28, 28)`, objects bright on black; the model turns a
batch into floating point. `task_labels` makes Task 1's two classes of Fashion-MNIST's ten, which are then `fine_labels`.
"""

import contextlib
import gzip
import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from config import FASHION_MNIST, UserError, resolve

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLOTHES_OR_SHOE = ("clothes", "shoe")  # Task 1's classes
SHOES = (5, 7, 9)  # fine labels
TITLES = {FASHION_MNIST: "Fashion-MNIST", "mnist": "MNIST", "kmnist": "KMNIST"}  # of the data sets that are no folders
DEFAULTS = {"data": FASHION_MNIST, "prepare": "photo", "seed": 0}  # of settings that older files lack
TEST_RATIO = 0.1  # of a folder without test/, kept for testing
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts the files

# name -> (dimensions, which MNIST and KMNIST share; SHA-256 of Fashion-MNIST's decompressed file)
IDX_FILES = {
    "train-images-idx3-ubyte": ((60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": ((60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": ((10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": ((10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


class Dataset(NamedTuple):
    """One split of a data set: images, uint8 `(N, 1, 28, 28)`, and labels, int64 `(N,)`, which number the classes.

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
    name, prepare, seed = ({**DEFAULTS, **settings}[key] for key in DEFAULTS)
    if name not in TITLES:
        return _load_folder(name, split, prepare, seed)
    split = {"train": "train", "test": "t10k"}[split]
    if name == FASHION_MNIST:
        images, labels = load_images(split, data_path)
        return Dataset(images, labels, CLASS_NAMES, labels)
    return _load_with_torchvision(TITLES[name], split, data_path)


def as_task(data: Dataset, output_dim: int) -> Dataset:
    """The data set with `output_dim` classes; 0 = all. Raises UserError unless it has so many, or is Fashion-MNIST, of which
    Task 1 has 2."""
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


def find_idx(name: str, data_path: Path) -> bytearray:
    """The verified, decompressed contents of one IDX file, from the first source that has it whole.

    Skipped files are named on stderr, or in the error if no source has it.
    """
    raw = data_path / "FashionMNIST" / "raw"
    problems: list[str] = []
    contents = _read_verified(name, raw, problems) or _read_verified(name, DEBIAN_FOLDER, problems)
    sources = (("torchvision's download", _fetch_with_torchvision), ("Debian's archive", _fetch_with_apt))
    for source, fetch in () if contents else sources:
        print(f"{name}: not in {raw}; trying {source} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as folder:
            try:
                fetched = fetch(Path(folder))
            except Exception as error:  # whatever a downloader raises, the next source is tried and the reason kept
                problems.append(f"{source}: {' '.join(str(error).split())[:120] or type(error).__name__}")
                continue
            contents = _read_verified(name, fetched, problems)
            if contents:
                _keep(fetched, raw)
                break
    if not contents:
        raise UserError(
            f"{name} was not found: put the four Fashion-MNIST files, gzipped or not, into {raw}, "
            f"or set data_dir=FOLDER ({'; '.join(problems)})"
        )
    for reason in problems:
        print(f"skipped {reason}", file=sys.stderr)
    return contents


def _read_verified(name: str, folder: Path, problems: list[str]) -> bytearray | None:
    """Contents of `folder/name` or `folder/name.gz`, decompressed; None, with a line in `problems`, if neither is intact."""
    dimensions, digest = IDX_FILES[name]
    size = 4 + 4 * len(dimensions) + math.prod(dimensions)  # bytes: magic number, dimensions, one byte an element
    for path in (folder / name, folder / f"{name}.gz"):
        try:
            with path.open("rb") as file:
                contents = file.read(size + 1)  # never more, whatever the file's length
            if path.suffix == ".gz":
                contents = zlib.decompressobj(wbits=31).decompress(contents, size + 1)
        except FileNotFoundError:
            continue
        except (OSError, zlib.error) as error:
            problems.append(f"{path}: can't be read ({error})")
            continue
        if hashlib.sha256(contents).hexdigest() == digest:
            return bytearray(contents)  # writable, so that torch can share its memory
        problems.append(f"{path}: is damaged, its contents' SHA-256 is not the published one")
    return None


def _fetch_with_torchvision(folder: Path, title: str = "FashionMNIST") -> Path:
    """Download all four files from the data set's own server, gzipped and not; the folder that has them."""
    from torchvision import datasets

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; torchvision itself would wait for ever
    try:
        with contextlib.redirect_stdout(sys.stderr):
            getattr(datasets, title)(folder, download=True)
    finally:
        socket.setdefaulttimeout(patience)
    return folder / title / "raw"


def _fetch_with_apt(folder: Path) -> Path:
    """Download and unpack Debian's package with state folders of our own: no root, no change to the system."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise UserError("there is no apt-get here")
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    apt += ["-o", "APT::Sandbox::User="]  # as root, apt would otherwise hand over to a user who can't write here
    for command in ([*apt, "update"], [*apt, "download", "dataset-fashion-mnist"]):
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if ended.returncode:
            raise UserError(f"{' '.join(command[-2:])} failed: {ended.stderr}")
    subprocess.run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), str(folder / "x")], check=True, timeout=60)
    return folder / "x" / DEBIAN_FOLDER.relative_to("/")


def _keep(fetched: Path, raw: Path) -> None:
    """Unpack the fetched files into `raw`, so that later runs needn't; a damaged file of that name stays as NAME.damaged."""
    try:
        raw.mkdir(parents=True, exist_ok=True)
        for name in IDX_FILES:
            target, contents = raw / name, _read_verified(name, fetched, [])
            if contents is None or _read_verified(name, raw, []):
                continue
            if target.exists():
                os.replace(target, f"{target}.damaged")
            part = raw / f".{name}.{os.getpid()}.part"
            part.write_bytes(contents)
            os.replace(part, target)
    except OSError as error:
        print(f"{raw}: the files can't be kept there and will be fetched again next time ({error})", file=sys.stderr)


def read_idx(contents: bytes | bytearray, dimensions: tuple[int, ...], name: str) -> torch.Tensor:
    """The uint8 tensor in an IDX file's decompressed contents; shares their memory if they are a bytearray.

    The format: two zero bytes, the element type (8 = unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit count, the elements. Raises UserError if it is not exactly an array of `dimensions`.
    """
    magic = (8 << 8) + len(dimensions)  # 2051 for images, 2049 for labels
    if len(contents) < 4 + 4 * len(dimensions):
        raise UserError(f"{name}: {len(contents)} bytes are too few for an IDX header; get the file again")
    words = [int.from_bytes(contents[i : i + 4], "big") for i in range(0, 4 + 4 * len(dimensions), 4)]
    if words[0] != magic:
        raise UserError(f"{name}: the IDX magic number is {words[0]}, expected {magic}; is it another file?")
    if tuple(words[1:]) != dimensions:
        raise UserError(f"{name}: the IDX header says {tuple(words[1:])}, expected {dimensions}; is it another file?")
    elements = torch.frombuffer(contents, dtype=torch.uint8)[4 * len(words) :]
    if len(elements) != math.prod(dimensions):
        raise UserError(f"{name}: {len(elements)} elements follow the header, expected {math.prod(dimensions)}; get it again")
    return elements.view(dimensions)


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
                for fetched in _fetch_with_torchvision(Path(folder), title).glob("*.gz"):
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

    A file of which it raises UserError, or that lies elsewhere, is passed over with a line on stderr. Raises UserError, naming
    what to mend, if there are fewer than two classes, two with names that differ by case only, or one without an image.
    """
    folders = _class_folders(folder)
    if not folders:
        raise UserError(f"{folder}: has no class folders; images are expected in {folder}/CLASS/")
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


def _load_folder(name: str, split: str, prepare: str, seed: int) -> Dataset:
    """The images in `name`/train/CLASS and `name`/test/CLASS; without test/, a stratified tenth of train/ is the test split."""
    from photo import printable, read_view  # here, because photo.py imports this module

    folder = resolve(name)
    if not folder.is_dir():
        raise UserError(f"data={name}: is neither one of {', '.join(TITLES)} nor a folder")
    if not (folder / "train").is_dir():
        raise UserError(f"{folder}: has no folder train; images are expected in {folder}/train/CLASS/")
    has_test = (folder / "test").is_dir()
    if has_test:  # before an hour of training
        here, there = (", ".join(path.name for path in _class_folders(folder / part)) for part in ("test", "train"))
        if here != there:
            raise UserError(f"{folder / 'test'}: has the classes {here or '(none)'}; train has {there}")
    classes = read_class_folders(folder / (split if has_test else "train"), lambda path: read_view(path, prepare))
    images = torch.stack([view for views in classes.values() for view in views.values()]).unsqueeze(1)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(views) for views in classes.values()]))
    if not has_test:
        train, test = split_indices(labels, TEST_RATIO, seed, f"{folder}: has no folder test, and test_ratio")
        print(f"{folder}: has no folder test; {len(test):,} of {len(labels):,} images are kept for testing (seed={seed})")
        kept = test if split == "test" else train.sort().values
        images, labels = images[kept], labels[kept]
    return Dataset(images, labels, tuple(map(printable, classes)), labels)


def task_labels(fine_labels: torch.Tensor, output_dim: int) -> torch.Tensor:
    """Fashion-MNIST's labels 0..9 -> the task's, int64: for two classes, 1 for a shoe and 0 for the rest; else the same."""
    return torch.isin(fine_labels, torch.tensor(SHOES, device=fine_labels.device)).long() if output_dim == 2 else fine_labels


def load_test_data(metadata: Mapping, settings) -> Dataset:
    """The test images of the data set that a model was trained on, or that `settings` name, with labels of the model's classes.

    `metadata` is the model's. Raises UserError if the data set has not these classes.
    """
    data = load_data("test", settings.data_path, training_settings(metadata, settings))
    names = tuple(metadata["class_names"])
    data = as_task(data, 2) if data.class_names == CLASS_NAMES and names == CLOTHES_OR_SHOE else data
    if names != data.class_names:
        raise UserError(f"this model has the classes {', '.join(names)}, the test images have not; name image files instead")
    return data


def training_settings(metadata: Mapping, settings=None) -> dict:
    """The settings under which a model with this metadata was trained; `data` is that of `settings` if they name one."""
    named = getattr(settings, "data", "")
    return DEFAULTS | metadata.get("settings", {}) | ({"data": named} if named else {})


def shuffle(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return indices[torch.randperm(len(indices), generator=generator, device=indices.device)]


def split_indices(
    fine_labels: torch.Tensor, valid_ratio: float, seed: int, name: str = "valid_ratio"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled training indices and sorted validation indices, stratified by fine label, the same for the same seed.

    Raises UserError, which calls the ratio `name`, if it leaves either side without an image of some class.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []  # of each class: validation, training
    for label in fine_labels.unique():
        members = shuffle(torch.nonzero(fine_labels == label).squeeze(1), generator)
        n_valid = round(valid_ratio * len(members))
        if not 0 < n_valid < len(members):
            raise UserError(f"{name}={valid_ratio}: would take {n_valid} of a class's {len(members)} images; give it more")
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


def mean_and_std(images: torch.Tensor, indices: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels of the uint8 images at `indices`, on the scale where 255 is 1."""
    total = squares = 0.0
    for chunk in indices.split(4096):  # 54,000 images at once would take 170 MB in float32
        pixels = images[chunk].cpu().float()  # not every device has float64
        total += pixels.sum(dtype=torch.float64).item()
        squares += pixels.square_().sum(dtype=torch.float64).item()
    count = images[0].numel() * len(indices)
    mean = total / count
    return mean / 255, math.sqrt(squares / count - mean**2) / 255
