"""Fashion-MNIST's four IDX files: find, download, verify and read them.

The sources, in this order: a folder of the user's, Debian's folder, torchvision's download, Debian's archive.
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
from pathlib import Path

import torch

from config import UserError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts the files

# name -> (dimensions, which MNIST and KMNIST share; SHA-256 of Fashion-MNIST's decompressed file)
IDX_FILES = {
    "train-images-idx3-ubyte": ((60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": ((60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": ((10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": ((10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def find_idx(name: str, data_path: Path) -> bytearray:
    """The verified, decompressed contents of one IDX file, from the first source that has it whole.

    Skipped files are named on stderr, or in the error if no source has it.
    """
    raw = data_path / "FashionMNIST" / "raw"
    problems: list[str] = []
    contents = _read_verified(name, raw, problems) or _read_verified(name, DEBIAN_FOLDER, problems)
    sources = (("torchvision's download", fetch_with_torchvision), ("Debian's archive", _fetch_with_apt))
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


def fetch_with_torchvision(folder: Path, title: str = "FashionMNIST") -> Path:
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
