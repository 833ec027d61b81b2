"""Photographs become Fashion-MNIST images; bad ones are refused in one line."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import checkpoint
import data_preprocessing
import predict
import test as test_script
import views as views_module
from config import ROOT, UserError
from data_preprocessing import CLASS_NAMES
from model import load_model
from photo import CHROMA, CUT_BY_COLOUR, DISTANCE, WHOLE, open_image, prepare, to_fashion_mnist, to_lab
from trainer import infer
from views import classify, clothes_or_shoe, face_left, select_views


@pytest.fixture(scope="module")
def out(tmp_path_factory, untrained):
    """A folder with a best_model.pt of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "best_model.pt", untrained)
    return folder


def photograph(ground="white", ink="black", size=(400, 300)):
    image = Image.new("RGB", size, ground)
    ImageDraw.Draw(image).polygon([(100, 200), (300, 200), (300, 100), (250, 100)], fill=ink)
    return image


@pytest.mark.parametrize(
    "ground, ink",
    [
        ("white", "black"),
        ("#d8d0c8", "#503020"),
        ("black", "white"),
        ("#202428", "#c0b0a0"),
        ("#6e6e6e", "black"),
        ("#909090", "white"),
    ],
)
def test_an_object_fills_the_frame_bright_on_exactly_black(ground, ink):
    view = to_fashion_mnist(photograph(ground, ink))
    rows, columns = np.flatnonzero((view > 60).any(1)), np.flatnonzero((view > 60).any(0))
    assert view.shape == (28, 28) and view.dtype == np.uint8
    assert (columns[0], columns[-1]) == (0, 27)  # twice as wide as high: 28 x 14, centred
    assert 6 <= rows[0] <= 8 and 19 <= rows[-1] <= 21
    assert (view[:6] == 0).all() and (view[22:] == 0).all()


def test_a_noisy_and_unevenly_lit_background_is_still_trimmed():
    shade = np.linspace(185, 235, 400)[None, :, None] + np.random.default_rng(0).normal(0, 5, (300, 400, 3))
    pixels = np.where(np.asarray(photograph()) == 0, 40, shade).clip(0, 255).astype(np.uint8)
    view = to_fashion_mnist(Image.fromarray(pixels))
    assert (view > 100).any(0).sum() >= 26 and view[:5].max() < 40


def test_facing_left_does_not_depend_on_a_horizontal_flip(train_data):
    shoes = train_data[0][train_data[1] == 9][:50, 0]
    assert face_left(shoes.flip(-1)).equal(face_left(shoes))


def test_shoes_that_point_to_the_right_are_flipped(train_data):
    shoes = train_data[0][train_data[1] == 9][:50, 0]
    is_same = (face_left(shoes.flip(-1)) == shoes).all((1, 2))
    assert is_same.float().mean() > 0.9  # the model classifies a few as shoes both ways


def test_a_fashion_mnist_image_is_unchanged(train_data, tmp_path):
    for number in (0, 646, 746):
        pixels = train_data[0][number, 0].numpy()
        Image.fromarray(pixels).save(tmp_path / "image.png")
        assert (to_fashion_mnist(open_image(tmp_path / "image.png")) == pixels).all()


@pytest.mark.parametrize(
    "mode, suffix", [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "tiff"), ("LA", "png")]
)
def test_every_colour_mode_gives_nearly_the_same_view(mode, suffix, tmp_path):
    path = tmp_path / f"photo.{suffix}"
    photograph().convert(mode).save(path)
    view, expected = (to_fashion_mnist(image).astype(int) for image in (open_image(path), photograph()))
    assert np.abs(view - expected).mean() < 3


@pytest.mark.parametrize("factor, dtype", [(16, np.uint16), (257, np.uint16), (1, np.int32)])
def test_8_12_and_16_bits_in_wider_pixels_are_read(factor, dtype, tmp_path):
    grey = np.linspace(0, 255, 900).astype(np.uint8).reshape(30, 30)
    Image.fromarray(grey.astype(dtype) * factor).save(tmp_path / "deep.tiff")
    assert (np.asarray(open_image(tmp_path / "deep.tiff").convert("L")) == grey).all()


def test_a_transparent_background_is_white(tmp_path):
    image = photograph().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.asarray(photograph().convert("L")) == 0, 255, 0).astype(np.uint8)))
    image.save(tmp_path / "cut.png")
    assert (to_fashion_mnist(open_image(tmp_path / "cut.png")) == to_fashion_mnist(photograph())).all()


def test_an_animation_is_its_first_frame(tmp_path):
    photograph().save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (400, 300), "red")])
    assert np.abs(np.asarray(open_image(tmp_path / "moving.gif")).astype(int) - np.asarray(photograph())).mean() < 3


def test_a_photograph_rotated_by_its_camera_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    deep = Image.fromarray(np.asarray(photograph().convert("L")).astype(np.uint16) * 257)
    for image, name in ((photograph(), "rotated.jpg"), (deep, "rotated.png"), (photograph().convert("P"), "palette.png")):
        image.save(tmp_path / name, exif=exif)
        assert open_image(tmp_path / name).size == (300, 400)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "CMYK"])
def test_a_large_image_is_reduced_before_it_is_copied(mode, tmp_path):
    path = tmp_path / "large.tiff"
    photograph().resize((2700, 3600)).convert(mode).save(path)
    image = open_image(path)
    assert image.size == (900, 1200) and image.mode == "RGB"


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: Image.new("RGB", (1, 1)).save(path), "1 x 1"),
        (lambda path: path.write_bytes(b"no image"), "no readable image"),
        (lambda path: path.write_bytes(b""), "no readable image"),
        (lambda path: (photograph().save(path), path.write_bytes(path.read_bytes()[:300])), "no readable image"),
        (lambda path: Image.new("1", (7_200, 7_200)).save(path), "pixels are too many"),
        (lambda path: Image.new("1", (13_500, 13_500)).save(path), "too many"),  # Pillow itself refuses it
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder in which no file was read"),
    ],
    ids=["1x1", "foreign", "empty", "truncated", "large", "enormous", "missing", "folder"],
)
def test_a_bad_image_is_refused_in_a_line_that_begins_with_its_path(write, message, out, tmp_path, capsys):
    path = tmp_path / "photo.png"
    write(path)
    with pytest.raises(SystemExit) as ended:
        predict.main([f"out_dir={out}", str(path)])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ") and message in line and ended.value.code == 2


@pytest.mark.parametrize(
    "ground, ink, size", [("white", "white", (400, 300)), ("black", "black", (28, 28)), ("#00aa00", "#ff2020", (400, 300))]
)
def test_where_nothing_stands_out_there_is_no_cut_out_but_a_warning(ground, ink, size):
    image = photograph(ground, ink, size)
    views, warning = prepare(image)
    assert to_fashion_mnist(image) is None and "nothing stands out" in warning
    assert (views[0] == views[CUT_BY_COLOUR]).all() and (ground == ink or views[0].max() > 100)


def busy(seed=0):
    """A dark shoe on a ground of coarse light blotches."""
    ground = np.random.default_rng(seed).integers(120, 256, (15, 20, 3)).astype(np.uint8)
    ground = np.asarray(Image.fromarray(ground).resize((400, 300), Image.Resampling.NEAREST))
    return Image.fromarray(np.where(np.asarray(photograph()) == 0, np.uint8(20), ground))


def test_a_cut_out_by_colour_leaves_specks_behind():
    image = photograph("#336699", "#a03020")
    image.paste("white", (5, 5, 20, 20))
    view, clean = (prepare(picture)[0][CUT_BY_COLOUR] for picture in (image, photograph("#336699", "#a03020")))
    assert view.max() > 100 and np.abs(view.astype(int) - clean).max() <= 3


def test_a_cut_out_by_colour_is_black_where_the_background_is():
    view = prepare(photograph("#336699", "#a03020"))[0][CUT_BY_COLOUR]
    assert (view == 0).mean() > 0.3 and (view > 100).mean() > 0.1


def test_noise_on_the_background_is_cut_away():
    noisy = np.asarray(photograph("#b0b0b0", "#202020")).astype(int) + np.random.default_rng(0).normal(0, 4, (300, 400, 1))
    noisy, clean = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), photograph("#b0b0b0", "#202020")
    views = [prepare(image)[0][CUT_BY_COLOUR].astype(int) for image in (noisy, clean)]
    assert np.abs(views[0] - views[1]).mean() < 4


def test_lab_has_the_published_coordinates_of_red():  # of sRGB with white D50: 54.3, 80.8, 69.9
    lab = to_lab(Image.new("RGB", (2, 3), "red"))
    assert lab.shape == (3, 2, 3) and np.abs(lab[0, 0] / 2.55 - (54.3, 80.8, 69.9)).max() < 1


def test_a_distance_ignores_which_of_two_colours_is_the_background():
    dark, light = (prepare(photograph(*colours))[0][DISTANCE] for colours in (("#202020", "#c0c0c0"), ("#c0c0c0", "#202020")))
    assert dark.max() > 100 and np.abs(dark.astype(int) - light).max() < 20


@pytest.mark.parametrize("size", [(3000, 8), (8, 3000), (8, 8), (29, 28)])
@pytest.mark.parametrize("colour", ["white", "#336699"])
def test_a_thin_or_tiny_picture_has_five_views(size, colour):
    image = Image.new("RGB", size, colour)
    image.putpixel((4, 4), (0, 0, 0))
    assert [view.shape for view in prepare(image)[0]] == [(28, 28)] * 5


def test_the_whole_photograph_is_seen_in_its_own_grey_values():
    view = prepare(photograph("#b0b0b0", "#303030"))[0][WHOLE]
    assert view[0, 0] == 0xB0 and view.min() == 0x30  # a wide one is extended by its border's grey


def test_chroma_sees_colour_but_no_shadow_in_the_middle_square():
    image = photograph("#b0b0b0", "#404040", (420, 280))
    assert (prepare(image)[0][CHROMA] <= 3).all()
    image.paste("red", (70, 0, 210, 140))  # the middle square's first quarter
    view = prepare(image)[0][CHROMA]
    assert (view[:13, :13] > 100).all() and (view[15:] <= 3).all() and (view[:, 15:] <= 3).all()


def two_objects():
    image = photograph()
    image.paste("black", (20, 20, 120, 90))
    return image


def with_a_speck():
    image = photograph()
    image.paste("black", (20, 20, 60, 40))
    return image


@pytest.mark.parametrize(
    "make, warning",
    [(photograph, ""), (with_a_speck, ""), (busy, "background is busy"), (two_objects, "two objects")],
)
def test_a_photograph_that_may_be_misread_has_a_warning(make, warning):
    assert (warning in prepare(make())[1]) and bool(prepare(make())[1]) == bool(warning)


def test_a_model_without_scenes_does_not_see_the_whole_photograph(out):
    views = torch.stack([torch.from_numpy(np.stack(prepare(photograph())[0]))])
    changed = views.clone()
    changed[:, WHOLE] = 0
    model = load_model(out / "best_model.pt")
    assert select_views(model, views).equal(select_views(model, changed))
    model.metadata["architecture"] = "cnn_photo"
    assert select_views(model, views)[:, WHOLE:].equal(views[:, WHOLE:])
    model.metadata["settings"] = {"augment": "scene:0.5"}
    assert select_views(model, views).equal(views)
    model.metadata["settings"] = {"data": "my_images"}
    assert select_views(model, views).equal(views[:, :1])


def test_the_mean_over_views_is_surer_than_the_arithmetic_mean_and_less_sure_than_the_geometric_mean(out):
    model, views = load_model(out / "best_model.pt"), torch.from_numpy(np.stack(prepare(busy())[0]))
    logits = infer(model, views.unsqueeze(1))
    arithmetic, geometric = logits.softmax(1).mean(0), logits.log_softmax(1).mean(0).softmax(0)
    answer = classify(model, views.unsqueeze(0))[0]
    assert answer.sum().item() == pytest.approx(1)
    assert arithmetic.max() < answer.max() < geometric.max()


def test_a_photograph_with_one_view_has_that_views_probability(out):
    model, views = load_model(out / "best_model.pt"), torch.from_numpy(np.stack(prepare(busy())[0]))
    assert torch.allclose(classify(model, views.unsqueeze(1)), infer(model, views.unsqueeze(1)).softmax(1), atol=1e-6)


def test_shoes_are_three_of_the_ten_classes():
    ten = torch.zeros(2, 10)
    ten[0, [5, 7, 9, 8]] = torch.tensor([0.1, 0.1, 0.2, 0.6])
    ten[1, 9] = 1
    assert torch.allclose(clothes_or_shoe(ten), torch.tensor([[0.6, 0.4], [0, 1]]))


def test_a_model_that_reads_scenes_weighs_the_classes_of_a_photograph_only(monkeypatch):
    model, views = load_model(ROOT / "runs/photo/best_model.pt"), torch.from_numpy(np.stack(prepare(busy())[0]))
    image = views[:1].expand(5, 28, 28)  # as of an image of the data set
    assert torch.allclose(classify(model, image.unsqueeze(0)), infer(model, image[:1].unsqueeze(1)).softmax(1), atol=1e-6)
    weighed, odds, sharpness = classify(model, views.unsqueeze(0))[0], views_module.ODDS, views_module.SHARPNESS
    monkeypatch.setattr(views_module, "ODDS", {})
    monkeypatch.setattr(views_module, "SHARPNESS", 1)
    factors = weighed ** (1 / sharpness) / classify(model, views.unsqueeze(0))[0]
    assert torch.allclose(factors / factors[0], torch.tensor([odds.get(name, 1) for name in CLASS_NAMES]))


@pytest.fixture
def folder(tmp_path):
    """Three photographs, one of them in a folder of its own, and a file that is none."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("a shoe.png", "-dash.png", "more/schön.png"):
        photograph().save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_a_folder_is_predicted_past_a_file_that_is_no_image(folder, out, capsys):
    predict.main([f"out_dir={out}", str(folder)])
    printed = capsys.readouterr()
    assert all(f"{name}: predicted" in printed.out for name in ("a shoe.png", "-dash.png", "schön.png"))
    assert printed.err.startswith(f"{folder / 'notes.txt'}: is no readable image")
    assert (out / "plots" / "prediction.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_name_is_not_the_whole_repository():
    with pytest.raises(UserError, match="the name of an image is empty"):
        predict.find_files("")


def test_relative_names_and_patterns_are_also_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predict.find_files("plots/cur*.png") == predict.find_files("plots/curves.png") == [ROOT / "plots" / "curves.png"]


def test_a_pattern_names_files(folder, out, capsys):
    predict.main([f"out_dir={out}", f"{folder}/*.png"])
    assert capsys.readouterr().out.count(": predicted") == 2


def test_a_file_has_one_line_whatever_its_name_is(folder, out, capsys):
    for name, other in (("a shoe.png", "a\nb.png"), ("notes.txt", "a\nb.txt")):
        (folder / name).rename(folder / other)
    predict.main([f"out_dir={out}", str(folder / "a\nb.png"), str(folder / "a\nb.txt")])
    printed = capsys.readouterr()
    assert printed.out.startswith("a b.png: predicted") and printed.err.startswith(f"{folder}/a b.txt: ")
    assert printed.err.count("\n") == 1


def test_predictions_are_listed_in_a_table(folder, out):
    predict.main([f"out_dir={out}", str(folder)])
    rows = list(csv.DictReader((out / "predictions.csv").open(newline="")))
    assert list(rows[0]) == ["file", "class", "probability", "runner_up", "warning"] and len(rows) == 3
    assert all({row["class"], row["runner_up"]} == {"clothes", "shoe"} and float(row["probability"]) >= 0.5 for row in rows)


def test_a_picture_has_a_map_for_each_view(folder, out, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict.plots, "draw_predictions", lambda *arguments: drawn.append(arguments))
    predict.main([f"out_dir={out}", str(folder)])
    _, views, maps, *_ = drawn[0]
    assert np.shape(views) == np.shape(maps) == (3, 2, 28, 28) and np.any(maps, (2, 3)).all()


def test_a_map_is_red_where_the_probability_falls_and_blue_where_it_rises():
    fall = np.zeros((28, 28))
    fall[0], fall[1] = 1, -1
    red, blue, grey = (predict.plots.overlay_map(np.zeros((28, 28), np.uint8), fall)[row, 0] for row in (0, 1, 2))
    assert red.argmax() == 0 and blue.argmax() == 2 and np.ptp(grey) == 0


def test_more_files_than_a_picture_holds_take_several(folder, out, monkeypatch):
    monkeypatch.setattr(predict.plots, "MAX_PREDICTIONS", 2)
    predict.main([f"out_dir={out}", str(folder)])
    assert (out / "plots" / "prediction_2.png").exists()


def test_without_a_recipe_there_are_two_answers(folder, capsys, monkeypatch):
    monkeypatch.setattr(predict.checkpoint, "write_atomically", lambda *_: None)
    monkeypatch.setattr(predict.plots, "draw_predictions", lambda *_: None)
    predict.main([str(folder / "a shoe.png")])
    predict.main(["recipe=photo", str(folder / "a shoe.png")])
    both, one, *_ = (line for line in capsys.readouterr().out.splitlines() if "predicted" in line)
    answers = r"(clothes|shoe) \(\d+\.\d\d%\), [\w/ -]+ \(\d+\.\d\d%\)"
    assert re.fullmatch(rf"a shoe\.png: predicted {answers}; runner-up [\w/ -]+, \d+\.\d\d%", both)
    assert one == re.sub(r"(clothes|shoe) \(.*?\), ", "", both)


@pytest.fixture
def training_images(read_training_images, monkeypatch):
    read_training_images(monkeypatch, 500)


def test_predict_takes_a_test_image_by_its_number(out, training_images, train_data, capsys):
    predict.main([f"out_dir={out}", "index=7"])
    truth = "shoe" if train_data[1][7] in (5, 7, 9) else "clothes"
    assert "test image 7: predicted" in (printed := capsys.readouterr().out) and f"true {truth}" in printed


def test_a_random_test_image_is_the_seeds(out, training_images, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict, "predict_test_image", lambda *arguments: drawn.append(arguments[3]))
    for word in ("seed=3", "seed=3", "seed=4"):
        predict.main([f"out_dir={out}", word])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_file_name_that_is_too_long_is_refused(out, capsys):
    with pytest.raises(SystemExit):
        predict.main([f"out_dir={out}", "x" * 300 + ".png"])
    assert "is no readable image" in capsys.readouterr().err


def test_index_and_image_files_together_are_refused(out):
    with pytest.raises(UserError, match="not both"):
        predict.main([f"out_dir={out}", "index=7", "photo.png"])


def test_test_writes_scores_that_agree_with_themselves(out, training_images, train_data):
    (out / "plots" / "prediction.png").unlink(missing_ok=True)
    test_script.main([f"out_dir={out}"])
    scores = json.loads((out / "scores.json").read_text())
    shoes = torch.isin(train_data[1][:500], torch.tensor([5, 7, 9])).sum().item()
    assert scores["n"] == 500 and scores["parameters"] == 16_386
    assert scores["correct"] == sum(scores["confusion"][i][i] for i in (0, 1)) == 500 - len(scores["mistakes"])
    assert scores["accuracy"] == scores["correct"] / 500
    assert scores["per_class"]["shoe"]["n"] == shoes
    assert scores["accuracy_ci95"][0] < scores["accuracy"] < scores["accuracy_ci95"][1]
    pictures = {"confusion.png", "mistakes.png", "features.png", "reliability.png", "prediction.png"}
    assert pictures <= {path.name for path in (out / "plots").iterdir()}


@pytest.fixture(scope="module")
def losses(out, train_data, draw_nothing):
    """Loss of images and of their horizontal flips, with and without test-time augmentation."""
    losses = {}
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        for tta in ("none", "hflip"):
            for side, images in (("left", train_data[0][:100]), ("right", train_data[0][:100].flip(-1))):
                patch.setattr(data_preprocessing, "load_images", lambda *_, images=images: (images, train_data[1][:100]))
                test_script.main([f"out_dir={out}", f"tta={tta}"])
                losses[tta, side] = json.loads((out / "scores.json").read_text())["loss"]
    return losses


def test_with_tta_a_horizontal_flip_makes_no_difference(losses):
    assert losses["hflip", "left"] == pytest.approx(losses["hflip", "right"], rel=1e-5)
    assert losses["none", "left"] != pytest.approx(losses["none", "right"], rel=1e-3)


def test_tta_is_the_mean_probability_of_both_views(out, train_data):
    model, images = load_model(out / "best_model.pt"), train_data[0][:100]
    logits, features = test_script.logits_and_features(model, images, torch.float32, "hflip")
    expected = torch.stack([infer(model, view).softmax(1) for view in (images, images.flip(-1))]).mean(0)
    assert torch.allclose(logits.softmax(1), expected, atol=1e-6)
    assert torch.allclose(features, infer(model, images, features=True), atol=1e-6)  # of the images as they are


def test_a_model_of_other_classes_is_not_tested_on_fashion_mnists_labels(out, tmp_path, training_images):
    saved = checkpoint.load(out / "best_model.pt", "best_model")
    checkpoint.save(tmp_path / "best_model.pt", {**saved, "class_names": ["flats", "heels"]})
    for script in (test_script, predict):
        with pytest.raises(UserError, match="flats, heels"):
            script.main([f"out_dir={tmp_path}"])
