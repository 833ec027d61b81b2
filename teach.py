"""Write down what a trained network says of the training images, for another to learn from: `python teach.py recipe=NAME`.

Writes targets.pt into out_dir: of each of the 60,000 images the log-probabilities of the classes, the mean of those of the
image and of its mirror image. `python train.py teacher=runs/NAME/targets.pt` then needs no teacher's arithmetic in its
steps, and no teacher's file: 1.2 MB instead of a network of any size.
"""

import time

import torch

import checkpoint
from config import OF_TRAINING, Settings, load_settings, run_script
from data_preprocessing import load_images
from model import choose_device, choose_precision, infer, keep_freed_memory


class TeachSettings(Settings):
    UNREAD = OF_TRAINING


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TeachSettings)
    print("settings:", settings)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    keep_freed_memory()
    path = settings.out_path / "best_model.pt"
    saved = checkpoint.load(path, "best_model")
    network = checkpoint.rebuild(saved, path).to(device)
    images, _ = load_images("train", settings.data_path)
    logits = torch.stack([infer(network, x, saved["mean"], saved["std"], precision) for x in (images, images.flip(-1))])
    targets = logits.log_softmax(2).mean(0).half()  # (2, 60000, C) -> (60000, C)
    written = settings.out_path / "targets.pt"
    teacher = {key: saved[key] for key in ("class_names", "settings", "epoch")}
    checkpoint.save(written, {"kind": "targets", "log_probabilities": targets, **teacher})
    print(f"{len(images):,} images and their mirror images, {time.perf_counter() - started:.1f} s; wrote {written}")


if __name__ == "__main__":
    run_script(main)
