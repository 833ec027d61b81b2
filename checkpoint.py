"""Saving and loading: whole files or none, and nothing but tensors, numbers, strings, lists and dicts inside."""

import io
import json
import os
import platform
import warnings
import zlib
from pathlib import Path

import torch
from torch import nn

import parallel
from config import Settings, UserError
from model import build, folded, with_batch_norm
from networks import Network

NETWORK_KEYS = {"architecture", "activation", "output_dim", "class_names", "mean", "std", "parameters", "epoch"}
KEYS = {  # what a file must hold to be of its kind
    "best_model": NETWORK_KEYS,
    "checkpoint": NETWORK_KEYS
    | {"settings", "averaged", "auxiliary", "optimizer", "history", "best", "random", "run", "partial", "machine"},
    "targets": {"log_probabilities", "class_names", "settings", "epoch"},
    "generator": {"parameters", "settings", "epoch"},
    "gan_checkpoint": {"generator", "averaged", "discriminator", "optimizers", "history", "random", "settings", "frames"}
    | {"partial", "machine"},
}
MAY_DIFFER_ON_RESUME = {"epochs", "device", "data_dir", "out_dir", "resume"}


def write_atomically(path: Path, contents: bytes) -> None:
    """Write beside `path`, flush to disk, move over it: a reader sees the old file or the new one, never a part.

    Of several processes that train together only the first one writes.
    Raises UserError, with the old file untouched, if the disk is full or the folder can't be written.
    """
    if parallel.rank():
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        try:
            part.unlink(missing_ok=True)
        except OSError:  # its folder is what can't be written
            pass
        raise UserError(f"{path}: can't be written ({error.strerror}); free some space or choose another out_dir") from None


def save(path: Path, contents: dict) -> None:
    """Save a dict of plain types, so that `torch.load(path, weights_only=True)` opens it again."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_atomically(path, buffer.getvalue())


def save_json(path: Path, contents: dict) -> None:
    write_atomically(path, (json.dumps(contents, indent=2) + "\n").encode())


def load(path: Path, kind: str) -> dict:
    """The dict that `save` wrote with `contents["kind"] == kind`, on the CPU; no code inside the file ever runs.

    `kind`: one of KEYS.

    Raises UserError if the file is missing, damaged, foreign, malicious or of another kind.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, about foreign files; the line below says what matters
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        script = {"targets": "teach.py", "generator": "gan.py train", "gan_checkpoint": "gan.py train"}.get(kind, "train.py")
        raise UserError(f"{path}: there is no such file; python {script} with the same recipe and out_dir makes it") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a {kind} file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read") from None
    except Exception:  # torch.load raises some ten types for files that are truncated, foreign or carry code
        raise UserError(f"{path}: is damaged, or holds more than plain tensors and numbers; train again") from None
    if not isinstance(contents, dict) or contents.get("kind") != kind or KEYS[kind] - contents.keys():
        raise UserError(f"{path}: is no {kind} file of this project; train again or name another out_dir")
    return contents


def check_resumable(contents: dict, settings: Settings, here: dict[str, str | int]) -> None:
    """Raises UserError if a checkpoint's contents were saved under other settings. Says so if the machine `here` is another."""
    saved, made_on = contents["settings"], contents["machine"]
    if not isinstance(saved, dict) or not isinstance(made_on, dict):
        raise UserError("resume=true: the checkpoint doesn't say how it was made; train without resume")
    saved = {key: field.default for key, field in type(settings).model_fields.items()} | saved  # a setting may be newer
    may_differ = MAY_DIFFER_ON_RESUME
    if settings.folds or settings.runs > 1:  # of those that have ended, the file has no network that could go on
        may_differ = may_differ - {"epochs"}
    differ = [
        f"{key}={value} (was {saved[key]})"
        for key, value in settings.model_dump().items()
        if key not in may_differ and value != saved[key]
    ]
    if differ:
        raise UserError(f"resume=true: the checkpoint was made under other settings: {', '.join(differ)}")
    others = [f"{key}={value} (was {made_on.get(key)})" for key, value in here.items() if value != made_on.get(key)]
    if others:
        print(f"goes on with {', '.join(others)}: its end will not have the bits of a run that nobody disturbed")


def rebuild(contents: dict, path: Path) -> Network:
    """The network in a file's contents, in evaluation mode. Raises UserError if the parameters don't fit or aren't finite."""
    try:
        network = build(contents["architecture"], contents["output_dim"], activation=contents["activation"])
        if contents["kind"] == "checkpoint" and contents["settings"].get("batch_norm"):  # folded into best_model.pt's weights
            with_batch_norm(network)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path}: names no network that is known here; train again") from None
    fill(network, contents, path)
    return folded(network)


def fill(network: nn.Module, contents: dict, path: Path) -> None:
    """Put a file's parameters into a network, and that into evaluation mode. Raises UserError as `rebuild` does."""
    try:
        network.load_state_dict(contents["parameters"])
    except (TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path}: its parameters don't fit the network; train again") from None
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise UserError(f"{path}: some of its parameters are not finite; train again")
    network.eval()


def write_history(path: Path, settings: dict, epochs: list[dict]) -> None:
    lines = [json.dumps(line) for line in (settings, *epochs)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_history(path: Path) -> tuple[dict, list[dict]]:
    """The resolved settings and the line of each epoch, in history.jsonl."""
    settings, *epochs = [json.loads(line) for line in path.read_text().splitlines()]
    return settings, epochs


def lowest(epochs: list[dict]) -> dict:
    """The epoch with the lowest validation loss: its network is the one that is kept."""
    return min(epochs, key=lambda line: line["valid_loss"])


def machine(device: torch.device, precision: torch.dtype) -> dict[str, str | int]:
    """What, beside settings and versions, decides about a training's bits."""
    processes = {"threads": torch.get_num_threads(), "processes": parallel.count()}
    return {"device": device.type, "precision": str(precision).removeprefix("torch."), **processes}


def random_states(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of `generator`, and of what dropout draws from, which is another one on each process: `(processes, length)`."""
    states = {"torch": torch.get_rng_state()}
    device = generator.device.type
    if device != "cpu":
        states[device] = getattr(torch, device).get_rng_state()
    of_all = {name: parallel.whole(state.unsqueeze(0), parallel.count()) for name, state in states.items()}
    return {"generator": generator.get_state(), **of_all}


def set_random_states(states: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Go on from what `random_states` gave; on another kind of device, whose random numbers are others, from some others."""
    state, device = states["generator"], generator.device.type
    if len(state) == len(generator.get_state()):
        generator.set_state(state)
    else:
        generator.manual_seed(zlib.crc32(state.numpy().tobytes()))  # the same on each process
    row = parallel.rank()
    if row < len(states["torch"]):  # there may be more processes than before: those keep the state that they have
        torch.set_rng_state(states["torch"][row].clone())
        if device != "cpu" and device in states:
            getattr(torch, device).set_rng_state(states[device][row].clone())


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)}
