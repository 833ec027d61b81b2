"""Save a trained model's predictions on the training images as soft targets: `python tools/soft_targets.py recipe=NAME`.

Writes soft_targets.pt into out_dir: each training image's log-probabilities, averaged over the image and its horizontal flip.
`python train.py teacher=runs/NAME/soft_targets.pt` then distils without computing the teacher in every step.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
from config import ModelFileSettings, UserError
from data_preprocessing import load_data, training_settings
from device import choose_device, choose_precision, move
from model import load_model
from script import load_settings, run_script
from trainer import infer


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, ModelFileSettings)
    if settings.data:
        raise UserError(f"data={settings.data}: soft targets are of the images that the teacher has learned from; leave it out")
    print("settings:", settings)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    teacher = move(load_model(settings.model_path), device)
    images = load_data("train", settings.data_path, training_settings(teacher.metadata)).images[: settings.limit or None]
    teacher_logits = torch.stack([infer(teacher, batch, precision) for batch in (images, images.flip(-1))])
    log_probabilities = teacher_logits.log_softmax(2).mean(0).half()  # (2, N, C) -> (N, C)
    path = settings.out_path / "soft_targets.pt"
    metadata = {key: teacher.metadata[key] for key in ("class_names", "settings", "epoch")}
    checkpoint.save(path, {"kind": "soft_targets", "log_probabilities": log_probabilities, **metadata})
    print(f"{len(images):,} images and their flips, {time.perf_counter() - started:.1f} s; wrote {path}")


if __name__ == "__main__":
    run_script(main)
