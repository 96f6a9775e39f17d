"""The command ``blaq``: train, eval, compare, list, inspect."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup
from typing_extensions import override

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
WIDTH_OF_FILES = 120


class Commands(TyperGroup):
    """Prints what a user can put right as one line on standard error, without a traceback."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, ImportError) and error.name is not None:
                raise  # by an import, not by us: `blaq.__main__` says what to install
            Console(stderr=True).print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt as interrupt:
            Console(stderr=True).print("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt


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


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/RECIPE-METHOD-bBITS-sSEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the directory.")] = False,
) -> None:
    """Train a recipe."""
    from blaq.train.config import load_recipe
    from blaq.train.run import train as run

    resolved = load_recipe(recipe, set_ or ())
    optim = resolved.optim
    bits = f"-b{optim.bits}" if optim.trains_by.quantized else ""
    path = out or Path("runs") / f"{resolved.name}-{optim.method}{bits}-s{resolved.train.seed}"
    try:
        result = run(resolved, path, resume=resume)
    except KeyboardInterrupt as interrupt:
        command = f"blaq train {path / 'recipe.toml'} --out {path} --resume"
        begun = (path / "recipe.toml").exists()
        _say(f"Interrupted. Continue with: {command}" if begun else "Interrupted before the first step.", stderr=True)
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt
    _say(
        f"{path}: test error {result.test_error:.2f} % loss {result.test_loss:.4f} of epoch {result.best_epoch} (lowest "
        f"validation error, {result.validation_error:.2f} %); {result.gradient_evaluations:,} gradients, "
        f"{result.seconds:.1f} s"
    )


@app.command("eval")
def evaluate(
    run: RunArgument, checkpoint: CheckpointOption = CheckpointName.best, split: SplitName = SplitName.test
) -> None:
    """Measure a run's checkpoint on its test or validation data."""
    from blaq.train.run import evaluate as measure

    result = measure(run, checkpoint=checkpoint.value, split=split.value)
    _say(f"{run}: {split.value} error {result.error:.2f} % loss {result.loss:.4f} ({checkpoint.value} checkpoint)")


@app.command()
def compare(
    recipe: RecipeArgument,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "float,laq,blaq",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's on.")] = 3,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; by default runs/RECIPE-compare.")] = None,
) -> None:
    """Train a recipe with several methods and seeds, and print the table; begun comparisons are continued."""
    from blaq.train.compare import compare as run
    from blaq.train.compare import rich_table
    from blaq.train.config import load_recipe

    for text in set_ or ():
        if text.partition("=")[0].strip() in ("optim.method", "train.seed", "optim", "train"):
            raise ValueError(f"--set {text}: a comparison sets method and seed itself; use --methods and --seeds.")
    resolved = load_recipe(recipe, set_ or ())
    path = out or Path("runs") / f"{resolved.name}-compare"
    names = [name.strip() for name in methods.split(",")]
    console = _console()
    try:
        comparison = run(resolved, names, range(resolved.train.seed, resolved.train.seed + seeds), path, console)
    except KeyboardInterrupt as interrupt:
        _say("Interrupted. The same command continues; finished runs are kept.", stderr=True)
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt
    if comparison.results:
        console.print(rich_table(comparison))
        _say(comparison.conclusion())
        _say(f"Written to {path}: results.csv, results.json, results.md")
    if comparison.failures:
        _say(f"Failed: {', '.join(comparison.failures)}", stderr=True)
        raise typer.Exit(1)


@app.command("list")
def list_() -> None:
    """Show recipes, methods, models and grids."""
    from blaq.grids import GRIDS
    from blaq.tasks.models import MODELS
    from blaq.train.config import load_recipe, recipe_paths
    from blaq.train.methods import METHODS

    recipes = Table("recipe", title="Recipes", box=box.SIMPLE_HEAD, title_justify="left")
    recipes.add_column("title", overflow="fold")
    recipes.add_column("epochs", justify="right")
    for path in recipe_paths():
        recipe = load_recipe(path)
        recipes.add_row(path.stem, recipe.title, str(recipe.train.epochs))
    methods = Table("method", "", title="Methods (optim.method)", box=box.SIMPLE_HEAD, title_justify="left")
    for name, method in METHODS.items():
        methods.add_row(name, method.description)
    console = _console()
    console.print(recipes)
    console.print(methods)
    _say(f"Models (model.name): {', '.join(MODELS)}, hf:<model type of transformers>")
    _say(f"Grids (optim.bits): 1 is binary, 2 ternary, 3 to 8 linear; or {', '.join(GRIDS)}")


@app.command()
def inspect(run: RunArgument, checkpoint: CheckpointOption = CheckpointName.best) -> None:
    """Show the layers of a run: scheme, scales, how often each level is taken, size."""
    from blaq.optim.plan import size
    from blaq.train.inspect import layers, rich_table

    found = layers(run, checkpoint=checkpoint.value)
    _console().print(rich_table(found))
    _say(f"{run}, {checkpoint.value} checkpoint: {size(sum(layer.bytes for layer in found))} packed")


def _console() -> Console:
    """Standard output, and in a file or a pipe room for every table."""
    return Console() if Console().is_terminal else Console(width=WIDTH_OF_FILES)


def _say(text: str, *, stderr: bool = False) -> None:
    Console(stderr=stderr).print(text, markup=False, highlight=False, soft_wrap=True)
