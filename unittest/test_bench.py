"""Benchmarks: what is measured, what is printed."""

import pytest

from config import UserError
from tools import bench


def test_feed_compares_training_with_a_ready_batch(monkeypatch, capsys):
    monkeypatch.setattr(bench, "FEED_STEPS", 2)
    bench.main(["part=feed", "recipe=fast", "repeats=2", "valid_ratio=0.01"])
    lines = capsys.readouterr().out.splitlines()[2:]  # after a row per repeat
    assert [line.split(":")[0] for line in lines] == ["training", "one batch that is ready", "ratio"]
    assert all("median" in line and line.endswith("(n=2)") for line in lines)


def test_a_command_that_fails_is_one_clear_error():
    with pytest.raises(UserError, match=r"python -c .* failed: \['no data'\]"):
        bench.run("-c", "raise SystemExit('no data')")
