"""Train a network on Fashion-MNIST: `python train.py [recipe=NAME] [key=value ...]`.

Writes checkpoint.pt (the whole state, after every epoch), best_model.pt (the parameters with the lowest validation
loss), history.jsonl and plots/curves.png into out_dir. `resume=true` goes on from checkpoint.pt. The test images are
not touched.
"""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

from pydantic import Field
from torch import nn

import checkpoint
import parallel
from checkpoint import check_resumable, lowest
from config import Settings, UserError, load_settings, run_script
from data_preprocessing import fold_indices, load_images, split_indices
from model import choose_device, choose_precision, count_parameters, keep_freed_memory, layers
from stopping import Signals, Stopped, claimed, resuming
from training import Training, epochs_of, is_over


class TrainSettings(Settings):
    resume: bool = Field(False, description="go on from out_dir/checkpoint.pt")


def save_checkpoint(out: Path, training: Training, run: int, history: list[dict]) -> None:
    state = {**training.described(), **training.state_dict(), "history": history, "run": run}
    best = lowest(history) if history else None
    epoch = len(epochs_of(history, run))
    state |= {"kind": "checkpoint", "epoch": epoch, "best": best, "job": parallel.job()}
    checkpoint.save(out / "checkpoint.pt", state)


def was_restarted(out: Path) -> bool:
    """Whether torchrun has started this job again, after a checkpoint of its own: not before, and not after another's."""
    if not parallel.has_restarted():
        return False
    is_ours = parallel.rank() == 0 and (out / "checkpoint.pt").exists()
    is_ours = is_ours and checkpoint.load(out / "checkpoint.pt", "checkpoint").get("job") == parallel.job()
    return bool(parallel.any_of(int(is_ours)))  # the first process decides


def print_summary(network: nn.Module) -> None:
    """A row per layer: what it gives and what it costs."""
    rows = [layer for layer in layers(network) if layer.kind not in ("Dropout", "Sequential")]
    print(f"{'layer':28} {'kind':18} {'output':>14} {'parameters':>12} {'multiply-adds':>14}")
    for layer in rows:
        shape = " x ".join(map(str, layer.output_shape))
        print(f"{layer.name:28} {layer.kind:18} {shape:>14} {layer.parameters:12,} {layer.multiply_adds:14,}")
    multiply_adds = sum(layer.multiply_adds for layer in rows)
    print(f"{'in all, per image':62} {count_parameters(network):12,} {multiply_adds:14,}")


def draw_curves(out: Path) -> None:
    if parallel.rank() == 0:
        import plots  # here, because matplotlib takes half a second to import

        plots.draw_curves(out / "history.jsonl", out / "plots" / "curves.png")


def print_runs(kept: list[dict], name: str) -> None:
    """A row for each run's kept epoch, mean and standard deviation below."""
    print(f"{name:6} epoch  validation loss  accuracy")
    for line in kept:
        print(f"{line['run']:6} {line['epoch']:5}  {line['valid_loss']:15.5f} {line['valid_accuracy']:9.3%}")
    for told, figure in (("mean", statistics.mean), ("std", statistics.stdev)):
        loss, accuracy = (figure([line[key] for line in kept]) for key in ("valid_loss", "valid_accuracy"))
        print(f"{told:>6}        {loss:15.5f} {accuracy:9.3%}")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, TrainSettings)
    if settings.recipe == "gan":
        raise UserError("recipe=gan: is what python gan.py train learns; name another")
    out = settings.out_path
    device = parallel.start(choose_device(settings.device))
    precision = choose_precision(settings.precision, device)
    keep_freed_memory()
    runs = settings.folds or settings.runs
    goes_on = settings.resume or was_restarted(out)
    saved = checkpoint.load(out / "checkpoint.pt", "checkpoint") if goes_on else None
    history = saved["history"] if saved else []  # a line per epoch, of all runs
    if saved:
        check_resumable(saved, settings, checkpoint.machine(device, precision))
        if is_over(epochs_of(history, runs), settings):
            checkpoint.write_history(out / "history.jsonl", saved["settings"], history)  # somebody may have removed it
            draw_curves(out)  # a kill may have come before it
            print(f"{out / 'checkpoint.pt'}: this run ended with epoch {history[-1]['epoch']}; there is nothing to resume")
            return
    if history and not (out / "best_model.pt").exists():
        raise UserError(f"{out / 'best_model.pt'}: is gone, and checkpoint.pt has the last epoch only; train without resume")
    kept = checkpoint.load(out / "best_model.pt", "best_model") if history else {}  # the best so far
    print("settings:", settings)
    if not saved and (out / "checkpoint.pt").exists():
        print(f"begins anew, over the training in {out}; resume=true would go on with it")

    # ---- data: all images stay uint8 on the device, splits are lists of indices into them -----------------------------
    images, garments = load_images("train", settings.data_path)
    if settings.folds:
        splits = fold_indices(garments, settings.folds, settings.seed)
    else:
        splits = [split_indices(garments, settings.valid_ratio, settings.seed + run) for run in range(runs)]
    images, garments = images.to(device), garments.to(device)

    with claimed(out) if parallel.rank() == 0 else nullcontext(), Signals() as signals:
        for run, (train, valid) in enumerate(splits, 1):
            if is_over(epochs_of(history, run), settings):
                continue

            # ---- network ----------------------------------------------------------------------------------------------
            train, valid = train[: settings.limit or None].to(device), valid.to(device)
            training = Training(settings, settings.seed + run - 1, images, garments, train, valid, precision)
            if saved and saved["run"] == run:
                try:
                    training.load_state_dict(saved)
                except (KeyError, TypeError, ValueError, RuntimeError):
                    raise UserError(
                        f"{out / 'checkpoint.pt'}: its state doesn't fit this network; train without resume"
                    ) from None
            if run == 1:
                print_summary(training.network)
            print(
                (f"run {run} of {runs}: " if runs > 1 else "")
                + f"{settings.architecture} on {device} in {str(precision)[6:]}; "
                f"{len(train):,} training and {len(valid):,} validation images"
            )

            if parallel.count() > 1 and not saved and run == 1:
                save_checkpoint(out, training, run, history)  # what torchrun goes on from if a process dies at once

            # ---- loop -------------------------------------------------------------------------------------------------
            while not is_over(epochs := epochs_of(history, run), settings):
                try:
                    signals.check()
                    line = training.train_epoch(len(epochs) + 1, [line["valid_loss"] for line in epochs], signals.check)
                except Stopped:
                    save_checkpoint(out, training, run, history)
                    print(f"\ninterrupted in epoch {len(epochs) + 1}; all is saved: {resuming(arguments)}")
                    raise
                history.append({"run": run, **line} if runs > 1 else line)
                epochs = epochs_of(history, run)
                best = lowest(history)
                is_best = best is history[-1]
                if is_best:
                    kept = {"kind": "best_model", **training.described(), "parameters": training.kept.state_dict()}
                    kept |= {"epoch": line["epoch"], "best": history[-1]}
                if is_best or not (out / "best_model.pt").exists():  # somebody may have removed it
                    checkpoint.save(out / "best_model.pt", kept)
                checkpoint.write_history(out / "history.jsonl", settings.model_dump(), history)
                # last, so that a kill before it costs an epoch, which is trained again, and nothing else
                save_checkpoint(out, training, run, history)
                print(
                    f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.4f} accuracy {line['train_accuracy']:.3%}  "
                    f"valid loss {line['valid_loss']:.5f} accuracy {line['valid_accuracy']:.3%}  {line['seconds']:.1f} s"
                    + ("  best" if is_best else ""),
                    flush=True,
                )
            if len(epochs) < settings.epochs:
                print(f"stopped early: {settings.patience} epochs without a lower validation loss")

    # ---- report -------------------------------------------------------------------------------------------------------
    draw_curves(out)
    if runs > 1:
        print_runs([lowest(epochs_of(history, run)) for run in range(1, runs + 1)], "fold" if settings.folds else "run")
    best = lowest(history)
    print(
        "best: "
        + (f"run {best['run']}, " if runs > 1 else "")
        + f"epoch {best['epoch']}, validation loss {best['valid_loss']:.5f}, "
        f"accuracy {best['valid_accuracy']:.3%}; {time.perf_counter() - started:.1f} s; wrote {out / 'best_model.pt'}"
    )


if __name__ == "__main__":
    run_script(main)
