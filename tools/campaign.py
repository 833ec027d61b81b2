"""A campaign of faults that could lose a run or mislead one: `python tools/campaign.py [PART ...]`, some 20 minutes in total.

    kills        runs killed at random moments and while saving, then resumed: bitwise identical in the end?
    saves        a second process reads the files of a run during 1,000 saves: is one ever torn?
    disk         a full disk, a read-only folder, a folder that disappears: one line, and the last good files?
    environment  no standard output or a full one, foreign matplotlib settings, odd folder names, torchrun: the work is done?
    data         data files with flipped bytes, truncated, swapped, bombs: refused, and the next source used?
    checkpoints  malicious, damaged and foreign .pt files wherever one is read: refused, and nothing executed?
    settings     generated command lines: settings or one line?
    images       mutated image files: an image or one line, within time and memory?
    bits         every recipe, on few images, in two fresh processes, with one thread and with two: bitwise identical?

Prints a row per kind of trial: how many were tried, passed, failed; exit code 1 if any failed. Linux only: it forks.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import train
from config import ROOT, config_path, read_config
from script import check_no_settings, run_script
from tools import fuzz
from tools.fuzz import Trials, ending

KINDS = {  # of training, all on few images
    "task 1": ["limit=3000", "epochs=10"],
    "resnet8_plus": ["recipe=resnet8_plus", "limit=600", "epochs=6"],
    "dropout": ["recipe=deep_cnn_dropout", "limit=1000", "epochs=10"],
    "EMA": ["ema_decay=0.99", "limit=3000", "epochs=10"],
    "plateau": ["recipe=compact_cnn", "schedule=plateau", "patience=3", "limit=1000", "lr=0.01", "epochs=12"],
    "folds": ["folds=4", "limit=2000", "epochs=3"],
    "runs": ["runs=3", "limit=2000", "epochs=4"],
}
KILLS = 16  # of each kind, at least


def forked(main: Callable[[list[str]], None], arguments: list[str]) -> BaseProcess:
    """A process that calls `main(arguments)`, quietly."""

    def call() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            main(arguments)

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def run_state(out: Path) -> tuple:
    """What must be bitwise identical: parameters, best parameters, history without the seconds."""
    state, best = checkpoint.load(out / "checkpoint.pt", "checkpoint"), checkpoint.load(out / "best_model.pt", "best_model")
    history = state["history"], checkpoint.read_history(out / "history.jsonl")[1]
    histories = [[{**line, "seconds": 0} for line in lines] for lines in history]
    parameters = [tensor.numpy().tobytes() for contents in (state, best) for tensor in contents["model"].values()]
    return parameters, histories, best["epoch"], best["best"]["epoch"]


def kills(folder: Path) -> Trials:
    for kind, words in KINDS.items():
        whole, killed = folder / f"{kind} whole", folder / f"{kind} killed"
        started = time.perf_counter()
        forked(train.main, [*words, f"out_dir={whole}"]).join()
        duration = time.perf_counter() - started
        count = while_saving = 0
        outcomes: list[bool] = []
        while count < KILLS:  # a run may end before it is killed often enough; then another begins
            shutil.rmtree(killed, ignore_errors=True)
            process = None
            while process is None or process.exitcode == -signal.SIGKILL:
                resume = ["resume=true"] if (killed / "checkpoint.pt").exists() else []
                process = forked(train.main, [*words, *resume, f"out_dir={killed}"])
                deadline = time.perf_counter() + random.uniform(0, duration / 3)
                while process.is_alive():
                    is_saving = any(killed.glob(f".*.{process.pid}.part"))
                    if count < KILLS and (is_saving if count % 2 else time.perf_counter() > deadline):
                        process.kill()
                        process.join()
                        count, while_saving = count + 1, while_saving + is_saving
            outcomes += [run_state(whole) == run_state(killed)] * (count - len(outcomes))
        yield f"kills, {while_saving} of them while saving: {kind}", outcomes


def saves(folder: Path) -> Trials:
    out = folder / "saves"
    train.main(["limit=500", "epochs=1", f"out_dir={out}"])
    states = {kind: checkpoint.load(out / f"{kind}.pt", kind) for kind in ("best_model", "checkpoint")}

    def write(_: list[str]) -> None:
        for number, kind in zip(range(1000), itertools.cycle(states)):
            checkpoint.save(out / f"{kind}.pt", {**states[kind], "epoch": number})

    writer, outcomes = forked(write, []), []
    while writer.is_alive():
        outcomes += [ending(partial(checkpoint.load, out / f"{kind}.pt", kind)) == "done" for kind in states]
    yield "files read during 1,000 saves", outcomes


def disk(folder: Path) -> Trials:
    def ends_well(out: Path, code: str = "pass") -> bool:
        """Whether a training, in whose process `code` runs first, writes all or ends in a line and leaves whole files."""
        code += "; import sys, train, script; script.run_script(train.main, sys.argv[1:])"
        command = [sys.executable, "-c", code, "limit=500", "epochs=3", f"out_dir={out}"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if ended.returncode == 0:
            return all(checkpoint.load(out / f"{kind}.pt", kind) for kind in ("best_model", "checkpoint"))
        is_whole = not (out / "best_model.pt").exists() or checkpoint.load(out / "best_model.pt", "best_model")
        return ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1 and bool(is_whole)

    outcomes = []
    for kilobytes in (1, 4, 40, 90, 150, 200, 300, 400):
        full = folder / f"full {kilobytes}"
        full.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", full], capture_output=True).returncode:
            print("disk: a small tmpfs can't be mounted here (root alone may); skipped", file=sys.__stdout__)
            break
        if kilobytes == 4:  # one page, and that is taken
            (full / "other").write_bytes(bytes(4096))
        outcomes.append(ends_well(full))
        subprocess.run(["umount", full], check=True)
    if outcomes:
        yield "a full disk", outcomes
    file = folder / "file"
    file.write_text("")
    yield "a folder that can't be written", [ends_well(path) for path in (file, file / "below", Path("/proc/x"))]
    outcomes = []
    for number in range(5):
        out = folder / f"gone {number}"
        patch = (
            f"import shutil, train; run_epoch = train.Trainer.run_epoch; train.Trainer.run_epoch = lambda self, epoch, epochs: "
            f"(run_epoch(self, epoch, epochs), epoch > {number % 3} and shutil.rmtree({str(out)!r}, True))[0]"
        )
        outcomes.append(ends_well(out, patch))
    yield "a folder deleted during the run", outcomes


def bits(folder: Path) -> Trials:
    recipes = ["", "gan", *sorted(path.stem for path in (ROOT / "recipes").glob("*.json"))]
    for threads in (1, 2):
        outcomes = []
        for recipe in recipes:
            states: list = []
            settings = {} if recipe == "gan" else read_config(config_path(recipe))
            words = [] if settings.get("valid_ratio") == 0 else ["valid_ratio=0.02"]  # a teacher may have seen all images
            if not (ROOT / settings.get("teacher", "")).exists():
                words.append("teacher=")  # it is too large to be part of the repository
            for repeat in ("a", "b"):
                out = folder / f"{recipe} {threads} {repeat}"
                script = ["gan/train.py"] if recipe == "gan" else ["train.py", "runs=1", f"recipe={recipe}"]
                command = [sys.executable, *script, "limit=600", "epochs=2", *words, f"out_dir={out}"]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
                state = checkpoint.load(out / "checkpoint.pt", "checkpoint", "gan_checkpoint")
                states.append([tensor.numpy().tobytes() for tensor in (state["ema"] or state["model"]).values()])
            outcomes.append(states[0] == states[1])
        yield f"two processes, {threads} thread{'s' * (threads > 1)}, every recipe", outcomes


def environment(folder: Path) -> Trials:
    (folder / "matplotlibrc").write_text("text.usetex: True\n")

    def is_done(name: str, command: str, **variables: str) -> bool:
        out = folder / os.fsdecode(name.encode("latin-1"))
        command = command.replace("OUT", f"out_dir={shlex.quote(str(out))}").replace("python", sys.executable)
        options: dict = {"cwd": ROOT, "env": os.environ | variables, "capture_output": True}
        ended = subprocess.run(command.encode(errors="surrogateescape"), shell=True, timeout=120, **options)
        return ended.returncode == 0 and b"Traceback" not in ended.stderr and any(out.glob("best*"))

    train, tune = "python train.py limit=500 epochs=1 OUT", "python tools/tune.py recipe=mlp trials=1 limit=500 epochs=1 OUT"
    torchrun = train.replace("python", "python -m torch.distributed.run --standalone --nproc_per_node=2")
    yield "standard output missing or full", [is_done("o", f"{train} {to}") for to in (">&-", ">&- 2>&-", ">/dev/full")]
    backends = [{"MPLBACKEND": "module://none.at_all"}, {"MPLBACKEND": "none"}, {"MATPLOTLIBRC": str(folder)}]
    yield "foreign matplotlib settings", [is_done("m", train, **variables) for variables in backends]
    yield "PYTHONSAFEPATH", [is_done("p", train, PYTHONSAFEPATH="1")]
    names = ("a\xff", "\xc3\xa9", "50%41", "a?b", "a b", "x{y}", "#$1")
    yield "odd folder names: train.py", [is_done(name, train) for name in names]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    yield "odd folder names: torchrun, ASCII locale", [is_done(name, torchrun, **ascii_only) for name in names[:2]]
    yield "odd folder names: tools/tune.py", [is_done(f"{name} tune", tune) for name in names[1:]]


PARTS = (kills, saves, disk, environment, fuzz.data, fuzz.checkpoints, fuzz.settings, fuzz.images, bits)


def main(names: list[str]) -> None:
    known = {part.__name__: part for part in PARTS}
    check_no_settings([name for name in names if name not in known], __doc__)
    torch.set_num_threads(1)  # the forked processes then need no other thread of this one
    random.seed(0)
    tried = failures = 0
    for part in names or known:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            for name, outcomes in known[part](Path(folder)):
                failed = len(outcomes) - sum(outcomes)
                tried, failures = tried + len(outcomes), failures + failed
                line = f"{name:50} {len(outcomes):6,} tried {sum(outcomes):6,} passed {failed:6,} failed"
                print(line, file=sys.__stdout__, flush=True)
    print(json.dumps({"tried": tried, "failures": failures}))
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
