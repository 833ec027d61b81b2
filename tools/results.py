"""RESULTS.md's table of ten-class results and the picture of overfitting: `python tools/results.py`.

A recipe's row is the mean over runs/NAME and runs/NAME/seed_*, wherever train.py and test.py have left a scores.json. Replaces
the text between the two marks in RESULTS.md, and draws plots/overfitting.png. Trains and tests nothing.
"""

import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import plots
from checkpoint import read_history, write_atomically
from config import ROOT, UserError
from script import check_no_settings, run_script

REFERENCES = {"compact_cnn": 0.9033, "resnet8": 0.9038, "resnet18": 0.8952}  # test accuracy, as reported
FAITHFUL = ("mlp", "deep_cnn", "deep_cnn_dropout", "compact_cnn", "resnet8", "resnet18")
OURS = (
    "fast", "fast93", "fast94", "fast95", "micro", "resnet8_alone", "resnet14", "tiny_best",
    "separable20", "resnet20", "resnet20_wide", "resnet20_wider", "photo",
)  # fmt: skip
RECIPES = (*(recipe for name in FAITHFUL for recipe in (name, f"{name}_plus")), *OURS)
MARKS = ("<!-- python tools/results.py -->\n", "<!-- end of python tools/results.py -->\n")


def read_seeds(recipe: str, root: Path = ROOT) -> list[tuple[dict, dict, list[dict]]]:
    """A recipe's scores, settings and epochs, of each seed; none if it has not been tested."""
    folder = root / "runs" / recipe
    folders = [path.parent for path in sorted([*folder.glob("scores.json"), *folder.glob("seed_*/scores.json")])]
    scores = [json.loads((path / "scores.json").read_text()) for path in folders]
    for path, score in zip(folders, scores):
        if score["tta"] != "none":
            raise UserError(f"{path / 'scores.json'}: was made with tta={score['tta']}; run test.py there without it")
    return [(score, *read_history(path / "history.jsonl")) for path, score in zip(folders, scores)]


def row(recipe: str, root: Path = ROOT) -> str | None:
    """A recipe's line of the table, None if it has no scores."""
    seeds = read_seeds(recipe, root)
    if not seeds:
        return None
    accuracy = statistics.mean(scores["accuracy"] for scores, _, _ in seeds)
    scores, settings, history = seeds[0]
    minutes = sum(line["seconds"] for line in history) / 60
    spread = f" ± {100 * statistics.stdev(scores['accuracy'] for scores, _, _ in seeds):.2f}" if len(seeds) > 1 else ""
    runs = history[-1].get("run", 1)
    epochs = len(history) // runs
    full_epochs = settings["first_epoch_fraction"] + settings["hard_fraction"] * (epochs - 1)  # on all images, as many steps
    reference = REFERENCES.get(recipe.removesuffix("_plus"))
    cells = (
        f"`{recipe}`",
        f"{scores['parameters']:,}",
        f"{scores['macs'] / 1e6:.1f} M",
        f"{runs} x " * (runs > 1) + f"{epochs}",
        f"{runs * full_epochs:.4g}",
        f"{minutes:.1f}",
        f"**{100 * accuracy:.2f}{spread} %** (n={len(seeds)})",
        f"{100 * reference:.2f} %" if reference else "" if recipe in OURS else "not reported",
    )
    return f"| {' | '.join(cells)} |"


def table(root: Path = ROOT) -> str:
    header = "| recipe | parameters | MACs | epochs | epochs on all images | minutes | test accuracy | the reference's |"
    rows = [line for recipe in RECIPES if (line := row(recipe, root))]
    return "\n".join([header, "|---" * header.count(" |") + "|", *rows]) + "\n"


def main(arguments: list[str]) -> None:
    check_no_settings(arguments, __doc__)
    page = ROOT / "RESULTS.md"
    rows, text = table(), page.read_text(encoding="utf-8")
    changed, found = re.subn(f"(?<={MARKS[0]}).*(?={MARKS[1]})", lambda _: rows, text, flags=re.DOTALL)
    if not found:
        raise UserError(f"{page}: lacks the line {MARKS[0].strip()} or {MARKS[1].strip()}; put them around the table")
    write_atomically(page, changed.encode())
    print(rows, end="")
    paths = [ROOT / "runs" / name / "history.jsonl" for name in ("deep_cnn", "deep_cnn_dropout")]
    if all(path.exists() for path in paths):
        plots.draw_overfitting({path.parent.name: read_history(path)[1] for path in paths}, ROOT / "plots" / "overfitting.png")
    print(f"wrote the table to {page}")


if __name__ == "__main__":
    run_script(main)
