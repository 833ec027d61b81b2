"""Ctrl-C and SIGTERM wait for the end of a batch; two runs never write to the same folder."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

import distributed
from config import UserError

_received = 0  # the signal that came while `deferred` is entered


class Interrupted(KeyboardInterrupt):
    """The run ends after a signal; `number` is the signal's."""

    def __init__(self, number: int):
        self.number = number


def _note(number: int, _: object) -> None:
    global _received
    if _received:
        raise KeyboardInterrupt  # the second one doesn't wait
    _received = number


@contextmanager
def deferred() -> Iterator[None]:
    """While entered, Ctrl-C and SIGTERM only make the next `check` raise; a second one interrupts at once."""
    global _received
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _received = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Interrupted if a signal came to this process or to another one that trains with it."""
    received = distributed.all_reduce_max(_received)
    if received:
        raise Interrupted(received)


def resume_command(arguments: list[str], is_saved: bool) -> str:
    """The command that continues this script's run, or starts it again if nothing is saved yet."""
    start = ["python"]
    if distributed.world_size() > 1:
        start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    words = [word for word in arguments if not word.startswith("resume=")]
    command = [*start, sys.argv[0], *words, *(["resume=true"] if is_saved else [])]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """While entered, keep other runs out of `folder`; it is free again when the process ends, in whatever way.

    Raises UserError if another run is in it, or if it can't be written. Where the file system has no locks (some NFS, Lustre,
    containers), it warns and continues without one.
    """
    lock = filelock.FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{folder}: another run is writing there; wait for it or choose another out_dir") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(f"{folder}: can't be written ({error.strerror}); choose another out_dir") from None
        print(f"warning: {folder} can't be locked here ({error.strerror}); start no second run in it", file=sys.stderr)
    for name in ("checkpoint.pt", "best_model.pt", "generator.pt", "history.jsonl"):
        for part in folder.glob(f".{name}.*.part"):  # left by a run that was killed while saving
            part.unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.release()
