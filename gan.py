"""Labelled garments out of noise: `python gan.py train|sample|score [key=value ...]`.

    train   a conditional GAN on the training images: checkpoint.pt after every epoch, generator.pt (the moving average of
            the generator's weights), history.jsonl, a grid of samples of the same noise in plots/samples.png after
            every epoch and all of them in plots/training.gif; `resume=true` goes on from checkpoint.pt
    sample  images of the classes, `per_class` of each, as samples/CLASS/NUMBER.png
    score   what the samples are worth, measured on validation images: scores.json, plots/nearest.png, plots/mixtures.png

All in out_dir, runs/gan by default; the settings are those of recipes/gan.json. The test images are not touched.
"""

import copy
import difflib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from tqdm import tqdm

import checkpoint
from augmentation import augment
from config import HELP, OF_TRAINING, Settings, UserError, load_settings, resolve, run_script
from data_preprocessing import GARMENTS, batches, load_images, normalise, split_indices
from gan_model import CLASSES, NOISE_DIM, Discriminator, Generator, draw, generate, load_generator, one_hot
from metrics import frechet_distance, mean_distance, nearest
from model import (
    autocast,
    average_into,
    choose_device,
    choose_precision,
    count_parameters,
    evaluate,
    infer,
    keep_freed_memory,
    zero_sums,
)
from optimizer import Optimizer, learning_rate
from stopping import Signals, Stopped, claimed, resuming
from training import Training, check_same_split

GRID = 10  # samples of each class in a picture
JUDGED_SAMPLES = 10_000
COMPARED = 1_000  # with all training images
PAIRS = 20  # in the picture
LEARNER = {"recipe": "deep_cnn_dropout", "schedule": "one_cycle", "lr": 0.003, "epochs": 10}  # learns from samples alone
DISCRIMINATORS_LR = 2  # times the generator's: two time scales, Heusel et al. 2017, arXiv 1706.08500


class GanSettings(Settings):
    UNREAD = OF_TRAINING - frozenset("valid_ratio epochs optimizer lr weight_decay average schedule warmup auxiliary".split())
    resume: bool = Field(False, description="train: go on from out_dir/checkpoint.pt")
    passes: int = Field(1, ge=1, le=10_000, description="train: how often an epoch goes over all images")
    per_class: int = Field(100, ge=1, le=100_000, description="sample: images of each class")
    classes: str = Field("", description="sample: which, e.g. Sneaker,Bag; empty = all ten")
    spread: float = Field(1.0, gt=0, le=3, description="sample, score: standard deviation of the noise; below 1, less varied")
    classifier: str = Field("runs/tiny_best/best_model.pt", description="score: the network that judges the samples")

    @field_validator("classes")
    @classmethod
    def _known_classes(cls, text: str) -> str:
        for name in text.split(",") if text else []:
            if name not in GARMENTS:
                near = difflib.get_close_matches(name, GARMENTS, n=1, cutoff=0)[0]
                raise ValueError(f"there is no class {name!r}, the nearest is {near!r}; known: {', '.join(GARMENTS)}")
        return text

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, schedule: str) -> str:
        if schedule == "plateau":
            raise ValueError("a GAN has no validation loss that could stall; choose another")
        return schedule


def precision_of(settings: GanSettings) -> torch.dtype:
    return choose_precision(settings.precision, choose_device(settings.device))


def fixed_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise `(100, 64)` and classes `(100, 10)` of the grid: rows are classes, a column has the same noise."""
    noise = torch.randn(GRID, NOISE_DIM, generator=torch.Generator().manual_seed(0))
    return noise.repeat(CLASSES, 1), one_hot(torch.arange(CLASSES).repeat_interleave(GRID))


class GanTraining:
    """Both networks on their way: the data, and all that changes, which is what a checkpoint holds.

    `images` uint8 `(N, 1, 28, 28)` and `garments` int64 `(N,)` are on the device; `train` indexes them.
    """

    def __init__(
        self, settings: GanSettings, images: torch.Tensor, garments: torch.Tensor, train: torch.Tensor, precision: torch.dtype
    ):
        device = images.device
        self.settings, self.precision, self.train = settings, precision, train
        self.images, self.garments = images, garments
        torch.manual_seed(settings.seed)
        self.random = torch.Generator(device).manual_seed(settings.seed)  # of the order and the noise
        self.generator, self.discriminator = Generator().to(device), Discriminator().to(device)
        self.averaged = copy.deepcopy(self.generator)
        self.optimizers = [
            Optimizer(settings.optimizer, network.parameters(), settings.lr, settings.weight_decay, beta1=0.0)
            for network in (self.generator, self.discriminator)
        ]
        self.frames: list[torch.Tensor] = []  # uint8 (100, 28, 28), a grid of samples after each epoch
        self.partial: dict | None = None  # of an epoch that was ended in its midst: the order, what is done of it

    def train_epoch(self, epoch: int, check: Callable[[], None]) -> dict:
        """The epoch's line of history. `check` is called after each batch, as training.py's is."""
        started = time.perf_counter()
        settings, device = self.settings, self.images.device
        for network in (self.generator, self.discriminator):
            network.train()
        if self.partial is None:
            orders = [torch.randperm(len(self.train), generator=self.random, device=device) for _ in range(settings.passes)]
            order = self.train[torch.cat(orders)]
            sums = zero_sums(2, device)
            self.partial = {"order": order, "sums": sums, "batches": 0, "seconds": 0.0}
        partial = self.partial
        indices = batches(partial["order"], settings.batch_size)
        first = partial["batches"]
        bar = tqdm(indices[first:], f"epoch {epoch}/{settings.epochs}", len(indices), initial=first, disable=None, leave=False)
        try:
            for chosen in bar:
                done = (epoch - 1) * len(indices) + partial["batches"]
                partial["lr"] = lr = learning_rate(settings, done / (settings.epochs * len(indices)))
                losses = self.step(normalise(self.images[chosen], 0.5, 0.5), one_hot(self.garments[chosen]), lr)
                partial["batches"] += 1
                if not torch.isfinite(losses).all():
                    raise UserError(
                        f"epoch {epoch}: a loss is {losses.tolist()} in batch {partial['batches']}; try a smaller lr"
                    )
                partial["sums"] += losses
                average_into(self.averaged, self.generator, settings.average, done)
                check()
        finally:
            partial["seconds"] += time.perf_counter() - started
        noise, classes = fixed_noise()
        self.frames.append(generate(self.averaged, classes.to(device), noise.to(device)).squeeze(1).cpu())
        self.partial = None
        discriminator_loss, generator_loss = (partial["sums"] / len(indices)).tolist()
        return {
            "epoch": epoch,
            "seconds": round(partial["seconds"], 3),
            "lr": partial["lr"],
            "discriminator_loss": discriminator_loss,
            "generator_loss": generator_loss,
        }

    def step(self, real: torch.Tensor, classes: torch.Tensor, lr: float) -> torch.Tensor:
        """One step of each network, the discriminator's first; their losses, `(2,)`: hinge, and `auxiliary` times that of
        the class, which the discriminator learns from real images."""
        of_generator, of_discriminator = self.optimizers
        of_generator.lr, of_discriminator.lr = lr, lr * DISCRIMINATORS_LR
        noise = torch.randn(len(real), NOISE_DIM, generator=self.random, device=real.device)
        with autocast(real.device, self.precision):
            made = self.generator(noise, classes)
            self.discriminator.requires_grad_(True)
            real_score, logits = self.discriminator(real, classes)
            made_score, _ = self.discriminator(made.detach(), classes)
            discriminator_loss = F.relu(1 - real_score).mean() + F.relu(1 + made_score).mean()
            discriminator_loss += self.settings.auxiliary * F.cross_entropy(logits, classes)
        discriminator_loss.backward()
        of_discriminator.step()
        of_discriminator.zero_grad()
        with autocast(real.device, self.precision):
            self.discriminator.requires_grad_(False)  # spares the gradients of its weights
            made_score, logits = self.discriminator(made, classes)
            generator_loss = self.settings.auxiliary * F.cross_entropy(logits, classes) - made_score.mean()
        generator_loss.backward()
        of_generator.step()
        of_generator.zero_grad()
        return torch.stack([discriminator_loss.detach(), generator_loss.detach()])

    def state_dict(self) -> dict:
        return {
            "generator": self.generator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": checkpoint.random_states(self.random),
            "frames": self.frames,
            "partial": self.partial,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError if the state is of other networks."""
        for name in ("generator", "averaged", "discriminator"):
            getattr(self, name).load_state_dict(saved[name])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        checkpoint.set_random_states(saved["random"], self.random)
        self.frames = list(saved["frames"])
        if saved["partial"]:
            device = self.images.device
            self.partial = {**saved["partial"], **{key: saved["partial"][key].to(device) for key in ("order", "sums")}}


def animate(frames: list[torch.Tensor], out: Path) -> None:
    import plots  # here, because matplotlib takes half a second to import

    plots.animate_grids([frame.numpy() for frame in frames], len(GARMENTS), out / "plots" / "training.gif")


def train(settings: GanSettings, arguments: list[str]) -> None:
    out = settings.out_path
    device = choose_device(settings.device)
    precision = precision_of(settings)
    keep_freed_memory()
    saved = checkpoint.load(out / "checkpoint.pt", "gan_checkpoint") if settings.resume else None
    history = saved["history"] if saved else []
    if saved:
        checkpoint.check_resumable(saved, settings, checkpoint.machine(device, precision))
        if len(history) >= settings.epochs:
            animate(saved["frames"], out)  # a kill may have come before it
            print(f"{out / 'checkpoint.pt'}: this run ended with epoch {len(history)}; there is nothing to resume")
            return
    print("settings:", settings)
    images, garments = load_images("train", settings.data_path)
    indices, _ = split_indices(garments, settings.valid_ratio, settings.seed)
    indices = indices[: settings.limit or None]
    training = GanTraining(settings, images.to(device), garments.to(device), indices.to(device), precision)
    if saved:
        try:
            training.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{out / 'checkpoint.pt'}: its state doesn't fit these networks; train without resume") from None
    sizes = [count_parameters(network) for network in (training.generator, training.discriminator)]
    print(
        f"generator of {sizes[0]:,} parameters, discriminator of {sizes[1]:,}, on {device} in {str(precision)[6:]}; "
        f"{len(indices):,} training images"
    )
    import plots  # here, because matplotlib takes half a second to import

    def save(name: str, kind: str, contents: dict) -> None:
        common = {"settings": settings.model_dump(), "versions": checkpoint.versions(), "epoch": len(history)}
        common["machine"] = checkpoint.machine(device, precision)
        checkpoint.save(out / name, {"kind": kind, **common, **contents})

    with claimed(out), Signals() as signals:
        while len(history) < settings.epochs:
            try:
                signals.check()
                line = training.train_epoch(len(history) + 1, signals.check)
            except Stopped:
                save("checkpoint.pt", "gan_checkpoint", {**training.state_dict(), "history": history})
                print(f"\ninterrupted in epoch {len(history) + 1}; all is saved: {resuming(arguments)}")
                raise
            history.append(line)
            save("generator.pt", "generator", {"parameters": training.averaged.state_dict()})
            checkpoint.write_history(out / "history.jsonl", settings.model_dump(), history)
            plots.draw_grid(training.frames[-1].numpy(), GARMENTS, f"epoch {line['epoch']}", out / "plots" / "samples.png")
            # last, so that a kill before it costs an epoch, which is trained again, and nothing else
            save("checkpoint.pt", "gan_checkpoint", {**training.state_dict(), "history": history})
            print(
                f"epoch {line['epoch']:3d}  loss of the discriminator {line['discriminator_loss']:.4f}, "
                f"of the generator {line['generator_loss']:.4f}  {line['seconds']:.1f} s",
                flush=True,
            )
    animate(training.frames, out)
    print(f"wrote {out / 'generator.pt'}, {out / 'plots' / 'training.gif'}")


def sample(settings: GanSettings, _: list[str]) -> None:
    from PIL import Image

    import plots  # here, because matplotlib takes half a second to import

    out = settings.out_path
    generator = load_generator(out / "generator.pt")[0].to(choose_device(settings.device))
    names = [name for name in GARMENTS if not settings.classes or name in settings.classes.split(",")]
    labels = torch.tensor([GARMENTS.index(name) for name in names]).repeat_interleave(settings.per_class)
    images = draw(generator, labels, settings.seed, settings.spread).squeeze(1).cpu().numpy()
    folder, part = out / "samples", out / ".samples"
    own = {garment.replace("/", "-") for garment in GARMENTS}
    try:
        strangers = [path for path in folder.glob("[!.]*") if path.name not in own]
        if strangers:
            raise UserError(f"{strangers[0]}: is none of the classes' folders, which alone belong there; move it")
        shutil.rmtree(part, ignore_errors=True)  # a kill may have left it
        for number, (label, image) in enumerate(zip(labels.tolist(), images)):
            place = part / GARMENTS[label].replace("/", "-") / f"{number % settings.per_class:05d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place, compress_level=1)
        shutil.rmtree(folder, ignore_errors=True)  # those of an earlier call
        os.replace(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{folder}: can't be written ({error.strerror}); free some space or choose another out_dir") from None
    shown = images.reshape(len(names), settings.per_class, 28, 28)[:, :GRID]
    plots.draw_grid(shown.reshape(-1, 28, 28), names, "generated", out / "plots" / "generated.png")
    print(f"wrote {len(images):,} images to {folder}, some of them to {out / 'plots' / 'generated.png'}")


def accuracy_after_training(
    images: torch.Tensor, garments: torch.Tensor, train: torch.Tensor, valid: torch.Tensor, settings: GanSettings
) -> float:
    """Accuracy, on the images at `valid`, of a fresh LEARNER network trained on those at `train`."""
    words = [f"{key}={value}" for key, value in LEARNER.items()]
    chosen = load_settings([*words, f"seed={settings.seed}", f"device={settings.device}"], Settings)
    device = choose_device(settings.device)
    split = images.to(device), garments.to(device), train.to(device), valid.to(device)
    training = Training(chosen, chosen.seed, *split, precision_of(settings))
    for epoch in range(1, chosen.epochs + 1):
        line = training.train_epoch(epoch, [])
    return line["valid_accuracy"]


def score(settings: GanSettings, _: list[str]) -> None:
    import plots  # here, because matplotlib takes half a second to import

    started = time.perf_counter()
    print("settings:", settings)
    out, device = settings.out_path, choose_device(settings.device)
    keep_freed_memory()
    generator, theirs = load_generator(out / "generator.pt")
    generator.to(device)
    path = resolve(settings.classifier)
    saved = checkpoint.load(path, "best_model")
    classifier = checkpoint.rebuild(saved, path).to(device)
    if tuple(saved["class_names"]) != GARMENTS:
        raise UserError(f"classifier={settings.classifier}: it doesn't tell the ten garments apart; name another")
    check_same_split(path, saved.get("settings", {}), theirs["seed"], theirs["valid_ratio"])
    images, garments = load_images("train", settings.data_path)
    train, valid = split_indices(garments, theirs["valid_ratio"], theirs["seed"])
    train = train[: settings.limit or None]
    judged = min(JUDGED_SAMPLES, len(train) // 2)
    if garments[train[:judged]].bincount(minlength=CLASSES).min() < 2:
        raise UserError(f"limit={settings.limit}: leaves fewer than two images of some class to compare with; raise it")
    labels = torch.arange(len(train)) % CLASSES
    made = draw(generator, labels, settings.seed, settings.spread).cpu()
    scores: dict = {"n": judged, "classifier": settings.classifier}

    # ---- precision: are they what they are called? Shmelkov et al. 2018, arXiv 1807.09499, GAN-test ----------------------
    def features(of: torch.Tensor) -> torch.Tensor:
        return infer(classifier.features, of, saved["mean"], saved["std"])

    def accuracy(of: torch.Tensor, labels: torch.Tensor) -> float:
        return evaluate(infer(classifier, of, saved["mean"], saved["std"]), labels)[1]

    few = made[:judged]
    scores["gan_test"] = accuracy(few, labels[:judged])
    scores["real_test"] = accuracy(images[valid], garments[valid])

    # ---- distance in the classifier's features, and yardsticks -------------------------------------------------------------
    real, other = images[train[:judged]], images[train[judged : 2 * judged]]
    of_real = features(real)
    random = torch.Generator().manual_seed(0)
    compared = {
        "generated": few,
        "other real images": other,
        "blurred": augment(real, "blur:1", random),
        "noisy": augment(real, "noise:20", random),
    }
    scores["frechet_distance"] = {name: frechet_distance(features(of), of_real) for name, of in compared.items()}

    # ---- variety ---------------------------------------------------------------------------------------------------------
    scores["variety"] = {}
    for garment, name in enumerate(GARMENTS):
        of_class = few[labels[: len(few)] == garment], real[garments[train[: len(real)]] == garment]
        scores["variety"][name] = mean_distance(of_class[0]) / mean_distance(of_class[1])

    # ---- copies ------------------------------------------------------------------------------------------------------------
    matches, distances = nearest(few[:COMPARED], images[train])
    usual = nearest(images[valid[:COMPARED]], images[train])[1]
    scores["nearest_distance"] = {"generated": distances.median().item(), "validation": usual.median().item()}
    pairs = torch.stack([few[:PAIRS], images[train[matches[:PAIRS]]]], 1).flatten(0, 2)  # (P, 2, 1, 28, 28) -> (2P, 28, 28)
    titles = [title for label, far in zip(labels, distances[:PAIRS]) for title in (GARMENTS[label], f"{far:.0f}")]
    heading = "Generated, and the nearest training image with its distance (root mean square, in grey levels)"
    plots.draw_sheet(pairs.numpy(), titles, 10, heading, out / "plots" / "nearest.png")

    # ---- between the classes -----------------------------------------------------------------------------------------------
    noise = fixed_noise()[0]
    share = torch.linspace(0, 1, GRID).repeat(CLASSES, 1).flatten().unsqueeze(1)
    before = torch.arange(CLASSES).repeat_interleave(GRID)
    mixed = (1 - share) * one_hot(before) + share * one_hot((before + 1) % CLASSES)
    steps = generate(generator, mixed.to(device), noise[:1].expand(len(mixed), -1).to(device)).squeeze(1).cpu()
    plots.draw_grid(steps.numpy(), GARMENTS, "from each class to the next, the same noise", out / "plots" / "mixtures.png")

    # ---- diversity: what does a network learn from them alone? Ravuri & Vinyals 2019, arXiv 1905.10887, GAN-train ----------
    alone, called = torch.cat([made, images[valid]]), torch.cat([labels, garments[valid]])
    places = torch.arange(len(alone))
    first, last = places[: len(made)], places[len(made) :]
    scores["gan_train"] = accuracy_after_training(alone, called, first, last, settings)
    scores["real_train"] = accuracy_after_training(images, garments, train, valid, settings)

    scores["seconds"] = round(time.perf_counter() - started, 3)
    scores["versions"] = checkpoint.versions()
    checkpoint.save_json(out / "scores.json", scores)
    print(f"GAN-test: {scores['gan_test']:.2%} of samples are what they are called ({scores['real_test']:.2%} of real images)")
    print(
        f"GAN-train: {scores['gan_train']:.2%} after learning from samples alone ({scores['real_train']:.2%} from real images)"
    )
    print("Fréchet distance to real images:", ", ".join(f"{n} {d:.2f}" for n, d in scores["frechet_distance"].items()))
    print("variety, of the real classes':", ", ".join(f"{name} {share:.0%}" for name, share in scores["variety"].items()))
    near = scores["nearest_distance"]
    print(
        f"nearest training image: {near['generated']:.1f} grey levels away, a validation image's {near['validation']:.1f} "
        f"(medians); wrote {out / 'scores.json'}"
    )


ACTIONS = {"train": train, "sample": sample, "score": score}


def main(arguments: list[str]) -> None:
    action, words = (arguments[0], arguments[1:]) if arguments else ("", [])
    if action not in ACTIONS:
        if HELP & set(arguments):
            action, words = "train", arguments
        else:
            raise UserError(f"gan.py {action}: say what to do: python gan.py {'|'.join(ACTIONS)} [key=value ...]")
    if not any(word.startswith("recipe=") for word in words):
        words = ["recipe=gan", *words]
    ACTIONS[action](load_settings(words, GanSettings), arguments)


if __name__ == "__main__":
    run_script(main)
