"""The notebook: short, small, and with the outputs of one run from top to bottom. `.ci/run` runs it."""

import json
import re

from config import ROOT

TOUR = ROOT / "tour.ipynb"


def test_the_notebook_is_short_and_small():
    assert len(json.loads(TOUR.read_text())["cells"]) <= 25 and TOUR.stat().st_size < 1_000_000


def test_its_outputs_are_those_of_one_run_without_an_error():
    cells = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


def test_no_output_names_a_folder_of_the_machine():
    outputs = [output for cell in json.loads(TOUR.read_text())["cells"] for output in cell.get("outputs", [])]
    texts = [line for output in outputs for line in (*output.get("text", []), *output.get("data", {}).get("text/plain", []))]
    assert texts and not [line for line in texts if re.search(r"(^|\s)/\w", line)]
