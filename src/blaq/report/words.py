"""Sentences of the report and the words for its numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from blaq.train.statistics import MOST_DIGITS, Difference

Tone = Literal["ahead", "behind", "level", "sign", "note"]

MINUS = "\N{MINUS SIGN}"
_OF_POINTS = 2  # digits after the point


@dataclass(frozen=True, slots=True)
class Statement:
    """One thing the numbers say.

    Attributes:
        tone: how it is marked.
        head: the finding.
        text: the numbers behind it.
        advice: what to try or to add.
    """

    tone: Tone
    head: str
    text: str
    advice: str = ""


def difference_text(difference: Difference, show: Callable[[float], str]) -> str:
    """A difference with its interval.

    Example:
        >>> difference_text(Difference((-0.25, -0.20, -0.15)), points)
        '−0.20 points (95 % interval −0.32 to −0.08, 3 seeds)'
        >>> difference_text(Difference((0.0002, 0.0004, 0.0005)), plain)
        '+0.00037 (95 % interval −0.00001 to +0.00075, 3 seeds)'
        >>> difference_text(Difference((-0.28, -0.20, -0.12)), points)  # with 2 digits an end would read as 0
        '−0.200 points (95 % interval −0.399 to −0.001, 3 seeds)'
    """
    seeds, mean = len(difference.values), difference.mean
    if math.isnan(difference.half_width):
        if show is points:
            show = partial(points, digits=difference.digits(_OF_POINTS, (abs(mean), 0.0)))
        return f"{show(mean)} ({'1 seed' if seeds == 1 else f'the same for {seeds} seeds'}, so no interval)"
    low, high = mean - difference.half_width, mean + difference.half_width
    least = _OF_POINTS
    if show is plain:  # the ends to the same place as the middle
        least = min(MOST_DIGITS, max(0, 1 - math.floor(math.log10(difference.half_width))))
    digits = difference.digits(least, (abs(low), 0.0), (abs(high), 0.0))
    if show is points:
        show = partial(points, digits=digits)
    ends = f"{_fixed(low, digits)} to {_fixed(high, digits)}"
    return f"{show(mean)} (95 % interval {ends}, {seeds} seeds)"


def points(value: float, digits: int = _OF_POINTS) -> str:
    """A difference of percentages.

    Example:
        >>> points(-0.125), points(0.0)
        ('−0.12 points', '0.00 points')
    """
    return f"{_fixed(value, digits)} points"


def plain(value: float) -> str:
    """A difference of losses.

    Example:
        >>> plain(0.00012345), plain(-1.5)
        ('+0.00012', '−1.5')
    """
    return _signed(value, f"{float(f'{abs(value):.2g}'):.{MOST_DIGITS}f}".rstrip("0").rstrip(".") or "0")


def _fixed(value: float, digits: int) -> str:
    return _signed(value, f"{abs(value):.{digits}f}")


def loss_digits(mean: float) -> int:
    """Decimals that show three digits of a loss.

    Example:
        >>> loss_digits(1.25), loss_digits(0.0123), loss_digits(0.0)
        (2, 4, 2)
    """
    return min(8, max(2, 2 - math.floor(math.log10(abs(mean))))) if mean and math.isfinite(mean) else 2


def _signed(value: float, magnitude: str) -> str:
    zero = not any(digit in magnitude for digit in "123456789")
    return magnitude if zero else f"{MINUS if value < 0 else '+'}{magnitude}"


def joined(names: Sequence[str]) -> str:
    """Names in a row.

    Example:
        >>> joined(["BLAQ", "Past", "BWN"])
        'BLAQ, Past and BWN'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
