"""Benchmarks: what is measured, what is printed."""

import pytest

import test as test_script
import train
from config import UserError
from tools import bench


def run_here(script, *words):
    """As `bench.run`, without a process of its own, which takes seconds to import torch."""
    {"train.py": train, "test.py": test_script}[script].main([*words])
    return 1.0


def test_the_ladder_measures_recipes_beside_ordinary_training(read_training_images, draw_nothing, monkeypatch, capsys):
    drawn = []
    read_training_images(monkeypatch, 400)
    draw_nothing(monkeypatch)
    monkeypatch.setattr(bench, "run", run_here)
    monkeypatch.setattr(bench, "RUNGS", {"fast": 1})
    monkeypatch.setattr(bench, "ordinary_epochs", lambda folder, seed, name: [(9.0, 0.5, 0.8)])
    monkeypatch.setattr(bench, "copy_images", lambda settings, folder: None)
    monkeypatch.setattr(bench.plots, "draw_ladder", lambda rungs, ordinary, path: drawn.append((rungs, ordinary)))
    bench.main(["part=ladder", "limit=300", "epochs=1"])
    [(rungs, ordinary)] = drawn
    [row] = rungs["fast"]
    assert row["seconds"] == 1 and 0 < row["accuracy"] < 1
    assert ordinary == {"resnet8": [(9.0, 0.5, 0.8)], "deep_cnn": [(9.0, 0.5, 0.8)]}
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["fast, seconds", "fast, test loss", "fast, accuracy"]
    assert all("median" in line and line.endswith("(n=1)") for line in lines)


@pytest.mark.parametrize(
    ("part", "word", "message"),
    [
        ("ladder", "recipe=fast", "recipe=fast: part=ladder measures"),
        ("train", "recipe=fast", "recipe=fast: part=train measures Task 1"),
        ("train", "valid_ratio=0", "part=train: needs validation images"),
        ("valid", "valid_ratio=0", "part=valid: needs validation images"),
        ("valid", "seed=3", "seed=3: seeds are 0 to repeats-1"),
    ],
)
def test_a_part_refuses_what_it_cannot_measure(part, word, message):
    with pytest.raises(UserError, match=message):
        bench.main([f"part={part}", word])


def test_a_command_that_fails_is_one_clear_error():
    with pytest.raises(UserError, match=r"python -c .* failed: \['no data'\]"):
        bench.run("-c", "raise SystemExit('no data')")
