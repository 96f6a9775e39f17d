"""Which parameters are stepped together: as one matrix in rows, in which each row has scales of its own.

Small parameters of the same shape in rows become one matrix, and small ones without a grid, of whatever shapes, one row, so
that a network of many small layers does not pay for Python once a layer; a large parameter is its own matrix, without a copy.
Batches are kept from step to step, and with them their views of the state and the compiled code that fits them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.compiled import Codes, surroundings, usable
from blaq.optim.held import State
from blaq.optim.passes import Found, How
from blaq.optim.rows import Rows, Taken, matrix
from blaq.optim.running import Pass, Shape, in_pieces
from blaq.optim.update import Group

TOGETHER_UP_TO = 2**16  # weights of a parameter: copying more costs more than the calls that it saves
BATCH_UP_TO = 2**18  # weights of parameters together: what is copied stays in cache, in memory that is used again

_TAKEN = ("latent", "exp_avg", "exp_avg_sq", "trial_grad")
_WITH_STORAGES = ("cpu", "cuda")  # whose tensors can be moved to other memory

_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")

Entry = tuple[Group, Tensor, Tensor, State]
"""A parameter with its group, its gradient and its state."""


class Plan(NamedTuple):
    """What a pass over a batch needs, but for gradients and rates: the same in every step, where nothing is copied."""

    shape: Shape
    taken: Taken
    codes: Codes | None
    quantized: Pass | None
    """None without a grid."""


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
    _kept: dict[str, Rows] = field(default_factory=dict)
    _plans: dict[tuple[object, ...], Plan] = field(default_factory=dict)
    _passes: dict[tuple[object, ...], Pass] = field(default_factory=dict)

    def how(self, t: int) -> How | None:
        """What the passes of a step are compiled for; None without a grid. The first step with a gradient is solved exactly."""
        if self.group["grid"] is None:
            return None
        return _how(self.group["grid"], self.group["solver"], self.group["curvature"], t > 1)

    @property
    def codes(self) -> Codes | None:
        """The compiled code of its passes; None where they run as they are, as in a first step unlike the later ones."""
        if self.t == 1 and (how := self.how(1)) is not None and not how.follows:
            return self._codes if self.fast and self.group["solver"] == "exact" else None
        return self._codes if self.fast else None

    def move_together(self) -> None:
        """Move what the states of several parameters hold into one memory."""
        if len(self.states) > 1 and self._likes[0].device.type in _WITH_STORAGES:
            for key in _TAKEN:
                if key in self.states[0]:
                    self._rows_of(key).move_together()
            self._kept.clear()  # views of memory that has been left
            self._plans.clear()

    def plan(self, function: Callable[..., Found], keys: Sequence[str], t: int) -> Plan:
        """What a pass over some entries of the states needs, which finds the scales of step t."""
        how = self.how(t)
        key = function, id(how), self.t == 1  # of those there are few, and they stay; hashing one takes long
        plan = self._plans.get(key)
        if plan is None:
            codes = self.codes
            shape = self.shape if how is None or codes is None else in_pieces(self.shape)
            taken = self.take(shape, *keys)
            quantized = self._pass_of(function, how, taken.matrices[0]) if how is not None else None
            plan = Plan(shape, taken, codes, quantized)
            if not taken.rows:
                self._plans[key] = plan
        return plan

    def take(self, shape: Shape, *keys: str) -> Taken:
        """Entries of all states as one matrix each, also "parameter"; a parameter without latent weights is its own."""
        rows = tuple(map(self._rows_of, keys))
        in_place = all(row.view(shape) is not None for row in rows)
        return Taken(tuple(row.take(shape) for row in rows), () if in_place else rows)

    def take_gradients(self, gradients: Sequence[Tensor], shape: Shape) -> Tensor:
        """Gradients as one matrix."""
        return matrix(gradients, self._likes, shape)

    def put_parameters(self, matrix: Tensor) -> None:
        """Write what the parameters shall hold, unless it has been written in `room`."""
        self._rows_of("parameter").put(matrix)

    def scales(self) -> Tensor:
        """The scales that the projection starts from, (rows of all, S)."""
        return self.states[0]["scale"] if len(self.states) == 1 else torch.cat(self.state("scale"))

    def put_scales(self, scales: Tensor) -> None:
        """Write the scales back."""
        if len(self.states) == 1:
            self.states[0]["scale"].copy_(scales)
        else:
            torch._foreach_copy_(self.state("scale"), self.of_each(scales))

    def of_each(self, scales: Tensor) -> list[Tensor]:
        """Scales of all rows as those of every parameter."""
        return list(torch.split_with_sizes(scales, [self.rows] * len(self.states)))

    def state(self, key: str) -> list[Tensor]:
        """An entry of all states."""
        return [state[key] for state in self.states]

    def room(self, dtype: torch.dtype, shape: Shape) -> Tensor:
        """Where to write what the parameters shall hold: the memory of a single one itself, if it can be read as the matrix."""
        view = self._rows_of("parameter").view(shape)
        return self._likes[0].new_empty(shape, dtype=dtype) if view is None or view.dtype != dtype else view

    def _pass_of(self, function: Callable[..., Found], how: How, like: Tensor) -> Pass:
        key = function, id(how), self.codes is None
        found = self._passes.get(key)
        if found is None:
            found = self._passes[key] = Pass(function, how, self.shape[0], like, self.codes)
        return found

    def _rows_of(self, key: str) -> Rows:
        rows = self._kept.get(key)
        if rows is None:
            pairs = zip(self.states, self.parameters, strict=True)
            tensors = [p if key == "parameter" else state.get(key, p) for state, p in pairs]
            rows = self._kept[key] = Rows(tensors, self._likes)
        return rows

    @cached_property
    def _likes(self) -> list[Tensor]:
        return self.state("exp_avg")

    @cached_property
    def shape(self) -> Shape:
        """Of the matrix in rows."""
        rows = self.rows * (len(self.parameters) if self.group["grid"] is not None else 1)
        return rows, sum(like.numel() for like in self._likes) // max(rows, 1)


@cache
def _how(grid: str, solver: str, curvature: str, started: bool) -> How:
    parsed = Grid.parse(grid)
    follows = parsed.has_closed_form or (solver == "alternating" and started)
    return How(parsed, follows, curvature, wide=solver == "exact")


class Kept:
    """The batches of the last step, for the next one.

    Parameters are sorted anew only where a gradient comes or goes, or a tensor of the state is another. That is asked every
    time: others may put tensors of their own there, and batches hold theirs, so that no two have the same identity.
    """

    def __init__(self) -> None:
        self._held: list[object] = []  # groups, parameters, and tensors of their states
        self._layout: list[object] = []
        self._counters: list[Tensor] = []  # steps, aligned with the versions that we know the numbers of
        self._versions: list[int] = []
        self._batches: list[Batch] = []
        self._settled = False  # whether they have been the same twice, and their states been moved together
        self._steps: Tensor | None = None  # all of them in one memory, once settled

    def of(self, entries: Sequence[Entry], fast: bool) -> list[Batch]:
        """The batches of parameters with gradients, about to take their next step; `fast`: compile what is taken often."""
        fast = fast and usable()
        held, layout = _sorted_by(entries, fast)
        if (
            layout == self._layout
            and len(held) == len(self._held)
            and all(map(is_, held, self._held))
            and self._versions == [counter._version for counter in self._counters]
        ):
            gradients = {id(p): grad for _, p, grad, _ in entries}
            for batch in self._batches:
                batch.gradients = [gradients[id(p)] for p in batch.parameters]
            if not self._settled:
                for batch in self._batches:
                    batch.move_together()
                self._steps = _together([state["step"] for batch in self._batches for state in batch.states])
                self._layout, self._settled = _sorted_by(entries, fast)[1], True
        else:
            self._held, self._layout, self._batches = held, layout, batches(entries, fast)
            self._settled, self._steps = False, None
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
        if self._steps is not None:
            self._steps.add_(1)
        elif states:
            steps = [state["step"] for state in states]
            # On a CPU torch would make a tensor of the number, for each of them.
            torch._foreach_add_(steps, _ONE if steps[0].is_cpu else 1)
        if remember and states:
            torch._foreach_copy_([state["trial_step"] for state in states], [state["step"] for state in states])
        for batch in self._batches:
            batch.remembers = remember
            batch.t += 1
        self._versions = [counter._version for counter in self._counters]


def _together(tensors: list[Tensor]) -> Tensor | None:
    """Move tensors into one memory, where they can be, and return that."""
    if not tensors or tensors[0].device.type not in _WITH_STORAGES:
        return None
    Rows(tensors, tensors).move_together()
    return Rows(tensors, tensors).view((1, len(tensors)))


def _sorted_by(entries: Iterable[Entry], fast: bool) -> tuple[list[object], list[object]]:
    """All that parameters are sorted by, and that views are of; but for the numbers of steps."""
    held: list[object] = []
    layout: list[object] = [fast, *surroundings()]
    for group, p, grad, state in entries:
        tensors = state.values()
        held += group, p, *tensors
        layout += p.data_ptr(), p.dtype, p.stride(), grad.dtype, *map(Tensor.data_ptr, tensors)
    return held, layout


def batches(entries: Iterable[Entry], fast: bool) -> list[Batch]:
    """Sort parameters with gradients into batches, about to take their next step."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        group, p, grad, state = entry
        alone = id(p) if p.numel() > TOGETHER_UP_TO else None
        shape = (p.shape, state["exp_avg"].stride()) if group["grid"] is not None else None
        past = (int(state["step"]), int(state.get("trial_step", 0)))
        dtypes = p.dtype, grad.dtype, state["exp_avg"].dtype  # a parameter may have been cast since its state was made
        found.setdefault((id(group), alone, shape, *dtypes, p.device, *past), []).append(entry)
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
