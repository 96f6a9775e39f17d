"""A step of a batch of parameters, from its state to its state; the step is counted afterwards, see `blaq.optim.batches`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blaq.optim import passes, running, update
from blaq.optim.batches import Batch, Plan
from blaq.optim.options import REMEMBERING
from blaq.optim.passes import Found
from blaq.optim.update import Rates
from blaq.solvers import look_aside


class _Kind(NamedTuple):
    """A step, or half of one: its pass, the same of parameters without a grid, and what of their states they go over."""

    quantized: Callable[..., Found]
    plain: Callable[..., Any]
    keys: tuple[str, ...] = ("latent", "exp_avg", "exp_avg_sq")


_LAQ = _Kind(passes.laq, update.laq)
_BACKTRACK = _Kind(passes.backtrack, update.backtrack)
_FORWARD = _Kind(passes.forward, passes.forward_float)
_PAST = _Kind(passes.past, passes.past_float, ("latent", "exp_avg", "exp_avg_sq", "trial_grad"))


def one_gradient(batch: Batch, trial: str) -> None:
    """A step of LAQ, of "past", or of "delayed"."""
    if trial in REMEMBERING and not batch.remembers:
        # The first step has no last gradient: with its own in that place, the blend of both is the step of LAQ, bit for bit.
        torch._foreach_copy_(batch.state("trial_grad"), list(batch.gradients))
    if trial == "past":
        _past(batch)
    elif trial == "delayed":
        last = batch.state("trial_grad")
        advance(batch, batch.gradients, last)  # the last gradient stands in for that of a trial
        torch._foreach_copy_(last, list(batch.gradients))
    else:
        advance(batch, batch.gradients)


def advance(batch: Batch, *gradients: Sequence[Tensor]) -> None:
    """The step with one gradient, or back from the trial point and on with the blend of both."""
    kind = _BACKTRACK if len(gradients) > 1 else _LAQ
    plan = batch.plan(kind.quantized, kind.keys, batch.t)
    tensors = (*plan.taken.matrices, *[batch.take_gradients(some, plan.shape) for some in gradients])
    w, rates = tensors[0], (Rates.of(batch.group, batch.t),)
    if plan.quantized is None:
        running.run_float(kind.plain, tensors, rates, plan.codes)
    else:
        try:
            scale = _solved(batch, plan, w, tensors, rates, batch.t)
        except BaseException:  # a parameter may hold the metric
            latent = batch.take(batch.shape, "latent").matrices[0]  # as the state has it: w may be a copy
            _write_values(batch, plan, latent, batch.scales())
            raise
        batch.put_scales(scale)
        _write_values(batch, plan, w.view(batch.shape), scale)
    plan.taken.put()


def to_trial_point(batch: Batch) -> list[Tensor]:
    """Let the parameters hold the trial point; nothing of the state changes. Returns its scales, one a parameter."""
    plan = batch.plan(_FORWARD.quantized, _FORWARD.keys, batch.t)
    matrices, g = plan.taken.matrices, batch.take_gradients(batch.gradients, plan.shape)
    rates = (Rates.of(batch.group, batch.t),)
    if plan.quantized is None:  # its latent weight is itself
        running.run_float(_FORWARD.plain, (*matrices, g), rates, plan.codes)
        batch.put_parameters(matrices[0])
        return []
    w_trial = batch.room(matrices[0].dtype, plan.shape)
    scale = _solved(batch, plan, w_trial, (w_trial, *matrices, g), rates, batch.t)
    _write_values(batch, plan, w_trial.view(batch.shape), scale)
    return batch.of_each(scale)


def _past(batch: Batch) -> None:
    """A step of "past", and on to where a step along the newest gradient would lead."""
    ahead = batch.t + 1
    plan = batch.plan(_PAST.quantized, _PAST.keys, ahead)
    matrices = plan.taken.matrices
    w_trial = batch.room(matrices[0].dtype, plan.shape)
    tensors = (w_trial, *matrices, batch.take_gradients(batch.gradients, plan.shape))
    rates = Rates.of(batch.group, batch.t), Rates.of(batch.group, ahead)
    if plan.quantized is None:
        running.run_float(_PAST.plain, tensors, rates, plan.codes)
        batch.put_parameters(w_trial)
    else:
        try:
            scale = _solved(batch, plan, w_trial, tensors, rates, ahead)
        except BaseException:
            if w_trial.data_ptr() == batch.parameters[0].data_ptr():  # a parameter may hold what is not quantized yet
                _write_values(batch, plan, w_trial.view(batch.shape), batch.scales())
            raise
        batch.put_scales(scale)
        _write_values(batch, plan, w_trial.view(batch.shape), scale)
    plan.taken.put()


def _solved(
    batch: Batch, plan: Plan, w: Tensor, tensors: tuple[Tensor, ...], rates: tuple[Rates, ...], t: int
) -> Tensor:
    """Make a pass, and find the scale of w, which it has written."""

    def room() -> Tensor:
        """For the metric: where the parameter is, which is about to be written anew, unless w is there already."""
        free = batch.room(w.dtype, plan.shape)
        return torch.empty_like(w) if free.data_ptr() == w.data_ptr() else free

    quantized = plan.quantized
    assert quantized is not None
    found = quantized(tensors, batch.scales(), rates, look_aside(t), room)
    if quantized.how.follows:
        return found
    return running.solve(w.view(batch.shape), found.view(batch.shape), quantized.how, fast=plan.codes is not None)


def _write_values(batch: Batch, plan: Plan, w: Tensor, scale: Tensor) -> None:
    assert plan.quantized is not None
    p = batch.room(batch.parameters[0].dtype, batch.shape)
    plan.quantized.write(p, w, scale)
    batch.put_parameters(p)
