"""The progress of a run for other programs to show, beside history.jsonl: `log=tensorboard`."""

from pathlib import Path

import numpy as np
from PIL import Image

import plots
from config import UserError
from script import import_extra
from trainer import Trainer, infer

SAMPLES = 20  # validation images, predicted after every epoch


class TensorBoard:
    """Writes a model's losses, accuracies and learning rate, its settings, and predictions of validation images to `folder`.

    It begins after `epochs` epochs: TensorBoard ignores what an earlier process has written of later ones. Raises UserError if
    the package is missing, or if the folder can't be written.
    """

    def __init__(self, folder: Path, trainer: Trainer, epochs: int):
        self.folder, self.trainer = folder, trainer
        summary_writer = import_extra("torch.utils.tensorboard").SummaryWriter
        try:
            self.writer = summary_writer(str(folder), purge_step=epochs + 1 if epochs else 0)
        except OSError as error:
            raise self._error(error) from None
        if not epochs:
            rows = [f"| {key} | {value} |" for key, value in trainer.settings.model_dump().items()]
            self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def write(self, line: dict) -> None:
        """Write an epoch's line of history, and what the model predicts after it."""
        try:
            for key in (key for key in line if key not in ("epoch", "run")):
                part, _, quantity = key.rpartition("_")
                self.writer.add_scalar(f"{quantity}/{part}" if part else key, line[key], line["epoch"])
            if len(self.trainer.valid_labels):
                self._write_predictions(line["epoch"])
            self.writer.flush()
        except OSError as error:
            raise self._error(error) from None

    def _write_predictions(self, epoch: int) -> None:
        images, labels = self.trainer.valid_images[:SAMPLES], self.trainer.valid_labels[:SAMPLES].tolist()
        names = self.trainer.metadata()["class_names"]
        probabilities, predicted = infer(self.trainer.eval_model, images, self.trainer.precision).softmax(1).max(1)
        titles = [f"{names[label]}\n{probability:.1%}" for label, probability in zip(predicted.tolist(), probabilities)]
        colours = [plots.GREEN if label == truth else plots.RED for label, truth in zip(predicted.tolist(), labels)]
        path = self.folder / "predictions.png"
        plots.draw_sheet(images[:, 0].cpu().numpy(), titles, 10, f"After epoch {epoch}", path, colours)
        self.writer.add_image("predictions", np.asarray(Image.open(path)), epoch, dataformats="HWC")

    def _error(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: can't be written ({error.strerror}); free some space, or use log=none")


LOGGERS = {"tensorboard": TensorBoard}  # by the value of `log`
