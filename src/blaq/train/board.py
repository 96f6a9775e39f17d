"""What a sweep shows: a table of the runs that are being made on a terminal, a line of every ended one everywhere."""

from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from blaq.train.directory import RunDirectory


class Board:
    """Shows the runs of a sweep; the table is there inside a ``with`` statement.

    Args:
        console: where to.
        names: of all runs, in their order.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._running: dict[str, tuple[RunDirectory, int]] = {}
        self._ended = 0
        self._live: Live | None = None

    def __enter__(self) -> "Board":
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(self.table(), console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def began(self, name: str, directory: RunDirectory, epochs: int) -> None:
        """A run has been started."""
        self._running[name] = directory, epochs

    def ended(self, name: str, what: str) -> None:
        """A run has ended, or was found ended."""
        self._running.pop(name, None)
        self._ended += 1
        line = f"{name} ({self._numbers[name]}/{len(self._numbers)}): {what}"
        self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the newest epochs."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The runs that are being made: epoch and losses of the last epoch that has ended."""
        waiting = len(self._numbers) - self._ended - len(self._running)
        caption = f"{self._ended} of {len(self._numbers)} runs ended, {waiting} waiting"
        table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        table.add_column("run", no_wrap=True)
        for name in ("epoch", "train loss", "validation error %", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, (directory, epochs) in self._running.items():
            rows = directory.metrics()
            if not rows:
                table.add_row(name, f"0/{epochs}", "", "", "")
                continue
            last = rows[-1]
            table.add_row(
                name,
                f"{last['epoch']}/{epochs}",
                f"{last['train_loss']:.4f}",
                f"{last['validation_error']:.2f}",
                f"{last['seconds']:.1f}",
            )
        return table
