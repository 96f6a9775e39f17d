"""Which parameters are stepped together: as one matrix in rows, in which each row has scales of its own.

Small parameters of the same shape in rows become one matrix, and small ones without a grid, of whatever shapes, one row, so
that a network of many small layers does not pay for Python once a layer; a large parameter is its own matrix, without a copy.
Batches are kept from step to step, and with them their views of the state and the compiled code that fits them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.compiled import Codes, surroundings
from blaq.optim.held import State
from blaq.optim.passes import How
from blaq.optim.update import Group

TOGETHER_UP_TO = 2**16  # weights of a parameter: copying more costs more than the calls that it saves
BATCH_UP_TO = 2**18  # weights of parameters together: what is copied stays in cache, in memory that is used again

Entry = tuple[Group, Tensor, Tensor, State]
"""A parameter with its group, its gradient and its state."""


class _Rows:
    """Tensors, one a parameter, as one matrix: for a single one a view, and in any case views that are kept.

    Args:
        tensors: each of the shape of its parameter.
        likes: how the entries of each parameter lie in memory: densely, and row by row.
        shape: of the matrix.
    """

    def __init__(self, tensors: Sequence[Tensor], likes: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self._tensors, self._likes, self._shape = tensors, likes, shape
        alike = all(t.stride() == like.stride() for t, like in zip(tensors, likes, strict=True))
        self._flat = [_flat(t.detach(), like) for t, like in zip(tensors, likes, strict=True)] if alike else None
        self.view = self._flat[0].view(shape) if self._flat is not None and len(self._flat) == 1 else None

    def take(self) -> Tensor:
        """The matrix."""
        if self.view is not None:
            return self.view
        return _matrix(self._flat or map(_flat, self._tensors, self._likes), self._shape)

    def put(self, matrix: Tensor) -> None:
        """Write a matrix back to where `take` had it from."""
        if self._flat is None:
            starts = accumulate((like.numel() for like in self._likes), initial=0)
            places = zip(self._likes, starts, strict=False)
            torch._foreach_copy_(
                list(self._tensors), [matrix.as_strided(of.shape, of.stride(), at) for of, at in places]
            )
        else:
            torch._foreach_copy_(self._flat, torch.split(matrix.view(-1), [t.numel() for t in self._flat]))


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """The entries in the order in which those of `like` lie in memory: a view, if its own lie so."""
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _matrix(flat: Iterable[Tensor], shape: tuple[int, int]) -> Tensor:
    pieces = list(flat)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(shape)


@dataclass(eq=False)
class Batch:
    """Parameters of one group, dtype, device and step count; with a grid also of one shape, in rows.

    Attributes:
        group: their group.
        t: the step that they are about to take, from 1.
        rows: of each parameter; 1 without a grid.
        fast: whether passes that are taken often are compiled.
        remembers: whether there is a last gradient, of "past" or "delayed".
        parameters, gradients, states: aligned.
    """

    group: Group
    t: int
    rows: int
    fast: bool
    remembers: bool
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: Sequence[State]
    _codes: Codes = field(default_factory=Codes)
    _kept: dict[str, _Rows] = field(default_factory=dict)

    def how(self, t: int) -> How | None:
        """What the passes of a step are compiled for; None without a grid. The first step with a gradient is solved exactly."""
        if self.group["grid"] is None:
            return None
        grid = Grid.parse(self.group["grid"])
        follows = grid.has_closed_form or (self.group["solver"] == "alternating" and t > 1)
        return How(grid, follows, self.group["curvature"], wide=self.group["solver"] == "exact")

    @property
    def codes(self) -> Codes | None:
        """The compiled code of its passes; None where they run as they are, as in a first step unlike the later ones."""
        how = self.how(self.t)
        once = how is not None and not how.follows and self.group["solver"] == "alternating"
        return self._codes if self.fast and not once else None

    def take(self, *keys: str) -> list[Tensor]:
        """Entries of all states as one matrix each, also "parameter"; a parameter without latent weights is its own."""
        return [self._rows_of(key).take() for key in keys]

    def take_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients as one matrix."""
        return _matrix(map(_flat, gradients, self._likes), self._shape)

    def put(self, **matrices: Tensor) -> None:
        """Write matrices back to where `take` had them from."""
        for key, matrix in matrices.items():
            rows = self._rows_of(key)
            if matrix is not rows.view:  # which has been changed in place
                rows.put(matrix)

    def scales(self) -> Tensor:
        """The scales that the projection starts from, (rows of all, S)."""
        scales = self.state("scale")
        return scales[0] if len(scales) == 1 else torch.cat(scales)

    def put_scales(self, scales: Tensor) -> None:
        """Write the scales back."""
        if len(self.states) == 1:
            self.states[0]["scale"].copy_(scales)
        else:
            torch._foreach_copy_(self.state("scale"), torch.split(scales, self.rows))

    def state(self, key: str) -> list[Tensor]:
        """An entry of all states."""
        return [state[key] for state in self.states]

    def room(self, dtype: torch.dtype) -> Tensor:
        """Where to write what the parameters shall hold: the memory of a single one itself, if it can be read as the matrix."""
        view = self._rows_of("parameter").view
        return self._likes[0].new_empty(self._shape, dtype=dtype) if view is None or view.dtype != dtype else view

    def _rows_of(self, key: str) -> _Rows:
        rows = self._kept.get(key)
        if rows is None:
            pairs = zip(self.states, self.parameters, strict=True)
            tensors = [p if key == "parameter" else state.get(key, p) for state, p in pairs]
            rows = self._kept[key] = _Rows(tensors, self._likes, self._shape)
        return rows

    @cached_property
    def _likes(self) -> list[Tensor]:
        return self.state("exp_avg")

    @cached_property
    def _shape(self) -> tuple[int, int]:
        rows = self.rows * (len(self.parameters) if self.group["grid"] is not None else 1)
        return rows, sum(like.numel() for like in self._likes) // max(rows, 1)


class Kept:
    """The batches of the last step, for the next one.

    Parameters are sorted anew only where a gradient comes or goes, or a tensor of the state is another. That is asked every
    time: others may put tensors of their own there, and batches hold theirs, so that no two have the same identity.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._counters: list[Tensor] = []  # steps, aligned with the versions that we know the numbers of
        self._versions: list[int] = []
        self._batches: list[Batch] = []

    def of(self, entries: Iterable[Entry], fast: bool) -> list[Batch]:
        """The batches of parameters with gradients, about to take their next step; `fast`: compile what is taken often."""
        entries = list(entries)
        key = fast, surroundings(), list(map(_identity, entries))
        if key == self._key and self._versions == [counter._version for counter in self._counters]:
            gradients = {id(p): grad for _, p, grad, _ in entries}
            for batch in self._batches:
                batch.gradients = [gradients[id(p)] for p in batch.parameters]
        else:
            self._key, self._batches = key, batches(entries, fast)
            self._counters = [state[name] for *_, state in entries for name in ("step", "trial_step") if name in state]
            self._versions = [counter._version for counter in self._counters]
        return self._batches

    def release(self) -> None:
        """Hold the gradients no longer than a pass over them."""
        for batch in self._batches:
            batch.gradients = ()

    def count(self, *, remember: bool) -> None:
        """The batches have taken their step; with `remember` its gradient is now the last one."""
        self.release()
        states = [state for batch in self._batches for state in batch.states]
        if states:
            torch._foreach_add_([state["step"] for state in states], 1)
        for batch in self._batches:
            for state in batch.states if remember else ():
                state["trial_step"].fill_(batch.t)
            batch.remembers = remember
            batch.t += 1
        self._versions = [counter._version for counter in self._counters]


def _identity(entry: Entry) -> tuple[object, ...]:
    """All that parameters are sorted by, and that views are of; but for the numbers of steps."""
    group, p, grad, state = entry
    tensors = state.values()
    own = id(group), id(p), p.data_ptr(), p.dtype, p.stride(), grad.dtype
    return own, *map(id, tensors), *map(Tensor.data_ptr, tensors)


def batches(entries: Iterable[Entry], fast: bool) -> list[Batch]:
    """Sort parameters with gradients into batches, about to take their next step."""
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
    rows = len(states[0]["scale"]) if groups[0]["grid"] is not None else 1
    remembers = bool(states[0].get("trial_step", 0) > 0)
    return Batch(groups[0], int(states[0]["step"]) + 1, rows, fast, remembers, parameters, gradients, states)
