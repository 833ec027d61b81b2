"""Run every command in the `sh` blocks of README.md and GUIDE.md, dry: `python tools/commands.py`, a few minutes.

They run in a copy of the repository, in their order, with fewer images and epochs. Left out: pip, pytest, tools/bench.py,
which measures, and what waits for a browser. Exit code 1 if one fails.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

from config import ROOT, Settings
from data_preprocessing import load_images
from script import check_no_settings, run_script

LEFT_OUT = {"pip", "pytest", "tools/bench.py", "demo.py", "jupyter"}
DRY = {"train.py": ["epochs=1", "limit=1000"], "tune.py": ["epochs=1", "limit=1000", "trials=2"], "score.py": ["limit=1000"]}
PHOTOS = {
    "photo_of_a_shoe.jpg": 0,
    "another.png": 1,
    "photo.jpg": 2,
    "my_photos/1.png": 3,
}  # in the pages -> training image in its place
PHOTOS |= {f"my_shoes/{part}/{name}/1.png": 10 * label for part in ("train", "test") for name, label in (("a", 1), ("b", 2))}
PHOTOS |= {f"my_images/train/{'ab'[index % 2]}/{index}.png": index for index in range(20)}


def commands(page: str) -> list[list[str]]:
    """The words of a page's commands, in order, each command once."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    parts = dict.fromkeys(tuple(shlex.split(part, comments=True)) for line in lines for part in line.split("&&"))
    return [list(words) for words in parts if words and not LEFT_OUT & set(words)]


def dry(words: list[str]) -> list[str]:
    """The command with settings that make it short in place of its own."""
    script = next(word for word in words if word.endswith(".py"))
    short = DRY.get(Path(script).name, [])
    if "resume=true" in words:
        short = ["epochs=2", *short[1:]]
    keys = {word.partition("=")[0] for word in short}
    command = [word for word in words if word.partition("=")[0] not in keys] + short
    launcher = ["-m", "torch.distributed.run", "--standalone"] if command[0] == "torchrun" else []
    return [sys.executable, *launcher, *command[1:]]


def main(arguments: list[str]) -> None:
    check_no_settings(arguments, __doc__)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "repository")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "data", "__pycache__"))
        (copy / "data").symlink_to(Settings().data_path)
        images, _ = load_images("train", Settings().data_path)
        for name, index in PHOTOS.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - images[index, 0].numpy()).resize((280, 280)).save(copy / name)  # dark on white
        for words in commands((ROOT / "README.md").read_text() + (ROOT / "GUIDE.md").read_text()):
            started = time.perf_counter()
            ended = subprocess.run(dry(words), cwd=copy, capture_output=True, text=True)
            last = (ended.stdout.strip().splitlines() or [""])[-1]
            print(f"{'ok' if ended.returncode == 0 else 'FAILED'} {time.perf_counter() - started:5.1f} s  {' '.join(words)}")
            print(f"             {last[:110]}", flush=True)
            if ended.returncode:
                failed += 1
                print(ended.stderr[-1000:])
    print(f"{failed} failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
