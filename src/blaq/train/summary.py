"""Runs put together: a setting over its seeds, its difference to a reference, and what a target loss cost it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from blaq.train.config import Recipe
from blaq.train.grid import short_names
from blaq.train.run import Result
from blaq.train.statistics import Difference, Sample, bounds, paired
from blaq.train.sweep import Run

Cost = Literal["steps", "gradient_evaluations", "seconds"]
COSTS: tuple[Cost, ...] = ("steps", "gradient_evaluations", "seconds")


@dataclass(frozen=True, slots=True)
class Measure:
    """The quantity by which settings are judged: on the test data, at the epoch that validation chose.

    Attributes:
        field: of `Result`.
        name: in tables.
        unit: after a number, with the space before it.
        digits: after the point.
    """

    field: str
    name: str
    unit: str
    digits: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Measure":
        """The cross-entropy where characters are predicted, else the error."""
        if recipe.data.sequence is not None:
            return cls("test_loss", "test loss", " nats", 4)
        return cls("test_error", "test error", " %", 2)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting over its seeds.

    Attributes:
        values: what tells it from the others, as text.
        runs: the finished ones.
        seeds: those that it was to be run with; runs that failed or are not finished lack.
    """

    values: Mapping[str, str]
    runs: tuple[Run, ...]
    seeds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The method of a comparison; in an ablation the settings."""
        if "method" in self.values:
            return self.values["method"]
        names = short_names(self.values)
        return ", ".join(f"{names[key]}={value}" for key, value in self.values.items() if value)

    def sample(self, field: str) -> Sample:
        """A field of `Result` over the seeds."""
        return Sample(tuple(getattr(run.result, field) for run in self.runs))

    def difference(self, reference: "Setting", field: str) -> Difference | None:
        """This minus the reference, seed by seed; None if they share no seed."""
        ours, theirs = (
            {run.result.seed: getattr(run.result, field) for run in runs} for runs in (self.runs, reference.runs)
        )
        return paired(ours, theirs)

    def peak_memory(self) -> int | None:
        """The largest of the runs, in bytes; None if none of them tells."""
        return max((run.result.peak_memory for run in self.runs if run.result.peak_memory is not None), default=None)

    def to_reach(self, target: float, cost: Cost) -> Sample | None:
        """What the runs had spent when their training loss was first at the target; None if not every seed got there.

        Losses are known an epoch at a time, each the mean over the steps of that epoch.
        """
        spent = {run.result.seed: reached(run, target) for run in self.runs}
        rows = [row for row in spent.values() if row is not None]
        every = len(rows) == len(self.runs) and spent.keys() >= set(self.seeds)
        return Sample(tuple(row[cost] for row in rows)) if rows and every else None


def reached(run: Run, target: float) -> Mapping[str, Any] | None:
    """The first epoch's line of metrics whose training loss is at most the target."""
    return next((row for row in run.metrics if row["train_loss"] <= target), None)


def settings_of(runs: Sequence[Run], seeds: Sequence[int] = ()) -> list[Setting]:
    """The settings with a finished run, in the order of their first; each was to be run with these seeds."""
    together: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        together.setdefault(tuple(run.settings.items()), []).append(run)
    return [Setting(dict(values), tuple(members), tuple(seeds)) for values, members in together.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Settings that are set against each other.

    Attributes:
        title: what they have in common.
        settings: in the order of the table.
        reference: the one that the others' differences are against, and how it is called.
        target: training loss whose cost is told; none takes the lowest that every run reached.
    """

    title: str
    settings: tuple[Setting, ...]
    reference: Setting | None
    reference_name: str = "laq"
    target: float | None = None

    @property
    def target_loss(self) -> float | None:
        """The target, else the largest over all runs of a run's lowest training loss; None without metrics."""
        if self.target is not None:
            return self.target
        runs = [run for setting in self.settings for run in setting.runs]
        lowest = [min(row["train_loss"] for row in run.metrics) for run in runs if run.metrics]
        return max(lowest, default=None)

    def differences(self, field: str) -> list[Difference | None]:
        """Every setting against the reference; None for the reference itself, and without shared seeds."""
        return [
            None if self.reference is None or setting is self.reference else setting.difference(self.reference, field)
            for setting in self.settings
        ]

    def as_json(self, measure: Measure) -> dict[str, Any]:
        """Means, standard deviations, differences with their interval, and costs, as numbers."""
        target = self.target_loss
        rows = []
        for setting, difference in zip(self.settings, self.differences(measure.field), strict=True):
            samples = {
                item.name: setting.sample(item.name)
                for item in fields(Result)
                if item.name not in ("recipe", "method", "bits", "seed", "peak_memory")
            }
            row: dict[str, Any] = dict(setting.values)
            row["seeds"] = [run.result.seed for run in setting.runs]
            row |= {name: {"mean": sample.mean, "sd": _number(sample.sd)} for name, sample in samples.items()}
            row["peak_memory"] = setting.peak_memory()
            row["difference"] = difference and {
                "of": measure.field,
                "values": difference.values,
                "mean": difference.mean,
                "interval": bounds(difference),
                "verdict": difference.verdict,
            }
            reach = {cost: None if target is None else setting.to_reach(target, cost) for cost in COSTS}
            row["to_target"] = {cost: sample and sample.mean for cost, sample in reach.items()}
            rows.append(row)
        reference = None if self.reference is None else self.reference_name
        return {"title": self.title, "reference": reference, "target_loss": target, "settings": rows}


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run: its name, all fields of its result, and the settings that are no fields."""
    names = {item.name for item in fields(Result)}
    return [
        {"run": run.name, **asdict(run.result), **{k: v for k, v in run.settings.items() if k not in names}}
        for run in runs
    ]


def _number(value: float) -> float | None:
    return None if value != value else value  # JSON has no NaN
