"""The options of BLAQ: what a param group may hold, and what is refused."""

import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from blaq import projection
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
_BUILT = ("grid", "granularity", "trial")  # what state is made for: not to be edited in a group
# What may be, between steps; lr too, which schedulers edit often.
_EDITABLE = ("betas", "eps", "weight_decay", "a", "clip", "curvature", "solver", "trial_every")


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
        if isinstance(parameter, _sharded()):
            raise ValueError(
                f"{owner}: '{name}' is spread over processes ({type(parameter).__name__}, as FSDP2 and tensor parallelism make "
                "it), and steps need whole parameters; train with DistributedDataParallel."
            )
        if grid is not None and parameter.device.type in projection.WITHOUT_FLOAT64:
            raise ValueError(
                f"{owner}: '{name}' is on {parameter.device}, which has no float64, and steps add up in it; move the model to "
                "the CPU, or keep it in float."
            )
        if grid is not None:
            row_shape(parameter.shape, group["granularity"], f"{owner}: '{name}' ")
    _check_eps(owner, group, index)


def _sharded() -> tuple[type, ...]:
    """Classes of tensors of which a process holds a part; none where their module, which is slow to import, is not in use."""
    module = sys.modules.get("torch.distributed.tensor")
    return (module.DTensor,) if module is not None and hasattr(module, "DTensor") else ()


class Edits:
    """Watches the groups of an optimizer for options that were edited there, as schedulers and users do between steps.

    Args:
        groups: as they should be.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._built = list(map(_built, groups))
        self._checked: list[tuple[object, ...] | None] = [None] * len(groups)

    @property
    def trial(self) -> Any:
        """The one that the state was made for."""
        return self._built[0][_BUILT.index("trial")]

    def check(self, owner: str, groups: Sequence[dict[str, Any]]) -> None:
        """Check what is new; values that are the same objects as at the last check are not looked at again.

        Raises:
            ValueError: an option out of range, or one that cannot be changed here; another number of groups.
        """
        if len(groups) != len(self._built):
            raise ValueError(
                f"{owner}: param_groups has {len(groups)} groups, and the optimizer was told of {len(self._built)}; "
                "add groups by add_param_group(), and leave them in."
            )
        for index, group in enumerate(groups):
            check_lr(owner, group["lr"])
            known, now = self._checked[index], _watched(group, groups[0])
            if known is None or not all(map(is_, now, known)):
                self._check_group(owner, groups, index)
                self._checked[index] = _watched(group, groups[0])

    def _check_group(self, owner: str, groups: Sequence[dict[str, Any]], index: int) -> None:
        group = groups[index]
        for key, built, value in zip(_BUILT, self._built[index], _built(group), strict=True):
            if value != built:
                out = f"set optimizer.trial = {value!r}" if key == "trial" else "build a new optimizer to change it"
                raise ValueError(f"{owner}: group {index} was built with {key}={built!r} and now has {value!r}; {out}.")
        check_options(owner, group)
        check_shared(owner, group, groups[0], index)
        check_solver(group["solver"], owner)
        _check_eps(owner, group, index)
        group["betas"] = tuple(group["betas"])  # a list could be edited unseen


_built, _editable = itemgetter(*_BUILT), itemgetter(*_EDITABLE)


def _watched(group: dict[str, Any], first: dict[str, Any]) -> tuple[object, ...]:
    """What a check depends on, the learning rate apart; the trial is among what must not differ from its group's own."""
    return *_built(group), *_editable(group), first["trial_every"]


def _check_eps(owner: str, group: dict[str, Any], index: int) -> None:
    """Refuse an eps that is lost in the dtype of a parameter, or of the state of one with a grid."""

    def computed_in(p: Tensor) -> torch.dtype:
        return p.dtype if group["grid"] is None else torch.promote_types(p.dtype, torch.float32)

    for dtype in {computed_in(p): None for p in group["params"]}:
        if torch.tensor(group["eps"], dtype=dtype) == 0:
            position = next(i for i, p in enumerate(group["params"]) if computed_in(p) == dtype)
            name = parameter_name(group, index, position)
            raise ValueError(
                f"{owner}(eps={group['eps']}): is 0 in {dtype}, the dtype of {'the state of ' * (group['grid'] is not None)}"
                f"'{name}'; expected a larger eps."
            )


def check_shared(owner: str, group: dict[str, Any], first: dict[str, Any], index: int) -> None:
    """Refuse an option of a group that differs from the first group's, where all share one value."""
    for key in SHARED:
        if group[key] != first[key]:
            raise ValueError(f"{owner}: group {index} has {key}={group[key]!r}; all groups share one value of it.")


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
    betas, eps, decay, a, clip = (options[key] for key in ("betas", "eps", "weight_decay", "a", "clip"))
    check_lr(owner, options["lr"])
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


def check_lr(owner: str, lr: object) -> None:
    """Check a learning rate: a number, or a tensor of one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{owner}(lr={tuple(lr.shape)} tensor): expected one number.")
        lr = lr.item()
    if not _in(lr, 0, math.inf):
        raise ValueError(f"{owner}(lr={lr!r}): expected a finite lr >= 0.")


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
