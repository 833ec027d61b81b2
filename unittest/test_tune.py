"""Hyperparameter search: resumes, keeps given settings fixed, writes a recipe, survives a killed worker."""

import contextlib
import io
import json
import multiprocessing
import signal
import time
from multiprocessing.process import BaseProcess

import optuna
import pytest
import torch

from config import TrainSettings, UserError, parse_augment
from script import load_settings
from tools import tune

LOWEST = (1e-4, 64, 5, 1e-5, 0.0, 0.0, 0, 0.0)  # as SEARCH lists them
HIGHEST = (3e-2, 512, 30, 1e-1, 0.5, 0.5, 3, 0.5)
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
    trials = tune.open_study(search[0] / "trials.log", "fast").get_trials()
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
    drawn = tune.draw(optuna.trial.FixedTrial(dict(zip(tune.SEARCH, LOWEST))), {"lr", "augment"})
    assert set(drawn) == {name for name in tune.SEARCH if not name.startswith("augment.")} - {"lr"}


@pytest.mark.parametrize(("ends", "augment"), [(LOWEST, {}), (HIGHEST, {"hflip": 0.5, "shift": 3, "erase": 0.5})])
def test_the_ends_of_the_search_space_are_valid_settings(ends, augment):
    drawn = tune.draw(optuna.trial.FixedTrial(dict(zip(tune.SEARCH, ends))), set())
    settings = load_settings([f"{name}={value}" for name, value in drawn.items()], TrainSettings)
    assert parse_augment(settings.augment) == augment


@pytest.mark.parametrize("contents", [b"nonsense\n", b"\xff\n", b"{}\n", b"[1]\n"])
def test_a_foreign_file_of_trials_is_refused_in_one_line(contents, tmp_path):
    (tmp_path / "trials.log").write_bytes(contents)
    with pytest.raises(UserError, match=r"trials\.log: is no file of trials") as refused:
        tune.main([*SHORT, "trials=1", f"out_dir={tmp_path}"])
    assert "\n" not in str(refused.value)


def test_workers_share_a_folder_also_with_one_that_is_killed(tmp_path):
    def words(trials: int) -> list[str]:
        return [*SHORT, "device=cpu", f"out_dir={tmp_path}", f"trials={trials}"]

    def work(trials: int, hangs: bool) -> None:
        torch.set_num_threads(1)  # a forked process has none of its parent's
        if hangs:
            tune.Trainer = lambda *_: time.sleep(600)
        tune.main(words(trials))

    def start(trials: int, hangs: bool = False) -> BaseProcess:
        worker = multiprocessing.get_context("fork").Process(target=work, args=(trials, hangs))
        worker.start()
        return worker

    def states() -> list[str]:
        path = tmp_path / "trials.log"
        return [trial.state.name for trial in tune.open_study(path, "fast").get_trials()] if path.exists() else []

    workers = [start(100, hangs=True), start(6)]
    while not states():
        assert workers[0].is_alive()
        time.sleep(0.2)
    tune.main(words(6))
    workers[0].kill()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0]
    tune.main(words(9))
    assert states().count("RUNNING") == 1 and sum(state in ("COMPLETE", "PRUNED") for state in states()) == 9
