"""Files: written whole or not at all, and with nothing but tensors, numbers, strings, lists and dicts inside."""

import io
import json
import os
import platform
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distributed
from config import FASHION_MNIST, ROOT, Settings, UserError, resolve

_MODEL = {"architecture", "activation", "output_dim", "class_names", "model", "epoch"}
METADATA = _MODEL - {"model"} | {"settings", "versions", "machine", "best", "class_sizes"}
_STATE = {"settings", "machine", "ema", "optimizer", "rng", "history", "run"}
KINDS = {  # kind of file -> (keys it must have, the script that makes it)
    "best_model": (_MODEL, "train.py"),
    "checkpoint": (_MODEL | _STATE, "train.py"),
    "soft_targets": ({"log_probabilities", "class_names", "settings", "epoch"}, "tools/soft_targets.py"),
    "generator": ({"model", "settings", "epoch"}, "gan/train.py"),
    "gan_checkpoint": (_STATE | {"generator", "discriminator", "samples"}, "gan/train.py"),
}
REPLACE_ATTEMPTS = 50  # a tenth of a second apart
MAY_DIFFER_ON_RESUME = {"epochs", "device", "data_dir", "out_dir", "resume", "log"}
PATHS = {"data", "teacher", "finetune", "generator"}  # settings, of which two spellings may name one file or folder


def write_atomically(path: Path, contents: bytes) -> None:
    """Write beside `path`, flush to disk, move over it: a reader sees the old file or the new one, never a part.

    Of several processes that train together only the first one writes.
    Raises UserError, with the old file untouched, if the disk is full or the folder can't be written.
    """
    if distributed.rank():
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        _replace(part, path)
    except OSError as error:
        with suppress(OSError):  # its folder is what can't be written
            part.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error.strerror}); free some space or choose another out_dir") from None


def _replace(part: Path, path: Path) -> None:
    """os.replace, tried again for some seconds: on Windows a reader or a virus scanner may hold the old file for a moment."""
    for attempt in range(REPLACE_ATTEMPTS):
        try:
            return os.replace(part, path)
        except PermissionError:
            if attempt == REPLACE_ATTEMPTS - 1 or not os.access(path.parent, os.W_OK):
                raise
            time.sleep(0.1)


def save(path: Path, contents: dict) -> None:
    """Save a dict of plain types, so that `torch.load(path, weights_only=True)` opens it again, on any machine."""
    buffer = io.BytesIO()
    torch.save(_on_cpu(contents), buffer)
    write_atomically(path, buffer.getvalue())


def _on_cpu(value: Any) -> Any:
    """The value with the tensors in its dicts and lists on the CPU: torch opens a GPU's only where there is one."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(part) for key, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, list) else value


def save_json(path: Path, contents: dict) -> None:
    write_atomically(path, (json.dumps(contents, indent=2) + "\n").encode())


def load(path: Path, *kinds: str) -> dict:
    """The dict that `save` wrote, on the CPU. Its "kind" is one of `kinds`, keys of KINDS. No code inside the file ever runs.

    Raises UserError if the file is missing, damaged, foreign, malicious, of another kind or of an older version.
    """
    script, kind_here = KINDS[kinds[0]][1], f"{kinds[0]} file of this version of the project"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about foreign files; the error below says what matters
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        name = path.parent.name
        is_recipe = path.parent.parent == ROOT / "runs" and (ROOT / "recipes" / f"{name}.json").exists()
        settings = f"recipe={name}" if is_recipe else "with the same recipe and out_dir"
        raise UserError(f"{path}: there is no such file; python {script} {settings} makes it, or name another") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); expected a {kind_here}") from None
    except Exception:  # torch.load raises some ten types for files that are truncated, foreign or carry code
        raise UserError(f"{path}: is damaged or no {kind_here}; train again, or name another file") from None
    kind = contents.get("kind") if isinstance(contents, dict) else None
    if kind not in kinds or KINDS[kind][0] - contents.keys():
        raise UserError(f"{path}: is no {kind_here}; train again or name another out_dir")
    return contents


def load_parameters(module: nn.Module, state_dict: dict, path: Path) -> None:
    """Fill the module from the file at `path`. Raises UserError if the parameters don't fit or aren't finite."""
    try:
        module.load_state_dict(state_dict)
    except (TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path}: its parameters don't fit the model; train again") from None
    if not all(torch.isfinite(tensor).all() for tensor in module.state_dict().values()):
        raise UserError(f"{path}: some of its parameters are not finite; train again")


def write_history(path: Path, settings: dict, epochs: list[dict]) -> None:
    lines = [json.dumps(line) for line in (settings, *epochs)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_history(path: Path) -> tuple[dict, list[dict]]:
    """The resolved settings and the line of each epoch in a history.jsonl."""
    settings, *epochs = [json.loads(line) for line in path.read_text().splitlines()]
    return settings, epochs


def best_epoch(epochs: Sequence[dict]) -> dict:
    """The epoch whose model is kept: the one with the lowest validation loss, without validation images the last."""
    return min(epochs, key=lambda line: line["valid_loss"]) if "valid_loss" in epochs[-1] else epochs[-1]


def provenance(settings: Settings, device: torch.device, precision: torch.dtype) -> dict:
    return {"settings": settings.model_dump(), "versions": versions(), "machine": machine(device, precision)}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def machine(device: torch.device, precision: torch.dtype) -> dict[str, str | int]:
    """What determines the parameters bitwise, besides settings and versions."""
    processes = {"threads": torch.get_num_threads(), "processes": distributed.world_size()}
    return {"device": device.type, "precision": str(precision).removeprefix("torch."), **processes}


def is_same(key: str, value: object, other: object) -> bool:
    """Whether two values of a setting mean the same: a folder has several spellings."""
    return value == other or (key in PATHS and resolve(str(value)) == resolve(str(other)))


def check_resumable(saved: dict, settings: Settings, here: dict[str, str | int]) -> None:
    """Raises UserError if a checkpoint has other settings. Prints a line if it comes from another machine than `here`."""
    saved_settings, made_on = saved["settings"], saved["machine"]
    if not isinstance(saved_settings, dict) or not isinstance(made_on, dict):
        raise UserError("resume=true: the checkpoint doesn't say how it was made; train without resume")
    saved_settings = {key: field.default for key, field in type(settings).model_fields.items()} | saved_settings
    may_differ = MAY_DIFFER_ON_RESUME
    if any("run" in line for line in saved["history"]):  # the file has no state of the runs that have ended
        may_differ = may_differ - {"epochs"}
    differ = [
        f"{key}={value} (was {saved_settings[key]})"
        for key, value in settings.model_dump().items()
        if key not in may_differ and not is_same(key, value, saved_settings[key])
    ]
    if differ:
        raise UserError(f"resume=true: the checkpoint has other settings: {', '.join(differ)}")
    if settings.model_dump()["epochs"] != saved_settings["epochs"] and saved_settings["schedule"] in ("cosine", "linear"):
        print(f"resumes with another number of epochs: the {saved_settings['schedule']} schedule now covers all of them")
    changed = [f"{key}={value} (was {made_on.get(key)})" for key, value in here.items() if value != made_on.get(key)]
    if changed:
        print(f"resumes with {', '.join(changed)}: the result will not be bitwise identical to an uninterrupted run's")


def check_same_split(path: Path, settings: dict, seed: int, valid_ratio: float, data: str = FASHION_MNIST) -> None:
    """Raises UserError if the model in `path`, trained under `settings`, may have seen the validation images of this split."""
    try:
        split = {"seed": settings["seed"], "valid_ratio": settings["valid_ratio"]}
        split |= {"folds": settings.get("folds", 0), "runs": settings.get("runs", 1)}
        split |= {"data": settings.get("data", FASHION_MNIST)}
        is_one_split = not split["folds"] and split["runs"] == 1 and is_same("data", split["data"], data)
        may_have_seen = not is_one_split or split["seed"] != seed or split["valid_ratio"] < valid_ratio
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: doesn't say on which images it was trained; train it again") from None
    if valid_ratio and may_have_seen:
        raise UserError(
            f"{path}: was trained with {' '.join(f'{key}={value}' for key, value in split.items())}, so that it may have seen "
            f"validation images of seed={seed} valid_ratio={valid_ratio} data={data}; train it with the same, or name none, "
            "as in teacher= or finetune="
        )


def check_same_images(source: str, metadata: Mapping, class_sizes: list[int]) -> None:
    """Raises UserError if the classes had other numbers of training images when the file with this metadata was made."""
    if (before := metadata.get("class_sizes", class_sizes)) != class_sizes:
        raise UserError(
            f"{source}: comes from {before} training images, by class; there are {class_sizes} now, and training and "
            "validation images would be mixed up; start over without it"
        )


def rng_state(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The states, uint8, of `generator`, `(length,)`, and of every process's default generators, `(processes, length)`."""
    states = {"torch": torch.get_rng_state()}
    device = generator.device.type
    if device != "cpu":
        states[device] = getattr(torch, device).get_rng_state()
    gathered = {name: distributed.gather_rows(state.unsqueeze(0), distributed.world_size()) for name, state in states.items()}
    return {"generator": generator.get_state(), **gathered}


def set_rng_state(states: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Restore what `rng_state` returned; on another kind of device, whose states have another form, a state derived from it."""
    state, device = states["generator"], generator.device.type
    if len(state) == len(generator.get_state()):
        generator.set_state(state)
    else:
        generator.manual_seed(zlib.crc32(state.numpy().tobytes()))  # the same on each process
    row = distributed.rank()
    if row < len(states["torch"]):  # more processes than before: the new ones keep their own state
        torch.set_rng_state(states["torch"][row].clone())
        if device != "cpu" and device in states:
            getattr(torch, device).set_rng_state(states[device][row].clone())
