"""The table of results is what the score files say."""

import json

import pytest

import results
from config import ROOT, UserError


def write(folder, accuracy, seconds, tta="none"):
    folder.mkdir(parents=True)
    scores = {"parameters": 98_442, "multiply_adds": 1_994_240, "accuracy": accuracy, "tta": tta}
    (folder / "scores.json").write_text(json.dumps(scores))
    lines = [{"first_share": 1.0, "hard_share": 0.25}, *({"epoch": epoch, "seconds": seconds} for epoch in (1, 2, 3))]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_a_row_is_the_mean_over_seeds_and_has_the_minutes_of_the_first(tmp_path):
    write(tmp_path / "runs" / "compact_cnn", 0.91, 20)
    write(tmp_path / "runs" / "compact_cnn" / "seed_1", 0.93, 40)
    row = "| `compact_cnn` | 98,442 | 2.0 M | 3 | 1.5 | 1.0 | **92.00 %** ± 1.41 % (n=2) | 90.33 % |"
    assert results.row("compact_cnn", tmp_path) == row
    assert results.table(tmp_path).splitlines()[2:] == [row]


def test_mirrored_scores_are_not_taken_for_plain_ones(tmp_path):
    write(tmp_path / "runs" / "compact_cnn", 0.91, 20, tta="mirror")
    with pytest.raises(UserError, match="tta=mirror"):
        results.table(tmp_path)


def test_the_readme_has_the_table_of_the_shipped_scores():
    assert results.MARKS[0] + results.table() + results.MARKS[1] in (ROOT / "README.md").read_text()
