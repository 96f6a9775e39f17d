"""What is written at the end of every epoch: a line of metrics, and the checkpoints."""

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from blaq.train.directory import RunDirectory
from blaq.train.display import Display
from blaq.train.module import TaskModule


class Journal(Callback):
    """Keeps the run directory up to date, so that a run killed at any moment can be resumed from its last epoch.

    The order is metrics, best checkpoint, last checkpoint: the last checkpoint alone says which epoch has ended, and
    what was written for a later one is overwritten on resuming.
    """

    def __init__(self, directory: RunDirectory, display: Display) -> None:
        self.directory = directory
        self.display = display
        self.seconds = 0.0
        self.best_error = math.inf
        self.best_epoch = 0
        self._epoch_began = 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "best_error": self.best_error, "best_epoch": self.best_epoch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
        self.best_error = state_dict["best_error"]
        self.best_epoch = state_dict["best_epoch"]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.perf_counter() - self._epoch_began

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, TaskModule):
            raise TypeError(f"Journal: expected a TaskModule, not {type(pl_module).__name__}.")
        row = self._row(trainer, pl_module)
        if not math.isfinite(row["train_loss"]):
            raise ValueError(
                f"train: the training loss is {row['train_loss']} in epoch {row['epoch']}; lower optim.lr."
            )
        best = row["validation_error"] < self.best_error
        if best:
            self.best_error, self.best_epoch = row["validation_error"], row["epoch"]
        pl_module.log_dict({name: float(value) for name, value in row.items() if name not in ("epoch", "steps")})
        self.directory.append_metrics(row)
        self._save(trainer, best)
        self.display.epoch(row, trainer.max_epochs or row["epoch"], best)

    def _row(self, trainer: Trainer, module: TaskModule) -> dict[str, Any]:
        return {
            "epoch": trainer.current_epoch + 1,
            "steps": trainer.global_step,
            "gradient_evaluations": module.optimizer.gradient_evaluations,
            "seconds": round(self.seconds, 3),
            "train_loss": module.training_tally.loss,
            "train_error": module.training_tally.error,
            "validation_loss": module.evaluation_tally.loss,
            "validation_error": module.evaluation_tally.error,
            "lr": module.start_lr,
        }

    def _save(self, trainer: Trainer, best: bool) -> None:
        last = self.directory.checkpoint("last")
        partial = last.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if best:
            copy = last.with_name("best.partial")
            shutil.copyfile(partial, copy)
            _put(copy, self.directory.checkpoint("best"))
        _put(partial, last)


def _put(made: Path, name: Path) -> None:
    """Give a file its name once it is on the disk: a power failure could leave an empty one in place of the last good one."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(made, name)
