"""Task 2: classify flats and heels, or the classes of your own photographs, with trained convolutions frozen.

`python transfer/train_eval.py [shots=K episodes=N] [shoes_dir=FOLDER] [key=value ...]` retrains the last layer on the images
in FOLDER/train/CLASS, tests it on FOLDER/test/CLASS, and writes best_model.pt, scores.json and plots/*.png into out_dir.
`episodes=N` repeats that with N random draws of K images per class, because one draw says little.
"""

import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import plots
from config import FASHION_MNIST, Settings, UserError, resolve, setting
from data_preprocessing import load_data, shuffle, training_settings
from device import choose_device, move
from layers import Concatenation
from metrics import wilson_interval
from model import Classifier, build_model, freeze, load_model
from script import load_settings, run_script
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
from transfer.shoe_images import Part, draw_picks, load_shoes, read_parts

UNLABELLED = 1_500  # training images, used without their labels
BY_SHOTS = (1, 2, 3, 5, 10)  # in the picture
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
    photographs of new classes. Another model is returned as it is. Raises UserError if `photo`'s is missing."""
    metadata = model.metadata
    if metadata["architecture"] != "cnn" or training_settings(metadata)["data"] != FASHION_MNIST:
        return model
    path = resolve("runs/photo/best_model.pt")
    both = build_model("cnn_photo", 1, activation=metadata["activation"])  # its last layer is to be learned
    both.set_statistics(model.mean.item(), model.std.item(), torch.zeros(0))
    for number, source in enumerate((model, load_model(path))):
        checkpoint.load_parameters(both.get_submodule(f"features.0.networks.{number}"), source.features.state_dict(), path)
    both.metadata = {**metadata, "architecture": "cnn_photo"}
    return both


def extract(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Features `(N, D)` of images, uint8 `(N, V, 28, 28)`: the mean over their views."""
    return infer(model, images, features=True)


def choose_unlabelled(model: Classifier, supports: torch.Tensor, settings: TransferSettings) -> tuple[torch.Tensor, Source]:
    """Images to use without labels, uint8 `(U, 1, 28, 28)`, among those that the model was trained on: of the class that the
    supports come from, or of all."""
    images, labels, names, _ = load_data("train", settings.data_path, training_settings(model.metadata))
    order = shuffle(torch.arange(len(labels)), torch.Generator().manual_seed(settings.seed))
    by_class = [order[labels[order] == label][:UNLABELLED] for label in range(len(names))]
    count = min(UNLABELLED // len(by_class), *map(len, by_class))
    mixed = images[torch.cat([members[:count] for members in by_class])]
    examples = extract(model, mixed).unflatten(0, (len(by_class), -1))
    label = similar_class(extract(model, supports), examples)
    print("unlabelled images:", "of all classes, which the supports do not resemble" if label is None else names[label])
    return (mixed, PHOTOGRAPHS) if label is None else (images[by_class[label]], DATA_SET)


def build_learners(
    model: Classifier, classes: int, supports: torch.Tensor, settings: TransferSettings, *, only_ours: bool = False
) -> dict:
    """The learners of the last layer by name: ours and, unless `only_ours`, three that show what it and the
    transfer contribute."""
    unlabelled, source = choose_unlabelled(model, supports, settings)
    torch.manual_seed(settings.seed)
    metadata = model.metadata
    untrained = build_model(metadata["architecture"], classes, activation=metadata["activation"])
    untrained.set_statistics(model.mean.item(), model.std.item(), unlabelled)
    move(untrained, next(model.parameters()).device)
    first = model.classifier if model.classifier.out_features == classes else untrained.classifier
    trained_features, untrained_features = partial(extract, model), partial(extract, untrained)
    common = (unlabelled, source, settings.seed)
    adam = AdamLearner(trained_features, first.cpu(), steps=100, lr=0.001)
    fisher = FisherLearner(trained_features, *common)
    ours: FisherLearner | MeanLearner = fisher
    if source is PHOTOGRAPHS:
        parts = model.features[0]
        sizes = parts.sizes if isinstance(parts, Concatenation) else [first.in_features]
        ours = MeanLearner(fisher, adam, LogisticLearner(trained_features(unlabelled), sizes))
    if only_ours:
        return {OURS: ours}
    return {
        OURS: ours,
        REFERENCE: adam,
        UNTRAINED: FisherLearner(untrained_features, *common),
        PIXELS: FisherLearner(lambda images: images.float().mean(1).flatten(1) / 255, *common),
    }


def check_frozen(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless only the last layer was trainable and everything else is bitwise as it was before."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name not in trainable}
    changed = [name for name, tensor in frozen.items() if not tensor.equal(before[name])]
    if trainable != ["classifier.weight", "classifier.bias"] or changed:
        raise RuntimeError(f"trained {', '.join(trainable)}; changed although frozen: {', '.join(changed) or 'nothing'}")
    print(f"trained {', '.join(trainable)}; the {len(frozen)} frozen tensors are bitwise unchanged")


class Episodes:
    """The images of all episodes: supports in `episode_part`, queries in `images` and `labels`, the saved model's supports
    in `saved_part`.

    `model` is to read them. Raises UserError if a class has fewer images than shots, or if none is left to test on."""

    def __init__(self, settings: TransferSettings, model: Classifier):
        if not settings.shoes_dir and (data := training_settings(model.metadata)["data"]) != FASHION_MNIST:
            raise UserError(f"{settings.checkpoint}: was trained on data={data}, which has no shoes; name shoes_dir=FOLDER")
        choosing = settings.query == "pool"  # settings: the test images are not even read
        names = ("train", "pool") if choosing else ("train", "test", "pool", "extended")
        folder = resolve(settings.shoes_dir or "transfer/shoes")
        self.parts = read_parts(folder, names, model) if settings.shoes_dir else load_shoes(names, settings.data_path)
        self.classes, counts = self.parts["train"].classes, self.parts["train"].counts
        self.count, self.seed, self.shots = settings.episodes, settings.seed, settings.shots or min(counts)
        self.is_random = choosing or settings.episodes > 1
        pool = "pool" if "pool" in self.parts else "train"
        saved = "train" if min(counts) >= self.shots else pool
        of_episodes = pool if self.is_random else saved
        for name in (saved, of_episodes):
            fewest, label = min(zip(self.parts[name].counts, self.classes))
            if fewest < self.shots:
                folder = folder / name / label
                raise UserError(f"shots={self.shots}: {folder} has only {fewest} images; add some or lower shots")
        if choosing and max(self.parts[pool].counts) == self.shots:
            raise UserError(f"shots={self.shots}: leaves no image in {folder / pool} to test on; add some or lower shots")
        self.saved_part, self.episode_part, self.pool = (self.parts[name] for name in (saved, of_episodes, pool))
        queries = [pool] if choosing else ["test", "extended"] if self.is_random and "extended" in self.parts else ["test"]
        self.images = torch.cat([self.parts[name].images for name in queries])  # uint8 (N, V, 28, 28)
        self.labels = torch.cat([self.parts[name].labels for name in queries])
        self.excludes_supports = choosing  # from the queries
        self.tested = len(self.labels) - (len(self.classes) * self.shots if choosing else 0)  # queries of an episode

    def run(self, learners: dict) -> dict[str, dict[int, list[float]]]:
        """learner -> shots -> accuracy of each episode, in 0..1. Keeps the learners' inputs from episode_part in `supports`."""
        self.supports = {name: learner.embed(self.episode_part.images) for name, learner in learners.items()}
        queries = {name: learner.extract(self.images) for name, learner in learners.items()}
        rows: dict[str, dict[int, list[float]]] = {name: {} for name in learners}
        all_shots = sorted({self.shots, *(k for k in BY_SHOTS if self.is_random and k <= min(self.episode_part.counts))})
        for k in tqdm(all_shots, "images per class", disable=None, leave=False):
            generator = torch.Generator().manual_seed(self.seed) if self.is_random else None
            picks = draw_picks(self.episode_part.counts, k, self.count, generator)
            for name, learner in learners.items():
                layers = learner.fit(self.supports[name][picks])
                excluded = picks if self.excludes_supports else None
                rows[name][k] = accuracies(queries[name], self.labels, layers, excluded)
        return rows


def accuracies(
    features: torch.Tensor, labels: torch.Tensor, layers: tuple[torch.Tensor, torch.Tensor], excluded: torch.Tensor | None
) -> list[float]:
    """Accuracy of each episode's layer on queries `(N, D)`; `excluded` `(E, C, K)` are indices of queries that don't count."""
    weights, biases = layers
    is_right = (torch.einsum("nd,ecd->enc", features, weights) + biases.unsqueeze(1)).argmax(2) == labels  # (E, N)
    counts = torch.ones_like(is_right)
    if excluded is not None:
        counts.scatter_(1, excluded.flatten(1), False)
    return ((is_right & counts).sum(1).double() / counts.sum(1)).tolist()


def summarize_episodes(values: list[float], images: int) -> dict:
    """Mean, spread, 5th percentile and extremes of episodes' accuracies; the 95 % interval is the mean's, or Wilson's of one
    episode."""
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    half = 1.96 * std / len(values) ** 0.5
    interval = [mean - half, mean + half] if len(values) > 1 else list(wilson_interval(round(mean * images), images))
    percentile = torch.tensor(values).quantile(0.05).item()
    return {"mean": mean, "std": std, "p5": percentile, "min": min(values), "max": max(values), "ci95": interval}


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


def draw_pictures(model: Classifier, episodes: Episodes, picks: torch.Tensor, rows: dict, folder: Path) -> None:
    """Print and draw the predictions for the test images; draw the supports, and, of random episodes, accuracy by shots."""
    test = episodes.parts["test"]
    confidence, predicted = infer(model, test.images).softmax(1).max(1)
    titles = []
    for name, label, probability in zip(test.names, predicted.tolist(), confidence.tolist()):
        titles.append(f"{name}\npredicted {test.classes[label]}, {probability:.1%}")
        print(f"test {name}: predicted {test.classes[label]} ({probability:.2%})")
    is_right = (predicted == test.labels).tolist()
    colours = [plots.GREEN if right else plots.RED for right in is_right]
    heading = f"{sum(is_right)} of {len(is_right)} test images right"
    plots.draw_sheet(test.images[:, 0].numpy(), titles, 5, heading, folder / "predictions.png", colours)
    images, names = episodes.saved_part.images[picks.flatten()], [episodes.saved_part.names[index] for index in picks.flatten()]
    plots.draw_sheet(images[:, 0].numpy(), names, episodes.shots, "The support images", folder / "support.png")
    if episodes.is_random:
        heading = f"{episodes.count} episodes, {len(episodes.labels)} test images"
        plots.draw_accuracy_by_count(rows, "support images per class", heading, folder / "accuracy_by_shots.png")
        heading = f"The images that episodes draw from: {len(episodes.pool.names)}"
        plots.draw_sheet(episodes.pool.images[:, 0].numpy(), episodes.pool.names, 13, heading, folder / "pool.png")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TransferSettings)
    print("settings:", settings)
    out = settings.out_path
    if (out / "checkpoint.pt").exists() or (out / "history.jsonl").exists():
        raise UserError(f"{out}: holds a training, whose best_model.pt would be overwritten; name another out_dir")
    model = load_model(resolve(settings.checkpoint))
    if settings.shoes_dir and "checkpoint" not in settings.model_fields_set:
        model = beside_photo(model)
    freeze(move(model, choose_device(settings.device)).features)
    before = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    episodes = Episodes(settings, model)
    learners = build_learners(model, len(episodes.classes), episodes.pool.images, settings)
    rows = episodes.run(learners)
    print(f"{settings.episodes} x {episodes.shots} images per class; accuracy on {episodes.tested} images")
    print(f"{'':22}    mean    std  5th percentile      min      max   95 % interval")
    report = {name: summarize_episodes(by_shots[episodes.shots], episodes.tested) for name, by_shots in rows.items()}
    for name, row in report.items():
        low, high = row["ci95"]
        spread = f"{row['std']:6.2%} {row['p5']:15.2%} {row['min']:8.2%} {row['max']:8.2%}"
        print(f"{name:22} {row['mean']:7.2%} {spread}   {low:.2%} to {high:.2%}")
    if settings.query == "pool":
        return

    picks = draw_picks(episodes.saved_part.counts, episodes.shots, 1, None)
    learner, is_embedded = learners[OURS], episodes.saved_part is episodes.episode_part
    supports = episodes.supports[OURS] if is_embedded else learner.embed(episodes.saved_part.images)
    model = replace_last_layer(model, learner.fit(supports[picks]), episodes.classes, settings)
    check_frozen(model, before)
    checkpoint.save(out / "best_model.pt", {"kind": "best_model", **model.metadata, "model": model.state_dict()})
    draw_pictures(model, episodes, picks, rows, out / "plots")
    ours = report.pop(OURS)
    scores = {
        "task": " or ".join(episodes.classes),
        "shots": episodes.shots,
        "episodes": settings.episodes,
        "test_images": len(episodes.labels),
        **{f"accuracy_{name}": value for name, value in ours.items()},
        "per_episode": rows[OURS][episodes.shots],
        "accuracy_by_shots": {k: statistics.mean(values) for k, values in rows[OURS].items()},
        "other_ways": report,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": checkpoint.versions(),
        "settings": settings.model_dump(),
    }
    checkpoint.save_json(out / "scores.json", scores)
    print(
        f"test accuracy {ours['mean']:.2%} (standard deviation {ours['std']:.2%}, {ours['min']:.2%} to {ours['max']:.2%}; "
        f"{len(episodes.labels)} images, {settings.episodes} x {episodes.shots} shots); wrote {out / 'scores.json'}"
    )


if __name__ == "__main__":
    run_script(main)
