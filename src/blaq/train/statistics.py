"""What a handful of seeds allows one to say: means, spreads, and paired differences with their interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95

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
        return max(self.values) - min(self.values) > 1e-9 * max(map(abs, self.values))

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
        """Mean ± half width, signed; the mean alone without an interval."""
        width = "" if math.isnan(self.half_width) else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:+z.{digits}f}{width}"


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
