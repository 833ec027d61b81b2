"""Train a network on Fashion-MNIST: `python train.py [recipe=NAME] [key=value ...]`.

Writes checkpoint.pt (the whole state, after every epoch), best_model.pt (the parameters with the lowest validation
loss), history.jsonl and plots/curves.png into out_dir. `resume=true` goes on from checkpoint.pt. The test images are
not touched.
"""

import json
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from tqdm import tqdm

import checkpoint
from config import Settings, UserError, load_settings, run_script
from data_preprocessing import batches, class_names, epoch_order, labels_of, load_images, mean_and_std, split_indices
from model import (
    build,
    choose_device,
    choose_precision,
    count_parameters,
    evaluate,
    infer,
    keep_freed_memory,
    train_one_epoch,
)
from optimizer import Optimizer

PLATEAU_PATIENCE = 4  # epochs without a lower validation loss that schedule=plateau accepts
MAY_DIFFER_ON_RESUME = {"epochs", "device", "data_dir", "out_dir", "resume"}


class TrainSettings(Settings):
    resume: bool = Field(False, description="go on from out_dir/checkpoint.pt")


def learning_rate(settings: Settings, progress: float, valid_losses: Sequence[float] = ()) -> float:
    """The learning rate at `progress`, the share of all steps done, in 0..1, after epochs with these validation losses."""
    if settings.schedule == "none":
        return settings.lr
    if settings.schedule == "plateau":
        lowest, stalled, lr = math.inf, 0, settings.lr
        for loss in valid_losses:
            lowest, stalled = (loss, 0) if loss < lowest else (lowest, stalled + 1)
            if stalled > PLATEAU_PATIENCE:
                stalled, lr = 0, lr / 10
        return lr
    if progress < settings.warmup:
        return settings.lr * max(progress / settings.warmup, 0.02)  # not 0: the first step should move
    falling = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.lr * ((1 - falling) if settings.schedule == "one_cycle" else (1 + math.cos(math.pi * falling)) / 2)


def check_same_settings(saved: dict, settings: Settings) -> None:
    """Raises UserError if a run saved under other settings would go on as something else."""
    differ = [
        f"{key}={value} (was {saved.get(key)})"
        for key, value in settings.model_dump().items()
        if key not in MAY_DIFFER_ON_RESUME and value != saved.get(key)
    ]
    if differ:
        raise UserError(f"resume=true: the checkpoint was made under other settings: {', '.join(differ)}")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TrainSettings)
    out = settings.out_path
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    keep_freed_memory()
    saved = checkpoint.load(out / "checkpoint.pt", "checkpoint") if settings.resume else None
    if saved:
        check_same_settings(saved["settings"], settings)
        if len(saved["history"]) >= settings.epochs or saved["stopped_early"]:
            print(f"{out / 'checkpoint.pt'}: this run ended with epoch {len(saved['history'])}; there is nothing to resume")
            return
    print("settings:", " ".join(f"{key}={value}" for key, value in settings.model_dump().items()))

    # ---- data: all images stay uint8 on the device, splits are lists of indices into them -----------------------------
    images, garments = load_images("train", settings.data_path)
    train, valid = split_indices(garments, settings.valid_ratio, settings.seed)
    train = train[: settings.limit or None]
    mean, std = mean_and_std(images, train)
    valid_images, valid_labels = images[valid], labels_of(garments[valid], settings.output_dim)
    images, garments, train = images.to(device), garments.to(device), train.to(device)
    labels = labels_of(garments, settings.output_dim)
    image_losses = torch.full((len(images),), torch.inf, device=device)

    # ---- network ------------------------------------------------------------------------------------------------------
    torch.manual_seed(settings.seed)
    generator = torch.Generator(device).manual_seed(settings.seed)  # of the order and the augmentation
    network = build(settings.architecture, settings.output_dim).to(device)
    auxiliary = nn.Linear(network.classifier.in_features, 10).to(device) if settings.auxiliary else None
    parameters = [*network.parameters(), *(auxiliary.parameters() if auxiliary else ())]
    optimizer = Optimizer(settings.optimizer, parameters, settings.lr, settings.weight_decay)
    history, best = [], {"epoch": 0, "valid_loss": math.inf}
    if saved:
        try:
            network.load_state_dict(saved["parameters"])
            if auxiliary:
                auxiliary.load_state_dict(saved["auxiliary"])
            optimizer.load_state_dict(saved["optimizer"])
            history, best = saved["history"], saved["best"]
            image_losses.copy_(saved["image_losses"])
            generator.set_state(saved["random"]["generator"])
            torch.set_rng_state(saved["random"]["torch"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{out / 'checkpoint.pt'}: its state doesn't fit this network; train without resume") from None
    print(
        f"{settings.architecture}: {count_parameters(network):,} parameters on {device} in {str(precision)[6:]}; "
        f"{len(train):,} training and {len(valid):,} validation images"
    )

    # ---- loop ---------------------------------------------------------------------------------------------------------
    shares = [settings.first_share] + [settings.hard_share] * (settings.epochs - 1)
    counts = [max(1, int(len(train) * share)) for share in shares]  # images, by epoch
    steps = [max(1, count // settings.batch_size) for count in counts]
    done = sum(steps[: len(history)])
    stopped_early = False
    try:
        for epoch in range(len(history) + 1, settings.epochs + 1):
            epoch_started = time.perf_counter()
            order = epoch_order(train, counts[epoch - 1], image_losses, generator)
            valid_losses = [line["valid_loss"] for line in history]
            total = steps[epoch - 1] * settings.batch_size
            with tqdm(total=total, unit=" images", desc=f"epoch {epoch}/{settings.epochs}", disable=None, leave=False) as bar:

                def before_step(seen, losses, correct, bar=bar, valid_losses=valid_losses) -> None:
                    nonlocal done
                    optimizer.lr = learning_rate(settings, done / sum(steps), valid_losses)
                    done += 1
                    if not bar.disable and seen - bar.n >= 20 * settings.batch_size:
                        bar.update(seen - bar.n)
                        bar.set_postfix_str(f"loss {losses.item() / seen:.4f}, accuracy {correct.item() / seen:.2%}")

                train_loss, train_accuracy = train_one_epoch(
                    network,
                    auxiliary,
                    optimizer,
                    batches(order, settings.batch_size),
                    images,
                    labels,
                    garments,
                    mean=mean,
                    std=std,
                    augmentations=settings.augment,
                    auxiliary_weight=settings.auxiliary,
                    precision=precision,
                    generator=generator,
                    image_losses=image_losses,
                    before_step=before_step,
                )
            if epoch == 1 and counts[0] < len(train):  # a look at the images left out, to know which of them are hard
                unseen = train[image_losses[train].isinf()]
                logits = infer(network, images[unseen], mean, std, precision)
                image_losses[unseen] = F.cross_entropy(logits, labels[unseen].cpu(), reduction="none").to(device)
            valid_loss, valid_accuracy = evaluate(infer(network, valid_images, mean, std, precision), valid_labels)
            is_best = valid_loss < best["valid_loss"]
            if is_best:
                best = {"epoch": epoch, "valid_loss": valid_loss, "valid_accuracy": valid_accuracy}
            stopped_early = 0 < settings.patience <= epoch - best["epoch"]
            history.append(
                {
                    "epoch": epoch,
                    "seconds": round(time.perf_counter() - epoch_started, 3),
                    "lr": optimizer.lr,
                    "train_loss": train_loss,
                    "train_accuracy": train_accuracy,
                    "valid_loss": valid_loss,
                    "valid_accuracy": valid_accuracy,
                }
            )
            described = {
                "architecture": settings.architecture,
                "output_dim": settings.output_dim,
                "class_names": list(class_names(settings.output_dim)),
                "mean": mean,
                "std": std,
                "parameters": network.state_dict(),
                "epoch": epoch,
                "best": best,
                "settings": settings.model_dump(),
                "versions": checkpoint.versions(),
            }
            if is_best:
                checkpoint.save(out / "best_model.pt", {"kind": "best_model", **described})
            checkpoint.save(
                out / "checkpoint.pt",
                {
                    "kind": "checkpoint",
                    **described,
                    "auxiliary": auxiliary.state_dict() if auxiliary else None,
                    "optimizer": optimizer.state_dict(),
                    "history": history,
                    "stopped_early": stopped_early,
                    "image_losses": image_losses,
                    "random": {"generator": generator.get_state(), "torch": torch.get_rng_state()},
                },
            )
            lines = [json.dumps(line) for line in (settings.model_dump(), *history)]
            checkpoint.write_atomically(out / "history.jsonl", ("\n".join(lines) + "\n").encode())
            print(
                f"epoch {epoch:3d}  train loss {train_loss:.4f} accuracy {train_accuracy:.3%}  "
                f"valid loss {valid_loss:.5f} accuracy {valid_accuracy:.3%}  {history[-1]['seconds']:.1f} s"
                + ("  best" if is_best else ""),
                flush=True,
            )
            if stopped_early:
                print(f"stopped early: {settings.patience} epochs without a lower validation loss")
                break
    except KeyboardInterrupt:
        again = " ".join(["python train.py", *(word for word in arguments if not word.startswith("resume=")), "resume=true"])
        print(f"\ninterrupted; epoch {len(history)} is saved: {again}" if history else "\ninterrupted before an epoch ended")
        raise

    # ---- report -------------------------------------------------------------------------------------------------------
    import plots  # here, because matplotlib takes half a second to import

    plots.draw_curves(out / "history.jsonl", out / "plots" / "curves.png")
    print(
        f"best: epoch {best['epoch']}, validation loss {best['valid_loss']:.5f}, accuracy {best['valid_accuracy']:.3%}; "
        f"{time.perf_counter() - started:.1f} s; wrote {out / 'best_model.pt'}"
    )


if __name__ == "__main__":
    run_script(main)
