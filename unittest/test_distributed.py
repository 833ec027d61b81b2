"""Several processes that train one model.

As a script, in two processes, this file trains in double precision and writes the losses. With settings of two runs besides, it
trains the first and, until the second process dies in the third epoch, the second, which it resumes when it is started again:
`PYTHONPATH=. torchrun unittest/test_distributed.py LOSSES.json "key=value ..." ["key=value ..." "key=value ..."]`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import distributed
import train
from config import ROOT, RunSettings, TrainSettings, UserError
from data_preprocessing import Split, load_splits
from run import Run
from script import load_settings, run_script
from trainer import Trainer

# without batch normalisation, whose statistics are those of a shard on CPUs; shards of 32 and 31 images
IN_DOUBLE = (
    "recipe=compact_cnn precision=float32 device=cpu batch_size=63 limit=400 epochs=3 valid_ratio=0.001 optimizer=sgd lr=0.01 "
    "schedule=linear label_smoothing=0.1 aux_loss_weight=0.5 ema_decay=0.9 first_epoch_fraction=0.5 hard_fraction=0.4 "
    "augment=hflip,erase:0.5"
)
RESUMED = "architecture=compact_cnn batch_norm=true ema_decay=0.9 dropout=0.2 limit=400 valid_ratio=0.001 epochs=4"


def torchrun(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextlib.contextmanager
def in_double():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def losses_in_double(words: str) -> list[list[float]]:
    """Training and validation loss of each epoch."""
    settings = load_settings(words.split(), TrainSettings)
    with in_double():
        split = load_splits(settings, distributed.init(torch.device("cpu")))[0]
        trainer, lines = Trainer(settings, settings.seed, split, torch.float32), []
        for epoch in range(1, settings.epochs + 1):
            lines.append(trainer.run_epoch(epoch, lines))
    return [[line["train_loss"], line["valid_loss"]] for line in lines]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The losses of IN_DOUBLE in one process and in two; the folders of RESUMED in two, without a disturbance and with a
    worker that is killed; what the latter printed."""
    folder, killed = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("killed")
    words = [str(folder / "losses.json"), IN_DOUBLE, *(f"{RESUMED} out_dir={out}" for out in (folder, killed))]
    with torchrun("--max-restarts=3", __file__, *words) as process:
        alone = losses_in_double(IN_DOUBLE)
        output, errors = process.communicate()
    assert process.returncode == 0, errors[:6000]
    return alone, json.loads((folder / "losses.json").read_text()), folder, killed, output


def test_two_processes_have_the_losses_of_one(two_processes):
    alone, together, *_ = two_processes
    assert together == [pytest.approx(losses, rel=1e-9) for losses in alone]


def run_state(out):
    """What is to be bitwise identical."""
    state = checkpoint.load(out / "checkpoint.pt", "checkpoint")
    lines = [{**line, "seconds": 0} for line in state["history"]]
    return lines, [tensor.numpy().tobytes() for part in ("model", "ema") for tensor in state[part].values()]


def test_a_killed_worker_is_replaced_and_the_run_is_bitwise_identical(two_processes):
    _, _, whole, killed, output = two_processes
    assert output.count("settings:") == 3 and "starts over" not in output  # the processes started again, and resumed
    assert len(run_state(killed)[0]) == 4 and run_state(killed) == run_state(whole)


def test_processes_have_random_numbers_of_their_own(two_processes):
    states = checkpoint.load(two_processes[2] / "checkpoint.pt", "checkpoint")["rng"]["torch"]
    assert len(states) == 2 and not states[0].equal(states[1])  # of dropout


def test_a_batch_of_fewer_images_than_processes_is_refused(dataset, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="2 processes can't share a batch of 1;"):
        Trainer(TrainSettings(batch_size=1), 0, Split(dataset, torch.arange(10), torch.arange(10)), torch.float32)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes, but 1 GPU here"):
        distributed.init(torch.device("cuda"))


@pytest.mark.parametrize(("job", "epochs"), [(None, 0), ("own", 1), ("another", 0)])
def test_a_restart_resumes_from_a_checkpoint_of_its_own_job_only(job, epochs, tmp_path, monkeypatch):
    settings = load_settings(["limit=100", "epochs=1", "valid_ratio=0.001", f"out_dir={tmp_path}"], RunSettings)
    if job:  # None: the first worker died before it could save
        monkeypatch.setattr(distributed, "job_id", lambda: job)
        monkeypatch.setattr("plots.draw_curves", lambda *_: None)
        train.main(["limit=100", "epochs=1", "valid_ratio=0.001", f"out_dir={tmp_path}"])
    monkeypatch.setattr(distributed, "job_id", lambda: "own")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert len(Run(Trainer, settings, [], {}).history) == epochs


def is_first_start() -> bool:
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def run_epoch_or_die(trainer: Trainer, epoch: int, epochs: list[dict]) -> dict:
    if epoch == 3 and distributed.rank() == 1 and is_first_start():
        os.kill(os.getpid(), signal.SIGKILL)
    return run_epoch(trainer, epoch, epochs)


if __name__ == "__main__":
    path, double, *runs = sys.argv[1:]
    if is_first_start():
        checkpoint.write_atomically(Path(path), json.dumps(losses_in_double(double)).encode())
        for whole in runs[:1]:
            train.main(whole.split())
    run_epoch, Trainer.run_epoch = Trainer.run_epoch, run_epoch_or_die
    for killed in runs[1:]:
        run_script(
            train.main, killed.split()
        )  # as train.py ends; torch's threads sometimes abort a process that takes its time
