"""A step of a batch of parameters, from its state to its state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blaq.optim import passes, update
from blaq.optim.batches import Batch
from blaq.optim.update import Rates
from blaq.solvers import look_aside


def one_gradient(batch: Batch, trial: str) -> None:
    """A step of LAQ, of "past", or of "delayed"."""
    if trial == "past":
        _past(batch)
    elif trial == "delayed":
        last = batch.state("trial_grad")
        # The last gradient stands in for that of a trial; the first step has none.
        advance(batch, *([batch.gradients, last] if batch.remembers else [batch.gradients]))
        torch._foreach_copy_(last, list(batch.gradients))
        _remember_step(batch)
    else:
        advance(batch, batch.gradients)


def advance(batch: Batch, *gradients: Sequence[Tensor]) -> None:
    """The step with one gradient, or back from the trial point and on with the blend of both."""
    w, m, v, g = _taken(batch, gradients[0])
    tensors = (w, m, v, g, *map(batch.take, gradients[1:]))
    _count(batch)
    rates = (Rates.of(batch.group, batch.t),)
    if batch.how is None:
        passes.run_float(update.backtrack if len(gradients) > 1 else update.laq, tensors, rates)
    else:
        function = passes.backtrack if len(gradients) > 1 else passes.laq
        found = passes.run(function, tensors, batch.scales(), rates, look_aside(batch.t), batch.how, batch.fast)
        scale = passes.solve(w, found, batch.how, batch.fast)
        _put_scales(batch, scale)
        _write_values(batch, w, scale)
    _put(batch, w, m, v)


def to_trial_point(batch: Batch) -> list[Tensor]:
    """Let the parameters hold the trial point; nothing of the state changes. Returns its scales, one a parameter."""
    w, m, v, g = _taken(batch, batch.gradients)
    w_trial = _room(batch, w)
    rates = (Rates.of(batch.group, batch.t),)
    if batch.how is None:
        passes.run_float(passes.forward_float, (w_trial, w, m, v, g), rates)
        batch.put(w_trial, batch.parameters)
        return []
    tensors = (w_trial, w, m, v, g)
    found = passes.run(passes.forward, tensors, batch.scales(), rates, look_aside(batch.t), batch.how, batch.fast)
    scale = passes.solve(w_trial, found, batch.how, batch.fast)
    _write_values(batch, w_trial, scale)
    return list(torch.split(scale, batch.rows))


def _past(batch: Batch) -> None:
    """A step of "past", and on to where a step along the newest gradient would lead."""
    ahead = batch.next()
    w, m, v, g = _taken(batch, batch.state("trial_grad"))
    w_trial = _room(batch, w)
    tensors = (w_trial, w, m, v, g, batch.take(batch.gradients))
    rates = (Rates.of(batch.group, batch.t), Rates.of(batch.group, ahead.t))
    _count(batch)
    if ahead.how is None:
        passes.run_float(passes.past_float if batch.remembers else passes.first_past_float, tensors, rates)
        batch.put(w_trial, batch.parameters)
    else:
        function = passes.past if batch.remembers else passes.first_past
        found = passes.run(function, tensors, batch.scales(), rates, look_aside(ahead.t), ahead.how, ahead.fast)
        scale = passes.solve(w_trial, found, ahead.how, ahead.fast)
        _put_scales(batch, scale)
        _write_values(ahead, w_trial, scale)
    _put(batch, w, m, v)
    batch.put(g, batch.state("trial_grad"))
    _remember_step(batch)


def _remember_step(batch: Batch) -> None:
    for state in batch.states:
        state["trial_step"].fill_(batch.t)


def _taken(batch: Batch, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = batch.take(batch.state("exp_avg"))
    return batch.take(batch.latents), m, batch.take(batch.state("exp_avg_sq")), batch.take(gradients)


def _put(batch: Batch, w: Tensor, m: Tensor, v: Tensor) -> None:
    batch.put(w, batch.latents)
    batch.put(m, batch.state("exp_avg"))
    batch.put(v, batch.state("exp_avg_sq"))


def _count(batch: Batch) -> None:
    torch._foreach_add_(batch.state("step"), 1)


def _put_scales(batch: Batch, scale: Tensor) -> None:
    torch._foreach_copy_(batch.state("scale"), list(torch.split(scale, batch.rows)))


def _write_values(batch: Batch, w: Tensor, scale: Tensor) -> None:
    assert batch.how is not None
    p = _room(batch, w, batch.parameters[0].dtype)
    passes.run_write(p, w, scale, batch.how, batch.fast)
    batch.put(p, batch.parameters)


def _room(batch: Batch, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Where to write what the parameters shall hold: the memory of a single one itself, if it can be read as such a matrix."""
    single = batch.parameters[0]
    if len(batch.parameters) == 1 and single.dtype == (dtype or like.dtype):
        return batch.take([single])
    return torch.empty_like(like, dtype=dtype)
