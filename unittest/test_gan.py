"""The conditional GAN: resumed to the bit, samples of the classes asked for, mixed into training."""

import copy
import json

import pytest
import torch
from PIL import Image

import checkpoint
import gan
import train
import training
from config import ROOT, Settings, UserError, load_settings
from data_preprocessing import GARMENTS, split_indices
from gan_model import NOISE_DIM, Discriminator, Generator, draw, generate, load_generator, one_hot
from metrics import frechet_distance, mean_distance
from model import count_parameters, infer

SHORT = ["limit=300", "batch_size=50"]


def trained(out, *words):
    gan.main(["train", *SHORT, *words, f"out_dir={out}"])
    return checkpoint.load(out / "checkpoint.pt", "gan_checkpoint")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gan")
    return trained(out, "epochs=2", "schedule=none"), out


def test_networks_map_noise_to_images_and_images_to_scores():
    classes = one_hot(torch.tensor([3, 3, 7]))
    images = Generator()(torch.randn(3, NOISE_DIM), classes)
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1
    scores, logits = Discriminator()(images, classes)
    assert scores.shape == (3,) and logits.shape == (3, 10)
    assert [count_parameters(network) for network in (Generator(), Discriminator())] == [336_993, 407_787]


def test_the_generator_is_at_most_2_megabytes(undisturbed):
    assert (undisturbed[1] / "generator.pt").stat().st_size <= 2_000_000


def test_the_class_decides_what_the_same_noise_becomes():
    generator, _ = load_generator(ROOT / "runs" / "gan" / "generator.pt")
    path = ROOT / "runs" / "tiny_best" / "best_model.pt"
    saved = checkpoint.load(path, "best_model")
    noise, classes = gan.fixed_noise()
    logits = infer(checkpoint.rebuild(saved, path), generate(generator, classes, noise), saved["mean"], saved["std"])
    assert (logits.argmax(1) == classes.argmax(1)).sum() >= 90  # of 100


def test_resume_gives_the_same_bits(undisturbed, tmp_path):
    trained(tmp_path, "epochs=1", "schedule=none")
    resumed = trained(tmp_path, "epochs=2", "schedule=none", "resume=true")
    for network in ("generator", "averaged", "discriminator"):
        assert all(tensor.equal(resumed[network][name]) for name, tensor in undisturbed[0][network].items())
    losses = [[line["generator_loss"] for line in state["history"]] for state in (undisturbed[0], resumed)]
    assert losses[0] == losses[1]


def test_an_epoch_is_drawn_by_the_average_of_its_generator(undisturbed):
    generator, _ = load_generator(undisturbed[1] / "generator.pt")
    noise, classes = gan.fixed_noise()
    assert undisturbed[0]["frames"][-1].equal(generate(generator, classes, noise).squeeze(1))


def test_every_epoch_is_in_the_pictures(undisturbed):
    assert (undisturbed[1] / "plots" / "samples.png").exists()
    with Image.open(undisturbed[1] / "plots" / "training.gif") as animation:
        assert animation.n_frames == 2


def test_sample_writes_as_many_of_each_class_as_asked_for(undisturbed):
    gan.main(["sample", "per_class=3", "classes=Sneaker,T-shirt/top", f"out_dir={undisturbed[1]}"])
    folders = {path.name: sorted(path.iterdir()) for path in (undisturbed[1] / "samples").iterdir()}
    assert {name: len(files) for name, files in folders.items()} == {"Sneaker": 3, "T-shirt-top": 3}
    with Image.open(folders["Sneaker"][0]) as image:
        assert image.size == (28, 28) and image.mode == "L"


def test_samples_are_the_same_for_the_same_seed_alone(undisturbed):
    generator, _ = load_generator(undisturbed[1] / "generator.pt")
    labels = torch.arange(10)
    assert draw(generator, labels, seed=1).equal(draw(generator, labels, seed=1))
    assert not draw(generator, labels, seed=1).equal(draw(generator, labels, seed=2))


def test_score_says_what_samples_are_worth(undisturbed, monkeypatch):
    monkeypatch.setattr(gan, "COMPARED", 100)
    monkeypatch.setattr(gan, "LEARNER", {"recipe": "fast", "epochs": 1})
    gan.main(["score", "limit=10000", "classifier=runs/compact_cnn_plus/best_model.pt", f"out_dir={undisturbed[1]}"])
    scores = json.loads((undisturbed[1] / "scores.json").read_text())
    assert scores["gan_test"] < 0.5 < scores["real_test"]  # two short epochs make no garments
    assert scores["gan_train"] < 0.7 < scores["real_train"]
    distances = scores["frechet_distance"]
    assert distances["other real images"] < distances["blurred"] < distances["generated"]
    assert set(scores["variety"]) == set(GARMENTS)


def test_score_refuses_too_few_images_to_compare_with(undisturbed):
    with pytest.raises(UserError, match="limit=20: leaves fewer than two images of some class"):
        gan.main(["score", "limit=20", "classifier=runs/compact_cnn_plus/best_model.pt", f"out_dir={undisturbed[1]}"])


def test_a_classifier_that_has_seen_validation_images_is_no_judge(undisturbed):
    with pytest.raises(UserError, match=r"fast/best_model\.pt: was trained with seed=0 valid_ratio=0\.05"):
        gan.main(["score", "classifier=runs/fast/best_model.pt", f"out_dir={undisturbed[1]}"])


def test_samples_take_no_strangers_place(undisturbed):
    (undisturbed[1] / "samples" / "holiday").mkdir(parents=True)
    with pytest.raises(UserError, match="samples/holiday: is none of the classes' folders"):
        gan.main(["sample", "per_class=1", f"out_dir={undisturbed[1]}"])
    (undisturbed[1] / "samples" / "holiday").rmdir()


def test_generated_images_are_their_share_of_training(undisturbed, tmp_path, monkeypatch):
    seen = []
    epoch_order = training.epoch_order
    monkeypatch.setattr(training, "epoch_order", lambda order, *others: seen.append(order) or epoch_order(order, *others))
    words = [*SHORT, "epochs=1", f"generator={undisturbed[1] / 'generator.pt'}", f"out_dir={tmp_path}"]
    train.main([*words, "augment=gan", "gan_share=0.4"])
    assert (seen[0] >= 60_000).sum() == 200 and len(seen[0]) == 500


@pytest.mark.parametrize("word", ["augment=", "gan_share=0.5", "gan_fresh=true", "augment=gan:0.5"])
def test_settings_of_generated_images_change_training(word, undisturbed, tmp_path):
    parameters = []
    for number, words in enumerate(([], [word])):
        common = [*SHORT, "epochs=1", "augment=gan", f"generator={undisturbed[1] / 'generator.pt'}"]
        train.main([*common, *words, f"out_dir={tmp_path / str(number)}"])
        parameters.append(checkpoint.load(tmp_path / str(number) / "best_model.pt", "best_model")["parameters"])
    assert any(not parameters[1][name].equal(tensor) for name, tensor in parameters[0].items())


def test_a_generator_that_saw_the_validation_images_is_refused(undisturbed, tmp_path):
    words = ["augment=gan", f"generator={undisturbed[1] / 'generator.pt'}", f"out_dir={tmp_path}"]
    for word in ("seed=1", "valid_ratio=0.2"):
        with pytest.raises(UserError, match="validation images"):
            train.main([*SHORT, "epochs=1", *words, word])


def test_fresh_images_are_chosen_by_their_own_losses(undisturbed, train_data, monkeypatch):
    words = ["augment=gan", "gan_fresh=true", "hard_share=0.5", "output_dim=10", "batch_size=50", "precision=float32"]
    settings = load_settings([*words, f"generator={undisturbed[1] / 'generator.pt'}"], Settings)
    train, valid = split_indices(train_data[1], 0.1, 0)
    state = training.Training(settings, 0, *train_data, train[:300], valid[:300], torch.float32)
    state.train_epoch(1, [])
    before, known = copy.deepcopy(state.network), []
    order = training.epoch_order
    monkeypatch.setattr(training, "epoch_order", lambda *arguments: known.append(arguments[2].clone()) or order(*arguments))
    state.train_epoch(2, [])
    made = len(state.generated.garments)
    logits = infer(before, state.images[-made:], state.mean, state.std)
    losses = torch.nn.functional.cross_entropy(logits, state.labels[-made:], reduction="none")
    torch.testing.assert_close(known[0][-made:], losses)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "train|sample|score"),
        (["paint"], "train|sample|score"),
        (["sample", "classes=Shoe"], "nearest is 'Shirt'"),
        (["sample", "per_class=0"], "per_class=0"),
        (["train", "runs=4"], "runs=4: means nothing here"),
        (["train", "batch_norm=true"], "batch_norm=true: means nothing here"),
        (["train", "schedule=plateau"], "no validation loss that could stall"),
        (["sample", "classes=,"], "there is no class ''"),
        (["sample"], "generator.pt: there is no such file"),
        (["train", "resume=true"], "checkpoint.pt: there is no such file"),
    ],
)
def test_bad_input_is_refused_in_a_line(words, told, tmp_path):
    with pytest.raises(UserError) as refusal:
        gan.main([*words, f"out_dir={tmp_path}"] if words else [])
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


def test_help_needs_no_action(capsys):
    with pytest.raises(SystemExit) as ended:
        gan.main(["help"])
    assert ended.value.code == 0 and "\nper_class=100" in capsys.readouterr().out


@pytest.mark.parametrize("share", ["-0.1", "1", "1.5"])
def test_a_share_below_0_or_from_1_is_refused(share, tmp_path):
    with pytest.raises(UserError, match="gan_share"):
        train.main(["augment=gan", f"gan_share={share}", f"out_dir={tmp_path}"])


def test_frechet_distance_is_that_of_the_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20_000, 3, generator=generator)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    # means 2 apart in one of three directions, standard deviations 1 and 3: 4 + 3 * (3 - 1)^2
    assert frechet_distance(one, other * 3 + torch.tensor([2.0, 0, 0])) == pytest.approx(16, rel=0.03)


def test_mean_distance_is_in_grey_levels():
    images = torch.tensor([0, 10, 40], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    assert mean_distance(images) == pytest.approx((10 + 40 + 30) / 3)
