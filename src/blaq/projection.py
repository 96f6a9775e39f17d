"""The loss-aware projection: the quantized weight that hurts the loss least (LAB, LAT, LAQ).

Every function below `project` sees two dimensions only: ``(rows, n)``, where a row shares one scale. Shape suffixes:
R rows, N entries a row, K outward steps of the grid, S scales a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blaq.bins import PLAIN, Loops
from blaq.exact import exact
from blaq.grids import Grid
from blaq.solvers import alternating, blocks, nearest, sides

SOLVERS = ("exact", "alternating")
_BLOCK = 2**18  # entries that are written at once
WITHOUT_FLOAT64 = ("mps",)  # devices that cannot add up in float64: the CPU does it for them


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight on its grid.

    Attributes:
        codes: uint8, shape of the weight: index into ``grid.levels``.
        scale: float32 (rows, 1); ``ternary2``: (rows, 2), the negative and the positive scale.
        values: shape and dtype of the weight: ``scale * levels[codes]``, computed in float32 with one rounding.

    Example:
        >>> q = project(torch.tensor([0.5, -0.5, 0.5]), None, "binary")
        >>> q.scale, q.codes, q.scale * Grid.parse("binary").levels[q.codes.long()]
        (tensor([[0.5000]]), tensor([1, 0, 1], dtype=torch.uint8), tensor([[ 0.5000, -0.5000,  0.5000]]))
    """

    codes: Tensor
    scale: Tensor
    values: Tensor


@torch.no_grad()
def project(
    weight: Tensor,
    curvature: Tensor | None,
    grid: Grid | str | int,
    granularity: str | int = "tensor",
    solver: str = "exact",
    *,
    start: Tensor | None = None,
) -> Quantized:
    """Project a weight onto a grid in the metric of the curvature.

    Minimises, for every row on its own, ``sum_i d_i (w_i - alpha b_i)^2`` over ``alpha > 0`` and levels ``b_i``.

    Args:
        weight: w, any shape, any floating dtype, finite.
        curvature: d > 0, finite, shape of the weight; None means 1 everywhere. Only ratios inside a row matter.
        grid: a `Grid`, its name, or a number of bits.
        granularity: what shares a scale: ``"tensor"``; ``"channel"``, an index of dimension 0; or an int, a group of that
            many consecutive inputs of a channel (of the whole vector when the weight has one dimension).
        solver: ``"exact"`` finds the global optimum; ``"alternating"`` a local one, from ``start``.
        start: for the alternating solver, a scale of an earlier projection, (rows, scales); without it, and in rows where
            it is 0, the weighted mean of ``|w|`` over the mean magnitude of the levels.

    Raises:
        ValueError: a bad grid, granularity or solver, a group size that does not divide, a weight or curvature that is not
            finite, a curvature that is not positive or of another shape.

    Example:
        >>> q = project(torch.tensor([0.9, -1.1, 0.1, -0.1]), None, "ternary")
        >>> q.values, q.codes, q.scale
        (tensor([ 1., -1.,  0.,  0.]), tensor([2, 0, 1, 1], dtype=torch.uint8), tensor([[1.]]))

    Source: Hou and Kwok, ICLR 2018, equation 5 and propositions 3.1 to 3.3; Hou et al., ICLR 2017, proposition 3.1.
    """
    grid = Grid.parse(grid)
    for name, given in (("weight", weight), ("curvature", curvature), ("start", start)):
        _check_tensor(name, given, optional=name != "weight")
    rows = row_shape(weight.shape, granularity, "project")
    check_solver(solver, "project")
    if start is not None and solver != "alternating":
        raise ValueError(
            f"project(solver={solver!r}, start=...): only solver='alternating' starts from a scale; drop one."
        )
    if not weight.is_floating_point():
        raise ValueError(f"project(weight={weight.dtype}): expected a floating dtype; convert the weight first.")
    check_finite(weight, "project(weight)")
    if curvature is not None:
        _check_curvature(weight, curvature)
        curvature = in_rows(curvature, rows)
    if start is not None:
        _check_start(start, rows[0], grid)
    w_RN = in_rows(weight, rows)
    scale_RS = solve_scale(w_RN, curvature, grid, solver, start)
    levels_RN = nearest_levels(w_RN, scale_RS, grid)
    values = dequantize(levels_RN, scale_RS, grid).view(weight.shape).to(weight.dtype)
    check_finite(values, f"project(weight={weight.dtype}): quantized values beyond float32 or this dtype")
    return Quantized(codes_of(levels_RN, grid).view(weight.shape), scale_RS, values)


def solve_scale(
    w_RN: Tensor,
    d_RN: Tensor | None,
    grid: Grid,
    solver: str,
    start_RS: Tensor | None = None,
    loops: Loops = PLAIN,
) -> Tensor:
    """The scales of the projection: float32 (R, S). Arguments as in `project`, in rows, unchecked; `loops` as in `exact`."""
    if w_RN.shape[1] == 0:
        return torch.zeros(w_RN.shape[0], grid.scales, device=w_RN.device)
    if w_RN.device.type in WITHOUT_FLOAT64:
        d, start = (None if t is None else t.cpu() for t in (d_RN, start_RS))
        return solve_scale(w_RN.cpu(), d, grid, solver, start).to(w_RN.device)
    if d_RN is None:
        d_RN = w_RN.new_ones(()).expand_as(w_RN)  # a single 1 in memory
    elif d_RN.dtype == torch.float64:
        w_RN, d_RN = w_RN.double(), _normalized(d_RN, w_RN, grid)
    d_RN = d_RN.to(w_RN.dtype)
    if solver == "exact":
        return exact(w_RN, d_RN, grid, loops).float()
    starts = torch.zeros(w_RN.shape[0], grid.scales) if start_RS is None else start_RS
    columns = zip(sides(w_RN, d_RN, grid), starts.to(w_RN.device).double().unbind(1), strict=True)
    return torch.cat([alternating(u, d, grid, start.unsqueeze(1)) for (u, d), start in columns], 1).float()


def _normalized(d_RN: Tensor, w_RN: Tensor, grid: Grid) -> Tensor:
    """The curvature, float64, over a power of two for each scale of a row, so that the largest is near 1: no common factor
    shall take products out of float64.
    """
    largest_RS = torch.cat([d.amax(1, keepdim=True) for _, d in sides(w_RN, d_RN, grid)], 1)
    exponent = _entry_scale(w_RN, torch.frexp(largest_RS).exponent.long(), grid)
    half = exponent // 2  # a power of the smallest number alone would not be finite
    return d_RN * _power_of_two(-half) * _power_of_two(half - exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of integers, float64, exactly."""
    return ((exponent + 1023) << 52).view(torch.float64)


def nearest_levels(w_RN: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    """The level nearest to every ``w / scale``: integers in the dtype of w, (R, N). A tie goes outward; sign(0) is +1."""
    magnitude = nearest(w_RN.abs(), _entry_scale(w_RN, scale_RS, grid).to(w_RN.dtype), grid)
    return torch.where(w_RN < 0, -magnitude, magnitude) + 0.0  # no -0.0: as many values as levels, also bit by bit


def dequantize(levels_RN: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    """``scale * level`` in float32: the one place where a quantized value is made."""
    levels = levels_RN.float()
    return _entry_scale(levels, scale_RS, grid) * levels


def write_values(to_RN: Tensor, w_RN: Tensor, scale_RS: Tensor, grid: Grid) -> None:
    """Write the quantized values of w, some at a time: what that takes besides need not be as large as they are."""
    for rows, columns in blocks(w_RN.shape, _BLOCK):
        for some in columns:
            levels = nearest_levels(w_RN[rows, some], scale_RS[rows], grid)
            to_RN[rows, some] = dequantize(levels, scale_RS[rows], grid)


def codes_of(levels_RN: Tensor, grid: Grid) -> Tensor:
    """Levels as indices into ``grid.levels``: uint8 (R, N)."""
    return torch.bucketize(levels_RN, grid.levels.to(levels_RN), out_int32=True).to(torch.uint8)


def _entry_scale(signed_RN: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    return torch.where(signed_RN < 0, scale_RS[:, :1], scale_RS[:, 1:]) if grid.two_scales else scale_RS


def row_shape(shape: torch.Size, granularity: str | int, owner: str) -> tuple[int, int]:
    """(rows, entries a row) of a weight of this shape.

    Raises:
        ValueError: an unknown granularity, or a group size that does not divide the inputs of a channel.

    Example:
        >>> row_shape(torch.Size([8, 4, 3, 3]), 12, "me")
        (24, 12)
    """
    size = shape.numel()
    if granularity == "tensor":
        return 1, size
    if granularity == "channel":
        channels = shape[0] if shape else 1
        return channels, size // channels if channels else 0
    if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
        raise ValueError(
            f"{owner}(granularity={granularity!r}): expected 'tensor', 'channel' or a group size >= 1 (consecutive inputs)."
        )
    inputs = shape[1:].numel() if len(shape) > 1 else size
    if inputs % granularity:
        raise ValueError(
            f"{owner}(granularity={granularity}): expected a divisor of the {inputs} inputs of a channel of a weight of shape "
            f"{tuple(shape)}; choose another group size, or 'channel' for this weight."
        )
    return size // granularity, granularity


def in_rows(tensor: Tensor, rows: tuple[int, int]) -> Tensor:
    """A weight, or its curvature, in rows: contiguous, in at least float32."""
    return widen(tensor.reshape(rows)).contiguous()


def widen(weight: Tensor) -> Tensor:
    """The weight in at least float32: half precision is too coarse to add up."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def check_solver(solver: str, owner: str) -> None:
    """Refuse an unknown solver."""
    if solver not in SOLVERS:
        raise ValueError(f"{owner}(solver={solver!r}): expected 'exact' or 'alternating'.")


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and Inf, with their number."""
    entries = tensor.reshape(1, -1)
    found = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for _, columns in blocks(entries.shape, _BLOCK):  # a block at a time: counting widens what it counts
        for some in columns:
            found += (~torch.isfinite(entries[:, some])).sum()
    bad = int(found)
    if bad:
        raise ValueError(
            f"{what}: expected finite values, found {bad} NaN or Inf of {tensor.numel()}; look for a learning rate or a loss "
            "scale that is too high."
        )


def _check_tensor(name: str, given: object, *, optional: bool) -> None:
    """Refuse what is no tensor with values in memory."""
    if given is None and optional:
        return
    if not isinstance(given, Tensor):
        raise ValueError(f"project({name}={type(given).__name__}): expected a torch.Tensor{', or None' * optional}.")
    if given.layout != torch.strided or given.is_meta:
        kind = "meta tensor" if given.is_meta else str(given.layout)
        raise ValueError(f"project({name}={kind}): expected a dense tensor that holds values; convert it first.")


def _check_curvature(weight: Tensor, curvature: Tensor) -> None:
    if curvature.shape != weight.shape:
        raise ValueError(
            f"project(curvature={tuple(curvature.shape)}): expected the weight's shape {tuple(weight.shape)}, or None for 1."
        )
    if not curvature.is_floating_point():
        raise ValueError(
            f"project(curvature={curvature.dtype}): expected a floating dtype; convert the curvature first."
        )
    check_finite(curvature, "project(curvature)")
    bad = int((curvature <= 0).sum())
    if bad:
        raise ValueError(
            f"project(curvature): expected values > 0, found {bad} of {curvature.numel()} that are not; add a small epsilon."
        )


def _check_start(start: Tensor, rows: int, grid: Grid) -> None:
    expected = (rows, grid.scales)
    if start.shape != expected:
        raise ValueError(f"project(start={tuple(start.shape)}): expected scales of shape {expected}, or None.")
    if not bool((start.isfinite() & (start >= 0)).all()):
        raise ValueError(
            "project(start): expected finite scales >= 0; pass the scale of an earlier projection, or None."
        )
