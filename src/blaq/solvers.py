"""The two solvers of the projection: the scale alpha of every row, from magnitudes and curvature.

Both see magnitudes ``u = |w| >= 0`` and curvature ``d >= 0``, (R, N), and return alpha in float64, (R, 1), relative to
levels divided by the largest one. They compute in float64: a row may have 10^8 entries, and products of small weights
with a small curvature leave float32.

Write S1 = sum d b u and S2 = sum d b^2. For fixed levels b the best alpha is S1/S2 and leaves sum d u^2 - S1^2/S2; so the
optimum has the largest S1^2/S2 among the levels that rounding at some alpha gives.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blaq.grids import Grid

MAX_ROUNDS = 10
TOLERANCE = 1e-6  # relative move of alpha at which the alternation ends
_TIE = 1e-12  # relative difference below which two optima are equal
_LONG = 2**16  # breakpoints of a row above which the range of alpha is cut before they are sorted
_DIRECT = 2**20  # breakpoints that are sorted at once
_BLOCK = 2**16  # entries that are added up at once
_FEW = 3  # steps that are faster counted than looked up
_CELLS, _PARTS = 1024, 8  # cuts of the range of alpha, the first and the later ones


def exact(u_RN: Tensor, d_RN: Tensor, grid: Grid) -> Tensor:
    """The global optimum of every row.

    alpha walks from infinity to 0. An entry steps outward, from level l_{k-1} to l_k, when alpha passes u / mid_k with
    mid_k = (l_{k-1} + l_k) / 2; every such breakpoint ends one candidate for b. O(NK log NK) for a row.

    Source: Hou and Kwok, ICLR 2018, proposition 3.2 (ternary), for any grid.
    """
    rows, n = u_RN.shape
    steps = len(grid.magnitudes) - 1
    if steps == 0:  # LAB's closed form
        return _dot(u_RN, d_RN) / _total(d_RN)
    if steps > 1 and n * steps > _LONG:
        alphas = [_bracketed(u.double(), d.double(), grid) for u, d in zip(u_RN, d_RN, strict=True)]
        return torch.stack(alphas).view(rows, 1)
    chunk = max(1, _DIRECT // (n * steps))
    pairs = zip(torch.split(u_RN, chunk), torch.split(d_RN, chunk), strict=True)
    return torch.cat([_direct(u.double(), d.double(), grid) for u, d in pairs])


def alternating(u_RN: Tensor, d_RN: Tensor, grid: Grid, start_R1: Tensor) -> Tensor:
    """A local optimum: b <- nearest levels at alpha, alpha <- S1/S2, until alpha rests.

    Starts from ``start`` (float64), where that is 0 from the weighted mean of u over the mean level; from the largest u
    where that rounds every entry to zero. At most 10 rounds.

    Source: Hou and Kwok, ICLR 2018, algorithm 1 and section 3.2 (LAT-a, LAQ).
    """
    largest = u_RN.amax(1, keepdim=True).double()
    mean_u = _dot(u_RN, d_RN) / _total(d_RN)
    mean_level = float(grid.levels.abs().double().mean()) / grid.largest
    alpha = torch.where(start_R1 > 0, start_R1, mean_u / mean_level)
    if grid.has_zero:
        alpha = torch.where(largest < alpha * _mids(grid)[0], largest, alpha)
    alpha = torch.where(largest > 0, alpha, 0.0)
    moving = largest > 0
    for _ in range(MAX_ROUNDS):
        s1, s2 = _sums_at(u_RN, d_RN, alpha, grid)
        new = torch.where(moving, s1 / s2, alpha)
        moving = (new - alpha).abs() > TOLERANCE * alpha
        alpha = new
        if not moving.any():
            break
    return alpha


def outward_steps(u_RN: Tensor, scale: Tensor, grid: Grid, *, unit: float) -> Tensor:
    """How many levels outward the nearest level to ``u / scale * unit`` lies: int32 (R, N); none where the scale is 0.

    ``scale`` broadcasts over u, in its dtype: alpha with ``unit = grid.largest``, or alpha / largest with ``unit = 1``.
    """
    mids = _mids(grid) * (grid.largest / unit)
    ratio = u_RN / torch.where(scale > 0, scale, torch.inf)
    if len(mids) <= _FEW:
        steps = torch.zeros_like(ratio, dtype=torch.int32)
        for mid in mids.to(ratio.dtype).tolist():
            steps += ratio >= mid
        return steps
    return torch.bucketize(ratio, mids.to(ratio), right=True, out_int32=True)


def _direct(u_RN: Tensor, d_RN: Tensor, grid: Grid) -> Tensor:
    """Sort every breakpoint of every row."""
    levels, mids = _magnitudes(grid).to(u_RN.device), _mids(grid).to(u_RN.device)
    order = (u_RN.unsqueeze(2) / mids).flatten(1).argsort(dim=1, descending=True)
    gain1 = ((d_RN * u_RN).unsqueeze(2) * levels.diff()).flatten(1).gather(1, order)
    gain2 = (d_RN.unsqueeze(2) * levels.square().diff()).flatten(1).gather(1, order)
    base1, base2 = levels[0] * (d_RN * u_RN).sum(1, keepdim=True), levels[0] ** 2 * d_RN.sum(1, keepdim=True)
    s1 = torch.cat([base1, base1 + gain1.cumsum(1)], 1)
    s2 = torch.cat([base2, base2 + gain2.cumsum(1)], 1)
    return _ratio(s1, s2, _first_best(_value(s1, s2)))


def _bracketed(u_N: Tensor, d_N: Tensor, grid: Grid) -> Tensor:
    """The same for one long row: sort N magnitudes instead of NK breakpoints, then cut the range of alpha.

    V(alpha) = max_b 2 alpha S1 - alpha^2 S2 has the maximum sought, and slope 2 S1 - 2 alpha S2. S1 and S2 only grow as
    alpha falls, which bounds the slope, and so V, inside any cell of alphas. Cells that cannot reach a value already
    found are dropped, the rest is cut, until few breakpoints are left; these are tried one and all.
    """
    prefix = _Prefix(u_N, d_N, grid)
    best = (-1.0, u_N.new_zeros(1))
    highs, lows = _first_cells(prefix, grid)
    while len(highs):
        taken_high, taken_low = prefix.taken(highs), prefix.taken(lows)
        for taken in (taken_high, taken_low):
            best = _better(best, _best_candidate(*prefix.sums(taken)))
        bound = _cell_bound(highs, lows, prefix.sums(taken_high), prefix.sums(taken_low))
        # Candidates that part equal entries lie between the two ends of the tie, whose values are the cell's edges.
        keep = (bound >= best[0] * (1 - _TIE)) & (highs > lows * (1 + 1e-12))
        highs, lows, taken_high, taken_low = highs[keep], lows[keep], taken_high[keep], taken_low[keep]
        if (taken_low - taken_high).sum() <= _DIRECT:
            for first, last in zip(taken_high, taken_low, strict=True):
                best = _better(best, prefix.best_between(first, last))
            break
        cuts = lows.unsqueeze(1) + (highs - lows).unsqueeze(1) * _ramp(_PARTS, highs)
        highs, lows = cuts[:, 1:].flatten(), cuts[:, :-1].flatten()
    # Multiples of the same levels are equally good: take the smallest, as the short rows do.
    used = torch.bincount(outward_steps(u_N, best[1], grid, unit=grid.largest)).nonzero()
    return best[1] * float(math.gcd(*(grid.magnitudes[k] for k in used)))


class _Prefix:
    """One row in order of magnitude: S1 and S2 at any alpha from K look-ups in cumulative sums."""

    def __init__(self, u_N: Tensor, d_N: Tensor, grid: Grid) -> None:
        self.levels, self.mids = _magnitudes(grid).to(u_N.device), _mids(grid).to(u_N.device)
        self.u_N, order = u_N.sort(descending=True)
        self.d_N = d_N[order]
        zero = u_N.new_zeros(1)
        self.du_sum, self.d_sum = (
            torch.cat([zero, (self.d_N * self.u_N).cumsum(0)]),
            torch.cat([zero, self.d_N.cumsum(0)]),
        )

    def taken(self, alpha_C: Tensor) -> Tensor:
        """(C, K): how many entries have made step k when alpha has come down to a value."""
        return torch.searchsorted(-self.u_N, -alpha_C.unsqueeze(1) * self.mids, right=True)

    def sums(self, taken_CK: Tensor) -> tuple[Tensor, Tensor]:
        """S1 and S2, (C,)."""
        s1 = self.levels[0] * self.du_sum[-1] + (self.du_sum[taken_CK] * self.levels.diff()).sum(1)
        s2 = self.levels[0] ** 2 * self.d_sum[-1] + (self.d_sum[taken_CK] * self.levels.square().diff()).sum(1)
        return s1, s2

    def best_between(self, first_K: Tensor, last_K: Tensor) -> tuple[float, Tensor]:
        """The best of all candidates between two alphas, each told by the entries taken there."""
        steps = [torch.arange(int(a), int(b), device=self.u_N.device) for a, b in zip(first_K, last_K, strict=True)]
        index = torch.cat(steps)
        step = torch.repeat_interleave(torch.arange(len(steps), device=index.device), last_K - first_K)
        by_alpha = (self.u_N[index] / self.mids[step]).argsort(descending=True)
        index, step = index[by_alpha], step[by_alpha]
        s1, s2 = self.sums(first_K.unsqueeze(0))
        s1 = s1 + (self.d_N[index] * self.u_N[index] * self.levels.diff()[step]).cumsum(0)
        s2 = s2 + (self.d_N[index] * self.levels.square().diff()[step]).cumsum(0)
        return _best_candidate(s1, s2) if len(index) else (-1.0, s1)


def _first_cells(prefix: _Prefix, grid: Grid) -> tuple[Tensor, Tensor]:
    """Cells (high, low) over every alpha that can be the optimum.

    When all levels in use could be doubled (tripled where only odd levels exist), half (a third of) alpha does as well:
    so the largest entry may be taken to reach a level that cannot. Below the lowest alpha every entry is outermost.
    """
    if prefix.u_N[0] == 0:
        return prefix.u_N[:0], prefix.u_N[:0]
    factor = 2 if grid.has_zero else 3
    reach = next(k for k, level in enumerate(grid.magnitudes) if level * factor > grid.magnitudes[-1])
    high = prefix.u_N[0] / prefix.mids[max(reach, 1) - 1] * 1.001
    low = prefix.u_N[prefix.u_N > 0][-1] / prefix.mids[-1] * 0.999
    edges = (low.log() + (high.log() - low.log()) * _ramp(_CELLS, prefix.u_N)).exp()
    return edges[1:], edges[:-1]


def _cell_bound(highs: Tensor, lows: Tensor, at_high: tuple[Tensor, Tensor], at_low: tuple[Tensor, Tensor]) -> Tensor:
    """An upper bound of V inside the cells: two lines from the edges, each with the steepest slope possible."""
    (s1_high, s2_high), (s1_low, s2_low) = at_high, at_low
    v_high, v_low = (2 * s1_high - highs * s2_high) * highs, (2 * s1_low - lows * s2_low) * lows
    rise, fall = 2 * (s1_low - lows * s2_high), 2 * (s1_high - highs * s2_low)
    width = highs - lows
    meet = (v_high - v_low - fall * width) / (rise - fall).clamp(min=torch.finfo(highs.dtype).tiny)
    return torch.maximum(torch.maximum(v_low, v_high), v_low + rise * torch.minimum(meet.clamp(min=0), width))


def _ramp(parts: int, like: Tensor) -> Tensor:
    return torch.linspace(0, 1, parts + 1, dtype=like.dtype, device=like.device)


def _best_candidate(s1: Tensor, s2: Tensor) -> tuple[float, Tensor]:
    values = _value(s1, s2)
    at = _first_best(values)
    return float(values[at]), _ratio(s1, s2, at)


def _better(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> tuple[float, Tensor]:
    tie = abs(one[0] - other[0]) <= _TIE * one[0]
    return max(one, other, key=lambda candidate: float(candidate[1]) if tie else candidate[0])


def _dot(a_RN: Tensor, b_RN: Tensor) -> Tensor:
    """The sums of a*b over the rows: float64, (R, 1)."""
    return _add_up(lambda a, b: (a * b).sum(1, keepdim=True), a_RN, b_RN)


def _total(d_RN: Tensor) -> Tensor:
    """The sums over the rows: float64, (R, 1)."""
    return _add_up(lambda d: d.sum(1, keepdim=True), d_RN)


def _sums_at(u_RN: Tensor, d_RN: Tensor, alpha_R1: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """S1 and S2, (R, 1), for the levels nearest at alpha."""
    magnitudes = _magnitudes(grid).to(u_RN.device)

    def sums(u: Tensor, d: Tensor, alpha: Tensor) -> Tensor:
        b = magnitudes[outward_steps(u, alpha, grid, unit=grid.largest)]
        db = d * b
        return torch.stack([(db * u).sum(1), (db * b).sum(1)], dim=1)

    both = _add_up(sums, u_RN, d_RN, alpha_R1.expand_as(u_RN))
    return both[:, :1], both[:, 1:]


def _add_up(sums: Callable[..., Tensor], *tensors_RN: Tensor) -> Tensor:
    """Sums over the rows, (R, ..), of functions of entries, in float64: block by block, so that wide copies stay in cache."""
    rows = max(1, _BLOCK // max(1, tensors_RN[0].shape[1]))
    found = []
    for some_rows in zip(*(torch.split(t, rows) for t in tensors_RN), strict=True):
        blocks = zip(*(torch.split(t, _BLOCK, dim=1) for t in some_rows), strict=True)
        found.append(torch.stack([sums(*(t.double() for t in block)) for block in blocks]).sum(0))
    return torch.cat(found)


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
