"""Training: the same bits from the same seed, also through a resume; every setting matters."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import checkpoint
import model
import teach
import train
import training
from augmentation import FUNCTIONS
from config import ROOT, Settings, UserError, run_script
from data_preprocessing import labels_of, split_indices
from model import build, folded, with_batch_norm
from optimizer import learning_rate
from plots import draw_curves
from stopping import claimed

SHORT = ["limit=600", "epochs=3", "batch_size=64", "hard_share=0.5", "valid_ratio=0.02"]


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Curves, a fifth of a second each, are drawn by the run that all tests share, and where a test asks for them."""
    monkeypatch.setattr("plots.draw_curves", lambda *_: None)


def run(out, *words):
    train.main([*SHORT, *words, f"out_dir={out}"])
    return checkpoint.load(out / "checkpoint.pt", "checkpoint")


def same_parameters(one, other):
    return all(tensor.equal(other["parameters"][name]) for name, tensor in one["parameters"].items())


def without_seconds(history):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return run(out), out


def test_the_same_seed_gives_the_same_bits(undisturbed, tmp_path):
    again = run(tmp_path)
    assert same_parameters(undisturbed[0], again)
    assert without_seconds(undisturbed[0]["history"]) == without_seconds(again["history"])


def test_images_that_the_first_epoch_leaves_out_are_looked_at(undisturbed):
    assert undisturbed[0]["settings"]["first_share"] < 1
    assert undisturbed[0]["image_losses"].isfinite().sum() == 600


KINDS = {
    "task 1": [],
    "dropout and average": ["architecture=deep_cnn_dropout", "average=0.9"],
    "batch normalisation": ["architecture=resnet8", "optimizer=sgd", "augment=hflip,crop,erase"],
    "plateau": ["schedule=plateau", "patience=1", "lr=0.1"],
    "runs": ["runs=2"],
    "folds": ["folds=4", "epochs=1"],
}


def same_runs(one, other):
    """Whether two folders have the same parameters, best parameters and history, up to the seconds."""
    states = [checkpoint.load(out / "checkpoint.pt", "checkpoint") for out in (one, other)]
    bests = [checkpoint.load(out / "best_model.pt", "best_model") for out in (one, other)]
    histories = [without_seconds(state["history"]) for state in states]
    histories += [without_seconds(checkpoint.read_history(out / "history.jsonl")[1]) for out in (one, other)]
    return same_parameters(*states) and same_parameters(*bests) and all(history == histories[0] for history in histories)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_bits(kind, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, *KINDS[kind])
    real, calls = training.evaluate, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("as good as killed: nothing runs after it")
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(training, "evaluate", dying)
        run(killed, *KINDS[kind])
    run(killed, *KINDS[kind], "resume=true")
    assert same_runs(whole, killed)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind, step", [("dropout and average", 2), ("runs", 12), ("task 1", 7)])
def test_a_signal_ends_the_batch_and_saves_all(kind, step, number, code, tmp_path, monkeypatch, capsys):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    run(whole, *KINDS[kind])
    real, calls = training.learning_rate, []

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(training, "learning_rate", signalling)
        patch.setattr(sys, "argv", ["train.py"])
        run_script(train.main, [*SHORT, *KINDS[kind], f"out_dir={ended}"])
    assert end.value.code == code and len(calls) == step
    assert f"python train.py {' '.join(SHORT)}" in capsys.readouterr().out.splitlines()[-1]
    run(ended, *KINDS[kind], "resume=true")
    assert same_runs(whole, ended)


def test_two_runs_keep_out_of_each_others_folder(tmp_path):
    with claimed(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} .* is at work there"):
            run(tmp_path)
    run(tmp_path, "epochs=1")  # it is free again


def test_what_a_killed_save_left_behind_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, others = tmp_path / f".checkpoint.pt.{dead.pid}.part", tmp_path / f".scores.json.{os.getpid()}.part"
    for path in (left, others):
        path.touch()
    with claimed(tmp_path):
        assert not left.exists() and others.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(tmp_path, monkeypatch):
    run(tmp_path, "epochs=2")
    before = (tmp_path / "best_model.pt").read_bytes()
    cross_entropy = model.F.cross_entropy

    def exploding(*arguments, **keywords):
        return cross_entropy(*arguments, **keywords) * float("nan")

    monkeypatch.setattr(model.F, "cross_entropy", exploding)
    with pytest.raises(UserError, match=r"epoch 3: the loss is nan in batch 1"):
        run(tmp_path, "epochs=3", "resume=true")
    assert (tmp_path / "best_model.pt").read_bytes() == before


def test_a_validation_loss_that_is_not_finite_is_not_taken_for_the_lowest(tmp_path):
    with pytest.raises(UserError, match="epoch 1: the validation loss is nan"):
        run(tmp_path, "lr=1e30", "batch_size=600", "epochs=1", "hard_share=1", "first_share=1")
    assert not (tmp_path / "best_model.pt").exists()


def test_a_run_of_another_kind_of_device_goes_on_and_says_so(undisturbed, tmp_path, capsys):
    random = {**undisturbed[0]["random"], "generator": torch.zeros(16, dtype=torch.uint8)}  # a GPU's state is that long
    machine = {**undisturbed[0]["machine"], "device": "cuda"}
    checkpoint.save(tmp_path / "checkpoint.pt", {**undisturbed[0], "machine": machine, "random": random})
    shutil.copyfile(undisturbed[1] / "best_model.pt", tmp_path / "best_model.pt")
    assert run(tmp_path, "epochs=4", "resume=true")["epoch"] == 4
    assert "goes on with device=cpu (was cuda): its end will not have the bits" in capsys.readouterr().out


def test_a_finished_run_is_not_resumed_but_its_history_is_written_if_it_is_missing(undisturbed, tmp_path, capsys):
    for name in ("checkpoint.pt", "best_model.pt"):
        shutil.copyfile(undisturbed[1] / name, tmp_path / name)
    run(tmp_path, "resume=true")
    assert "nothing to resume" in capsys.readouterr().out
    for name in ("checkpoint.pt", "best_model.pt", "history.jsonl"):
        assert (tmp_path / name).read_bytes() == (undisturbed[1] / name).read_bytes()


@pytest.mark.parametrize("several", ["runs=2", "folds=2"])
def test_several_runs_do_not_go_on_for_more_epochs(several, tmp_path):
    run(tmp_path, several, "epochs=1")
    with pytest.raises(UserError, match=r"other settings: epochs=2 \(was 1\)"):
        run(tmp_path, several, "epochs=2", "resume=true")


def test_resuming_under_other_settings_is_refused_by_name(undisturbed):
    with pytest.raises(UserError, match=r"lr=0\.5 \(was 0\.02\)"):
        run(undisturbed[1], "resume=true", "lr=0.5")


def test_resuming_from_another_networks_state_is_refused(undisturbed, tmp_path):
    altered = checkpoint.load(undisturbed[1] / "checkpoint.pt", "checkpoint")
    altered["optimizer"]["momenta"].pop()
    altered["history"] = altered["history"][:1]
    checkpoint.save(tmp_path / "checkpoint.pt", altered)
    shutil.copyfile(undisturbed[1] / "best_model.pt", tmp_path / "best_model.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: its state doesn't fit"):
        run(tmp_path, "resume=true")


def test_resuming_without_the_best_network_is_refused(undisturbed, tmp_path):
    shutil.copyfile(undisturbed[1] / "checkpoint.pt", tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"best_model\.pt: is gone"):
        run(tmp_path, "epochs=4", "resume=true")


def test_beginning_anew_over_a_training_is_said(tmp_path, capsys):
    run(tmp_path, "epochs=1")
    assert "begins anew" not in capsys.readouterr().out
    run(tmp_path, "epochs=1")
    assert f"begins anew, over the training in {tmp_path}" in capsys.readouterr().out


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path, "resume=true")


def test_a_run_writes_its_settings_and_a_line_per_epoch(undisturbed):
    settings, *epochs = map(json.loads, (undisturbed[1] / "history.jsonl").read_text().splitlines())
    assert settings["limit"] == 600 and settings["schedule"] == "one_cycle"
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    keys = ["epoch", "seconds", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    assert all(list(line) == keys for line in epochs)
    assert (undisturbed[1] / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_best_model_is_the_network_of_the_lowest_validation_loss_not_of_the_last_epoch(tmp_path, train_data):
    words = ("epochs=50", "patience=1", "lr=0.1", "optimizer=sgd", "schedule=none", "precision=float32")
    ended = run(tmp_path, *words)
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    losses = [line["valid_loss"] for line in ended["history"]]
    assert best["epoch"] == ended["best"]["epoch"] == losses.index(min(losses)) + 1 < len(losses)
    images, garments = train_data
    _, valid = split_indices(garments, 0.02, 0)
    logits = model.infer(checkpoint.rebuild(best, tmp_path), images[valid], best["mean"], best["std"])
    assert model.evaluate(logits, labels_of(garments[valid], 2)) == (min(losses), best["best"]["valid_accuracy"])


def test_runs_have_splits_and_seeds_of_their_own_and_the_best_is_kept(undisturbed, tmp_path, capsys):
    several = run(tmp_path, "runs=2")
    first, second = (without_seconds(training.epochs_of(several["history"], number)) for number in (1, 2))
    assert [line.pop("run") for line in first + second] == [1, 1, 1, 2, 2, 2]
    assert first == without_seconds(undisturbed[0]["history"])
    assert second == without_seconds(run(tmp_path / "alone", "seed=1")["history"])
    draw_curves(tmp_path / "history.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")["best"]
    assert best["valid_loss"] == min(line["valid_loss"] for line in several["history"])
    assert f"best: run {best['run']}, epoch {best['epoch']}" in capsys.readouterr().out


def test_averaged_weights_are_what_is_validated_and_kept(tmp_path):
    state = run(tmp_path, "average=0.95", "epochs=1")
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    assert all(tensor.equal(state["averaged"][name]) for name, tensor in best["parameters"].items())
    assert not same_parameters(best, state)


def test_one_image_that_cannot_be_normalised_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="epoch 1: a batch of one image"):
        run(tmp_path, "architecture=compact_cnn", "batch_norm=true", "batch_size=1")


def test_batch_normalisation_has_become_part_of_the_weights_that_are_kept(tmp_path):
    state = run(tmp_path, "batch_norm=true", "epochs=1")
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    network = build("cnn", 2)
    with_batch_norm(network)
    network.load_state_dict(state["parameters"])
    assert all(tensor.equal(best["parameters"][name]) for name, tensor in folded(network).state_dict().items())


SETTINGS = [  # each beside what it matters with
    "seed=1",
    "limit=500",
    "valid_ratio=0.03",
    "batch_size=32",
    "epochs=2",
    "lr=0.01",
    "optimizer=sgd",
    "optimizer=adamw weight_decay=0.1",
    "weight_decay=0.01",
    "schedule=none",
    "schedule=cosine",
    "warmup=0.5",
    "augment=",
    "auxiliary=0",
    "hard_share=0.4",
    "first_share=0.7",
    "precision=float32 precision=bfloat16",
    "output_dim=10",
    "scaling=symmetric",
    "dropout=0.3",
    "activation=gelu",
    "init=he",
    "whiten=true",
    "label_smoothing=0.1",
    "epochs=1 folds=2",
    *(f"augment= augment={name}" for name in FUNCTIONS),
]
ELSEWHERE = {  # what they change is said by tests of their own
    *("recipe", "data_dir", "out_dir", "device", "architecture", "pretrained", "batch_norm", "runs", "patience", "average"),
    *("teacher", "teacher_share", "temperature", "gan_share", "gan_fresh", "generator"),
}


def test_every_setting_is_tried():
    tried = {word.split()[-1].partition("=")[0] for word in SETTINGS}
    assert tried | ELSEWHERE == set(Settings.model_fields) and not tried & ELSEWHERE


@pytest.mark.parametrize("word", SETTINGS)
def test_every_setting_changes_something(word, undisturbed, tmp_path):
    *beside, word = word.split()
    one = run(tmp_path / "one", *beside) if beside else undisturbed[0]
    other = run(tmp_path / "other", *beside, word)
    shared = [name for name in other["parameters"] if name.startswith("features.")]
    assert any(not other["parameters"][name].equal(one["parameters"][name]) for name in shared)


@pytest.mark.parametrize("recipe", sorted({path.stem for path in (ROOT / "recipes").glob("*.json")} - {"gan"}))
def test_every_recipe_passes_a_dry_run(recipe, tmp_path):
    train.main([f"recipe={recipe}", "epochs=1", "limit=1000", "valid_ratio=0.02", f"out_dir={tmp_path}"])
    best = checkpoint.load(tmp_path / "best_model.pt", "best_model")
    assert best["settings"]["recipe"] == recipe and len(best["class_names"]) == 10


def test_a_teacher_with_the_whole_share_makes_the_labels_meaningless(undisturbed, tmp_path):
    taught = [f"teacher={undisturbed[1] / 'best_model.pt'}", "teacher_share=1", "auxiliary=0"]
    one, other = (run(tmp_path / smoothing, *taught, f"label_smoothing={smoothing}") for smoothing in ("0.0", "0.3"))
    assert same_parameters(one, other)
    assert not same_parameters(one, run(tmp_path / "warm", *taught, "temperature=5"))
    assert not same_parameters(one, run(tmp_path / "shared", *taught, "teacher_share=0.5"))


@pytest.fixture
def targets(undisturbed, train_data, monkeypatch):
    """What teach.py writes, of the first 50 images only."""
    monkeypatch.setattr(teach, "load_images", lambda *_: (train_data[0][:50], train_data[1][:50]))
    teach.main([f"out_dir={undisturbed[1]}", "precision=float32"])
    return checkpoint.load(undisturbed[1] / "targets.pt", "targets")


def test_targets_are_what_the_network_says_of_each_image_and_its_mirror_image(targets, undisturbed, train_data):
    path, images = undisturbed[1] / "best_model.pt", train_data[0][:50]
    best = checkpoint.load(path, "best_model")
    network = checkpoint.rebuild(best, path)
    logits = torch.stack([model.infer(network, x, best["mean"], best["std"]) for x in (images, images.flip(-1))])
    assert torch.allclose(targets["log_probabilities"].float(), logits.log_softmax(2).mean(0), atol=1e-3, rtol=1e-3)


def test_targets_that_call_shoes_clothes_are_believed(targets, train_data, tmp_path):
    path = tmp_path / "targets.pt"
    log_probabilities = torch.eye(2).mul(8).log_softmax(1)[1 - labels_of(train_data[1], 2)].half()  # (60000, 2)
    checkpoint.save(path, {**targets, "log_probabilities": log_probabilities})
    ended = run(tmp_path / "x", f"teacher={path}", "teacher_share=1", "auxiliary=0")
    assert ended["history"][-1]["valid_accuracy"] < 0.1


def test_targets_are_refused_where_they_say_nothing(targets, tmp_path):
    path = tmp_path / "targets.pt"
    for said in (torch.zeros(59_999, 2), torch.full((60_000, 2), torch.nan), 3):
        checkpoint.save(path, {**targets, "log_probabilities": said})
        with pytest.raises(UserError, match="run teach"):
            run(tmp_path / "x", f"teacher={path}")
    with pytest.raises(UserError, match="says nothing of generated images"):
        run(tmp_path / "x", f"teacher={path}", "augment=gan")


def test_a_teacher_is_refused_if_it_saw_the_validation_images_or_tells_other_classes(undisturbed, tmp_path):
    teacher = f"teacher={undisturbed[1] / 'best_model.pt'}"
    for word, told in (
        ("seed=1", "validation images"),
        ("valid_ratio=0.05", "validation images"),
        ("output_dim=10", "tells the classes clothes, shoe, not T-shirt/top"),
        (f"teacher={ROOT / 'transfer' / 'best_model.pt'}", "tells the classes flats, heels, not clothes, shoe"),
        ("runs=2", "leave runs=2 out"),
        ("folds=2", "leave folds=2 out"),
    ):
        with pytest.raises(UserError, match=told):
            run(tmp_path, teacher, word)
    checkpoint.save(tmp_path / "x.pt", {**torch.load(undisturbed[1] / "best_model.pt"), "settings": {"seed": 0}})
    with pytest.raises(UserError, match="doesn't say on which images it was trained"):
        run(tmp_path, f"teacher={tmp_path / 'x.pt'}")


def test_patience_stops_a_run_that_no_longer_improves(tmp_path, capsys):
    ended = run(tmp_path, "epochs=50", "patience=1", "lr=0.1", "optimizer=sgd", "schedule=none")
    assert len(ended["history"]) == ended["best"]["epoch"] + 1 < 50
    assert "stopped early" in capsys.readouterr().out


def test_schedules_rise_for_the_warmup_and_end_at_zero():
    for schedule in ("one_cycle", "cosine"):
        settings = train.TrainSettings(schedule=schedule, lr=2.0, warmup=0.25)
        assert learning_rate(settings, 0) < 0.1
        assert learning_rate(settings, 0.25) == 2.0
        assert learning_rate(settings, 0.625) == pytest.approx(1.0)
        assert learning_rate(settings, 1) == pytest.approx(0)


def test_plateau_is_torchs():
    losses = [1.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.4, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.1, patience=3, threshold=0
    )  # acts after patience + 1
    settings = train.TrainSettings(schedule="plateau", lr=1.0)
    for epoch, loss in enumerate(losses, 1):
        plateau.step(loss)
        assert learning_rate(settings, 0, losses[:epoch]) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_a_wrong_setting_overwrites_nothing(undisturbed):
    before = (undisturbed[1] / "best_model.pt").read_bytes()
    with pytest.raises(UserError):
        run(undisturbed[1], "lr=0")
    assert (undisturbed[1] / "best_model.pt").read_bytes() == before
