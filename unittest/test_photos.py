"""The benchmark on labelled photographs."""

import pytest
from PIL import Image

from config import UserError
from tools import bench, photos


@pytest.mark.parametrize(
    ("folder", "labels"),
    [
        ("ankle_boot", {9}),
        ("Ankle boot", {9}),
        ("t-shirt", {0}),
        ("pants", {1}),
        ("shoes", {5, 7, 9}),
        ("skirt", set()),
        ("hat", set()),
    ],
)
def test_folders_are_named_as_fashion_mnists_classes_or_the_cc0_sets(folder, labels):
    assert photos.accepted_labels(folder) == labels


@pytest.fixture
def folder(tmp_path, train_data):
    """Ten training images of each of three classes as picture files, and a file that is none."""
    for name, label in (("trouser", 1), ("shoes", 9), ("skirt", 3)):
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(train_data[0][train_data[1] == label][:10, 0]):
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_known_images_are_classified_and_counted(folder, monkeypatch, capsys):
    monkeypatch.setattr(photos.plots, "draw_sheet", lambda *_: None)
    for name in ("shoes/broken.png", "skirt/broken.png", "trouser/.hidden"):
        (folder / name).write_text("no image")
    bench.main(["part=photos", "recipe=resnet14", f"photos={folder}"])
    printed = capsys.readouterr()
    assert "Task 1, clothes or shoe: all 93.8% (n=32)" in printed.out  # 30 of 32: the broken ones count as wrong
    assert "resnet14, ten classes: all 95.2% (n=21)" in printed.out and "trouser 100.0% (n=10)" in printed.out  # no skirts
    assert printed.err.startswith(f"{folder / 'shoes' / 'broken.png'}: ")


def test_a_model_without_the_ten_classes_is_an_error(folder):
    with pytest.raises(UserError, match="has not Fashion-MNIST's ten classes"):
        bench.main(["part=photos", "out_dir=transfer", f"photos={folder}"])


def test_a_folder_without_photographs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no photographs in folders named as"):
        bench.main(["part=photos", f"photos={tmp_path}"])
