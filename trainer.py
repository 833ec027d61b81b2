"""Training one model: the loop over batches, its optional extras, validation, inference.

`Trainer.train_epoch` is the loop. Label smoothing, distillation and the auxiliary loss are in `Criterion`, the moving average
of the weights in `EMA`, the choice of hard images in `HardExampleSampler`; a training that sets none of them uses none.
`run.py` calls `Trainer.run_epoch` for epoch after epoch, and saves and resumes.
"""

import copy
import math
import time
from collections.abc import Sequence
from typing import Generic

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoint
import distributed
import interrupts
from augmentation import augment
from config import TrainSettings, UserError, parse_augment, resolve
from data_preprocessing import Split, mean_and_std, shuffle, training_settings
from device import autocast, capture, move
from distillation import Teacher, load_teacher
from layers import SomeModel, add_batch_norm, fuse_batch_norm
from model import Classifier, build_model, load_imagenet_weights, load_model
from optimizer import build_optimizer, learning_rate, set_lr
from scenes import plain_count

TEMPERATURE = 2.0  # of the softened probabilities in distillation; Hinton et al. 2015, arXiv 1503.02531, section 2


@torch.inference_mode()
def infer(model: Classifier, images: torch.Tensor, precision=torch.float32, *, features: bool = False) -> torch.Tensor:
    """Logits `(N, output_dim)`, or the features `(N, D)`, float32 on the CPU, of uint8 images `(N, V, 28, 28)`, V views
    of each, on any device.

    A terminal sees a progress bar if it takes longer than a second.
    """
    model.eval()
    device = next(model.parameters()).device
    forward = model.forward_features if features else model
    outputs = []
    batches = images.split(max(1, 200 // images.shape[1]))  # on a CPU, larger ones are no faster and need more memory
    for batch in tqdm(batches, "inference", delay=1, disable=None, leave=False):
        with autocast(device, precision):
            outputs.append(forward(batch.to(device)).float().cpu())
    return torch.cat(outputs)


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, in nats, and accuracy, in 0..1, of logits `(N, C)` and labels `(N,)`."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


class Criterion(nn.Module):
    """The training loss of a model, which it contains, so that DistributedDataParallel sees all parameters.

    Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7), distillation (Hinton et al. 2015,
    arXiv 1503.02531, section 2) and the loss of an auxiliary head on the same features, with `fine_classes` outputs.
    `class_weights`, `(C,)`, weigh the classes in the cross-entropy; `teacher` is one of `distillation.load_teacher`.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        model: Classifier,
        settings: TrainSettings,
        fine_classes: int,
        class_weights: torch.Tensor | None = None,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        self.model, self.settings, self.teacher = model, settings, teacher
        has_head = settings.aux_loss_weight > 0
        self.aux_head = nn.Linear(model.classifier.in_features, fine_classes) if has_head else None
        self.register_buffer("class_weights", class_weights)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, fine_labels: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss `()`; each image's cross-entropy and whether it is classified correctly, float32 `(N, 2)`.

        `images` are uint8 `(N, V, 28, 28)`, labels int64 `(N,)`; `indices`, int64 `(N,)`, are the images', for the teacher.
        """
        features = self.model.forward_features(images)
        logits = self.model.classifier(features)
        losses = F.cross_entropy(logits, labels, reduction="none")  # (N,)
        loss = losses.mean()
        smoothing = self.settings.label_smoothing
        if self.class_weights is not None:  # the plain mean, not torch's weighted one: the mean of shards is the batch's
            loss = F.cross_entropy(logits, labels, self.class_weights, reduction="none", label_smoothing=smoothing).mean()
        elif smoothing:
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if self.teacher:
            targets = (self.teacher(images, indices).float() / TEMPERATURE).softmax(1)
            distillation = F.cross_entropy(logits / TEMPERATURE, targets) * TEMPERATURE**2
            loss = self.settings.distill_weight * distillation + (1 - self.settings.distill_weight) * loss
        if self.aux_head is not None:
            loss = loss + self.settings.aux_loss_weight * F.cross_entropy(self.aux_head(features), fine_labels)
        return loss, torch.stack([losses.detach().float(), logits.argmax(1) == labels], 1)


class EMA(Generic[SomeModel]):
    """Exponential moving average of a model's parameters and running statistics. The decay is smaller in the first steps,
    because the initial parameters are random (as in TensorFlow's ExponentialMovingAverage)."""

    def __init__(self, model: SomeModel, decay: float):
        self.model, self.decay = copy.deepcopy(model), decay
        pairs = zip(self.model.state_dict().values(), model.state_dict().values())
        # all but counts of batches and the normalisation's two scalars, which don't change
        self.means, self.latest = zip(*(pair for pair in pairs if pair[0].is_floating_point() and pair[0].ndim))

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.means, self.latest, 1 - min(self.decay, (1 + step) / (10 + step)))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)


class HardExampleSampler:
    """Epochs on a fraction of the training images: half of it those with the highest last loss, half drawn at random.

    After a few hundred steps almost every image is classified with certainty and has next to no gradient. A batch of such
    images changes nothing. Selection by loss: Loshchilov & Hutter 2015, arXiv 1511.06343.
    """

    def __init__(self, train: torch.Tensor):
        self.train = train
        self.losses = torch.full((int(train.max()) + 1,), torch.inf, device=train.device)  # by image; infinite before a visit

    def order(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` of the training indices, shuffled."""
        order = shuffle(self.train, generator)
        if count == len(self.train):
            return order
        is_hard = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        is_hard[self.losses[order].topk(count // 2).indices] = True
        chosen = torch.cat([order[is_hard], order[~is_hard][: count - count // 2]])
        return shuffle(chosen, generator)

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        self.losses[indices] = losses.to(self.losses.device)

    def unseen(self) -> torch.Tensor:
        """The training indices whose loss is not known."""
        return self.train[self.losses[self.train].isinf()]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.losses.copy_(state["losses"])


def epoch_batches(order: torch.Tensor, settings, epoch: int) -> tqdm:
    """The indices `order` in batches of `settings.batch_size`, in the first process with a progress bar on a terminal. A
    last, shorter batch is dropped, unless it is the only one."""
    full = len(order) // settings.batch_size * settings.batch_size or len(order)
    is_hidden, name = True if distributed.rank() else None, f"epoch {epoch}/{settings.epochs}"
    return tqdm(order[:full].split(settings.batch_size), name, disable=is_hidden, leave=False, unit=" batches")


class Trainer:
    """One model in training: its data, model, optimizer and extras. Everything that changes is in its `state_dict`.

    It trains on the split's device. Raises UserError if a process would get an empty batch, or if a file that the settings name
    (teacher, finetune) is missing or does not fit.
    """

    kind, model_kind = "checkpoint", "best_model"

    def __init__(self, settings: TrainSettings, seed: int, split: Split, precision: torch.dtype):
        self.settings, self.precision, self.device = settings, precision, split.data.images.device
        data, self.train, valid, generated = split
        self.images, self.labels, self.class_names, self.fine_labels = data
        images, train, real = self.images, self.train, self.train[: len(self.train) - generated]
        mean, std = mean_and_std(images, real) if settings.scaling == "standard" else (0.5, 0.5)
        self.class_sizes = self.fine_labels[: len(images) - generated].bincount().tolist()
        self.valid_images, self.valid_labels = images[valid], self.labels[valid].cpu()
        fractions = [settings.first_epoch_fraction] + [settings.hard_fraction] * (settings.epochs - 1)
        self.counts = [max(1, int(len(train) * fraction)) for fraction in fractions]  # images, by epoch
        self.steps = [max(1, count // settings.batch_size) for count in self.counts]
        smallest = min(settings.batch_size, *self.counts)
        if smallest < distributed.world_size():
            count = distributed.world_size()
            raise UserError(f"{count} processes can't share a batch of {smallest}; use a larger batch_size or limit")

        torch.manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)  # of the order and the augmentation
        self.model = self._build_model(seed, mean, std)
        self.ema = EMA(self.model, settings.ema_decay) if settings.ema_decay else None
        self.sampler = HardExampleSampler(train) if min(fractions) < 1 else None
        self.scene_fraction = parse_augment(settings.augment).get("scene", 0.0)
        classes = len(self.class_names)
        counts = self.labels[train].bincount(minlength=classes).clamp(1)
        class_weights = len(train) / (classes * counts) if settings.class_weights == "balanced" else None  # mean over images: 1
        teacher = load_teacher(settings, seed, data, self.class_sizes) if settings.teacher else None
        fine_classes = int(self.fine_labels.max()) + 1
        self.criterion = Criterion(self.model, settings, fine_classes, class_weights, teacher).to(self.device)
        self.ddp_criterion = distributed.wrap_ddp(self.criterion, self.device)
        if distributed.rank():
            torch.manual_seed(seed + distributed.rank())  # dropout differs between processes
        trainable = [parameter for parameter in self.criterion.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(settings, trainable)
        if self.device.type == "cuda" and distributed.world_size() == 1 and smallest == settings.batch_size > 1:
            first = train[:smallest]
            capture(self.criterion, (images[first], self.labels[first], self.fine_labels[first], first), precision)

    def _build_model(self, seed: int, mean: float, std: float) -> Classifier:
        """The model before the first step, on the training's device. The pixels' statistics are those of its normalisation."""
        settings, keys = self.settings, {"architecture", "dropout", "activation", "init"}
        model = build_model(output_dim=len(self.class_names), **settings.model_dump(include=keys))
        if settings.pretrained:
            load_imagenet_weights(model)
        model.set_statistics(mean, std, self.images[self.train[:2000]].cpu())
        if settings.finetune:  # after a whitened first layer was fitted, because the layers above know the other model's
            path = resolve(settings.finetune)
            start = load_model(path)
            data = training_settings(start.metadata)["data"]
            if checkpoint.is_same("data", data, settings.data):  # else it has seen none of these images
                checkpoint.check_same_split(path, start.metadata.get("settings", {}), seed, settings.valid_ratio, data)
                checkpoint.check_same_images(f"finetune={path}", start.metadata, self.class_sizes)
            checkpoint.load_parameters(model.features, start.features.state_dict(), path)
        if settings.batch_norm:
            add_batch_norm(model)
        return move(model, self.device)

    def train_epoch(self, epoch: int, valid_losses: Sequence[float]) -> tuple[float, float]:
        """Train on the epoch's batches; mean cross-entropy, in nats, and accuracy of its images while they were trained on.

        `valid_losses`: of the epochs before. Raises UserError on a loss that is not finite, at most 20 batches later.
        """
        self.ddp_criterion.train()
        count = self.counts[epoch - 1]
        order = self.sampler.order(count, self.generator) if self.sampler else shuffle(self.train, self.generator)
        first_step, all_steps = sum(self.steps[: epoch - 1]), sum(self.steps)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        seen, sums = 0, torch.zeros(2, dtype=dtype, device=self.device)  # of the losses, and of the correct predictions
        bar = epoch_batches(order, self.settings, epoch)
        for step, indices in enumerate(bar, first_step):
            # augmented before it is sharded, so that the random numbers are the same for any number of processes
            images = augment(self.images[indices], self.fine_labels[indices], self.settings.augment, self.generator)
            images = distributed.shard(images)
            shard = distributed.shard(indices)
            with autocast(self.device, self.precision):
                loss, results = self.ddp_criterion(images, self.labels[shard], self.fine_labels[shard], shard)
            # the mean of the processes' gradients is that of the whole batch, also if their shards differ by an image
            (loss * (distributed.world_size() * len(shard) / len(indices))).backward()
            set_lr(self.optimizer, learning_rate(self.settings, step / all_steps, valid_losses))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.update(step + 1)
            results = distributed.gather_rows(results.detach(), len(indices))  # (B, 2)
            if self.sampler:
                plain = plain_count(len(indices), self.scene_fraction)  # a scene's loss says little of its garment's
                self.sampler.record(indices[:plain], results[:plain, 0])
            seen += len(indices)
            sums += results.sum(0)
            done = step - first_step + 1
            if done % 20 == 1 or done == len(bar):  # not after every batch: a GPU waits while a result is read
                mean_loss, accuracy = (sums / seen).tolist()
                total = mean_loss + loss.item()  # the mean cross-entropy, and all terms of the last batch's loss
                if not math.isfinite(total):
                    raise UserError(f"the loss is {total} by batch {done}; a smaller lr may help")
                bar.set_postfix_str(f"loss {mean_loss:.4f}, accuracy {accuracy:.2%}")
            interrupts.check()
        return mean_loss, accuracy

    def run_epoch(self, epoch: int, epochs: Sequence[dict]) -> dict:
        """Train, then validate on the validation images, if any; the epoch's line of history, after the lines `epochs`.

        Raises UserError, naming the epoch."""
        started = time.perf_counter()
        try:
            valid_losses = [line["valid_loss"] for line in epochs if "valid_loss" in line]
            train_loss, train_accuracy = self.train_epoch(epoch, valid_losses)
            # on CPUs each process has running statistics of its own shards; all take those of the first one
            for model in (self.model, self.ema.model) if self.ema else (self.model,):
                distributed.broadcast_buffers(model)
            if epoch == 1 and self.sampler and self.counts[0] < len(self.train):
                self.score_unseen(self.sampler)
            validation = self.validate() if len(self.valid_labels) else {}
        except ValueError as error:  # of batch normalisation, where one image gives it a single value
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(f"epoch {epoch}: a batch of one image can't be normalised; use a larger batch_size") from None
        except UserError as error:
            raise UserError(f"epoch {epoch}: {error}") from None
        return {
            "epoch": epoch,
            "seconds": round(time.perf_counter() - started, 3),
            "lr": self.optimizer.param_groups[0]["lr"],  # of the last step
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            **validation,
        }

    def score_unseen(self, sampler: HardExampleSampler) -> None:
        """Record the losses of images that no epoch has visited."""
        unseen = sampler.unseen()
        logits = self.infer(self.model, self.images[unseen])
        sampler.record(unseen, F.cross_entropy(logits, self.labels[unseen].cpu(), reduction="none"))

    def validate(self) -> dict[str, float]:
        """Validation loss, in nats, and accuracy, in 0..1. Raises UserError if the loss is not finite."""
        loss, accuracy = loss_and_accuracy(self.infer(self.eval_model, self.valid_images), self.valid_labels)
        if not math.isfinite(loss):
            raise UserError(f"the validation loss is {loss}; a smaller lr may help")
        return {"valid_loss": loss, "valid_accuracy": accuracy}

    def infer(self, model: Classifier, images: torch.Tensor) -> torch.Tensor:
        """The logits `(N, C)` of all images; each process computes its shard."""
        return distributed.gather_rows(infer(model, distributed.shard(images), self.precision), len(images))

    @property
    def eval_model(self) -> Classifier:
        """A copy of the model that is validated and saved, in evaluation mode."""
        return fuse_batch_norm(self.ema.model if self.ema else self.model)

    def metadata(self) -> dict:
        """What is needed to rebuild the model, and where it comes from."""
        return {
            **self.settings.model_dump(include={"architecture", "activation"}),
            "output_dim": len(self.class_names),
            "class_names": list(self.class_names),
            "class_sizes": self.class_sizes,
            **checkpoint.provenance(self.settings, self.device, self.precision),
        }

    def _parts(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema, "sampler": self.sampler}
        return {**parts, "aux_head": self.criterion.aux_head}

    def state_dict(self) -> dict:
        states = {name: part.state_dict() if part else None for name, part in self._parts().items()}
        return {**states, "rng": checkpoint.rng_state(self.generator)}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError if the state is another model's, UserError if the images have
        changed."""
        checkpoint.check_same_images("resume=true: the checkpoint", state, self.class_sizes)
        for name, part in self._parts().items():
            if part:
                part.load_state_dict(state[name])
        checkpoint.set_rng_state(state["rng"], self.generator)
