"""An optimizer whose parameters hold quantized weights, and whose state holds the latent ones.

Here: groups, state, what the parameters hold, checkpoints. The steps are in `blaq.optim.halves` and `blaq.optim.blaq`.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from blaq.optim import checkpoint, compiled, held, update
from blaq.optim.batches import Entry, Kept
from blaq.optim.observer import StepObserver
from blaq.optim.options import (
    COUNTERS,
    GROUP_DEFAULTS,
    REMEMBERING,
    SHARED,
    TRIALS,
    Edits,
    check_arguments,
    check_group,
    check_options,
    check_shared,
    check_trial_every,
    parameter_name,
)
from blaq.optim.update import Group
from blaq.optim.written import Written

_NAMING = ("param_names", "notes")  # of a group: about this model


class LatentOptimizer(Optimizer):
    """Base of `BLAQ`: a quantized parameter holds exactly ``scale * level``; its latent weight is in the state.

    Attributes:
        module: the model, if given.
        observers: told of every step, see `blaq.optim.observer.StepObserver`; no part of a checkpoint or a copy.
    """

    def __init__(
        self, params: ParamsT, options: dict[str, Any], module: nn.Module | None, compile: bool | None = None
    ) -> None:
        check_options(self._owner, options)
        check_arguments(self._owner, params, module, compile)
        self.module = module
        self.compile = compile
        self.observers: list[StepObserver] = []
        self._constructed = False
        self._reset_transient()
        super().__init__(params, {**options, **GROUP_DEFAULTS})
        check_trial_every(self._owner, self.param_groups[0])
        if all(group["grid"] is None for group in self.param_groups):
            mro = type(self).__mro__
            warnings.warn(
                f"{self._owner}: no parameter group has a grid, so nothing is quantized; build the groups with "
                "blaq.param_groups(model, bits=...).",
                stacklevel=2 + sum("__init__" in vars(of) for of in mro[: mro.index(LatentOptimizer)]),
            )
        self._initialize(self.param_groups)
        self._constructed = True

    def _reset_transient(self) -> None:
        """What can be found again after loading: never in a checkpoint."""
        self._kept = Kept()
        self._written = Written()
        self._weights: int | None = None  # how many are quantized
        self._edits = Edits(self.__dict__.get("param_groups", ()))

    def _check_idle(self, what: str) -> None:
        """Refuse while a step is under way: nothing may be saved or changed then."""

    # --- what the parameters hold ---------------------------------------------------------------------------------------

    def latent(self, p: Tensor) -> Tensor:
        """The latent weight of a parameter, at least float32; the parameter itself where it has none. A step may move it in
        memory: ask anew.
        """
        self._group(p)
        latent: Tensor = self.state[p].get("latent", p)
        return latent.detach()

    @torch.no_grad()
    def codes(self, p: Tensor) -> Tensor:
        """The codes that a quantized parameter holds now: uint8, shape of p, index into ``grid.levels``."""
        scale, group = self.scale(p), self._group(p)
        if not held.is_on_grid(p, scale, group):
            raise ValueError(self._changed_outside(p))
        return held.held_codes(p, scale, group)

    def scale(self, p: Tensor) -> Tensor:
        """The scales of what a quantized parameter holds now: float32 (rows, 1), or (rows, 2) for ``ternary2``."""
        if self._group(p)["grid"] is None:
            raise ValueError(f"{self._owner}: '{self._name(p)}' has no grid; its value is the parameter itself.")
        return self._scale_held(p).clone()

    @compiled.untraced
    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Go on from weights written since the last step, say those of a float checkpoint: they become latent weights, and
        are quantized. Parameters that still hold what the optimizer wrote keep their latent weights; all keep their moments.
        (With ``trial="past"``, after loading and before the next step, what it wrote is computed with the learning rate of
        now: call this before a scheduler changes that.)

        Raises:
            ValueError: a weight that is NaN or Inf; nothing is changed then.
        """
        self._check_idle("adopt_weights")
        written = [
            entry for entry in self._parameters() if "latent" in entry[2] and not self._written.holds_ours(*entry)
        ]
        new = [held.initial_state(p, self._name(p), group) for group, p, _ in written]
        before = {p: state["latent"] for _, p, state in written} if self.observers else {}
        for (group, p, state), fresh in zip(written, new, strict=True):
            state.update({key: fresh[key] for key in ("latent", "scale", "trial_grad", "trial_step") if key in fresh})
            if group["grid"] is not None:
                self._hold_latent(p, state, group)
            if group["evaluating"]:  # `train` goes on from here too
                state["trial"] = p.clone()
                state.update({"trial_scale": state["scale"]} if group["grid"] is not None else {})
        for observer in self.observers if written else ():
            observer.after_adoption(before)

    @compiled.untraced
    @torch.no_grad()
    def eval(self) -> None:
        """Let the parameters hold the weights to evaluate and to ship. With ``trial="past"`` these differ from the trial
        point that they hold while training; otherwise nothing changes. Idempotent.

        Raises:
            ValueError: with ``trial="past"``, weights written from outside; see `adopt_weights`.
        """
        self._check_idle("eval")
        if self.trial != "past" or self.param_groups[0]["evaluating"]:
            return
        self._check_untouched()
        scales = [self._scale_to_ship(*entry) for entry in self._parameters() if entry[0]["grid"] is not None]
        solved = iter(scales)
        try:
            for group, p, state in self._parameters():
                state["trial"] = p.clone()
                if group["grid"] is None:
                    self._hold(p, state["latent"])
                else:
                    state["trial_scale"], state["scale"] = state["scale"], next(solved)
                    self._hold_latent(p, state, group)
        except BaseException:
            self._leave_evaluation()
            raise
        self._set_all(evaluating=True)

    @compiled.untraced
    @torch.no_grad()
    def train(self) -> None:
        """Go back to training after `eval`. Idempotent.

        Raises:
            ValueError: with ``trial="past"``, weights written from outside; see `adopt_weights`.
        """
        self._check_idle("train")
        if not self.param_groups[0]["evaluating"]:
            return
        self._check_untouched()
        self._leave_evaluation()
        self._set_all(evaluating=False)

    @property
    def trial(self) -> str:
        """Where the gradients are taken; may be set between steps, for example to make some epochs two-stage."""
        return str(self.param_groups[0]["trial"])

    @trial.setter
    @torch.no_grad()
    def trial(self, trial: str) -> None:
        if trial not in TRIALS:
            raise ValueError(f"{self._owner}(trial={trial!r}): expected 'fresh', 'past', 'delayed' or 'none'.")
        self._check_idle("trial")
        self._set_all(trial=self._edits.trial)  # one that was edited in a group is what is being set right
        self._edits.check(self._owner, self.param_groups)
        if trial == self.trial:
            return
        if self.trial == "past":
            self.eval()
            self._set_all(evaluating=False)
        for group, p, state in self._parameters():
            if trial == "past":
                state.setdefault("latent", p.detach().clone())
            elif group["grid"] is None:
                state.pop("latent", None)
            for key in ("trial", "trial_scale", "trial_grad", "trial_step"):
                state.pop(key, None)
            if trial in REMEMBERING:
                state.update(held.no_trial_yet(state["exp_avg"]))
            if trial == "past" and group["grid"] is None:
                self._written.note(p)
        self._set_all(trial=trial)
        self._edits = Edits(self.param_groups)

    @property
    def gradient_evaluations(self) -> int:
        """Gradients that went into the parameters so far: two for a step with a trial."""
        return int(self.param_groups[0]["gradient_evaluations"])

    # --- groups and checkpoints ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; quantized parameters are on their grid when this returns."""
        if self._constructed:
            self._edits.check(self._owner, self.param_groups)
        counters = {key: self.param_groups[0][key] if self._constructed else GROUP_DEFAULTS[key] for key in COUNTERS}
        shared = {key: self.param_groups[0][key] for key in SHARED} if self._constructed else {}
        # A group of its own: one that two optimizers share would count the steps of both.
        super().add_param_group({**shared, **param_group, **counters})
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        try:
            check_group(self._owner, group, self.defaults, index)
            check_shared(self._owner, group, self.param_groups[0], index)
            if self._constructed:
                if group["evaluating"]:
                    raise ValueError(f"{self._owner}.add_param_group(): call train() first.")
                self._initialize([group])
        except BaseException:
            self.param_groups.pop()
            raise
        self._edits, self._weights = Edits(self.param_groups), None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; see torch. Plain tensors and values: loads with ``weights_only=True``."""
        self._check_idle("state_dict")
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, bit for bit: also tensors that torch would cast to the parameter's dtype.

        Quantized parameters then hold what the state says, in whichever order model and optimizer are loaded. With
        ``trial="past"``, outside `eval`, they hold a trial point, which comes with the model's own state.

        Raises:
            ValueError: a state of other grids, granularities or shapes, with the names; nothing is loaded then.
        """
        self._check_idle("load_state_dict")
        loaded: dict[str, Any] = {}
        own = [{key: group[key] for key in _NAMING if key in group} for group in self.param_groups]

        def check(_: Optimizer, state: dict[str, Any]) -> None:
            checkpoint.check_loadable(self._owner, state, self.param_groups, self._name)
            loaded.update(state)

        def repair(_: Optimizer) -> None:
            checkpoint.repair(loaded, self.param_groups, self.state)
            self._written.forget()
            for group, naming in zip(self.param_groups, own, strict=True):
                group.update(naming)  # torch takes those of the model that was saved
            evaluating = self.param_groups[0]["evaluating"]
            if self.trial != "past" or evaluating:
                for group, p, state in self._parameters():
                    if group["grid"] is not None:
                        self._hold_latent(p, state, group)
                    elif evaluating:
                        self._hold(p, state["latent"])

        # Last before and first after torch's own work, whatever hooks the user has registered.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(repair, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle("pickle")
        self._edits.check(self._owner, self.param_groups)
        return {**super().__getstate__(), "module": self.module, "compile": self.compile, "_constructed": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("observers", [])  # a copy has none; loading a state keeps them
        self._reset_transient()

    # --- internals ------------------------------------------------------------------------------------------------------

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _parameters(self) -> Iterator[tuple[Group, Tensor, held.State]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p, self.state[p]

    def _with_gradients(self) -> list[Entry]:
        return [(group, p, p.grad, state) for group, p, state in self._parameters() if p.grad is not None]

    @torch.no_grad()
    def _initialize(self, groups: list[Group]) -> None:
        """State for new groups. All of it is made before any parameter changes: a bad weight leaves the model alone."""
        new = {p: (held.initial_state(p, self._name(p), group), group) for group in groups for p in group["params"]}
        for p, (state, group) in new.items():
            self.state[p] = state
            if group["grid"] is not None:
                self._hold_latent(p, state, group)
            elif "latent" in state:
                self._written.note(p)

    def _scale_to_ship(self, group: Group, p: Tensor, state: held.State) -> Tensor:
        t = int(state["step"])
        d = update.curvature(state["exp_avg_sq"], update.Rates.of(group, t)) if t else None
        return held.exact_scale(state["latent"], d, len(state["scale"]), group)

    def _leave_evaluation(self) -> None:
        """Back to the trial point, wherever a parameter has left it."""
        for _, p, state in self._parameters():
            if "trial_scale" in state:
                state["scale"] = state.pop("trial_scale")
            if "trial" in state:
                self._hold(p, state["trial"])
                del state["trial"]

    def _hold_latent(self, p: Tensor, state: held.State, group: Group) -> None:
        held.hold(p, state, group)
        self._written.note(p)
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    def _hold(self, p: Tensor, values: Tensor) -> None:
        p.copy_(values)
        self._written.note(p)
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    @property
    def compiles(self) -> bool:
        """Whether the passes over the weights are compiled, where there is a compiler."""
        if self.compile is not None:
            return self.compile
        if self._weights is None:
            quantized = (group["params"] for group in self.param_groups if group["grid"] is not None)
            self._weights = sum(p.numel() for parameters in quantized for p in parameters)
        return self._weights >= compiled.COMPILED_FROM

    def _scale_held(self, p: Tensor) -> Tensor:
        """The scale of what p holds now."""
        scale: Tensor = self.state[p]["scale"]
        return scale

    def _check_untouched(self) -> None:
        """Find weights written from outside since our last write: training would silently throw them away."""
        past = self.trial == "past"
        for group in self.param_groups:
            for p in group["params"] if past or group["grid"] is not None else ():
                if not self._written.untouched(p):
                    state = self.state[p]
                    if group["grid"] is None and not int(state["step"]) and not group["evaluating"]:
                        state["latent"].copy_(p)  # it is what the first step starts from
                    elif not self._written.is_ours(group, p, state):
                        raise ValueError(self._changed_outside(p))
                    self._written.note(p)

    def _changed_outside(self, p: Tensor) -> str:
        what = "what" if self._group(p)["grid"] is None else "the scale * level"
        return (
            f"{self._owner}: '{self._name(p)}' was changed outside the optimizer and is no longer {what} it wrote; "
            "load weights before building the optimizer, or call adopt_weights() to go on from the new values."
        )

    def _set_all(self, **options: Any) -> None:
        for group in self.param_groups:
            group.update(options)

    def _devices(self) -> set[torch.device]:
        return {p.device for group in self.param_groups for p in group["params"]}

    def _group(self, p: Tensor) -> Group:
        for group in self.param_groups:
            if any(p is q for q in group["params"]):
                return group
        what = f"the tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p)
        raise ValueError(f"{self._owner}: {what} is no parameter of this optimizer.")

    def _name(self, p: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, q in enumerate(group["params"]):
                if p is q:
                    return parameter_name(group, index, position)
        return "?"

    def _count(self, evaluations: int) -> None:
        torch.clear_autocast_cache()  # it holds casts of the weights as they were
        first = self.param_groups[0]
        self._set_all(steps=first["steps"] + 1, gradient_evaluations=first["gradient_evaluations"] + evaluations)
        for observer in self.observers:
            observer.after_update()
