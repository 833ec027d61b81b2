"""Predict one test image, or photographs: `python predict.py [recipe=NAME] [key=value ...] [IMAGE ...]`.

`index=N` takes test image N. Image files are brought to Fashion-MNIST's format first. With neither, a random test image is
taken. Prints the predictions and draws plots/prediction.png in out_dir.
"""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import plots
from config import ROOT, ModelFileSettings, UserError, setting
from data_preprocessing import labels_for, load_images
from device import choose_device, move
from model import Classifier, load_model
from photo import face_left, printable, read_photographs
from script import HELP, load_settings, run_script
from trainer import infer


class PredictSettings(ModelFileSettings):
    """Prediction"""

    index: int = setting(-1, "number of the test image; -1 = a random one", ge=-1, lt=10_000)


def predict_test_image(model: Classifier, images: torch.Tensor, labels: torch.Tensor, index: int, path: Path) -> None:
    """Print and draw the prediction for test image `index`, beside its true class."""
    view = images[index]  # (1, 28, 28)
    predict_views(model, [view[0].numpy()], view, [f"test image {index}"], [int(labels[index])], path)


def predict_views(
    model: Classifier,
    originals: list[np.ndarray],
    views: torch.Tensor,
    titles: list[str],
    true_labels: Sequence[int | None],
    path: Path,
) -> None:
    """Print and draw the predictions for `views`, uint8 `(M, 28, 28)`, which were made from `originals`."""
    class_names = model.metadata["class_names"]
    probabilities = infer(model, views.unsqueeze(1)).softmax(1)
    for title, probability, label in zip(titles, probabilities, true_labels):
        truth = "" if label is None else f", true {class_names[label]}"
        print(f"{title}: predicted {class_names[probability.argmax()]} ({probability.max():.2%}){truth}")
    plots.draw_predictions(originals, views.numpy(), titles, probabilities.numpy(), class_names, true_labels, path)
    print(f"wrote {path}")


def is_setting(word: str) -> bool:
    """Whether a word of the command line is a setting, not a file; a file's name may have an equals sign, too."""
    key, equals, _ = word.partition("=")
    is_file = key not in PredictSettings.model_fields and os.path.exists(word)
    return word in HELP or (bool(equals) and "/" not in key and not is_file)


def main(arguments: list[str]) -> None:
    words = [word for word in arguments if is_setting(word)]
    paths = [Path(word) if os.path.exists(word) else ROOT / word for word in arguments if word not in words]
    settings = load_settings(words, PredictSettings)
    if paths and settings.index >= 0:
        raise UserError(f"index={settings.index}: name either a test image or image files, not both")
    model = move(load_model(settings.model_path), choose_device(settings.device))
    picture = settings.out_path / "plots" / "prediction.png"
    if paths:
        originals, views = read_photographs(paths)
        predict_views(
            model, originals, face_left(views), [printable(path.name) for path in paths], [None] * len(paths), picture
        )
    else:
        images, fine_labels = load_images("t10k", settings.data_path)
        index = settings.index if settings.index >= 0 else random.randrange(len(images))
        predict_test_image(model, images, labels_for(model.metadata["class_names"], fine_labels), index, picture)


if __name__ == "__main__":
    run_script(main)
