"""What the parameters hold: quantized values, exactly ``scale * level``, made from latent weights.

The invariant: with `held_values` a parameter can be found again from its latent weight and its scale, bit for bit, or,
at a trial point, recognised by its scale alone.
"""

from typing import Any

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.update import Group
from blaq.projection import check_finite, codes_of, dequantize, in_rows, nearest_levels, row_shape, solve_scale, widen

State = dict[str, Any]


def initial_state(p: Tensor, name: str, group: Group) -> State:
    """The state before the first gradient; with a grid, the scale is an exact solve with curvature 1.

    Raises:
        ValueError: a weight that is NaN or Inf.
    """
    work = p if group["grid"] is None else widen(p)
    state: State = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(work), "exp_avg_sq": torch.zeros_like(work)}
    if group["grid"] is not None or group["trial"] == "past":
        state["latent"] = work.detach().clone(memory_format=torch.preserve_format)
    if group["trial"] == "past":
        state.update(no_trial_yet(state["exp_avg"]))
    if group["grid"] is not None:
        check_finite(p, f"'{name}'")
        rows = row_shape(p.shape, group["granularity"], f"'{name}' ")
        state["scale"] = solve_scale(in_rows(state["latent"], rows), None, Grid.parse(group["grid"]), "exact")
    return state


def no_trial_yet(like: Tensor) -> State:
    """What "past" remembers of its last trial: its gradient, and the step it was for (0: none so far).

    There from the start: distributed checkpoints load into the keys that a new optimizer has.
    """
    return {"trial_grad": torch.zeros_like(like), "trial_step": torch.tensor(0.0)}


def project(w: Tensor, d: Tensor, scale: Tensor, group: Group) -> Tensor:
    """The scale of the projection of w in the metric d; the alternating solver starts from the scale given."""
    rows, start = _rows(w, scale), scale if group["solver"] == "alternating" else None
    return solve_scale(in_rows(w, rows), in_rows(d, rows), Grid.parse(group["grid"]), group["solver"], start)


def held_values(w: Tensor, scale: Tensor, group: Group) -> Tensor:
    """The quantized values of w at a scale: float32, shape of w. Also finds the values of an already quantized w."""
    grid = Grid.parse(group["grid"])
    return dequantize(nearest_levels(in_rows(w, _rows(w, scale)), scale, grid), scale, grid).view(w.shape)


def held_codes(p: Tensor, scale: Tensor, group: Group) -> Tensor:
    """The codes of a quantized parameter: uint8, index into the grid's levels."""
    grid = Grid.parse(group["grid"])
    return codes_of(nearest_levels(in_rows(p, _rows(p, scale)), scale, grid), grid).view(p.shape)


def is_on_grid(p: Tensor, scale: Tensor, group: Group) -> bool:
    """Whether a parameter holds values of its grid at this scale, exactly."""
    return torch.equal(held_values(p, scale, group).to(p.dtype), p)


def _rows(w: Tensor, scale: Tensor) -> tuple[int, int]:
    return len(scale), w.numel() // max(len(scale), 1)
