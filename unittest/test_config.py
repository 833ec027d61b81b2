"""Settings: where they come from, and how wrong ones are refused."""

import json
import shlex
import subprocess
import sys

import pytest

import config
import explore
import predict
import teach
import test as test_script
from config import Settings, UserError, load_settings, parse_augment
from transfer import train_eval


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 3, "lr": 0.5, "seed": 7}))
    (tmp_path / "recipes" / "quick.json").write_text(json.dumps({"epochs": 2, "lr": 0.25}))
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return tmp_path


def test_command_line_wins_over_recipe_over_config_over_defaults(root):
    settings = load_settings(["recipe=quick", "lr=1"], Settings)
    assert (settings.lr, settings.epochs, settings.seed, settings.patience) == (1.0, 2, 7, 0)


def test_out_dir_is_the_root_for_task_1_and_runs_name_for_a_recipe(root):
    assert load_settings([], Settings).out_path == root
    assert load_settings(["recipe=quick"], Settings).out_path == root / "runs" / "quick"
    assert load_settings(["out_dir=here"], Settings).out_path == root / "here"


def test_the_home_of_nobody_is_refused_in_a_line():
    with pytest.raises(UserError, match="~nosuch/x: there is no user ~nosuch"):
        config.resolve("~nosuch/x")


def test_the_value_is_all_after_the_first_equals_sign(root):
    assert load_settings(["data_dir=a=b"], Settings).data_dir == "a=b"


def test_a_recipes_mistake_is_told_with_the_file_that_has_it(root):
    for settings, told in (({"epochs": "one"}, "recipes/quick.json: epochs=one"), ({"recipe": "fast"}, "names a recipe")):
        (root / "recipes" / "quick.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=told):
            load_settings(["recipe=quick"], Settings)


@pytest.mark.parametrize("script", [test_script, predict, teach, explore, train_eval], ids=lambda script: script.__name__)
def test_a_script_that_trains_no_network_refuses_the_settings_of_training(script):
    with pytest.raises(UserError, match=r"lr=0\.1: means nothing here"):
        script.main(["lr=0.1"])


@pytest.mark.parametrize(
    "word, told",
    [
        ("batchsize=3", "'batch_size'"),
        ("batch_size=0", "greater than or equal to 1"),
        ("batch_size=2.5", "valid integer"),
        ("batch_size=", "valid integer"),
        ("batch_size=true", "valid integer"),
        ("lr=-1", "greater than 0"),
        ("dropout=-0.5", "a probability, or -1"),
        ("lr=nan", "finite"),
        ("valid_ratio=1", "less than 1"),
        ("schedule=cosin", "cosine"),
        ("output_dim=3", "2 or 10"),
        ("device=tpu", "cpu"),
        ("data_dir=", "at least 1"),
        ("augment=hflp", "known: hflip"),
        ("augment=hflip:2", "0 to 1"),
        ("augment=shift:x", "no number"),
        ("augment=shift:0.5", "whole pixels"),
        ("recipe=none", "known: quick"),
        ("folds=1", "one fold"),
        ("pretrained=true", "resnet18"),
        ("architecture=resnet", "resnet8"),
        ("fast", "key=value"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(root, word, told):
    with pytest.raises(UserError) as refused:
        load_settings([word], Settings)
    assert told in str(refused.value) and word.split("=")[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_runs_and_folds_exclude_each_other(root):
    with pytest.raises(UserError, match="runs=2 and folds=3: choose one"):
        load_settings(["runs=2", "folds=3"], Settings)


@pytest.mark.parametrize("path", sorted((config.ROOT / "recipes").glob("*.json")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_only_what_differs(path):
    settings = load_settings([f"recipe={path.stem}"], Settings)
    shipped = json.loads((config.ROOT / "config.json").read_text())
    own = json.loads(path.read_text())
    assert settings.output_dim == 10
    assert not {key for key, value in own.items() if shipped[key] == value}


def test_config_json_has_every_setting_at_its_default():
    assert json.loads((config.ROOT / "config.json").read_text()) == Settings().model_dump(exclude={"recipe", "out_dir"})


def test_a_broken_config_file_is_refused_by_name(root):
    (root / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_settings([], Settings)


def test_an_unknown_key_in_a_recipe_is_refused(root):
    (root / "recipes" / "quick.json").write_text('{"learning": 1}')
    with pytest.raises(UserError, match="'learning'"):
        load_settings(["recipe=quick"], Settings)


def test_augmentations_have_default_strengths():
    assert parse_augment("hflip, shift:3") == {"hflip": 0.5, "shift": 3.0}
    assert parse_augment("") == {}


def test_printed_settings_are_words_that_give_them_again():
    settings = load_settings(["recipe=mlp", "out_dir=my runs", "pretrained=false", "augment=hflip:0.5,shift"], Settings)
    assert load_settings(shlex.split(str(settings)), Settings) == settings


def test_help_names_every_setting_as_the_recipe_has_it(root, capsys):
    with pytest.raises(SystemExit) as ended:
        load_settings(["help", "recipe=quick"], Settings)
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"\n{key}=" in shown for key in config.Settings.model_fields)
    assert "\nepochs=2  (int, >= 1, <= 100000)\n" in shown


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        config.run_script(lambda words: load_settings(words, Settings), ["nonsense=1"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1


def test_the_shipped_config_is_valid_and_settings_need_no_torch():
    code = "import sys, config; config.load_settings([], config.Settings); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0
