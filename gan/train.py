"""Train a conditional GAN on Fashion-MNIST's training images: `python gan/train.py [key=value ...]`.

Writes into out_dir, runs/gan by default: checkpoint.pt after every epoch, generator.pt (the moving average of the generator's
weights), history.jsonl, samples of the same noise after every epoch in plots/samples.png, and all of them in
plots/training.gif. `resume=true` continues from checkpoint.pt. The test images are not read.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import interrupts
import plots
from config import OptimizationSettings, Settings, UserError, ValidRatio, setting
from data_preprocessing import CLASS_NAMES, Split, load_splits, shuffle
from device import autocast, choose_device, choose_precision
from gan.networks import NOISE_DIM, Discriminator, Generator, fixed_noise, generate, one_hot
from model import count_parameters
from optimizer import build_optimizer, learning_rate, set_lr
from run import Run
from script import load_settings, run_script
from trainer import EMA, epoch_batches

GRID_COLUMNS = 10  # samples of each class in a picture
DISCRIMINATOR_LR = 2  # times the generator's: two time scales, Heusel et al. 2017, arXiv 1706.08500


class GanSettings(OptimizationSettings, Settings):
    """GAN"""

    out_dir: str = setting("runs/gan", "folder for everything that a run writes", min_length=1)
    epochs: int = setting(30, "epochs", ge=1, le=100_000)
    lr: float = setting(0.0005, "the generator's highest learning rate; the discriminator's is twice as high", gt=0)
    schedule: Literal["none", "cosine", "linear"] = setting("linear", "of the learning rates; none = constant")
    warmup: float = setting(0.0, "fraction of all steps in which cosine and linear rise linearly", ge=0, lt=1)
    ema_decay: float = setting(0.999, "decay of the moving average of the generator's weights, which is saved", gt=0, lt=1)
    aux_loss_weight: float = setting(1.0, "weight of the auxiliary classifier's loss", ge=0)
    valid_ratio: ValidRatio = 0.1
    resume: bool = setting(False, "continue from out_dir/checkpoint.pt")


class GanTrainer:
    """Generator and discriminator in training. Everything that changes is in its `state_dict`."""

    kind, model_kind = "gan_checkpoint", "generator"

    def __init__(self, settings: GanSettings, split: Split, precision: torch.dtype):
        self.settings, self.precision, self.device = settings, precision, split.data.images.device
        self.images, self.labels, self.train = split.data.images, split.data.labels, split.train
        torch.manual_seed(settings.seed)
        self.rng = torch.Generator(self.device).manual_seed(settings.seed)  # of the order and the noise
        self.generator, self.discriminator = Generator().to(self.device), Discriminator().to(self.device)
        self.ema = EMA(self.generator, settings.ema_decay)
        networks = self.generator, self.discriminator
        self.optimizers = [build_optimizer(settings, network.parameters(), beta1=0.0) for network in networks]
        self.samples: list[torch.Tensor] = []  # uint8 (100, 28, 28), a grid after each epoch

    def run_epoch(self, epoch: int, epochs: Sequence[dict]) -> dict:
        """Train both; the epoch's line of history. Raises UserError on a loss that is not finite."""
        started = time.perf_counter()
        self.generator.train()
        self.discriminator.train()
        order = shuffle(self.train, self.rng)
        batches = epoch_batches(order, self.settings, epoch)
        totals = torch.zeros(2, dtype=torch.float64)
        for number, indices in enumerate(batches):
            step = (epoch - 1) * len(batches) + number
            lr = learning_rate(self.settings, step / (self.settings.epochs * len(batches)))
            real = self.images[indices].float() * (1 / 127.5) - 1  # -1..1
            losses = self.step(real, one_hot(self.labels[indices]), lr)
            if not torch.isfinite(losses).all():
                raise UserError(f"epoch {epoch}: a loss is {losses.tolist()} in batch {number + 1}; a smaller lr may help")
            totals += losses.cpu()
            self.ema.update(step)
            interrupts.check()
        noise, classes = fixed_noise(GRID_COLUMNS)
        self.samples.append(generate(self.eval_model, classes.to(self.device), noise.to(self.device)).squeeze(1).cpu())
        discriminator_loss, generator_loss = (totals / len(batches)).tolist()
        line = {"epoch": epoch, "seconds": round(time.perf_counter() - started, 3), "lr": lr}
        return {**line, "discriminator_loss": discriminator_loss, "generator_loss": generator_loss}

    def step(self, real: torch.Tensor, classes: torch.Tensor, lr: float) -> torch.Tensor:
        """One step of the discriminator, then one of the generator; their losses, `(2,)`.

        Hinge losses (Lim & Ye 2017, arXiv 1705.02894), plus `aux_loss_weight` times the cross-entropy of the auxiliary
        classifier, which learns from real images only.
        """
        generator_optimizer, discriminator_optimizer = self.optimizers
        set_lr(generator_optimizer, lr)
        set_lr(discriminator_optimizer, lr * DISCRIMINATOR_LR)
        noise = torch.randn(len(real), NOISE_DIM, generator=self.rng, device=self.device)
        with autocast(self.device, self.precision):
            fake = self.generator(noise, classes)
            self.discriminator.requires_grad_(True)
            real_score, logits = self.discriminator(real, classes)
            fake_score, _ = self.discriminator(fake.detach(), classes)
            discriminator_loss = F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean()
            discriminator_loss += self.settings.aux_loss_weight * F.cross_entropy(logits, classes)
        discriminator_loss.backward()
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad()
        with autocast(self.device, self.precision):
            self.discriminator.requires_grad_(False)  # spares the gradients of its weights
            fake_score, logits = self.discriminator(fake, classes)
            generator_loss = self.settings.aux_loss_weight * F.cross_entropy(logits, classes) - fake_score.mean()
        generator_loss.backward()
        generator_optimizer.step()
        generator_optimizer.zero_grad()
        return torch.stack([discriminator_loss.detach(), generator_loss.detach()])

    @property
    def eval_model(self) -> Generator:
        return self.ema.model

    def metadata(self) -> dict:
        return checkpoint.provenance(self.settings, self.device, self.precision)

    def state_dict(self) -> dict:
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": checkpoint.rng_state(self.rng),
            "samples": self.samples,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError if the state is of other networks."""
        for name in ("generator", "discriminator", "ema"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        checkpoint.set_rng_state(state["rng"], self.rng)
        self.samples = list(state["samples"])


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, GanSettings)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    print("settings:", settings)
    split = load_splits(settings, device)[0]
    run = Run(GanTrainer, settings, arguments, checkpoint.machine(device, precision))
    folder = run.out / "plots"
    titles = [name for name in CLASS_NAMES for _ in range(GRID_COLUMNS)]
    with run.locked():
        trainer = GanTrainer(settings, split, precision)
        sizes = [f"{count_parameters(network):,}" for network in (trainer.generator, trainer.discriminator)]
        print(f"generator: {sizes[0]} parameters, discriminator: {sizes[1]}; {len(split.train):,} training images; {device}")
        for line in run.fit(trainer):
            grid, heading = trainer.samples[-1].numpy(), f"epoch {line['epoch']}"
            plots.draw_sheet(grid, titles, GRID_COLUMNS, heading, folder / "samples.png")
            losses = f"discriminator loss {line['discriminator_loss']:.4f}, generator loss {line['generator_loss']:.4f}"
            print(f"epoch {line['epoch']:3d}  {losses}  {line['seconds']:.1f} s", flush=True)
        plots.animate_grids(trainer.samples, GRID_COLUMNS, folder / "training.gif")
    print(f"wrote {run.model_path}, {folder / 'training.gif'}")


if __name__ == "__main__":
    run_script(main)
