"""The application behind the command ``blaq``: what its commands share."""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup
from typing_extensions import override

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
WIDTH_OF_FILES = 160


class Commands(TyperGroup):
    """Prints what a user can put right as one line on standard error, without a traceback."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show
                return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, ImportError) and error.name is not None:
                raise  # by an import, not by us: `blaq.__main__` says what to install
            _plain(stderr=True).print(str(error), style="red", soft_wrap=True)
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt as interrupt:
            say("Interrupted.", stderr=True)
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without the place in the code that gives it."""
    say(f"warning: {message}", stderr=True)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train neural networks with 1- to 8-bit weights, compare the methods, and look at what came out.",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a name that `blaq list` shows.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, as in optim.bits=2; may be given several times."
    ),
]


class CheckpointName(StrEnum):
    """The checkpoints of a run."""

    best = "best"
    last = "last"


class SplitName(StrEnum):
    """The data a run can be measured on."""

    test = "test"
    validation = "validation"


CheckpointOption = Annotated[
    CheckpointName, typer.Option(help="The epoch of the lowest validation error, or the last.")
]


def console() -> Console:
    """Standard output, and in a file or a pipe room for every table."""
    return _plain() if _plain().is_terminal else _plain(width=WIDTH_OF_FILES)


def say(text: str, *, stderr: bool = False) -> None:
    """Print a line of plain text, however long."""
    _plain(stderr=stderr).print(text, soft_wrap=True)


def _plain(**options: Any) -> Console:
    """A console that prints what it is given: paths and settings may hold what rich would take for styles or emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)
