"""The rules behind the verdict: small functions of numbers, each with its threshold.

Every threshold is stated in the report beside what it decided.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blaq.train.statistics import CONFIDENCE, Difference

EQUAL = 0.01  # relative difference of steps or gradients below which two runs are of equal length
SLOW = 1.5  # times LAQ's steps to the loss that LAQ has at half of its run
RISEN = 1.5  # times its lowest, of the training loss at the end
LOST = 0.10  # of what training had gained by its lowest loss: near zero a loss wavers by more than half
PILED_UP = 1.5  # gradient error in the last third of a run, times that in the first
LITTLE_ZIGZAG = 0.10  # of `turning`, LAQ's
FALLEN = 0.8  # of `turning`, relative to LAQ's: below it zig-zag has fallen

Values = Sequence[float] | NDArray[np.float64]
Standing = Literal["ahead", "behind", "level", "flat", "early", "unknown"]


def standing(difference: Difference | None) -> Standing:
    """What a paired difference allows to say of a quantity that is better when lower: ``flat``, the same in every seed, is no
    claim. (``early`` is for `Comparison.standing` to say.)

    Example:
        >>> standing(Difference((-1.0, -1.1, -1.2))), standing(Difference((-1.0, 0.9))), standing(Difference((-1.0,)))
        ('ahead', 'level', 'unknown')
        >>> standing(Difference((-1.0, -1.0)))
        'flat'
    """
    if difference is None or len(difference.values) < 2:
        return "unknown"
    if difference.flat:
        return "flat"
    named: dict[str, Standing] = {"lower": "ahead", "higher": "behind", "open": "level"}
    return named[difference.verdict]


def equal_lengths(one: float, other: float) -> bool:
    """Whether two numbers of steps or gradients count as equal.

    Example:
        >>> equal_lengths(1000, 1009), equal_lengths(1000, 2000)
        (True, False)
    """
    return abs(one - other) <= EQUAL * max(one, other)


def value_at(x: Values, y: Values, point: float) -> float:
    """A curve read off at a point, linear between its points; NaN outside them.

    Example:
        >>> value_at([10, 20], [1.0, 2.0], 15), value_at([10, 20], [1.0, 2.0], 5)
        (1.5, nan)
    """
    inside = len(x) > 0 and x[0] <= point <= x[-1]
    return float(np.interp(point, x, y)) if inside else math.nan


def reached(x: Values, loss: Values, target: float) -> float:
    """Where a loss is first at or below a target: at the end of an epoch; infinite if never.

    Example:
        >>> reached([10, 20, 30], [0.9, 0.5, 0.4], 0.5), reached([10], [0.9], 0.5)
        (20.0, inf)
    """
    at = [position for position, value in zip(x, loss, strict=True) if value <= target]
    return float(at[0]) if at else math.inf


def slower(steps: Values, loss: Values, laq_steps: Values, laq_loss: Values) -> float:
    """Steps to the loss that LAQ has at half of its run, relative to LAQ's; infinite if it is never reached; NaN where LAQ has
    too few epochs to say, or a run that does not reach it ends too early to be slow.

    Example:
        >>> slower([1, 2, 3, 4], [8, 6, 5, 4], [1, 2, 3, 4], [8, 4, 3, 2])
        2.0
        >>> slower([1, 2], [8, 5], [1, 2, 3, 4], [8, 4, 3, 2])
        nan
    """
    if len(laq_loss) < 4:
        return math.nan
    half = len(laq_loss) // 2
    target = laq_loss[half - 1]
    own, laq = reached(steps, loss, target), reached(laq_steps, laq_loss, target)
    ended_early = math.isinf(own) and (not len(steps) or steps[-1] <= SLOW * laq)
    return math.nan if ended_early else own / laq


def is_slow(ratio: float) -> bool:
    """Whether `slower` is a sign of slow convergence.

    Example:
        >>> is_slow(1.4), is_slow(2.0), is_slow(math.inf), is_slow(math.nan)
        (False, True, True, False)
    """
    return ratio > SLOW


def diverges(loss: Values) -> bool:
    """Whether a training loss ends well above its lowest, with a part of what was gained lost again, or is not finite.

    Example:
        >>> diverges([1.0, 0.5, 0.55]), diverges([1.0, 0.5, 0.9]), diverges([1.0, math.nan])
        (False, True, True)
        >>> diverges([0.7, 0.008, 0.014])  # a wobble at the bottom
        False
        >>> diverges([math.inf, 0.5, 0.9])
        True
    """
    if not len(loss):
        return False
    if not math.isfinite(loss[-1]):
        return True
    lowest = np.nanmin(loss)
    gained = loss[0] - lowest
    return bool(loss[-1] > RISEN * lowest and (not math.isfinite(gained) or loss[-1] - lowest > LOST * gained))


def growth(error: Values) -> float:
    """Mean gradient error of the last third of a run relative to the first third's; NaN with fewer than six values.

    Example:
        >>> growth([1, 1, 1, 1, 2, 2])
        2.0
    """
    values = np.array([value for value in error if math.isfinite(value)])
    third = len(values) // 3
    return float(values[-third:].mean() / values[:third].mean()) if len(values) >= 6 else math.nan


def piles_up(ratio: float) -> bool:
    """Whether `growth` is a sign that the quantization error piles up.

    Example:
        >>> piles_up(2.0), piles_up(1.2), piles_up(math.nan)
        (True, False, False)
    """
    return ratio > PILED_UP


def turning(rate: float, cosine: float) -> float:
    """How much a training zig-zags, 0 to 1: the share of updates that turn back, or, if larger, how far successive gradients
    oppose each other. Adam's momentum hides in the updates what the gradients still show.

    Example:
        >>> turning(0.0, -0.25), turning(0.3, 0.1), turning(0.0, 0.1)
        (0.25, 0.3, 0.0)
    """
    return max(rate, 0.0 if math.isnan(cosine) else -cosine)


def little_zigzag(laq: float) -> bool:
    """Whether LAQ's `turning` is so small that there is little to remove.

    Example:
        >>> little_zigzag(0.02), little_zigzag(0.3), little_zigzag(math.nan)
        (True, False, False)
    """
    return laq < LITTLE_ZIGZAG


def zigzag_fell(own: float, laq: float) -> bool:
    """Whether `turning` is clearly below LAQ's.

    Example:
        >>> zigzag_fell(0.1, 0.3), zigzag_fell(0.28, 0.3)
        (True, False)
    """
    return own < FALLEN * laq


def by_chance(comparisons: int) -> float:
    """How many of so many comparisons leave a 95 % interval above, or below, zero by chance alone: one side of it.

    Example:
        >>> by_chance(30)
        0.75
    """
    return round(comparisons * (1 - CONFIDENCE) / 2, 2)
