"""Several processes that train one network. As a script, `torchrun unittest/test_parallel.py LOSSES.json key=value ...`,
this file writes the losses of a training's first 50 steps; with the word `double` all arithmetic is in float64."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import parallel
from config import ROOT, Settings, load_settings
from data_preprocessing import load_images, split_indices
from stopping import Stopped
from training import Training

STEPS = 50
WORDS = [  # a network with statistics of the batch, and a loss of several parts
    *("recipe=resnet8", "batch_size=62", "label_smoothing=0.1", "auxiliary=0.5", "augment=hflip,erase:0.5"),
    *("optimizer=sgd", "lr=0.0003", "precision=float32", "device=cpu"),
]


def torchrun(*words: str, processes: int = 2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def first_losses(words: list[str]) -> list[float]:
    settings = load_settings(words, Settings)
    device = parallel.start(torch.device("cpu"))
    images, garments = load_images("train", settings.data_path)
    train, valid = split_indices(garments, settings.valid_ratio, settings.seed)
    training = Training(settings, settings.seed, images, garments, train, valid, torch.float32)
    sums = [0.0]

    def check() -> None:
        sums.append(training.partial["sums"][1].item())
        if len(sums) > STEPS:
            raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):
        training.train_epoch(1, [], check)
    assert device.type == "cpu"
    return [after - before for before, after in itertools.pairwise(sums)]


def test_two_processes_go_through_the_losses_of_one(tmp_path):
    with torchrun(__file__, str(tmp_path / "losses.json"), *WORDS) as process:
        alone = first_losses(WORDS)
        _, errors = process.communicate()
    assert process.returncode == 0, errors[:6000]
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(alone, rel=1e-4)


def test_in_double_precision_the_losses_are_the_same(tmp_path):
    # in float32, rounding would grow to some per cent in 50 steps
    words = ["double", "batch_size=64", "precision=float32", "device=cpu", "architecture=compact_cnn", "batch_norm=true"]
    running = [torchrun(__file__, str(tmp_path / f"{count}.json"), *words, processes=count) for count in (1, 2)]
    errors = [process.communicate()[1][:6000] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert two == pytest.approx(one, rel=1e-9)


def test_a_killed_worker_is_replaced_and_the_end_is_the_same(tmp_path):
    words = ["train.py", "recipe=compact_cnn", "average=0.9", "dropout=0.2", "limit=600", "epochs=4", "patience=0"]
    ends = []
    for name in ("undisturbed", "killed"):
        out = tmp_path / name
        with torchrun("--max-restarts=3", *words, f"out_dir={out}", cwd=ROOT) as process:
            if name == "killed":
                while not (out / "history.jsonl").exists() and process.poll() is None:
                    time.sleep(0.01)
                workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(workers[-1]), signal.SIGKILL)
            said, errors = process.communicate()
        assert process.returncode == 0, errors[:6000]
        state = checkpoint.load(out / "checkpoint.pt", "checkpoint")
        lines = [{**line, "seconds": 0} for line in state["history"]]
        ends.append((lines, [tensor.numpy().tobytes() for tensor in state["parameters"].values()]))
    assert said.count("settings:") == 2 and len(ends[0][0]) == 4  # the processes had to begin again
    assert ends[0] == ends[1]


if __name__ == "__main__":
    words = sys.argv[2:]
    if "double" in words:
        words.remove("double")
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    losses = first_losses(words)
    checkpoint.write_atomically(Path(sys.argv[1]), json.dumps(losses).encode())
    torch.distributed.destroy_process_group()
