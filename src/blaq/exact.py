"""The exact solver of the projection: the alpha of the global optimum of every row.

It sees magnitudes ``u = |w| >= 0`` and curvature ``d >= 0``, (R, N), and returns alpha in float64, (R, 1), relative to
levels divided by the largest one. It adds up in float64: a row may have 10^8 entries, and products of small weights
with a small curvature leave float32.

Write S1 = sum d b u and S2 = sum d b^2. For fixed levels b the best alpha is S1/S2 and leaves sum d u^2 - S1^2/S2; so the
optimum has the largest S1^2/S2 among the levels that rounding at some alpha gives. alpha walks from infinity to 0; an
entry steps outward, from level l_{k-1} to l_k, when alpha passes u / mid_k with mid_k = (l_{k-1} + l_k) / 2. Every such
breakpoint ends one candidate for b.

Source: Hou and Kwok, ICLR 2018, proposition 3.2 (ternary), for any grid.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.solvers import add_up, nearest

_TIE = 1e-12  # relative difference below which two optima are equal
_ROUNDING = 1e-9  # relative error of sums over a row, with room: no cell is dropped for less
_LONG = 2**16  # breakpoints of a row above which the range of alpha is cut before they are sorted
_DIRECT = 2**20  # breakpoints that are sorted at once
_CHUNK = 2**18  # entries that are put into bins at once: their wide copies stay in cache
_CELLS, _PARTS = 1024, 8  # cuts of the range of alpha, the first and the later ones
_SMALL = 2.0**-100  # magnitudes below go to float64: float32 has few digits left for them
_DIGITS = 10  # binary digits of the mantissa that tell bins apart


def exact(u_RN: Tensor, d_RN: Tensor, grid: Grid) -> Tensor:
    """The global optimum of every row: alpha, float64 (R, 1)."""
    rows, n = u_RN.shape
    steps = len(grid.magnitudes) - 1
    if steps == 0:  # LAB's closed form
        return add_up(lambda u, d: (d * u).sum(1, keepdim=True), u_RN, d_RN) / add_up(
            lambda d: d.sum(1, keepdim=True), d_RN
        )
    if n * steps > _LONG:
        return torch.stack([_long(u, d, grid) for u, d in zip(u_RN, d_RN, strict=True)]).view(rows, 1)
    chunk = max(1, _DIRECT // (n * steps))
    pairs = zip(torch.split(u_RN, chunk), torch.split(d_RN, chunk), strict=True)
    return torch.cat([_direct(u.double(), d.double(), grid) for u, d in pairs])


def _direct(u_RN: Tensor, d_RN: Tensor, grid: Grid) -> Tensor:
    """Sort every breakpoint of every row. O(NK log NK) for a row."""
    levels, mids = _magnitudes(grid).to(u_RN.device), _mids(grid).to(u_RN.device)
    order = (u_RN.unsqueeze(2) / mids).flatten(1).argsort(dim=1, descending=True)
    gain1 = ((d_RN * u_RN).unsqueeze(2) * levels.diff()).flatten(1).gather(1, order)
    gain2 = (d_RN.unsqueeze(2) * levels.square().diff()).flatten(1).gather(1, order)
    base1, base2 = levels[0] * (d_RN * u_RN).sum(1, keepdim=True), levels[0] ** 2 * d_RN.sum(1, keepdim=True)
    s1 = torch.cat([base1, base1 + gain1.cumsum(1)], 1)
    s2 = torch.cat([base2, base2 + gain2.cumsum(1)], 1)
    return _ratio(s1, s2, _first_best(_value(s1, s2)))


# --- one long row ---------------------------------------------------------------------------------------------------------


def _long(u_N: Tensor, d_N: Tensor, grid: Grid) -> Tensor:
    """The same for one long row, without sorting it: bound the optimum first, sort what is left near the thresholds there.

    V(alpha) = max_b 2 alpha S1 - alpha^2 S2 has the maximum sought, and slope 2 S1 - 2 alpha S2. S1 and S2 only grow as
    alpha falls, which bounds the slope, and so V, inside any cell of alphas. Cells that cannot reach a value already
    found are dropped, the rest is cut: first with sums from bins of magnitude, then with exact ones.
    """
    largest = u_N.max()
    if not 0 < largest < torch.inf:  # all zero; NaN and Inf, which are for the caller to find
        return largest.double().view(1)
    if largest < _SMALL:
        u_N, d_N = u_N.double(), d_N.double()
    bins = _Bins(u_N, d_N, grid)
    cells = _prune(bins, _first_cells(bins.smallest, largest.double(), grid), finest=2.0 ** -(_DIGITS + 1))
    near = _Near(bins, u_N, d_N, cells)
    cells = _prune(near, cells, finest=1e-12)
    best = (-1.0, u_N.new_zeros(1, dtype=torch.float64))
    for high, low in zip(*_merged(cells), strict=True):
        best = _better(best, near.best_between(high, low))
    return best[1] * _common_factor(u_N, best[1], grid)


class _Cells(NamedTuple):
    """Intervals of alpha, (C,), from the highest to the lowest; best: a value of S1^2/S2 that is reached."""

    highs: Tensor
    lows: Tensor
    best: float


class _Bounds(NamedTuple):
    """At some alphas, (C,): S1 and S2 from below and from above, and V from above."""

    s1_low: Tensor
    s2_low: Tensor
    s1_high: Tensor
    s2_high: Tensor
    v_high: Tensor


class _Sums(Protocol):
    def bounds(self, alpha_C: Tensor) -> _Bounds: ...

    def candidates(self, cells: _Cells) -> int: ...


def _first_cells(smallest: Tensor, largest: Tensor, grid: Grid) -> _Cells:
    """Cells over every alpha that can be the optimum.

    When all levels in use could be doubled (tripled where only odd levels exist), half (a third of) alpha does as well:
    so the largest entry may be taken to reach a level that cannot. Where every entry is outermost, alpha is their mean.
    """
    mids, factor = _mids(grid).to(largest.device), 2 if grid.has_zero else 3
    reach = next(k for k, level in enumerate(grid.magnitudes) if level * factor > grid.magnitudes[-1])
    high, low = largest / mids[max(reach, 1) - 1] * 1.001, smallest * 0.999
    edges = (low.log() + (high.log() - low.log()) * _ramp(_CELLS, high)).exp()
    return _Cells(edges[1:].flip(0), edges[:-1].flip(0), -1.0)


def _prune(sums: _Sums, cells: _Cells, finest: float) -> _Cells:
    """Drop cells that cannot hold the optimum and cut the rest, until few candidates are left or cells are narrow."""
    highs, lows, best = cells
    while True:
        at_high, at_low = sums.bounds(highs), sums.bounds(lows)
        for at in (at_high, at_low):
            for s1, s2 in ((at.s1_low, at.s2_low), (at.s1_high, at.s2_high)):
                best = max(best, float(_value(s1, s2).max()))
        # Candidates that part equal entries lie between the two ends of the tie, whose values are the cell's edges.
        keep = _cell_bound(highs, lows, at_high, at_low) >= best * (1 - _ROUNDING)
        highs, lows = highs[keep], lows[keep]
        wide = highs - lows > finest * highs
        if sums.candidates(_Cells(highs, lows, best)) <= _DIRECT or not bool(wide.any()):
            return _Cells(highs, lows, best)
        cuts = torch.lerp(
            highs.unsqueeze(1), lows.unsqueeze(1), _ramp(_PARTS, highs)
        )  # its ends are the edges, exactly
        highs, lows = cuts[:, :-1].flatten(), cuts[:, 1:].flatten()


def _merged(cells: _Cells) -> tuple[Tensor, Tensor]:
    """The highest and the lowest alpha of every run of cells without a gap."""
    gap = cells.highs[1:] != cells.lows[:-1]
    end = gap.new_ones(1)
    return cells.highs[torch.cat([end, gap])], cells.lows[torch.cat([gap, end])]


def _common_factor(u_N: Tensor, alpha: Tensor, grid: Grid) -> float:
    """What all levels in use are multiples of: times so much, alpha is as good, with the smallest levels, as in short rows."""
    scale = (alpha / grid.largest).to(u_N.dtype).view(1, 1)
    factor = 0
    for u in torch.split(u_N, _CHUNK):
        b = nearest(u.unsqueeze(0), scale, grid)
        if bool((b == 1).any()):
            return 1.0
        factor = math.gcd(factor, *(int(level) for level in torch.unique(b)))
    return float(factor)


def _cell_bound(highs: Tensor, lows: Tensor, at_high: _Bounds, at_low: _Bounds) -> Tensor:
    """An upper bound of V inside the cells: two lines from the edges, each with the steepest slope possible."""
    rise = 2 * (at_low.s1_high - lows * at_high.s2_low)
    fall = 2 * (at_high.s1_low - highs * at_low.s2_high)
    width, v_high, v_low = highs - lows, at_high.v_high, at_low.v_high
    meet = (v_high - v_low - fall * width) / (rise - fall).clamp(min=torch.finfo(highs.dtype).tiny)
    return torch.maximum(torch.maximum(v_low, v_high), v_low + rise * torch.minimum(meet.clamp(min=0), width))


class _Bins:
    """One row in bins of magnitude: its sums at any alpha, up to the entries that share a bin with a threshold.

    A bin holds the floats that share sign, exponent and the first digits of the mantissa: neighbours in bins are
    neighbours in magnitude, and a bin is a 2^-10th of its magnitude wide.
    """

    def __init__(self, u_N: Tensor, d_N: Tensor, grid: Grid) -> None:
        self.levels, self.mids = _magnitudes(grid).to(u_N.device), _mids(grid).to(u_N.device)
        self.dtype = u_N.dtype
        low, high = torch.aminmax(u_N)
        self.first = int(self._bits(low))
        size = int(self._bits(high)) - self.first + 1
        d_sum, du_sum = (u_N.new_zeros(size, dtype=torch.float64) for _ in range(2))
        for u, d in zip(torch.split(u_N, _CHUNK), torch.split(d_N, _CHUNK), strict=True):
            index, wide = self.of(u), d.double()
            d_sum += torch.bincount(index, wide, size)
            du_sum += torch.bincount(index, wide * u, size)
        zero = d_sum.new_zeros(1)
        # Sums over a bin and all above it; none above the last.
        self.d_above, self.du_above = (torch.cat([s.flip(0).cumsum(0).flip(0), zero]) for s in (d_sum, du_sum))
        self.smallest = (torch.where(u_N > 0, u_N, torch.inf).min() if low == 0 else low).double()

    def of(self, u: Tensor) -> Tensor:
        """The bin of magnitudes."""
        return self._bits(u) - self.first

    def _bits(self, u: Tensor) -> Tensor:
        kind, digits = (torch.int64, 52) if self.dtype == torch.float64 else (torch.int32, 23)
        return u.to(self.dtype).view(kind) >> (digits - _DIGITS)

    def _floats(self, bits: Tensor) -> Tensor:
        """The lower end of a bin."""
        kind, digits = (torch.int64, 52) if self.dtype == torch.float64 else (torch.int32, 23)
        return (bits.to(kind) << (digits - _DIGITS)).view(self.dtype).double()

    def around(self, alpha_C: Tensor) -> Tensor:
        """(C, K): the bin that the threshold of every step lies in; -1 below all, the number of bins above all."""
        bits = self._bits((alpha_C.unsqueeze(1) * self.mids).clamp(max=torch.finfo(self.dtype).max))
        return (bits - self.first).clamp(-1, len(self.d_above) - 1).long()

    def bounds(self, alpha_C: Tensor) -> _Bounds:
        """S1, S2 and V with the entries in the bin of a threshold inside it, and outside."""
        bin_CK = self.around(alpha_C)
        inside, outside = (i.clamp(0, len(self.d_above) - 1) for i in (bin_CK, bin_CK + 1))
        s1_high, s2_high = self._sums(self.d_above[inside], self.du_above[inside])
        s1_low, s2_low = self._sums(self.d_above[outside], self.du_above[outside])
        # An entry outside its best step costs at most what it would gain at the upper end of its bin.
        threshold_CK = alpha_C.unsqueeze(1) * self.mids
        reach_CK = (self._floats((bin_CK + 1 + self.first).clamp(min=0)) - threshold_CK).clamp(min=0)
        weight_CK = self.d_above[inside] - self.d_above[outside]
        missed = torch.where(weight_CK > 0, weight_CK * reach_CK, 0.0) * self.levels.diff()
        v = (2 * s1_low - alpha_C * s2_low) * alpha_C + 2 * alpha_C * missed.sum(1)
        return _Bounds(s1_low, s2_low, s1_high, s2_high, v)

    def _sums(self, d_CK: Tensor, du_CK: Tensor) -> tuple[Tensor, Tensor]:
        s1 = self.levels[0] * self.du_above[0] + (du_CK * self.levels.diff()).sum(1)
        s2 = self.levels[0] ** 2 * self.d_above[0] + (d_CK * self.levels.square().diff()).sum(1)
        return s1, s2

    def candidates(self, cells: _Cells) -> int:
        """Entries cannot be told apart here: as many as there can be, until the cells are narrow."""
        return _DIRECT + 1 if len(cells.highs) else 0

    def touched(self, cells: _Cells) -> Tensor:
        """Which bins hold entries that take a step inside the cells, and so are not settled: bool (bins,)."""
        size = len(self.d_above) - 1
        first, last = self.around(cells.lows).clamp(0, size - 1), self.around(cells.highs).clamp(-1, size - 1)
        edges = torch.zeros(size + 1, dtype=torch.int64, device=first.device)
        edges.index_add_(0, first.flatten(), torch.ones_like(first).flatten())
        edges.index_add_(0, last.flatten() + 1, -torch.ones_like(last).flatten())
        return edges.cumsum(0)[:-1] > 0


class _Near:
    """The entries near the thresholds, in order of magnitude, and the rest in bins: exact sums at every alpha of the cells."""

    def __init__(self, bins: _Bins, u_N: Tensor, d_N: Tensor, cells: _Cells) -> None:
        self.bins = bins
        touched = bins.touched(cells)
        picked = [
            (u[at].double(), d[at].double())
            for u, d in zip(torch.split(u_N, _CHUNK), torch.split(d_N, _CHUNK), strict=True)
            for at in [touched.index_select(0, bins.of(u)).nonzero().squeeze(1)]
        ]
        u, d = (torch.cat(parts) for parts in zip(*picked, strict=True))
        self.u_M, order = u.sort(descending=True)
        self.d_M = d[order]
        zero = u.new_zeros(1)
        self.d_sum = torch.cat([zero, self.d_M.cumsum(0)])
        self.du_sum = torch.cat([zero, (self.d_M * self.u_M).cumsum(0)])
        # What the bins hold without the entries picked.
        settled = torch.cat([~touched, touched.new_zeros(1)])
        per_bin = [torch.where(settled, above - above.roll(-1), 0.0) for above in (bins.d_above, bins.du_above)]
        self.d_rest, self.du_rest = (s.flip(0).cumsum(0).flip(0) for s in per_bin)

    def _taken(self, alpha_C: Tensor) -> Tensor:
        """(C, K): how many of the entries picked have made step k when alpha has come down to a value."""
        return torch.searchsorted(-self.u_M, -alpha_C.unsqueeze(1) * self.bins.mids, right=True)

    def _sums(self, alpha_C: Tensor, taken_CK: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.bins.levels
        above = (self.bins.around(alpha_C) + 1).clamp(
            0, len(self.d_rest) - 1
        )  # a threshold's own bin is settled only if nobody is in it
        d_CK, du_CK = self.d_sum[taken_CK] + self.d_rest[above], self.du_sum[taken_CK] + self.du_rest[above]
        s1 = levels[0] * self.bins.du_above[0] + (du_CK * levels.diff()).sum(1)
        s2 = levels[0] ** 2 * self.bins.d_above[0] + (d_CK * levels.square().diff()).sum(1)
        return s1, s2

    def bounds(self, alpha_C: Tensor) -> _Bounds:
        """S1, S2 and V: exact, so that their bounds coincide."""
        s1, s2 = self._sums(alpha_C, self._taken(alpha_C))
        return _Bounds(s1, s2, s1, s2, (2 * s1 - alpha_C * s2) * alpha_C)

    def candidates(self, cells: _Cells) -> int:
        """How many steps are taken inside the cells."""
        return int((self._taken(cells.lows) - self._taken(cells.highs)).sum())

    def best_between(self, high: Tensor, low: Tensor) -> tuple[float, Tensor]:
        """The best value of all candidates in a cell, its edges included, and its alpha."""
        levels, mids = self.bins.levels, self.bins.mids
        first, last = self._taken(high.view(1)), self._taken(low.view(1))
        steps = [torch.arange(int(a), int(b), device=mids.device) for a, b in zip(first[0], last[0], strict=True)]
        index = torch.cat(steps)
        step = torch.repeat_interleave(torch.arange(len(steps), device=mids.device), (last - first)[0])
        by_alpha = (self.u_M[index] / mids[step]).argsort(descending=True)
        index, step = index[by_alpha], step[by_alpha]
        s1, s2 = self._sums(high.view(1), first)
        s1 = torch.cat([s1, s1 + (self.d_M[index] * self.u_M[index] * levels.diff()[step]).cumsum(0)])
        s2 = torch.cat([s2, s2 + (self.d_M[index] * levels.square().diff()[step]).cumsum(0)])
        values = _value(s1, s2)
        at = _first_best(values)
        return float(values[at]), _ratio(s1, s2, at)


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


def _value(s1: Tensor, s2: Tensor) -> Tensor:
    """S1^2 / S2, and 0 for the candidate in which no entry has left zero."""
    return torch.where(s2 > 0, s1.square() / torch.where(s2 > 0, s2, 1.0), 0.0)


def _ratio(s1: Tensor, s2: Tensor, at: Tensor) -> Tensor:
    s1, s2 = s1.gather(-1, at), s2.gather(-1, at)
    return torch.where(s2 > 0, s1 / torch.where(s2 > 0, s2, 1.0), 0.0)


def _magnitudes(grid: Grid) -> Tensor:
    return torch.tensor(grid.magnitudes, dtype=torch.float64) / grid.largest


def _mids(grid: Grid) -> Tensor:
    levels = _magnitudes(grid)
    return (levels[:-1] + levels[1:]) / 2
