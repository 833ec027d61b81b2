"""The conditional GAN: resumes bitwise identical, samples of every class, generated images in training."""

import json
import os
import shlex
import signal
import sys

import pytest
import torch
from PIL import Image

import checkpoint
from config import ROOT, TrainSettings, UserError
from data_preprocessing import CLASS_NAMES, load_splits
from gan import sample, score
from gan import train as gan_train
from gan.networks import (
    NOISE_DIM,
    Discriminator,
    Generator,
    add_generated,
    draw,
    fixed_noise,
    generate,
    load_generator,
    one_hot,
)
from model import count_parameters, load_model
from script import load_settings, run_script
from trainer import Trainer, infer

SHORT = ["limit=150", "batch_size=50", "schedule=none", "valid_ratio=0.01"]
CLASSIFIER = "classifier=runs/compact_cnn_plus/best_model.pt"


def run(out, *words):
    gan_train.main([*SHORT, *words, f"out_dir={out}"])
    return checkpoint.load(out / "checkpoint.pt", "gan_checkpoint")


def is_same_run(one, other):
    """Whether two checkpoints' contents have bitwise identical networks, samples and losses."""
    networks = ("generator", "ema", "discriminator")
    losses = [[line["generator_loss"] for line in state["history"]] for state in (one, other)]
    samples = [torch.stack(state["samples"]) for state in (one, other)]
    return (
        losses[0] == losses[1]
        and torch.equal(*samples)
        and all(tensor.equal(other[network][name]) for network in networks for name, tensor in one[network].items())
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The contents of checkpoint.pt and the folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("gan")
    return run(out, "epochs=2"), out


@pytest.fixture(scope="module")
def generator(uninterrupted):
    return load_generator(uninterrupted[1] / "generator.pt")[0]


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_generator_maps_noise_to_images():
    images = Generator()(torch.randn(3, NOISE_DIM), one_hot(torch.tensor([3, 3, 7])))
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1


def test_the_discriminator_maps_images_to_scores_and_logits():
    scores, logits = Discriminator()(torch.zeros(3, 1, 28, 28), one_hot(torch.tensor([3, 3, 7])))
    assert scores.shape == (3,) and logits.shape == (3, 10)


def test_the_networks_have_the_documented_parameters():
    assert [count_parameters(network) for network in (Generator(), Discriminator())] == [336_993, 407_787]


def test_the_generators_file_has_at_most_2_megabytes(uninterrupted):
    assert (uninterrupted[1] / "generator.pt").stat().st_size <= 2_000_000


def test_after_a_signal_the_printed_command_gives_a_bitwise_identical_run(uninterrupted, tmp_path, monkeypatch, capsys):
    original, calls = gan_train.learning_rate, []

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == 5:  # of 6: in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(gan_train, "learning_rate", signalling)
        patch.setattr(gan_train.plots, "draw_sheet", lambda *_: None)
        patch.setattr(sys, "argv", ["gan/train.py"])
        run_script(gan_train.main, [*SHORT, "epochs=2", f"out_dir={tmp_path}"])
    assert (end.value.code, len(calls)) == (143, 5)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("to continue: ")[2])
    assert command[:2] == ["python", "gan/train.py"] and command[-1] == "resume=true"
    gan_train.main(command[2:])
    assert is_same_run(uninterrupted[0], checkpoint.load(tmp_path / "checkpoint.pt", "gan_checkpoint"))


def test_resuming_under_other_settings_is_refused_by_name(uninterrupted):
    with pytest.raises(UserError, match=r"ema_decay=0\.5 \(was 0\.999\)"):
        run(uninterrupted[1], "epochs=2", "ema_decay=0.5", "resume=true")


def test_an_epochs_samples_are_of_the_generators_ema(uninterrupted, generator):
    noise, classes = fixed_noise(gan_train.GRID_COLUMNS)
    assert uninterrupted[0]["samples"][-1].equal(generate(generator, classes, noise).squeeze(1))


def test_the_ema_differs_from_the_generator_and_between_epochs(uninterrupted):
    state = uninterrupted[0]
    assert not state["ema"]["project.weight"].equal(state["generator"]["project.weight"])
    assert not torch.equal(*state["samples"])


def test_every_epoch_is_in_the_animation(uninterrupted):
    with Image.open(uninterrupted[1] / "plots" / "training.gif") as animation:
        assert animation.n_frames == 2


def test_the_last_epochs_samples_are_drawn(uninterrupted):
    assert (uninterrupted[1] / "plots" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_its_settings_and_a_line_per_epoch(uninterrupted):
    settings, epochs = checkpoint.read_history(uninterrupted[1] / "history.jsonl")
    assert settings["limit"] == 150 and [line["epoch"] for line in epochs] == [1, 2]
    assert all({"seconds", "lr", "discriminator_loss", "generator_loss"} < line.keys() for line in epochs)


@pytest.mark.parametrize("word", ["aux_loss_weight=0", "seed=1"])
def test_a_setting_changes_the_training(word, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(gan_train.plots, "draw_sheet", lambda *_: None)
    assert not run(tmp_path, "epochs=1", word)["samples"][0].equal(uninterrupted[0]["samples"][0])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"epoch 1: a loss is .*nan.* in batch"):
        run(tmp_path, "lr=1e30", "epochs=1")


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_the_class_decides_what_the_same_noise_becomes():
    generator, _ = load_generator(ROOT / "runs" / "gan" / "generator.pt")
    noise, classes = fixed_noise(10)
    logits = infer(load_model(ROOT / "runs" / "resnet14" / "best_model.pt"), generate(generator, classes, noise))
    assert (logits.argmax(1) == classes.argmax(1)).sum() >= 90  # of 100


def test_samples_are_written_for_each_class(uninterrupted):
    sample.main(["per_class=3", f"out_dir={uninterrupted[1]}"])
    folders = {path.name: sorted(path.iterdir()) for path in (uninterrupted[1] / "samples").iterdir()}
    assert len(folders) == 10 and {len(files) for files in folders.values()} == {3} and "T-shirt-top" in folders
    with Image.open(folders["Sneaker"][0]) as image:
        assert image.size == (28, 28) and image.mode == "L"


def test_samples_are_the_same_for_the_same_seed_only(generator):
    labels = torch.arange(10)
    assert draw(generator, labels, seed=1).equal(draw(generator, labels, seed=1))
    assert not draw(generator, labels, seed=1).equal(draw(generator, labels, seed=2))


def test_less_noise_makes_other_samples(generator):
    labels = torch.arange(10)
    assert not draw(generator, labels, seed=1).equal(draw(generator, labels, seed=1, noise_std=0.5))


def test_samples_replace_no_foreign_folder(uninterrupted):
    (uninterrupted[1] / "samples" / "holiday").mkdir(parents=True)
    with pytest.raises(UserError, match="samples/holiday: is no folder of a class"):
        sample.main(["per_class=1", f"out_dir={uninterrupted[1]}"])
    (uninterrupted[1] / "samples" / "holiday").rmdir()


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_tell_samples_from_real_images(uninterrupted, monkeypatch):
    monkeypatch.setattr(score, "COMPARED", 100)
    monkeypatch.setattr(score, "LEARNER", ["recipe=fast", "epochs=1"])
    score.main(["limit=3000", CLASSIFIER, f"out_dir={uninterrupted[1]}"])
    scores = json.loads((uninterrupted[1] / "scores.json").read_text())
    assert scores["gan_test"] < 0.5 < scores["real_test"]  # two short epochs make no clothes
    assert scores["gan_train"] < 0.65 < scores["real_train"]
    assert scores["nearest_distance"]["validation"] < scores["nearest_distance"]["generated"]
    assert set(scores["variety"]) == set(CLASS_NAMES)


def test_too_few_images_to_compare_with_are_refused(uninterrupted):
    with pytest.raises(UserError, match="limit=20: leaves fewer than two images of some class"):
        score.main(["limit=20", CLASSIFIER, f"out_dir={uninterrupted[1]}"])


def test_a_classifier_that_saw_the_validation_images_is_refused(uninterrupted):
    with pytest.raises(UserError, match=r"fast/best_model\.pt: was trained with seed=0 valid_ratio=0\.0 "):
        score.main(["classifier=runs/fast/best_model.pt", f"out_dir={uninterrupted[1]}"])


def test_a_classifier_of_other_classes_is_refused(uninterrupted):
    with pytest.raises(UserError, match=r"classifier=best_model\.pt: has not Fashion-MNIST's ten classes"):
        score.main(["classifier=best_model.pt", f"out_dir={uninterrupted[1]}"])


# ---- generated images in training ------------------------------------------------------------------------------------


@pytest.fixture
def build_trainer(uninterrupted):
    """A function that makes a trainer whose training set has generated images."""

    def build(*words):
        common = ["limit=300", *SHORT[1:], "augment=gan", f"generator={uninterrupted[1] / 'generator.pt'}"]
        settings = load_settings([*common, *words], TrainSettings)
        split = add_generated(load_splits(settings, torch.device("cpu"))[0], settings)
        return Trainer(settings, settings.seed, split, torch.float32)

    return build


def test_generated_images_are_the_given_fraction_of_the_training_set(build_trainer):
    trainer = build_trainer("gan_fraction=0.4")
    assert (trainer.train >= 60_000).sum() == 200 and len(trainer.train) == 500


def test_generated_images_are_of_every_class_equally(build_trainer):
    assert build_trainer("gan_fraction=0.4").fine_labels[60_000:].bincount().tolist() == [20] * 10


def test_generated_images_are_trained_on(build_trainer):
    trainer = build_trainer("gan_fraction=0.5", "first_epoch_fraction=1")
    trainer.train_epoch(1, [])
    assert trainer.sampler.losses[60_000:].isfinite().all() and len(trainer.sampler.losses) == 60_300


def test_generated_images_change_neither_normalisation_nor_validation(build_trainer):
    one, other = build_trainer(), build_trainer("augment=")
    assert (one.model.mean, one.model.std) == (other.model.mean, other.model.std)
    assert one.valid_images.equal(other.valid_images) and one.valid_labels.equal(other.valid_labels)


@pytest.mark.parametrize("word", ["augment=", "gan_fraction=0.5", "gan_fraction=0", "augment=gan:0.5"])
def test_settings_of_generated_images_change_the_training_set(word, build_trainer):
    one, other = build_trainer(), build_trainer(word)
    assert len(one.images) != len(other.images) or not one.images.equal(other.images)


@pytest.mark.parametrize("word", ["seed=1", "valid_ratio=0.2"])
def test_a_generator_that_saw_the_validation_images_is_refused(word, build_trainer):
    with pytest.raises(UserError, match=r"generator\.pt: was trained with seed=0 .*validation images"):
        build_trainer(word)


def test_a_generator_of_an_unknown_split_is_refused(build_trainer, uninterrupted, tmp_path):
    contents = checkpoint.load(uninterrupted[1] / "generator.pt", "generator")
    checkpoint.save(tmp_path / "generator.pt", {**contents, "settings": {"seed": 0}})
    with pytest.raises(UserError, match="doesn't say on which images it was trained"):
        build_trainer(f"generator={tmp_path / 'generator.pt'}")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "word", "message"),
    [
        (sample, "per_class=0", "per_class=0"),
        (sample, "seed=0", "generator.pt: there is no such file"),
        (score, "noise_std=0", "noise_std=0"),
        (gan_train, "runs=4", "runs=4: there is no setting 'runs' here"),
        (gan_train, "batch_norm=true", "batch_norm=true: there is no setting"),
        (gan_train, "schedule=plateau", "schedule=plateau: it should be 'none', 'cosine' or 'linear'"),
        (gan_train, "resume=true", "checkpoint.pt: there is no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_bad_input_is_refused_in_one_line(script, word, message, tmp_path):
    with pytest.raises(UserError) as refused:
        script.main([word, f"out_dir={tmp_path}"])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("fraction", ["-0.1", "1", "1.5"])
def test_a_fraction_below_0_or_from_1_is_refused(fraction):
    with pytest.raises(UserError, match="gan_fraction"):
        load_settings(["augment=gan", f"gan_fraction={fraction}"], TrainSettings)
