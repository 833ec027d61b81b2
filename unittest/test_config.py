"""Settings: types, ranges, neutral defaults, config.json and recipes, the command line."""

import json
import re
import shlex
import subprocess
import sys

import pytest

import config
import explore
import predict
import test as test_script
from config import ModelFileSettings, RunSettings, Settings, TrainSettings, UserError, parse_augment
from gan import sample as gan_sample
from gan import score as gan_score
from gan import train as gan_train
from script import load_settings
from tools import bench, soft_targets, tune
from transfer import last_layer, train_eval

RECIPES = sorted((config.ROOT / "recipes").glob("*.json"))
WITHOUT_TRAINING = [test_script, predict, explore, soft_targets, train_eval, gan_sample, gan_score]
EVERY_TYPE = [
    RunSettings,
    test_script.TestSettings,
    predict.PredictSettings,
    explore.ExploreSettings,
    last_layer.TransferSettings,
    gan_train.GanSettings,
    gan_sample.SampleSettings,
    gan_score.ScoreSettings,
    tune.TuneSettings,
    bench.BenchSettings,
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of other settings files than ours."""
    (tmp_path / "recipes").mkdir()
    task1 = {"architecture": "cnn", "output_dim": 2, "epochs": 3, "lr": 0.5, "seed": 7}
    (tmp_path / "config.json").write_text(json.dumps(task1))
    (tmp_path / "recipes" / "quick.json").write_text(json.dumps({"epochs": 2, "lr": 0.25}))
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return tmp_path


# ---- config.json and recipes -----------------------------------------------------------------------------------------


def test_the_command_line_overrides_config_json_which_overrides_the_defaults(root):
    settings = load_settings(["lr=1"], RunSettings)
    assert (settings.lr, settings.epochs, settings.seed, settings.batch_size) == (1.0, 3, 7, 128)


def test_a_recipe_inherits_nothing_from_config_json(root):
    settings = load_settings(["recipe=quick", "lr=1"], RunSettings)
    assert settings == RunSettings(recipe="quick", epochs=2, lr=1.0)


def test_the_defaults_turn_every_training_trick_off():
    tricks_off = {
        "augment": "",
        "aux_loss_weight": 0,
        "batch_norm": False,
        "class_weights": "none",
        "dropout": -1,
        "ema_decay": 0,
        "finetune": "",
        "first_epoch_fraction": 1,
        "hard_fraction": 1,
        "init": "default",
        "label_smoothing": 0,
        "patience": 0,
        "pretrained": False,
        "schedule": "none",
        "teacher": "",
        "weight_decay": 0,
    }
    assert TrainSettings().model_dump(include=tricks_off.keys()) == tricks_off


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_architecture_and_only_settings_that_differ_from_the_defaults(path):
    recipe, defaults = json.loads(path.read_text()), RunSettings().model_dump()
    assert "architecture" in recipe
    assert not {key for key in recipe.keys() - {"architecture"} if recipe[key] == defaults[key]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_has_all_classes_of_the_data(path):
    assert load_settings([f"recipe={path.stem}"], RunSettings).output_dim == 0


def test_config_json_has_the_main_settings_and_only_others_that_differ_from_the_defaults():
    shipped, defaults = json.loads((config.ROOT / "config.json").read_text()), RunSettings().model_dump()
    main = {"architecture", "output_dim", "valid_ratio", "batch_size", "epochs", "optimizer", "lr"}
    assert main <= shipped.keys()
    assert not {key for key in shipped.keys() - main if shipped[key] == defaults[key]}


def test_a_script_ignores_a_recipes_settings_that_it_does_not_have():
    settings = load_settings(["recipe=mlp"], test_script.TestSettings)
    assert settings == test_script.TestSettings(recipe="mlp", batch_size=4)


@pytest.mark.parametrize("settings_type", [RunSettings, test_script.TestSettings], ids=lambda kind: kind.__name__)
def test_an_unknown_setting_in_a_recipe_is_refused_with_the_file_and_the_nearest_name(settings_type, root):
    (root / "recipes" / "quick.json").write_text('{"batchsize": 1}')
    with pytest.raises(UserError, match=r"recipes/quick\.json: there is no setting 'batchsize' here.* 'batch_size'"):
        load_settings(["recipe=quick"], settings_type)


def test_a_recipe_that_names_a_recipe_is_refused(root):
    (root / "recipes" / "quick.json").write_text('{"recipe": "fast"}')
    with pytest.raises(UserError, match=r"recipes/quick\.json: .*'recipe'"):
        load_settings(["recipe=quick"], RunSettings)


def test_a_wrong_value_in_a_recipe_is_refused_with_the_file(root):
    (root / "recipes" / "quick.json").write_text('{"epochs": "one"}')
    with pytest.raises(UserError, match=r"recipes/quick\.json: epochs=one"):
        load_settings(["recipe=quick"], RunSettings)


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_file(root):
    with pytest.raises(UserError, match=r"^epochs=one"):
        load_settings(["epochs=one"], RunSettings)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_config_file_is_refused_by_name(text, root):
    (root / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_settings([], RunSettings)


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "folder"), [([], "."), (["recipe=quick"], "runs/quick"), (["recipe=quick", "out_dir=here"], "here")]
)
def test_out_dir_is_the_root_for_task_1_and_runs_name_for_a_recipe(words, folder, root):
    assert load_settings(words, RunSettings).out_path == root / folder


@pytest.mark.parametrize(("words", "folder"), [([], "runs/x"), (["out_dir=here"], "here"), (["recipe=quick"], "runs/quick")])
def test_what_is_found_out_about_a_checkpoint_is_written_beside_it(words, folder, root):
    settings = load_settings(["checkpoint=runs/x/best_model.pt", *words], ModelFileSettings)
    assert settings.out_path == root / folder


@pytest.mark.parametrize("words", [["architecture=resnet8"], ["output_dim=10"], ["architecture=resnet8", "output_dim=10"]])
def test_another_model_than_task_1s_needs_an_out_dir(words, root):
    with pytest.raises(UserError, match=rf"{words[0]}: .* add out_dir=FOLDER"):
        _ = load_settings(words, RunSettings).out_path
    assert load_settings([*words, "out_dir=here"], RunSettings).out_path == root / "here"


@pytest.mark.parametrize("word", ["lr=0.01", "architecture=cnn"])
def test_other_settings_of_task_1_need_no_out_dir(word, root):
    assert load_settings([word], RunSettings).out_path == root


def test_the_home_folder_of_an_unknown_user_is_refused():
    with pytest.raises(UserError, match="~nosuch/x: there is no user ~nosuch"):
        config.resolve("~nosuch/x")


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_value_is_all_after_the_first_equals_sign():
    assert load_settings(["data_dir=a=b"], Settings).data_dir == "a=b"


@pytest.mark.parametrize("script", WITHOUT_TRAINING, ids=lambda script: script.__name__)
def test_a_script_without_training_has_no_settings_of_training(script):
    with pytest.raises(UserError, match=r"lr=0\.1: there is no setting 'lr' here"):
        script.main(["lr=0.1"])


@pytest.mark.parametrize(
    "word, message",
    [
        ("batchsize=3", "'batch_size'"),
        ("batch_size=0", "greater than or equal to 1"),
        ("batch_size=2.5", "valid integer"),
        ("batch_size=", "valid integer"),
        ("batch_size=true", "valid integer"),
        ("batch_norm=1", "valid boolean"),
        ("lr=-1", "greater than 0"),
        ("lr=nan", "finite"),
        ("dropout=-0.5", "a probability, or -1"),
        ("valid_ratio=1", "less than 1"),
        ("schedule=cosin", "cosine"),
        ("optimizer=adm", "known: sgd, adam, adamw"),
        ("output_dim=-1", "greater than or equal to 0"),
        ("prepare=cut", "'photo', 'views' or 'resize'"),
        ("prepare=resize", "name data=FOLDER"),
        ("device=tpu", "cpu"),
        ("data_dir=", "at least 1"),
        ("augment=hflp", "known: hflip"),
        ("augment=hflip:2", "0 to 1"),
        ("augment=shift:x", "no number"),
        ("augment=shift:0.5", "whole pixels"),
        ("augment=hflip,hflip:0.2", "hflip is named twice"),
        ("recipe=none", "known: quick"),
        ("folds=1", "one fold"),
        ("pretrained=true", "resnet18"),
        ("architecture=resnet", "resnet8"),
        ("fast", "key=value"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(root, word, message):
    with pytest.raises(UserError) as refused:
        load_settings([word], RunSettings)
    assert message in str(refused.value) and word.split("=")[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_runs_and_folds_exclude_each_other():
    with pytest.raises(UserError, match="runs=2 and folds=3: choose one"):
        load_settings(["runs=2", "folds=3"], RunSettings)


@pytest.mark.parametrize("word", ["patience=2", "schedule=plateau", "runs=2"])
def test_what_needs_validation_images_is_refused_without_any(word):
    with pytest.raises(UserError, match=f"{word}: .*use a valid_ratio above 0"):
        load_settings(["valid_ratio=0", word], RunSettings)


def test_folds_have_validation_images_of_their_own(root):
    assert load_settings(["folds=3", "valid_ratio=0", "patience=2"], RunSettings).folds == 3


@pytest.mark.parametrize(("text", "strengths"), [("hflip, shift:3", {"hflip": 0.5, "shift": 3.0}), ("", {})])
def test_augmentations_have_default_strengths(text, strengths):
    assert parse_augment(text) == strengths


# ---- printing --------------------------------------------------------------------------------------------------------


def test_printed_settings_are_those_that_differ_from_the_defaults_in_one_line():
    settings = load_settings(["recipe=mlp", "out_dir=my runs", "seed=0", "batch_norm=true"], RunSettings)
    words = "recipe=mlp 'out_dir=my runs' valid_ratio=0.0833 batch_size=4 epochs=30 optimizer=sgd lr=0.002 architecture=mlp"
    assert set(shlex.split(str(settings))) == set(shlex.split(f"{words} batch_norm=true"))
    assert "\n" not in str(settings)


def test_printed_settings_are_words_that_give_the_same_settings():
    settings = load_settings(["recipe=mlp", "out_dir=my runs", "pretrained=false", "augment=hflip:0.5,shift"], RunSettings)
    assert load_settings(shlex.split(str(settings)), RunSettings) == settings


def help_lines(words, settings_type, capsys):
    with pytest.raises(SystemExit) as ended:
        load_settings(["help", *words], settings_type)
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("settings_type", EVERY_TYPE, ids=lambda kind: kind.__name__)
def test_help_names_each_setting_exactly_once(settings_type, capsys):
    lines = help_lines([], settings_type, capsys)
    keys = [line.partition("=")[0] for line in lines[1:] if line and not line.startswith(" ") and not line.endswith(":")]
    assert sorted(keys) == sorted(settings_type.model_fields)


def test_help_groups_the_settings(capsys):
    lines, groups = help_lines([], RunSettings, capsys), {}
    for line in lines[1:]:
        if line.endswith(":") and not line.startswith(" "):
            group = groups[line] = []
        elif line and not line.startswith(" "):
            group.append(line.partition("=")[0])
    assert list(groups) == ["Every script:", "Recipe:", "Data:", "Model:", "Optimization:", "Training:", "Runs:"]
    expected = {"Every script:": "seed", "Model:": "dropout", "Optimization:": "lr", "Training:": "augment", "Runs:": "folds"}
    assert all(key in groups[name] for name, key in expected.items())


def test_help_has_the_recipes_values_types_and_ranges(root, capsys):
    lines = help_lines(["recipe=quick"], RunSettings, capsys)
    assert any(re.fullmatch(r"epochs=2 \* +epochs \(int, >= 1, <= 100000\)", line) for line in lines)


def test_help_of_training_fits_two_screens(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    lines = help_lines([], RunSettings, capsys)
    assert len(lines) <= 100 and max(map(len, lines)) <= 100


def test_settings_need_no_torch():
    code = "import sys, config, script; script.load_settings([], config.RunSettings); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0
