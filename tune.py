"""Search for settings: `python tune.py recipe=NAME trials=N [key=value ...]`, any number of times at once.

Each trial trains the recipe's network under settings drawn from SEARCH; trials that fall behind are given up early. What
is given on the command line stays fixed. The trials stand in `storage`, by default a file in out_dir: calling again goes
on, and several workers may share it, also from several machines if it is a database server's. The last one writes the
best settings as a recipe, best.json, and plots/search.png. The lowest validation loss decides; the test images are not
touched.
"""

import json
import logging
import math
import os
import platform
import time
import warnings

import optuna
import sqlalchemy
from pydantic import Field

import checkpoint
import plots
from config import Settings, UserError, load_settings, run_script
from data_preprocessing import load_images, split_indices
from model import choose_device, choose_precision, keep_freed_memory
from training import Training, is_over

SEARCH = {  # where it looks: choices, or the ends of a range, on a logarithmic scale if the lower one is above 0
    "lr": (1e-4, 3e-2),
    "batch_size": [64, 128, 256, 512],
    "epochs": (5, 30),
    "weight_decay": (1e-5, 1e-1),
    "dropout": (0.0, 0.5),
    "augment.hflip": [0.0, 0.5],
    "augment.shift": (0, 3),
    "augment.erase": (0.0, 0.5),
}
NO_RECIPE = {"recipe", "data_dir", "out_dir", "seed", "device", "limit"}  # what is no part of a way to train
HEARTBEAT = 20  # seconds; a worker that is silent for three of them is taken for dead, and its trial is tried again


class TuneSettings(Settings):
    UNREAD = frozenset({"folds", "runs"})
    trials: int = Field(50, ge=1, description="trials in all, of all workers and calls together")
    storage: str = Field("", description="where trials stand: a database URL; empty = the SQLite file out_dir/tune.db")


def draw(trial: optuna.Trial, fixed: set[str]) -> dict[str, object]:
    """Settings from SEARCH, but for those that are fixed."""
    chosen: dict[str, object] = {}
    for name, space in SEARCH.items():
        if name in fixed or (name.startswith("augment.") and "augment" in fixed):
            continue
        if isinstance(space, list):
            chosen[name] = trial.suggest_categorical(name, space)
            continue
        low, high = space
        if isinstance(low, int) and isinstance(high, int):
            chosen[name] = trial.suggest_int(name, low, high)
        else:
            chosen[name] = trial.suggest_float(name, low, high, log=low > 0)
    strengths = {name.removeprefix("augment."): chosen.pop(name) for name in list(chosen) if name.startswith("augment.")}
    if strengths:
        chosen["augment"] = ",".join(f"{name}:{strength:.3g}" for name, strength in strengths.items() if strength)
    return chosen


def open_study(url: str, settings: TuneSettings) -> optuna.Study:
    """The trials at `url`, new or old. Raises UserError if that is no database that can be reached."""
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
    attempts = 3
    while True:
        attempts -= 1
        try:
            storage = optuna.storages.RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
            )
            return optuna.create_study(
                storage=storage,
                study_name=settings.recipe or "task 1",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
            )
        except Exception as error:  # whatever a database's driver raises
            if attempts and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(1)  # of workers that start at once, one makes the tables, and the others fail
                continue
            told = " ".join(str(error).split())[:150]
            raise UserError(f"storage={url}: can't be opened ({told}); check the URL") from None


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, TuneSettings)
    print("settings:", settings)
    out = settings.out_path if settings.out_dir else settings.out_path / "tune"
    own = ("trials", "storage", "out_dir")
    words = [word for word in arguments if word.partition("=")[0] not in own]
    fixed = {word.partition("=")[0] for word in words}
    same = sorted(
        word for word in words if word.partition("=")[0] not in ("data_dir", "device")
    )  # for all who share the trials
    device = choose_device(settings.device)
    keep_freed_memory()
    images, garments = load_images("train", settings.data_path)
    train, valid = split_indices(garments, settings.valid_ratio, settings.seed)
    images, garments, valid = images.to(device), garments.to(device), valid.to(device)
    train = train[: settings.limit or None].to(device)

    def objective(trial: optuna.Trial) -> float:
        # random numbers of the trial's own, so that neither another worker nor another call draws the same settings again
        study.sampler = optuna.samplers.TPESampler(seed=settings.seed + trial.number, constant_liar=True)
        chosen = draw(trial, fixed)
        trial.set_user_attr("settings", json.dumps(chosen))
        trial.set_user_attr("worker", f"{platform.node()} {os.getpid()}")
        of_trial = load_settings([*words, *(f"{name}={value}" for name, value in chosen.items())], Settings)
        precision = choose_precision(of_trial.precision, device)
        training = Training(of_trial, of_trial.seed, images, garments, train, valid, precision)
        epochs: list[dict] = []
        while not is_over(epochs, of_trial):
            try:
                epochs.append(training.train_epoch(len(epochs) + 1, [line["valid_loss"] for line in epochs]))
            except UserError:  # a loss that is not finite
                return math.inf
            trial.report(epochs[-1]["valid_loss"], len(epochs))
            if trial.should_prune():
                raise optuna.TrialPruned
        best = checkpoint.lowest(epochs)
        trial.set_user_attr("valid_accuracy", best["valid_accuracy"])
        return best["valid_loss"]

    def tell(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        value = "given up" if trial.state.name != "COMPLETE" else f"validation loss {trial.value:.5f}"
        print(f"trial {trial.number}: {value}, {trial.user_attrs.get('settings')}", flush=True)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: can't be made ({error.strerror}); choose another out_dir") from None
    url = settings.storage or f"sqlite:///{out / 'tune.db'}"
    study = open_study(url, settings)
    theirs = study.user_attrs.get("words", same)
    if theirs != same and any(trial.state.name != "FAIL" for trial in study.get_trials(deepcopy=False)):
        raise UserError(
            f"{url}: its trials were made with {' '.join(theirs)}; say the same, or name another out_dir or storage"
        )
    study.set_user_attr("words", same)
    counted = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    enough = optuna.study.MaxTrialsCallback(settings.trials, states=counted)
    done = study.get_trials(states=counted)
    if len(done) < settings.trials:
        try:
            study.optimize(objective, callbacks=[tell, enough])
        except KeyboardInterrupt:
            print(f"\ninterrupted; the trials that have ended are in {url}, and the same command goes on")
            raise

    # ---- report -------------------------------------------------------------------------------------------------------
    completed = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    ended = [trial for trial in completed if trial.value is not None and math.isfinite(trial.value)]
    if not ended:
        raise UserError(
            f"{url}: no trial has ended with a finite loss yet; raise trials={settings.trials}, or try smaller learning rates"
        )
    found = json.loads(study.best_trial.user_attrs["settings"])
    best = load_settings([*words, *(f"{name}={value}" for name, value in found.items())], Settings).model_dump()
    task_1 = load_settings([], Settings).model_dump()
    recipe = {name: value for name, value in best.items() if value != task_1[name] and name not in NO_RECIPE}
    checkpoint.save_json(out / "best.json", recipe)
    weights = optuna.importance.get_param_importances(study) if len(ended) > 3 else {}
    trials = study.get_trials(states=counted)
    plots.draw_search(
        [(trial.number, trial.value, trial.state.name == "PRUNED") for trial in trials], weights, out / "plots" / "search.png"
    )
    accuracy = study.best_trial.user_attrs["valid_accuracy"]
    print(f"best of {len(trials)}: validation loss {study.best_value:.5f}, accuracy {accuracy:.3%}")
    print(f"wrote the recipe {out / 'best.json'} and {out / 'plots' / 'search.png'}")


if __name__ == "__main__":
    run_script(main)
