"""A training on its way: its data, its network, its teacher, an epoch; scripts go through the epochs."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoint
import parallel
from checkpoint import lowest
from config import Settings, UserError, parse_augment, resolve
from data_preprocessing import batches, class_names, epoch_order, labels_of, mean_and_std, normalise
from model import (
    Heads,
    average_into,
    build,
    evaluate,
    folded,
    freeze,
    infer,
    load_imagenet,
    train_one_epoch,
    whiten,
    with_batch_norm,
    zero_sums,
)
from networks import Network
from optimizer import Optimizer, learning_rate


def epochs_of(history: list[dict], run: int) -> list[dict]:
    return [line for line in history if line.get("run", 1) == run]


def is_over(epochs: list[dict], settings: Settings) -> bool:
    """Whether a run with these epochs behind it has had them all, or its patience has ended."""
    if len(epochs) >= settings.epochs:
        return True
    return bool(epochs) and 0 < settings.patience <= len(epochs) - lowest(epochs)["epoch"]


def check_same_split(path: Path, theirs: dict, seed: int, valid_ratio: float) -> None:
    """Raises UserError if what is in `path`, trained under the settings `theirs`, has seen images that validate here."""
    try:
        split = {key: theirs[key] for key in ("seed", "valid_ratio", "folds", "runs")}
        is_same = split["seed"] == seed and split["valid_ratio"] >= valid_ratio and not split["folds"] and split["runs"] == 1
    except (KeyError, TypeError):
        raise UserError(f"{path}: doesn't say on which images it was trained; train it again") from None
    if not is_same:
        raise UserError(
            f"{path}: was trained with {' '.join(f'{key}={value}' for key, value in split.items())}, so that it may have seen "
            f"validation images of seed={seed} valid_ratio={valid_ratio}; train it with the same"
        )


def load_teacher(settings: Settings, seed: int, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What maps augmented images, uint8 `(N, 1, 28, 28)`, and the indices `(N,)` of those that they were made from to the
    teacher's logits `(N, C)`: a trained network, or what teach.py wrote down of the images as they are.

    Raises UserError if the file is missing or damaged, tells other classes or has seen this run's validation images.
    """
    path = resolve(settings.teacher)
    kind = "targets" if path.name == "targets.pt" else "best_model"
    saved = checkpoint.load(path, kind)
    check_same_split(path, saved.get("settings", {}), seed, settings.valid_ratio)
    names = class_names(settings.output_dim)
    if tuple(saved["class_names"]) != names:
        raise UserError(
            f"{path}: tells the classes {', '.join(saved['class_names'])}, not {', '.join(names)}; name another teacher"
        )
    if kind == "targets":
        if "gan" in parse_augment(settings.augment):
            raise UserError(f"{path}: says nothing of generated images; name a best_model.pt, or leave gan out of augment")
        targets = saved["log_probabilities"]
        if not isinstance(targets, torch.Tensor) or targets.shape != (60_000, len(names)) or not targets.isfinite().all():
            raise UserError(f"{path}: holds no log-probabilities of the 60,000 training images; run teach.py again")
        targets = targets.to(device)
        return lambda _, indices: targets[indices].float()
    network = freeze(checkpoint.rebuild(saved, path)).to(device)

    @torch.no_grad()
    def ask(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return network(normalise(images, saved["mean"], saved["std"]))

    return ask


class Generated:
    """Images that a generator adds to `count` real ones, as many of each garment as of any other."""

    def __init__(self, settings: Settings, seed: int, count: int, device: torch.device):
        from gan_model import draw, load_generator  # here, because most trainings need none

        path = resolve(settings.generator)
        generator, theirs = load_generator(path)
        check_same_split(path, theirs, seed, settings.valid_ratio)
        generator.to(device)
        made = max(1, round(count * settings.gan_share / (1 - settings.gan_share)))
        self.garments = torch.arange(made, device=device) % 10
        spread = parse_augment(settings.augment)["gan"]
        self.images = lambda epoch: draw(generator, self.garments, seed + epoch, spread)  # uint8 (made, 1, 28, 28)


class Training:
    """One network on its way: its data, and all that changes while it trains, which is what a checkpoint holds.

    `images` uint8 `(N, 1, 28, 28)` and `garments` int64 `(N,)` are on the device; `train` and `valid` index them.
    """

    def __init__(
        self,
        settings: Settings,
        seed: int,
        images: torch.Tensor,
        garments: torch.Tensor,
        train: torch.Tensor,
        valid: torch.Tensor,
        precision: torch.dtype,
    ):
        device = images.device
        self.settings, self.precision = settings, precision
        self.mean, self.std = mean_and_std(images, train) if settings.scaling == "standard" else (0.5, 0.5)
        self.generated = None
        if settings.gan_share and "gan" in parse_augment(settings.augment):
            self.generated = Generated(settings, seed, len(train), device)
            train = torch.cat([train, torch.arange(len(self.generated.garments), device=device) + len(images)])
            images = torch.cat([images, self.generated.images(0)])
            garments = torch.cat([garments, self.generated.garments])
        self.images, self.garments, self.train = images, garments, train
        self.labels = labels_of(garments, settings.output_dim)
        self.valid_images, self.valid_labels = images[valid], self.labels[valid].cpu()
        shares = [settings.first_share] + [settings.hard_share] * (settings.epochs - 1)
        self.counts = [max(1, int(len(train) * share)) for share in shares]  # images, by epoch
        self.steps = [max(1, count // settings.batch_size) for count in self.counts]

        torch.manual_seed(seed)
        self.generator = torch.Generator(device).manual_seed(seed)  # of the order and the augmentation
        self.network = build(
            settings.architecture,
            settings.output_dim,
            dropout=settings.dropout,
            activation=settings.activation,
            init=settings.init,
        )
        if settings.pretrained:
            load_imagenet(self.network)
        if settings.whiten:
            whiten(self.network, normalise(images[train[:2000]].cpu(), self.mean, self.std))
        if settings.batch_norm:
            with_batch_norm(self.network)
        self.network.to(device)
        self.averaged = copy.deepcopy(self.network) if settings.average else None
        self.auxiliary = nn.Linear(self.network.classifier.in_features, 10).to(device) if settings.auxiliary else None
        self.heads = parallel.together(Heads(self.network, self.auxiliary), device)
        if parallel.rank():
            torch.manual_seed(seed + parallel.rank())  # of what dropout leaves out: not the same on every process
        trained = [parameter for parameter in self.heads.parameters() if parameter.requires_grad]
        self.optimizer = Optimizer(settings.optimizer, trained, settings.lr, settings.weight_decay)
        self.teacher = load_teacher(settings, seed, device) if settings.teacher else None
        self.image_losses = torch.full((len(self.images),), torch.inf, device=device)
        self.partial: dict | None = None  # of an epoch that was ended in its midst: the order, what is done of it

    @property
    def kept(self) -> Network:
        """A copy of what is validated and kept, in evaluation mode."""
        return folded(self.averaged or self.network)

    def train_on(self, indices: Sequence[torch.Tensor], sums: torch.Tensor, step: Callable[[], None]) -> None:
        """`train_one_epoch` on batches of indices."""
        train_one_epoch(
            self.heads,
            indices,
            self.images,
            self.labels,
            self.garments,
            self.settings,
            mean=self.mean,
            std=self.std,
            precision=self.precision,
            generator=self.generator,
            image_losses=self.image_losses,
            teach=self.teacher,
            sums=sums,
            step=step,
        )

    def infer(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Logits as `model.infer`'s, of which each process computes its share."""
        logits = infer(network, parallel.share(images), self.mean, self.std, self.precision)
        return parallel.whole(logits, len(images))

    def look_at(self, unseen: torch.Tensor) -> None:
        """Note the losses of images that no epoch has visited, to know which of them are hard."""
        logits = self.infer(self.network, self.images[unseen])
        losses = F.cross_entropy(logits, self.labels[unseen].cpu(), reduction="none")
        self.image_losses[unseen] = losses.to(self.image_losses.device)

    def train_epoch(self, epoch: int, valid_losses: Sequence[float], check: Callable[[], None] = lambda: None) -> dict:
        """Train and validate; the epoch's line of history.

        `valid_losses`: of the epochs before. `check` is called when a batch is done, and may raise to end the epoch there;
        the next call, also on what `load_state_dict` has read, goes on with the batch after it.
        """
        started = time.perf_counter()
        settings, count = self.settings, self.counts[epoch - 1]
        if self.generated and settings.gan_fresh:
            self.images[-len(self.generated.garments) :] = self.generated.images(epoch)
            if self.partial is None and 1 < epoch and count < len(self.train):
                self.look_at(self.train[self.train >= len(self.images) - len(self.generated.garments)])
        if self.partial is None:
            order = epoch_order(self.train, count, self.image_losses, self.generator)
            sums = zero_sums(3, order.device)
            self.partial = {"order": order, "sums": sums, "batches": 0, "seconds": 0.0}
        partial, sums = self.partial, self.partial["sums"]
        before, total = sum(self.steps[: epoch - 1]), sum(self.steps)
        images = self.steps[epoch - 1] * settings.batch_size

        def step() -> None:
            done = before + partial["batches"]
            self.optimizer.lr = learning_rate(settings, done / total, valid_losses)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.averaged:
                average_into(self.averaged, self.network, settings.average, done + 1)
            partial["batches"] += 1
            if not bar.disable and partial["batches"] % 20 == 0:
                seen, losses, correct = sums.tolist()
                bar.update(int(seen) - bar.n)
                bar.set_postfix_str(f"loss {losses / seen:.4f}, accuracy {correct / seen:.2%}")
            check()

        name, quiet = f"epoch {epoch}/{settings.epochs}", True if parallel.rank() else None  # None: not on a terminal
        try:
            with tqdm(total=images, unit=" images", desc=name, disable=quiet, leave=False) as bar:
                self.train_on(batches(partial["order"], settings.batch_size)[partial["batches"] :], sums, step)
        except UserError as error:
            raise UserError(f"epoch {epoch}: {error}") from None
        finally:
            partial["seconds"] += time.perf_counter() - started
        started = time.perf_counter()
        if epoch == 1 and count < len(self.train):
            self.look_at(self.train[self.image_losses[self.train].isinf()])
        logits = self.infer(self.kept, self.valid_images)
        valid_loss, valid_accuracy = evaluate(logits, self.valid_labels)
        if not math.isfinite(valid_loss):
            raise UserError(f"epoch {epoch}: the validation loss is {valid_loss}; a smaller lr may help")
        self.partial = None
        seen, losses, correct = sums.tolist()
        return {
            "epoch": epoch,
            "seconds": round(partial["seconds"] + time.perf_counter() - started, 3),
            "lr": learning_rate(settings, (before + partial["batches"] - 1) / total, valid_losses),  # of the last step
            "train_loss": losses / seen,
            "train_accuracy": correct / seen,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
        }

    def described(self) -> dict:
        """What is needed to rebuild the network and to preprocess its input, and where it comes from."""
        return {
            "architecture": self.settings.architecture,
            "activation": self.settings.activation,
            "output_dim": self.settings.output_dim,
            "class_names": list(class_names(self.settings.output_dim)),
            "mean": self.mean,
            "std": self.std,
            "settings": self.settings.model_dump(),
            "versions": checkpoint.versions(),
            "machine": checkpoint.machine(self.images.device, self.precision),
        }

    def state_dict(self) -> dict:
        return {
            "parameters": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "auxiliary": self.auxiliary.state_dict() if self.auxiliary else None,
            "optimizer": self.optimizer.state_dict(),
            "image_losses": self.image_losses,
            "partial": self.partial,
            "random": checkpoint.random_states(self.generator),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError if the state is another network's."""
        self.network.load_state_dict(saved["parameters"])
        for part, name in ((self.averaged, "averaged"), (self.auxiliary, "auxiliary")):
            if part:
                part.load_state_dict(saved[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.image_losses.copy_(saved["image_losses"])
        if saved["partial"]:
            device = self.images.device
            self.partial = {**saved["partial"], **{key: saved["partial"][key].to(device) for key in ("order", "sums")}}
        checkpoint.set_random_states(saved["random"], self.generator)
