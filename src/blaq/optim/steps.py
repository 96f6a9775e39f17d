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
    remembered = batch.state("trial_grad") if trial in ("past", "delayed") else []
    if remembered and batch.states[0]["trial_step"] > 0:
        # "past": the last trial gradient stands in for g. "delayed": the last gradient for that of a trial.
        here, there = (remembered, batch.gradients) if trial == "past" else (batch.gradients, remembered)
        advance(batch, here, there, write=trial != "past")
    else:
        advance(batch, batch.gradients, write=trial != "past")
    if remembered:
        torch._foreach_copy_(remembered, list(batch.gradients))
        for state in batch.states:
            state["trial_step"].fill_(batch.t)
    if trial == "past":
        _hold_next_trial(batch)


def advance(batch: Batch, *gradients: Sequence[Tensor], write: bool = True) -> None:
    """The step with one gradient, or back from the trial point and on with the blend of both; without `write` the parameters
    are left for a trial point to come.
    """
    w, m, v, g = _taken(batch, gradients[0])
    tensors = (w, m, v, g, *map(batch.take, gradients[1:]))
    _count(batch)
    r = Rates.of(batch.group, batch.t)
    if batch.how is None:
        passes.run_float(update.backtrack if len(gradients) > 1 else update.laq, tensors, r)
    else:
        how = batch.how if write else batch.how._replace(follows=False)
        function = passes.backtrack if len(gradients) > 1 else passes.laq
        found = passes.run(function, tensors, batch.scales(), r, look_aside(batch.t), how, batch.fast)
        if write:
            _write(batch, w, passes.solve(w, found, batch.how, batch.fast))
    _put(batch, w, m, v)


def to_trial_point(batch: Batch) -> list[Tensor]:
    """Let the parameters hold the trial point; nothing of the state changes. Returns its scales, one a parameter."""
    w, m, v, g = _taken(batch, batch.gradients)
    return _ahead(batch, w, m, v, g)


def _hold_next_trial(batch: Batch) -> None:
    """ "past": where a step along the newest trial gradient would lead."""
    ahead = batch.next()
    w, m, v, g = _taken(ahead, ahead.gradients)
    for state, scale in zip(ahead.states, _ahead(ahead, w, m, v, g), strict=False):
        state["scale"] = scale


def _ahead(batch: Batch, w: Tensor, m: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    r = Rates.of(batch.group, batch.t)
    w_trial = _room(batch, w)
    if batch.how is None:
        passes.run_float(passes.forward_float, (w_trial, w, m, v, g), r)
        batch.put(w_trial, batch.parameters)
        return []
    tensors = (w_trial, w, m, v, g)
    found = passes.run(passes.forward, tensors, batch.scales(), r, look_aside(batch.t), batch.how, batch.fast)
    scale = passes.solve(w_trial, found, batch.how, batch.fast)
    _write_values(batch, w_trial, scale)
    return list(torch.split(scale, batch.rows))


def _taken(batch: Batch, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = batch.take(batch.state("exp_avg"))
    return batch.take(batch.latents), m, batch.take(batch.state("exp_avg_sq")), batch.take(gradients)


def _put(batch: Batch, w: Tensor, m: Tensor, v: Tensor) -> None:
    batch.put(w, batch.latents)
    batch.put(m, batch.state("exp_avg"))
    batch.put(v, batch.state("exp_avg_sq"))


def _count(batch: Batch) -> None:
    torch._foreach_add_(batch.state("step"), 1)


def _write(batch: Batch, w: Tensor, scale: Tensor) -> None:
    torch._foreach_copy_(batch.state("scale"), list(torch.split(scale, batch.rows)))
    _write_values(batch, w, scale)


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
