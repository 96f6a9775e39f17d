"""The sums S1 and S2 of one long row at any scale, without sorting it: what the exact solver asks, see `blaq.exact`.

`Bins` knows them up to the entries that share a bin with a threshold, from one pass over the row; `Near` exactly, from the
entries near the thresholds of some scales. Nothing of the size of the row is made: both see some entries at a time.

Shape suffixes: N entries, C scales, K outward steps of the grid, B bins, M entries picked.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from blaq.grids import Grid

_SMALL = 2.0**-100  # magnitudes below go to float64: float32 has few digits left for them
# Binary digits of the mantissa that tell bins apart: the more, the fewer entries are picked.
_DIGITS, _MORE_DIGITS = 10, 12
_LONG = 2**24  # entries from which more bins, which take longer to look through, pay back
_OCTAVES = 32  # powers of two below the largest magnitude that have bins; what is smaller shares the lowest bin
_WORD = 8  # flags that are looked at together
_ROOM = 2**16  # entries picked that there is room for at first
_SHARE = 8  # so much of a row is picked at once at most: what is made of those takes several times their memory


class Loops(NamedTuple):
    """The loops over all entries of a row: as they are, or compiled."""

    add: Callable[["Row", Tensor, int], Tensor]
    """`added` of `add_into_bins` over a row."""
    mark: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    chunk: int
    """Entries that are marked at once."""
    intervals: tuple[int, ...]
    """How many are marked by comparison, up to the last; more are looked up."""
    fill: bool
    """Whether there must be as many as one of these says: compiled code is for one number of them."""


class Cells(NamedTuple):
    """Intervals of alpha, (C,), from the highest to the lowest; best: a value of S1^2/S2 that is reached."""

    highs: Tensor
    lows: Tensor
    best: float


class Bounds(NamedTuple):
    """At some alphas, (C,): S1 and S2 from below and from above, and V from above."""

    s1_low: Tensor
    s2_low: Tensor
    s1_high: Tensor
    s2_high: Tensor
    v_high: Tensor


class Row(NamedTuple):
    """One long row: weights, curvature, and the dtype and the digits in which magnitudes are told apart."""

    w: Tensor
    d: Tensor
    dtype: torch.dtype
    digits: int
    loops: Loops

    @staticmethod
    def of(w_N: Tensor, d_N: Tensor, largest: Tensor, loops: Loops) -> "Row":
        """A row whose magnitudes go up to `largest`; very small ones are told apart in float64, as they are."""
        digits = _DIGITS if len(w_N) < _LONG else _MORE_DIGITS
        if largest >= _SMALL or w_N.dtype == torch.float64:
            return Row(w_N, d_N, w_N.dtype, digits, loops)
        return Row(w_N, d_N, torch.float64, digits, PLAIN)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and curvature, some entries at a time."""
        for w, d in zip(*(torch.split(t, self.loops.chunk) for t in (self.w, self.d)), strict=True):
            yield w.to(self.dtype), d


def magnitudes(grid: Grid) -> Tensor:
    """The levels >= 0 over the largest one, ascending: float64 (K + 1,)."""
    return torch.tensor(grid.magnitudes, dtype=torch.float64) / grid.largest


def thresholds(grid: Grid) -> Tensor:
    """Half way between neighbouring magnitudes: float64 (K,)."""
    levels = magnitudes(grid)
    return (levels[:-1] + levels[1:]) / 2


# --- bins of magnitude ----------------------------------------------------------------------------------------------------


def add_into_bins(digits: int, w_N: Tensor, d_N: Tensor, starts: Tensor, d_B: Tensor, du_B: Tensor) -> None:
    """Add d and d u of every entry to its bin, in place.

    ``starts``: the number of the first bin; where either sign has bins of its own, also where those of entries that are not
    negative start.
    """
    index = (_bits(w_N.abs(), digits) - starts[0]).clamp(min=0)
    if len(starts) > 1:
        index = index + (w_N >= 0) * starts[1]
    index, wide = index.long(), d_N.double()
    d_B.scatter_add_(0, index, wide)
    du_B.scatter_add_(0, index, wide * w_N.abs().double())


def added(row: Row, starts: Tensor, size: int) -> Tensor:
    """What `add_into_bins` adds up of a row, in bins of both kinds: float64 (2, size)."""
    bins = torch.zeros(2, size, dtype=torch.float64, device=row.w.device)
    for w, d in row.chunks():
        add_into_bins(row.digits, w, d, starts, *bins)
    return bins


def sums_in_bins(row: Row, grid: Grid, largest: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sums of d and of d u in every bin, float64 (S, B), and the number of the first bin.

    A bin holds the floats that share exponent and first digits of the mantissa: neighbours in bins are neighbours in
    magnitude, and a bin is a 2^-10th or 2^-12th of its magnitude wide; but the lowest goes down to 0.
    """
    top = int(_bits(largest.to(row.dtype), row.digits))
    first = max(top - (_OCTAVES << row.digits), 0)
    size = top - first + 1
    starts = torch.tensor([first, size][: grid.scales], dtype=_integers(row.dtype)[0], device=row.w.device)
    d_SB, du_SB = row.loops.add(row, starts, grid.scales * size).view(2, grid.scales, size)
    return d_SB, du_SB, first


def mark(w_N: Tensor, limits_I2: Tensor, takes_2: Tensor, flags_N: Tensor) -> None:
    """Flag the entries with a magnitude in one of the intervals [low, high); `takes`: 1, or 0 to leave out negative entries,
    and the others.
    """
    u = w_N.abs()
    inside = torch.zeros_like(u)
    for low, high in limits_I2.unbind():
        inside = torch.where(u >= low, torch.where(u < high, 1.0, inside), inside)
    flags_N.copy_(inside * torch.where(w_N < 0, takes_2[0], takes_2[1]))


# Their wide copies stay in cache.
PLAIN = Loops(added, mark, chunk=2**16, intervals=(2,), fill=False)


def largest_first(u_RM: Tensor) -> Tensor:
    """The order of the magnitudes of every row, the largest first, (R, M); of one row, (M,).

    Their bits are in the order of the floats, and torch sorts a long row of integers in a fraction of the time of floats,
    if upward.
    """
    downward = u_RM.view(_integers(u_RM.dtype)[0]).bitwise_not()
    return downward.squeeze(0).argsort(-1).view_as(downward)


def _bits(u: Tensor, digits: int) -> Tensor:
    kind, all_digits = _integers(u.dtype)
    return u.view(kind) >> (all_digits - digits)


def _integers(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The integers of the size of a float, and the digits of its mantissa."""
    return (torch.int64, 52) if dtype == torch.float64 else (torch.int32, 23)


class Bins:
    """One side of a row in bins of magnitude: its sums at any alpha, up to the entries that share a bin with a threshold."""

    def __init__(self, d_B: Tensor, du_B: Tensor, first: int, row: Row, grid: Grid) -> None:
        self.levels, self.mids = magnitudes(grid).to(d_B.device), thresholds(grid).to(d_B.device)
        # Of b and of b^2, step by step outward.
        self.rises, self.rises2 = self.levels.diff(), self.levels.square().diff()
        self.first, self.dtype, self.digits = first, row.dtype, row.digits
        occupied = d_B > 0
        if self.dtype == torch.float32 and bool((du_B[1:] > 0).any()):
            # Zeros, which share the lowest bin with what is very small, never step outward. No product of float32 vanishes.
            occupied[0] = du_B[0] > 0
        self.lowest = occupied.nonzero()[0]
        zero = d_B.new_zeros(1)
        # Sums over a bin and all above it; none above the last.
        self.d_above, self.du_above = (torch.cat([s.flip(0).cumsum(0).flip(0), zero]) for s in (d_B, du_B))
        self.s1_base, self.s2_base = self.levels[0] * self.du_above[0], self.levels[0] ** 2 * self.d_above[0]

    def floats(self, bins: Tensor) -> Tensor:
        """The lower end of bins, float64; that of the lowest is 0."""
        kind, all_digits = _integers(self.dtype)
        low = ((bins + self.first).clamp(min=0).to(kind) << (all_digits - self.digits)).view(self.dtype).double()
        return torch.where(bins <= 0, 0.0, low)

    def around(self, alpha_C: Tensor) -> Tensor:
        """(C, K): the bin that the threshold of every step lies in; the number of bins above all."""
        threshold_CK = (alpha_C.unsqueeze(1) * self.mids).clamp(max=torch.finfo(self.dtype).max)
        return (_bits(threshold_CK.to(self.dtype), self.digits) - self.first).clamp(0, len(self.d_above) - 1).long()

    def bounds(self, alpha_C: Tensor) -> Bounds:
        """S1, S2 and V with the entries in the bin of a threshold inside it, and outside."""
        inside = self.around(alpha_C)
        outside = (inside + 1).clamp(max=len(self.d_above) - 1)
        s1_high, s2_high = self.sums(self.d_above[inside], self.du_above[inside])
        s1_low, s2_low = self.sums(self.d_above[outside], self.du_above[outside])
        # An entry outside its best step costs at most what it would gain at the upper end of its bin.
        reach_CK = (self.floats(inside + 1) - alpha_C.unsqueeze(1) * self.mids).clamp(min=0)
        weight_CK = self.d_above[inside] - self.d_above[outside]
        missed = torch.where(weight_CK > 0, weight_CK * reach_CK, 0.0) * self.rises
        v = (2 * s1_low - alpha_C * s2_low) * alpha_C + 2 * alpha_C * missed.sum(1)
        return Bounds(s1_low, s2_low, s1_high, s2_high, v)

    def sums(self, d_CK: Tensor, du_CK: Tensor) -> tuple[Tensor, Tensor]:
        """S1 and S2, (C,), from the sums of d and d u over the entries that have made each step."""
        return self.s1_base + (du_CK * self.rises).sum(1), self.s2_base + (d_CK * self.rises2).sum(1)

    def unsettled(self, cells: Cells) -> Tensor:
        """Which bins hold entries that take a step inside the cells: bool (B,)."""
        size = len(self.d_above) - 1
        first, last = self.around(cells.lows), self.around(cells.highs)
        edges = torch.zeros(size + 1, dtype=torch.int64, device=first.device)
        edges.index_add_(0, first.flatten(), torch.ones_like(first).flatten())
        edges.index_add_(0, (last + 1).clamp(max=size).flatten(), -torch.ones_like(last).flatten())
        return edges.cumsum(0)[:-1] > 0


# --- entries near the thresholds ------------------------------------------------------------------------------------------


class Near:
    """The entries in unsettled bins, in order of magnitude, and the rest in bins: exact sums at every alpha of the cells."""

    @staticmethod
    def of(bins: Bins, row: Row, side: int | None, cells: Cells) -> "Near | None":
        """Those near the thresholds of some cells; None where they are so many that the cells had better be seen in parts."""
        unsettled = bins.unsettled(cells)
        most = max(len(row.w) // _SHARE, _ROOM) if len(cells.highs) > 1 else len(row.w)
        picked = _picked(bins, row, side, unsettled, most)
        return None if picked is None else Near(bins, unsettled, *picked)

    def __init__(self, bins: Bins, unsettled: Tensor, minus_u_M: Tensor, d_M: Tensor) -> None:
        self.bins, self.minus_u_M, self.d_M = bins, minus_u_M, d_M
        # Sums of those before each place, written where they stay: M may be some percent of the row.
        self.d_sum, self.du_sum = (self.minus_u_M.new_zeros(len(self.d_M) + 1) for _ in range(2))
        torch.cumsum(self.d_M, 0, dtype=torch.float64, out=self.d_sum[1:])
        torch.mul(self.minus_u_M, self.d_M, out=self.du_sum[1:]).neg_().cumsum_(0)
        # What the bins hold without the entries picked.
        settled = torch.cat([~unsettled, unsettled.new_zeros(1)])
        per_bin = [torch.where(settled, above - above.roll(-1), 0.0) for above in (bins.d_above, bins.du_above)]
        self.d_rest, self.du_rest = (s.flip(0).cumsum(0).flip(0) for s in per_bin)

    def taken(self, alpha_C: Tensor) -> Tensor:
        """(C, K): how many of the entries picked have made step k when alpha has come down to a value."""
        return torch.searchsorted(self.minus_u_M, -alpha_C.unsqueeze(1) * self.bins.mids, right=True)

    def sums(self, alpha_C: Tensor, taken_CK: Tensor) -> tuple[Tensor, Tensor]:
        """S1 and S2, (C,)."""
        above = (self.bins.around(alpha_C) + 1).clamp(max=len(self.d_rest) - 1)
        # A threshold's own bin is settled only if nobody is in it.
        d_CK, du_CK = self.d_sum[taken_CK] + self.d_rest[above], self.du_sum[taken_CK] + self.du_rest[above]
        return self.bins.sums(d_CK, du_CK)

    def bounds(self, alpha_C: Tensor) -> Bounds:
        """S1, S2 and V: exact, so that their bounds coincide."""
        s1, s2 = self.sums(alpha_C, self.taken(alpha_C))
        return Bounds(s1, s2, s1, s2, (2 * s1 - alpha_C * s2) * alpha_C)


def _picked(bins: Bins, row: Row, side: int | None, unsettled_B: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """The entries in unsettled bins, the largest first, (M,): minus the magnitude, float64, and curvature; None if they are
    more than `most`.
    """
    edges = torch.nn.functional.pad(unsettled_B.to(torch.int8), (1, 1)).diff().nonzero().view(-1, 2)
    limits_I2 = torch.where(edges < len(unsettled_B), bins.floats(edges), torch.inf).to(row.dtype)
    places = next((count for count in row.loops.intervals if len(edges) <= count), None)  # of a loop; None: too many
    if places is not None and row.loops.fill:
        limits_I2 = torch.nn.functional.pad(limits_I2, (0, 0, 0, places - len(edges)), value=torch.inf)
    takes = torch.tensor([side != 1, side != 0], dtype=row.dtype, device=row.w.device)
    if places is None:
        row = row._replace(loops=PLAIN)
    found = _Growing(row.w.new_empty(2, _ROOM, dtype=row.dtype))
    for w, d in row.chunks() if len(edges) else ():
        flags = torch.empty_like(w, dtype=torch.uint8)
        if places is not None:
            row.loops.mark(w, limits_I2, takes, flags)
        else:
            index = (_bits(w.abs(), row.digits) - bins.first).clamp(min=0)
            flags.copy_(unsettled_B.index_select(0, index) * torch.where(w < 0, takes[0], takes[1]))
        at = _where(flags)
        if found.count + len(at) > most:
            return None
        found.append(w[at].abs(), d[at])
    order = largest_first(found.all[0])
    u, d = found.all[:, order]
    return u.double().neg_(), d


class _Growing:
    """Pairs of numbers put one after the other into one piece of memory.

    Many small pieces would each be kept where memory of a chunk has just been let go, and keep the next chunk from it.
    """

    def __init__(self, room_2N: Tensor) -> None:
        self.count, self._room = 0, room_2N

    def append(self, *both: Tensor) -> None:
        """Copy more of them there."""
        end = self.count + len(both[0])
        if end > self._room.shape[1]:
            larger = self._room.new_empty(2, 2 * end)
            larger[:, : self.count] = self.all
            self._room = larger
        for to, values in zip(self._room[:, self.count : end], both, strict=True):
            to.copy_(values)
        self.count = end

    @property
    def all(self) -> Tensor:
        """(2, M)."""
        return self._room[:, : self.count]


def _where(flags_N: Tensor) -> Tensor:
    """The positions of the few flags that are set: words of flags first, most of which are empty."""
    n = flags_N.numel()
    if n % _WORD:
        return flags_N.nonzero().squeeze(1)
    words = flags_N.view(torch.int64).nonzero()
    positions = words * _WORD + torch.arange(_WORD, device=flags_N.device)
    return positions[flags_N.view(-1, _WORD)[words.squeeze(1)] > 0]
