"""A model card for each network that is part of the repository, and SHA256SUMS: `python tools/cards.py`.

The networks are the best_model.pt and generator.pt that git knows (`git add --force runs/NAME/best_model.pt` adds one). A card
is written from the network's file, its recipe and its scores.json. Trains and tests nothing.
"""

import hashlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
from config import ROOT, UserError, config_path, parse_augment, read_config
from script import check_no_settings, run_script
from tools.results import read_seeds

BUFFERS = ("mean", "std", "running_mean", "running_var", "num_batches_tracked")  # no parameters
CARDS = {"best_model.pt": "MODEL_CARD.md"}  # network -> its card, if that is not the README.md of its folder
USES = {
    "classes": "Teaching, and comparing methods on Fashion-MNIST. It classifies images of the data set's format: grey, "
    "28 x 28, one garment, bright on black.",
    "photo": "Photographs of one garment, through `predict.py`, which reads five views of each. Settings were chosen on the "
    "photographs below: expect a little less on yours.",
    "task 1": "Teaching; clothes or shoe in images of the data set's format; the features of Task 2; which way a shoe points.",
    "task 2": "Teaching; a start for two or more classes of your own (`shoes_dir=`).",
    "gan": "Teaching; images of a class. As further training images they did not help here (RESULTS.md).",
}
LIMITS = (
    "It has learned from catalogue pictures of one shop, and some of their labels are wrong ([DATA.md]({root}DATA.md)): "
    "differences below half a point say little. It knows nothing of people, and no decision about them should rest on it."
)
ONE_OF_ITS_CLASSES = " It answers with one of its classes, whatever it sees."
BLACK_ONLY = " It knows garments on black only: on photographs, `photo` is better."


def networks() -> list[str]:
    """The `.pt` files that git knows, sorted. Raises UserError without git."""
    try:
        listed = subprocess.run(["git", "ls-files", "*.pt"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"{ROOT}: git doesn't say which networks are part of the repository; it must be a checkout") from None
    return sorted(listed.split())


def card_path(network: str) -> Path:
    return ROOT / CARDS.get(network, str(Path(network).with_name("README.md")))


def card(network: str) -> str:
    """The text of the card of a best_model.pt or generator.pt, by its path from the root. Raises UserError without scores."""
    path = ROOT / network
    contents = checkpoint.load(path, path.stem)
    if not (path.parent / "scores.json").exists():
        raise UserError(f"{path}: has no scores.json beside it; run test.py there first")
    scores = json.loads((path.parent / "scores.json").read_text())
    root, recipe = "../" * network.count("/"), path.parent.name if network.startswith("runs/") else ""
    if path.stem == "generator":
        kind, title, rows = "gan", "The conditional GAN's generator", gan_figures(scores)
    elif "shots" in scores:
        kind, title, rows = "task 2", "Task 2: flats or heels", few_shot_figures(scores)
    else:
        has_scenes = "scene" in parse_augment(contents["settings"]["augment"])
        kind = "photo" if has_scenes else "classes" if recipe else "task 1"
        title = f"`{recipe}`: {scores['task']}" if recipe else f"Task 1: {scores['task']}"
        history = checkpoint.read_history(path.with_name("history.jsonl"))[1]
        rows = figures(scores) | training_figures(contents, history, recipe, root)
    weights = (tensor for key, tensor in contents["model"].items() if not key.endswith(BUFFERS))
    parameters = sum(tensor.numel() for tensor in weights)
    versions = ", ".join(f"{key} {value}" for key, value in contents["versions"].items())
    machine = contents.get("machine", {})
    made = versions + (f"; {machine['device']}, {machine['precision']}, threads {machine['threads']}" if machine else "")
    rows = {"Network": f"{contents.get('architecture', 'generator')}, {parameters:,} parameters", **rows, "Saved with": made}
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    limits = LIMITS.format(root=root) + (ONE_OF_ITS_CLASSES if kind != "gan" else "")
    limits += BLACK_ONLY if kind in ("classes", "task 1") else ""
    parts = [f"# {title}", table, f"**Use.** {USES[kind]}", f"**Limits.** {limits}"]
    if kind == "photo":
        parts.append(re.findall(r"\| photographs \|.*?\n(?=\n)", (ROOT / "RESULTS.md").read_text(), re.DOTALL)[0].strip())
    parts.append(f"MIT licence. SHA-256 in [SHA256SUMS]({root}SHA256SUMS). Written by `python tools/cards.py`.")
    return "\n\n".join(parts) + "\n"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def figures(scores: dict) -> dict[str, str]:
    """The rows of a classifier, of what test.py wrote."""
    low, high = map(percent, scores["accuracy_ci95"])
    names, confusion = list(scores["per_class"]), scores["confusion"]
    worst = min(range(len(names)), key=lambda label: scores["per_class"][names[label]]["recall"])
    others = [count if label != worst else -1 for label, count in enumerate(confusion[worst])]
    recall, mistaken = percent(scores["per_class"][names[worst]]["recall"]), names[others.index(max(others))]
    return {
        "MACs per image": f"{scores['macs'] / 1e6:.1f} M",
        "Test accuracy": f"**{percent(scores['accuracy'])}** (95 % interval {low} to {high}, n={scores['n']:,})",
        "Test loss, calibration error": f"{scores['loss']:.4f} nats, {percent(scores['calibration_error'])}",
        "Weakest class": f"{names[worst]}: recall {recall}, most often taken for {mistaken}",
    }


def training_figures(contents: dict, history: list[dict], recipe: str, root: str) -> dict[str, str]:
    """The rows of how a classifier was trained; `recipe` is "" for Task 1."""
    seeds, settings, best = read_seeds(recipe) if recipe else [], contents["settings"], contents["best"]
    rows = {}
    if len(seeds) > 1:
        accuracies = [scores["accuracy"] for scores, _, _ in seeds]
        spread = f"{100 * statistics.mean(accuracies):.2f} ± {percent(statistics.stdev(accuracies))}"
        rows["Test accuracy of all seeds"] = f"{spread} (n={len(seeds)}); this is seed {settings['seed']}"
    differ = ", ".join(f"{key} {value}" for key, value in read_config(config_path(recipe)).items())
    file, minutes = f"recipes/{recipe}.json" if recipe else "config.json", sum(line["seconds"] for line in history) / 60
    if settings["valid_ratio"]:
        epoch = f"run {best['run']}, epoch {best['epoch']}" if "run" in best else f"epoch {best['epoch']}"
        accuracy, loss = percent(best["valid_accuracy"]), f"{best['valid_loss']:.4f}"
        rows["Validation"] = f"accuracy {accuracy}, loss {loss}: {epoch}, the lowest loss"
        part, rest = f"{1 - settings['valid_ratio']:.0%}".replace("%", " %"), "the others chose the epoch"
    else:
        part, rest = "all", "the last epoch's model"
    return rows | {
        "Data": f"{part} of the training images of [Fashion-MNIST]({root}DATA.md); {rest}",
        "Command": f"`python train.py{f' recipe={recipe}' if recipe else ''} seed={settings['seed']}`, {minutes:.1f} minutes",
        "Settings": f"[{file}]({root}{file}): {differ}",
    }


def few_shot_figures(scores: dict) -> dict[str, str]:
    low, high = map(percent, scores["accuracy_ci95"])
    return {
        "Test accuracy": f"{percent(scores['accuracy_mean'])} (95 % interval {low} to {high}, n={scores['test_images']})",
        "Data": "two images of each class; 1,500 unlabelled boots; Task 1's frozen convolutions ([DATA.md](../DATA.md))",
        "Command": "`python transfer/train_eval.py`; 200 other draws are in [RESULTS.md](../RESULTS.md)",
    }


def gan_figures(scores: dict) -> dict[str, str]:
    variety = scores["variety"].values()
    return {
        "GAN-test": f"{percent(scores['gan_test'])} are classified as intended; of real ones {percent(scores['real_test'])}",
        "GAN-train": f"{percent(scores['gan_train'])} accuracy from them alone; from real ones {percent(scores['real_train'])}",
        "Variety": f"{percent(min(variety))} to {percent(max(variety))} of the mean distance between real images of a class",
        "Data": "training images of [Fashion-MNIST](../../DATA.md)",
        "Command": "`python gan/train.py`, measured by `python gan/score.py`",
    }


def checksums(paths: list[str]) -> str:
    """Lines that `sha256sum --check` reads."""
    return "".join(f"{hashlib.sha256((ROOT / path).read_bytes()).hexdigest()}  {path}\n" for path in paths)


def main(arguments: list[str]) -> None:
    check_no_settings(arguments, __doc__)
    paths = networks()
    for network in paths:
        if Path(network).stem in ("best_model", "generator"):
            checkpoint.write_atomically(card_path(network), card(network).encode())
            print(f"wrote {card_path(network)}")
    checkpoint.write_atomically(ROOT / "SHA256SUMS", checksums(paths).encode())
    print(f"wrote {ROOT / 'SHA256SUMS'}")


if __name__ == "__main__":
    run_script(main)
