"""Hyperparameter search: `python tools/tune.py recipe=NAME trials=N [key=value ...]`, any number of times at once.

Each trial trains the recipe's model with settings drawn from SEARCH; trials that fall behind are pruned. What is given on the
command line stays fixed. The trials are kept in out_dir/trials.log: calling again continues, and several workers may share the
folder, also from several machines. The last one writes the best settings as a recipe, best.json, and plots/search.png. The
lowest validation loss decides; the test images are not read.
"""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the shared modules, from any current folder

import checkpoint
import plots
from config import RecipeSettings, TrainSettings, UserError, ValidRatio, setting
from data_preprocessing import load_splits
from device import choose_device, choose_precision
from gan.networks import add_generated
from run import is_done
from script import load_settings, run_script
from trainer import Trainer

SEARCH: dict[str, Callable] = {  # by setting: what a trial draws, under that name
    "lr": lambda trial, name: trial.suggest_float(name, 1e-4, 3e-2, log=True),
    "batch_size": lambda trial, name: trial.suggest_categorical(name, [64, 128, 256, 512]),
    "epochs": lambda trial, name: trial.suggest_int(name, 5, 30),
    "weight_decay": lambda trial, name: trial.suggest_float(name, 1e-5, 1e-1, log=True),
    "dropout": lambda trial, name: trial.suggest_float(name, 0.0, 0.5),
    "augment.hflip": lambda trial, name: trial.suggest_categorical(name, [0.0, 0.5]),
    "augment.shift": lambda trial, name: trial.suggest_int(name, 0, 3),
    "augment.erase": lambda trial, name: trial.suggest_float(name, 0.0, 0.5),
}
ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


class TuneSettings(TrainSettings):
    """Search"""

    valid_ratio: ValidRatio = 0.1
    trials: int = setting(50, "trials in total, of all workers and calls", ge=1)


def draw(trial: optuna.Trial, fixed: set[str]) -> dict[str, object]:
    """Settings from SEARCH, except those that are fixed."""
    free = {name: suggest for name, suggest in SEARCH.items() if name.partition(".")[0] not in fixed}
    settings = {name: suggest(trial, name) for name, suggest in free.items()}
    strengths = {name.removeprefix("augment."): settings.pop(name) for name in list(settings) if name.startswith("augment.")}
    if strengths:
        settings["augment"] = ",".join(f"{name}:{strength:.3g}" for name, strength in strengths.items() if strength)
    return settings


def open_study(path: Path, name: str) -> optuna.Study:
    """The trials in the file at `path`, new or old. Raises UserError if it has something else."""
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
        return optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=pruner)
    except (OSError, TypeError, ValueError, KeyError) as error:  # a foreign file is no JSON, or lacks the journal's keys
        raise UserError(f"{path}: is no file of trials that can be opened ({error}); choose another out_dir") from None


def report(study: optuna.Study, words: list[str], out: Path) -> None:
    """Write the best settings as a recipe and draw the search. Raises UserError if no trial has a finite loss."""
    trials = study.get_trials(states=ENDED)
    completed = [trial for trial in trials if trial.state.name == "COMPLETE" and math.isfinite(trial.value or 0)]
    if not completed:
        raise UserError(f"{out}: no trial has ended with a finite loss yet; raise trials=N, or try smaller learning rates")
    drawn = json.loads(study.best_trial.user_attrs["settings"])
    best = load_settings([*words, *(f"{name}={value}" for name, value in drawn.items())], TrainSettings)
    recipe = best.model_dump(exclude=set(RecipeSettings.model_fields) - {"precision", "batch_size"}, exclude_defaults=True)
    checkpoint.save_json(out / "best.json", recipe)
    importances = optuna.importance.get_param_importances(study) if len(completed) > 3 else {}
    rows = [(trial.number, trial.value, trial.state.name == "PRUNED") for trial in trials]
    plots.draw_search(rows, importances, out / "plots" / "search.png")
    accuracy = study.best_trial.user_attrs["valid_accuracy"]
    print(f"best of {len(trials)}: validation loss {study.best_value:.5f}, accuracy {accuracy:.3%}")
    print(f"wrote the recipe {out / 'best.json'} and {out / 'plots' / 'search.png'}")


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, TuneSettings)
    print("settings:", settings)
    out = settings.out_path if settings.out_dir else settings.out_path / "tune"
    words = [word for word in arguments if word.partition("=")[0] not in ("trials", "out_dir")]
    fixed = {word.partition("=")[0] for word in words}
    # the words that all workers of these trials must share
    shared = sorted(word for word in words if word.partition("=")[0] not in ("data_dir", "device"))
    device = choose_device(settings.device)
    split = load_splits(settings, device)[0]

    def objective(trial: optuna.Trial) -> float:
        # seeded by the trial, so that neither another worker nor another call draws the same settings again
        study.sampler = optuna.samplers.TPESampler(seed=settings.seed + trial.number, constant_liar=True)
        drawn = draw(trial, fixed)
        trial.set_user_attr("settings", json.dumps(drawn))
        trial_settings = load_settings([*words, *(f"{name}={value}" for name, value in drawn.items())], TrainSettings)
        precision = choose_precision(trial_settings.precision, device)
        trainer = Trainer(trial_settings, trial_settings.seed, add_generated(split, trial_settings), precision)
        epochs: list[dict] = []
        while not is_done(epochs, trial_settings.epochs, trial_settings.patience):
            try:
                epochs.append(trainer.run_epoch(len(epochs) + 1, epochs))
            except UserError:  # a loss that is not finite
                return math.inf
            trial.report(epochs[-1]["valid_loss"], len(epochs))
            if trial.should_prune():
                raise optuna.TrialPruned
        best = checkpoint.best_epoch(epochs)
        trial.set_user_attr("valid_accuracy", best["valid_accuracy"])
        return best["valid_loss"]

    def print_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        value = "pruned" if trial.state.name != "COMPLETE" else f"validation loss {trial.value:.5f}"
        print(f"trial {trial.number}: {value}, {trial.user_attrs.get('settings')}", flush=True)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: can't be made ({error.strerror}); choose another out_dir") from None
    path = out / "trials.log"
    study = open_study(path, settings.recipe or "task 1")
    known = study.user_attrs.get("words", shared)
    if known != shared and any(trial.state.name != "FAIL" for trial in study.get_trials(deepcopy=False)):
        raise UserError(f"{path}: has trials made with {' '.join(known)}; use the same, or another out_dir")
    study.set_user_attr("words", shared)
    if len(study.get_trials(states=ENDED)) < settings.trials:
        try:
            callbacks: list = [print_trial, optuna.study.MaxTrialsCallback(settings.trials, states=ENDED)]
            study.optimize(objective, callbacks=callbacks)
        except KeyboardInterrupt:
            print(f"\ninterrupted; the trials that have ended are in {path}, and the same command continues")
            raise
    report(study, words, out)


if __name__ == "__main__":
    run_script(main)
