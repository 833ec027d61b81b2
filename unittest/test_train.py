"""Training runs: bitwise reproducible, also through a kill, a signal and a resume; every setting matters."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import sys

import pytest
import torch

import checkpoint
import train
import trainer
from augmentation import FUNCTIONS
from config import ROOT, RunSettings, UserError, config_path, read_config
from data_preprocessing import split_indices, task_labels
from interrupts import lock_folder
from layers import add_batch_norm, fuse_batch_norm
from model import build_model, load_model
from plots import draw_curves
from run import Run, epochs_of_run, is_done
from script import load_settings, run_script
from tools import soft_targets
from trainer import infer, loss_and_accuracy

SHORT = ["limit=200", "epochs=3", "batch_size=32", "hard_fraction=0.5", "valid_ratio=0.001"]


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Curves, a fifth of a second each, are drawn by the run that all tests share, and where a test asks for them."""
    monkeypatch.setattr("plots.draw_curves", lambda *_: None)


def run(out, *words):
    train.main([*SHORT, *words, f"out_dir={out}"])
    return checkpoint.load(out / "checkpoint.pt", "checkpoint")


def is_same_model(one, other):
    """Whether two files' contents have bitwise identical models."""
    return all(tensor.equal(other["model"][name]) for name, tensor in one["model"].items())


def without_seconds(history):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in history]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The contents of checkpoint.pt and the folder of a run from start to end."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return run(out), out


# ---- reproducibility and resume --------------------------------------------------------------------------------------

KINDS = {
    "task 1": [],
    "dropout and EMA": ["architecture=deep_cnn_dropout", "ema_decay=0.9"],
    "batch norm": ["architecture=resnet8", "optimizer=sgd", "augment=hflip,crop,erase"],
    "plateau": ["schedule=plateau", "patience=1", "lr=0.1"],
    "RMSprop": ["optimizer=RMSprop", "lr=0.001"],
    "runs": ["runs=2"],
    "folds": ["folds=4", "epochs=1", "architecture=mlp"],
}


def are_same_runs(one, other):
    """Whether two folders have bitwise identical models, best models and, up to the seconds, histories."""
    states = [checkpoint.load(out / "checkpoint.pt", "checkpoint") for out in (one, other)]
    bests = [checkpoint.load(out / "best_model.pt", "best_model") for out in (one, other)]
    histories = [without_seconds(state["history"]) for state in states]
    histories += [without_seconds(checkpoint.read_history(out / "history.jsonl")[1]) for out in (one, other)]
    return is_same_model(*states) and is_same_model(*bests) and all(history == histories[0] for history in histories)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, uninterrupted):
    """A function that returns the folder of an uninterrupted run of a kind, trained once."""
    folders = {"task 1": uninterrupted[1]}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("whole")
            run(folders[kind], *KINDS[kind])
        return folders[kind]

    return folder


def test_the_same_seed_gives_a_bitwise_identical_run(uninterrupted, tmp_path):
    run(tmp_path)
    assert are_same_runs(uninterrupted[1], tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bitwise_identical(kind, whole_runs, tmp_path, monkeypatch):
    original, calls = trainer.loss_and_accuracy, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("as good as killed: nothing runs after it")
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(trainer, "loss_and_accuracy", dying)
        run(tmp_path, *KINDS[kind])
    run(tmp_path, *KINDS[kind], "resume=true")
    assert are_same_runs(whole_runs(kind), tmp_path)


@pytest.fixture(scope="module")
def unvalidated(tmp_path_factory):
    """The contents of checkpoint.pt and the folder of a run without validation images."""
    out = tmp_path_factory.mktemp("unvalidated")
    return run(out, "valid_ratio=0"), out


def test_without_validation_images_the_last_model_is_kept(unvalidated):
    last, out = unvalidated
    best = checkpoint.load(out / "best_model.pt", "best_model")
    assert best["epoch"] == 3 and is_same_model(best, last)
    assert all(line.keys() == {"epoch", "seconds", "lr", "train_loss", "train_accuracy"} for line in last["history"])


def test_without_validation_images_its_curves_are_those_of_training(unvalidated, tmp_path):
    draw_curves(unvalidated[1] / "history.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_without_validation_images_a_teacher_of_any_split_will_do(uninterrupted, tmp_path):
    run(tmp_path, f"teacher={uninterrupted[1] / 'best_model.pt'}", "seed=1", "valid_ratio=0", "epochs=1")


def test_a_model_that_was_trained_on_all_images_is_no_teacher_where_some_validate(unvalidated, tmp_path):
    with pytest.raises(UserError, match=r"valid_ratio=0\.0 .* may have seen validation images"):
        run(tmp_path, f"teacher={unvalidated[1] / 'best_model.pt'}")


def interrupt(out, kind, step, number, monkeypatch, capsys):
    """Train until a signal comes in a step; the exit code, the number of steps done, the words of the printed command."""
    original, calls = trainer.learning_rate, []

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(trainer, "learning_rate", signalling)
        patch.setattr(sys, "argv", ["train.py"])
        run_script(train.main, [*SHORT, *KINDS[kind], f"out_dir={out}"])
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("to continue: ")[2])
    return end.value.code, len(calls), command


@pytest.mark.parametrize(
    ("kind", "step", "number", "code"),
    [("dropout and EMA", 2, signal.SIGTERM, 143), ("task 1", 5, signal.SIGINT, 130), ("runs", 12, signal.SIGTERM, 143)],
)
def test_after_a_signal_the_printed_command_gives_a_bitwise_identical_run(
    kind, step, number, code, whole_runs, tmp_path, monkeypatch, capsys
):
    end, steps, command = interrupt(tmp_path, kind, step, number, monkeypatch, capsys)
    assert (end, steps, command[:2]) == (code, step, ["python", "train.py"])
    assert (command[-1] == "resume=true") == (kind != "dropout and EMA")  # which is in its first epoch
    train.main(command[2:])
    assert are_same_runs(whole_runs(kind), tmp_path)


def test_an_interrupt_in_the_first_epoch_leaves_an_old_checkpoint_and_does_not_propose_to_resume_it(
    uninterrupted, tmp_path, monkeypatch, capsys
):
    for name in ("checkpoint.pt", "best_model.pt"):
        shutil.copyfile(uninterrupted[1] / name, tmp_path / name)
    _, _, command = interrupt(tmp_path, "task 1", 1, signal.SIGINT, monkeypatch, capsys)
    assert command[:2] == ["python", "train.py"] and "resume=true" not in command
    for name in ("checkpoint.pt", "best_model.pt"):
        assert (tmp_path / name).read_bytes() == (uninterrupted[1] / name).read_bytes()


def test_after_a_kill_between_its_first_saves_the_training_before_it_is_not_resumed(uninterrupted, tmp_path, monkeypatch):
    for name in ("checkpoint.pt", "best_model.pt"):
        shutil.copyfile(uninterrupted[1] / name, tmp_path / name)
    save = checkpoint.save

    def dying(path, contents):
        if path.name == "checkpoint.pt":
            raise RuntimeError("as good as killed: nothing runs after it")
        save(path, contents)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint, "save", dying)
        run(tmp_path, "seed=1")
    with pytest.raises(UserError, match=r"best_model\.pt: is of a later training than checkpoint\.pt"):
        run(tmp_path, "resume=true")


def test_a_second_signal_does_not_wait_for_the_end_of_the_batch(tmp_path, monkeypatch):
    def signalling(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step continues")

    monkeypatch.setattr(trainer, "learning_rate", signalling)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)


def test_a_run_from_another_device_resumes_with_a_warning(uninterrupted, tmp_path, capsys):
    rng = {**uninterrupted[0]["rng"], "generator": torch.zeros(16, dtype=torch.uint8)}  # a GPU's state is that long
    machine = {**uninterrupted[0]["machine"], "device": "cuda"}
    checkpoint.save(tmp_path / "checkpoint.pt", {**uninterrupted[0], "machine": machine, "rng": rng})
    shutil.copyfile(uninterrupted[1] / "best_model.pt", tmp_path / "best_model.pt")
    assert run(tmp_path, "epochs=4", "resume=true", "device=cpu")["epoch"] == 4
    assert "resumes with device=cpu (was cuda): the result will not be bitwise" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_further_but_a_missing_history_is_written(uninterrupted, tmp_path, capsys):
    for name in ("checkpoint.pt", "best_model.pt"):
        shutil.copyfile(uninterrupted[1] / name, tmp_path / name)
    run(tmp_path, "resume=true")
    assert "nothing to resume" in (printed := capsys.readouterr().out) and "wrote" not in printed
    for name in ("checkpoint.pt", "best_model.pt", "history.jsonl"):
        assert (tmp_path / name).read_bytes() == (uninterrupted[1] / name).read_bytes()


@pytest.mark.parametrize(("kind", "epochs"), [("runs", 3), ("folds", 1)])
def test_several_runs_do_not_resume_for_more_epochs(kind, epochs, whole_runs):
    with pytest.raises(UserError, match=rf"other settings: epochs=4 \(was {epochs}\)"):
        run(whole_runs(kind), *KINDS[kind], "epochs=4", "resume=true")


def test_resuming_under_other_settings_is_refused_by_name(uninterrupted):
    with pytest.raises(UserError, match=r"lr=0\.5 \(was 0\.02\)"):
        run(uninterrupted[1], "resume=true", "lr=0.5")


def test_two_spellings_of_a_folder_are_the_same_setting():
    assert checkpoint.is_same("data", "my_images/", "my_images") and not checkpoint.is_same("data", "a", "b")
    assert checkpoint.is_same("lr", 0.5, 0.5) and not checkpoint.is_same("lr", 0.5, 0.25)


def test_resuming_from_another_models_state_is_refused(uninterrupted, tmp_path):
    altered = checkpoint.load(uninterrupted[1] / "checkpoint.pt", "checkpoint")
    altered["optimizer"]["momenta"].pop()
    altered["history"] = altered["history"][:1]
    checkpoint.save(tmp_path / "checkpoint.pt", altered)
    shutil.copyfile(uninterrupted[1] / "best_model.pt", tmp_path / "best_model.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: its state doesn't fit"):
        run(tmp_path, "resume=true")


def test_resuming_without_the_best_model_is_refused(uninterrupted, tmp_path):
    shutil.copyfile(uninterrupted[1] / "checkpoint.pt", tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"best_model\.pt: is missing"):
        run(tmp_path, "epochs=4", "resume=true")


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path, "resume=true")


def test_a_checkpoint_that_changed_before_the_folder_was_locked_is_not_resumed(uninterrupted, tmp_path):
    for name in ("checkpoint.pt", "best_model.pt"):
        shutil.copyfile(uninterrupted[1] / name, tmp_path / name)
    settings = load_settings([*SHORT, "epochs=4", "resume=true", f"out_dir={tmp_path}"], RunSettings)
    late = Run(trainer.Trainer, settings, [], {})
    checkpoint.save(tmp_path / "checkpoint.pt", {**uninterrupted[0], "history": uninterrupted[0]["history"][:1]})
    with pytest.raises(UserError, match=r"checkpoint\.pt: another run has written to it meanwhile"), late.locked():
        pytest.fail("the folder was entered")


def test_a_resumed_run_with_more_epochs_says_what_becomes_of_its_schedule(tmp_path, capsys):
    words = ["limit=300", "valid_ratio=0.02", f"out_dir={tmp_path}"]
    train.main([*words, "epochs=1"])
    train.main([*words, "epochs=2", "resume=true"])
    assert "the linear schedule now covers all of them" in capsys.readouterr().out


def test_starting_over_in_a_runs_folder_is_announced(tmp_path, capsys):
    run(tmp_path, "epochs=1")
    assert "starts over" not in capsys.readouterr().out
    run(tmp_path, "epochs=1")
    assert f"starts over, replacing the training in {tmp_path}" in capsys.readouterr().out


# ---- folders and files -----------------------------------------------------------------------------------------------


def test_two_runs_keep_out_of_each_others_folder(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match="another run is writing there"):
            run(tmp_path)
    run(tmp_path, "epochs=1")  # it is free again


def test_parts_of_an_earlier_runs_files_are_removed_and_others_kept(tmp_path):
    left, other = tmp_path / ".checkpoint.pt.1.part", tmp_path / ".scores.json.1.part"
    for path in (left, other):
        path.touch()
    with lock_folder(tmp_path):
        assert not left.exists() and other.exists()


def test_a_run_writes_its_settings_and_a_line_per_epoch(uninterrupted):
    settings, *epochs = map(json.loads, (uninterrupted[1] / "history.jsonl").read_text().splitlines())
    assert settings["limit"] == 200 and settings["schedule"] == "linear" and settings["label_smoothing"] == 0
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    keys = ["epoch", "seconds", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    assert all(list(line) == keys for line in epochs)


def test_a_run_draws_its_curves(uninterrupted):
    assert (uninterrupted[1] / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_prints_its_settings_that_differ_from_the_defaults_in_one_line(tmp_path, capsys):
    run(tmp_path, "epochs=1", "seed=0", "schedule=none")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("settings:")]
    task1 = json.loads((ROOT / "config.json").read_text())
    given = dict(word.split("=", 1) for word in [*SHORT, "epochs=1", f"out_dir={tmp_path}"])
    keys = {key for key, value in task1.items() if value != RunSettings.model_fields[key].default} - {"schedule"}
    assert {word.partition("=")[0] for word in shlex.split(line)[1:]} == keys | given.keys()


def test_images_that_the_first_epoch_leaves_out_have_losses(uninterrupted):
    assert uninterrupted[0]["settings"]["first_epoch_fraction"] < 1
    assert uninterrupted[0]["sampler"]["losses"].isfinite().sum() == 200


# ---- the best model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory):
    """The contents of checkpoint.pt, the folder and the output of a run whose validation loss rises."""
    out = tmp_path_factory.mktemp("stopped")
    words = ("epochs=50", "patience=1", "lr=0.1", "optimizer=sgd", "schedule=none", "precision=float32")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        return run(out, *words), out, output.getvalue()


def test_patience_ends_a_run_that_no_longer_improves(stopped_early):
    ended, _, output = stopped_early
    assert len(ended["history"]) == ended["best"]["epoch"] + 1 < 50
    assert f"early stopping after epoch {len(ended['history'])}" in output


def test_best_model_is_of_the_lowest_validation_loss_not_of_the_last_epoch(stopped_early, train_data):
    ended, out, _ = stopped_early
    model, losses = load_model(out / "best_model.pt"), [line["valid_loss"] for line in ended["history"]]
    best = model.metadata["best"]
    assert model.metadata["epoch"] == best["epoch"] == losses.index(min(losses)) + 1 < len(losses)
    images, fine_labels = train_data
    _, valid = split_indices(fine_labels, 0.001, 0)
    logits = infer(model, images[valid])
    assert loss_and_accuracy(logits, task_labels(fine_labels[valid], 2)) == (min(losses), best["valid_accuracy"])


def test_a_best_model_that_somebody_removes_is_written_again(stopped_early, tmp_path, monkeypatch):
    best, words = checkpoint.load(stopped_early[1] / "best_model.pt", "best_model"), stopped_early[0]["settings"]
    words = [f"{key}={words[key]}" for key in ("patience", "lr", "optimizer", "schedule", "precision")]
    run_epoch = trainer.Trainer.run_epoch

    def removing(self, epoch, epochs):
        (tmp_path / "best_model.pt").unlink(missing_ok=True)
        return run_epoch(self, epoch, epochs)

    monkeypatch.setattr(trainer.Trainer, "run_epoch", removing)
    run(tmp_path, *words, "epochs=50")
    assert is_same_model(best, checkpoint.load(tmp_path / "best_model.pt", "best_model"))


@pytest.mark.parametrize(
    ("losses", "patience", "done"),
    [([3, 2, 1], 0, False), ([3, 2, 2], 1, True), ([3, 2, 2], 2, False), ([1, 2, 3, 4], 0, True), ([], 1, False)],
)
def test_a_run_is_done_after_its_epochs_or_its_patience(losses, patience, done):
    history = [{"epoch": epoch, "valid_loss": loss} for epoch, loss in enumerate(losses, 1)]
    assert is_done(history, 4, patience) == done


def test_runs_have_splits_and_seeds_of_their_own_and_the_best_model_is_saved(uninterrupted, tmp_path, capsys):
    several = run(tmp_path, "runs=2")
    first, second = (without_seconds(epochs_of_run(several["history"], number)) for number in (1, 2))
    assert [line.pop("run") for line in first + second] == [1, 1, 1, 2, 2, 2]
    assert first == without_seconds(uninterrupted[0]["history"])
    assert second == without_seconds(run(tmp_path / "alone", "seed=1")["history"])
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")["best"]
    assert best["valid_loss"] == min(line["valid_loss"] for line in several["history"])
    assert f"best: run {best['run']}, epoch {best['epoch']}" in capsys.readouterr().out


def test_the_curves_of_several_runs_are_drawn(whole_runs, tmp_path):
    draw_curves(whole_runs("runs") / "history.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_ema_is_validated_and_saved(tmp_path):
    state = run(tmp_path, "ema_decay=0.95", "epochs=1")
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    assert all(tensor.equal(state["ema"][name]) for name, tensor in best["model"].items())
    assert not is_same_model(best, state)


def test_batch_norm_is_fused_in_the_saved_model(tmp_path):
    state = run(tmp_path, "batch_norm=true", "epochs=1", "device=cpu")
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    model = build_model("cnn", 2)
    add_batch_norm(model)
    model.load_state_dict(state["model"])
    assert all(tensor.equal(best["model"][name]) for name, tensor in fuse_batch_norm(model).state_dict().items())


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_best_model(tmp_path, monkeypatch):
    run(tmp_path, "epochs=2")
    before = (tmp_path / "best_model.pt").read_bytes()
    cross_entropy = trainer.F.cross_entropy

    def exploding(*arguments, **keywords):
        return cross_entropy(*arguments, **keywords) * float("nan")

    monkeypatch.setattr(trainer.F, "cross_entropy", exploding)
    with pytest.raises(UserError, match=r"epoch 3: the loss is nan by batch 1;"):
        run(tmp_path, "epochs=3", "resume=true")
    assert (tmp_path / "best_model.pt").read_bytes() == before


def test_a_validation_loss_that_is_not_finite_is_not_taken_for_the_lowest(tmp_path):
    with pytest.raises(UserError, match="epoch 1: the validation loss is nan"):
        run(tmp_path, "lr=1e30", "batch_size=200", "epochs=1", "hard_fraction=1", "first_epoch_fraction=1")
    assert not (tmp_path / "best_model.pt").exists()


def test_a_batch_of_one_image_that_cannot_be_normalised_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="epoch 1: a batch of one image"):
        run(tmp_path, "architecture=compact_cnn", "batch_norm=true", "batch_size=1")


@pytest.mark.parametrize("word", ["lr=0", "optimizer=LBFGS", "optimizer=Adm"])
def test_a_wrong_setting_replaces_no_file(word, uninterrupted):
    before = (uninterrupted[1] / "best_model.pt").read_bytes()
    with pytest.raises(UserError, match=word):
        run(uninterrupted[1], word)
    assert (uninterrupted[1] / "best_model.pt").read_bytes() == before


# ---- every setting, every recipe -------------------------------------------------------------------------------------

SETTINGS = [  # each after those without which it has no effect
    "seed=1",
    "limit=150",
    "valid_ratio=0.002",
    "batch_size=16",
    "epochs=2",
    "lr=0.01",
    "optimizer=sgd",
    "optimizer=adamw weight_decay=0.1",
    "weight_decay=0.01",
    "schedule=none",
    "schedule=cosine",
    "warmup=0.5",
    "augment=",
    "aux_loss_weight=0",
    "hard_fraction=0.4",
    "first_epoch_fraction=0.7",
    "precision=float32 precision=bfloat16",
    "output_dim=10",
    "scaling=symmetric",
    "dropout=0.3",
    "activation=gelu",
    "init=he",
    "batch_norm=true",
    "label_smoothing=0.1",
    "class_weights=balanced",
    "label_smoothing=0.1 class_weights=balanced",
    "architecture=mlp",
    "epochs=1 architecture=mlp folds=2",
    *(f"augment= augment={name}" for name in (*FUNCTIONS, "scene")),
]
ELSEWHERE = {  # their effects have tests of their own
    *("recipe", "data_dir", "out_dir", "device", "pretrained", "runs", "resume", "patience", "ema_decay"),
    *("teacher", "distill_weight", "gan_fraction", "generator", "finetune", "log", "data", "prepare"),
}


def test_every_setting_is_tried():
    tried = {word.split()[-1].partition("=")[0] for word in SETTINGS}
    assert tried | ELSEWHERE == set(RunSettings.model_fields) and not tried & ELSEWHERE


@pytest.fixture(scope="module")
def features_of(tmp_path_factory, uninterrupted):
    """A function that returns the trained features of a run with further settings, trained once."""
    known = {(): uninterrupted[0]}

    def features(words):
        if words not in known:
            known[words] = run(tmp_path_factory.mktemp("setting"), *words)
        return {name: tensor for name, tensor in known[words]["model"].items() if name.startswith("features.")}

    return features


@pytest.mark.parametrize("words", SETTINGS)
def test_every_setting_changes_the_trained_features(words, features_of):
    one, other = features_of(tuple(words.split()[:-1])), features_of(tuple(words.split()))
    assert one.keys() != other.keys() or any(not one[name].equal(tensor) for name, tensor in other.items())


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.json")))
def test_every_recipe_passes_a_dry_run(recipe, tmp_path):
    settings = read_config(config_path(recipe))
    words = [] if settings.get("valid_ratio") == 0 else ["valid_ratio=0.00001"]  # an image of each class
    if not (ROOT / settings.get("teacher", "")).exists():
        words.append("teacher=")  # it is too large to be part of the repository
    train.main([f"recipe={recipe}", "epochs=1", "limit=10", *words, "runs=1", f"out_dir={tmp_path}"])
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    assert best["settings"]["recipe"] == recipe and len(best["class_names"]) == 10


@pytest.mark.parametrize("output_dim", [2, 10])
def test_finetuning_starts_from_the_other_models_features(output_dim, uninterrupted, tmp_path):
    path = uninterrupted[1] / "best_model.pt"
    ended = run(tmp_path, f"finetune={path}", "lr=1e-12", "epochs=1", f"output_dim={output_dim}")["model"]
    for name, tensor in checkpoint.load(path, "best_model")["model"].items():
        is_last_layer = name.startswith("classifier")
        assert is_last_layer != (ended[name].shape == tensor.shape and torch.allclose(ended[name], tensor, atol=1e-6)), name


def test_finetuning_keeps_the_filters_that_a_whitened_first_layer_had(tmp_path):
    start = run(tmp_path / "start", "architecture=fast_cnn", "epochs=1", "limit=200")["model"]
    path = tmp_path / "start" / "best_model.pt"
    ended = run(tmp_path / "out", f"finetune={path}", "architecture=fast_cnn", "epochs=1", "limit=100")["model"]
    assert ended["features.0.weight"].equal(start["features.0.weight"])


# ---- distillation ----------------------------------------------------------------------------------------------------


def test_with_all_weight_on_the_teacher_the_labels_have_no_effect(uninterrupted, tmp_path):
    words = [f"teacher={uninterrupted[1] / 'best_model.pt'}", "aux_loss_weight=0", "epochs=1"]
    whole = ["distill_weight=1"]
    one, other = (run(tmp_path / smoothing, *words, *whole, f"label_smoothing={smoothing}") for smoothing in ("0.0", "0.3"))
    assert is_same_model(one, other)
    assert not is_same_model(one, run(tmp_path / "half", *words, "distill_weight=0.5"))


@pytest.fixture
def targets(uninterrupted, read_training_images, monkeypatch):
    """The contents of soft_targets.pt, of the first 50 images only."""
    with monkeypatch.context() as patch:
        read_training_images(patch, 50)
        soft_targets.main([f"out_dir={uninterrupted[1]}", "precision=float32"])
    return checkpoint.load(uninterrupted[1] / "soft_targets.pt", "soft_targets")


def test_soft_targets_are_the_log_probabilities_of_each_image_and_its_horizontal_flip(targets, uninterrupted, train_data):
    model, images = load_model(uninterrupted[1] / "best_model.pt"), train_data[0][:50]
    logits = torch.stack([infer(model, x) for x in (images, images.flip(-1))])
    assert torch.allclose(targets["log_probabilities"].float(), logits.log_softmax(2).mean(0), atol=1e-3, rtol=1e-3)


def test_soft_targets_that_are_wrong_are_learned(targets, train_data, tmp_path):
    path = tmp_path / "soft_targets.pt"
    log_probabilities = torch.eye(2).mul(8).log_softmax(1)[1 - task_labels(train_data[1], 2)].half()  # (60000, 2)
    checkpoint.save(path, {**targets, "log_probabilities": log_probabilities})
    ended = run(tmp_path / "x", f"teacher={path}", "distill_weight=1", "aux_loss_weight=0")
    assert ended["history"][-1]["valid_accuracy"] < 0.1


@pytest.mark.parametrize("log_probabilities", [torch.zeros(59_999, 2), torch.full((60_000, 2), torch.nan), 3])
def test_soft_targets_of_other_images_or_not_finite_are_refused(log_probabilities, targets, tmp_path):
    path = tmp_path / "soft_targets.pt"
    checkpoint.save(path, {**targets, "log_probabilities": log_probabilities})
    with pytest.raises(UserError, match=r"run tools/soft_targets\.py"):
        run(tmp_path / "x", f"teacher={path}")


def test_soft_targets_are_refused_for_generated_images(targets, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("train.add_generated", lambda split, _: split)
    with pytest.raises(UserError, match="has no targets for generated images"):
        run(tmp_path, f"teacher={uninterrupted[1] / 'soft_targets.pt'}", "augment=gan")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=1", "validation images"),
        ("valid_ratio=0.05", "validation images"),
        ("output_dim=10", "has the classes clothes, shoe, not T-shirt/top"),
        ("runs=2", "leave runs=2 out"),
        ("folds=2", "leave folds=2 out"),
    ],
)
def test_a_teacher_does_not_fit_other_settings(word, message, uninterrupted, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, f"teacher={uninterrupted[1] / 'best_model.pt'}", word)


@pytest.mark.parametrize(
    ("word", "message"),
    [("seed=1", "validation images"), ("architecture=mlp", "don't fit the model"), ("folds=2", "leave folds=2 out")],
)
def test_a_model_is_not_finetuned_under_other_settings(word, message, uninterrupted, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, f"finetune={uninterrupted[1] / 'best_model.pt'}", word)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"seed": 0}}, "doesn't say on which images it was trained"),
        ({"class_names": ["flats", "heels"]}, "has the classes flats, heels, not clothes, shoe"),
    ],
    ids=["split", "classes"],
)
def test_a_teacher_of_an_unknown_split_or_of_other_classes_is_refused(changes, message, uninterrupted, tmp_path):
    best = checkpoint.load(uninterrupted[1] / "best_model.pt", "best_model")
    checkpoint.save(tmp_path / "x.pt", {**best, **changes})
    with pytest.raises(UserError, match=message):
        run(tmp_path, f"teacher={tmp_path / 'x.pt'}")
