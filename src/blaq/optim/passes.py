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

from blaq.bins import PLAIN
from blaq.grids import Grid
from blaq.optim import compiled, loops, update
from blaq.optim.update import Rates
from blaq.projection import dequantize, nearest_levels, solve_scale, write_values
from blaq.solvers import blocks, follow, join_to_follow, looks, sums_to_follow

_BLOCK = 2**16  # entries that an uncompiled pass goes over at once
_LONGEST, _SHORTEST = 4096, 64  # a piece of a row in a compiled pass: sums need no care yet, and a loop pays
_FEW = 2**12  # pieces up to which what is told once a piece is kept


Shape = tuple[int, int]


class How(NamedTuple):
    """What a pass is compiled for."""

    grid: Grid
    follows: bool
    """Whether the pass itself finds the scale, from the last one; else it returns the metric that a solver needs."""
    curvature: str
    wide: bool = False
    """Whether the sums of a closed form are taken in float64, as the exact solver takes all its sums."""


Found = Tensor | tuple[Tensor, ...]
"""Of some entries: what `follow` makes a scale of, where the pass follows; else the metric d."""


def laq(w: Tensor, m: Tensor, v: Tensor, g: Tensor, looks: Tensor, r: Rates, how: How) -> Found:
    """A step of LAQ, in place."""
    return _found(w, update.laq(w, m, v, g, r), looks, how)


def forward(to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, looks: Tensor, r: Rates, how: How) -> Found:
    """Write the trial point w* into a tensor."""
    w_trial, d = update.forward(w, m, v, g, r)
    to.copy_(w_trial)
    return _found(w_trial, d, looks, how)


def backtrack(w: Tensor, m: Tensor, v: Tensor, g: Tensor, g_trial: Tensor, looks: Tensor, r: Rates, how: How) -> Found:
    """The step with both gradients, in place."""
    return _found(w, update.backtrack(w, m, v, g, g_trial, r), looks, how)


def past(
    to: Tensor,
    w: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    g_trial: Tensor,
    looks: Tensor,
    r: Rates,
    ahead: Rates,
    how: How,
) -> Found:
    """A step of "past", in place, with the gradient of the last trial point in the place of g; then the next trial point."""
    update.backtrack(w, m, v, g, g_trial, r)
    g.copy_(g_trial)
    return forward(to, w, m, v, g, looks, ahead, how)


def forward_float(to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, r: Rates) -> None:
    """Write the trial point of a parameter without a grid into a tensor, which may be w."""
    to.copy_(update.forward(w, m, v, g, r)[0])


def past_float(to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, g_trial: Tensor, r: Rates, ahead: Rates) -> None:
    """`past` of a parameter without a grid."""
    update.backtrack(w, m, v, g, g_trial, r)
    g.copy_(g_trial)
    forward_float(to, w, m, v, g, ahead)


def write(p: Tensor, w: Tensor, scale: Tensor, how: How) -> None:
    """Let p hold the quantized values of w."""
    p.copy_(dequantize(nearest_levels(w, scale, how.grid), scale, how.grid))


def write_over(w: Tensor, scale: Tensor, how: How) -> None:
    """`write`, where w itself is to hold its quantized values: a compiler must not be told the same memory twice."""
    write(w, w, scale, how)


def solve(w: Tensor, found: Tensor, how: How, fast: bool) -> Tensor:
    """The scale, float32 (R, S), from the metric that a pass returned, where it does not follow."""
    d = None if how.curvature == "unit" else found
    return solve_scale(w, d, how.grid, "exact", loops=loops.COMPILED if fast and compiled.usable() else PLAIN)


def _found(w: Tensor, d: Tensor, looks: Tensor, how: How) -> Found:
    if not how.follows:
        return d
    return sums_to_follow(w, torch.ones_like(d) if how.curvature == "unit" else d, how.grid, looks, how.wide)


def _scale(found: tuple[Tensor, ...], how: How) -> Tensor:
    """The scale, float32 (R, S), from what was found of every piece of a row, (R, pieces, S)."""
    return follow(join_to_follow(found), how.grid).float()


# --- compiled or not ------------------------------------------------------------------------------------------------------


def run(
    function: Callable[..., Found],
    tensors: tuple[Tensor, ...],
    scale: Tensor,
    rates: tuple[Rates, ...],
    aside: float,
    how: How,
    codes: compiled.Codes | None,
    room: Callable[[], Tensor],
) -> Tensor:
    """A pass over matrices in rows, or `in_pieces`, with `codes` compiled, where it can be: from their last scales (R, S) to
    the next, where it follows; else the metric d, which is written to where there is `room` for it.
    """
    rows, like = len(scale), tensors[0]
    every, size = len(like), like.shape[1]
    if how.follows and not size:
        return scale
    scale_like = scale if scale.dtype == like.dtype else scale.to(like.dtype)

    def plain(at: Tensor) -> Tensor:
        shape = rows, size * every // max(rows, 1)
        return _in_blocks(function, tuple(t.view(shape) for t in tensors), at, rates, how, lambda: room().view(shape))

    if codes is None or not compiled.usable() or not size:
        return plain(looks(scale_like, how.grid, aside))
    at, count = _looks(scale_like, how.grid, aside, codes), every // rows
    at_pieces = at.repeat_interleave(count, 0) if count > 1 and at.numel() else at
    ones = _ones(every, like.dtype, like.device) if every <= _FEW else at.new_ones(every, 1)
    metric = [] if how.follows else [room()]
    absent = rates[0].decay is None, rates[0].clip is None
    found: Tensor | None = compiled.call(
        _with_numbers(function, how, len(rates), absent, _piece(size * count) is None),
        (*tensors, *metric, at_pieces, scale, ones, _numbers(rates, like.dtype, like.device)),
        lambda: plain(at),
        known=codes,
    )
    return metric[0] if found is None else found


def _in_blocks(
    function: Callable[..., Found],
    tensors: tuple[Tensor, ...],
    at: Tensor,
    rates: tuple[Rates, ...],
    how: How,
    room: Callable[[], Tensor],
) -> Tensor:
    """A pass as it is, some entries at a time: what it makes for a moment stays small, and in cache."""
    like = tensors[0]
    if like.numel() <= _BLOCK:
        found = function(*tensors, at, *rates, how)
        return found if isinstance(found, Tensor) else _scale(tuple(t.unsqueeze(1) for t in found), how)
    result = like.new_empty(len(at), how.grid.scales, dtype=torch.float32) if how.follows else room()
    for rows, columns in blocks(like.shape, _BLOCK):
        pieces: tuple[Tensor, ...] = ()
        for i, some in enumerate(columns):
            found = function(*(t[rows, some] for t in tensors), at[rows], *rates, how)
            if isinstance(found, Tensor):
                result[rows, some] = found
                continue
            pieces = pieces or tuple(t.new_empty(len(t), len(columns), how.grid.scales) for t in found)
            for piece, t in zip(pieces, found, strict=True):
                piece[:, i] = t
        if pieces:
            result[rows] = _scale(pieces, how)
    return result


def run_float(function: Callable[..., Any], tensors: tuple[Tensor, ...], rates: tuple[Rates, ...]) -> None:
    """An update of parameters without a grid, in place, some entries at a time."""
    if tensors[0].numel() <= _BLOCK:
        function(*tensors, *rates)
        return
    for rows, columns in blocks(tensors[0].shape, _BLOCK):
        for some in columns:
            function(*(t[rows, some] for t in tensors), *rates)


def _looks(scale: Tensor, grid: Grid, aside: float, codes: compiled.Codes) -> Tensor:
    """Where to look, from the last scales: of many rows compiled too, else it takes a fifth of the time of the pass."""
    if grid.has_closed_form:
        return _nowhere(len(scale), scale.dtype, scale.device)
    if len(scale) <= _FEW:
        return looks(scale, grid, aside)
    at: Tensor = compiled.call(
        _with_grid(looks, grid),
        (scale.contiguous(), _number(aside, scale.dtype, scale.device)),
        lambda: looks(scale, grid, aside),
        known=codes,
    )
    return at


@functools.lru_cache(maxsize=8)
def _numbers(rates: tuple[Rates, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of a step, which many passes of it share."""
    given = [number for r in rates for number in r if number is not None]
    return torch.tensor(given, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _nowhere(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(rows, 0, dtype=dtype, device=device)


@functools.lru_cache(maxsize=8)
def _number(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([number], dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(count, 1, dtype=dtype, device=device)


@functools.cache
def in_pieces(shape: Shape) -> Shape:
    """The shape in which a compiled pass goes over a matrix in rows."""
    piece = _piece(shape[1]) if shape[1] else None
    return shape if piece is None else (shape[0] * shape[1] // piece, piece)


@functools.cache
def _piece(columns: int) -> int | None:
    """The pieces that rows are added up in: as long as divides them, up to 4096; None where only short ones do.

    The compiler adds up as many in float32, as they come; with more it takes care of rounding, which takes longer than
    all the rest of a pass.
    """
    longest = max(piece for piece in range(1, min(columns, _LONGEST) + 1) if columns % piece == 0)
    return longest if longest >= min(columns, _SHORTEST) else None


def run_write(p: Tensor, w: Tensor, scale: Tensor, how: How, codes: compiled.Codes | None) -> None:
    """`write`, with `codes` compiled, where it can be; w may be p itself."""
    if codes is not None and compiled.usable():
        how = How(how.grid, False, "adam")  # the rest makes no difference here
        scale = scale.contiguous()  # whichever solver has made it
        function, tensors = (write_over, (p, scale)) if p.data_ptr() == w.data_ptr() else (write, (p, w, scale))
        compiled.call(_with_how(function, how), tensors, lambda: write_values(p, w, scale, how.grid), known=codes)
        increment_version(p)  # the alias that was written to has a count of its own
    else:
        write_values(p, w, scale, how.grid)


@functools.cache
def _with_grid(function: Callable[..., Any], grid: Grid) -> Callable[..., Any]:
    def with_grid(scale: Tensor, number: Tensor) -> Any:
        return function(scale, grid, number)

    return compiled.own_code(with_grid)


@functools.cache
def _with_how(function: Callable[..., Any], how: How) -> Callable[..., Any]:
    def with_how(*tensors: Tensor) -> Any:
        return function(*tensors, how)

    return compiled.own_code(with_how)


@functools.cache
def _with_numbers(
    function: Callable[..., Any], how: How, steps: int, absent: tuple[bool, bool], whole: bool
) -> Callable[..., Any]:
    """The pass with its numbers, those of one step or two, in one tensor, the last argument; decay or clip may be absent.

    `whole`: rows are not in pieces.
    """
    missing = *[False] * (len(Rates._fields) - len(absent)), *absent  # the last two fields

    def with_numbers(*arguments: Tensor) -> Any:
        *tensors, at, scale, ones, numbers = arguments
        metric = None if how.follows else tensors.pop()
        # Told once a piece: else the compiler sees one flat loop in the update and one over pieces in the sums, which it does
        # not join, and computes every entry twice, or stores it between.
        values = iter(numbers.unbind() if whole else [number * ones for number in numbers.unbind()])
        rates = [Rates(*[None if gone else next(values) for gone in missing]) for _ in range(steps)]  # type: ignore[arg-type]
        found = function(*tensors, at, *rates, how)
        if isinstance(found, Tensor):
            assert metric is not None
            metric.copy_(found)
            return None
        return _scale(tuple(t.view(len(scale), -1, how.grid.scales) for t in found), how)

    return compiled.own_code(with_numbers)
