"""Task 2: classify flats and heels, or the classes of your own photographs, with trained convolutions frozen.

`python transfer/train_eval.py [shots=K episodes=N] [shoes_dir=FOLDER] [key=value ...]` retrains the last layer on the images
in FOLDER/train/CLASS, tests it on FOLDER/test/CLASS, and writes best_model.pt, scores.json and plots/*.png into out_dir.
`episodes=N` repeats that with N random draws of K images per class, because one draw says little.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import plots
from config import FASHION_MNIST, UserError, resolve
from data_preprocessing import training_settings
from device import choose_device, move
from metrics import wilson_interval
from model import Classifier, freeze, load_model
from script import load_settings, run_script
from trainer import infer
from transfer.last_layer import OURS, TransferSettings, beside_photo, build_learners, replace_last_layer
from transfer.shoe_images import draw_picks, load_shoes, read_parts

BY_SHOTS = (1, 2, 3, 5, 10)  # in the picture


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
