"""What torch's ``load_state_dict`` does not do: refuse a state that does not fit, and keep its dtypes."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor

from blaq.grids import Grid
from blaq.optim.options import FORMAT, parameter_name
from blaq.optim.update import Group
from blaq.projection import row_shape, widen

# As large as the parameter. torch casts them to its dtype, which would round latent weights to bfloat16.
_LIKE_PARAMETER = ("latent", "exp_avg", "exp_avg_sq", "trial_grad")


def check_loadable(owner: str, saved: dict[str, Any], groups: list[Group], name: Callable[[Tensor], str]) -> None:
    """Refuse a state of other grids, granularities or shapes, naming all parameters concerned.

    Raises:
        ValueError: see above; also a state of another optimizer, or of a newer format.
    """
    sizes, saved_sizes = ([len(group["params"]) for group in side] for side in (groups, saved["param_groups"]))
    if sizes != saved_sizes:
        raise ValueError(
            f"{owner}.load_state_dict(): checkpoint has groups of {saved_sizes} parameters, this optimizer of {sizes}; build "
            "the optimizer with the same model and rules."
        )
    problems: list[str] = []
    for index, (theirs, ours) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        if "grid" not in theirs:
            raise ValueError(
                f"{owner}.load_state_dict(): group {index} of the checkpoint has no grid; not a state of {owner}."
            )
        if theirs["format"] > FORMAT:
            raise ValueError(
                f"{owner}.load_state_dict(): checkpoint has format {theirs['format']}, this blaq reads {FORMAT}; update blaq."
            )
        for key in ("grid", "granularity"):
            if theirs[key] != ours[key]:
                names = ", ".join(f"'{parameter_name(ours, index, i)}'" for i in range(len(ours["params"])))
                problems.append(
                    f"checkpoint has {key}={theirs[key]!r} for {names}, this optimizer has {key}={ours[key]!r}"
                )
    if not problems:
        for group, p, state in _pairs(saved, groups):
            problems.extend(
                f"checkpoint has {key} of shape {a} for '{name(p)}', expected {b}"
                for key, a, b in _misfits(group, p, state)
            )
    if problems:
        raise ValueError(
            f"{owner}.load_state_dict(): "
            + "; ".join(problems)
            + ". Build the optimizer as it was when the checkpoint was "
            "saved, or load the model alone and start a new optimizer."
        )


def repair_dtypes(saved: dict[str, Any], groups: list[Group], state: MutableMapping[Tensor, Any]) -> None:
    """Put the saved tensors, uncast, in place of those that torch cast to the dtype of the parameter."""
    for group, p, theirs in _pairs(saved, groups):
        wide = p.dtype if group["grid"] is None else widen(p.new_empty(0)).dtype
        for key, value in theirs.items():
            if key in _LIKE_PARAMETER:
                state[p][key] = value.to(device=p.device, dtype=wide, copy=True)
            elif key in ("scale", "trial_scale"):
                state[p][key] = value.to(device=p.device, copy=True)
            elif key == "step":
                state[p][key] = value.clone()


def _misfits(group: Group, p: Tensor, state: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    shapes = {key: tuple(p.shape) for key in (*_LIKE_PARAMETER, "trial")}
    if "scale" in state:
        rows = row_shape(p.shape, group["granularity"], "checkpoint")[0]
        shapes["scale"] = shapes["trial_scale"] = (rows, Grid.parse(group["grid"]).scales)
    for key, shape in shapes.items():
        if key in state and tuple(state[key].shape) != shape:
            yield key, tuple(state[key].shape), shape


def _pairs(saved: dict[str, Any], groups: list[Group]) -> Iterator[tuple[Group, Tensor, dict[str, Any]]]:
    for theirs, ours in zip(saved["param_groups"], groups, strict=True):
        for index, p in zip(theirs["params"], ours["params"], strict=True):
            if index in saved["state"]:
                yield ours, p, saved["state"][index]
