"""The table of results: equal to the score files."""

import json

import pytest

from config import ROOT, UserError
from tools import results


def write(folder, accuracy, seconds, tta="none"):
    folder.mkdir(parents=True)
    scores = {"parameters": 98_442, "macs": 1_994_240, "accuracy": accuracy, "tta": tta}
    (folder / "scores.json").write_text(json.dumps(scores))
    settings = {"first_epoch_fraction": 1.0, "hard_fraction": 0.25}
    lines = [settings, *({"epoch": epoch, "seconds": seconds} for epoch in (1, 2, 3))]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "runs" / "compact_cnn", 0.91, 20)
    write(tmp_path / "runs" / "compact_cnn" / "seed_1", 0.93, 40)
    return tmp_path


def test_a_row_is_the_mean_over_seeds_and_has_the_minutes_of_the_first(root):
    row = "| `compact_cnn` | 98,442 | 2.0 M | 3 | 1.5 | 1.0 | **92.00 ± 1.41 %** (n=2) | 90.33 % |"
    assert results.row("compact_cnn", root) == row


def test_the_table_has_a_row_for_each_recipe_with_scores(root):
    assert results.table(root).splitlines()[2:] == [results.row("compact_cnn", root)]


def test_scores_with_test_time_augmentation_are_refused(tmp_path):
    write(tmp_path / "runs" / "compact_cnn", 0.91, 20, tta="hflip")
    with pytest.raises(UserError, match="tta=hflip"):
        results.table(tmp_path)


def test_the_tables_recipes_are_those_of_the_folder():
    assert set(results.RECIPES) == {path.stem for path in (ROOT / "recipes").glob("*.json")}


def test_the_page_has_the_table_of_the_shipped_scores():
    assert results.MARKS[0] + results.table() + results.MARKS[1] in (ROOT / "RESULTS.md").read_text()
