"""The README's table of ten-class results and the picture of overfitting: `python results.py`.

They come from what train.py and test.py wrote: a recipe's row is the mean over runs/NAME and runs/NAME/seed_*, wherever
there is a scores.json. Replaces what stands between the two marks in README.md, and draws plots/overfitting.png. Trains
and tests nothing.
"""

import json
import statistics
from pathlib import Path

import plots
from checkpoint import read_history, write_atomically
from config import ROOT, UserError, run_script

REFERENCES = {"compact_cnn": 0.9033, "resnet8": 0.9038, "resnet18": 0.8952}  # test accuracy, as reported
FAITHFUL = ("mlp", "deep_cnn", "deep_cnn_dropout", "compact_cnn", "resnet8", "resnet18")
OURS = ("fast", "tiny_best")
MARKS = ("<!-- python results.py -->\n", "<!-- end of python results.py -->\n")


def row(recipe: str, root: Path = ROOT) -> str | None:
    """A recipe's line of the table, None if it has no scores."""
    folder = root / "runs" / recipe
    folders = [path.parent for path in sorted([*folder.glob("scores.json"), *folder.glob("seed_*/scores.json")])]
    if not folders:
        return None
    scores = [json.loads((path / "scores.json").read_text()) for path in folders]
    histories = [read_history(path / "history.jsonl")[1] for path in folders]
    accuracies = [score["accuracy"] for score in scores]
    spread = f" ± {statistics.stdev(accuracies):.2%}" if len(accuracies) > 1 else ""
    minutes = statistics.mean(sum(line["seconds"] for line in history) for history in histories) / 60
    epochs = statistics.mean(map(len, histories))
    reference = REFERENCES.get(recipe.removesuffix("_plus"))
    cells = (
        f"`{recipe}`",
        f"{scores[0]['parameters']:,}",
        f"{scores[0]['multiply_adds'] / 1e6:.1f} M",
        f"{epochs:.0f}",
        f"{minutes:.1f}",
        f"**{statistics.mean(accuracies):.2%}**{spread} (n={len(accuracies)})",
        f"{reference:.2%}" if reference else "" if recipe in OURS else "not reported",
    )
    return f"| {' | '.join(cells)} |".replace("%", " %").replace("  %", " %")


def table(root: Path = ROOT) -> str:
    lines = [
        "| recipe | parameters | multiply-adds | epochs | minutes | test accuracy | the reference's |",
        "|---|---|---|---|---|---|---|",
    ]
    recipes = [recipe for name in FAITHFUL for recipe in (name, f"{name}_plus")]
    lines += [line for recipe in (*recipes, *OURS) if (line := row(recipe, root))]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood; results.py takes no settings")
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise UserError(
            f"{readme}: the lines {MARKS[0].strip()} and {MARKS[1].strip()} are missing; put them where the table goes"
        )
    made = table()
    write_atomically(readme, f"{before}{begin}{made}{end}{after}".encode())
    print(made, end="")
    compared = {name: ROOT / "runs" / name / "history.jsonl" for name in ("deep_cnn", "deep_cnn_dropout")}
    if all(path.exists() for path in compared.values()):
        histories = {name: read_history(path)[1] for name, path in compared.items()}
        plots.draw_overfitting(histories, ROOT / "plots" / "overfitting.png")
    print(f"wrote the table to {readme}")


if __name__ == "__main__":
    run_script(main)
