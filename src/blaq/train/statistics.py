"""What a handful of seeds allows one to say: means, spreads, and paired differences with their interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
ROUNDING = 1e-9  # of the largest: what is less may come of rounding
MOST_DIGITS = 10  # after the point

Verdict = Literal["lower", "higher", "open"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Values of one quantity over the seeds.

    Example:
        >>> Sample((1.0, 2.0, 3.0)).show(1)
        '2.0 ± 1.0'
    """

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
class Difference:
    """Differences d of two settings, seed by seed, and the interval mean ± t(0.975, n - 1) sd / sqrt(n) of their mean.

    Seeds are paired because a seed gives both settings the same initial weights and the same order of examples. The
    interval is Student's: it holds 95 % of the time where the differences are normal.

    Example:
        >>> difference = Difference((1.0, 2.0, 3.0))
        >>> difference.show(2), difference.verdict
        ('+2.00 ± 2.48', 'open')
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> bool:
        """Whether the differences differ by more than the rounding of what they are of: errors are multiples of an example."""
        return max(self.values) - min(self.values) > ROUNDING * max(map(abs, self.values))

    @property
    def flat(self) -> bool:
        """Whether several differences are the same and not 0. They have no interval, so they are no claim either way."""
        return len(self.values) > 1 and not self.spread and self.mean != 0

    @property
    def half_width(self) -> float:
        """Half the length of the interval; NaN where there is none: for one pair, and for pairs without any spread."""
        count = len(self.values)
        if count < 2 or not self.spread:
            return math.nan
        from scipy.stats import t

        quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return quantile * statistics.stdev(self.values) / math.sqrt(count)

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies below 0 or above; ``open`` if it holds 0, or if there is none."""
        if math.isnan(self.half_width) or abs(self.mean) <= self.half_width:
            return "open"
        return "lower" if self.mean < 0 else "higher"

    def show(self, digits: int) -> str:
        """Mean ± half width, signed; the mean alone without an interval.

        It has more digits where an end of the interval would read as 0 and is not: +0.20 ± 0.20 is no verdict.
        """
        half = 0.0 if math.isnan(self.half_width) else self.half_width
        digits = self.digits(digits, (abs(self.mean), half))
        width = "" if math.isnan(self.half_width) else f" ± {half:.{digits}f}"
        return f"{self.mean:+z.{digits}f}{width}"

    def digits(self, least: int, *pairs: tuple[float, float]) -> int:
        """Digits after the point, at least so many, at which the numbers of a pair read as different ones, if they are."""
        noise = ROUNDING * max(map(abs, self.values))
        apart = [(a, b) for a, b in pairs if abs(a - b) > noise]
        most = max(least, MOST_DIGITS)
        return next((n for n in range(least, most) if all(f"{a:.{n}f}" != f"{b:.{n}f}" for a, b in apart)), most)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs for the seeds that both have; None if they share none.

    Example:
        >>> paired({0: 3.0, 1: 5.0, 2: 9.0}, {1: 4.0, 0: 1.0})
        Difference(values=(2.0, 1.0))
    """
    shared = sorted(set(ours) & set(theirs))
    return Difference(tuple(ours[seed] - theirs[seed] for seed in shared)) if shared else None


def bounds(difference: Difference) -> Sequence[float | None]:
    """Lower and upper end of the interval, as JSON takes them."""
    if math.isnan(difference.half_width):
        return [None, None]
    return [difference.mean - difference.half_width, difference.mean + difference.half_width]
