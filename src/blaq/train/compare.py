"""Several methods on one recipe over several seeds: the runs, their table, and what the table lets one say."""

import csv
import functools
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from blaq.optim.plan import plan, size
from blaq.tasks.models import build_model
from blaq.train.config import Recipe
from blaq.train.directory import RunDirectory, write_atomically
from blaq.train.display import Display
from blaq.train.module import build_groups
from blaq.train.run import Result, load_data, train

# What the closing line sets against each other: the first pair of which both were run.
PAIRS = [("blaq", "laq"), ("past", "laq"), ("blaq", "past"), ("laq", "float"), ("blaq", "float"), ("past", "float")]


@dataclass(frozen=True, slots=True)
class Sample:
    """Values of one quantity over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation of the sample (n - 1); NaN for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def show(self, digits: int) -> str:
        """Mean ± sd; the mean alone for a single value."""
        spread = f" ± {self.sd:.{digits}f}" if len(self.values) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The finished runs of a comparison, and why the others failed.

    Attributes:
        recipe: what was run, but for method and seed.
        results: of the finished runs, in the order of methods and seeds.
        failures: run name to message.
    """

    recipe: Recipe
    results: tuple[Result, ...]
    failures: dict[str, str]

    @property
    def methods(self) -> list[str]:
        """The methods with a finished run."""
        return list(dict.fromkeys(result.method for result in self.results))

    def sample(self, method: str, name: str) -> Sample:
        """A field of `Result` over the seeds of a method."""
        return Sample(tuple(getattr(result, name) for result in self.results if result.method == method))

    @property
    def text(self) -> bool:
        """Whether characters are predicted: then the cross-entropy is the main measure, else the error."""
        return self.recipe.data.sequence is not None

    def columns(self) -> dict[str, list[str]]:
        """The table, one line a method, by column; means over the seeds, ± sample standard deviation."""
        samples = [{f.name: self.sample(method, f.name) for f in fields(Result)} for method in self.methods]
        return {
            "method": self.methods,
            "seeds": [str(len(of["seed"].values)) for of in samples],
            "test loss": [of["test_loss"].show(4) for of in samples],
            "test error %": [of["test_error"].show(2) for of in samples],
            "train loss": [of["train_loss"].show(4) for of in samples],
            "gradients": [f"{of['gradient_evaluations'].mean:,.0f}" for of in samples],
            "seconds": [f"{of['seconds'].mean:.1f}" for of in samples],
            "size": [size(round(of["bytes"].mean)) for of in samples],
            "smaller": [f"{of['float_bytes'].mean / of['bytes'].mean:.1f}x" for of in samples],
        }

    def conclusion(self) -> str:
        """What to look at, in one line; it claims no more than the numbers say."""
        pair = next((pair for pair in PAIRS if set(pair) <= set(self.methods)), None)
        if pair is None:
            return "Look at: one method alone; run another with the same seeds to compare it with."
        one, other = pair
        what, unit, digits = ("test loss", "nats", 4) if self.text else ("test error", "%", 2)
        field = what.replace(" ", "_")
        a, b = self.sample(one, field), self.sample(other, field)
        gap = a.mean - b.mean
        order = f"{abs(gap):.{digits}f} {'lower' if gap < 0 else 'higher'}" if gap else "no difference"
        noise = math.hypot(a.sd, b.sd)
        if math.isnan(noise):
            weight = "a single seed cannot tell this from seed noise"
        else:
            verdict = "beyond" if abs(gap) > noise else "within"
            seeds = min(len(a.values), len(b.values))
            weight = f"{verdict} seed noise (combined sd {noise:.{digits}f}, {seeds} seeds)"
        cost = self.sample(one, "gradient_evaluations").mean / self.sample(other, "gradient_evaluations").mean
        smaller = self.sample(one, "float_bytes").mean / self.sample(one, "bytes").mean
        return (
            f"Look at {what}: {one} {a.mean:.{digits}f} {unit} against {other} {b.mean:.{digits}f} {unit}, {order}: "
            f"{weight}; {one} took {cost:.2f} times the gradients of {other}, and its packed weights are {smaller:.1f} "
            "times smaller than float32."
        )


def compare(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], out: Path, console: Console) -> Comparison:
    """Train a recipe with each method and seed, each into ``out/<method>-s<seed>``, and write the tables.

    Runs that are finished are not repeated, those begun are resumed. A run that fails is reported and the others go on.
    Writes results.csv and results.json (one row a finished run) and results.md (the table and the conclusion).

    Raises:
        ValueError: an unknown method, a method or seed named twice, or settings that do not fit a method.
    """
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"compare({name}={','.join(map(str, values))!r}): expected at least one, each once.")
    runs = {f"{m}-s{s}": recipe.with_([f"optim.method={m}", f"train.seed={s}"]) for m in methods for s in seeds}
    data = functools.cache(load_data)
    results: list[Result] = []
    failures: dict[str, str] = {}
    _show_plan(runs.values(), console)
    for number, (name, run) in enumerate(runs.items(), start=1):
        display = Display(console, label=f"{name} ({number}/{len(runs)})", details=False)
        dataset = None if RunDirectory(out / name).finished else data(recipe.data)
        try:
            result = train(run, out / name, resume=True, display=display, dataset=dataset)
        except ValueError as error:
            failures[name] = str(error)
        except Exception as error:  # whatever happens to one run, the others are kept
            failures[name] = f"{type(error).__name__}: {error}"
            console.print_exception()
        else:
            results.append(result)
            display.say(f"{display.label}: test error {result.test_error:.2f} %, {result.seconds:.1f} s")
            _write(Comparison(recipe, tuple(results), failures), out)
            continue
        display.say(f"{display.label}: failed: {failures[name]}")
    return Comparison(recipe, tuple(results), failures)


def rich_table(comparison: Comparison) -> Table:
    """The table for a terminal of 80 columns: without the numbers that matter less for the task."""
    columns = comparison.columns()
    seeds = " and ".join(dict.fromkeys(columns.pop("seeds")))
    columns.pop("train loss" if comparison.text else "test loss")
    table = Table(title=f"{comparison.recipe.title} ({seeds} seeds)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def _show_plan(runs: Iterable[Recipe], console: Console) -> None:
    """Print what the parameters become, of the first run that quantizes."""
    run = next((run for run in runs if run.optim.trains_by.quantized), None)
    if run is not None:
        model = build_model(run.model.name, **run.model.options)
        Display(console).say(f"{plan(build_groups(model, run.optim))}\n")


def _write(comparison: Comparison, out: Path) -> None:
    rows = [asdict(result) for result in comparison.results]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "results.csv", text.getvalue())
    write_atomically(out / "results.json", json.dumps(rows, indent=2) + "\n")
    columns = comparison.columns()
    table = [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *zip(*columns.values(), strict=True)]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in table)
    write_atomically(out / "results.md", f"# {comparison.recipe.title}\n\n{markdown}\n\n{comparison.conclusion()}\n")
