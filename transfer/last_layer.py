"""Task 2's model: a trained model's convolutions, frozen, and a last layer that is learned from a few images."""

import copy
from functools import partial
from typing import Literal

import torch
from torch import nn

import checkpoint
from config import FASHION_MNIST, Settings, resolve, setting
from data_preprocessing import load_data, shuffle, training_settings
from device import move
from layers import Concatenation
from model import Classifier, build_model, load_model
from trainer import infer
from transfer.few_shot import (
    DATA_SET,
    PHOTOGRAPHS,
    AdamLearner,
    FisherLearner,
    LogisticLearner,
    MeanLearner,
    Source,
    similar_class,
)
from transfer.shoe_images import Part, draw_picks

UNLABELLED = 1_500  # training images, used without their labels
OURS, REFERENCE, UNTRAINED, PIXELS = "this repository", "the reference's way", "untrained convolutions", "raw pixels"


class TransferSettings(Settings):
    """Transfer"""

    out_dir: str = setting("transfer", "folder for everything that a run writes", min_length=1)
    shoes_dir: str = setting("", "folder with train/CLASS/* and test/CLASS/* images; empty = transfer/shoes")
    shots: int = setting(0, "support images per class; 0 = as many as the smallest folder in train/ has", ge=0)
    episodes: int = setting(1, "N > 1: N random draws from pool/ (train/ without one)", ge=1, le=10_000)
    query: Literal["test", "pool"] = setting("test", "test on test/ and extended/, or on the rest of pool/, to choose settings")
    checkpoint: str = setting(
        "checkpoint.pt", "the frozen features: a checkpoint.pt or a best_model.pt; with shoes_dir, if not named, also photo's"
    )


def beside_photo(model: Classifier) -> Classifier:
    """Task 1's model, which knows garments on black only, with its features beside those of the recipe `photo`, for
    photographs of new classes. Another model, also one with another activation than ReLU, is returned as it is.
    Raises UserError if `photo`'s is missing."""
    metadata = model.metadata
    is_like_task_1 = (metadata["architecture"], metadata["activation"]) == ("cnn", "relu")
    if not is_like_task_1 or training_settings(metadata)["data"] != FASHION_MNIST:
        return model
    path = resolve("runs/photo/best_model.pt")
    combined = build_model("cnn_photo", 1)  # its last layer is to be learned
    combined.set_statistics(model.mean.item(), model.std.item(), torch.zeros(0))
    for number, source in enumerate((model, load_model(path))):
        network = combined.get_submodule(f"features.0.networks.{number}")
        checkpoint.load_parameters(network, source.features.state_dict(), path)
    combined.metadata = {**metadata, "architecture": "cnn_photo"}
    return combined


def extract(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Features `(N, D)` of images, uint8 `(N, V, 28, 28)`: the mean over their views."""
    return infer(model, images, features=True)


def choose_unlabelled(
    model: Classifier, supports: torch.Tensor, settings: TransferSettings
) -> tuple[torch.Tensor, torch.Tensor, Source]:
    """Images to use without labels, uint8 `(U, 1, 28, 28)`, and their features `(U, D)`, among those that the model was trained
    on: of the class that the supports come from, or of all."""
    images, labels, names, _ = load_data("train", settings.data_path, training_settings(model.metadata))
    order = shuffle(torch.arange(len(labels)), torch.Generator().manual_seed(settings.seed))
    by_class = [order[labels[order] == label][:UNLABELLED] for label in range(len(names))]
    count = min(UNLABELLED // len(by_class), *map(len, by_class))
    mixed = images[torch.cat([members[:count] for members in by_class])]
    features = extract(model, mixed)
    label = similar_class(extract(model, supports), features.unflatten(0, (len(by_class), -1)))
    print("unlabelled images:", "of all classes, which the supports do not resemble" if label is None else names[label])
    if label is None:
        return mixed, features, PHOTOGRAPHS
    similar = images[by_class[label]]
    return similar, extract(model, similar), DATA_SET


def build_learners(
    model: Classifier, classes: int, supports: torch.Tensor, settings: TransferSettings, *, only_ours: bool = False
) -> dict:
    """The learners of the last layer by name: ours and, unless `only_ours`, three that show what it and the
    transfer contribute."""
    unlabelled, features, source = choose_unlabelled(model, supports, settings)
    torch.manual_seed(settings.seed)
    metadata = model.metadata
    untrained = build_model(metadata["architecture"], classes, activation=metadata["activation"])
    untrained.set_statistics(model.mean.item(), model.std.item(), unlabelled)
    move(untrained, next(model.parameters()).device)
    first = model.classifier if model.classifier.out_features == classes else untrained.classifier
    trained_features, untrained_features = partial(extract, model), partial(extract, untrained)
    common = (unlabelled, source, settings.seed)
    adam = AdamLearner(trained_features, first.cpu(), steps=100, lr=0.001)
    fisher = FisherLearner(trained_features, *common, features)
    ours: FisherLearner | MeanLearner = fisher
    if source is PHOTOGRAPHS:
        parts = model.features[0]
        sizes = parts.sizes if isinstance(parts, Concatenation) else [first.in_features]
        ours = MeanLearner(fisher, adam, LogisticLearner(features, sizes), features)
    if only_ours:
        return {OURS: ours}
    return {
        OURS: ours,
        REFERENCE: adam,
        UNTRAINED: FisherLearner(untrained_features, *common),
        PIXELS: FisherLearner(lambda images: images.float().mean(1).flatten(1) / 255, *common),
    }


def replace_last_layer(
    model: Classifier, layers: tuple[torch.Tensor, torch.Tensor], classes: tuple[str, ...], settings: TransferSettings
) -> Classifier:
    """The model on the CPU, its last layer replaced by the first episode's of weights `(E, C, D)` and biases `(E, C)`."""
    weights, biases = layers
    model = model.cpu()
    model.classifier = nn.Linear(weights.shape[2], len(classes))
    model.classifier.load_state_dict({"weight": weights[0], "bias": biases[0]})
    metadata = {key: model.metadata[key] for key in ("architecture", "activation", "epoch")}
    trained = training_settings(model.metadata)  # as whose images predict.py prepares others
    all_settings = {key: trained[key] for key in ("data", "prepare", "augment")} | settings.model_dump()
    metadata |= {"output_dim": len(classes), "class_names": list(classes), "settings": all_settings}
    model.metadata = metadata | {"versions": checkpoint.versions()}
    return model


def learn_classes(model: Classifier, part: Part, settings: TransferSettings) -> Classifier:
    """A copy of the frozen model whose last layer is learned, our way, from `settings.shots` images of each of the part's
    classes; 0 is as many as the smallest class has."""
    learner = build_learners(model, len(part.classes), part.images, settings, only_ours=True)[OURS]
    picks = draw_picks(part.counts, settings.shots or min(part.counts), 1, None)
    layers = learner.fit(learner.embed(part.images)[picks])
    return replace_last_layer(copy.deepcopy(model), layers, part.classes, settings)
