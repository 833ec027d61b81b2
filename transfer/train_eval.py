"""Task 2: tell flats from heels, or the classes of your own photographs, with Task 1's convolutions frozen.

`python transfer/train_eval.py [shots=K episodes=N] [shoes_dir=FOLDER] [key=value ...]` retrains the last layer on the
images in FOLDER/train/CLASS, tests it on FOLDER/test/CLASS, and writes best_model.pt, scores.json and plots/*.png into
out_dir. `episodes=N` repeats that with N random draws of K images a class, because one draw means little.
"""

import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import plots
from config import OF_TRAINING, Settings, UserError, load_settings, resolve, run_script
from data_preprocessing import GARMENTS, load_images
from metrics import wilson_interval
from model import build, choose_device, freeze, infer
from networks import Network
from transfer.few_shot import AdamLearner, FisherLearner
from transfer.shoe_images import SHOES_DIR, draw_picks, read_parts, write_shoes

UNLABELLED = 1_500  # training images of one garment, to learn from without their labels
BY_SHOTS = (1, 2, 3, 5, 10)  # in the picture
OURS, REFERENCE, UNTRAINED, PIXELS = "this repository", "the reference's way", "untrained convolutions", "raw pixels"


class TransferSettings(Settings):
    UNREAD = OF_TRAINING | {"recipe"}
    shoes_dir: str = Field("", description="folder with train/CLASS/* and test/CLASS/* images; empty = transfer/shoes")
    out_dir: str = Field("transfer", min_length=1, description="folder for all that a run writes")
    shots: int = Field(0, ge=0, description="support images of each class; 0 = as many as the smallest folder in train/ has")
    episodes: int = Field(1, ge=1, le=10_000, description="N > 1: N random draws from pool/ (train/ without one)")
    query: Literal["test", "pool"] = Field(
        "test", description="episodes are tested on test/ and extended/, or, to choose settings, on the rest of pool/"
    )
    task1: str = Field(
        "checkpoint.pt", description="whose convolutions are used: a checkpoint.pt (its last epoch's) or a best_model.pt"
    )
    unlabelled: Literal[GARMENTS] = Field(  # type: ignore[valid-type]
        "Ankle boot", description="garment whose training images, unlabelled, help"
    )
    shrink: float = Field(0.001, gt=0, description="how little a feature may move under distortions to count in full")
    rounds: int = Field(3, ge=0, le=100, description="of soft k-means over the unlabelled images; 0 = none")


def accuracies(
    features: torch.Tensor, labels: torch.Tensor, layers: tuple[torch.Tensor, torch.Tensor], left_out: torch.Tensor | None
) -> list[float]:
    """Accuracy of each episode's layer on queries `(N, D)`; `left_out` `(E, C, K)`: indices of those that don't count."""
    weights, biases = layers
    is_right = (torch.einsum("nd,ecd->enc", features, weights) + biases.unsqueeze(1)).argmax(2) == labels  # (E, N)
    counts = torch.ones_like(is_right)
    if left_out is not None:
        counts.scatter_(1, left_out.flatten(1), False)
    return ((is_right & counts).sum(1).double() / counts.sum(1)).tolist()


def check_frozen(network: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless the last layer alone could be trained and all else has the bits it had before."""
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    frozen = {name: tensor for name, tensor in network.state_dict().items() if name not in trained}
    changed = [name for name, tensor in frozen.items() if not tensor.equal(before[name])]
    if trained != ["classifier.weight", "classifier.bias"] or changed:
        raise RuntimeError(f"trained {', '.join(trained)}; changed although frozen: {', '.join(changed) or 'nothing'}")
    print(f"trained {', '.join(trained)}; the {len(frozen)} frozen tensors have the bits that they had before")


def build_learners(saved: dict, network: Network, classes: int, unlabelled: torch.Tensor, settings: TransferSettings) -> dict:
    """The ways to learn the last layer by name: ours, and three that show what it and the transfer are worth."""
    torch.manual_seed(settings.seed)
    untrained = build(saved["architecture"], classes, activation=saved["activation"]).to(next(network.parameters()).device)
    first = network.classifier if saved["output_dim"] == classes else untrained.classifier

    def trained_features(images: torch.Tensor) -> torch.Tensor:
        return infer(network.features, images, saved["mean"], saved["std"])

    def untrained_features(images: torch.Tensor) -> torch.Tensor:
        return infer(untrained.features, images, saved["mean"], saved["std"])

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255

    fisher = (unlabelled, settings.seed, settings.shrink, settings.rounds)
    return {
        OURS: FisherLearner(trained_features, *fisher),
        REFERENCE: AdamLearner(trained_features, first.cpu(), steps=100, lr=0.001),
        UNTRAINED: FisherLearner(untrained_features, *fisher),
        PIXELS: FisherLearner(pixels, *fisher),
    }


def summarise(values: list[float], images: int) -> dict:
    """Mean, spread and extremes of episodes' accuracies; the 95 % interval is the mean's, or Wilson's of one episode."""
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    half = 1.96 * std / len(values) ** 0.5
    interval = [mean - half, mean + half] if len(values) > 1 else list(wilson_interval(round(mean * images), images))
    return {"mean": mean, "std": std, "min": min(values), "max": max(values), "ci95": interval}


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TransferSettings)
    print("settings:", settings)
    out = settings.out_path
    if (out / "checkpoint.pt").exists():
        raise UserError(f"{out}: holds a training, whose best_model.pt would be overwritten; name another out_dir")
    path = resolve(settings.task1)
    saved = checkpoint.load(path, "best_model" if path.name == "best_model.pt" else "checkpoint")
    network = checkpoint.rebuild(saved, path)
    before = copy.deepcopy(network.state_dict())
    network.to(choose_device(settings.device))
    freeze(network.features)

    # ---- images -------------------------------------------------------------------------------------------------------
    choosing = settings.query == "pool"  # settings: the test images are not even read
    wanted = ("train", "pool") if choosing else ("train", "test", "pool", "extended")
    if not settings.shoes_dir:
        write_shoes(wanted, settings.data_path)
    folder = resolve(settings.shoes_dir) if settings.shoes_dir else SHOES_DIR
    parts = read_parts(folder, wanted, are_photographs=bool(settings.shoes_dir))
    classes = parts["train"].classes
    shots = settings.shots or min(parts["train"].counts)
    at_random = choosing or settings.episodes > 1
    pool = "pool" if "pool" in parts else "train"
    support = "train" if min(parts["train"].counts) >= shots else pool
    drawn = pool if at_random else support
    for name in (support, drawn):
        fewest, label = min(zip(parts[name].counts, classes))
        if fewest < shots:
            raise UserError(f"shots={shots}: {folder / name / label} has only {fewest} images; add some or lower shots")
    if choosing and max(parts[pool].counts) == shots:
        raise UserError(f"shots={shots}: leaves no image in {folder / pool} to test on; add some or lower shots")
    images, garments = load_images("train", settings.data_path)
    same_garment = torch.nonzero(garments == GARMENTS.index(settings.unlabelled)).squeeze(1)
    generator = torch.Generator().manual_seed(settings.seed)
    unlabelled = images[same_garment[torch.randperm(len(same_garment), generator=generator)[:UNLABELLED]]]

    # ---- episodes -----------------------------------------------------------------------------------------------------
    learners = build_learners(saved, network, len(classes), unlabelled, settings)
    asked = [pool] if choosing else ["test", "extended"] if at_random and "extended" in parts else ["test"]
    images, labels = torch.cat([parts[name].images for name in asked]), torch.cat([parts[name].labels for name in asked])
    embedded = {method: learner.embed(parts[drawn].images) for method, learner in learners.items()}
    queries = {method: learner.extract(images) for method, learner in learners.items()}
    rows: dict[str, dict[int, list[float]]] = {method: {} for method in learners}  # method -> shots -> accuracy of each episode
    all_shots = sorted({shots, *(k for k in BY_SHOTS if at_random and k <= min(parts[drawn].counts))})
    for k in tqdm(all_shots, "images of each class", disable=None, leave=False):
        chance = torch.Generator().manual_seed(settings.seed) if at_random else None
        picks = draw_picks(parts[drawn].counts, k, settings.episodes, chance)
        for method, learner in learners.items():
            layers = learner.fit(embedded[method][picks])
            rows[method][k] = accuracies(queries[method], labels, layers, picks if choosing else None)
    tested = len(labels) - (len(classes) * shots if choosing else 0)  # images of an episode
    print(f"{settings.episodes} x {shots} images of each class; accuracy on {tested} images")
    print(f"{'':22}    mean    std     min      max   95 % interval")
    report = {method: summarise(by_shots[shots], tested) for method, by_shots in rows.items()}
    for method, row in report.items():
        low, high = row["ci95"]
        print(f"{method:22} {row['mean']:7.2%} {row['std']:6.2%} {row['min']:7.2%} {row['max']:8.2%}   {low:.2%} to {high:.2%}")
    if choosing:
        return

    # ---- the network that is kept: its last layer comes from train/ ------------------------------------------------------
    ours = learners[OURS]
    picks = draw_picks(parts[support].counts, shots, 1, None)
    supports = embedded[OURS] if support == drawn else ours.embed(parts[support].images)
    weights, biases = ours.fit(supports[picks])
    network = network.cpu()
    network.classifier = nn.Linear(weights.shape[2], len(classes))
    network.classifier.load_state_dict({"weight": weights[0], "bias": biases[0]})
    check_frozen(network, before)
    checkpoint.save(
        out / "best_model.pt",
        {
            "kind": "best_model",
            **{key: saved[key] for key in ("architecture", "activation", "mean", "std", "epoch")},
            "output_dim": len(classes),
            "class_names": list(classes),
            "parameters": network.state_dict(),
            "settings": settings.model_dump(),
            "versions": checkpoint.versions(),
        },
    )

    # ---- report -------------------------------------------------------------------------------------------------------
    test = parts["test"]
    confidence, predicted = infer(network, test.images, saved["mean"], saved["std"]).softmax(1).max(1)
    titles = []
    for name, label, probability in zip(test.names(range(len(test.files))), predicted.tolist(), confidence.tolist()):
        titles.append(f"{name}\npredicted {classes[label]}, {probability:.1%}")
        print(f"test {name}: predicted {classes[label]} ({probability:.2%})")
    is_right = (predicted == test.labels).tolist()
    colours = [plots.GREEN if right else plots.RED for right in is_right]
    heading = f"{sum(is_right)} of {len(is_right)} test images right"
    plots.draw_sheet(test.images.squeeze(1).numpy(), titles, 5, heading, out / "plots" / "predictions.png", colours)
    shown = parts[support].images[picks.flatten()].squeeze(1).numpy()
    names = parts[support].names(picks.flatten().tolist())
    plots.draw_sheet(shown, names, shots, "What the last layer learns from", out / "plots" / "support.png")
    if at_random:
        heading = f"{settings.episodes} episodes, {len(labels)} test images"
        path = out / "plots" / "accuracy_by_shots.png"
        band = "its worst to its best episode"
        plots.draw_accuracy_by_count(rows, "support images of each class", heading, path, bands=1, band=band)
        shown, names = parts[pool].images.squeeze(1).numpy(), parts[pool].names(range(len(parts[pool].files)))
        plots.draw_sheet(shown, names, 13, f"What episodes draw from: {len(names)} images", out / "plots" / "pool.png")
    mine = report.pop(OURS)
    scores = {
        "task": " or ".join(classes),
        "shots": shots,
        "episodes": settings.episodes,
        "test_images": len(labels),
        **{f"accuracy_{name}": value for name, value in mine.items()},
        "per_episode": rows[OURS][shots],
        "accuracy_by_shots": {k: statistics.mean(values) for k, values in rows[OURS].items()},
        "other_ways": report,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": checkpoint.versions(),
        "settings": settings.model_dump(),
    }
    checkpoint.save_json(out / "scores.json", scores)
    print(
        f"test accuracy {mine['mean']:.2%} (standard deviation {mine['std']:.2%}, {mine['min']:.2%} to {mine['max']:.2%}; "
        f"{len(labels)} images, {settings.episodes} x {shots} shots); wrote {out / 'scores.json'}"
    )


if __name__ == "__main__":
    run_script(main)
