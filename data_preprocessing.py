"""Fashion-MNIST: find, download, verify and read the four IDX files; labels, splits, folds, mean and standard deviation.

The images stay one uint8 tensor `(N, 1, 28, 28)`, garment bright on black; the model turns a batch into floating point.
`fine_labels` are the data set's ten labels, from which `task_labels` makes those of a task with fewer classes.
Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747.
"""

import contextlib
import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHOES = (5, 7, 9)  # fine labels
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts the files

# name -> (dimensions, SHA-256 of the decompressed file); images and labels of a split have the same count
IDX_FILES = {
    "train-images-idx3-ubyte": ((60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": ((60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": ((10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": ((10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def load_images(split: str, data_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 `(N, 1, 28, 28)`, and fine labels, int64 `(N,)` in 0..9, of `split`, which is "train" or "t10k".

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


def _fetch_with_torchvision(folder: Path) -> Path:
    """Download all four files from the data set's own server; the folder that has them."""
    from torchvision.datasets import FashionMNIST

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; torchvision itself would wait for ever
    try:
        with contextlib.redirect_stdout(sys.stderr):
            FashionMNIST(folder, download=True)
    finally:
        socket.setdefaulttimeout(patience)
    return folder / "FashionMNIST" / "raw"


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


def class_names(output_dim: int) -> tuple[str, ...]:
    return {2: ("clothes", "shoe"), 10: CLASS_NAMES}[output_dim]


def task_labels(fine_labels: torch.Tensor, output_dim: int) -> torch.Tensor:
    """Fine labels 0..9 -> the task's labels, int64: the same for ten classes; for two, 1 for a shoe and 0 for the rest."""
    return fine_labels if output_dim == 10 else torch.isin(fine_labels, torch.tensor(SHOES, device=fine_labels.device)).long()


def labels_for(names: Sequence[str], fine_labels: torch.Tensor) -> torch.Tensor:
    """The labels of the task that has these classes. Raises UserError if they are not Fashion-MNIST's."""
    for output_dim in (2, 10):
        if tuple(names) == class_names(output_dim):
            return task_labels(fine_labels, output_dim)
    raise UserError(f"this model has the classes {', '.join(names)}, the test images have not; name image files instead")


def shuffle(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return indices[torch.randperm(len(indices), generator=generator, device=indices.device)]


def split_indices(fine_labels: torch.Tensor, valid_ratio: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled training indices and sorted validation indices, stratified by fine label, the same for the same seed.

    Raises UserError if `valid_ratio` leaves either side without an image of some class.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []  # of each class: validation, training
    for label in fine_labels.unique():
        members = shuffle(torch.nonzero(fine_labels == label).squeeze(1), generator)
        n_valid = round(valid_ratio * len(members))
        if not 0 < n_valid < len(members):
            raise UserError(f"valid_ratio={valid_ratio}: {n_valid} of a class's {len(members)} images would validate")
        parts.append(members.tensor_split([n_valid]))
    valid, train = map(torch.cat, zip(*parts))
    return shuffle(train, generator), valid.sort().values


def fold_indices(fine_labels: torch.Tensor, folds: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The splits of a cross-validation, in the form of `split_indices`: every image is in one validation set."""
    from sklearn.model_selection import StratifiedKFold  # here: it takes a second to import

    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(fine_labels, fine_labels)
    generator = torch.Generator().manual_seed(seed)
    return [(shuffle(torch.from_numpy(train), generator), torch.from_numpy(valid)) for train, valid in splits]


class Split(NamedTuple):
    """The training images on a device: uint8 `(N, 1, 28, 28)`, int64 `(N,)` in 0..9, and indices into them."""

    images: torch.Tensor
    fine_labels: torch.Tensor
    train: torch.Tensor
    valid: torch.Tensor
    generated: int = 0  # how many of `train`, the last ones, a GAN has drawn


def load_splits(settings, device: torch.device, folds: int = 0, runs: int = 1) -> list[Split]:
    """The training images and, for each model, a split of them: one of `folds` folds, else one of `runs` random splits.

    `settings` has data_path, valid_ratio, seed and limit. Raises UserError as `load_images` and `split_indices` do.
    """
    images, fine_labels = load_images("train", settings.data_path)
    indices = fold_indices(fine_labels, folds, settings.seed) if folds else []
    indices = indices or [split_indices(fine_labels, settings.valid_ratio, settings.seed + run) for run in range(runs)]
    images, fine_labels, limit = images.to(device), fine_labels.to(device), settings.limit or None
    return [Split(images, fine_labels, train[:limit].to(device), valid.to(device)) for train, valid in indices]


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
