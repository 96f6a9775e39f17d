"""``blaq plan``, ``train``, ``eval`` and ``list``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from blaq.cli.app import (
    EXIT_INTERRUPTED,
    CheckpointName,
    CheckpointOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    SplitName,
    app,
    console,
    say,
)


@app.command()
def plan(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Show what a recipe makes of each parameter, how large the result will be, and the memory that training takes."""
    from blaq.optim.memory import memory_report
    from blaq.optim.plan import plan as table
    from blaq.train.config import load_recipe
    from blaq.train.module import groups_of

    resolved = load_recipe(recipe, set_ or ())
    groups = groups_of(resolved)
    say(f"{table(groups)}\n{memory_report(groups, resolved.optim.trains_by.trial)}")


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/RECIPE-METHOD-bBITS-sSEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the directory.")] = False,
) -> None:
    """Train a recipe."""
    from blaq.train.config import load_recipe
    from blaq.train.interrupts import EXIT_TERMINATED, terminable
    from blaq.train.run import train as run

    resolved = load_recipe(recipe, set_ or ())
    optim = resolved.optim
    bits = f"-b{optim.bits}" if optim.trains_by.quantized else ""
    path = out or Path("runs") / f"{resolved.name}-{optim.method}{bits}-s{resolved.train.seed}"
    try:
        with terminable():
            result = run(resolved, path, resume=resume)
    except (KeyboardInterrupt, SystemExit) as end:
        interrupted = isinstance(end, KeyboardInterrupt)
        what = "Interrupted" if interrupted else "Terminated"
        command = shlex.join(["blaq", "train", str(path / "recipe.toml"), "--out", str(path), "--resume"])
        begun = (path / "recipe.toml").exists()
        say(f"{what}. Continue with: {command}" if begun else f"{what} before the first step.", stderr=True)
        raise typer.Exit(EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED) from end
    say(
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
    say(f"{run}: {split.value} error {result.error:.2f} % loss {result.loss:.4f} ({checkpoint.value} checkpoint)")


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
    screen = console()
    screen.print(recipes)
    screen.print(methods)
    say(f"Models (model.name): {', '.join(MODELS)}, hf:<model type of transformers>")
    say(f"Grids (optim.bits): 1 is binary, 2 ternary, 3 to 8 linear; or {', '.join(GRIDS)}")
