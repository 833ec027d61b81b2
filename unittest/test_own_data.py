"""Other data sets than Fashion-MNIST: a folder of images, MNIST's files; what is refused, in one line."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

import checkpoint
import data_preprocessing as data
import explore
import photo
import predict
import test as test_script
import train
from config import ROOT, RunSettings, UserError
from data_preprocessing import CLASS_NAMES, as_task, load_data, tenth_by_name
from model import load_model
from script import load_settings
from tools import soft_targets
from trainer import infer
from transfer import last_layer, shoe_images, train_eval
from views import select_views


def write_digits(folder, count, classes=10):
    """Of scikit-learn's digits, 8x8 pixels, the first `count` of each class, as FOLDER/train/CLASS/NUMBER.png."""
    digits = load_digits()
    for label in range(classes):
        path = folder / "train" / str(label)
        path.mkdir(parents=True)
        for number in np.flatnonzero(digits.target == label)[:count]:
            Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(path / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 40)


@pytest.fixture(scope="module")
def out(digits, draw_nothing, tmp_path_factory):
    """The folder of a training on the digits, and of its test."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plots.draw_curves", lambda *_: None)
        draw_nothing(patch)
        words = ["recipe=compact_cnn_plus", "epochs=5", "batch_size=32", "augment=shift:1", "class_weights=balanced"]
        train.main([*words, f"data={digits}", "prepare=resize", f"out_dir={out}"])
        test_script.main([f"out_dir={out}"])
    return out


@pytest.fixture
def few(tmp_path):
    """Ten images of each of two classes."""
    return write_digits(tmp_path / "few", 10, classes=2)


def load(folder, split="train", **settings):
    return load_data(split, folder, {"data": str(folder), "prepare": "resize", **settings})


# ---- a folder --------------------------------------------------------------------------------------------------------


def test_a_folders_classes_are_learned_and_tested(out, digits):
    scores = json.loads((out / "scores.json").read_text())
    assert scores["accuracy"] > 0.7 and scores["n"] == 40
    assert scores["task"] == f"10-class {digits}" and list(scores["per_class"]) == list("0123456789")
    model = load_model(out / "best_model.pt")
    assert model.metadata["settings"]["data"] == str(digits) and model.metadata["output_dim"] == 10


def test_a_tenth_without_a_folder_test_is_kept_for_testing_whatever_the_seed(digits, capsys):
    train_part, test_part = load(digits), load(digits, "test")
    assert test_part.labels.bincount().tolist() == [4] * 10 and train_part.labels.bincount().tolist() == [36] * 10
    images = {image.numpy().tobytes() for image in torch.cat([train_part.images, test_part.images])}
    assert len(images) == 400  # no two digits are the same
    assert f"{digits}: has no folder test; 40 of 400 images are kept for testing" in capsys.readouterr().out
    assert load(digits, "test", seed=1).images.equal(test_part.images)


def test_another_image_changes_the_test_images_of_a_class_by_one_at_most():
    files = [Path(f"{number:04}.png") for number in range(58)]
    before, after = ({file for file, chosen in zip(names, tenth_by_name(names)) if chosen} for names in (files[:57], files))
    assert len(before) == len(after) == 6 and len(after - before) <= 1


def test_a_folder_test_is_the_test_split(few):
    shutil.copytree(few / "train", few / "test")
    (few / "test" / "0" / "0000.png").unlink()
    assert (len(load(few).images), len(load(few, "test").images)) == (20, 19)


def test_resized_images_keep_their_grey_values(few):
    image = load(few).images[0, 0]
    assert image.dtype == torch.uint8 and image.shape == (28, 28) and image[0, 0] == 0 and image.max() > 200


def test_a_photographs_first_view_is_learned(tmp_path):
    pixels = np.full((90, 120, 3), 240, np.uint8)
    pixels[30:60, 20:100] = 40
    plain, empty = tmp_path / "plain.png", tmp_path / "empty.png"  # of the second nothing is cut out
    Image.fromarray(pixels).save(plain)
    Image.fromarray(pixels[:20]).save(empty)
    for path in (plain, empty):
        assert photo.read_views(path, "photo").equal(photo.read_photograph(path).views[:1])


def test_a_file_that_is_no_image_is_passed_over_with_a_line(few, capsys):
    (few / "train" / "1" / "broken.png").write_bytes(b"no image")
    assert load(few, seed=3).labels.bincount().tolist() == [9, 9]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{few / 'train' / '1' / 'broken.png'}: is no readable image")


def spoil(folder, how):
    one = folder / "train" / "1"
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "no train":
        (folder / "train").rename(folder / "images")
    elif how == "no classes":
        shutil.rmtree(folder / "train")
        (folder / "train").mkdir()
    elif how == "one class":
        shutil.rmtree(one)
    elif how == "case":
        (folder / "train" / "0").rename(folder / "train" / "Cat")
        one.rename(folder / "train" / "cat")
    elif how == "no image":
        shutil.rmtree(one)
        one.mkdir()
    elif how == "few images":
        for path in sorted(one.iterdir())[1:]:
            path.unlink()
    elif how == "other test":
        shutil.copytree(folder / "train" / "0", folder / "test" / "0")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "is neither one of fashion_mnist, mnist, kmnist nor a folder"),
        ("no train", "has no folder train; put images into"),
        ("no classes", "train: has no class folders"),
        ("one class", "train: has one class only, 0"),
        ("case", "the classes Cat and cat differ by case only; rename one or merge them"),
        ("no image", "1: has no image that can be read"),
        ("few images", "1: has one image only, and there is no folder test; add another image"),
        ("other test", "test: has the classes 0; train has 0, 1"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line_that_says_what_to_mend(how, message, few):
    spoil(few, how)
    with pytest.raises(UserError) as refused:
        load(few)
    assert message in str(refused.value) and str(few) in str(refused.value) and "\n" not in str(refused.value)


def test_more_folds_than_images_of_a_class_are_refused(few, tmp_path):
    with pytest.raises(UserError, match="folds=10: a class has only 9 training images"):
        train.main([f"data={few}", "folds=10", f"out_dir={tmp_path / 'out'}"])


# ---- a model of it ---------------------------------------------------------------------------------------------------


def test_a_model_of_fashion_mnist_is_finetuned_whatever_the_split(few, tmp_path):
    words = [f"data={few}", "prepare=resize", "seed=5", "valid_ratio=0.2", "epochs=1", "lr=1e-12"]
    train.main([*words, f"finetune={ROOT / 'best_model.pt'}", f"out_dir={tmp_path / 'out'}"])
    start, ended = load_model(ROOT / "best_model.pt"), load_model(tmp_path / "out" / "best_model.pt")
    assert torch.allclose(ended.features[0].weight, start.features[0].weight, atol=1e-6)


def test_a_model_of_another_split_of_the_same_folder_is_not_finetuned(few, tmp_path, monkeypatch):
    words = ["prepare=resize", "valid_ratio=0.2", "epochs=1"]
    train.main([*words, f"data={few}", f"out_dir={tmp_path / 'start'}"])
    monkeypatch.chdir(few)
    words += ["seed=1", f"finetune={tmp_path / 'start' / 'best_model.pt'}", f"out_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="may have seen validation images"):
        train.main([*words, f"data={few.parent / '.' / few.name}/"])


@pytest.mark.parametrize("way", ["resume", "finetune", "teacher"])
def test_a_folder_with_another_image_mixes_no_training_images_into_the_validation_images(way, few, tmp_path):
    words = [f"data={few}", "prepare=resize", f"out_dir={tmp_path / 'out'}"]
    train.main([*words, "epochs=1"])
    shutil.copy(few / "train" / "0" / "0000.png", few / "train" / "0" / "another.png")
    value = "true" if way == "resume" else tmp_path / "out" / "best_model.pt"
    with pytest.raises(UserError, match=rf"{way}=.*: comes from \[9, 9\] training images, by class; there are \[10, 9\]"):
        train.main([*words, "epochs=2", f"{way}={value}"])


def test_photographs_are_predicted_as_the_model_was_trained(out, digits, capsys):
    path = digits / "train" / "3" / "0003.png"
    predict.main([f"out_dir={out}", str(path)])
    assert "0003.png: predicted" in capsys.readouterr().out
    views = photo.read_photograph(path, "resize").views.unsqueeze(0)
    selected = select_views(load_model(out / "best_model.pt"), views)
    assert selected.shape == (1, 1, 28, 28) and selected[0].equal(photo.read_views(path, "resize"))


def test_all_views_of_an_image_are_learned_and_predicted_together(tmp_path):
    folder = write_digits(tmp_path / "some", 30, classes=2)
    words = ["prepare=views", "valid_ratio=0.2", "epochs=2", "augment=hflip,shift:1,erase", f"out_dir={tmp_path / 'out'}"]
    train.main([f"data={folder}", *words])
    predict.main([f"out_dir={tmp_path / 'out'}", str(folder / "train" / "1" / "0001.png")])
    test_script.main([f"out_dir={tmp_path / 'out'}"])
    model, images = load_model(tmp_path / "out" / "best_model.pt"), load(folder, prepare="views").images
    assert images.shape[1:] == (5, 28, 28) and select_views(model, images).equal(images)
    each = infer(model, images.flatten(0, 1).unsqueeze(1), features=True).unflatten(0, (-1, 5))
    assert torch.allclose(infer(model, images, features=True), each.mean(1), atol=1e-5)


def test_a_test_image_is_one_of_the_models_data_set(out, capsys):
    predict.main([f"out_dir={out}", "index=39"])
    assert "true 9" in capsys.readouterr().out
    with pytest.raises(UserError, match="index=40: there are 40 test images"):
        predict.main([f"out_dir={out}", "index=40"])


def test_another_data_set_of_the_same_classes_can_be_tested_on(out, digits, draw_nothing, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    for part in ("train", "test"):
        shutil.copytree(digits / "train", tmp_path / "others" / part)
    test_script.main([f"checkpoint={out / 'best_model.pt'}", f"data={tmp_path / 'others'}", f"out_dir={tmp_path}"])
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 400  # of `digits`, 40


def test_soft_targets_are_of_the_models_training_images(out, tmp_path, digits):
    soft_targets.main([f"checkpoint={out / 'best_model.pt'}", f"out_dir={tmp_path}"])
    path = tmp_path / "soft_targets.pt"
    assert checkpoint.load(path, "soft_targets")["log_probabilities"].shape == (360, 10)
    with pytest.raises(UserError, match="data=mnist: soft targets are of the images"):
        soft_targets.main([f"checkpoint={out / 'best_model.pt'}", f"out_dir={tmp_path}", "data=mnist"])
    words = ["recipe=mlp", f"teacher={path}", "valid_ratio=0.1", "epochs=1", "batch_size=64", f"out_dir={tmp_path / 'taught'}"]
    train.main([*words, f"data={digits}", "prepare=resize"])
    with pytest.raises(UserError, match=rf"soft_targets\.pt: was trained with .*data={digits}, so that"):
        train.main(words)


def test_task_2_freezes_the_model_and_reads_images_as_it_does(out, digits, few, tmp_path, monkeypatch):
    monkeypatch.setattr(last_layer, "UNLABELLED", 50)
    monkeypatch.setattr(train_eval, "draw_pictures", lambda *_: None)
    for label in ("0", "1"):  # other images than `few` has
        (few / "test" / label).mkdir(parents=True)
        for path in sorted((digits / "train" / label).iterdir())[10:15]:
            shutil.copy(path, few / "test" / label)
    words = [f"checkpoint={out / 'best_model.pt'}", f"out_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"which has no shoes; name shoes_dir=FOLDER"):
        train_eval.main(words)
    train_eval.main([*words, f"shoes_dir={few}"])
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["accuracy_mean"] > 0.9
    model = load_model(tmp_path / "out" / "best_model.pt")
    assert model.metadata["settings"]["prepare"] == "resize"
    for source in (model, load_model(out / "best_model.pt")):
        assert shoe_images.read_part(few / "test", source).images.equal(load(few, "test").images)
    predict.main([f"out_dir={tmp_path / 'out'}", str(few / "test" / "1")])
    assert (tmp_path / "out" / "predictions.csv").read_text().count(".png,1,") == 5


def test_a_folder_is_explored(digits, tmp_path, capsys, monkeypatch):
    for name in ("draw_sheet", "draw_classes"):
        monkeypatch.setattr(f"plots.{name}", lambda *_: None)
    explore.main([f"data={digits}", "prepare=resize", f"out_dir={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert "copies within the 360 training images: 0" in lines and ["9", "32", "4", "4"] in [line.split() for line in lines]


# ---- MNIST's files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Files of the format of MNIST's, of 30 and 20 random images, whose MD5 sums torchvision is told."""
    folder, resources, sizes = tmp_path / "MNIST" / "raw", [], {}
    folder.mkdir(parents=True)
    for number, name in enumerate(data.IDX_FILES):
        count = 30 if name.startswith("train") else 20
        dimensions = (count, 28, 28) if "images" in name else (count,)
        header = bytes([0, 0, 8, len(dimensions)]) + b"".join(size.to_bytes(4, "big") for size in dimensions)
        elements = np.random.default_rng(number).integers(0, 10, dimensions, np.uint8)
        packed = gzip.compress(header + elements.tobytes())
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
        sizes[name] = (dimensions, "")
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(data, "IDX_FILES", sizes)
    return folder


def no_route(folder, title):
    raise OSError("no\nnetwork")


def test_mnists_files_are_read(mnist, tmp_path):
    train_part, test_part = (load_data(split, tmp_path, {"data": "mnist"}) for split in ("train", "test"))
    assert (train_part.images.shape, test_part.images.shape) == ((30, 1, 28, 28), (20, 1, 28, 28))
    assert (train_part.images[:, 0].numpy() == np.random.default_rng(0).integers(0, 10, (30, 28, 28), np.uint8)).all()
    assert train_part.labels.dtype == torch.int64 and train_part.class_names[7] == "7 - seven"


@pytest.mark.parametrize(("how", "message"), [("damaged", "is damaged, its MD5"), ("missing", "is not there")])
def test_a_bad_file_of_mnists_that_cannot_be_downloaded_is_named_in_one_line(how, message, mnist, tmp_path, monkeypatch):
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(data, "fetch_with_torchvision", no_route)
    with pytest.raises(UserError) as refused:
        load_data("test", tmp_path, {"data": "mnist"})
    assert str(refused.value).startswith(f"{path}: {message}") and "(no network)" in str(refused.value)
    assert [entry.name for entry in mnist.iterdir() if entry.is_dir()] == []


def test_a_damaged_file_of_mnists_is_downloaded_again(mnist, tmp_path, monkeypatch):
    whole = shutil.copytree(mnist, tmp_path / "server")
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    monkeypatch.setattr(data, "fetch_with_torchvision", lambda folder, _: shutil.copytree(whole, folder / "raw"))
    load_data("train", tmp_path, {"data": "mnist"})
    assert all((mnist / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())


# ---- classes and settings --------------------------------------------------------------------------------------------


def test_task_1_has_two_classes_of_ten_fine_ones(dataset):
    task = as_task(dataset, 2)
    assert task.class_names == ("clothes", "shoe") and task.fine_labels.equal(dataset.labels)
    assert task.labels.tolist() == [int(label in (5, 7, 9)) for label in dataset.labels.tolist()]


@pytest.mark.parametrize("output_dim", [0, 10])
def test_all_classes_are_the_data_sets_own(output_dim, dataset):
    assert as_task(dataset, output_dim).class_names == CLASS_NAMES


@pytest.mark.parametrize("output_dim", [2, 3])
def test_other_numbers_of_classes_are_refused(output_dim, dataset):
    other = dataset._replace(class_names=tuple("0123456789"))
    with pytest.raises(UserError, match=f"output_dim={output_dim}: the data set has 10 classes"):
        as_task(other, output_dim)


def test_another_data_set_has_not_task_1s_number_of_classes():
    assert load_settings(["data=mnist"], RunSettings).output_dim == 0
    assert load_settings(["data=fashion_mnist"], RunSettings).output_dim == load_settings([], RunSettings).output_dim == 2


@pytest.mark.parametrize("words", [["data=mnist"], ["data=mnist", "recipe=mlp"]])
def test_another_data_set_needs_an_out_dir(words):
    with pytest.raises(UserError, match=r"data=mnist: .* files .*would be replaced; add out_dir=FOLDER"):
        _ = load_settings(words, RunSettings).out_path
    assert load_settings([*words, "out_dir=/x"], RunSettings).out_path.name == "x"


@pytest.mark.parametrize("settings_type", [RunSettings, explore.ExploreSettings])
@pytest.mark.parametrize("augment", ["scene", "gan"])
def test_augmentation_with_garments_is_refused_for_other_data(augment, settings_type):
    with pytest.raises(UserError, match=f"augment={augment}: is made for Fashion-MNIST's garments, not for data=mnist"):
        load_settings(["data=mnist", f"augment=shift,{augment}"], settings_type)
