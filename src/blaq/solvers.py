"""The nearest level at a scale, and the alternation between levels and scale.

Functions see magnitudes ``u = |w| >= 0`` and curvature ``d >= 0``, (R, N), and scales (R, 1): a weight is scale * level,
levels are integers. They compute in the dtype of u, row by row, without branching on values: so they can be compiled,
and fused with what comes before and after.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from blaq.grids import Grid

MAX_ROUNDS = 10
TOLERANCE = 1e-6  # relative move of the scale at which the alternation ends
_BLOCK = 2**16  # entries that are added up at once
_VAST = 2.0**64  # levels from which their squares, and one over a scale, leave float32
_TINY = 2.0**-100
_FEW, _SOME = 1, 3  # steps up to which thresholds are compared one by one: where rounding would do, and where not


def nearest(u_RN: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The magnitude of the level nearest to ``u / scale``: integers in the dtype of u, (R, N). A tie goes outward.

    ``scale`` broadcasts over u, in its dtype; where it is 0, so is u, and the level is the smallest.
    """
    levels = grid.magnitudes
    if len(levels) == 1:
        return torch.ones_like(u_RN)
    scale = torch.where(scale > 0, scale, torch.inf)
    mids = grid.mids
    if len(mids) <= _FEW or (grid.spacing is None and len(mids) <= _SOME):
        found = torch.full_like(u_RN, levels[0])
        for mid, outer in zip(mids, levels[1:], strict=True):
            found = torch.where(u_RN >= scale * mid, float(outer), found)
        return found
    if grid.spacing is None:
        return _rounded(u_RN / scale, grid)
    raised = torch.where(scale < _TINY, 1 / _TINY, 1.0).to(scale.dtype)  # one over the smallest scales is not finite
    return _rounded(u_RN * raised * (1 / (scale * raised)), grid)


def _rounded(x_RN: Tensor, grid: Grid) -> Tensor:
    """The magnitude of the level nearest to ``x >= 0``; a tie goes outward."""
    levels, mids = grid.magnitudes, grid.mids
    if grid.spacing is not None and len(mids) > _FEW:  # equally far apart: rounding
        steps = (x_RN * (1 / grid.spacing) + (0.5 if grid.has_zero else 0.0)).floor()
        return (steps * grid.spacing + levels[0]).clamp(max=levels[-1])
    if len(mids) <= _SOME:
        found = torch.full_like(x_RN, levels[0])
        for mid, outer in zip(mids, levels[1:], strict=True):
            found = torch.where(x_RN >= mid, float(outer), found)
        return found
    return _doubled(x_RN).clamp(max=float(levels[-1]))  # no other grid has as many


def _doubled(x_RN: Tensor) -> Tensor:
    """The nearest of 0, 1, 2, 4, .. to ``x >= 0``; a tie goes outward. From the exponent of the float, exactly."""
    kind, exponent = (torch.int64, -(2**52)) if x_RN.dtype == torch.float64 else (torch.int32, -(2**23))
    below = (x_RN.view(kind) & exponent).view(x_RN.dtype)  # the power of two at or below
    return torch.where(x_RN >= 1, torch.where(x_RN >= 1.5 * below, 2 * below, below), (x_RN >= 0.5).to(x_RN.dtype))


def sides(w_RN: Tensor, d_RN: Tensor, grid: Grid) -> list[tuple[Tensor, Tensor]]:
    """Magnitudes and curvature of each scale of a row: with two, entries of the other sign have no weight."""
    if not grid.two_scales:
        return [(w_RN.abs(), d_RN)]
    below = w_RN < 0
    return [(torch.where(side, w_RN.abs(), 0.0), torch.where(side, d_RN, 0.0)) for side in (below, ~below)]


def inverse(scale: Tensor) -> Tensor:
    """One over a scale; 0 where it is 0, as the weights are, and finite where it is the smallest, as 0 times it must be 0."""
    return (1 / torch.where(scale > 0, scale, torch.inf)).clamp(max=torch.finfo(scale.dtype).max)


def sums(u_RN: Tensor, d_RN: Tensor, inverse: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """``S1 = sum d b u`` and ``S2 = sum d b^2`` for the levels nearest at a scale, told by its `inverse`, (R, 1); levels in
    units of `_unit`.

    An entry half way between levels may go to either, as rounding has it.
    """
    b = _rounded(u_RN * inverse, grid) * (1 / _unit(grid))
    db = d_RN * b
    return (db * u_RN).sum(1, keepdim=True), (db * b).sum(1, keepdim=True)


def best_scale(s1: Tensor, s2: Tensor, largest: Tensor, grid: Grid) -> Tensor:
    """The scale that is best for the levels that gave S1 and S2, (R, 1); where no entry left zero, one that lets the largest
    entry reach the largest level.
    """
    return torch.where(s2 > 0, s1 / torch.where(s2 > 0, s2, 1.0) / _unit(grid), largest / float(grid.largest))


def alternating(u_RN: Tensor, d_RN: Tensor, grid: Grid, start_R1: Tensor) -> Tensor:
    """A local optimum: b <- nearest levels at the scale, scale <- S1/S2, until it rests, or for 10 rounds. In float64.

    Starts from ``start`` (float64), where that is 0 from the weighted mean of u over the mean level.

    Source: Hou and Kwok, ICLR 2018, algorithm 1 and section 3.2 (LAT-a, LAQ).
    """
    largest = u_RN.amax(1, keepdim=True).double()
    weighted = add_up(lambda u, d: torch.stack([(d * u).sum(1), d.sum(1)], 1), u_RN, d_RN)
    mean_level = float(grid.levels.abs().double().mean())
    scale = torch.where(start_R1 > 0, start_R1, weighted[:, :1] / weighted[:, 1:] / mean_level)
    moving = largest > 0
    scale = torch.where(moving, scale, 0.0)
    for _ in range(MAX_ROUNDS):
        both = add_up(lambda u, d, s: torch.cat(sums(u, d, s, grid), 1), u_RN, d_RN, inverse(scale).expand_as(u_RN))
        new = torch.where(moving, best_scale(both[:, :1], both[:, 1:], largest, grid), scale)
        moving = (new - scale).abs() > TOLERANCE * scale
        scale = new
        if not moving.any():
            break
    return scale


def looks(scale_RS: Tensor, grid: Grid, aside: float | Tensor) -> Tensor:
    """Where `follow` looks: the inverse of the last scales, and of those beside them, ``1 + aside`` times as large, (R, LS).

    The more levels, the less an alternation moves from where it is; ternary grids need no second look, a closed form none.
    In float64 where levels, or one over a scale, leave float32, so that what comes of it is in float64 too.
    """
    if grid.has_closed_form:
        return scale_RS[:, :0]
    if grid.largest >= _VAST:
        scale_RS = scale_RS.double()
    more = len(grid.magnitudes) > 2 or not grid.has_zero
    return inverse(torch.cat([scale_RS, scale_RS * (1 + aside)], 1) if more else scale_RS)


def sums_to_follow(w_RN: Tensor, d_RN: Tensor, grid: Grid, looks_RL: Tensor, wide: bool) -> tuple[Tensor, ...]:
    """What `follow` needs of some entries, (R, S) each: the largest magnitude, then S1 and S2 at every look.

    ``wide``: the sums of a closed form in float64.
    """
    both = enumerate(sides(w_RN, d_RN, grid))
    found = [_side_to_follow(u, d, grid, looks_RL[:, side :: grid.scales], wide) for side, (u, d) in both]
    return found[0] if len(found) == 1 else tuple(torch.cat(of_sides, 1) for of_sides in zip(*found, strict=True))


def _side_to_follow(u_RN: Tensor, d_RN: Tensor, grid: Grid, looks_RL: Tensor, wide: bool) -> tuple[Tensor, ...]:
    largest = u_RN.amax(1, keepdim=True)
    if grid.has_closed_form:
        d_RN = d_RN.double() if wide else d_RN
        return largest, (d_RN * u_RN).sum(1, keepdim=True), d_RN.sum(1, keepdim=True)
    pairs = [sums(u_RN, d_RN, look.unsqueeze(1), grid) for look in looks_RL.unbind(1)]
    return largest, *(s for pair in pairs for s in pair)


def join_to_follow(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What is found of whole rows, (R, S), of what is found of their pieces, (R, pieces, S): sums in float64."""
    largest, *others = found
    return largest.amax(1), *(of_pieces.sum(1, dtype=torch.float64) for of_pieces in others)


def follow(found: tuple[Tensor, ...], grid: Grid) -> Tensor:
    """The scale of the next step of training, from the last one, (R, S): one alternation from the better of two scales.

    Takes the levels with the larger S1^2/S2, and the scale that is best for them.

    Args:
        found: by `sums_to_follow`, of whole rows.
        grid: the grid.
    """
    largest, s1, s2, *other = found
    if grid.has_closed_form:  # LAB's closed form
        return s1 / s2
    if other:
        # Multiples of the same levels are equally good: rounding must not choose.
        tie = 1e-12 if largest.dtype == torch.float64 else 1e-6
        better = value(*other) > value(s1, s2) * (1 + tie)
        s1, s2 = torch.where(better, other[0], s1), torch.where(better, other[1], s2)
    return best_scale(s1, s2, largest.double(), grid)


def look_aside(t: int) -> float:
    """Where `follow` looks at step t: above and below the last scale in turn; far, nearer and close."""
    return (1 if t % 2 else -1) * 2.0 ** -(3 + 2 * (t // 2 % 3))


def value(s1: Tensor, s2: Tensor) -> Tensor:
    """S1^2/S2 of a candidate, in the order that does not overflow; 0 where no entry has left zero."""
    return torch.where(s2 > 0, s1 * (s1 / torch.where(s2 > 0, s2, 1.0)), 0.0)


def add_up(terms: Callable[..., Tensor], *tensors_RN: Tensor) -> Tensor:
    """Sums over the rows, (R, ..), of functions of entries, in float64: block by block, so that wide copies stay in cache."""
    found: Tensor | None = None
    for rows, columns in blocks(tensors_RN[0].shape, _BLOCK):
        for some in columns:
            block = terms(*(t[rows, some].double() for t in tensors_RN))
            if found is None:
                found = block.new_zeros(len(tensors_RN[0]), *block.shape[1:])
            found[rows] += block
    assert found is not None
    return found


def blocks(shape: torch.Size, entries: int) -> Iterator[tuple[slice, list[slice]]]:
    """A matrix in pieces of up to so many entries: some rows, and the columns of each piece in them.

    What is kept of a piece should be added to what there is already. Many small results, each kept in memory where a
    large one has just been let go, would keep the next large one from that place.
    """
    rows, columns = shape
    at_once = max(1, entries // max(1, columns))
    pieces = [slice(start, start + entries) for start in range(0, max(1, columns), entries)]
    for start in range(0, max(1, rows), at_once):
        yield slice(start, start + at_once), pieces


def _unit(grid: Grid) -> float:
    """A power of two near the largest level: the squares of logarithmic levels leave float32."""
    return float(2 ** (int(grid.largest).bit_length() - 1))
