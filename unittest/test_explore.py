"""Exploration: nearest images are found, and the pictures are drawn."""

import pytest
import torch

import explore


def test_planted_near_copies_are_found(train_data):
    images = train_data[0][:2_000]
    queries = images[[1_234, 56, 789]].clone()
    pixel = queries[1, 0, 14, 14]
    pixel += 28 if pixel < 128 else -28  # one pixel of 784 changed by 28 levels: root mean square 28 / sqrt(784) = 1
    indices, distances = explore.nearest(queries, images)
    assert indices.tolist() == [1_234, 56, 789]
    assert distances.tolist() == pytest.approx([0, 1, 0])


def test_copies_are_counted_beyond_the_first(train_data):
    images = train_data[0][:100]
    assert explore.count_copies(torch.cat([images, images[:7], images[:2]])) == explore.count_copies(images) + 9


@pytest.mark.parametrize("output_dim", [2, 10])
def test_every_picture_is_drawn_and_the_classes_are_counted(output_dim, tmp_path, monkeypatch, train_data, capsys):
    monkeypatch.setattr(explore, "load_images", lambda *_: (train_data[0][:1_000], train_data[1][:1_000]))
    explore.main([f"out_dir={tmp_path}", f"output_dim={output_dim}", "valid_ratio=0.2"])
    shown = capsys.readouterr().out
    assert "stand in the training set exactly: 1000, 0 of them under another label" in shown
    names = ["augmented.png", "classes.png", "means.png", "pairs.png", "samples.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
