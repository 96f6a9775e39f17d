"""``blaq compare`` and ``blaq ablate``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from blaq.cli.app import EXIT_INTERRUPTED, RecipeArgument, SetOption, app, console, say


class BudgetName(StrEnum):
    """What the methods of a comparison get in equal amounts."""

    steps = "steps"
    gradients = "gradients"


class ExecutorName(StrEnum):
    """Where runs are computed."""

    local = "local"
    ray = "ray"


if TYPE_CHECKING:
    from blaq.train.ablate import Ablation
    from blaq.train.compare import Comparison

TargetOption = Annotated[
    float | None, typer.Option(help="Training loss whose cost is told; by default the lowest that every run reached.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Runs side by side; by default the cores, divided by the recipe's train.threads if stated."
    ),
]
ExecutorOption = Annotated[
    ExecutorName, typer.Option(help="Processes of this machine, or a Ray cluster (RAY_ADDRESS, else a local one).")
]


@app.command()
def compare(
    recipe: RecipeArgument,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "float,laq,blaq",
    bits: Annotated[
        str | None, typer.Option(help="Grids, separated by commas, as in 1,2,log3; by default the recipe's.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's on.")] = 3,
    budget: Annotated[
        BudgetName,
        typer.Option(
            help="Equal steps; or equal gradient evaluations: cheaper methods train more epochs (the nearest whole "
            "number), their schedules stretched in proportion."
        ),
    ] = BudgetName.steps,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rates, separated by commas, of which each method chooses its own on validation data."
        ),
    ] = None,
    tune_seeds: Annotated[int, typer.Option(min=1, help="Seeds of that choice, other than the counted ones.")] = 1,
    target: TargetOption = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = ExecutorName.local,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; by default runs/RECIPE-compare.")] = None,
) -> None:
    """Train a recipe with several methods, grids and seeds, and print the tables; begun comparisons are continued."""
    from blaq.train.compare import Design
    from blaq.train.compare import compare as run
    from blaq.train.config import load_recipe
    from blaq.train.sweep import Sweeper

    reserved = {"optim.method": "--methods", "train.seed": "--seeds"}
    reserved |= {"optim.bits": "--bits"} if bits else {}
    reserved |= {"optim.lr": "--lr"} if lr else {}
    _refuse(set_, reserved)
    resolved = load_recipe(recipe, set_ or (), _split(methods))
    design = Design(
        methods=_split(methods),
        bits=[int(one) if one.isdecimal() else one for one in _split(bits)],
        seeds=range(resolved.train.seed, resolved.train.seed + seeds),
        budget=budget.value,
        rates=[_number("--lr", one) for one in _split(lr)],
        tune_seeds=tune_seeds,
        target=target,
    )
    path = out or Path("runs") / f"{resolved.name}-compare"
    screen = console()
    with _interruptible():
        comparison = run(resolved, design, path, Sweeper(console=screen, workers=workers, executor=executor.value))
    _show(comparison, path, screen)


@app.command()
def ablate(
    recipe: RecipeArgument,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUES",
            help="A setting: one value; several, separated by commas; or start:stop:step, both ends included. "
            "All combinations are run.",
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's on.")] = 3,
    target: TargetOption = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = ExecutorName.local,
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; by default runs/RECIPE-ablate.")] = None,
) -> None:
    """Train a recipe with a grid of settings and several seeds, and print the tables; begun ablations are continued."""
    from blaq.train.ablate import ablate as run
    from blaq.train.config import load_recipe
    from blaq.train.grid import METHOD, parse_values, unquoted
    from blaq.train.sweep import Sweeper

    _refuse(set_, {"train.seed": "--seeds"})
    parsed = [parse_values(text) for text in set_]
    sets = {key: values for key, values in parsed if len(values) > 1}
    if len(dict(parsed)) < len(parsed) or not sets:
        raise ValueError(f"--set {' '.join(set_)}: expected several values of some setting, each setting once.")
    single = [f"{key}={values[0]}" for key, values in parsed if len(values) == 1]
    resolved = load_recipe(recipe, single, [unquoted(METHOD, value) for value in sets.get(METHOD, ())])
    path = out or Path("runs") / f"{resolved.name}-ablate"
    numbers = range(resolved.train.seed, resolved.train.seed + seeds)
    screen = console()
    sweeper = Sweeper(console=screen, workers=workers, executor=executor.value)
    with _interruptible():
        ablation = run(resolved, sets, numbers, path, sweeper, target=target)
    _show(ablation, path, screen)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        say("Interrupted. The same command continues; finished runs are kept.", stderr=True)
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt
    except SystemExit:
        say("Terminated. The same command continues; finished runs are kept.", stderr=True)
        raise


def _refuse(overrides: Sequence[str] | None, reserved: dict[str, str]) -> None:
    """Refuse to set what the command sets itself."""
    for text in overrides or ():
        key = text.partition("=")[0].strip()
        hits = [option for name, option in reserved.items() if name == key or name.startswith(f"{key}.")]
        if hits:
            raise ValueError(f"--set {text}: a comparison sets this itself; use {' and '.join(hits)}.")


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers separated by commas.") from None


def _show(sweep: "Comparison | Ablation", path: Path, screen: Console) -> None:
    """Print the tables and what they say; exit status 1 if a run failed."""
    from blaq.train.tables import rich_tables

    if sweep.outcome.runs:
        for table in rich_tables(sweep.groups, sweep.recipe):
            screen.print(table)
        for line in sweep.conclusion():
            say(line)
        say(f"Written to {path}: results.csv, results.json, results.md")
    if sweep.failures:
        say(f"Failed: {', '.join(sweep.failures)}", stderr=True)
        raise typer.Exit(1)
