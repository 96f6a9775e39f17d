"""What torch's ``load_state_dict`` does not do: refuse a state that does not fit, and keep its dtypes."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.held import laid_out
from blaq.optim.options import FORMAT, GROUP_DEFAULTS, REMEMBERING, SHARED, parameter_name
from blaq.optim.update import Group
from blaq.projection import row_shape

# As large as the parameter. torch casts them to its dtype, which would round latent weights to bfloat16.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "a", "clip", "curvature", *SHARED, *GROUP_DEFAULTS)
_LIKE_PARAMETER = ("latent", "exp_avg", "exp_avg_sq", "trial_grad")


def check_loadable(owner: str, saved: dict[str, Any], groups: list[Group], name: Callable[[Tensor], str]) -> None:
    """Refuse a state of other grids, granularities or shapes, or with NaN, naming all parameters concerned.

    Raises:
        ValueError: see above; also a state of another optimizer, or of a newer format.
    """
    if not {"state", "param_groups"} <= set(saved):
        raise ValueError(
            f"{owner}.load_state_dict(): expected what state_dict() returns, with 'state' and 'param_groups', found "
            f"{sorted(map(str, saved)) or 'nothing'}; pass the optimizer's part of the checkpoint."
        )
    sizes, saved_sizes = ([len(group["params"]) for group in side] for side in (groups, saved["param_groups"]))
    if sizes != saved_sizes:
        raise ValueError(
            f"{owner}.load_state_dict(): checkpoint has groups of {saved_sizes} parameters, this optimizer of {sizes}; build "
            "the optimizer with the same model and rules."
        )
    for index, group in enumerate(saved["param_groups"]):
        absent = [key for key in _OPTIONS if key not in group]
        if absent:
            raise ValueError(
                f"{owner}.load_state_dict(): group {index} of the checkpoint has no {', '.join(absent)}; "
                f"not a state of {owner}."
            )
        if group["format"] > FORMAT:
            raise ValueError(
                f"{owner}.load_state_dict(): checkpoint has format {group['format']}, this blaq reads {FORMAT}; update blaq."
            )
    problems = [*_other_options(saved, groups), *_other_places(saved, groups)]
    if not problems:
        mode = saved["param_groups"][0]
        for index, group, p in _parameters(saved, groups):
            problems += [
                f"checkpoint has {problem}" for problem in _misfits(mode, group, p, saved["state"].get(index), name(p))
            ]
    if problems:
        raise ValueError(
            f"{owner}.load_state_dict(): "
            + "; ".join(problems)
            + ". Build the optimizer as it was when the checkpoint was "
            "saved, or load the model alone and start a new optimizer."
        )


def repair(saved: dict[str, Any], groups: list[Group], state: MutableMapping[Tensor, Any]) -> None:
    """Put copies of the saved tensors, uncast and laid out as steps take them, in place of those that torch has put there."""
    for index, group, p in _parameters(saved, groups):
        for key, value in saved["state"][index].items():
            if key == "trial":
                state[p][key] = value.to(device=p.device, dtype=p.dtype, copy=True)
            elif key in _LIKE_PARAMETER:
                least = p.dtype if group["grid"] is None and p.dtype.itemsize < 4 else torch.float32
                wide = torch.promote_types(value.dtype, least)
                state[p][key] = value.to(device=p.device, dtype=wide, copy=True)
            elif key in ("scale", "trial_scale"):
                state[p][key] = value.to(device=p.device, copy=True)
            elif key in ("step", "trial_step"):
                state[p][key] = value.clone()
        if group["grid"] is not None:  # steps go over the memory row by row
            like = laid_out(state[p]["latent"], group["granularity"])
            for key in state[p].keys() & set(_LIKE_PARAMETER):
                if state[p][key].stride() != like.stride():
                    state[p][key] = torch.empty_like(like, dtype=state[p][key].dtype).copy_(state[p][key])


def _other_options(saved: dict[str, Any], groups: list[Group]) -> Iterator[str]:
    for index, (theirs, ours) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        for key in ("grid", "granularity"):
            if theirs[key] != ours[key]:
                names = ", ".join(f"'{parameter_name(ours, index, i)}'" for i in range(len(ours["params"])))
                yield f"checkpoint has {key}={theirs[key]!r} for {names}, this optimizer has {key}={ours[key]!r}"


def _other_places(saved: dict[str, Any], groups: list[Group]) -> Iterator[str]:
    """Parameters that both sides have, in different places: each would get the state of another."""
    theirs, ours = ([n for g in side for n in g.get("param_names", [])] for side in (saved["param_groups"], groups))
    if set(theirs) == set(ours):
        yield from (f"checkpoint has '{a}' in the place of '{b}'" for a, b in zip(theirs, ours, strict=True) if a != b)


def _needed(quantized: bool, mode: Group) -> set[str]:
    """The keys that the state of a parameter has, in the mode of the checkpoint."""
    past, evaluating = mode["trial"] == "past", mode["evaluating"]
    keys = {"step", "exp_avg", "exp_avg_sq"}
    keys |= {"latent"} if quantized or past else set()
    keys |= {"scale"} if quantized else set()
    keys |= {"trial_grad", "trial_step"} if mode["trial"] in REMEMBERING else set()
    keys |= {"trial"} if evaluating else set()
    return keys | ({"trial_scale"} if evaluating and quantized else set())


def _misfits(mode: Group, group: Group, p: Tensor, state: dict[str, Any] | None, name: str) -> Iterator[str]:
    """What is missing, of another shape or not finite in the state of one parameter."""
    if state is None:
        yield f"no state for '{name}' (torch leaves out frozen parameters: set requires_grad=True until it is loaded)"
        return
    shapes = {key: tuple(p.shape) for key in (*_LIKE_PARAMETER, "trial")} | {"step": (), "trial_step": ()}
    if group["grid"] is not None:
        rows = row_shape(p.shape, group["granularity"], "checkpoint")[0]
        shapes["scale"] = shapes["trial_scale"] = (rows, Grid.parse(group["grid"]).scales)
    for key in sorted(_needed(group["grid"] is not None, mode) - state.keys()):
        yield f"no {key} for '{name}'"
    for key, shape in shapes.items():
        if key in state and not isinstance(state[key], Tensor):
            yield f"{key}={state[key]!r} for '{name}', expected a tensor"
        elif key in state and tuple(state[key].shape) != shape:
            yield f"{key} of shape {tuple(state[key].shape)} for '{name}', expected {shape}"
        elif key in state and not state[key].isfinite().all():
            yield f"NaN or Inf in {key} of '{name}'"


def _parameters(saved: dict[str, Any], groups: list[Group]) -> Iterator[tuple[Any, Group, Tensor]]:
    """The key of its state in the checkpoint, the group, and the parameter."""
    for theirs, ours in zip(saved["param_groups"], groups, strict=True):
        for index, p in zip(theirs["params"], ours["params"], strict=True):
            yield index, ours, p
