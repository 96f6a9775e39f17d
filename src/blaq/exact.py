"""The exact solver of the projection: the alpha of the global optimum of every row.

It sees weights w and curvature ``d >= 0``, (R, N), and returns scales in float64. It adds up in float64: a row may have
10^8 entries, and products of small weights with a small curvature leave float32.

Write u = |w|, S1 = sum d b u and S2 = sum d b^2, levels b divided by the largest one. For fixed levels the best alpha is
S1/S2 and leaves sum d u^2 - S1^2/S2; so the optimum has the largest S1^2/S2 among the levels that rounding at some alpha
gives. alpha walks from infinity to 0; an entry steps outward, from level l_{k-1} to l_k, when alpha passes u / mid_k with
mid_k = (l_{k-1} + l_k) / 2. Every such breakpoint ends one candidate for b.

Source: Hou and Kwok, ICLR 2018, proposition 3.2 (ternary), for any grid.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blaq.bins import PLAIN, Bins, Bounds, Cells, Loops, Near, Row, largest_first, magnitudes, sums_in_bins, thresholds
from blaq.grids import Grid
from blaq.solvers import add_up, blocks, nearest, sides, value

_TIE = 1e-12  # relative difference below which two optima are equal
_ROUNDING = 1e-9  # relative error of sums over a row, with room: no cell is dropped for less
_LONG = 2**16  # breakpoints of a row above which the range of alpha is cut before they are sorted
_DIRECT = 2**16  # breakpoints of a long row that are sorted at once
_ROWS = 2**15  # breakpoints of short rows that are: their copies stay in cache
_CELLS, _PARTS = 512, 32  # cuts of the range of alpha, the first and the later ones
_MOST = 2**18  # thresholds of all cells that are looked at together
_BLOCK = 2**16  # entries whose levels are looked at together


def exact(w_RN: Tensor, d_RN: Tensor, grid: Grid, loops: Loops = PLAIN) -> Tensor:
    """The global optimum of every row: scales, float64 (R, S)."""
    n, steps = w_RN.shape[1], len(grid.magnitudes) - 1
    if grid.has_closed_form:  # LAB's closed form
        return add_up(lambda w, d: (d * w.abs()).sum(1, keepdim=True), w_RN, d_RN) / add_up(
            lambda d: d.sum(1, keepdim=True), d_RN
        )
    if n * steps > _LONG:
        alphas = torch.stack([_long(w, d, grid, loops) for w, d in zip(w_RN, d_RN, strict=True)])
    else:
        alphas = w_RN.new_empty(len(w_RN), grid.scales, dtype=torch.float64)
        for rows, _ in blocks(w_RN.shape, _ROWS // steps):
            both = sides(w_RN[rows].double(), d_RN[rows].double(), grid)
            alphas[rows] = torch.cat([_direct(u, d, grid) for u, d in both], 1)
    return alphas / grid.largest


def _direct(u_RN: Tensor, d_RN: Tensor, grid: Grid) -> Tensor:
    """Sort every breakpoint of every row: alpha, (R, 1). O(NK log NK) for a row."""
    levels, mids = magnitudes(grid).to(u_RN.device), thresholds(grid).to(u_RN.device)
    order = largest_first((u_RN.unsqueeze(2) / mids).flatten(1))
    gain1 = ((d_RN * u_RN).unsqueeze(2) * levels.diff()).flatten(1).gather(1, order)
    gain2 = (d_RN.unsqueeze(2) * levels.square().diff()).flatten(1).gather(1, order)
    base1, base2 = levels[0] * (d_RN * u_RN).sum(1, keepdim=True), levels[0] ** 2 * d_RN.sum(1, keepdim=True)
    s1 = torch.cat([base1, base1 + gain1.cumsum(1)], 1)
    s2 = torch.cat([base2, base2 + gain2.cumsum(1)], 1)
    largest = u_RN.amax(1, keepdim=True)  # NaN and Inf are for the caller to find
    return torch.where(largest.isfinite(), _ratio(s1, s2, _first_best(value(s1, s2))), largest)


# --- one long row ---------------------------------------------------------------------------------------------------------


def _long(w_N: Tensor, d_N: Tensor, grid: Grid, loops: Loops) -> Tensor:
    """The same for one long row, without sorting it: alpha of every side, (S,)."""
    low, high = torch.aminmax(w_N)
    tops = [-low, high] if grid.two_scales else [torch.maximum(-low, high)]
    largest = torch.stack(tops).max()
    if not 0 < largest < torch.inf:  # all zero; NaN and Inf, which are for the caller to find
        return largest.double().expand(grid.scales)
    row = Row.of(w_N, d_N, largest, loops)
    d_SB, du_SB, first = sums_in_bins(row, grid, largest)
    found = [
        _long_side(row, side if grid.two_scales else None, top.double(), Bins(d, du, first, row, grid), grid)
        for side, (top, d, du) in enumerate(zip(tops, d_SB, du_SB, strict=True))
    ]
    return torch.cat(found)


def _long_side(row: Row, side: int | None, largest: Tensor, bins: Bins, grid: Grid) -> Tensor:
    """Bound the optimum first, sort what is left near the thresholds there.

    V(alpha) = max_b 2 alpha S1 - alpha^2 S2 has the maximum sought, and slope 2 S1 - 2 alpha S2. S1 and S2 only grow as
    alpha falls, which bounds the slope, and so V, inside any cell of alphas. Cells that cannot reach a value already
    found are dropped, the rest is cut: first with sums from bins of magnitude, then with exact ones.
    """
    if not largest > 0:
        return largest.new_zeros(1)
    cells = _first_cells(_smallest(row, side, bins), largest, grid)
    zeros = not grid.has_zero and bool(bins.d_above[0] > bins.d_above[1])  # they are in the lowest bin
    outermost = _all_outermost(row, bins) if zeros else None
    if outermost is not None:
        cells = cells._replace(best=outermost[0])
    # Bins cannot tell the entries inside them apart: cut until the cells are as narrow.
    cells = _prune(bins.bounds, cells, finest=2.0 ** -(row.digits + 1), few=lambda cells: not len(cells.highs))
    if outermost is not None and not len(cells.highs):
        best = outermost
    else:
        best = _best_of(row, side, bins, cells)
        best = best if outermost is None else _better(best, outermost)
    return best[1] * _common_factor(row, best[1], grid)


def _best_of(row: Row, side: int | None, bins: Bins, cells: Cells) -> tuple[float, Tensor]:
    """The best value of all candidates in some cells, and its alpha. The more levels, the less values differ, and the more
    entries step in the cells that are left; they are then seen in parts, so that memory stays small.
    """
    near = Near.of(bins, row, side, cells)
    if near is None:
        half = len(cells.highs) // 2
        best = _best_of(row, side, bins, Cells(cells.highs[:half], cells.lows[:half], cells.best))
        rest = Cells(cells.highs[half:], cells.lows[half:], max(cells.best, best[0]))
        return _better(best, _best_of(row, side, bins, rest))

    def candidates(cells: Cells) -> Tensor:
        return (near.taken(cells.lows) - near.taken(cells.highs)).sum(1)

    most = max(_MOST // len(bins.mids), _CELLS)
    cells = _prune(
        near.bounds, cells, finest=1e-12, few=lambda cells: int(candidates(cells).sum()) <= _DIRECT, most=most
    )
    best = (-1.0, bins.floats(bins.lowest))  # if none is left: another part has better ones
    for high, low in zip(*_merged(cells, candidates(cells)), strict=True) if len(cells.highs) else ():
        best = _better(best, _best_between(near, high, low))
    return best


def _smallest(row: Row, side: int | None, bins: Bins) -> Tensor:
    """No magnitude but 0 is below, float64."""
    if bins.lowest > 0:
        return bins.floats(bins.lowest).squeeze(0)
    least = row.w.new_full((), torch.inf)
    for w, _ in row.chunks():
        of_side = w != 0 if side is None else (w < 0) if side == 0 else (w > 0)
        least = torch.minimum(least, torch.where(of_side, w.abs(), torch.inf).min())
    return least.double()


def _all_outermost(row: Row, bins: Bins) -> tuple[float, Tensor]:
    """The value and alpha of the candidate in which every entry but the zeros is outermost, on a grid without a zero level:
    they never step, and may draw its alpha below every magnitude.
    """
    zeros = row.w.new_zeros((), dtype=torch.float64)
    for w, d in row.chunks():
        zeros += torch.where(w == 0, d.double(), 0.0).sum()
    s1 = bins.du_above[:1]
    s2 = bins.d_above[:1] - zeros * (1 - bins.levels[0] ** 2)
    return float(value(s1, s2)), s1 / s2


def _first_cells(smallest: Tensor, largest: Tensor, grid: Grid) -> Cells:
    """Cells over every alpha that can be the optimum.

    When all levels in use could be doubled (tripled where only odd levels exist), half (a third of) alpha does as well:
    so the largest entry may be taken to reach a level that cannot. Where every entry is outermost, alpha is their mean; for
    zeros that cannot be, see `_all_outermost`.
    """
    mids, factor = thresholds(grid).to(largest.device), 2 if grid.has_zero else 3
    reach = next(k for k, level in enumerate(grid.magnitudes) if level * factor > grid.magnitudes[-1])
    high, low = largest / mids[max(reach, 1) - 1] * 1.001, smallest * 0.999
    edges = (low.log() + (high.log() - low.log()) * _ramp(_CELLS, high)).exp()
    return Cells(edges[1:].flip(0), edges[:-1].flip(0), -1.0)


def _prune(
    bounds: Callable[[Tensor], Bounds],
    cells: Cells,
    finest: float,
    few: Callable[[Cells], bool],
    most: float = math.inf,
) -> Cells:
    """Drop cells that cannot hold the optimum and cut the rest, until few candidates are left, cells are narrow, or more than
    `most`.
    """
    highs, lows, best = cells
    while True:
        at = bounds(torch.cat([highs, lows]))
        reached = value(torch.cat([at.s1_low, at.s1_high]), torch.cat([at.s2_low, at.s2_high]))
        best = max(best, float(reached.max()))
        at_high, at_low = (Bounds(*of) for of in zip(*(t.chunk(2) for t in at), strict=True))
        # Candidates that part equal entries lie between the two ends of the tie, whose values are the cell's edges.
        keep = _cell_bound(highs, lows, at_high, at_low) >= best * (1 - _ROUNDING)
        highs, lows = highs[keep], lows[keep]
        wide = highs - lows > finest * highs
        if not bool(wide.any()) or len(highs) * _PARTS > most or few(Cells(highs, lows, best)):
            return Cells(highs, lows, best)
        # The ends of the cuts are the edges, exactly.
        cuts = torch.lerp(highs.unsqueeze(1), lows.unsqueeze(1), _ramp(_PARTS, highs))
        highs, lows = cuts[:, :-1].flatten(), cuts[:, 1:].flatten()


def _merged(cells: Cells, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The highest and the lowest alpha of every run of cells without a gap, and with some `_DIRECT` candidates at most."""
    part = candidates.cumsum(0) // _DIRECT
    gap = (cells.highs[1:] != cells.lows[:-1]) | (part[1:] != part[:-1])
    end = gap.new_ones(1)
    return cells.highs[torch.cat([end, gap])], cells.lows[torch.cat([gap, end])]


def _cell_bound(highs: Tensor, lows: Tensor, at_high: Bounds, at_low: Bounds) -> Tensor:
    """An upper bound of V inside the cells: two lines from the edges, each with the steepest slope possible."""
    rise = 2 * (at_low.s1_high - lows * at_high.s2_low)
    fall = 2 * (at_high.s1_low - highs * at_low.s2_high)
    width, v_high, v_low = highs - lows, at_high.v_high, at_low.v_high
    meet = (v_high - v_low - fall * width) / (rise - fall).clamp(min=torch.finfo(highs.dtype).tiny)
    return torch.maximum(torch.maximum(v_low, v_high), v_low + rise * torch.minimum(meet.clamp(min=0), width))


def _best_between(near: Near, high: Tensor, low: Tensor) -> tuple[float, Tensor]:
    """The best value of all candidates in a cell, its edges included, and its alpha."""
    mids = near.bins.mids
    first, last = near.taken(high.view(1)), near.taken(low.view(1))
    steps = [torch.arange(int(a), int(b), device=mids.device) for a, b in zip(first[0], last[0], strict=True)]
    index = torch.cat(steps)
    step = torch.repeat_interleave(torch.arange(len(steps), device=mids.device), (last - first)[0])
    by_alpha = largest_first(-near.minus_u_M[index] / mids[step])
    index, step = index[by_alpha], step[by_alpha]
    s1, s2 = near.sums(high.view(1), first)
    d, u = near.d_M[index].double(), -near.minus_u_M[index]
    s1 = torch.cat([s1, s1 + (d * u * near.bins.rises[step]).cumsum(0)])
    s2 = torch.cat([s2, s2 + (d * near.bins.rises2[step]).cumsum(0)])
    values = value(s1, s2)
    at = _first_best(values)
    return float(values[at]), _ratio(s1, s2, at)


def _common_factor(row: Row, alpha: Tensor, grid: Grid) -> float:
    """What all levels in use are multiples of: times so much, alpha is as good, with the smallest levels, as in short rows."""
    if len(grid.magnitudes) == 2 and grid.has_zero:
        return 1.0
    scale = (alpha / grid.largest).to(row.dtype).view(1, 1)
    factor = 0
    for w in torch.split(row.w, _BLOCK):
        b = nearest(w.to(row.dtype).abs().unsqueeze(0), scale, grid)
        if bool((b == 1).any()):
            return 1.0
        factor = math.gcd(factor, *(int(level) for level in torch.unique(b)))
    return float(factor)


# --- values of candidates -------------------------------------------------------------------------------------------------


def _ramp(parts: int, like: Tensor) -> Tensor:
    return torch.linspace(0, 1, parts + 1, dtype=like.dtype, device=like.device)


def _better(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> tuple[float, Tensor]:
    tie = abs(one[0] - other[0]) <= _TIE * one[0]
    return max(one, other, key=lambda candidate: float(candidate[1]) if tie else candidate[0])


def _first_best(values: Tensor) -> Tensor:
    """Where the largest value is, in the last dimension; of equal ones that with the largest alpha, which is the first.

    Equal optima are common: weights that use one magnitude only fit at every level. Rounding must not choose.
    """
    return (values >= values.amax(-1, keepdim=True) * (1 - _TIE)).to(torch.uint8).argmax(-1, keepdim=True)


def _ratio(s1: Tensor, s2: Tensor, at: Tensor) -> Tensor:
    s1, s2 = s1.gather(-1, at), s2.gather(-1, at)
    return torch.where(s2 > 0, s1 / torch.where(s2 > 0, s2, 1.0), 0.0)
