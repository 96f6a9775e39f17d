"""blaq.project against enumeration of all assignments, dense searches, its own specification, and its invariants."""

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blaq
from blaq import bins
from blaq import exact as exact_solver
from blaq.grids import GRIDS
from blaq.optim import reference
from blaq.projection import nearest_levels

SOLVERS = ("exact", "alternating")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of sum d w^2
POWER_OF_TWO_LEVELS = [name for name in GRIDS if name.startswith(("binary", "ternary", "log"))]
ENUMERABLE = {  # grid: longest row whose assignments are all tried
    **dict.fromkeys(["binary", "ternary", "ternary2", "linear3", "log3", "midrise2"], 5),
    **{"midrise3": 4, "linear4": 3, "log4": 3},
}
by_example = settings(max_examples=40, derandomize=True, database=None)


def levels_by_the_book(name: str) -> list[int]:
    """The table of schemes, written a second time."""
    if name == "binary":
        return [-1, 1]
    if name in ("ternary", "ternary2"):
        return [-1, 0, 1]
    scheme, m = name[:-1], int(name[-1])
    n = 2 ** (m - 1) - 1
    if scheme == "linear":
        return list(range(-n, n + 1))
    if scheme == "log":
        return sorted([-(2**k) for k in range(n)] + [0] + [2**k for k in range(n)])
    return [k for k in range(-(2**m), 2**m) if k % 2]


@cache
def assignments(name: str, n: int) -> Tensor:
    """Every way to give n weights a level: (len(levels) ** n, n)."""
    levels = levels_by_the_book(name)
    return torch.tensor(list(itertools.product(levels, repeat=n)), dtype=torch.float64)


def gain(b: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """What the best scale >= 0 for the levels b takes away from sum d w^2."""
    s1, s2 = (b * d * w).sum(-1).clamp_min(0), (b * b * d).sum(-1)
    return torch.where(s2 > 0, s1 * s1 / torch.where(s2 > 0, s2, 1), 0)


def sides(grid: blaq.Grid, b: Tensor) -> list[Tensor]:
    """The levels that share a scale: all, or the negative and the positive ones."""
    return [b.clamp_max(0), b.clamp_min(0)] if grid.scales == 2 else [b]


def least_error(grid: blaq.Grid, b: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """The weighted error of levels at their best scale."""
    return energy(w, d) - sum(gain(side, w, d) for side in sides(grid, b))


def check_is_best_scale(q: blaq.Quantized, w: Tensor, d: Tensor, grid: blaq.Grid, rtol: float) -> None:
    """The scale of every row (..., n) is S1/S2 of its levels."""
    for scale, b in zip(q.scale.T, sides(grid, grid.levels[q.codes.long()].double()), strict=True):
        s1, s2 = (b * d * w).sum(-1), (b * b * d).sum(-1)
        best = torch.where(s2 > 0, s1 / torch.where(s2 > 0, s2, 1), 0)
        torch.testing.assert_close(scale.double(), best.reshape(-1), rtol=rtol, atol=0)


def error(values: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """The weighted error of a projection in float64, row by row for a matrix."""
    return (d.double() * (w.double() - values.double()) ** 2).sum(-1)


def energy(w: Tensor, d: Tensor) -> Tensor:
    return (d.double() * w.double() ** 2).sum(-1)


def random_weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Weights, and a curvature that spans a few orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    d = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).exp()
    return w.to(dtype), d.to(dtype)


def check_form(q: blaq.Quantized, w: Tensor, grid: blaq.Grid) -> None:
    """What holds for every projection: codes index the levels, and values are scale * level with one rounding."""
    rows = q.scale.shape[0]
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == w.shape
    assert q.values.dtype == w.dtype
    assert q.values.shape == w.shape
    assert q.scale.dtype == torch.float32
    assert q.scale.shape == (rows, grid.scales)
    assert torch.isfinite(q.scale).all()
    assert (q.scale >= 0).all()
    assert torch.isfinite(q.values).all()
    if w.numel() == 0:
        return
    assert int(q.codes.max()) < len(grid.levels)
    level = grid.levels[q.codes.long()].reshape(rows, -1)
    scale = torch.where(level < 0, q.scale[:, :1], q.scale[:, -1:])
    assert torch.equal(q.values, (scale * level).to(w.dtype).reshape(w.shape))
    for row in q.values.reshape(rows, -1):
        assert len(row.unique()) <= 2**grid.bits


# Simple fractions make ties, floats make everything else.
weight_values = st.one_of(
    st.integers(-8, 8).map(lambda k: k / 4), st.floats(-100, 100, width=32).map(lambda x: round(x, 3))
)
curvature_values = st.one_of(st.sampled_from([0.25, 1.0, 4.0]), st.floats(2**-20, 2**10, width=32))


@st.composite
def short_rows(draw: st.DrawFn, longest: int) -> tuple[Tensor, Tensor]:
    n = draw(st.integers(1, longest))
    w = draw(st.lists(weight_values, min_size=n, max_size=n))
    d = draw(st.lists(curvature_values, min_size=n, max_size=n))
    return torch.tensor(w, dtype=torch.float32), torch.tensor(d, dtype=torch.float32)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_has_the_levels_of_its_scheme(name: str) -> None:
    grid = blaq.Grid.parse(name)
    assert grid.levels.dtype == torch.float32
    assert grid.levels.tolist() == levels_by_the_book(name)
    assert len(grid.levels) <= 2**grid.bits < 2 * len(grid.levels) + 2


def test_every_scheme_and_width_has_a_grid() -> None:
    linear_and_log = [f"{scheme}{m}" for scheme in ("linear", "log") for m in range(3, 9)]
    midrise = [f"midrise{m}" for m in range(2, 9)]
    assert sorted(GRIDS) == sorted(["binary", "ternary", "ternary2", *linear_and_log, *midrise])
    assert [blaq.Grid.parse(m).name for m in range(1, 9)] == ["binary", "ternary", *(f"linear{m}" for m in range(3, 9))]


# ------------------------------------------------------------------------------------------------- the global optimum


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ENUMERABLE)
@by_example
@given(data=st.data())
def test_exact_is_not_above_brute_force(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    w, d = data.draw(short_rows(ENUMERABLE[name]))
    grid = blaq.Grid.parse(name)
    q = blaq.project(w.to(dtype), d.to(dtype), grid)
    check_form(q, w.to(dtype), grid)
    w, d = w.double(), d.double()
    reached = least_error(grid, grid.levels[q.codes.long()].double(), w, d)
    assert reached <= least_error(grid, assignments(name, len(w)), w, d).min() + TOLERANCE[dtype] * energy(w, d)
    check_is_best_scale(q, w, d, grid, rtol=1e-7 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ENUMERABLE])
def test_exact_is_not_above_a_dense_search(name: str, n: int, dtype: torch.dtype) -> None:
    grid = blaq.Grid.parse(name)
    levels = grid.levels.double()
    middles = (levels[1:] + levels[:-1]) / 2
    w, d = random_weights(8, n, dtype=dtype)
    q = blaq.project(w, d, grid, granularity="channel")
    w, d = w.double(), d.double()
    reached = least_error(grid, levels[q.codes.long()], w, d)
    check_is_best_scale(q, w, d, grid, rtol=1e-7 if dtype == torch.float64 else 1e-6)
    for row in range(8):
        scales = w[row].abs().max() / levels[-1] * torch.logspace(-1, 2, 4001, base=2, dtype=torch.float64)
        b = levels[torch.bucketize(w[row] / scales[:, None], middles)]
        slack = TOLERANCE[dtype] * energy(w[row], d[row])
        assert reached[row] <= least_error(grid, b, w[row], d[row]).min() + slack


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ("binary", "ternary", "ternary2")])
def test_of_equally_good_scales_exact_takes_the_largest(name: str) -> None:
    """Levels (2, 0, -6) at one scale are levels (1, 0, -3) at twice the scale: rounding must not choose."""
    grid = blaq.Grid.parse(name)

    def common_factor(weight: Tensor, curvature: Tensor | None) -> int:
        level = grid.levels[blaq.project(weight, curvature, grid).codes.long()]
        return math.gcd(*(int(k) for k in level.unique().tolist()))

    for n in (1, 2, 5, 60, 20_000):
        w, d = random_weights(n, seed=n)
        assert common_factor(w, d) == 1
        if n <= 60:
            assert common_factor(w.sign(), d) == 1
            assert common_factor((w * 2).round() + 1e-9, d) == 1


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "ties and zeros"])
@pytest.mark.parametrize(
    ("name", "n"), [("linear6", 40_000), ("linear8", 20_000), ("log8", 20_000), ("midrise8", 20_000)]
)
def test_exact_is_not_above_a_dense_search_on_a_long_row(name: str, n: int, kind: str) -> None:
    """More than 2^20 breakpoints. First alphas over three octaves, then close to the one that was found."""
    grid = blaq.Grid.parse(name)
    levels = grid.levels.double()
    middles = (levels[1:] + levels[:-1]) / 2
    w, d = random_weights(n)
    w = {"normal": w, "heavy tails": w**5, "ties and zeros": (w * 8).round() / 64}[kind]
    q = blaq.project(w, d, grid)
    reached = least_error(grid, levels[q.codes.long()], w, d)
    check_is_best_scale(q, w, d, grid, rtol=1e-6)
    largest = w.abs().max() / levels[-1]
    octaves = torch.logspace(-1, 2, 120, base=2, dtype=torch.float64)
    for scale in (
        *(largest * octaves),
        *(q.scale[0].double() * octaves.pow(1e-3)),
        *(q.scale[0].double() * octaves.pow(1e-6)),
    ):
        b = levels[torch.bucketize(w / scale, middles)]
        assert reached <= least_error(grid, b, w, d) + 1e-11 * energy(w, d)


@pytest.mark.parametrize("longest", [False, True], ids=["long", "longest"])  # which have more bins
@pytest.mark.parametrize("name", ["ternary", "linear3", "linear8", "log3", "log8", "midrise2", "midrise8"])
def test_the_search_for_long_rows_equals_the_sort_for_short_ones(
    name: str, longest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = blaq.Grid.parse(name)
    if longest:
        monkeypatch.setattr(bins, "_LONG", 64)
    for seed, power in enumerate([1, 1, 3, 15]):  # of heavy tails most is in the lowest bin
        w, d = random_weights(3000, seed=seed)
        w = w**power
        by_sorting = blaq.project(w, d, grid)
        with monkeypatch.context() as few_breakpoints:
            few_breakpoints.setattr(exact_solver, "_DIRECT", 64)
            few_breakpoints.setattr(exact_solver, "_LONG", 64)
            by_search = blaq.project(w, d, grid)
        least, reached = (
            least_error(grid, grid.levels[q.codes.long()].double(), w, d) for q in (by_sorting, by_search)
        )
        assert abs(reached - least) <= 1e-11 * energy(w, d)


@pytest.mark.parametrize("name", ["ternary", "linear6", "linear8", "log8", "midrise8"])
def test_a_search_in_parts_equals_the_sort(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more levels, the more of a row is near some threshold of an alpha that may be the best."""
    grid, parts = blaq.Grid.parse(name), []
    picked = bins._picked
    monkeypatch.setattr(bins, "_picked", lambda *args: parts.append(picked(*args)) or parts[-1])
    for seed in range(3):  # normal, with heavy tails, with ties
        w, d = random_weights(20_000, seed=seed)
        w = (w, w**3, (w * 8).round())[seed]
        with monkeypatch.context() as small:
            small.setattr(exact_solver, "_LONG", 2**60)
            by_sorting = blaq.project(w, d, grid)
        with monkeypatch.context() as small:
            for module, key, value in (
                (exact_solver, "_LONG", 64), (exact_solver, "_DIRECT", 256), (exact_solver, "_MOST", 4096),
                (bins, "_ROOM", 64), (bins, "_SHARE", 100),
            ):  # fmt: skip
                small.setattr(module, key, value)
            by_search = blaq.project(w, d, grid)
        least, reached = (
            least_error(grid, grid.levels[q.codes.long()].double(), w, d) for q in (by_sorting, by_search)
        )
        assert abs(reached - least) <= 1e-11 * energy(w, d)
    if name in ("linear8", "midrise8"):
        assert any(part is None for part in parts)


@pytest.mark.parametrize("name", ["linear8", "midrise8"])
def test_a_large_tensor_with_many_levels_needs_little_memory(name: str) -> None:
    """The optimum is so flat that cutting the range of alpha alone does not end."""
    w, d = random_weights(1_000_000, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        q = blaq.project(w, d, name)
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) <= 2 * 8 * len(w)  # of what is as large as the row only
    coarser = blaq.project(w, d, name[:-1] + "7")
    assert float(error(q.values, w, d)) < float(error(coarser.values, w, d)) / 3


@pytest.mark.parametrize("name", ["binary", "ternary", "ternary2", "linear3", "log4", "midrise2"])
def test_float32_loses_nothing_on_a_long_row(name: str) -> None:
    w, d = random_weights(200_000, dtype=torch.float32)
    single, double = blaq.project(w, d, name), blaq.project(w.double(), d.double(), name)
    assert float(error(single.values, w, d)) <= float(error(double.values, w, d)) * (1 + 1e-5)


# ------------------------------------------------------------------------------------------- the alternating solver


@pytest.mark.parametrize("name", GRIDS)
def test_alternating_is_never_better_than_exact(name: str) -> None:
    w, d = random_weights(64, 12)
    exact = error(blaq.project(w, d, name, granularity="channel").values, w, d)
    local = error(blaq.project(w, d, name, granularity="channel", solver="alternating").values, w, d)
    assert (local >= exact - 1e-12 * energy(w, d)).all()
    assert (local < energy(w, d)).all()


@pytest.mark.parametrize("name", GRIDS)
def test_alternating_ends_in_a_fixed_point(name: str) -> None:
    grid = blaq.Grid.parse(name)
    w, d = random_weights(16, 30)
    q = blaq.project(w, d, grid, granularity="channel", solver="alternating")
    for _ in range(20):
        before = q
        q = blaq.project(w, d, grid, granularity="channel", solver="alternating", start=before.scale)
        assert (error(q.values, w, d) <= error(before.values, w, d) + 1e-12 * energy(w, d)).all()
    assert torch.equal(q.codes, before.codes)
    check_is_best_scale(q, w, d, grid, rtol=2e-6)
    scale = torch.where(w < 0, q.scale[:, :1], q.scale[:, -1:]).double()
    nearest = (w[..., None] - scale[..., None] * grid.levels).abs().amin(-1)
    torch.testing.assert_close((w - q.values).abs(), nearest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_alternating_stays_at_the_global_optimum(name: str) -> None:
    w, d = random_weights(16, 30)
    exact = blaq.project(w, d, name, granularity="channel")
    q = blaq.project(w, d, name, granularity="channel", solver="alternating", start=exact.scale)
    assert torch.equal(q.codes, exact.codes)
    torch.testing.assert_close(q.scale, exact.scale, rtol=2e-7, atol=0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("name", GRIDS)
def test_alternating_recovers_from_a_bad_start(name: str, factor: float) -> None:
    grid = blaq.Grid.parse(name)
    w, d = random_weights(30)
    start = blaq.project(w, d, grid).scale * factor
    q = blaq.project(w, d, grid, solver="alternating", start=start)
    check_form(q, w, grid)
    assert float(error(q.values, w, d)) < float(energy(w, d))


@pytest.mark.parametrize("name", GRIDS)
def test_a_zero_start_is_no_start(name: str) -> None:
    grid = blaq.Grid.parse(name)
    w, d = random_weights(30)
    fresh = blaq.project(w, d, grid, solver="alternating")
    q = blaq.project(w, d, grid, solver="alternating", start=torch.zeros(1, grid.scales))
    assert torch.equal(q.codes, fresh.codes)
    assert torch.equal(q.scale, fresh.scale)


@pytest.mark.parametrize("name", ["ternary", "ternary2"])
def test_a_tie_goes_outward(name: str) -> None:
    """1 lies midway between 0 and 2 = (3 + 1) / 2: outward is a fixed point, inward ends at 3."""
    start = torch.full((1, blaq.Grid.parse(name).scales), 2.0)
    for sign in (1, -1):
        q = blaq.project(torch.tensor([3.0, 1.0]) * sign, None, name, solver="alternating", start=start)
        assert q.values.tolist() == [2.0 * sign, 2.0 * sign]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRIDS)
def test_every_threshold_is_half_way_and_a_tie_goes_outward(name: str, dtype: torch.dtype) -> None:
    """Of all levels, on either side, at a scale that is a power of two and so rounds nothing."""
    grid = blaq.Grid.parse(name)
    levels = torch.tensor(grid.magnitudes, dtype=dtype)
    inner, outer = levels[:-1], levels[1:]
    for exponent in (-20, 0):
        scale = torch.full((1, grid.scales), 2.0**exponent)
        half_way = ((inner + (outer - inner) / 2) * 2.0**exponent).unsqueeze(0)
        for sign in (1.0, -1.0):
            for factor, expected in ((0.999, inner), (1.0, outer), (1.001, outer)):
                found = nearest_levels(sign * factor * half_way, scale, grid)
                assert torch.equal(found.squeeze(0), sign * expected)
            beyond = sign * 1.9 * grid.largest * 2.0**exponent
            found = nearest_levels(torch.full((1, 1), beyond, dtype=dtype), scale, grid)
            assert found.item() == sign * grid.largest


# --------------------------------------------------------------------------------------------------- degenerate rows

DEGENERATE = {
    "one weight": [0.7],
    "one negative weight": [-0.7],
    "equal weights": [0.3] * 7,
    "equal sizes": [0.3, -0.3, 0.3, -0.3],
    "ties": [1.0, 0.5, -0.5, 0.25, -1.0, 0.75],
    "no negative weights": [0.1, 0.9, 0.4],
    "no positive weights": [-0.1, -0.9, -0.4],
    "one weight among zeros": [0.0, 0.0, -2.0, 0.0, -0.0],
    "smallest subnormals": [1.4e-45, -1.4e-45, 2.8e-45],
    "subnormals": [3e-39, -7e-40, 1e-44],
    "tiny beside zero": [1e-38, 0.0, -3e-39],  # one over their scale is not finite in float32
    "subnormals beside ones": [1e-44, 1.0, -1e-40, -1.0],
    "tiny and huge": [1e-30, -1e30, 1e-10, 1e10],
    "huge": [3e38, -3e38, 1e38],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_degenerate_rows_are_finite(name: str, solver: str, dtype: torch.dtype) -> None:
    grid = blaq.Grid.parse(name)
    for description, row in DEGENERATE.items():
        w = torch.tensor(row, dtype=dtype)
        for curvature in (None, torch.ones_like(w), torch.full_like(w, 1e-8)):
            q = blaq.project(w, curvature, grid, solver=solver)
            try:
                check_form(q, w, grid)
            except AssertionError as failure:
                raise AssertionError(f"row {description!r}, curvature {curvature}: {q}") from failure


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_zero_weights_give_zero(name: str, solver: str) -> None:
    grid = blaq.Grid.parse(name)
    for w in (torch.zeros(5), -torch.zeros(5)):
        q = blaq.project(w, None, grid, solver=solver)
        check_form(q, w, grid)
        assert torch.equal(q.scale, torch.zeros(1, grid.scales))
        assert torch.equal(q.values, torch.zeros(5))
        smallest = min(level for level in levels_by_the_book(name) if level >= 0)  # sign(0) is +1
        assert grid.levels[q.codes.long()].tolist() == [smallest] * 5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_a_zero_row_leaves_the_other_rows_alone(name: str, solver: str) -> None:
    w, d = random_weights(3, 9)
    w[1] = 0
    q = blaq.project(w, d, name, granularity="channel", solver=solver)
    assert torch.equal(q.values[1], torch.zeros(9, dtype=torch.float64))
    for row in (0, 2):
        assert torch.equal(q.codes[row], blaq.project(w[row], d[row], name, solver=solver).codes)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["binary", *(f"midrise{m}" for m in range(2, 9))])
def test_sign_of_zero_is_positive_without_a_zero_level(name: str, solver: str) -> None:
    q = blaq.project(torch.tensor([0.0, -0.0, -1.0, 1.0]), None, name, solver=solver)
    assert (q.values[:2] > 0).all()


@pytest.mark.parametrize("name", [name for name in GRIDS if 0 in levels_by_the_book(name)])
def test_zero_has_no_sign(name: str) -> None:
    w, d = random_weights(50)
    w[::7] = -1e-12
    values = blaq.project(w, d, name).values
    assert (values == 0).any()
    assert not torch.signbit(values[values == 0]).any()


@pytest.mark.parametrize("size", [0.3, 1e-3, 1.0])
@pytest.mark.parametrize("name", GRIDS)
def test_equal_sizes_are_kept(name: str, size: float) -> None:
    w = torch.tensor([size, -size, size, size])
    torch.testing.assert_close(blaq.project(w, None, name).values, w, rtol=2e-7, atol=0)


# ------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", [name for name in GRIDS if name != "log8"])  # its scale, alpha / 2^126, is subnormal
@by_example
@given(rows=short_rows(6), k=st.integers(-20, 20))
def test_a_power_of_two_passes_through_exactly(name: str, solver: str, rows: tuple[Tensor, Tensor], k: int) -> None:
    w, d = rows
    q = blaq.project(w, d, name, solver=solver)
    for moved in (
        blaq.project(w * 2.0**k, d, name, solver=solver),
        blaq.project(w * 2.0**k, d * 4, name, solver=solver),
    ):
        assert torch.equal(moved.codes, q.codes)
        assert torch.equal(moved.values, q.values * 2.0**k)
        assert torch.equal(moved.scale, q.scale * 2.0**k)


@pytest.mark.parametrize("factor", [0.1, 3.7, 1e4])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_a_factor_passes_through(name: str, solver: str, factor: float) -> None:
    w, d = random_weights(8, 40)
    q = blaq.project(w, d, name, granularity="channel", solver=solver)
    scaled = blaq.project(factor * w, d, name, granularity="channel", solver=solver)
    torch.testing.assert_close(scaled.values, factor * q.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1e-9, 0.1, 3.7, 1e6])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_only_ratios_of_the_curvature_matter(name: str, solver: str, factor: float) -> None:
    w, d = random_weights(8, 40)
    per_row = torch.arange(1, 9, dtype=torch.float64)[:, None]
    q = blaq.project(w, d, name, granularity="channel", solver=solver)
    scaled = blaq.project(w, factor * d * per_row, name, granularity="channel", solver=solver)
    torch.testing.assert_close(scaled.values, q.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_no_curvature_is_unit_curvature(name: str, solver: str) -> None:
    w, _ = random_weights(6, 20)
    free, unit = (blaq.project(w, d, name, solver=solver) for d in (None, torch.ones_like(w)))
    assert torch.equal(free.codes, unit.codes)
    assert torch.equal(free.values, unit.values)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", GRIDS)
def test_idempotent(name: str, dtype: torch.dtype) -> None:
    """Where multiples of a code vector are codes too (log), the same values may be written at another scale."""
    for seed in range(5):
        w, d = random_weights(4, 64, seed=seed, dtype=dtype)
        once = blaq.project(w, d, name, granularity="channel")
        twice = blaq.project(once.values, d, name, granularity="channel")
        if name in POWER_OF_TWO_LEVELS:
            assert torch.equal(twice.values, once.values)
        if not name.startswith("log"):
            assert torch.equal(twice.codes, once.codes)
            torch.testing.assert_close(twice.scale, once.scale, rtol=2**-23, atol=0)


@pytest.mark.parametrize("name", GRIDS)
@by_example
@given(rows=short_rows(6))
def test_a_point_of_the_grid_is_its_own_projection(name: str, rows: tuple[Tensor, Tensor]) -> None:
    w, d = rows
    once = blaq.project(w, d, name).values
    assert error(blaq.project(once, d, name).values, once, d) <= 1e-11 * energy(once, d)


# --------------------------------------------------------------------------------------- dtypes, layouts, granularity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_dtypes(name: str, solver: str, dtype: torch.dtype) -> None:
    grid = blaq.Grid.parse(name)
    w, d = random_weights(6, 20, dtype=dtype)
    q = blaq.project(w, d, grid, granularity="channel", solver=solver)
    check_form(q, w, grid)
    wide = blaq.project(w.double(), d.double(), grid, granularity="channel", solver=solver)
    slack = 1e-6 * energy(w, d)  # at the same float64 weights, the scale costs no more than float32 rounding
    stored = torch.where(w < 0, q.scale[:, :1], q.scale[:, -1:]) * grid.levels[q.codes.long()]
    if solver == "exact":
        assert (error(stored, w, d) <= error(wide.values, w, d) + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature_may_have_another_dtype(dtype: torch.dtype) -> None:
    w, d = random_weights(6, 20, dtype=torch.float32)
    d = d.to(dtype)
    q = blaq.project(w, d, "linear3")
    assert q.values.dtype == torch.float32
    assert torch.equal(q.codes, blaq.project(w, d.float(), "linear3").codes)


@pytest.mark.parametrize("name", ["midrise2", "midrise3", "midrise4"])
@pytest.mark.parametrize("weights", ["pruned", "ternary", "far apart"])
def test_many_zeros_of_a_long_row_without_a_zero_level(weights: str, name: str) -> None:
    """They cannot step, and draw the best scale below every magnitude."""
    w, d = (t.float() for t in random_weights(80_000))
    if weights == "pruned":
        w = torch.where(w.abs() < w.abs().quantile(0.99), 0.0, w)
    elif weights == "ternary":
        w = torch.where(torch.arange(len(w)) % 10 < 7, 0.0, w.sign() * 0.1)
    else:  # hardly anything but the zeros counts
        w, d = torch.where(w.abs() < 2, 0.0, w), torch.where(w.abs() < 2, 1.0, 1e-30 * d)
    grid = blaq.Grid.parse(name)
    q = blaq.project(w, d, grid)
    wide, metric = w.double(), d.double()
    found = gain(grid.levels[q.codes.long()].double(), wide, metric)
    magnitudes = grid.levels[grid.levels > 0].double()
    for scale in torch.logspace(-34, 1, 80, dtype=torch.float64):
        b = magnitudes[torch.bucketize(wide.abs() / scale, (magnitudes[1:] + magnitudes[:-1]) / 2)]
        assert gain(torch.where(wide < 0, -b, b), wide, metric) <= found * (1 + 1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_only_ratios_of_the_curvature_matter_however_small_or_large(name: str, solver: str) -> None:
    w, d = random_weights(3, 12)
    for weight in (w, w.float()):
        expected = blaq.project(weight, d, name, "channel", solver)
        for power in (-900, -200, 200, 900):
            found = blaq.project(weight, d * 2.0**power, name, "channel", solver)
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)
        smallest = blaq.project(weight, torch.full_like(d, 5e-324), name, solver=solver)
        assert torch.equal(smallest.scale, blaq.project(weight, torch.ones_like(d), name, solver=solver).scale)


def test_either_side_of_two_scales_has_a_metric_of_its_own() -> None:
    w, d = random_weights(20)
    weight = w.float()
    found = blaq.project(weight, torch.where(w < 0, d, d * 2.0**-300), "ternary2")
    assert torch.equal(found.scale, blaq.project(weight, d, "ternary2").scale)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 2, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_layout_does_not_matter(solver: str, granularity: str | int) -> None:
    w, d = random_weights(16, 12)
    views = {
        "transposed": (w.t(), d.t()),
        "strided": (w[::2, ::3], d[::2, ::3]),
        "permuted": (w.reshape(4, 4, 3, 4).permute(3, 1, 0, 2), d.reshape(4, 4, 3, 4).permute(3, 1, 0, 2)),
        "expanded": (w[:1].expand(8, 12), d[:8]),
    }
    for description, (weight, curvature) in views.items():
        q = blaq.project(weight, curvature, "linear3", granularity=granularity, solver=solver)
        plain = blaq.project(
            weight.clone(memory_format=torch.contiguous_format),
            curvature.clone(memory_format=torch.contiguous_format),
            "linear3",
            granularity=granularity,
            solver=solver,
        )
        assert torch.equal(q.values, plain.values), description
        assert torch.equal(q.codes, plain.codes), description
        assert torch.equal(q.scale, plain.scale), description


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 1, 6, 18])
def test_granularity_equals_a_loop_over_rows(granularity: str | int, name: str, solver: str) -> None:
    w, d = random_weights(5, 2, 3, 3)
    q = blaq.project(w, d, name, granularity=granularity, solver=solver)
    size = {"tensor": 90, "channel": 18, 1: 1, 6: 6, 18: 18}[granularity]
    rows, curvatures = w.reshape(-1, size), d.reshape(-1, size)
    assert q.scale.shape[0] == len(rows)
    for row in range(len(rows)):
        alone = blaq.project(rows[row], curvatures[row], name, solver=solver)
        torch.testing.assert_close(q.scale[row], alone.scale[0], rtol=2e-7, atol=0)
        assert torch.equal(q.codes.reshape(-1, size)[row], alone.codes)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_vector_is_one_channel_per_entry_and_groups_along_itself(solver: str) -> None:
    w, d = random_weights(12)
    for granularity, rows in (("tensor", 1), ("channel", 12), (4, 3), (1, 12), (12, 1)):
        q = blaq.project(w, d, "linear3", granularity=granularity, solver=solver)
        assert q.scale.shape == (rows, 1)
        for row in range(rows):
            part = slice(row * 12 // rows, (row + 1) * 12 // rows)
            assert torch.equal(q.codes[part], blaq.project(w[part], d[part], "linear3", solver=solver).codes)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", GRIDS)
def test_a_scalar_is_kept(name: str, solver: str) -> None:
    w = torch.tensor(-0.7)
    q = blaq.project(w, None, name, solver=solver)
    check_form(q, w, blaq.Grid.parse(name))
    torch.testing.assert_close(q.values, w, rtol=2e-7, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 1])
def test_a_scalar_is_one_row(granularity: str | int) -> None:
    q = blaq.project(torch.tensor(-0.5), None, "linear3", granularity)
    assert (q.values.item(), q.values.shape, q.codes.shape, q.scale.shape) == (-0.5, (), (), (1, 1))


@pytest.mark.parametrize("granularity", ["tensor", "channel", 2])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["binary", "ternary2", "linear3"])
def test_empty_tensors(name: str, solver: str, shape: tuple[int, ...], granularity: str | int) -> None:
    w = torch.zeros(shape)
    for curvature in (None, w):
        check_form(blaq.project(w, curvature, name, granularity=granularity, solver=solver), w, blaq.Grid.parse(name))


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_given_is_changed_or_kept(solver: str) -> None:
    w, d = random_weights(4, 6)
    w, start = torch.nn.Parameter(w), torch.ones(4, 1) if solver == "alternating" else None
    given_tensors = [t for t in (w, d, start) if t is not None]
    copies = [t.detach().clone() for t in given_tensors]
    q = blaq.project(w, d, "linear3", granularity="channel", solver=solver, start=start)
    assert not q.values.requires_grad
    assert not q.scale.requires_grad
    q.values.zero_()
    q.scale.zero_()
    assert all(torch.equal(t.detach(), copy) for t, copy in zip(given_tensors, copies, strict=True))


# -------------------------------------------------------------------------------------------------- the specification


@pytest.mark.parametrize("solver", [*SOLVERS, "alternating from a start", "alternating from a start far too large"])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_the_reference(name: str, solver: str) -> None:
    grid = blaq.Grid.parse(name)
    levels = levels_by_the_book(name)
    for n in (5, 13, 40):
        w, d = random_weights(4, n, seed=n)
        w *= torch.logspace(-3, 1, 4, dtype=torch.float64)[:, None]
        start = None
        if "start" in solver:
            start = (w.abs().mean(1, keepdim=True) / grid.largest).float().expand(4, grid.scales) * 1.5
            start = start * 1e6 if "large" in solver else start
        q = blaq.project(w, d, grid, granularity="channel", solver=solver.split()[0], start=start)
        for row in range(4):
            alphas, chosen = reference.project_row(
                w[row].tolist(),
                d[row].tolist(),
                levels,
                two_scales=grid.two_scales,
                solver=solver.split()[0],
                start=None if start is None else [scale * max(levels) for scale in start[row].tolist()],
            )
            assert grid.levels[q.codes[row].long()].tolist() == chosen
            scales = reference.row_scales(alphas, levels)
            torch.testing.assert_close(q.scale[row], torch.tensor(scales), rtol=2**-23, atol=0)
            assert q.values[row].tolist() == reference.row_values(q.scale[row].tolist(), chosen)


# -------------------------------------------------------------------------------------------------------------- errors


def spoiled(value: float) -> Tensor:
    tensor = torch.ones(4, 6)
    tensor[1, 2] = value
    return tensor


FINE: dict[str, Any] = {"weight": torch.ones(4, 6), "curvature": None, "grid": "ternary"}
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "group does not divide": ({"granularity": 5}, r"project\(granularity=5\): expected a divisor of the 6 .*\(4, 6\)"),
    "group of nothing": (
        {"granularity": 0},
        r"project\(granularity=0\): expected 'tensor', 'channel' or a group size >= 1",
    ),
    "negative group": ({"granularity": -3}, r"project\(granularity=-3\): expected"),
    "unknown granularity": ({"granularity": "row"}, r"project\(granularity='row'\): expected 'tensor', 'channel' or"),
    "unknown solver": ({"solver": "fast"}, r"project\(solver='fast'\): expected 'exact' or 'alternating'"),
    "start of another shape": (
        {"solver": "alternating", "start": torch.ones(2, 3)},
        r"project\(start=\(2, 3\)\): expected scales of shape \(\d, \d\), or None",
    ),
    "negative start": (
        {"solver": "alternating", "start": torch.tensor([[-1.0]])},
        r"project\(start\): expected finite scales >= 0",
    ),
    "values beyond the dtype": (
        {"weight": torch.tensor([65504.0, 24000.0], dtype=torch.float16), "grid": "midrise2"},
        r"quantized values beyond float32 or this dtype",
    ),
    "start without use": (
        {"start": torch.ones(1, 1)},
        r"project\(solver='exact', start=.*\): only solver='alternating'",
    ),
    "unknown scheme": ({"grid": "ternry"}, r"'ternry'\): expected .*did you mean 'ternary'\?"),
    "no such width": ({"grid": "linear9"}, r"'linear9'\): expected .*'linear3'..'linear8'"),
    "linear at 2 bits": ({"grid": "linear2"}, r"'linear2'\): expected"),
    "no bits": ({"grid": 0}, r"\(0\): expected 1 to 8 bits"),
    "too many bits": ({"grid": 9}, r"\(9\): expected 1 to 8 bits"),
    "half a bit": ({"grid": 2.5}, r"\(2.5\): expected"),
    "bool is no number of bits": ({"grid": True}, r"\(True\): expected"),
    "zero curvature": ({"curvature": spoiled(0.0)}, r"project\(curvature\): expected values > 0, found 1 of 24"),
    "negative curvature": ({"curvature": spoiled(-1.0)}, r"project\(curvature\): expected values > 0, found 1 of 24"),
    "NaN curvature": ({"curvature": spoiled(float("nan"))}, r"project\(curvature\): expected finite values, found 1"),
    "Inf curvature": ({"curvature": spoiled(float("inf"))}, r"project\(curvature\): expected finite values, found 1"),
    "curvature of a row": (
        {"curvature": torch.ones(6)},
        r"project\(curvature=\(6,\)\): expected the weight's shape \(4, 6\)",
    ),
    "integer curvature": (
        {"curvature": torch.ones(4, 6).long()},
        r"project\(curvature=torch.int64\): expected a floating",
    ),
    "NaN weight": ({"weight": spoiled(float("nan"))}, r"project\(weight\): expected finite values, found 1"),
    "Inf weight": ({"weight": spoiled(float("-inf"))}, r"project\(weight\): expected finite values, found 1"),
    "a list of weights": ({"weight": [1.0, 2.0]}, r"project\(weight=list\): expected a torch.Tensor\."),
    "a number as curvature": ({"curvature": 1.0}, r"project\(curvature=float\): expected a torch.Tensor, or None"),
    "a number as start": (
        {"start": 1.0, "solver": "alternating"},
        r"project\(start=float\): expected a torch.Tensor, or None",
    ),
    "meta weight": ({"weight": torch.ones(4, 6, device="meta")}, r"project\(weight=meta tensor\): expected a dense"),
    "sparse weight": ({"weight": torch.eye(4, 6).to_sparse()}, r"project\(weight=torch.sparse_coo\): expected a dense"),
    "integer weight": (
        {"weight": torch.ones(4, 6).long()},
        r"project\(weight=torch.int64\): expected a floating dtype",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value_and_the_way_out(case: str) -> None:
    wrong, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        blaq.project(**{**FINE, **wrong})


# --- ten million weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one bin", "ties"])
def test_ternary_is_solved_exactly_for_ten_million_weights(kind: str) -> None:
    """Against a full sort of the magnitudes: the largest S1^2 / S2 over all prefixes."""
    n = 10_000_000
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, generator=generator)
    if kind == "heavy tails":
        w = w**7
    elif kind == "one bin":
        w = w.sign() * (1 + 1e-5 * torch.rand(n, generator=generator))
    elif kind == "ties":
        w = (w * 4).round() / 4
    d = torch.rand(n, generator=generator) + 0.01
    u, order = w.abs().double().sort(descending=True)
    weights = d.double()[order]
    s1, s2 = (weights * u).cumsum(0), weights.cumsum(0)
    best = float((s1.square() / s2).max())
    alpha = float(exact_solver.exact(w.view(1, -1), d.view(1, -1), blaq.Grid.parse("ternary")))
    taken = int((u >= alpha / 2).sum())
    assert float(s1[taken - 1].square() / s2[taken - 1]) >= best * (1 - 1e-12)
    assert alpha == pytest.approx(float(s1[taken - 1] / s2[taken - 1]), rel=1e-5)  # the largest of equals
