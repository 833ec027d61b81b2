"""Exploration: copies are counted, and the pictures are drawn."""

import pytest
import torch

import explore
from data_preprocessing import as_task


def test_copies_are_counted_beyond_the_first(train_data):
    images = train_data[0][:100]
    assert explore.count_copies(torch.cat([images, images[:7], images[:2]])) == explore.count_copies(images) + 9


@pytest.fixture
def few_images(read_training_images, monkeypatch):
    read_training_images(monkeypatch, 1_000)


@pytest.mark.parametrize(("output_dim", "valid_ratio"), [(2, 0.2), (10, 0)])
def test_classes_and_copies_are_counted(output_dim, valid_ratio, few_images, tmp_path, monkeypatch, dataset, capsys):
    for name in ("draw_sheet", "draw_classes"):
        monkeypatch.setattr(f"plots.{name}", lambda *_: None)
    task = as_task(dataset, output_dim)
    explore.main([f"out_dir={tmp_path}", f"output_dim={output_dim}", f"valid_ratio={valid_ratio}"])
    printed = capsys.readouterr().out
    assert "test images in the training set exactly: 1000, 0 of them with another label" in printed
    rows = [line.split()[-3:] for line in printed.splitlines() if line.startswith(task.class_names)]
    training, validation, test = torch.tensor([list(map(int, row)) for row in rows]).unbind(1)
    assert test.equal(task.labels[:1_000].bincount()) and test.equal(training + validation)


def test_pictures_are_drawn(few_images, tmp_path):
    explore.main([f"out_dir={tmp_path}", "augment=scene:0.8"])
    names = ["augmented.png", "classes.png", "means.png", "pairs.png", "samples.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
