"""How the passes over the weights are run: as they are, some entries at a time, or compiled.

Compiled code goes over the memory twice a step: once to advance moments and latent weights and to add up what the scale
needs, once to write. What can be known of a batch is found out once: between the layers of a network nothing of a step is
in the processor's caches, its own instructions neither, and a call takes several times as long as in a loop.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blaq.bins import PLAIN
from blaq.grids import Grid
from blaq.optim import compiled, loops, passes
from blaq.optim.passes import Found, How
from blaq.optim.update import Rates
from blaq.projection import solve_scale, write_values
from blaq.solvers import blocks, looks

_BLOCK = 2**16  # entries that an uncompiled pass goes over at once
_LONGEST, _SHORTEST = 4096, 64  # a piece of a row in a compiled pass: sums need no care yet, and a loop pays
_FEW = 2**12  # pieces up to which what is told once a piece is kept

Shape = tuple[int, int]


class Pass:
    """A pass over the matrices of a batch, and the writing after it, again and again.

    Args:
        function: one of `blaq.optim.passes`.
        how: what it is compiled for.
        rows: rows of the matrices.
        like: one of the matrices, as it is or `in_pieces`.
        codes: the compiled code of the batch; None to run the pass as it is.
    """

    def __init__(
        self, function: Callable[..., Found], how: How, rows: int, like: Tensor, codes: compiled.Codes | None
    ) -> None:
        self.how = how
        self._function, self._rows = function, rows
        self._dtype, self._device = like.dtype, like.device
        self._pieces, self._empty = len(like), not like.numel()
        self._columns = like.numel() // max(rows, 1)
        self._codes = None if self._empty else codes
        self._nowhere = like.new_empty(rows, 0) if how.grid.has_closed_form else None
        self._ones = _ones(self._pieces, like.dtype, like.device) if self._pieces <= _FEW else None
        # Looked up once: to hash a grid takes as long as a call of compiled code.
        whole = self._empty or _piece(self._columns) is None
        self._with_numbers = functools.cache(functools.partial(_with_numbers, function, how, whole))
        self._write = _with_grid(passes.write, how.grid, 3)
        self._write_over = _with_grid(passes.write_over, how.grid, 2)

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        scale: Tensor,
        rates: tuple[Rates, ...],
        aside: float,
        room: Callable[[], Tensor],
    ) -> Tensor:
        """From their last scales, (R, S), to the next, where the pass follows; else the metric d, which is written to where
        there is `room` for it.
        """
        if self._codes is None:
            return self._plain(tensors, scale, rates, aside, room)
        metric: tuple[Tensor, ...] = () if self.how.follows else (room(),)
        at = self._looks(scale, aside) if self._nowhere is None else self._nowhere
        ones = at.new_ones(self._pieces, 1, dtype=self._dtype) if self._ones is None else self._ones
        found: Tensor | None = compiled.call(
            self._with_numbers(len(rates), _Fixed.of(rates[0])),
            (*tensors, *metric, at, scale, ones, _numbers(rates, self._dtype, self._device)),
            lambda: self._plain(tensors, scale, rates, aside, room),
            known=self._codes,
        )
        return metric[0] if found is None else found

    def write(self, p: Tensor, w: Tensor, scale: Tensor) -> None:
        """`passes.write`, in rows; w may be p itself."""
        if self._codes is None:
            write_values(p, w, scale, self.how.grid)
            return
        scale = scale.contiguous()  # whichever solver has made it
        over = p.data_ptr() == w.data_ptr()
        function, tensors = (self._write_over, (p, scale)) if over else (self._write, (p, w, scale))
        compiled.call(function, tensors, lambda: write_values(p, w, scale, self.how.grid), known=self._codes)
        increment_version(p)  # the alias that was written to has a count of its own

    def _looks(self, scale: Tensor, aside: float) -> Tensor:
        """Where to look, a piece: of many rows compiled too, else it takes a fifth of the time of the pass."""
        grid = self.how.grid
        scale = scale.to(self._dtype)
        if self._rows <= _FEW:
            at = looks(scale, grid, aside)
        else:
            at = compiled.call(
                _with_grid(looks, grid, 1),
                (scale.contiguous(), _number(aside, self._dtype, self._device)),
                lambda: looks(scale, grid, aside),
                known=self._codes,
            )
        return at if self._pieces == self._rows else at.repeat_interleave(self._pieces // self._rows, 0)

    def _plain(
        self,
        tensors: tuple[Tensor, ...],
        scale: Tensor,
        rates: tuple[Rates, ...],
        aside: float,
        room: Callable[[], Tensor],
    ) -> Tensor:
        """As it is: what it makes for a moment stays small, and in cache."""
        how, shape = self.how, (self._rows, self._columns)
        if how.follows and self._empty:
            return scale
        tensors = tuple(t.view(shape) for t in tensors)
        at = looks(scale.to(self._dtype), how.grid, aside)
        if tensors[0].numel() <= _BLOCK:
            found = self._function(*tensors, at, *rates, how)
            return found if isinstance(found, Tensor) else passes.joined(tuple(t.unsqueeze(1) for t in found), how)
        result = scale.new_empty(scale.shape, dtype=torch.float32) if how.follows else room().view(shape)
        for rows, columns in blocks(tensors[0].shape, _BLOCK):
            pieces: tuple[Tensor, ...] = ()
            for i, some in enumerate(columns):
                found = self._function(*(t[rows, some] for t in tensors), at[rows], *rates, how)
                if isinstance(found, Tensor):
                    result[rows, some] = found
                    continue
                pieces = pieces or tuple(t.new_empty(len(t), len(columns), how.grid.scales) for t in found)
                for piece, t in zip(pieces, found, strict=True):
                    piece[:, i] = t
            if pieces:
                result[rows] = passes.joined(pieces, how)
        return result


def run_float(
    function: Callable[..., Any], tensors: tuple[Tensor, ...], rates: tuple[Rates, ...], codes: compiled.Codes | None
) -> None:
    """An update of parameters without a grid, in place, the first tensor is what they shall hold; with `codes` compiled, where
    it can be, in float32: others are to follow torch's own arithmetic.
    """
    like = tensors[0]

    def plain() -> None:
        if like.numel() <= _BLOCK:
            function(*tensors, *rates)
            return
        for rows, columns in blocks(like.shape, _BLOCK):
            for some in columns:
                function(*(t[rows, some] for t in tensors), *rates)

    if codes is None or like.dtype != torch.float32 or not like.numel():
        plain()
        return
    given = (*tensors, _numbers(rates, like.dtype, like.device))
    compiled.call(_float_with_numbers(function, len(rates), _Fixed.of(rates[0])), given, plain, known=codes)
    increment_version(like)  # see `Pass.write`


def solve(w: Tensor, found: Tensor, how: How, fast: bool) -> Tensor:
    """The scale, float32 (R, S), from the metric that a pass returned, where it does not follow."""
    d = None if how.curvature == "unit" else found
    return solve_scale(w, d, how.grid, "exact", loops=loops.COMPILED if fast else PLAIN)


@functools.cache
def in_pieces(shape: Shape) -> Shape:
    """The shape in which a compiled pass goes over a matrix in rows."""
    piece = _piece(shape[1]) if shape[1] else None
    return shape if piece is None else (shape[0] * shape[1] // piece, piece)


@functools.cache
def _piece(columns: int) -> int | None:
    """The pieces that rows are added up in: as long as divides them, up to 4096; None where only short ones do.

    The compiler adds up as many in float32, as they come; with more it takes care of rounding, which takes longer than
    all the rest of a pass.
    """
    longest = max(piece for piece in range(1, min(columns, _LONGEST) + 1) if columns % piece == 0)
    return longest if longest >= min(columns, _SHORTEST) else None


# --- what compiled code is told ---------------------------------------------------------------------------------------------


class _Fixed(NamedTuple):
    """What code is compiled for, of the `Rates` of every step: which numbers there are, and the last field, which is none."""

    no_decay: bool
    no_clip: bool
    near: bool

    @staticmethod
    def of(rates: Rates) -> "_Fixed":
        return _Fixed(rates.decay is None, rates.clip is None, rates.near)

    def rates(self, numbers: Iterable[Tensor], steps: int) -> list[Rates]:
        """Those of some steps, from their `_numbers`."""
        values = iter(numbers)
        absent = {"decay": self.no_decay, "clip": self.no_clip}
        fields = Rates._fields[:-1]
        return [
            Rates(**{name: None if absent.get(name) else next(values) for name in fields}, near=self.near)  # type: ignore[arg-type]
            for _ in range(steps)
        ]


@functools.lru_cache(maxsize=8)
def _numbers(rates: tuple[Rates, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of a step, which many passes of it share."""
    given = [number for r in rates for number in r[:-1] if number is not None]
    return torch.tensor(given, dtype=dtype, device=device)


@functools.lru_cache(maxsize=8)
def _number(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([number], dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(count, 1, dtype=dtype, device=device)


@functools.cache
def _with_grid(function: Callable[..., Any], grid: Grid, at: int) -> Callable[..., Any]:
    """A function of tensors and, at a place among them, a grid."""

    def with_grid(*tensors: Tensor) -> Any:
        return function(*tensors[:at], grid, *tensors[at:])

    return compiled.own_code(with_grid)


@functools.cache
def _float_with_numbers(function: Callable[..., Any], steps: int, fixed: _Fixed) -> Callable[..., Any]:
    """`_with_numbers` of an update without a grid."""

    def float_with_numbers(*arguments: Tensor) -> None:
        *tensors, numbers = arguments
        function(*tensors, *fixed.rates(numbers.unbind(), steps))

    return compiled.own_code(float_with_numbers)


@functools.cache
def _with_numbers(function: Callable[..., Any], how: How, whole: bool, steps: int, fixed: _Fixed) -> Callable[..., Any]:
    """The pass with its numbers, those of one step or two, in one tensor, the last argument.

    `whole`: rows are not in pieces.
    """

    def with_numbers(*arguments: Tensor) -> Any:
        *tensors, at, scale, ones, numbers = arguments
        metric = None if how.follows else tensors.pop()
        # Told once a piece: else the compiler sees one flat loop in the update and one over pieces in the sums, which it does
        # not join, and computes every entry twice, or stores it between.
        told = numbers.unbind() if whole else [number * ones for number in numbers.unbind()]
        found = function(*tensors, at, *fixed.rates(told, steps), how)
        if isinstance(found, Tensor):
            assert metric is not None
            metric.copy_(found)
            return None
        return passes.joined(tuple(t.view(len(scale), -1, how.grid.scales) for t in found), how)

    return compiled.own_code(with_numbers)
