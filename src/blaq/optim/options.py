"""The options of BLAQ: what a param group may hold, and what is refused."""

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from blaq.grids import Grid
from blaq.projection import check_solver, row_shape

TRIALS = ("fresh", "past", "delayed", "none")
REMEMBERING = ("past", "delayed")  # keep a gradient from one step to the next
CURVATURES = ("adam", "unit")
FORMAT = 1  # of the state that a checkpoint holds

# What a group holds besides the constructor's options: set by param_groups, or counted here.
GROUP_DEFAULTS: dict[str, Any] = {
    "grid": None,
    "granularity": "tensor",
    "solver": "alternating",
    "steps": 0,
    "gradient_evaluations": 0,
    "evaluating": False,
    "format": FORMAT,
}
COUNTERS = ("steps", "gradient_evaluations", "evaluating")  # of the optimizer, not of whoever brings the group
# What else may stand in a group: notes of param_groups, and what torch's schedulers write there.
_ANNOTATIONS = {"params", "param_names", "notes", "name", "initial_lr", "max_lr", "min_lr", "swa_lr"}
_ANNOTATIONS |= {"max_momentum", "base_momentum"}
SHARED = ("trial", "trial_every")  # one value for the whole optimizer


def check_group(owner: str, group: dict[str, Any], known: Iterable[str], index: int) -> None:
    """Check one param group, and write its grid by its canonical name.

    Raises:
        ValueError: an unknown key, a value out of range, a group size that does not divide.
    """
    where = f"{owner}: group {index}"
    allowed = {*known, *_ANNOTATIONS}
    for key in group:
        if key not in allowed:
            hint = "build groups with blaq.param_groups(model, bits=...)" if key == "bits" else "remove it"
            near = [] if key == "bits" else difflib.get_close_matches(key, sorted(allowed), n=1)
            raise ValueError(
                f"{where} has an unknown option {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"{hint}.")
            )
    check_options(owner, group)
    grid = group["grid"]
    group["grid"] = None if grid is None else Grid.parse(grid).name
    check_solver(group["solver"], owner)
    for position, parameter in enumerate(group["params"]):
        name = parameter_name(group, index, position)
        if not parameter.is_floating_point():
            raise ValueError(f"{owner}: '{name}' is {parameter.dtype}; expected a real floating dtype.")
        if parameter.is_meta:
            raise ValueError(
                f"{owner}: '{name}' is on the meta device and holds no values; materialize the model first."
            )
        if grid is None and torch.tensor(group["eps"], dtype=parameter.dtype) == 0:
            raise ValueError(
                f"{owner}(eps={group['eps']}): is 0 in {parameter.dtype}, the dtype of '{name}'; expected a larger eps."
            )
        if grid is not None:
            row_shape(parameter.shape, group["granularity"], f"{owner}: '{name}' ")


def check_arguments(owner: str, params: object, module: object, compile: object) -> None:
    """Check what the constructor takes besides the options of groups."""
    if isinstance(params, nn.Module):
        raise ValueError(
            f"{owner}(params={type(params).__name__}): expected param groups; build them with "
            "blaq.param_groups(model, bits=...)."
        )
    if module is not None and not isinstance(module, nn.Module):
        raise ValueError(f"{owner}(module={type(module).__name__}): expected the model, for its buffers, or None.")
    if compile is not None and not isinstance(compile, bool):
        raise ValueError(f"{owner}(compile={compile!r}): expected True, False, or None (from 2^18 weights on).")


def check_options(owner: str, options: dict[str, Any]) -> None:
    """Check the constructor's options, which every group may override."""
    lr, betas, eps, decay, a, clip = (options[key] for key in ("lr", "betas", "eps", "weight_decay", "a", "clip"))
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{owner}(lr={tuple(lr.shape)} tensor): expected one number.")
        lr = lr.item()
    if not _in(lr, 0, math.inf):
        raise ValueError(f"{owner}(lr={lr!r}): expected a finite lr >= 0.")
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(_in(b, 0, 1) and b < 1 for b in betas):
        raise ValueError(f"{owner}(betas={betas!r}): expected two numbers, 0 <= beta < 1 (decay of Adam's moments).")
    if not (_in(eps, 0, math.inf) and eps > 0):
        raise ValueError(f"{owner}(eps={eps!r}): expected a finite eps > 0 (it keeps the curvature positive).")
    if not _in(decay, 0, math.inf):
        raise ValueError(
            f"{owner}(weight_decay={decay!r}): expected a finite weight_decay >= 0 (decoupled, on latent weights)."
        )
    if not _in(a, 0, 1):
        raise ValueError(f"{owner}(a={a!r}): expected 0 <= a <= 1 (weight of the gradient at the current point).")
    if clip is not None and not (_in(clip, 0, math.inf) and clip > 0):
        raise ValueError(
            f"{owner}(clip={clip!r}): expected None or a number > 0 (latent weights stay in [-clip, clip])."
        )
    trial, every = options["trial"], options["trial_every"]
    if trial not in TRIALS:
        raise ValueError(
            f"{owner}(trial={trial!r}): expected 'fresh' (two gradients), 'past', 'delayed' (one) or 'none' (LAQ)."
        )
    if options["curvature"] not in CURVATURES:
        raise ValueError(
            f"{owner}(curvature={options['curvature']!r}): expected 'adam' (the root of the second moment) or 'unit' (1: the "
            "nearest level, as in BWN and TWN)."
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"{owner}(trial_every={every!r}): expected an int >= 1 (a trial at every k-th step).")


def check_trial_every(owner: str, options: dict[str, Any]) -> None:
    """Refuse an optimizer that is built to skip trials and makes none. (Its trial may be set to "none" later.)"""
    trial, every = options["trial"], options["trial_every"]
    if trial != "fresh" and every != 1:
        raise ValueError(
            f"{owner}(trial={trial!r}, trial_every={every}): only trial='fresh' skips trials; leave it at 1."
        )


def parameter_name(group: dict[str, Any], index: int, position: int) -> str:
    """The name of a parameter for messages."""
    names = group.get("param_names")
    return str(names[position]) if names else f"group {index} [{position}]"


def _in(value: object, low: float, high: float) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high
