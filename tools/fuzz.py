"""The campaign's bad inputs: damaged data, malicious checkpoints, generated command lines, mutated images.

A function per kind tries it in a folder of its own and yields a row's name and whether each trial passed.
"""

import contextlib
import gzip
import io
import itertools
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gan.sample
import gan.score
import gan.train
import idx
import photo
import predict
import test as testing
import train
from config import RunSettings, Settings, UserError
from script import load_settings
from tools import bench, soft_targets, tune
from transfer.last_layer import TransferSettings

Trials = Iterator[tuple[str, list[bool]]]  # name of a row, whether each trial passed


def ending(call: Callable[[], object]) -> str:
    """How a call ends: "done", "refused" by one line for the user, or "failed" in any other way."""
    try:
        call()
    except UserError as error:
        return "refused" if str(error) and "\n" not in str(error) else "failed"
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # help
            return "done"
        traceback.print_exc()
        return "failed"
    return "done"


def peak_memory() -> float:
    """The largest memory that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def data(folder: Path) -> Trials:
    names = list(idx.IDX_FILES)
    good = {name: bytes(idx.find_idx(name, Settings().data_path)) for name in names}
    packed = {name: gzip.compress(contents, 1) for name, contents in good.items()}
    raw, source = folder / "FashionMNIST" / "raw", folder / "good"
    raw.mkdir(parents=True)
    source.mkdir()
    for name, contents in packed.items():
        (source / f"{name}.gz").write_bytes(contents)
    idx.DEBIAN_FOLDER = source  # the next source

    def is_replaced(name: str, contents: bytes, suffix: str = ".gz") -> bool:
        path = raw / f"{name}{suffix}"
        path.write_bytes(contents)
        started = time.perf_counter()
        is_good = idx.find_idx(name, folder) == good[name]
        path.unlink()
        return is_good and time.perf_counter() - started < 10

    def trials(change: Callable[[bytes], bytes], count: int) -> list[bool]:
        files = itertools.cycle(itertools.product(((packed, ".gz"), (good, "")), names))
        return [is_replaced(name, change(kind[name]), suffix) for (kind, suffix), name in itertools.islice(files, count)]

    def flip(contents: bytes) -> bytes:
        changed = bytearray(contents)
        changed[random.randrange(len(contents))] ^= random.randrange(1, 256)
        return bytes(changed)

    with contextlib.redirect_stderr(io.StringIO()):
        yield "data files with a flipped byte", trials(flip, 200)
        yield "data files truncated", trials(lambda contents: contents[: random.randrange(len(contents))], 50)
        yield "data files swapped", [is_replaced(name, packed[other]) for name, other in itertools.permutations(names, 2)]
        bomb = gzip.compress(bytes(2**30), 9)
        before, outcomes = peak_memory(), [is_replaced(name, bomb) for name in names]
        yield "gzip bombs of 1 GB, within 200 MB", [outcome and peak_memory() - before < 200 for outcome in outcomes]


class Malicious:
    def __init__(self, call: Callable, *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def saved(contents: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def damaged(good: bytes) -> Iterator[bytes]:
    """Truncated files, files of another form, and files in which one tensor is not finite, too short or missing."""
    for _ in range(10):
        yield good[: random.randrange(len(good))]
    contents = torch.load(io.BytesIO(good), weights_only=True)
    for foreign in ({}, [1, 2], {"kind": contents["kind"]}, {**contents, "kind": "other"}, {"state_dict": contents}):
        yield saved(foreign)
    holder = contents.get("model") or contents.get("generator") or contents
    name, tensor = next(item for item in holder.items() if isinstance(item[1], torch.Tensor))
    for changed in (torch.full_like(tensor, torch.nan), tensor.flatten()[:0], None):
        holder[name] = changed
        yield saved(contents)


def checkpoints(folder: Path) -> Trials:
    mark, out, gan_out = folder / "it ran", folder / "run", folder / "gan"
    code = f"open({str(mark)!r}, 'w')"
    payloads = [
        Malicious(os.system, f"touch '{mark}'"),
        Malicious(eval, code),
        Malicious(exec, code),
        Malicious(subprocess.check_call, ["touch", str(mark)]),
        Malicious(torch.load, str(mark)),
    ]
    malicious = [contents for payload in payloads for contents in (pickle.dumps(payload), saved({"kind": payload}))]
    train.main(["limit=500", "epochs=1", f"out_dir={out}"])
    soft_targets.main([f"out_dir={out}"])
    gan.train.main(["limit=200", "epochs=1", f"out_dir={gan_out}"])
    best, targets = out / "best_model.pt", out / "soft_targets.pt"
    distil = ["limit=500", "epochs=2", f"out_dir={folder / 'x'}"]
    resume, gan_resume = (["resume=true", "epochs=2", f"out_dir={path}"] for path in (out, gan_out))
    scripts = {
        "train.py resume=true": (out / "checkpoint.pt", train.main, ["limit=500", *resume]),
        "test.py": (best, testing.main, [f"out_dir={out}"]),
        "predict.py": (best, predict.main, ["index=0", f"out_dir={out}"]),
        "train.py teacher=best_model.pt": (best, train.main, [*distil, f"teacher={best}"]),
        "train.py teacher=soft_targets.pt": (targets, train.main, [*distil, f"teacher={targets}"]),
        "train.py finetune=best_model.pt": (best, train.main, [*distil, f"finetune={best}"]),
        "gan/sample.py": (gan_out / "generator.pt", gan.sample.main, [f"out_dir={gan_out}"]),
        "gan/train.py resume=true": (gan_out / "checkpoint.pt", gan.train.main, ["limit=200", *gan_resume]),
    }
    for name, (path, main, words) in scripts.items():
        good, call = path.read_bytes(), partial(main, words)
        if name not in ("test.py", "predict.py") and ending(call) != "done":  # the campaign reads no test images
            raise RuntimeError(f"{name}: refuses a good file")
        for kind, files in (("malicious pickles", malicious), ("damaged and foreign files", damaged(good))):
            outcomes = []
            for contents in files:
                path.write_bytes(contents)
                outcomes.append(ending(call) == "refused" and not mark.exists())
            yield f"{kind}: {name}", outcomes
        path.write_bytes(good)


def settings(_: Path) -> Trials:
    from hypothesis import HealthCheck, given
    from hypothesis import settings as of_hypothesis
    from hypothesis import strategies as some

    types: list = [Settings, RunSettings, testing.TestSettings, predict.PredictSettings, bench.BenchSettings, tune.TuneSettings]
    types += [gan.train.GanSettings, gan.sample.SampleSettings, gan.score.ScoreSettings, TransferSettings]
    keys = sorted({key for kind in types for key in kind.model_fields})
    texts = some.text(some.characters(exclude_characters="\n"), max_size=20)
    odd = some.sampled_from(["true", "false", "", "nan", "inf", "1e999", "hflip:2", "gan:", "shift:1,,", "None", "[1]", "{}"])
    values = some.one_of(texts, some.integers().map(str), some.floats().map(str), odd)
    words = some.one_of(some.tuples(some.one_of(some.sampled_from(keys), texts), values).map("=".join), texts)
    outcomes = []

    @of_hypothesis(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(some.sampled_from(types), some.lists(words, max_size=4))
    def try_one(kind: type[Settings], line: list[str]) -> None:
        outcomes.append(ending(lambda: load_settings(line, kind)) != "failed")
        if not outcomes[-1]:
            print(line, file=sys.stderr)

    try_one()
    yield "generated command lines", outcomes


def images(folder: Path) -> Trials:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    pixels[10:50, 10:40] //= 8
    originals = [folder / f"original.{suffix}" for suffix in ("png", "jpeg", "gif", "tiff", "webp", "bmp")]
    for path in originals:
        Image.fromarray(pixels).save(path)

    def trial(path: Path) -> bool:
        started = time.perf_counter()
        return ending(lambda: photo.read_photograph(path)) != "failed" and time.perf_counter() - started < 10

    outcomes = []
    for number in range(1000):
        original = originals[number % 6]
        changed = bytearray(original.read_bytes())
        for _ in range(random.choice((1, 1, 3, 20))):
            changed[random.randrange(min(len(changed), random.choice((40, 10**6))))] = random.randrange(256)
        if number % 5 == 0:
            del changed[random.randrange(len(changed)) :]
        path = folder / f"{number}{original.suffix}"
        path.write_bytes(changed)
        outcomes.append(trial(path))
    yield "mutated image files", outcomes
    names = ("with a space", "größe-靴", "-dash", ".hidden", "a=b", "%41", "$1", "caf\udce9")
    yield "odd file names", [trial(shutil.copyfile(originals[0], folder / f"{name}.png")) for name in names]
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    large = Image.new("RGBA", (7_000, 7_000), "white")
    large.paste("black", (2_000, 3_000, 5_000, 4_000))
    large.save(folder / "large.png")
    large.convert("P").save(folder / "palette.png", transparency=0)
    large.convert("1").save(folder / "scan.png")
    Image.fromarray(np.asarray(large.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    before = peak_memory()
    outcomes = [trial(folder / f"{name}.png") for name in ("bomb", "large", "palette", "scan", "deep")]
    yield "images of very many pixels, within 1 GB", [outcome and peak_memory() - before < 1000 for outcome in outcomes]
