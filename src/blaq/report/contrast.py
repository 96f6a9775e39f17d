"""A variant set against LAQ: which LAQ, at how many steps or gradients, and by how much they differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blaq.report import rules
from blaq.report.panels import Panel, Variant
from blaq.train.statistics import Difference, paired

Axis = Literal["steps", "gradient_evaluations"]

AXIS_WORDS: dict[Axis, str] = {"steps": "steps", "gradient_evaluations": "gradient evaluations"}


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


def best(variants: Sequence[Variant], *, text: bool) -> Variant | None:
    """That of the lowest mean validation error (text: loss); None of none."""
    return min(variants, key=lambda variant: variant.mean(validation_field(text)), default=None)


def featured(panel: Panel, *, text: bool) -> list[Variant]:
    """One variant a method, that of the lowest mean validation error (text: loss), in the panel's order."""
    field = validation_field(text)
    best: dict[str, Variant] = {}
    for variant in panel.variants:
        kind = "laq" if variant.control else variant.method
        if kind not in best or variant.mean(field) < best[kind].mean(field):
            best[kind] = variant
    return [variant for variant in panel.variants if variant in best.values()]


def challengers(panel: Panel, *, text: bool) -> list[Variant]:
    """What is set against LAQ, one variant a method: those that look ahead first, then the other controls."""
    order = ("blaq", "past", "delayed", "bwn")
    found = [variant for variant in featured(panel, text=text) if variant.quantized and not variant.control]
    return sorted(found, key=lambda of: order.index(of.method) if of.method in order else len(order))


def compare(variant: Variant, panel: Panel, axis: Axis, *, text: bool) -> Comparison | None:
    """A variant against the LAQ variant of the nearest length on an axis, of several that with the lowest validation error.

    Both are compared at their ends where they are equally long, else on the curves, at the end of the shorter one. a = 1 with
    two gradients a step is LAQ, but not at its cost: it is no control at equal gradients.
    """
    length = {id(of): of.mean(axis) for of in (variant, *panel.controls)}
    controls = [of for of in panel.controls if axis == "steps" or of.mean("steps") == of.mean("gradient_evaluations")]
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


def late_mean(values: NDArray[np.float64]) -> float:
    """Mean of the finite values in the second half; NaN without any.

    Example:
        >>> late_mean(np.array([9.0, 9.0, 1.0, 3.0]))
        2.0
    """
    late = values[len(values) // 2 :]
    late = late[np.isfinite(late)]
    return float(late.mean()) if len(late) else math.nan


def late_zigzag(variant: Variant, measure: str = "zigzag_rate") -> float:
    """Mean of a zig-zag measure of all weights over the second half of training; NaN where it was not probed."""
    band = variant.zigzag_band(measure)
    return math.nan if band is None else late_mean(band.mean)


def validation_field(text: bool) -> str:
    """The column of the metrics by which settings and epochs are chosen."""
    return "validation_loss" if text else "validation_error"


def _read_off(variant: Variant, axis: Axis, measure: str, point: float) -> dict[int, float]:
    values = {run.seed: rules.value_at(run.metrics[axis], run.metrics[measure], point) for run in variant.runs}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}
