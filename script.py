"""The command line of all scripts: settings, help, errors, exit codes, the process's memory and its end."""

import atexit
import contextlib
import ctypes
import importlib
import io
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from config import FASHION_MNIST, Settings, UserError, as_text, config_path, read_config, unknown_setting

HELP = {"help", "-h", "--help"}
INDENT = 24  # columns before a setting's description in the text of `help`

SomeSettings = TypeVar("SomeSettings", bound=Settings)


def load_settings(arguments: list[str], settings_type: type[SomeSettings]) -> SomeSettings:
    """Merge `config.json` or the recipe with the command line's `key=value` words and validate the result.

    Of the file, a script takes the settings that it has. `help` prints every setting and exits with 0.
    Raises UserError, naming the key, its value, what is allowed and the nearest valid name.
    """
    given = {}
    for word in arguments:
        if word in HELP:
            continue
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not understood; settings are written key=value, and help lists them")
        given[key] = value
    fields = settings_type.model_fields
    path = config_path(given.get("recipe", ""))
    from_file = read_config(path) if "recipe" in fields else {}
    merged = {key: value for key, value in from_file.items() if key in fields}
    if given.get("data", data := from_file.get("data", FASHION_MNIST)) != data:
        merged.pop("output_dim", None)  # of the file's own data set
    if HELP & set(arguments):
        print(describe(settings_type, merged | given))
        raise SystemExit(0)
    merged |= {key: _typed(settings_type, key, value) for key, value in given.items()}
    try:
        return settings_type(**merged)
    except ValidationError as error:
        problem = error.errors()[0]
        is_files = set(problem["loc"]) & from_file.keys() - given.keys()
        raise UserError((f"{path}: " if is_files else "") + _explain(problem, settings_type)) from None


def check_no_settings(arguments: list[str], description: str | None) -> None:
    """For a script without settings: `help` prints its description and exits with 0. Raises UserError for another word."""
    if HELP & set(arguments):
        print(description)
        raise SystemExit(0)
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood; this script has no settings; help tells what it does")


def _typed(settings_type: type[Settings], key: str, text: str) -> object:
    """The text as the setting's declared type where it reads as one, else unchanged, for pydantic to refuse."""
    field = settings_type.model_fields.get(key)
    if field is None or isinstance(field.default, str):
        return text
    if isinstance(field.default, bool):
        return {"true": True, "false": False}.get(text, text)
    try:
        return int(text) if isinstance(field.default, int) else float(text)
    except ValueError:
        return text


def _explain(problem: ErrorDetails, settings_type: type[Settings]) -> str:
    if not problem["loc"]:  # several settings together
        return problem["msg"].removeprefix("Value error, ")
    key, given = str(problem["loc"][0]), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key}={given}: {unknown_setting(key, settings_type.model_fields)}"
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{key}={given}: {reason} ({str(settings_type.model_fields[key].description).splitlines()[0]})"


def describe(settings_type: type[Settings], values: dict) -> str:
    """The text of `help`: every setting with its value, type, range and meaning, grouped by the class that declares it."""
    lines, described = [f"usage: python {sys.argv[0]} {settings_type.usage}  (*: not the default)"], set[str]()
    for group in reversed(settings_type.__mro__):
        keys = [key for key in getattr(group, "__annotations__", {}) if key in settings_type.model_fields.keys() - described]
        described |= set(keys)
        lines += ["", f"{group.__doc__}:"] if keys else []
        for key in keys:
            field = settings_type.model_fields[key]
            kind = getattr(field.annotation, "__name__", "")
            if kind == "Literal":
                kind = " | ".join(map(str, get_args(field.annotation)))
            for sign, bound in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
                kind += "".join(f", {sign} {getattr(rule, bound)}" for rule in field.metadata if hasattr(rule, bound))
            first, *others = str(field.description).splitlines()
            first += f" ({kind})" * (kind != "str")
            right = [part for line in (first, *others) for part in textwrap.wrap(line, 99 - INDENT)]
            value = as_text(values.get(key, field.default))
            left = f"{key}={value}" + " *" * (value != as_text(field.default))
            if len(left) >= INDENT:
                lines, left = [*lines, left], ""
            lines += [f"{start:{INDENT}}{part}" for start, part in zip([left, *[""] * len(right)], right)]
    return "\n".join(lines)


def import_extra(name: str) -> Any:
    """A module that needs a package of requirements-extra.txt. Raises UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"there is no package {error.name}; pip install -r requirements-extra.txt") from None


class Output:
    """Standard output that may fail: on a full disk, one line on stderr, then silence, so that no work is lost."""

    def __init__(self, stream: io.TextIOWrapper):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._attempt(lambda: self.stream.write(text)) or 0

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable):
        try:
            return call()
        except BrokenPipeError:
            raise
        except OSError as error:
            print(f"warning: standard output can't be written ({error.strerror}); the script continues", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # also for what is in the stream's buffer


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory for the next allocation of that size instead of returning it to the system.

    Every step allocates the same activations again, and the system would hand them out page by page, filled with zeros,
    which took half of the training time. Does nothing without glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes: below it, memory comes from the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: a shorter free end of the heap is kept


def run_script(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Call `main(arguments)`. A UserError becomes one line on stderr and exit code 2, an interrupt exit code 130 or 143."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # pythonw has none, nor has a process started with >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    stream = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None  # not in a notebook
    if stream:
        stream.reconfigure(errors="backslashreplace")  # a folder's name need not be Unicode
    keep_freed_memory()
    try:
        with contextlib.redirect_stdout(Output(stream)) if stream else contextlib.nullcontext():
            main(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of our output has closed the pipe; Python would flush to it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, which Windows does not have
    except OSError as error:  # no right to look into a folder, a name that is too long
        if not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}; name another", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        raise SystemExit(128 + getattr(interrupt, "number", signal.SIGINT)) from None
    if not _has_host(sys._getframe(1).f_back is not None):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # everything is on disk; destroying torch's objects in order would take another half second


def _has_host(is_called: bool) -> bool:
    """Whether other code needs this process after the script: a caller (cProfile, runpy, IPython), a tracer, a thread."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring else []
    is_traced = sys.gettrace() or sys.getprofile() or any(tools)
    is_threaded = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    return bool(is_called or is_traced or is_threaded)
