"""What could lose a run, tried on purpose: `python unittest/campaign.py [PART ...]`, some 20 minutes for all parts.

    kills        runs killed again and again, at random moments and while saving, then resumed: the same bits in the end?
    saves        a second process reads the files of a run during 1,000 saves: is one ever torn?
    disk         a full disk, a read-only folder, a folder that disappears: one line, and the last good files?
    data         data files with flipped bytes, truncated, swapped, bombs: refused, and the next source tried?
    checkpoints  malicious, damaged and foreign .pt files wherever one is read: refused, and nothing run?
    settings     generated command lines: settings or one line?
    images       mutated image files: an image or one line, within time and memory?
    bits         every recipe, on few images, in two fresh processes, with one thread and with two: the same bits?

Prints a row per kind of trial: how many were tried, survived, lost; exit code 1 if any was lost. Linux only: it forks.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import bench  # noqa: E402
import checkpoint  # noqa: E402
import data_preprocessing  # noqa: E402
import gan  # noqa: E402
import photo  # noqa: E402
import predict  # noqa: E402
import teach  # noqa: E402
import test as testing  # noqa: E402
import train  # noqa: E402
import tune  # noqa: E402
from config import Settings, UserError, load_settings, run_script  # noqa: E402
from transfer import train_eval  # noqa: E402

KINDS = {  # of training, all on few images
    "task 1": ["limit=3000", "epochs=10"],
    "resnet8_plus": ["recipe=resnet8_plus", "limit=600", "epochs=6"],
    "dropout": ["recipe=deep_cnn_dropout", "limit=1000", "epochs=10"],
    "average": ["average=0.99", "limit=3000", "epochs=10"],
    "plateau": ["recipe=compact_cnn", "schedule=plateau", "patience=3", "limit=1000", "lr=0.01", "epochs=12"],
    "folds": ["folds=4", "limit=2000", "epochs=3"],
    "runs": ["runs=3", "limit=2000", "epochs=4"],
}
KILLS = 16  # of each kind, at least
rows: list[tuple[str, int, int]] = []  # what, tried, survived


def report(what: str, outcomes: list[bool]) -> None:
    rows.append((what, len(outcomes), sum(outcomes)))
    lost = len(outcomes) - sum(outcomes)
    told = f"{what:46} {len(outcomes):6,} tried {sum(outcomes):6,} survived {lost:6,} lost"
    print(told, file=sys.__stdout__, flush=True)


def forked(main: Callable[[list[str]], object], arguments: list[str]) -> int:
    """The id of a process that calls `main(arguments)`, quietly, and exits as a script would."""
    process = os.fork()
    if process:
        return process
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 1
    try:
        run_script(main, arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 99  # a traceback
    os._exit(code)


def refused(call: Callable[[], object]) -> bool:
    """Whether the call ends in one line for the user: not in success, not in a traceback."""
    try:
        call()
    except UserError as error:
        return bool(str(error)) and "\n" not in str(error)
    except BaseException:
        traceback.print_exc()
    return False


def saved_bits(out: Path) -> tuple:
    """All that must be the same: parameters, best parameters, history but for the seconds."""
    state = checkpoint.load(out / "checkpoint.pt", "checkpoint")
    best = checkpoint.load(out / "best_model.pt", "best_model")
    histories = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in history]
        for history in (state["history"], checkpoint.read_history(out / "history.jsonl")[1])
    ]
    parameters = [tensor.numpy().tobytes() for part in (state, best) for tensor in part["parameters"].values()]
    return parameters, histories, best["epoch"], best["best"]["epoch"]


# ---- parts -----------------------------------------------------------------------------------------------------------


def kills(folder: Path) -> None:
    for kind, words in KINDS.items():
        whole, killed = folder / f"{kind} whole", folder / f"{kind} killed"
        started = time.perf_counter()
        os.waitpid(forked(train.main, [*words, f"out_dir={whole}"]), 0)
        usual = time.perf_counter() - started
        count = aimed = 0
        outcomes: list[bool] = []
        while count < KILLS:  # a run may end before it has had its kills; then another begins
            shutil.rmtree(killed, ignore_errors=True)
            has_ended = False
            while not has_ended:
                resume = ["resume=true"] if (killed / "checkpoint.pt").exists() else []
                process = forked(train.main, [*words, *resume, f"out_dir={killed}"])
                deadline = time.perf_counter() + random.uniform(0, usual / 3)
                while not (has_ended := os.waitpid(process, os.WNOHANG)[0] != 0):
                    is_saving = any(killed.glob(f".*.{process}.part"))
                    if count < KILLS and (is_saving if count % 2 else time.perf_counter() > deadline):
                        os.kill(process, signal.SIGKILL)
                        os.waitpid(process, 0)
                        count, aimed = count + 1, aimed + is_saving
                        break
            outcomes += [saved_bits(whole) == saved_bits(killed)] * (count - len(outcomes))
        report(f"kills, {aimed} of them while saving: {kind}", outcomes)


def saves(folder: Path) -> None:
    out = folder / "saves"
    train.main(["limit=500", "epochs=1", f"out_dir={out}"])
    states = {kind: checkpoint.load(out / f"{kind}.pt", kind) for kind in ("best_model", "checkpoint")}

    def write(_: list[str]) -> None:
        for number in range(1000):
            kind = ("best_model", "checkpoint")[number % 2]
            checkpoint.save(out / f"{kind}.pt", {**states[kind], "epoch": number})

    writer, whole = forked(write, []), []
    while not os.waitpid(writer, os.WNOHANG)[0]:
        for kind in states:
            try:
                whole.append(checkpoint.load(out / f"{kind}.pt", kind)["epoch"] >= 0)
            except UserError:
                whole.append(False)
    report("files read during 1,000 saves", whole)


def disk(folder: Path) -> None:
    words = ["limit=500", "epochs=3"]

    def ends_in_a_line(out: Path, code: str) -> bool:
        command = [sys.executable, str(ROOT / "train.py"), *words, f"out_dir={out}"]
        if code:  # runs before the script, in its process
            command[1:2] = ["-c", f"{code}; import sys, train, config; config.run_script(train.main, sys.argv[1:])"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        lines = ended.stderr.strip().splitlines()
        if ended.returncode == 0 and code:  # the folder was made again, with all that belongs there
            return all(checkpoint.load(out / f"{kind}.pt", kind) for kind in ("best_model", "checkpoint"))
        good = not (out / "best_model.pt").exists() or checkpoint.load(out / "best_model.pt", "best_model")
        return ended.returncode == 2 and len(lines) == 1 and bool(good)

    outcomes = []
    for kilobytes in (1, 4, 40, 90, 150, 200, 300, 400):
        full = folder / f"full {kilobytes}"
        full.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", full], capture_output=True).returncode:
            print("disk: a small tmpfs can't be mounted here (root alone may); skipped", file=sys.__stdout__)
            break
        if kilobytes == 4:  # one page, and that is taken
            (full / "other").write_bytes(bytes(4096))
        outcomes.append(ends_in_a_line(full, ""))
        subprocess.run(["umount", full], check=True)
    if outcomes:
        report("a full disk", outcomes)
    in_the_way = folder / "file"
    in_the_way.write_text("")
    outcomes = [ends_in_a_line(in_the_way, ""), ends_in_a_line(in_the_way / "below", ""), ends_in_a_line(Path("/proc/x"), "")]
    report("a folder that can't be written", outcomes)
    outcomes = []
    for number in range(5):
        out = folder / f"gone {number}"
        patch = (
            f"import shutil, train; real = train.Training.train_epoch; train.Training.train_epoch = lambda self, epoch, *more: "
            f"(real(self, epoch, *more), epoch > {number % 3} and shutil.rmtree({str(out)!r}, True))[0]"
        )
        outcomes.append(ends_in_a_line(out, patch))
    report("a folder deleted during the run", outcomes)


def data(folder: Path) -> None:
    names = list(data_preprocessing.IDX_FILES)
    good = {name: bytes(data_preprocessing.find_idx(name, load_settings([], Settings).data_path)) for name in names}
    packed = {name: gzip.compress(contents, 1) for name, contents in good.items()}
    source = folder / "good"
    source.mkdir()
    for name, contents in packed.items():
        (source / f"{name}.gz").write_bytes(contents)
    data_preprocessing.DEBIAN_FOLDER = source  # the next source
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)

    def passed_over(name: str, contents: bytes, suffix: str) -> bool:
        path = raw / f"{name}{suffix}"
        path.write_bytes(contents)
        started, told = time.perf_counter(), []
        is_refused = data_preprocessing._read_verified(name, raw, told) is None and len(told) == 1
        found = data_preprocessing.find_idx(name, folder) == good[name]
        path.unlink()
        return is_refused and found and time.perf_counter() - started < 10

    def trials(change: Callable[[bytes], bytes], count: int) -> list[bool]:
        outcomes = []
        for number in range(count):
            name = names[number % 4]
            of, suffix = ((packed, ".gz"), (good, ""))[number // 4 % 2]
            outcomes.append(passed_over(name, change(of[name]), suffix))
        return outcomes

    def flip(contents: bytes) -> bytes:
        # not in a gzip header's time stamp, whose value means nothing
        place = random.randrange(10, len(contents) - 8)
        return contents[:place] + bytes([contents[place] ^ random.randrange(1, 256)]) + contents[place + 1 :]

    quiet, sys.stderr = sys.stderr, io.StringIO()
    try:
        report("data files with a flipped byte", trials(flip, 200))
        report("data files truncated", trials(lambda contents: contents[: random.randrange(len(contents) - 8)], 50))
        swapped = [passed_over(names[a], packed[names[b]], ".gz") for a in range(4) for b in range(4) if a != b]
        report("data files swapped", swapped)
        bomb = gzip.compress(bytes(2**30), 9)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = [passed_over(name, bomb, ".gz") for name in names]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        report("gzip bombs of 1 GB, within 200 MB", [outcome and grown < 200 for outcome in outcomes])
        header = (2051).to_bytes(4, "big") + b"".join((10**4).to_bytes(4, "big") for _ in range(3))
        report("headers that promise 10^12 pixels", [passed_over(name, header + bytes(99), "") for name in names])
    finally:
        sys.stderr = quiet


class Malicious:
    def __init__(self, call: Callable, *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def checkpoints(folder: Path) -> None:
    mark = folder / "it ran"
    code = f"open({str(mark)!r}, 'w')"
    payloads = [
        Malicious(os.system, f"touch '{mark}'"),
        Malicious(eval, code),
        Malicious(exec, code),
        Malicious(subprocess.check_call, ["touch", str(mark)]),
        Malicious(getattr(torch.serialization, "load", torch.load), str(mark)),
    ]
    out = folder / "run"
    train.main(["limit=500", "epochs=1", f"out_dir={out}"])
    teach.main([f"out_dir={out}"])
    gan.main(["train", "limit=200", "epochs=1", f"out_dir={folder / 'gan'}"])
    again = ["limit=500", "epochs=2", "resume=true", f"out_dir={out}"]
    learning = ["limit=500", "epochs=1", f"out_dir={folder / 'x'}"]
    places: dict[str, tuple[Path, Callable[[], object]]] = {
        "train.py resume=true": (out / "checkpoint.pt", lambda: train.main(again)),
        "test.py": (out / "best_model.pt", lambda: testing.main([f"out_dir={out}"])),
        "predict.py": (out / "best_model.pt", lambda: predict.main(["index=0", f"out_dir={out}"])),
        **{
            f"train.py teacher={path.name}": (path, lambda path=path: train.main([*learning, f"teacher={path}"]))
            for path in (out / "best_model.pt", out / "targets.pt")
        },
        "gan.py sample": (folder / "gan" / "generator.pt", lambda: gan.main(["sample", f"out_dir={folder / 'gan'}"])),
        "gan.py train resume=true": (
            folder / "gan" / "checkpoint.pt",
            lambda: gan.main(["train", "limit=200", "epochs=2", "resume=true", f"out_dir={folder / 'gan'}"]),
        ),
    }
    for place, (path, call) in places.items():
        whole = path.read_bytes()
        if place != "test.py" and refused(call):  # then what follows would show nothing; test images are read by no campaign
            raise RuntimeError(f"{place}: refuses a good file")
        outcomes = []
        for payload in payloads:
            for save, contents in ((pickle.dump, payload), (torch.save, {"kind": payload})):
                with path.open("wb") as file:
                    save(contents, file)
                outcomes.append(refused(call) and not mark.exists())
        report(f"malicious pickles: {place}", outcomes)
        outcomes = []
        for _ in range(10):
            path.write_bytes(whole[: random.randrange(len(whole))])
            outcomes.append(refused(call))
        contents = torch.load(io.BytesIO(whole), weights_only=True)
        networks = [value for value in contents.values() if isinstance(value, dict) and "features.0.weight" in value]
        networks += [contents["generator"]] if "generator" in contents else []
        networks += [contents["parameters"]] if contents["kind"] == "generator" else []
        tensors = [(network, next(iter(network))) for network in networks]
        tensors += [(contents, "log_probabilities")] if contents["kind"] == "targets" else []
        for foreign in ({}, [1, 2], {"kind": contents["kind"]}, {**contents, "kind": "other"}, {"state_dict": contents}):
            torch.save(foreign, path)
            outcomes.append(refused(call))
        for holder, name in tensors:
            whole_tensor = holder[name]
            for changed in (torch.full_like(whole_tensor, torch.nan), whole_tensor[:1], None):
                holder[name] = changed
                torch.save(contents, path)
                outcomes.append(refused(call))
            holder[name] = whole_tensor
        report(f"damaged and foreign files: {place}", outcomes)
        path.write_bytes(whole)


def settings(_: Path) -> None:
    from hypothesis import HealthCheck, given
    from hypothesis import settings as of_hypothesis
    from hypothesis import strategies as some

    types = (
        Settings,
        train.TrainSettings,
        testing.TestSettings,
        predict.PredictSettings,
        bench.BenchSettings,
        gan.GanSettings,
        train_eval.TransferSettings,
        tune.TuneSettings,
    )
    keys = sorted({key for kind in types for key in kind.model_fields})
    values = some.one_of(
        some.text(max_size=20),
        some.integers().map(str),
        some.floats().map(str),
        some.sampled_from(["true", "false", "", "nan", "inf", "1e999", "hflip:2", "gan:", "shift:1,,", "None", "[1]", "{}"]),
    )
    words = some.one_of(
        some.tuples(some.one_of(some.sampled_from(keys), some.text(max_size=12)), values).map("=".join), some.text(max_size=20)
    )
    outcomes = []

    @of_hypothesis(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(some.sampled_from(types), some.lists(words, max_size=4))
    def try_one(kind: type[Settings], line: list[str]) -> None:
        try:
            outcomes.append(isinstance(load_settings(line, kind), kind))
        except UserError as error:
            outcomes.append(bool(str(error)))
        except SystemExit as end:
            outcomes.append(end.code == 0)  # help
        except Exception:
            print(line, file=sys.stderr)
            traceback.print_exc()
            outcomes.append(False)

    try_one()
    report("generated command lines", outcomes)


def images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    pixels[10:50, 10:40] //= 8
    originals = {}
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        originals[kind] = buffer.getvalue()

    def trial(path: Path) -> bool:
        started = time.perf_counter()
        try:
            photo.read_photographs([path])
        except UserError as error:
            if "\n" in str(error):
                return False
        except Exception:
            traceback.print_exc()
            return False
        return time.perf_counter() - started < 10

    outcomes = []
    for number in range(1000):
        kind, contents = list(originals.items())[number % 6]
        changed = bytearray(contents)
        for _ in range(random.choice((1, 1, 3, 20))):
            changed[random.randrange(min(len(changed), random.choice((40, 10**6))))] = random.randrange(256)
        if number % 5 == 0:
            del changed[random.randrange(len(changed)) :]
        path = folder / f"{number}.{kind.lower()}"
        path.write_bytes(changed)
        outcomes.append(trial(path))
    report("mutated image files", outcomes)
    outcomes = []
    for name in (
        "with a space.png",
        "größe-靴.png",
        "-dash.png",
        ".hidden.png",
        "a=b.png",
        "%41.png",
        "$1.png",
        "caf\udce9.png",
    ):
        (folder / name).write_bytes(originals["PNG"])
        outcomes.append(trial(folder / name))
    report("odd file names", outcomes)
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    (folder / "bomb.png").write_bytes(buffer.getvalue())
    large = Image.new("RGBA", (7_000, 7_000), "white")
    large.paste("black", (2_000, 3_000, 5_000, 4_000))
    large.save(folder / "large.png")
    large.convert("P").save(folder / "palette.png", transparency=0)
    large.convert("1").save(folder / "scan.png")
    Image.fromarray(np.asarray(large.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    shutil.copyfile(ROOT / "best_model.pt", folder / "best_model.pt")
    peaks = []
    for name in ("bomb.png", "large.png", "palette.png", "scan.png", "deep.png"):
        words = [str(folder / name), f"out_dir={folder}"]
        code = (
            f"import config, predict\ntry: predict.main({words!r})\nexcept config.UserError: pass\n"
            "print(open('/proc/self/status').read())"
        )
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        peak = told.stdout.partition("VmHWM:")[2].split()  # KB; nothing after a traceback
        peaks.append(told.returncode == 0 and int(peak[0]) < 1024**2)
    report("images of very many pixels, within 1 GB", peaks)


def bits(folder: Path) -> None:
    for threads in (1, 2):
        outcomes = []
        for recipe in ["", *sorted(path.stem for path in (ROOT / "recipes").glob("*.json"))]:
            found = []
            for again in ("a", "b"):
                out = folder / f"{recipe} {threads} {again}"
                words = [f"recipe={recipe}", "limit=600", "epochs=2", "valid_ratio=0.02", f"out_dir={out}"]
                script = ["gan.py", "train"] if recipe == "gan" else ["train.py", "runs=1"]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                command = [sys.executable, *script, *words]
                subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
                if recipe == "gan":
                    parameters = checkpoint.load(out / "generator.pt", "generator")["parameters"]
                    found.append([tensor.numpy().tobytes() for tensor in parameters.values()])
                else:
                    found.append(saved_bits(out))
            outcomes.append(found[0] == found[1])
        report(f"two processes, {threads} thread{'s' * (threads > 1)}, every recipe", outcomes)


PARTS = (kills, saves, disk, data, checkpoints, settings, images, bits)


def main(names: list[str]) -> None:
    known = {part.__name__: part for part in PARTS}
    if set(names) - known.keys():
        raise UserError(f"{' '.join(set(names) - known.keys())}: there is no such part; known: {', '.join(known)}")
    torch.set_num_threads(1)  # the forked processes then need no other thread of this one
    random.seed(0)
    for name in names or known:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            known[name](Path(folder))
    lost = sum(tried - survived for _, tried, survived in rows)
    print(json.dumps({"tried": sum(tried for _, tried, _ in rows), "lost": lost}))
    if lost:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
