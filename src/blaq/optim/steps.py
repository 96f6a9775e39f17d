"""A step of a batch of parameters, from its state to its state; the step is counted afterwards, see `blaq.optim.batches`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blaq.optim import passes, running, update
from blaq.optim.batches import Batch
from blaq.optim.options import REMEMBERING
from blaq.optim.passes import Found, How
from blaq.optim.running import Shape
from blaq.optim.update import Rates
from blaq.solvers import look_aside


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
    how = batch.how(batch.t)
    shape = _shape(batch, how)
    taken = batch.take(shape, "latent", "exp_avg", "exp_avg_sq")
    w = taken.matrices[0]
    tensors = (*taken.matrices, *[batch.take_gradients(some, shape) for some in gradients])
    rates = (Rates.of(batch.group, batch.t),)
    if how is None:
        running.run_float(update.backtrack if len(gradients) > 1 else update.laq, tensors, rates, batch.codes)
    else:
        function = passes.backtrack if len(gradients) > 1 else passes.laq
        try:
            scale = _solved(batch, function, w, tensors, rates, batch.t, how)
        except BaseException:  # a parameter may hold the metric
            latent = batch.take(batch.shape, "latent").matrices[0]  # as the state has it: w may be a copy
            _write_values(batch, latent, batch.scales(), how)
            raise
        batch.put_scales(scale)
        _write_values(batch, batch.in_rows("latent", w), scale, how)
    taken.put()


def to_trial_point(batch: Batch) -> list[Tensor]:
    """Let the parameters hold the trial point; nothing of the state changes. Returns its scales, one a parameter."""
    how = batch.how(batch.t)
    shape = _shape(batch, how)
    taken = batch.take(shape, "latent", "exp_avg", "exp_avg_sq")
    g = batch.take_gradients(batch.gradients, shape)
    rates = (Rates.of(batch.group, batch.t),)
    if how is None:  # its latent weight is itself
        running.run_float(passes.forward_float, (*taken.matrices, g), rates, batch.codes)
        batch.put_parameters(taken.matrices[0])
        return []
    w_trial = batch.room(taken.matrices[0].dtype, shape)
    scale = _solved(batch, passes.forward, w_trial, (w_trial, *taken.matrices, g), rates, batch.t, how)
    _write_values(batch, batch.in_rows("parameter", w_trial), scale, how)
    return batch.of_each(scale)


def _past(batch: Batch) -> None:
    """A step of "past", and on to where a step along the newest gradient would lead."""
    ahead = batch.t + 1
    how = batch.how(ahead)
    shape = _shape(batch, how)
    taken = batch.take(shape, "latent", "exp_avg", "exp_avg_sq", "trial_grad")
    w_trial = batch.room(taken.matrices[0].dtype, shape)
    tensors = (w_trial, *taken.matrices, batch.take_gradients(batch.gradients, shape))
    rates = Rates.of(batch.group, batch.t), Rates.of(batch.group, ahead)
    if how is None:
        running.run_float(passes.past_float, tensors, rates, batch.codes)
        batch.put_parameters(w_trial)
    else:
        try:
            scale = _solved(batch, passes.past, w_trial, tensors, rates, ahead, how)
        except BaseException:
            if w_trial.data_ptr() == batch.parameters[0].data_ptr():  # a parameter may hold what is not quantized yet
                _write_values(batch, batch.in_rows("parameter", w_trial), batch.scales(), how)
            raise
        batch.put_scales(scale)
        _write_values(batch, batch.in_rows("parameter", w_trial), scale, how)
    taken.put()


def _shape(batch: Batch, how: How | None) -> Shape:
    """The shape in which a pass goes over a batch."""
    return batch.shape if how is None or batch.codes is None else running.in_pieces(batch.shape)


def _solved(
    batch: Batch,
    function: Callable[..., Found],
    w: Tensor,
    tensors: tuple[Tensor, ...],
    rates: tuple[Rates, ...],
    t: int,
    how: How,
) -> Tensor:
    """Make a pass, and find the scale of w, which it has written."""

    def room() -> Tensor:
        """For the metric: where the parameter is, which is about to be written anew, unless w is there already."""
        free = batch.room(w.dtype, _shape(batch, how))
        return torch.empty_like(w) if free.data_ptr() == w.data_ptr() else free

    found = batch.pass_of(function, how, w)(tensors, batch.scales(), rates, look_aside(t), room)
    if how.follows:
        return found
    return running.solve(w.view(batch.shape), found.view(batch.shape), how, fast=batch.codes is not None)


def _write_values(batch: Batch, w: Tensor, scale: Tensor, how: How) -> None:
    p = batch.room(batch.parameters[0].dtype, batch.shape)
    running.run_write(p, w, scale, how.grid, batch.codes)
    batch.put_parameters(p)
