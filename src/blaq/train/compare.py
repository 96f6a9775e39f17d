"""Several methods, grids and seeds on one recipe: the runs, their tables, and what the tables let one say."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from blaq.grids import Grid
from blaq.optim.plan import plan
from blaq.tasks.models import build_model
from blaq.train.budget import Budget, equal_gradients
from blaq.train.config import Recipe
from blaq.train.display import Display
from blaq.train.module import build_groups
from blaq.train.summary import Group, Measure, Setting, settings_of
from blaq.train.sweep import Job, Outcome, Run, Sweeper, claim, say_data, spelt_as_before
from blaq.train.tables import write_csv, write_tables
from blaq.train.tuning import Tuning, tune, tuning_jobs
from blaq.train.verdict import judge

REFERENCE = "laq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What is compared on a recipe.

    Attributes:
        methods: rows of `METHODS`, each once.
        bits: grids as `optim.bits` takes them, each once; empty for the recipe's. float is run once, not for each.
        seeds: each method and grid is run with all of them.
        budget: ``steps``: as many epochs for all; ``gradients``: as many gradient evaluations, see `equal_gradients`.
        rates: learning rates among which each method and grid chooses on validation data; empty for the recipe's.
        tune_seeds: how many seeds the choice takes, none of them one of `seeds`.
        target: training loss whose cost is told; none takes the lowest that every run reached.
    """

    methods: Sequence[str]
    bits: Sequence[int | str] = ()
    seeds: Sequence[int]
    budget: Budget = "steps"
    rates: Sequence[float] = ()
    tune_seeds: int = 1
    target: float | None = None

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "bits", "rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name in ("methods", "seeds") and not values):
                raise ValueError(f"compare({name}={','.join(map(str, values))!r}): expected at least one, each once.")
        grids = [Grid.parse(bits).name for bits in self.bits]
        if len(set(grids)) < len(grids):
            raise ValueError(f"compare(bits={','.join(map(str, self.bits))!r}): expected each grid once.")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"compare(rates={','.join(map(str, self.rates))!r}): expected finite numbers > 0.")
        if len({f"{rate:g}" for rate in self.rates}) < len(self.rates):
            raise ValueError(
                f"compare(rates={','.join(map(str, self.rates))!r}): expected rates that differ in six digits, which name "
                "their runs."
            )
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"compare(target={self.target}): expected a finite training loss.")
        if self.tune_seeds < 1:
            raise ValueError(f"compare(tune_seeds={self.tune_seeds}): expected at least 1.")
        if self.tune_seeds > 1 and not self.rates:
            raise ValueError(
                f"compare(tune_seeds={self.tune_seeds}): without learning rates to choose among nothing is chosen; name them "
                "with rates (--lr), or leave it out."
            )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The finished runs of a comparison, and why the others failed.

    Attributes:
        recipe: what was run, but for what the design says.
        design: what was compared.
        outcome: of the counted runs.
        tuning: how the learning rates were chosen; None if they were not.
    """

    recipe: Recipe
    design: Design
    outcome: Outcome
    tuning: Tuning | None = None

    @property
    def failures(self) -> dict[str, str]:
        """Name to message of the runs that failed, those of the tuning included."""
        tuning = {} if self.tuning is None else self.tuning.failures
        return {**tuning, **self.outcome.failures}

    @property
    def groups(self) -> list[Group]:
        """The settings by grid; float stands in every group."""
        runs = self.outcome.runs
        grids = list(dict.fromkeys(run.settings["bits"] for run in runs if run.settings["bits"] != "float")) or [
            "float"
        ]
        groups = []
        for bits in grids:
            members = [_labelled(run) for run in runs if run.settings["bits"] in (bits, "float")]
            settings = settings_of(members, self.design.seeds)
            reference = next((one for one in settings if one.values["method"] == REFERENCE), settings[0])
            groups.append(
                Group(
                    title=self.recipe.title if len(grids) == 1 else f"bits {bits}",
                    settings=tuple(settings),
                    reference=reference if len(settings) > 1 else None,
                    reference_name=reference.values["method"],
                    target=self.design.target,
                )
            )
        return groups

    def conclusion(self) -> list[str]:
        """What to look at, a line for each grid; they claim no more than the numbers say."""
        measure, groups = Measure.of(self.recipe), self.groups
        return [judge(group, measure, self.design.budget, several=len(groups) > 1) for group in groups]


def compare(recipe: Recipe, design: Design, out: Path | str, sweeper: Sweeper) -> Comparison:
    """Train a recipe with each method, grid and seed, each into ``out/runs/<name>``, and write the tables.

    Runs that are finished are not repeated, those begun are resumed. A run that fails is reported and the others go on.
    Writes comparison.json (the design), recipe.toml, results.csv (a row a finished run), results.json and results.md;
    with learning rates to choose among tuning.csv, and the runs that the choice took in ``out/tuning/<name>``.

    Raises:
        ValueError: an unknown method or grid, or settings that do not fit a method; the directory holds something else, or
            runs whose epochs or learning rates this comparison would change.
    """
    out = Path(out)
    grids = spelt_as_before(design.bits or [recipe.optim.bits], out)
    design = replace(design, bits=grids if design.bits else ())
    variants = _variants(recipe, design, grids)
    description = {"kind": "compare", "recipe": recipe.name, **asdict(design), "seeds": list(design.seeds)}
    description["bits"] = grids
    description["epochs"] = {name: variant.train.epochs for name, variant in variants.items()}
    jobs = _jobs(variants, design)
    if design.rates:  # until they are chosen, the tables there are those of the design there
        first = {"tuning": tuning_jobs(variants, design.rates, design.tune_seeds)}
        claim(out, recipe, description, first, extend=False)
    else:
        claim(out, recipe, description, {"runs": jobs})
    _show_plan(list(variants.values()), sweeper.console)
    say_data(jobs, sweeper.console)
    notes = _notes(recipe, design, variants)
    for note in notes:
        Display(sweeper.console).say(note)
    tuning = None
    if design.rates:
        tuning = tune(variants, design.rates, design.tune_seeds, out / "tuning", sweeper)
        variants = {
            name: replace(variant, optim=replace(variant.optim, lr=tuning.chosen[name]))
            for name, variant in variants.items()
            if name in tuning.chosen
        }
        jobs = _jobs(variants, design)
        claim(out, recipe, description, {"runs": jobs})
        write_csv(out / "tuning.csv", tuning.rows)

    def write(outcome: Outcome) -> None:
        comparison = Comparison(recipe, design, outcome, tuning)
        whole = replace(outcome, failures=comparison.failures)
        write_tables(out, recipe, whole, comparison.groups, comparison.conclusion(), notes)

    return Comparison(recipe, design, sweeper.run(jobs, out / "runs", finished=write), tuning)


def _variants(recipe: Recipe, design: Design, grids: Sequence[int | str]) -> dict[str, Recipe]:
    """The recipe with each method and grid, by the name that a run's name begins with."""
    variants: dict[str, Recipe] = {}
    for method in design.methods:
        variant = recipe.with_([f"optim.method={method}"])
        if not variant.optim.trains_by.quantized:
            variants[method] = variant
            continue
        for bits in grids:
            variants[f"{method}-b{bits}"] = variant.with_([f"optim.bits={bits}"])
    if design.bits and not any(variant.optim.trains_by.quantized for variant in variants.values()):
        raise ValueError(
            f"compare(bits={','.join(map(str, design.bits))!r}): none of the methods {', '.join(design.methods)} quantizes; "
            "leave it out, or add one that does."
        )
    return equal_gradients(variants) if design.budget == "gradients" else variants


def _jobs(variants: dict[str, Recipe], design: Design) -> list[Job]:
    """The counted runs."""
    return [
        Job(
            name=f"{name}-s{seed}",
            recipe=replace(variant, train=replace(variant.train, seed=seed)),
            settings=_settings(variant, tuned=bool(design.rates)),
        )
        for name, variant in variants.items()
        for seed in design.seeds
    ]


def _settings(variant: Recipe, *, tuned: bool) -> dict[str, str]:
    optim = variant.optim
    settings = {"method": optim.method, "bits": str(optim.bits) if optim.trains_by.quantized else "float"}
    return settings | {"optim.lr": f"{optim.lr:g}"} if tuned else settings


def _labelled(run: Run) -> Run:
    """The run with the settings that its line in a group's table needs."""
    return replace(run, settings={name: value for name, value in run.settings.items() if name != "bits"})


def _notes(recipe: Recipe, design: Design, variants: dict[str, Recipe]) -> list[str]:
    """What has to be known about the budget: which method trains for how long."""
    if design.budget == "steps":
        return []
    lengths: dict[str, None] = {}
    for variant in variants.values():
        every = variant.optim.schedule_every
        schedule = f" (schedule_every {every})" if every is not None else ""
        lengths[f"{variant.optim.method} {variant.train.epochs}{schedule}"] = None
    return [
        f"Equal gradient evaluations, to the nearest whole epoch; epochs, {recipe.train.epochs} in the recipe: "
        f"{', '.join(lengths)}. Schedules are stretched in proportion."
    ]


def _show_plan(runs: Sequence[Recipe], console: Console) -> None:
    """Print what the parameters become, of the first run that quantizes."""
    run = next((run for run in runs if run.optim.trains_by.quantized), None)
    if run is not None:
        model = build_model(run.model.name, **run.model.options)
        Display(console).say(f"{plan(build_groups(model, run.optim))}\n")


__all__ = ["Comparison", "Design", "Setting", "compare"]
