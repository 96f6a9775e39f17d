"""What is compared with what: runs that differ in the seed alone are a variant, comparable variants share a panel.

A panel fixes everything but the method, the settings that belong to a method (a, period, trial_every), its learning rate
and the length of training. So methods at 1 bit are set against each other, and apart from those at 2 bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from blaq.grids import Grid
from blaq.report.read import TOTAL, Column, Run
from blaq.report.settings import (
    METHOD_NAMES,
    OF_THE_LENGTH,
    OF_THE_METHOD,
    ORDER,
    method_name,
    read_settings,
    setting_text,
)
from blaq.train.config import Recipe
from blaq.train.statistics import Sample


@dataclass(frozen=True, slots=True)
class Band:
    """A measure over training: mean and sample standard deviation (NaN for one run) over the runs of a variant.

    Attributes:
        axes: steps, gradient_evaluations and epoch at each point.
        mean: of the runs.
        sd: of the runs.
        runs: how many.
    """

    axes: Mapping[str, Column]
    mean: Column
    sd: Column
    runs: int


@dataclass(frozen=True, slots=True)
class Variant:
    """Finished runs that differ in the seed alone.

    Attributes:
        label: how it is called beside the others of its panel.
        settings: the settings that its method reads, by dotted name.
        runs: in the order of their seeds.
    """

    label: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """Name of the method, as in recipes."""
        return self.runs[0].recipe.optim.method

    @property
    def quantized(self) -> bool:
        """Whether the weights take a grid."""
        return self.runs[0].recipe.optim.trains_by.quantized

    @property
    def control(self) -> bool:
        """Whether it is LAQ, by name or as a = 1."""
        return self.method == "laq" or (self.settings.get("optim.a") == 1 and self.method != "past")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(run.seed for run in self.runs)

    def results(self, name: str) -> dict[int, float]:
        """Seed to a field of the result; without the runs that do not have it."""
        found = {run.seed: (run.result or {}).get(name) for run in self.runs}
        return {seed: float(value) for seed, value in found.items() if isinstance(value, int | float)}

    def sample(self, name: str) -> Sample:
        """A field of the result over the seeds."""
        return Sample(tuple(self.results(name).values()))

    def mean(self, name: str) -> float:
        """Mean of a field of the result over the seeds; NaN where no run has it."""
        sample = self.sample(name)
        return sample.mean if sample.values else math.nan

    def band(self, measure: str) -> Band:
        """A column of the metrics over training."""
        return _band([run.metrics for run in self.runs], measure)

    def zigzag_band(self, measure: str, layer: str = TOTAL) -> Band | None:
        """A zig-zag measure of a layer over training; None where it was not probed or has no value."""
        probed = [run.zigzag[layer] for run in self.runs if layer in run.zigzag]
        band = _band(probed, measure) if probed and all(measure in columns for columns in probed) else None
        return band if band is not None and np.isfinite(band.mean).any() else None


@dataclass(frozen=True, slots=True)
class Panel:
    """Variants that may be set against each other.

    Attributes:
        label: what they share and the other panels of the task do not; empty for the only one.
        variants: float first, then LAQ, then the others.
        varied: the settings, but for the method, in which variants of one method differ, with their values in order.
    """

    label: str
    variants: tuple[Variant, ...]
    varied: Mapping[str, tuple[Any, ...]]

    @property
    def controls(self) -> list[Variant]:
        """The LAQ variants."""
        return [variant for variant in self.variants if variant.control]


@dataclass(frozen=True, slots=True)
class Task:
    """The runs on one data set with one network.

    Attributes:
        title: as the recipe has it.
        panels: in the order of bits.
        unfinished: runs without a result, and those that have lost their metrics.
        runs: all of them.
    """

    title: str
    panels: tuple[Panel, ...]
    unfinished: tuple[Run, ...]
    runs: tuple[Run, ...]

    @property
    def text(self) -> bool:
        """Whether characters are predicted: then the cross-entropy is the main measure, else the error."""
        return self.runs[0].recipe.data.sequence is not None


def arrange(runs: Sequence[Run]) -> list[Task]:
    """The tasks of the runs, each with its panels and variants.

    Raises:
        ValueError: two runs of the same settings and seed, which would count one seed twice.
    """
    by_task: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        by_task.setdefault(task_key(run.recipe), []).append(run)
    return [_task(members) for members in by_task.values()]


def task_key(recipe: Recipe) -> tuple[str, ...]:
    """What runs of one task share: data set, network and loss."""
    return recipe.data.source, recipe.model.name, recipe.model.loss


def _task(runs: Sequence[Run]) -> Task:
    settings = [read_settings(run) for run in runs]
    keys = [{k: v for k, v in of.items() if k not in OF_THE_METHOD + OF_THE_LENGTH} for of in settings]
    panel_settings: list[dict[str, Any]] = []
    for key, run in zip(keys, runs, strict=True):
        if run.recipe.optim.trains_by.quantized and key not in panel_settings:
            panel_settings.append(key)
    for key in keys:  # float runs belong to every panel that they do not contradict, or to one of their own
        if not any(_agree(key, shared) for shared in panel_settings):
            panel_settings.append(key)
    panel_settings.sort(key=lambda shared: _order(shared.get("optim.bits")))
    differing = differing_settings(panel_settings)
    panels = []
    for shared in panel_settings:
        members = [(run, of) for run, of, key in zip(runs, settings, keys, strict=True) if _agree(key, shared)]
        finished = [(run, of) for run, of in members if run.counts]
        unset = sorted(name for name in differing - shared.keys() if may_state(shared, name) and name != ORDER)
        stated = [*shared, *unset]
        names = [name for name in stated if name in differing or name == "optim.bits"]
        label = ", ".join(setting_text(name, shared.get(name)) for name in names)
        if finished:
            panels.append(_panel(label, finished))
    title = runs[0].recipe.title
    return Task(title, tuple(panels), tuple(run for run in runs if not run.counts), tuple(runs))


def _agree(settings: Mapping[str, Any], shared: Mapping[str, Any]) -> bool:
    """Whether no setting contradicts; of the optimizer's a float run reads fewer than the panel states, of others all."""
    if "optim.bits" in settings:
        return settings == shared
    both = settings.keys() & shared.keys()
    return all(settings[name] == shared[name] for name in both) and all(
        _of_optimizer(name) for name in settings.keys() ^ shared.keys()
    )


def _of_optimizer(name: str) -> bool:
    return name.startswith("optim.")


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Those that differ among settings, or that some state and others not, as an option of the network; of the optimizer's,
    as a rule for a layer, some with a grid.
    """
    found = _differing(settings)
    for name in {name for of in settings for name in of}:
        stated = [name in of for of in settings if may_state(of, name)]
        if any(stated) and not all(stated) and name != ORDER:
            found.add(name)
    return found


def may_state(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a setting that is not stated could have been: of the optimizer's a float run has only those it reads."""
    return name in settings or "optim.bits" in settings or not _of_optimizer(name)


def _differing(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    names = {name for of in settings for name in of}
    found = {name for name in names if len({repr(of[name]) for of in settings if name in of}) > 1}
    orders = {of[ORDER] for of in settings if ORDER in of}
    if len({frozenset(order) for order in orders}) == len(orders):  # other rules, not the same in another order
        found.discard(ORDER)
    return found


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that tell variants apart; not those of the length that follow from the others, as at equal gradients."""
    names = sorted(_differing(settings), key=_position)
    for name in [name for name in names if name in OF_THE_LENGTH]:
        others = [other for other in names if other != name]
        if len({repr([of.get(other) for other in others]) for of in settings}) == len(settings):
            names = others
    return names


def _order(bits: Any) -> tuple[int, str]:
    return (0, "") if bits is None else (Grid.parse(bits).bits, str(bits))


def _panel(label: str, runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> Panel:
    groups: dict[str, list[tuple[Run, Mapping[str, Any]]]] = {}
    for run, settings in runs:
        groups.setdefault(repr(sorted(settings.items(), key=lambda item: item[0])), []).append((run, settings))
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for members in groups.values():
        by_method.setdefault(members[0][0].recipe.optim.method, []).append(members[0][1])
    varied: dict[str, set[Any]] = {}
    variants = []
    for members in groups.values():
        method, settings = members[0][0].recipe.optim.method, members[0][1]
        names = _telling(by_method[method])
        for name in names:
            varied.setdefault(name, set()).add(settings.get(name))
        label_ = ", ".join([method_name(method), *(setting_text(name, settings.get(name)) for name in names)])
        ordered = sorted((run for run, _ in members), key=lambda run: run.seed)
        _check_seeds(label_, ordered)
        variants.append(Variant(label_, settings, tuple(ordered)))
    variants.sort(key=_variant_order)
    ordered_values = {name: tuple(sorted(varied[name], key=_value_order)) for name in sorted(varied, key=_position)}
    return Panel(label, tuple(variants), ordered_values)


def _check_seeds(label: str, runs: Sequence[Run]) -> None:
    for run, other in pairwise(runs):
        if run.seed == other.seed:
            raise ValueError(
                f"report: {run.name!r} and {other.name!r} are the same run ({label}, seed {run.seed}); leave one out."
            )


def _variant_order(variant: Variant) -> tuple[Any, ...]:
    methods = [*METHOD_NAMES, variant.method]
    own = [variant.settings.get(name) for name in OF_THE_METHOD[1:] + OF_THE_LENGTH]
    return (methods.index(variant.method), [_value_order(value) for value in own])


def _position(name: str) -> tuple[int, str]:
    order = OF_THE_METHOD + OF_THE_LENGTH
    return (order.index(name), "") if name in order else (len(order), name)


def _value_order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def _band(columns: Sequence[Mapping[str, Column]], measure: str) -> Band:
    """Over the epochs that all runs have: finished runs of equal settings have the same."""
    epochs = min(len(of["epoch"]) for of in columns)
    values = np.stack([of[measure][:epochs] for of in columns])
    spread = values.std(axis=0, ddof=1) if len(columns) > 1 else np.full(epochs, np.nan)
    axes = {
        name: np.mean([of[name][:epochs] for of in columns], axis=0)
        for name in ("steps", "gradient_evaluations", "epoch")
    }
    return Band(axes, values.mean(axis=0), spread, len(columns))
