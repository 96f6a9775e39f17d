"""The passes over the weights that a step makes: the update with what the projection needs, and writing the values.

Plain functions of matrices in rows, (R, N), and of numbers; `blaq.optim.running` runs them as they are, or compiled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim import update
from blaq.optim.update import Rates
from blaq.projection import dequantize, nearest_levels
from blaq.solvers import follow, join_to_follow, sums_to_follow


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


def forward_float(w: Tensor, m: Tensor, v: Tensor, g: Tensor, r: Rates) -> None:
    """Write the trial point of a parameter without a grid over it."""
    w.copy_(update.forward(w, m, v, g, r)[0])


def past_float(to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, g_trial: Tensor, r: Rates, ahead: Rates) -> None:
    """`past` of a parameter without a grid."""
    update.backtrack(w, m, v, g, g_trial, r)
    g.copy_(g_trial)
    to.copy_(update.forward(w, m, v, g, ahead)[0])


def write(p: Tensor, w: Tensor, scale: Tensor, grid: Grid) -> None:
    """Let p hold the quantized values of w."""
    p.copy_(dequantize(nearest_levels(w, scale, grid), scale, grid))


def write_over(w: Tensor, scale: Tensor, grid: Grid) -> None:
    """`write`, where w itself is to hold its quantized values: a compiler must not be told the same memory twice."""
    write(w, w, scale, grid)


def joined(found: tuple[Tensor, ...], how: How) -> Tensor:
    """The scale, float32 (R, S), from what was found of every piece of a row, (R, pieces, S)."""
    return follow(join_to_follow(found), how.grid).float()


def _found(w: Tensor, d: Tensor, looks: Tensor, how: How) -> Found:
    if not how.follows:
        return d
    return sums_to_follow(w, torch.ones_like(d) if how.curvature == "unit" else d, how.grid, looks, how.wide)
