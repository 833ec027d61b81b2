"""Predict one test image, or photographs: `python predict.py [recipe=NAME] [key=value ...] [IMAGE ...]`.

`index=N` takes test image N, image files are brought to Fashion-MNIST's format first, and with neither a random test
image is taken. Prints the prediction and draws plots/prediction.png in out_dir.
"""

import os
import random
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn

import checkpoint
import plots
from config import HELP, OF_TRAINING, ROOT, Settings, UserError, load_settings, run_script
from data_preprocessing import labels_by_name, load_images
from model import choose_device, infer
from photo import read_photographs, shown, turned_left


class PredictSettings(Settings):
    UNREAD = OF_TRAINING
    index: int = Field(-1, ge=-1, lt=10_000, description="number of the test image; -1 = a random one")
    show: bool = Field(False, description="open the picture in a window, where there is a screen")


def predict_test_image(
    network: nn.Module, saved: dict, images: torch.Tensor, labels: torch.Tensor, index: int, path: Path
) -> None:
    """Print and draw what the network says of test image `index`, beside the truth. `saved` is best_model.pt's contents."""
    view = images[index]  # (1, 28, 28)
    _report(network, saved, [view[0].numpy()], view, [f"test image {index}"], [int(labels[index])], path)


def _report(
    network: nn.Module,
    saved: dict,
    originals: list[np.ndarray],
    views: torch.Tensor,
    titles: list[str],
    true: list[int | None],
    path: Path,
) -> None:
    """`views`: uint8 `(M, 28, 28)`; `originals`: what they were made from; `true`: labels, where known."""
    class_names = saved["class_names"]
    probabilities = infer(network, views.unsqueeze(1), saved["mean"], saved["std"]).softmax(1)
    for title, probability, truth in zip(titles, probabilities, true):
        told = "" if truth is None else f", true {class_names[truth]}"
        print(f"{title}: predicted {class_names[probability.argmax()]} ({probability.max():.2%}){told}")
    plots.draw_predictions(originals, views.numpy(), titles, probabilities.numpy(), class_names, true, path)
    print(f"wrote {path}")


def main(arguments: list[str]) -> None:
    words = [word for word in arguments if "=" in word.partition("/")[0] or word in HELP]
    paths = [Path(word) if os.path.exists(word) else ROOT / word for word in arguments if word not in words]
    settings = load_settings(words, PredictSettings)
    if paths and settings.index >= 0:
        raise UserError(f"index={settings.index}: name either a test image or image files, not both")
    out = settings.out_path
    saved = checkpoint.load(out / "best_model.pt", "best_model")
    network = checkpoint.rebuild(saved, out / "best_model.pt").to(choose_device(settings.device))
    picture = out / "plots" / "prediction.png"
    if paths:
        originals, views = read_photographs(paths)
        _report(
            network, saved, originals, turned_left(views), [shown(path.name) for path in paths], [None] * len(paths), picture
        )
    else:
        images, garments = load_images("t10k", settings.data_path)
        index = settings.index if settings.index >= 0 else random.randrange(len(images))
        predict_test_image(network, saved, images, labels_by_name(garments, saved["class_names"]), index, picture)
    if settings.show:
        from PIL import Image

        Image.open(picture).show()


if __name__ == "__main__":
    run_script(main)
