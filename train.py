"""Train a model on Fashion-MNIST: `python train.py [recipe=NAME] [key=value ...]`.

Writes checkpoint.pt (the whole state, after every epoch), best_model.pt (the model with the lowest validation loss, or
the last one with valid_ratio=0), history.jsonl and plots/curves.png into out_dir. `resume=true` continues from checkpoint.pt.
The test images are not read.
"""

import shlex
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import checkpoint
import distributed
from config import RunSettings
from data_preprocessing import load_splits
from device import choose_device, choose_precision
from gan.networks import add_generated
from model import print_summary
from run import Run, epochs_of_run
from script import load_settings, run_script
from trainer import Trainer


def print_runs(lines: list[dict], name: str) -> None:
    """A row for the best epoch of each run, mean and standard deviation below."""
    print(f"{name:6} epoch  validation loss  accuracy")
    for line in lines:
        print(f"{line['run']:6} {line['epoch']:5}  {line['valid_loss']:15.5f} {line['valid_accuracy']:9.3%}")
    for title, figure in (("mean", statistics.mean), ("std", statistics.stdev)):
        loss, accuracy = (figure([line[key] for line in lines]) for key in ("valid_loss", "valid_accuracy"))
        print(f"{title:>6}        {loss:15.5f} {accuracy:9.3%}")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    settings = load_settings(arguments, RunSettings)
    device = distributed.init(choose_device(settings.device))
    precision = choose_precision(settings.precision, device)
    n_models, kind = settings.folds or settings.runs, "fold" if settings.folds else "run"
    run = Run(Trainer, settings, arguments, checkpoint.machine(device, precision), n_models)
    print("settings:", settings)

    splits = load_splits(settings, device, settings.folds, settings.runs)
    epochs_before = len(run.history)
    with run.locked():
        for number, split in enumerate(splits, 1):
            if run.is_done(number):
                continue
            trainer = Trainer(settings, settings.seed + number - 1, add_generated(split, settings), precision)
            if number == 1:
                print_summary(trainer.model)
            name = "" if n_models == 1 else f"{kind} {number}/{n_models}: "
            sizes = f"{len(split.train):,} training, {len(split.valid):,} validation images"
            print(f"{name}{sizes}; {device} in {str(precision)[6:]}")
            log = None
            if settings.log != "none" and distributed.rank() == 0:
                from logger import LOGGERS  # here, because it imports matplotlib

                folder = run.out / settings.log / (f"run_{number}" if n_models > 1 else "")
                log = LOGGERS[settings.log](folder, trainer, len(epochs_of_run(run.history, number))).write
            for line in run.fit(trainer, number, log):
                text = f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.4f} accuracy {line['train_accuracy']:.3%}  "
                is_best = False
                if "valid_loss" in line:
                    text += f"valid loss {line['valid_loss']:.5f} accuracy {line['valid_accuracy']:.3%}  "
                    is_best = line is checkpoint.best_epoch(run.history)
                print(f"{text}{line['seconds']:.1f} s{'  best' if is_best else ''}", flush=True)
            if (trained := len(epochs_of_run(run.history, number))) < settings.epochs:
                print(f"early stopping after epoch {trained}: {settings.patience} epochs without a lower validation loss")

    if distributed.rank() == 0:
        import plots  # here, because matplotlib takes half a second to import

        plots.draw_curves(run.out / "history.jsonl", run.out / "plots" / "curves.png")
    if n_models > 1:
        bests = [checkpoint.best_epoch(epochs_of_run(run.history, number)) for number in range(1, n_models + 1)]
        print_runs(bests, kind)
    best = checkpoint.best_epoch(run.history)
    epoch = f"{kind} {best['run']}, epoch {best['epoch']}" if n_models > 1 else f"epoch {best['epoch']}"
    text = f"last: {epoch}"
    if "valid_loss" in best:
        text = f"best: {epoch}, validation loss {best['valid_loss']:.5f}, accuracy {best['valid_accuracy']:.3%}"
    verb = "wrote" if len(run.history) > epochs_before else "it is in"
    print(f"{text}; {time.perf_counter() - started:.1f} s; {verb} {run.model_path}")
    words = settings.model_dump(include={"recipe", "out_dir", "data_dir"}, exclude_defaults=True)
    print("next:", shlex.join(["python", "test.py", *(f"{key}={value}" for key, value in words.items())]))


if __name__ == "__main__":
    run_script(main)
