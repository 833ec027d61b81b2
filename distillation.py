"""Teachers for knowledge distillation: a trained model, or the soft targets that tools/soft_targets.py has saved."""

from collections.abc import Callable

import torch

import checkpoint
from config import TrainSettings, UserError, parse_augment, resolve
from data_preprocessing import Dataset
from device import move
from model import freeze, load_model

Teacher = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def load_teacher(settings: TrainSettings, seed: int, data: Dataset, class_sizes: list[int]) -> Teacher:
    """A function of augmented images, uint8 `(N, V, 28, 28)`, and the indices `(N,)` of their originals; it returns the
    teacher's logits `(N, C)`: of the augmented images for a model, of the originals, in `data`, for soft targets.

    Raises UserError if the file is missing or damaged, has other classes, or may have seen this run's validation images,
    for which `class_sizes`, the numbers of training images of each class, are compared, too.
    """
    path, device, names = resolve(settings.teacher), data.images.device, data.class_names
    model, soft_targets = None, None
    if path.name == "soft_targets.pt":
        metadata = checkpoint.load(path, "soft_targets")
        soft_targets = metadata["log_probabilities"]
    else:
        model = load_model(path)
        metadata = model.metadata
    checkpoint.check_same_split(path, metadata.get("settings", {}), seed, settings.valid_ratio, settings.data)
    checkpoint.check_same_images(f"teacher={path}", metadata, class_sizes)
    if tuple(metadata["class_names"]) != names:
        found = ", ".join(metadata["class_names"])
        raise UserError(f"{path}: has the classes {found}, not {', '.join(names)}; name another teacher")
    if model is not None:
        model = freeze(move(model, device))
        return torch.no_grad()(lambda images, _: model(images))
    if "gan" in parse_augment(settings.augment):
        raise UserError(f"{path}: has no targets for generated images; name a best_model.pt, or leave gan out of augment")
    if not isinstance(soft_targets, torch.Tensor) or soft_targets.shape != (len(data.images), len(names)):
        raise UserError(f"{path}: isn't of these {len(data.images):,} training images; run tools/soft_targets.py again")
    if not soft_targets.isfinite().all():
        raise UserError(f"{path}: some of its log-probabilities are not finite; run tools/soft_targets.py again")
    soft_targets = soft_targets.to(device)
    return lambda _, indices: soft_targets[indices].float()
