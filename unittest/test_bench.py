"""The measuring itself: what is counted, what is printed."""

import torch

import bench
from config import load_settings
from model import build, layers, whiten


def test_a_steps_arithmetic_leaves_out_what_is_not_computed():
    network = build("fast_cnn", 10)
    first, *others = (layer.multiply_adds for layer in layers(network) if layer.multiply_adds)
    assert bench.multiply_adds(network) == 2 * first + 3 * sum(others)  # nobody wants the gradient of the images
    whiten(network, torch.randn(20, 1, 28, 28))
    assert bench.multiply_adds(network) == first + 3 * sum(others)


def test_feed_compares_the_training_loop_with_a_ready_batch(monkeypatch, capsys):
    monkeypatch.setattr(bench, "FEED_STEPS", 2)
    bench.feed(load_settings(["recipe=fast", "repeats=2"], bench.BenchSettings))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["training", "one batch that is ready", "ratio"]
    assert "share of the matrix product" in lines[-1] and "(n=2)" in lines[-1]
