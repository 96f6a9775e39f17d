"""A variant set against LAQ: which LAQ, at how many steps or gradients, and by how much they differ."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blaq.report import rules
from blaq.report.panels import Panel, Variant
from blaq.report.settings import method_name
from blaq.train.statistics import Difference, paired

Axis = Literal["steps", "gradient_evaluations"]

AXIS_WORDS: dict[Axis, str] = {"steps": "steps", "gradient_evaluations": "gradient evaluations"}
# Of the path since training began, and an average that goes on: each value stands for all before it.
_OF_THE_SCHEDULE = ("optim.schedule", "optim.schedule_every", "optim.schedule_factor")
RUNNING = frozenset({"path_efficiency", "oscillation_frequency"})


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant against LAQ at equal steps or gradients.

    Attributes:
        axis: what is equal.
        point: how many.
        at_end: whether both end there; else both curves are read off there.
        main: difference in test error or loss, or off the ends in that of validation.
        loss: difference in training loss.
    """

    variant: Variant
    control: Variant
    axis: Axis
    point: float
    at_end: bool
    main: Difference | None
    loss: Difference | None

    @property
    def early(self) -> str:
        """Which of the two is read off in the middle of its learning-rate schedule, in words; empty if neither is."""
        longer = max(self.variant, self.control, key=lambda of: of.mean(self.axis))
        if self.at_end or not self._falls_later(longer):
            return ""
        return f"read off before {'LAQ' if longer is self.control else method_name(longer.method)}'s schedule ended"

    def _falls_later(self, longer: Variant) -> bool:
        """Whether the learning rate of the longer one still fell behind the point, and not for both alike."""
        schedule, every = (longer.settings.get(f"optim.{key}") for key in ("schedule", "schedule_every"))
        if schedule == "cosine":  # down to the end of a run, however long it is
            return True
        shorter = self.control if longer is self.variant else self.variant
        same = all(longer.settings.get(key) == shorter.settings.get(key) for key in _OF_THE_SCHEDULE)
        if schedule == "constant" or (self.axis == "steps" and same):
            return False
        if schedule != "step" or every is None:
            return True
        epochs = max(run.epochs for run in longer.runs)
        last = (epochs - 1) // int(every) * int(every)  # after which it fell for the last time
        return last >= epochs * self.point / longer.mean(self.axis)

    def standing(self, difference: Difference | None) -> rules.Standing:
        """What a difference of the two allows to say: no more than ``early`` where a learning rate still had to fall."""
        found = rules.standing(difference)
        return "early" if self.early and found != "unknown" else found


def fullest(variants: Sequence[Variant], seeds: Collection[int] | None = None) -> list[Variant]:
    """The variants with the most seeds, or the most of the given ones. They alone are chosen among: the lowest error of a
    setting tried once, or of the seed that a failing one left, may be luck, and would leave the others' seeds without a pair.
    """
    counts = [len(of.seeds if seeds is None else set(of.seeds) & set(seeds)) for of in variants]
    return [of for of, count in zip(variants, counts, strict=True) if count == max(counts)]


def best(variants: Sequence[Variant], seeds: Collection[int] | None = None, *, text: bool) -> Variant | None:
    """Of the `fullest` that of the lowest mean validation error (text: loss); None of none."""
    return min(fullest(variants, seeds), key=lambda variant: variant.mean(validation_field(text)), default=None)


def featured(panel: Panel, *, text: bool) -> list[Variant]:
    """One variant a method, the `best`, in the panel's order."""
    by_method = _by_method(panel)
    rivals = [
        of for method, variants in by_method.items() if method != "laq" for of in fullest(variants) if of.quantized
    ]
    seeds = {seed for of in rivals for seed in of.seeds}
    chosen = [
        best(variants, seeds if seeds and method == "laq" else None, text=text)
        for method, variants in by_method.items()
    ]
    return [variant for variant in panel.variants if variant in chosen]


def passed_over(panel: Panel, rivals: Sequence[Variant]) -> list[Variant]:
    """What was not chosen among: others of its method have more seeds, or other LAQ variants more in common with the rivals."""
    among = {method: fullest(variants) for method, variants in _by_method(panel).items()}
    if rivals:
        among["laq"] = [of for rival in rivals for axis in AXIS_WORDS for of in _controls(rival, panel, axis)]
    return [variant for variant in panel.variants if not any(variant in found for found in among.values())]


def challengers(panel: Panel, *, text: bool) -> list[Variant]:
    """What is set against LAQ, one variant a method: those that look ahead first, then the other controls."""
    order = ("blaq", "past", "delayed", "bwn")
    found = [variant for variant in featured(panel, text=text) if variant.quantized and not variant.control]
    return sorted(found, key=lambda of: order.index(of.method) if of.method in order else len(order))


def compare(variant: Variant, panel: Panel, axis: Axis, *, text: bool) -> Comparison | None:
    """A variant against the LAQ variant of the nearest length on an axis, of several that with the lowest validation error.

    Both are compared at their ends where they are equally long, else on the curves, at the end of the shorter one.
    """
    length = {id(of): of.mean(axis) for of in (variant, *panel.controls)}
    controls = _controls(variant, panel, axis)
    if not controls:
        return None

    def nearness(control: Variant) -> tuple[bool, float, float]:
        ratio = abs(math.log(length[id(control)] / length[id(variant)]))
        equal = rules.equal_lengths(length[id(control)], length[id(variant)])
        return not equal, 0.0 if equal else ratio, control.mean(validation_field(text))

    control = min(controls, key=nearness)
    point = min(length[id(variant)], length[id(control)])
    if rules.equal_lengths(length[id(variant)], length[id(control)]):
        main, loss = (
            paired(variant.results(field), control.results(field))
            for field in ("test_loss" if text else "test_error", "train_loss")
        )
        return Comparison(variant, control, axis, point, True, main, loss)
    main, loss = (
        difference_at(variant, control, axis, field, point) for field in (validation_field(text), "train_loss")
    )
    return Comparison(variant, control, axis, point, False, main, loss)


def difference_at(variant: Variant, control: Variant, axis: Axis, measure: str, point: float) -> Difference | None:
    """The difference of two curves of the metrics at a number of steps or gradients."""
    return paired(_read_off(variant, axis, measure, point), _read_off(control, axis, measure, point))


def late_value(measure: str, values: NDArray[np.float64]) -> float:
    """What a zig-zag measure came to: mean of the finite values in the second half, the last of a running one; NaN without any.

    Example:
        >>> values = np.array([9.0, 9.0, 1.0, 3.0])
        >>> late_value("zigzag_rate", values), late_value("path_efficiency", values)
        (2.0, 3.0)
    """
    late = values[len(values) // 2 :]
    late = late[np.isfinite(late)][-1 if measure in RUNNING else 0 :]
    return float(late.mean()) if len(late) else math.nan


def late_zigzag(variant: Variant, measure: str = "zigzag_rate") -> float:
    """What a zig-zag measure of all weights came to late in training; NaN where it was not probed."""
    band = variant.zigzag_band(measure)
    return math.nan if band is None else late_value(measure, band.mean)


def validation_field(text: bool) -> str:
    """The column of the metrics by which settings and epochs are chosen."""
    return "validation_loss" if text else "validation_error"


def _by_method(panel: Panel) -> dict[str, list[Variant]]:
    """The variants of each method; a = 1 is LAQ."""
    found: dict[str, list[Variant]] = {}
    for variant in panel.variants:
        found.setdefault("laq" if variant.control else variant.method, []).append(variant)
    return found


def _controls(variant: Variant, panel: Panel, axis: Axis) -> list[Variant]:
    """The LAQ variants to choose from: of each length the `fullest` in its seeds, and none with a single pair beside others.
    a = 1 with two gradients a step is LAQ, but not at its cost: it is no control at equal gradients.
    """
    found = [of for of in panel.controls if axis == "steps" or of.mean("steps") == of.mean("gradient_evaluations")]
    lengths = {of.mean(axis) for of in found}
    chosen = [
        of for length in lengths for of in fullest([of for of in found if of.mean(axis) == length], variant.seeds)
    ]
    several = [of for of in chosen if len(set(of.seeds) & set(variant.seeds)) > 1]
    return several or fullest(chosen, variant.seeds)


def _read_off(variant: Variant, axis: Axis, measure: str, point: float) -> dict[int, float]:
    values = {run.seed: rules.value_at(run.metrics[axis], run.metrics[measure], point) for run in variant.runs}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}
