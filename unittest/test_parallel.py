"""Several processes that train one network. As a script, this file writes the losses of the first 50 steps of trainings:
`PYTHONPATH=. torchrun unittest/test_parallel.py LOSSES.json "key=value ..."`; with the word `double` in float64."""

import contextlib
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
import train
from config import ROOT, Settings, UserError, load_settings
from data_preprocessing import load_images, split_indices
from stopping import Stopped
from training import Training

STEPS = 50
TRAININGS = (  # with statistics of the batch, and a loss of several parts; in float32 the second would part by some per cent
    "precision=float32 device=cpu recipe=resnet8 optimizer=sgd lr=0.0003 batch_size=62 label_smoothing=0.1 auxiliary=0.5 "
    "augment=hflip,erase:0.5",
    "precision=float32 device=cpu architecture=compact_cnn batch_norm=true batch_size=32 double",
)


def torchrun(*words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@contextlib.contextmanager
def in_double():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def first_losses(words: str) -> list[float]:
    if "double" in words:
        with in_double():
            return first_losses(words.replace("double", ""))
    settings = load_settings(words.split(), Settings)
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
    with torchrun(__file__, str(tmp_path / "losses.json"), *TRAININGS) as process:
        alone = [first_losses(words) for words in TRAININGS]
        _, errors = process.communicate()
    assert process.returncode == 0, errors[:6000]
    together = json.loads((tmp_path / "losses.json").read_text())
    assert together[0] == pytest.approx(alone[0], rel=1e-4)
    assert together[1] == pytest.approx(alone[1], rel=1e-9)


def test_a_batch_of_fewer_images_than_processes_is_refused(train_data, monkeypatch):
    train, valid = split_indices(train_data[1], 0.1, 0)
    state = Training(load_settings(["batch_size=1"], Settings), 0, *train_data, train[:10], valid[:10], torch.float32)
    monkeypatch.setattr(parallel, "count", lambda: 2)
    with pytest.raises(UserError, match="2 processes can't share a batch of 1;"):
        state.train_epoch(1, [])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes, but 1 GPU here"):
        parallel.start(torch.device("cuda"))


def test_a_restart_goes_on_from_a_checkpoint_of_its_own_job_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(parallel, "job", lambda: "one")
    words = ["limit=600", "valid_ratio=0.02", f"out_dir={tmp_path}"]
    assert not train.was_restarted(tmp_path)  # the first worker died before it could save
    train.main([*words, "epochs=1"])
    assert train.was_restarted(tmp_path)
    monkeypatch.setattr(parallel, "job", lambda: "another")
    assert not train.was_restarted(tmp_path)


def test_a_killed_worker_is_replaced_and_the_end_is_the_same(tmp_path):
    words = ["train.py", "recipe=compact_cnn", "average=0.9", "dropout=0.2", "limit=600", "epochs=4", "patience=0"]
    outs = [tmp_path / "undisturbed", tmp_path / "killed"]
    running = [torchrun("--max-restarts=3", *words, f"out_dir={out}", cwd=ROOT) for out in outs]
    disturbed = running[1]
    while not (outs[1] / "history.jsonl").exists() and disturbed.poll() is None:
        time.sleep(0.01)
    workers = Path(f"/proc/{disturbed.pid}/task/{disturbed.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [out.count("settings:") for out, _ in said] == [1, 2]  # the processes had to begin again
    ends = []
    for out in outs:
        state = checkpoint.load(out / "checkpoint.pt", "checkpoint")
        lines = [{**line, "seconds": 0} for line in state["history"]]
        ends.append((lines, [tensor.numpy().tobytes() for tensor in state["parameters"].values()]))
    assert len(ends[0][0]) == 4
    assert ends[0] == ends[1]


if __name__ == "__main__":
    losses = [first_losses(words) for words in sys.argv[2:]]
    checkpoint.write_atomically(Path(sys.argv[1]), json.dumps(losses).encode())
    torch.distributed.destroy_process_group()
