"""What a run shows while it trains: a progress bar on a terminal, one line an epoch everywhere."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import override

from blaq.train.module import TaskModule

REFRESH_SECONDS = 0.2  # between two readings of the running means, each of which waits for the device


class Display(Callback):
    """Shows a run on a console.

    Args:
        console: where to.
        label: what the bar is called, such as the method and the seed.
        details: whether the plan and every epoch leave lines; if not, there is only the bar.
    """

    def __init__(self, console: Console, *, label: str = "", details: bool = True) -> None:
        self.console = console
        self.label = label
        self.details = details
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._next_refresh = 0.0

    def say(self, text: str) -> None:
        """Print a line of plain text."""
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Print a line that belongs to the details."""
        if self.details:
            self.say(text)

    def epoch(self, row: dict[str, Any], epochs: int, best: bool) -> None:
        """Show the metrics of an epoch that has ended."""
        width = len(str(epochs))
        self.detail(
            f"epoch {row['epoch']:{width}}/{epochs}"
            f"  train loss {row['train_loss']:.4f} error {row['train_error']:6.2f} %"
            f"  validation loss {row['validation_loss']:.4f} error {row['validation_error']:6.2f} %"
            f"  gradients {row['gradient_evaluations']:,}  {row['seconds']:.1f} s{'  best' if best else ''}"
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.console.quiet or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        total = (trainer.max_epochs or 0) * int(trainer.num_training_batches)
        self._task = self._progress.add_task(self.label, total=total, completed=trainer.global_step, numbers="")
        self._progress.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._progress is None or now < self._next_refresh or not isinstance(pl_module, TaskModule):
            return
        self._next_refresh = now + REFRESH_SECONDS
        tally, gradients = pl_module.training_tally, pl_module.optimizer.gradient_evaluations
        self._progress.update(
            self._task,
            completed=trainer.global_step,
            description=f"{self.label} epoch {trainer.current_epoch + 1}/{trainer.max_epochs}".strip(),
            numbers=f"loss {tally.loss:.4f}  error {tally.error:.2f} %  gradients {gradients:,}",
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
