"""What seed noise alone would give: settings over the same seeds, as a table of values.

Every setting is run with the same seeds, so a value is taken as mean + effect of the setting + effect of the seed + rest,
and the noise is what remains after both effects (a randomised block design):

    rest_ij = x_ij - mean_i - mean_j + mean          (setting i, seed j)
    s^2     = sum rest^2 / ((settings - 1) (seeds - 1))

- F test of "no setting differs": (seeds * variance of the settings' means) / s^2.
- Permutation test of the same, which assumes no distribution: the values of each seed are dealt to the settings anew, 20,000
  times; p is the share of deals whose means spread at least as far, the true one counted among them. Deals that only rename
  the settings spread alike, so p cannot fall below settings!^(1 - seeds); where that is above the level, F answers.
- Difference of two settings: t = difference / (s sqrt(2 / seeds)), which pools the noise of all settings. Its p are
  corrected by Holm's method for their number: of all differences that are called, with 95 % not one is chance alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
DEALS = 20_000
ROUNDING = 1e-12  # of the largest value: below it a spread is none
SEED = 0

Values = NDArray[np.float64]  # (settings, seeds)


@dataclass(frozen=True, slots=True)
class Noise:
    """How far settings spread, and how far seed noise alone would spread them.

    Attributes:
        settings, seeds: how many.
        seed_sd: standard deviation over seeds within a setting, pooled over the settings.
        spread: standard deviation of the settings' means.
        range: largest minus smallest of the settings' means.
        noise_spread: what noise alone gives as the spread: s / sqrt(seeds).
        noise_range, noise_range_most: what it gives as the range, were it normal: median and 95 % quantile.
        p: of the permutation test.
        f: F, and its p; NaN and 1 where either spread is but rounding.
    """

    settings: int
    seeds: int
    seed_sd: float
    spread: float
    range: float
    noise_spread: float
    noise_range: float
    noise_range_most: float
    p: float
    f: tuple[float, float]

    @property
    def smallest(self) -> float:
        """The smallest p that the permutation test can give."""
        return math.exp((1 - self.seeds) * math.lgamma(self.settings + 1))

    @property
    def dealt(self) -> bool:
        """Whether the permutation test answers; else it could not, whatever the values, and F does."""
        return self.smallest < LEVEL

    @property
    def beyond(self) -> bool:
        """Whether the settings differ beyond seed noise, at the level of 5 %."""
        return (self.p if self.dealt else self.f[1]) < LEVEL


def noise_of(values: Values, deals: int = DEALS) -> Noise:
    """The spread of settings against seed noise.

    Raises:
        ValueError: fewer than two settings or seeds.
    """
    count, seeds = values.shape
    if count < 2 or seeds < 2:
        raise ValueError(f"noise_of(values of shape {values.shape}): expected at least two settings and two seeds.")
    means = values.mean(axis=1)
    generator = np.random.default_rng(SEED)
    dealt = np.array([generator.permuted(values, axis=0).mean(axis=1) for _ in range(deals)])
    spread, rounding = float(means.std(ddof=1)), _rounding(values)
    as_far = np.count_nonzero(dealt.std(axis=1, ddof=1) >= spread - rounding)
    square, freedom = residual(values)
    noise_spread = math.sqrt(square / seeds)
    ranges = noise_spread * np.ptp(generator.standard_normal((deals, count)), axis=1)
    f = seeds * spread**2 / square if min(spread, math.sqrt(square)) > rounding else math.nan
    return Noise(
        settings=count,
        seeds=seeds,
        seed_sd=float(math.sqrt(values.var(axis=1, ddof=1).mean())),
        spread=spread,
        range=float(np.ptp(means)),
        noise_spread=noise_spread,
        noise_range=float(np.median(ranges)),
        noise_range_most=float(np.quantile(ranges, 1 - LEVEL)),
        p=(1 + as_far) / (1 + deals),
        f=(f, 1.0 if math.isnan(f) else float(stats.f.sf(f, count - 1, freedom))),
    )


def residual(values: Values) -> tuple[float, int]:
    """s^2 and its degrees of freedom."""
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    return float(np.square(rest).sum() / freedom), freedom


def _rounding(values: Values) -> float:
    return ROUNDING * float(np.abs(values).max(initial=0))


def pooled_p(values: Values, reference: int) -> list[float]:
    """Two-sided p of each setting against that of index `reference` (there 1); 1 without noise to judge by."""
    square, freedom = residual(values)
    error = math.sqrt(2 * square / values.shape[1])
    differences = values.mean(axis=1) - values[reference].mean()
    if error <= _rounding(values):
        return [1.0] * len(values)
    return [float(2 * stats.t.sf(abs(difference) / error, freedom)) for difference in differences]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p: reject those below the level, and with 1 - level no true hypothesis is rejected.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def sign_test(lower: int, higher: int) -> float:
    """Two-sided p of as uneven a split of signs as this; 1 for none."""
    return float(stats.binomtest(lower, lower + higher).pvalue) if lower + higher else 1.0


def rank_correlation(x: Values, y: Values, groups: Sequence[object], deals: int = DEALS) -> tuple[float, float, float]:
    """Spearman's correlation; the p of dealing y anew within the groups; and how far the correlation is from what the groups
    alone give: p is of that, and what the groups share does not count for either.

    NaN, 1 and NaN where x or y does not vary.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, 1.0, math.nan
    rank_x, rank_y = (stats.rankdata(of) - (len(of) + 1) / 2 for of in (x, y))
    size = math.sqrt(float(rank_x @ rank_x) * float(rank_y @ rank_y))
    members = [np.array([i for i, group in enumerate(groups) if group == of]) for of in dict.fromkeys(groups)]
    generator = np.random.default_rng(SEED)
    total = np.zeros(deals)
    for index in members:
        tiled = np.tile(rank_y[index], (deals, 1))
        total += generator.permuted(tiled, axis=1) @ rank_x[index]
    rho = float(rank_x @ rank_y) / size
    # Two-sided about what the groups alone give.
    centre = total.mean()
    as_far = np.count_nonzero(np.abs(total - centre) >= abs(rho * size - centre) * (1 - 1e-9))
    return rho, (1 + as_far) / (1 + deals), rho - float(centre) / size
