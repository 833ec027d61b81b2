"""The search: it goes on where it ended, keeps what is given, and ends with a recipe."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest

import tune
from config import ROOT, Settings, UserError, load_settings, parse_augment

SHORT = ["recipe=fast", "limit=300", "epochs=2", "valid_ratio=0.02"]


def test_a_search_goes_on_until_it_has_its_trials_and_writes_a_recipe(tmp_path, capsys):
    words = [*SHORT, "batch_size=64", f"out_dir={tmp_path}"]
    tune.main([*words, "trials=2"])
    tune.main([*words, "trials=5"])
    told = capsys.readouterr().out
    assert all(told.count(f"trial {number}:") == 1 for number in range(5)) and "best of 5:" in told
    recipe = json.loads((tmp_path / "best.json").read_text())
    assert (recipe["batch_size"], recipe["epochs"], recipe["architecture"]) == (64, 2, "fast_cnn")
    assert Settings(**recipe).lr == recipe["lr"] and not {"recipe", "limit", "out_dir"} & recipe.keys()
    assert (tmp_path / "plots" / "search.png").exists()
    trials = tune.open_study(f"sqlite:///{tmp_path / 'tune.db'}", tune.TuneSettings(recipe="fast")).get_trials()
    assert len({str(trial.params) for trial in trials}) == 5  # none is drawn again


def test_a_search_without_a_finite_loss_ends_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no trial has ended with a finite loss"):
        tune.main([*SHORT, "lr=1e30", "batch_size=285", "trials=2", f"out_dir={tmp_path}"])


def test_settings_given_on_the_command_line_are_not_searched():
    trial = optuna.trial.FixedTrial({name: space[0] for name, space in tune.SEARCH.items()})
    chosen = tune.draw(trial, {"lr", "augment"})
    assert set(chosen) == {name for name in tune.SEARCH if not name.startswith("augment.")} - {"lr"}


def test_everything_in_the_search_space_is_a_valid_setting():
    for end in (0, -1):
        chosen = tune.draw(optuna.trial.FixedTrial({name: space[end] for name, space in tune.SEARCH.items()}), set())
        settings = load_settings([f"{name}={value}" for name, value in chosen.items()], Settings)
        assert parse_augment(settings.augment) == ({} if end == 0 else {"hflip": 0.5, "shift": 3, "erase": 0.5})


def test_trials_of_other_settings_are_not_ranked_together(tmp_path):
    tune.main([*SHORT, "trials=1", f"out_dir={tmp_path}"])
    with pytest.raises(UserError, match=r"its trials were made with .*limit=300"):
        tune.main([*SHORT, "limit=400", "trials=2", f"out_dir={tmp_path}"])


def test_a_storage_that_cannot_be_opened_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="storage=nonsense: can't be opened"):
        tune.main([*SHORT, "storage=nonsense", f"out_dir={tmp_path}"])


@pytest.fixture
def postgres():
    """The URL of a PostgreSQL server, started for the test."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs or not importlib.util.find_spec("psycopg"):
        pytest.skip("needs Debian's package postgresql and Python's psycopg[binary]")
    folder = tempfile.mkdtemp()
    user = {}
    if os.geteuid() == 0:  # PostgreSQL doesn't run as root
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    own = ["-p", port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    initdb, database = programs[-1], f"{folder}/database"
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    subprocess.run([initdb, "-D", database, "-U", "tuner", "-A", "trust", "--no-sync"], check=True, **options)
    with subprocess.Popen([initdb.with_name("postgres"), "-D", database, *own], **options) as server:
        while subprocess.run([initdb.with_name("pg_isready"), "-h", "127.0.0.1", "-p", port], **options).returncode:
            assert server.poll() is None
            time.sleep(0.1)
        yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        server.send_signal(signal.SIGINT)
    shutil.rmtree(folder)


def test_four_workers_share_a_server_and_what_a_killed_one_was_at_is_done_by_another(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "HEARTBEAT", 1)
    told = "import sys, tune; tune.HEARTBEAT = 1; {}; tune.run_script(tune.main)"

    def start(number: int, patch: str = "") -> subprocess.Popen:
        own = [f"storage={postgres}", f"out_dir={tmp_path / str(number)}"]
        command = [sys.executable, "-c", told.format(patch or "pass"), *SHORT, *own, "trials=8"]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def trials() -> list[optuna.trial.FrozenTrial]:
        return tune.open_study(postgres, tune.TuneSettings(recipe="fast")).get_trials()

    workers = [start(0, "tune.is_over = lambda *_: False")]  # so that it will be at its trial
    workers += [start(number) for number in (1, 2, 3)]
    while not any(str(workers[0].pid) in trial.user_attrs.get("worker", "") for trial in trials()):
        assert workers[0].poll() is None
        time.sleep(0.2)
    workers[0].kill()
    for worker in workers:
        worker.wait()
    time.sleep(3 * tune.HEARTBEAT)
    tune.main([*SHORT, "trials=20", f"storage={postgres}", f"out_dir={tmp_path / '4'}"])

    ended = trials()
    failed = [trial for trial in ended if trial.state.name == "FAIL"]
    again = [trial for trial in ended if trial.system_attrs.get("failed_trial") == failed[0].number]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    assert len(failed) == 1 and str(workers[0].pid) in failed[0].user_attrs["worker"]
    assert len(again) == 1 and again[0].state.is_finished() and again[0].params == failed[0].params
    assert len({trial.user_attrs["worker"] for trial in ended}) == 5
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in ended) == len(ended) - 1 == 20
