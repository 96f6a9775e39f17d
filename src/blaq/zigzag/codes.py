"""The codes that a parameter holds, followed from look to look: one pass over the weights, compiled where steps are."""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim import compiled
from blaq.solvers import blocks

TINY = 2.0**-149  # the smallest float32 above 0
_BLOCK = 2**16  # entries that are looked at at once, uncompiled


def seen(values_RN: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    """What `look` remembers of codes that are seen for the first time: float16 (R, N)."""
    return _codes(values_RN, scale_RS, grid).half()


def direction(seen: Tensor) -> Tensor:
    """Of what `look` remembers, in which direction a code changed last: a quarter, up or down; 0 where it never did."""
    return seen - (seen + 0.5).floor()


def _codes(values_RN: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    """`BLAQ.codes` without its check, which makes the device wait; integers in float32."""
    values, scale = values_RN.float(), scale_RS.clamp(min=TINY)  # a row of zeros has the scale 0
    if grid.two_scales:
        scale = torch.where(values < 0, scale[:, :1], scale[:, 1:])
    levels = values / scale
    spacing = _spacing(grid)
    if spacing is None:
        thresholds = (grid.levels[1:] + grid.levels[:-1]) / 2
        return torch.bucketize(levels, thresholds.to(levels.device), out_int32=True).float()
    return ((levels + grid.largest) / spacing + 0.5).floor()  # 0 is nearer to the positive level, where it is none


def look(values_RN: Tensor, scale_RS: Tensor, seen_RN: Tensor, counting: Sequence[Tensor], grid: Grid) -> Tensor:
    """Look at the codes, in place; returns how many have changed since the last look.

    Args:
        values_RN: what the parameter holds, in rows.
        scale_RS: its scales, float32.
        seen_RN: the codes at the last look, plus a quarter where one rose when it changed last, minus a quarter where it fell;
            afterwards those of this one. In float16, which holds this exactly: compiled code works through bytes one by one.
        counting: how often codes changed back, an exponential average, float32 (R, N), and how much of it stays and how much
            enters, float32 (2,); empty for a look that does not count.
        grid: the grid.
    """
    codes, last = _codes(values_RN, scale_RS, grid), seen_RN.float()
    difference = codes - last
    changed = difference.abs() > 0.5
    if counting:
        frequency_RN, rates = counting
        # The product is -1/16 or 0 where a code stayed, positive where it went on, and -5/16 or less where it went back.
        back = difference * direction(last) < -0.125
        frequency_RN.copy_(frequency_RN * rates[0] + torch.where(back, rates[1], 0.0))
    seen_RN.copy_(torch.where(changed, codes + torch.where(difference > 0, 0.25, -0.25), last))
    return changed.sum(dtype=torch.int32)


def look_fast(
    values_RN: Tensor,
    scale_RS: Tensor,
    seen_RN: Tensor,
    counting: Sequence[Tensor],
    grid: Grid,
    known: compiled.Codes | None,
) -> Tensor:
    """`look`, with `known` compiled, where it can be."""
    function = _with_grid(grid)
    matrices = (values_RN, seen_RN, *counting[:1])

    def in_blocks() -> Tensor:
        changed = torch.zeros((), dtype=torch.int32, device=values_RN.device)
        for rows, columns in blocks(values_RN.shape, _BLOCK):
            for some in columns:
                values, *rest = (t[rows, some] for t in matrices)
                changed += function(values, scale_RS[rows], *rest, *counting[1:])
        return changed

    if known is None or not compiled.usable() or _spacing(grid) is None or not values_RN.numel():
        return in_blocks()
    changed: Tensor = compiled.call(function, (values_RN, scale_RS, seen_RN, *counting), in_blocks, known=known)
    return changed


@functools.cache
def _with_grid(grid: Grid) -> Callable[..., Tensor]:
    def with_grid(values: Tensor, scale: Tensor, seen: Tensor, *counting: Tensor) -> Tensor:
        return look(values, scale, seen, counting, grid)

    return compiled.own_code(with_grid)


def _spacing(grid: Grid) -> float | None:
    """How far apart neighbouring levels are, where all are equally far: a code is then one rounding away."""
    innermost = grid.magnitudes[1 if grid.has_zero else 0]
    steps = {innermost * (1 if grid.has_zero else 2), *(outer - inner for inner, outer in pairwise(grid.magnitudes))}
    return float(steps.pop()) if len(steps) == 1 else None
