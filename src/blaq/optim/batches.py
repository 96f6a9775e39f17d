"""Which parameters are stepped together: as one matrix in rows, in which each row has scales of its own.

Small parameters of the same shape in rows become one matrix, and small ones without a grid, of whatever shapes, one row, so
that a network of many small layers does not pay for Python once a layer; a large parameter is its own matrix, without a copy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.held import State
from blaq.optim.passes import How
from blaq.optim.update import Group

TOGETHER_UP_TO = 2**16  # weights of a parameter: copying more costs more than the calls that it saves
BATCH_UP_TO = 2**18  # weights of parameters together: what is copied stays in cache, in memory that is used again

Entry = tuple[Group, Tensor, Tensor, State]
"""A parameter with its group, its gradient and its state."""


@dataclass
class Batch:
    """Parameters of one group, dtype, device and step count; with a grid also of one shape, in rows.

    Attributes:
        group: their group.
        t: the step that they are about to take, from 1.
        rows: of each parameter.
        fast: whether the passes over them are compiled.
        how: what their passes are compiled for; None without a grid. The first step with a gradient is solved exactly.
        parameters, gradients, states: aligned.
    """

    group: Group
    t: int
    rows: int
    fast: bool
    how: How | None
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: Sequence[State]

    @property
    def remembers(self) -> bool:
        """Whether there is a last gradient, of "past" or "delayed"."""
        return bool(self.states[0]["trial_step"] > 0)

    def take(self, tensors: Iterable[Tensor]) -> Tensor:
        """The tensors, one a parameter and of its shape, as one matrix (rows of all, N), without a grid (1, all): for a single
        one a view.
        """
        pieces = [self._in_rows(t, like) for t, like in zip(tensors, self._likes, strict=True)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=0 if self.how is not None else 1)

    def put(self, matrix: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the rows of a matrix back to where `take` had them from."""
        if len(tensors) > 1 or tensors[0].stride() != self._likes[0].stride():  # else it was changed in place
            self.put_new(matrix, tensors)

    def put_new(self, matrix: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the rows of a matrix into tensors, one a parameter and of its shape."""
        starts = accumulate((like.numel() for like in self._likes), initial=0)
        parts = [
            matrix.as_strided(of.shape, of.stride(), start) for of, start in zip(self._likes, starts, strict=False)
        ]
        torch._foreach_copy_(list(tensors), parts)

    def state(self, key: str) -> list[Tensor]:
        """An entry of all states."""
        return [state[key] for state in self.states]

    @property
    def latents(self) -> list[Tensor]:
        """The latent weights; a parameter that has none is its own."""
        return [state.get("latent", p) for state, p in zip(self.states, self.parameters, strict=True)]

    def scales(self) -> Tensor:
        """The scales that the projection starts from, (rows of all, S)."""
        scales = self.state("scale")
        return scales[0] if len(scales) == 1 else torch.cat(scales)

    def next(self) -> "Batch":
        """The same parameters one step on."""
        return replace(self, t=self.t + 1, how=_how(self.group, self.t + 1))

    @cached_property
    def _likes(self) -> list[Tensor]:
        """Where the entries of each parameter lie in memory: densely, and row by row."""
        return self.state("exp_avg")

    def _in_rows(self, tensor: Tensor, like: Tensor) -> Tensor:
        if tensor.stride() != like.stride():
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        columns = tensor.numel() // max(self.rows, 1)
        if tensor.is_contiguous():
            return tensor.view(self.rows, columns)
        return tensor.as_strided((self.rows, columns), (columns, 1))


def batches(entries: Iterable[Entry], fast: bool) -> list[Batch]:
    """Sort parameters with gradients into batches, about to take their next step; `fast`: compile what is taken often."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        group, p, grad, state = entry
        alone = id(p) if p.numel() > TOGETHER_UP_TO else None
        shape = (p.shape, state["exp_avg"].stride()) if group["grid"] is not None else None
        past = (int(state["step"]), int(state.get("trial_step", 0)))
        found.setdefault((id(group), alone, shape, p.dtype, grad.dtype, p.device, *past), []).append(entry)
    return [_batch(some, fast) for entries in found.values() for some in _portions(entries)]


def portions(sizes: Sequence[int]) -> list[int]:
    """How many of the parameters of some numbers of weights are stepped together: those of every batch, in order."""
    counts: list[int] = []
    weights = 0
    for size in sizes:
        weights += size
        if counts and weights <= BATCH_UP_TO:
            counts[-1] += 1
        else:
            counts.append(1)
            weights = size
    return counts


def _portions(entries: list[Entry]) -> Iterator[list[Entry]]:
    rest = iter(entries)
    for count in portions([p.numel() for _, p, _, _ in entries]):
        yield list(islice(rest, count))


def _batch(entries: list[Entry], fast: bool) -> Batch:
    groups, parameters, gradients, states = zip(*entries, strict=True)
    group, t = groups[0], int(states[0]["step"]) + 1
    how = _how(group, t)
    once = how is not None and not how.follows and group["solver"] == "alternating"  # no later step takes that pass
    rows = len(states[0]["scale"]) if how is not None else 1
    return Batch(group, t, rows, fast and not once, how, parameters, gradients, states)


def _how(group: Group, t: int) -> How | None:
    if group["grid"] is None:
        return None
    grid = Grid.parse(group["grid"])
    follows = grid.has_closed_form or (group["solver"] == "alternating" and t > 1)
    return How(grid, follows, group["curvature"], wide=group["solver"] == "exact")
