"""What the parameters hold: quantized values, exactly ``scale * level``, made from latent weights.

The invariant: with `held_values` a parameter can be found again from its latent weight and its scale, bit for bit, or,
at a trial point, recognised by its scale alone.
"""

from typing import Any

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.options import REMEMBERING
from blaq.optim.update import Group
from blaq.projection import (
    check_finite,
    codes_of,
    in_rows,
    nearest_levels,
    row_shape,
    solve_scale,
    widen,
    write_values,
)

State = dict[str, Any]


def initial_state(p: Tensor, name: str, group: Group) -> State:
    """The state before the first gradient; with a grid, the scale is an exact solve with curvature 1.

    Raises:
        ValueError: a latent weight that is NaN or Inf.
    """
    work = p if group["grid"] is None else laid_out(widen(p), group["granularity"])
    state: State = {"step": _counter(), "exp_avg": torch.zeros_like(work), "exp_avg_sq": torch.zeros_like(work)}
    if group["grid"] is not None or group["trial"] == "past":
        check_finite(p, f"'{name}'")
        state["latent"] = torch.empty_like(state["exp_avg"]).copy_(work)
    if group["trial"] in REMEMBERING:
        state.update(no_trial_yet(state["exp_avg"]))
    if group["grid"] is not None:
        rows = row_shape(p.shape, group["granularity"], f"'{name}' ")
        state["scale"] = exact_scale(state["latent"], None, rows[0], group)
    return state


def laid_out(work: Tensor, granularity: str | int) -> Tensor:
    """The weight with its rows one after the other in memory, as steps take them; their order inside a row is free, but for
    groups. So channels-last convolutions stay as they are.
    """
    outermost = work.ndim == 0 or work.stride(0) == work[:1].numel() or len(work) == 1 or granularity == "tensor"
    if isinstance(granularity, int) or not outermost or not is_dense(work):
        return work.contiguous()
    return work


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries lie side by side, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def no_trial_yet(like: Tensor) -> State:
    """What "past" and "delayed" remember: the last gradient, and the step it was for (0: none so far).

    There from the start: distributed checkpoints load into the keys that a new optimizer has.
    """
    return {"trial_grad": torch.zeros_like(like), "trial_step": _counter()}


def _counter() -> Tensor:
    """Of steps, as torch has it: bfloat16, where that is the default, would stop at 256."""
    return torch.tensor(0.0, dtype=torch.float32)


def exact_scale(w: Tensor, d: Tensor | None, rows: int, group: Group) -> Tensor:
    """The scales of the projection of w in the metric d, or 1 where there is none or the group says so: the optimum."""
    shape = rows, w.numel() // max(rows, 1)
    d_RN = in_rows(d, shape) if d is not None and group["curvature"] == "adam" else None
    return solve_scale(in_rows(w, shape), d_RN, Grid.parse(group["grid"]), "exact")


def held_values(w: Tensor, scale: Tensor, group: Group) -> Tensor:
    """The quantized values of w at a scale: float32, shape of w. Also finds the values of an already quantized w."""
    grid = Grid.parse(group["grid"])
    w_RN = in_rows(w, _rows(w, scale))
    values_RN = torch.empty_like(w_RN, dtype=torch.float32)
    write_values(values_RN, w_RN, scale, grid)
    return values_RN.view(w.shape)


def hold(p: Tensor, state: State, group: Group) -> None:
    """Let a parameter hold the quantized values of its latent weight."""
    w, scale = state["latent"], state["scale"]
    if p.is_contiguous():
        rows = _rows(w, scale)
        write_values(p.view(rows), in_rows(w, rows), scale, Grid.parse(group["grid"]))
    else:
        p.copy_(held_values(w, scale, group))


def held_codes(p: Tensor, scale: Tensor, group: Group) -> Tensor:
    """The codes of a quantized parameter: uint8, index into the grid's levels."""
    grid = Grid.parse(group["grid"])
    return codes_of(nearest_levels(in_rows(p, _rows(p, scale)), scale, grid), grid).view(p.shape)


def is_on_grid(p: Tensor, scale: Tensor, group: Group) -> bool:
    """Whether a parameter holds values of its grid at this scale, exactly."""
    return torch.equal(held_values(p, scale, group).to(p.dtype), p)


def _rows(w: Tensor, scale: Tensor) -> tuple[int, int]:
    return len(scale), w.numel() // max(len(scale), 1)
