"""Hyperparameter search: resumes, keeps given settings fixed, writes a recipe, survives a killed worker."""

import contextlib
import importlib.util
import io
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

from config import ROOT, TrainSettings, UserError, parse_augment
from script import load_settings
from tools import tune

SHORT = ["recipe=fast", "limit=300", "epochs=2", "valid_ratio=0.005"]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """The folder and the output of a search in two calls, of two and then of five trials in total."""
    out = tmp_path_factory.mktemp("search")
    words = [*SHORT, "batch_size=64", f"out_dir={out}"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        tune.main([*words, "trials=2"])
        tune.main([*words, "trials=5"])
    return out, output.getvalue()


def test_a_second_call_continues_until_there_are_the_given_trials(search):
    assert all(search[1].count(f"trial {number}:") == 1 for number in range(5))
    assert search[1].count("trial ") == 5 and "best of 5:" in search[1]


def test_a_second_call_draws_no_settings_again(search):
    trials = tune.open_study(f"sqlite:///{search[0] / 'tune.db'}", "fast").get_trials()
    assert len({str(trial.params) for trial in trials}) == 5


def test_the_best_settings_are_written_as_a_recipe(search):
    recipe = json.loads((search[0] / "best.json").read_text())
    assert (recipe["batch_size"], recipe["epochs"], recipe["architecture"]) == (64, 2, "fast_cnn")
    assert TrainSettings(**recipe).lr == recipe["lr"] and not {"recipe", "limit", "out_dir"} & recipe.keys()


def test_the_recipe_has_only_settings_that_differ_from_the_defaults(search):
    recipe, defaults = json.loads((search[0] / "best.json").read_text()), TrainSettings().model_dump()
    assert not {key for key, value in recipe.items() if value == defaults[key]}


def test_the_search_is_drawn(search):
    assert (search[0] / "plots" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_trials_of_other_settings_are_not_ranked_together(search):
    with pytest.raises(UserError, match=r"has trials made with .*limit=300"):
        tune.main([*SHORT, "batch_size=64", "limit=400", "trials=6", f"out_dir={search[0]}"])


def test_a_search_without_a_finite_loss_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no trial has ended with a finite loss"):
        tune.main([*SHORT, "lr=1e30", "batch_size=285", "trials=2", f"out_dir={tmp_path}"])


def test_given_settings_are_not_searched():
    trial = optuna.trial.FixedTrial({name: space[0] for name, space in tune.SEARCH.items()})
    drawn = tune.draw(trial, {"lr", "augment"})
    assert set(drawn) == {name for name in tune.SEARCH if not name.startswith("augment.")} - {"lr"}


@pytest.mark.parametrize(("end", "augment"), [(0, {}), (-1, {"hflip": 0.5, "shift": 3, "erase": 0.5})])
def test_the_ends_of_the_search_space_are_valid_settings(end, augment):
    drawn = tune.draw(optuna.trial.FixedTrial({name: space[end] for name, space in tune.SEARCH.items()}), set())
    settings = load_settings([f"{name}={value}" for name, value in drawn.items()], TrainSettings)
    assert parse_augment(settings.augment) == augment


def test_a_storage_that_cannot_be_opened_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="storage=nonsense: can't be opened") as refused:
        tune.main([*SHORT, "storage=nonsense", f"out_dir={tmp_path}"])
    assert "\n" not in str(refused.value)


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


def test_workers_share_a_server_and_retry_the_trial_of_a_killed_one(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "HEARTBEAT", 1)
    code = "import time; from tools import tune; tune.HEARTBEAT = 1; {}; tune.run_script(tune.main)"

    def words(number: int, trials: int) -> list[str]:
        return [*SHORT, f"storage={postgres}", f"out_dir={tmp_path / str(number)}", f"trials={trials}"]

    def start(number: int, trials: int, patch: str = "pass") -> subprocess.Popen:
        command = [sys.executable, "-c", code.format(patch), *words(number, trials)]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def trials() -> list[optuna.trial.FrozenTrial]:
        return tune.open_study(postgres, "fast").get_trials()

    workers = [start(0, 100, "tune.Trainer = lambda *_: time.sleep(600)"), start(1, 6)]  # the first one's trial never ends
    while not any(str(workers[0].pid) in trial.user_attrs.get("worker", "") for trial in trials()):
        assert workers[0].poll() is None
        time.sleep(0.2)
    workers[0].kill()
    silent_until = time.monotonic() + 3 * tune.HEARTBEAT + 1
    tune.main(words(2, 6))
    assert [worker.wait() for worker in workers] == [-signal.SIGKILL, 0]
    time.sleep(max(0, silent_until - time.monotonic()))
    tune.main(words(2, 9))

    ended = trials()
    failed = [trial for trial in ended if trial.state.name == "FAIL"]
    assert [trial.user_attrs["worker"].split()[-1] for trial in failed] == [str(workers[0].pid)]
    again = [trial for trial in ended if trial.system_attrs.get("failed_trial") == failed[0].number]
    assert len(again) == 1 and again[0].state.is_finished() and again[0].params == failed[0].params
    assert len({trial.user_attrs["worker"] for trial in ended}) == 3
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in ended) == len(ended) - 1 == 9
