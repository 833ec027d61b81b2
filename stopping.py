"""Ending a run without loss: signals wait until a batch is done, and two runs keep out of each other's folder."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import parallel
from config import UserError


class Stopped(KeyboardInterrupt):
    """The user, or the system, ended the run by a signal, and all is in a state that can be saved."""

    def __init__(self, number: int):
        self.number = number


class Signals:
    """While entered, the first Ctrl-C or SIGTERM is only noted, for `check` to raise; a second one interrupts at once."""

    def __enter__(self) -> "Signals":
        self.received = 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def check(self) -> None:
        """Raises Stopped if a signal came, to whichever of the processes that train together."""
        received = parallel.any_of(self.received)
        if received:
            raise Stopped(received)


def resuming(arguments: list[str]) -> str:
    """The command that goes on with this script's run."""
    start = ["python"] if parallel.count() == 1 else ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join([*start, sys.argv[0], *(word for word in arguments if not word.startswith("resume=")), "resume=true"])


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder`, until this process ends in whatever way. Raises UserError if one is in it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another out_dir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{folder}: {file.read()} is at work there; wait for it or choose another out_dir") from None
        for part in folder.glob(".*.part"):  # of saves that a kill cut short
            process = part.name.split(".")[-2]
            if process.isdigit() and not _is_alive(int(process)):
                part.unlink(missing_ok=True)
        with suppress(OSError):  # the disk may be full; what stands in the file is a courtesy
            file.truncate(0)
            os.write(file.fileno(), os.fsencode(f"process {os.getpid()} ({' '.join(sys.argv)})"))
        yield
