"""A training run in a folder: resume, the loop over epochs, and what is written after each of them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import checkpoint
import distributed
import interrupts
from config import UserError


def epochs_of_run(history: Sequence[dict], number: int) -> list[dict]:
    """The lines of one run, of several in a history."""
    return [line for line in history if line.get("run", 1) == number]


def is_done(epochs: Sequence[dict], max_epochs: int, patience: int = 0) -> bool:
    """Whether a run has had all its epochs, or `patience` epochs without a lower validation loss."""
    if len(epochs) >= max_epochs:
        return True
    return bool(epochs) and 0 < patience <= len(epochs) - checkpoint.best_epoch(epochs)["epoch"]


class Run:
    """A training run in `settings.out_path`, new or resumed.

    `trainer_type` is Trainer or GanTrainer: the kinds of its files. `history` has a line per epoch, of all `count` models
    that are trained one after another. Raises UserError if there is nothing to resume from, or other settings made it.
    """

    def __init__(self, trainer_type, settings, arguments: list[str], machine: dict, count: int = 1):
        self.settings, self.arguments, self.machine, self.count = settings, arguments, machine, count
        self.kind, self.out = trainer_type.kind, settings.out_path
        self.path, self.model_path = self.out / "checkpoint.pt", self.out / f"{trainer_type.model_kind}.pt"
        self.saved = checkpoint.load(self.path, self.kind) if settings.resume or self._was_restarted() else None
        self.history: list[dict] = list(self.saved["history"]) if self.saved else []
        self.model_file: dict = {}  # the contents of the best model's file
        if self.saved:
            checkpoint.check_resumable(self.saved, settings, machine)
            if not self.model_path.exists():
                raise UserError(f"{self.model_path}: is missing, and checkpoint.pt has no best epoch; train without resume")
            self.model_file = checkpoint.load(self.model_path, trainer_type.model_kind)
            best = self.model_file.get("best")
            if best and best not in self.history and (best.get("run", 1), best["epoch"]) == (1, 1):  # killed while saving it
                raise UserError(f"{self.model_path}: is of a later training than checkpoint.pt; train without resume")
            if self.is_done(count):
                print(f"{self.path}: this run ended with epoch {self.history[-1]['epoch']}; there is nothing to resume")
        elif self.path.exists():
            print(f"starts over, replacing the training in {self.out}; resume=true would continue it")
        elif self.model_path.exists():  # without a checkpoint: it came with the repository
            print(f"replaces the model in {self.out}")

    def _was_restarted(self) -> bool:
        """Whether torchrun has restarted this job after a checkpoint of its own: not before, and not after another job's."""
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            return False
        is_own = distributed.rank() == 0 and self.path.exists()
        is_own = is_own and checkpoint.load(self.path, self.kind).get("job") == distributed.job_id()
        return bool(distributed.all_reduce_max(int(is_own)))  # the first process decides

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder and defer Ctrl-C and SIGTERM; after one of them, print the command that continues."""
        with interrupts.lock_folder(self.out) if distributed.rank() == 0 else nullcontext(), interrupts.deferred():
            if self.saved:
                if checkpoint.load(self.path, self.kind)["history"] != self.history:  # it was read before the folder was locked
                    raise UserError(f"{self.path}: another run has written to it meanwhile; give the command again")
                # somebody may have removed it
                checkpoint.write_history(self.out / "history.jsonl", self.saved["settings"], self.history)
            try:
                yield
            except interrupts.Interrupted:
                print(f"\ninterrupted; to continue: {interrupts.resume_command(self.arguments, bool(self.history))}")
                raise

    def is_done(self, number: int = 1) -> bool:
        patience = getattr(self.settings, "patience", 0)
        return is_done(epochs_of_run(self.history, number), self.settings.epochs, patience)

    def fit(self, trainer, number: int = 1, log: Callable[[dict], None] | None = None) -> Iterator[dict]:
        """Train model `number` until it is done. After each epoch, calls `log` with its line of history, saves, then yields
        the line: so a log may be an epoch ahead of the checkpoint, never behind.

        Raises UserError if the checkpoint is another model's, and what the trainer raises.
        """
        if self.saved and self.saved["run"] == number:
            try:
                trainer.load_state_dict(self.saved)
            except (KeyError, TypeError, ValueError, RuntimeError):
                raise UserError(f"{self.path}: its state doesn't fit this model; train without resume") from None
        while not self.is_done(number):
            interrupts.check()
            epochs = epochs_of_run(self.history, number)
            line = trainer.run_epoch(len(epochs) + 1, epochs)
            line = {"run": number, **line} if self.count > 1 else line
            if log:
                log(line)
            self.history.append(line)
            best = checkpoint.best_epoch(self.history)
            common = {**trainer.metadata(), "epoch": line["epoch"], "best": best}
            if best is line:
                model = trainer.eval_model.state_dict()
                self.model_file = {"kind": trainer.model_kind, **common, "model": model}
            if best is line or not self.model_path.exists():  # somebody may have removed it
                checkpoint.save(self.model_path, self.model_file)
            checkpoint.write_history(self.out / "history.jsonl", self.settings.model_dump(), self.history)
            # last, so that a kill before it costs an epoch, which is trained again, and nothing else
            state = {**common, **trainer.state_dict(), "history": self.history, "run": number, "job": distributed.job_id()}
            checkpoint.save(self.path, {"kind": self.kind, **state})
            yield line
