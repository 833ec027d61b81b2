"""Predict one test image, or photographs: `python predict.py [recipe=NAME] [key=value ...] [IMAGE ...]`.

An IMAGE is a file, a folder or a pattern, in the current folder or, where that has none, in the repository's. The model of
recipe=photo predicts clothes or shoe, and which of the ten classes; recipe, out_dir or checkpoint name another model. `index=N`
takes test image N; with neither, a random one is taken, by Task 1's model. Prints the predictions and writes
plots/prediction*.png, with what mattered in each view, and, of photographs, predictions.csv in out_dir.
"""

import csv
import glob
import io
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import checkpoint
import plots
from config import ROOT, ModelFileSettings, UserError, setting
from data_preprocessing import CLOTHES_OR_SHOE, load_test_data, training_settings
from device import choose_device, move
from model import Classifier, load_model
from occlusion import occlusion_maps
from photo import printable, read_photographs
from script import HELP, load_settings, run_script
from trainer import infer
from views import classify, clothes_or_shoe, load_for_photographs, select_views

COLUMNS = ("file", "class", "probability", "runner_up", "warning")  # of predictions.csv


class PredictSettings(ModelFileSettings):
    """Prediction"""

    usage: ClassVar[str] = "[recipe=NAME] [key=value ...] [IMAGE ...]"
    index: int = setting(-1, "number of the test image; -1 = a random one", ge=-1)


def predict_test_image(model: Classifier, images: torch.Tensor, labels: torch.Tensor, index: int, path: Path) -> None:
    """Print and draw the prediction for test image `index`, beside its true class."""
    names, view, label = model.metadata["class_names"], images[index], int(labels[index])  # view (1, 28, 28)
    probability = infer(model, view.unsqueeze(0)).softmax(1)
    print(f"test image {index}: predicted {answer(probability[0], names)}, true {names[label]}")
    fall = occlusion_maps(model, view, int(probability.argmax())).numpy()
    titles = [f"test image {index}"]
    plots.draw_predictions([view[0].numpy()], [view.numpy()], [fall], titles, probability.numpy(), names, [label], path)
    print(f"wrote {path}")


def answer(probability: torch.Tensor, names: Sequence[str]) -> str:
    return f"{names[int(probability.argmax())]} ({probability.max():.2%})"


def predict_photographs(model: Classifier, with_shoe: bool, paths: list[Path], out: Path) -> None:
    """Print, list in predictions.csv and draw the predictions; with `with_shoe`, also whether it is clothes or a shoe.

    Raises SystemExit, with code 2, if no file can be read.
    """
    files, photographs = read_photographs(paths, training_settings(model.metadata)["prepare"])
    if not files:
        raise SystemExit(2)  # each file has its line on stderr
    views = select_views(model, torch.stack([photograph.views for photograph in photographs]))  # (N, V, 28, 28)
    probabilities, names = classify(model, views), model.metadata["class_names"]
    rows, titles = [], []
    for path, photograph, probability in zip(files, photographs, probabilities):
        answers = [answer(probability, names)]
        if with_shoe:
            answers.insert(0, answer(clothes_or_shoe(probability), CLOTHES_OR_SHOE))
        best, runner_up = probability.topk(2).indices.tolist()
        notes = [f"runner-up {names[runner_up]}, {probability[runner_up]:.2%}"] if len(names) > 2 else []
        notes += [photograph.warning] if photograph.warning else []
        print("; ".join([f"{printable(path.name)}: predicted {', '.join(answers)}", *notes]))
        rows.append((printable(str(path)), names[best], f"{probability[best]:.4f}", names[runner_up], photograph.warning))
        titles.append("\n".join([printable(path.name), *answers[:-1]]))
    table = io.StringIO()
    csv.writer(table).writerows([COLUMNS, *rows])
    checkpoint.write_atomically(out / "predictions.csv", table.getvalue().encode())
    for old in (out / "plots").glob("prediction_*.png"):  # pages of an earlier command
        old.unlink()
    firsts = range(0, len(files), plots.MAX_PREDICTIONS)
    for page, first in enumerate(tqdm(firsts, "pictures", disable=None if len(firsts) > 1 else True, leave=False), 1):
        part = slice(first, first + plots.MAX_PREDICTIONS)
        originals, labels = [photograph.picture for photograph in photographs[part]], probabilities[part].argmax(1).tolist()
        maps = [occlusion_maps(model, sample, label).numpy() for sample, label in zip(views[part], labels)]  # (V, 28, 28) each
        inputs, chances, unknown = list(views[part].numpy()), probabilities[part].numpy(), [None] * len(maps)
        path = out / "plots" / ("prediction.png" if page == 1 else f"prediction_{page}.png")
        plots.draw_predictions(originals, inputs, maps, titles[part], chances, names, unknown, path)
        tqdm.write(f"wrote {path}")


def is_setting(word: str) -> bool:
    """Whether a word of the command line is a setting, not a file; a file's name may have an equals sign, too."""
    key, equals, _ = word.partition("=")
    is_file = key not in PredictSettings.model_fields and os.path.exists(word)
    return word in HELP or (bool(equals) and "/" not in key and not is_file)


def find_files(word: str) -> list[Path]:
    """The files that a word of the command line names: one, those in a folder and its folders, or those of a pattern."""
    if not word:
        raise UserError("the name of an image is empty; name a file, a folder or a pattern")
    path = ROOT / word if os.path.exists(ROOT / word) and not os.path.exists(word) else Path(word)
    if os.path.isdir(path):
        members = (member for member in path.rglob("*") if not member.name.startswith("."))
        return sorted(member for member in members if member.is_file() or member.is_symlink()) or [path]
    if not os.path.exists(path):
        for folder in (Path(), ROOT):
            if matches := glob.glob(word, root_dir=folder, recursive=True):
                return sorted(folder / match for match in matches)
    return [path]


def main(arguments: list[str]) -> None:
    words = [word for word in arguments if is_setting(word)]
    paths = [path for word in arguments if word not in words for path in find_files(word)]
    settings = load_settings(words, PredictSettings)
    if paths and settings.index >= 0:
        raise UserError(f"index={settings.index}: name either a test image or image files, not both")
    if paths:
        return predict_photographs(*load_for_photographs(settings), paths, settings.out_path)
    model = move(load_model(settings.model_path), choose_device(settings.device))
    images, labels, *_ = load_test_data(model.metadata, settings)
    if settings.index >= len(images):
        raise UserError(f"index={settings.index}: there are {len(images):,} test images, from 0 on")
    generator = random.Random(settings.seed if "seed" in settings.model_fields_set else None)
    index = settings.index if settings.index >= 0 else generator.randrange(len(images))
    predict_test_image(model, images, labels, index, settings.out_path / "plots" / "prediction.png")


if __name__ == "__main__":
    run_script(main)
