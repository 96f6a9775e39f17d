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
from blaq.solvers import follow, sides

# What the compiler is told, by what a pass goes over.
_OPTIONS: dict[str, compiled.Options] = {
    "row": (),
    "rows": (),
    # One addition after the other: faster than atomic ones on few threads, and the same in every run.
    "bins": (("cpp.threads", 1),),
}


class How(NamedTuple):
    """What a pass is compiled for."""

    grid: Grid
    follows: bool
    """Whether the pass itself finds the scale, from the last one; else it returns the metric that a solver needs."""
    curvature: str


def laq(w: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, aside: float | Tensor, r: Rates, how: How) -> Tensor:
    """A step of LAQ, in place: its scale (R, S) where it follows, else the metric d."""
    return _scale_or_metric(w, update.laq(w, m, v, g, r), scale, aside, how)


def forward(
    to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, aside: float | Tensor, r: Rates, how: How
) -> Tensor:
    """Write the trial point w* into a tensor: its scale, or the metric d."""
    w_trial, d = update.forward(w, m, v, g, r)
    to.copy_(w_trial)
    return _scale_or_metric(w_trial, d, scale, aside, how)


def backtrack(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    g_trial: Tensor,
    scale: Tensor,
    aside: float | Tensor,
    r: Rates,
    how: How,
) -> Tensor:
    """The step with both gradients, in place: its scale, or the metric d'."""
    return _scale_or_metric(w, update.backtrack(w, m, v, g, g_trial, r), scale, aside, how)


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


def _scale_or_metric(w: Tensor, d: Tensor, scale: Tensor, aside: float | Tensor, how: How) -> Tensor:
    if not how.follows:
        return d
    if not w.numel():
        return scale
    d = torch.ones_like(d) if how.curvature == "unit" else d
    last = [scale[:, i : i + 1].to(w.dtype) for i in range(how.grid.scales)]
    found = [follow(u, d, how.grid, start, aside) for (u, d), start in zip(sides(w, d, how.grid), last, strict=True)]
    return torch.cat(found, 1).float()


# --- compiled or not ------------------------------------------------------------------------------------------------------


def run(function: Callable[..., Any], tensors: tuple[Tensor, ...], r: Rates, aside: float, how: How, fast: bool) -> Any:
    """A pass over tensors, compiled where `fast` and where it can be."""
    if not fast or not compiled.usable():
        return function(*tensors, aside, r, how)
    told = (aside, *r)
    given = [value for value in told if value is not None]
    numbers = torch.tensor(given, dtype=tensors[0].dtype, device=tensors[0].device)
    over = "rows" if tensors[-1].shape[0] > 1 else "row"
    with_numbers = _with_numbers(function, how, tuple(value is None for value in told), over)
    return compiled.call(with_numbers, (*tensors, numbers), lambda: function(*tensors, aside, r, how), _OPTIONS[over])


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
    compiled.call(add_into_bins, tensors, lambda: add_into_bins(*tensors), _OPTIONS["bins"])


def _mark(*tensors: Tensor) -> None:
    compiled.call(mark, tensors, lambda: mark(*tensors))


_LOOPS = Loops(_add_into_bins, _mark, chunk=2**22, intervals=2, fill=True)  # chunks: a flag an entry takes memory


@functools.cache
def _with_how(function: Callable[..., Any], how: How) -> Callable[..., Any]:
    def with_how(*tensors: Tensor) -> Any:
        return function(*tensors, how)

    return compiled.own_code(with_how)


@functools.cache
def _with_numbers(function: Callable[..., Any], how: How, absent: tuple[bool, ...], over: str) -> Callable[..., Any]:
    """The pass with its numbers in one tensor, the last argument; those absent are None."""

    def with_numbers(*arguments: Tensor) -> Any:
        *tensors, numbers = arguments
        values = iter(_told_to_rows(numbers, tensors[-1]) if over == "rows" else numbers.unbind())
        aside, *rates = [None if missing else next(values) for missing in absent]
        return function(*tensors, aside, Rates(*rates), how)  # type: ignore[arg-type]

    return compiled.own_code(with_numbers)


def _told_to_rows(numbers: Tensor, scale: Tensor) -> list[Tensor]:
    """The numbers once a row, (R, 1): else the compiler sees one flat loop in the update and one over rows in the sums, which
    it does not join, and computes every entry twice.
    """
    one = scale[:, :1].clamp(1.0, 1.0).to(numbers.dtype)
    return [number * one for number in numbers.unbind()]
