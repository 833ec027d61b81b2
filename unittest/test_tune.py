"""The search: it goes on where it ended, keeps what is given, and ends with a recipe."""

import json

import optuna
import pytest

import tune
from config import SEARCH, Settings, UserError, load_settings, parse_augment

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


def test_settings_given_on_the_command_line_are_not_searched():
    trial = optuna.trial.FixedTrial({name: space[0] for name, space in SEARCH.items()})
    chosen = tune.draw(trial, {"lr", "augment"})
    assert set(chosen) == {name for name in SEARCH if not name.startswith("augment.")} - {"lr"}


def test_everything_in_the_search_space_is_a_valid_setting():
    for end in (0, -1):
        chosen = tune.draw(optuna.trial.FixedTrial({name: space[end] for name, space in SEARCH.items()}), set())
        settings = load_settings([f"{name}={value}" for name, value in chosen.items()])
        assert parse_augment(settings.augment) == ({} if end == 0 else {"hflip": 0.5, "shift": 3, "erase": 0.5})


def test_a_storage_that_cannot_be_opened_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="storage=nonsense: can't be opened"):
        tune.main([*SHORT, "storage=nonsense", f"out_dir={tmp_path}"])
