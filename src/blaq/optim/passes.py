"""The passes over the weights that a step makes: the update with what the projection needs, and writing the values.

Plain functions of matrices in rows, (R, N), and of numbers; run as they are, or compiled. Compiled code goes over the
memory twice a step: once to advance moments and latent weights and to add up what the scale needs, once to write.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blaq.bins import PLAIN, Loops, add_into_bins, mark
from blaq.grids import Grid
from blaq.optim import compiled, update
from blaq.optim.update import Rates
from blaq.projection import dequantize, nearest_levels, solve_scale, write_values
from blaq.solvers import follow, looks, sides

LONGEST_PIECE = 4096  # entries that are added up as they come
SHORTEST_PIECE = 64  # shorter ones do not pay for their loop
_IN_ORDER = (
    ("cpp.threads", 1),
)  # one addition after the other: faster than atomic ones on few threads, and repeatable


class How(NamedTuple):
    """What a pass is compiled for."""

    grid: Grid
    follows: bool
    """Whether the pass itself finds the scale, from the last one; else it returns the metric that a solver needs."""
    curvature: str


class Last(NamedTuple):
    """Where a pass starts to look for scales."""

    looks: Tensor
    """`solvers.looks` at those of every piece of a row, (Q, LS)."""
    scale: Tensor
    """The last scales of every row, (R, S)."""


def laq(w: Tensor, m: Tensor, v: Tensor, g: Tensor, last: Last, r: Rates, how: How) -> Tensor:
    """A step of LAQ, in place: its scale (R, S) where it follows, else the metric d."""
    return _scale_or_metric(w, update.laq(w, m, v, g, r), last, how)


def forward(to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, last: Last, r: Rates, how: How) -> Tensor:
    """Write the trial point w* into a tensor: its scale, or the metric d."""
    w_trial, d = update.forward(w, m, v, g, r)
    to.copy_(w_trial)
    return _scale_or_metric(w_trial, d, last, how)


def backtrack(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    g_trial: Tensor,
    last: Last,
    r: Rates,
    how: How,
) -> Tensor:
    """The step with both gradients, in place: its scale, or the metric d'."""
    return _scale_or_metric(w, update.backtrack(w, m, v, g, g_trial, r), last, how)


def write(p: Tensor, w: Tensor, scale: Tensor, how: How) -> None:
    """Let p hold the quantized values of w."""
    p.copy_(dequantize(nearest_levels(w, scale, how.grid), scale, how.grid))


def write_over(w: Tensor, scale: Tensor, how: How) -> None:
    """`write`, where w itself is to hold its quantized values: a compiler must not be told the same memory twice."""
    write(w, w, scale, how)


def solve(w: Tensor, found: Tensor, how: How, fast: bool) -> Tensor:
    """The scale, float32 (R, S), from what a pass returned."""
    if how.follows:
        return found
    d = None if how.curvature == "unit" else found
    return solve_scale(w, d, how.grid, "exact", loops=_LOOPS if fast and compiled.usable() else PLAIN)


def _scale_or_metric(w: Tensor, d: Tensor, last: Last, how: How) -> Tensor:
    if not how.follows:
        return d
    if not w.numel():
        return last.scale
    d = torch.ones_like(d) if how.curvature == "unit" else d
    found = []
    for i, (u, d_side) in enumerate(sides(w, d, how.grid)):
        inverses = [inverse.unsqueeze(1) for inverse in last.looks[:, i :: how.grid.scales].unbind(1)]
        found.append(follow(u, d_side, how.grid, inverses, len(last.scale)))
    return torch.cat(found, 1).float()


# --- compiled or not ------------------------------------------------------------------------------------------------------


def run(
    function: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    scale: Tensor,
    r: Rates,
    aside: float,
    how: How,
    fast: bool,
) -> Any:
    """A pass over matrices in rows that starts from their last scale, compiled where `fast` and where it can be."""
    rows, columns = tensors[0].shape
    at = looks(scale.to(tensors[0].dtype), how.grid, aside)
    if not fast or not compiled.usable() or not columns:
        return function(*tensors, Last(at, scale), r, how)
    piece = _piece(columns)
    count = columns // piece if piece else 1
    pieces = tuple(t.view(rows * count, -1) for t in tensors)
    at_pieces = at.repeat_interleave(count, 0) if count > 1 else at
    numbers = torch.tensor([number for number in r if number is not None], dtype=at.dtype, device=at.device)
    found = compiled.call(
        _with_numbers(function, how, tuple(number is None for number in r), piece is None),
        (*pieces, at_pieces, scale, numbers),
        lambda: function(*tensors, Last(at, scale), r, how),
    )
    return found if how.follows else found.view(rows, columns)


@functools.cache
def _piece(columns: int) -> int | None:
    """The pieces that rows are added up in: as long as divides them, up to 4096; None where only short ones do.

    The compiler adds up as many in float32, as they come; with more it takes care of rounding, which takes longer than
    all the rest of a pass.
    """
    longest = max(piece for piece in range(1, min(columns, LONGEST_PIECE) + 1) if columns % piece == 0)
    return longest if longest >= min(columns, SHORTEST_PIECE) else None


def run_write(p: Tensor, w: Tensor, scale: Tensor, how: How, fast: bool) -> None:
    """`write`, compiled where `fast` and where it can be; w may be p itself."""
    if fast and compiled.usable():
        how = How(how.grid, False, "adam")  # the rest makes no difference here
        function, tensors = (write_over, (p, scale)) if p.data_ptr() == w.data_ptr() else (write, (p, w, scale))
        compiled.call(_with_how(function, how), tensors, lambda: write_values(p, w, scale, how.grid))
        increment_version(p)  # the alias that was written to has a count of its own
    else:
        write_values(p, w, scale, how.grid)


def _add_into_bins(*tensors: Tensor) -> None:
    compiled.call(add_into_bins, tensors, lambda: add_into_bins(*tensors), _IN_ORDER)


def _mark(*tensors: Tensor) -> None:
    compiled.call(mark, tensors, lambda: mark(*tensors))


_LOOPS = Loops(_add_into_bins, _mark, chunk=2**22, intervals=2, fill=True)  # chunks: a flag an entry takes memory


@functools.cache
def _with_how(function: Callable[..., Any], how: How) -> Callable[..., Any]:
    def with_how(*tensors: Tensor) -> Any:
        return function(*tensors, how)

    return compiled.own_code(with_how)


@functools.cache
def _with_numbers(function: Callable[..., Any], how: How, absent: tuple[bool, ...], whole: bool) -> Callable[..., Any]:
    """The pass with its numbers in one tensor, the last argument; those absent are None. `whole`: rows are not in pieces."""

    def with_numbers(*arguments: Tensor) -> Any:
        *tensors, at, scale, numbers = arguments
        # Told once a piece: else the compiler sees one flat loop in the update and one over pieces in the sums, which it does
        # not join, and computes every entry twice.
        one = at[:, :1].clamp(1.0, 1.0)
        values = iter(numbers.unbind() if whole else [number * one for number in numbers.unbind()])
        r = Rates(*[None if missing else next(values) for missing in absent])  # type: ignore[arg-type]
        return function(*tensors, Last(at, scale), r, how)

    return compiled.own_code(with_numbers)
