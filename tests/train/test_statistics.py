"""Paired differences: their interval is Student's, and nothing is called different without one."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from blaq.train.statistics import Difference, Sample, bounds, paired

VALUES = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=2, max_size=12)


@given(VALUES.filter(lambda values: len(set(values)) > 1))
def test_the_interval_is_that_of_the_paired_t_test(values: list[float]) -> None:
    difference = Difference(tuple(values))
    test = stats.ttest_rel(values, [0.0] * len(values))
    interval = test.confidence_interval(0.95)
    low, high = bounds(difference)
    assert low == pytest.approx(interval.low, rel=1e-9, abs=1e-9)
    assert high == pytest.approx(interval.high, rel=1e-9, abs=1e-9)
    if abs(test.pvalue - 0.05) > 1e-9:
        assert (difference.verdict != "open") == (test.pvalue < 0.05)
        if test.pvalue < 0.05:
            assert difference.verdict == ("lower" if statistics.fmean(values) < 0 else "higher")


@given(VALUES, st.integers(0, 3))
def test_what_is_shown_says_what_the_verdict_says(values: list[float], digits: int) -> None:
    difference = Difference(tuple(values))
    mean, _, width = difference.show(digits).partition(" ± ")
    if width:
        assert (abs(float(mean)) > float(width)) == (difference.verdict != "open")
    else:
        assert (float(mean) != 0) == (difference.mean != 0)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.12, 0.20, 0.28), "+0.200 ± 0.199"),
        ((-0.1195, -0.2, -0.2805), "-0.20000 ± 0.19997"),
        ((0.004,), "+0.004"),
        ((0.0, 0.001, -0.0004), "+0.000 ± 0.002"),
        ((0.0,), "+0.00"),
        ((0.1, 0.2, 0.3), "+0.20 ± 0.25"),
    ],
)
def test_an_end_reads_as_zero_only_where_it_is(values: tuple[float, ...], shown: str) -> None:
    assert Difference(values).show(2) == shown


def test_two_pairs_by_the_closed_form() -> None:
    """With one degree of freedom t is Cauchy's distribution: the quantile of 0.975 is tan(0.475 pi)."""
    difference = Difference((1.0, 3.0))
    assert difference.half_width == pytest.approx(math.tan(0.475 * math.pi) * math.sqrt(2) / math.sqrt(2), rel=1e-12)
    assert difference.show(1) == "+2.0 ± 12.7"


@pytest.mark.parametrize("values", [(-8.0,), (0.2, 0.2), (0.0, 0.0, 0.0)])
def test_without_spread_there_is_no_interval_and_no_verdict(values: tuple[float, ...]) -> None:
    difference = Difference(values)
    assert math.isnan(difference.half_width)
    assert difference.verdict == "open"
    assert bounds(difference) == [None, None]
    assert "±" not in difference.show(2)


def test_a_small_spread_is_a_spread() -> None:
    assert not math.isnan(Difference((1.0, 1.00001)).half_width)
    assert math.isnan(Difference((0.3 - 0.1, 0.2)).half_width)  # which differ by rounding alone


def test_pairs_are_those_of_the_same_seed() -> None:
    assert paired({3: 1.0, 1: 5.0, 7: 2.0}, {7: 0.5, 2: 9.0, 3: 4.0}) == Difference((-3.0, 1.5))
    assert paired({1: 1.0}, {2: 1.0}) is None


def test_pairing_removes_what_the_seeds_have_in_common() -> None:
    theirs = {seed: 10.0 * seed for seed in range(5)}
    ours = {seed: value - 1 + 0.01 * (seed % 2) for seed, value in theirs.items()}
    difference = paired(ours, theirs)
    assert difference is not None
    assert difference.verdict == "lower"
    assert difference.mean == pytest.approx(-0.996)


def test_mean_and_standard_deviation() -> None:
    values = [1.0, 2.5, 7.25]
    sample = Sample(tuple(values))
    assert sample.mean == pytest.approx(sum(values) / 3)
    assert sample.sd == pytest.approx(math.sqrt(sum((value - sample.mean) ** 2 for value in values) / 2))
    assert math.isnan(Sample((1.0,)).sd)
    assert Sample((1.0,)).show(1) == "1.0"


def test_rounding_is_no_spread() -> None:
    """One example more of 500 in either pair: errors are floats, their differences not equal to the last bit."""
    difference = Difference((1.3 - 1.2, 2.3 - 2.2))
    assert len(set(difference.values)) == 2
    assert math.isnan(difference.half_width)
    assert difference.verdict == "open"
    assert Difference((0.0, 0.0)).verdict == "open"
