"""The passes over the weights that a step makes: the update with what the projection needs, and writing the values.

Plain functions of matrices in rows, (R, N), and of numbers; run as they are, or compiled. Compiled code goes over the
memory twice a step: once to advance moments and latent weights and to add up what the scale needs, once to write.
"""

import functools
import logging
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blaq.bins import PLAIN, Loops, add_into_bins, mark
from blaq.grids import Grid
from blaq.optim import update
from blaq.optim.update import Rates
from blaq.projection import dequantize, nearest_levels, solve_scale, write_values
from blaq.solvers import blocks, follow, join_to_follow, sums_to_follow

# Weights of an optimizer from which compiling pays back: it takes seconds, and a step of fewer is short.
COMPILED_FROM = 2**18
# What the compiler is told, by what a pass goes over.
_OPTIONS: dict[str, dict[str, Any]] = {
    "row": {},
    # Rows that are added up on their own are loops of their own: better to compute an entry twice than to store it between.
    "rows": {"realize_reads_threshold": 100, "realize_opcount_threshold": 1000},
    # One addition after the other: faster than atomic ones on few threads, and the same in every run.
    "bins": {"cpp.threads": 1},
}
_BLOCK = 2**16  # entries that an uncompiled pass goes over at once
_COMPILERS = (2, 13)  # torch from which compiled sums are as exact as those of torch itself

_log = logging.getLogger("blaq")


class How(NamedTuple):
    """What a pass is compiled for."""

    grid: Grid
    follows: bool
    """Whether the pass itself finds the scale, from the last one; else it returns the metric that a solver needs."""
    curvature: str


Found = Tensor | tuple[Tensor, ...]
"""Of some entries: what `follow` makes a scale of, where the pass follows; else the metric d."""


def laq(w: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, aside: float | Tensor, r: Rates, how: How) -> Found:
    """A step of LAQ, in place."""
    return _found(w, update.laq(w, m, v, g, r), scale, aside, how)


def forward(
    to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, aside: float | Tensor, r: Rates, how: How
) -> Found:
    """Write the trial point w* into a tensor."""
    w_trial, d = update.forward(w, m, v, g, r)
    to.copy_(w_trial)
    return _found(w_trial, d, scale, aside, how)


def backtrack(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    g_trial: Tensor,
    scale: Tensor,
    aside: float | Tensor,
    r: Rates,
    how: How,
) -> Found:
    """The step with both gradients, in place."""
    return _found(w, update.backtrack(w, m, v, g, g_trial, r), scale, aside, how)


def forward_float(to: Tensor, w: Tensor, m: Tensor, v: Tensor, g: Tensor, r: Rates) -> None:
    """Write the trial point of a parameter without a grid into a tensor, which may be w."""
    to.copy_(update.forward(w, m, v, g, r)[0])


def write(p: Tensor, w: Tensor, scale: Tensor, how: How) -> None:
    """Let p hold the quantized values of w."""
    p.copy_(dequantize(nearest_levels(w, scale, how.grid), scale, how.grid))


def write_over(w: Tensor, scale: Tensor, how: How) -> None:
    """`write`, where w itself is to hold its quantized values: a compiler must not be told the same memory twice."""
    write(w, w, scale, how)


def solve(w: Tensor, found: Tensor, how: How, fast: bool) -> Tensor:
    """The scale, float32 (R, S), from what a pass returned."""
    if how.follows:
        return found
    d = None if how.curvature == "unit" else found
    return solve_scale(w, d, how.grid, "exact", loops=_LOOPS if fast and _Compiler.usable() else PLAIN)


def _found(w: Tensor, d: Tensor, scale: Tensor, aside: float | Tensor, how: How) -> Found:
    if not how.follows:
        return d
    return sums_to_follow(w, torch.ones_like(d) if how.curvature == "unit" else d, how.grid, scale, aside)


def _scale_or_metric(found: Found, how: How) -> Tensor:
    return found if isinstance(found, Tensor) else follow(found, how.grid).float()


# --- compiled or not ------------------------------------------------------------------------------------------------------


def run(function: Callable[..., Any], tensors: tuple[Tensor, ...], r: Rates, aside: float, how: How, fast: bool) -> Any:
    """A pass over tensors, compiled where `fast` and where it can be: the scales (R, S) where it follows, else the metric d."""
    if how.follows and not tensors[0].numel():
        return tensors[-1]
    if not fast or not _Compiler.usable():
        return _in_blocks(function, tensors, r, aside, how)
    like = tensors[0]
    given = [value for value in (aside, *r) if value is not None]
    numbers = torch.tensor(given, dtype=like.dtype, device=like.device)
    absent = tuple(value is None for value in (aside, *r))
    key = (function, how, absent, "rows" if tensors[-1].shape[0] > 1 else "row")
    return _Compiler.call(key, (*tensors, numbers), lambda: _in_blocks(function, tensors, r, aside, how))


def _in_blocks(function: Callable[..., Found], tensors: tuple[Tensor, ...], r: Rates, aside: float, how: How) -> Tensor:
    """A pass as it is, some entries at a time: what it makes for a moment stays small, and in cache."""
    *whole, scale = tensors
    result = torch.empty_like(scale if how.follows else whole[0])
    for rows, columns in blocks(whole[0].shape, _BLOCK):
        pieces: tuple[Tensor, ...] = ()
        for i, some in enumerate(columns):
            found = function(*(t[rows, some] for t in whole), scale[rows], aside, r, how)
            if isinstance(found, Tensor):
                result[rows, some] = found
                continue
            pieces = pieces or tuple(t.new_empty(len(columns), *t.shape) for t in found)
            for piece, t in zip(pieces, found, strict=True):
                piece[i] = t
        if pieces:
            result[rows] = _scale_or_metric(join_to_follow(pieces), how)
    return result


def run_float(function: Callable[..., Any], tensors: tuple[Tensor, ...], r: Rates) -> None:
    """An update of parameters without a grid, in place, some entries at a time."""
    for rows, columns in blocks(tensors[0].shape, _BLOCK):
        for some in columns:
            function(*(t[rows, some] for t in tensors), r)


def run_write(p: Tensor, w: Tensor, scale: Tensor, how: How, fast: bool) -> None:
    """`write`, compiled where `fast` and where it can be; w may be p itself."""
    if fast and _Compiler.usable():
        how = How(how.grid, False, "adam")  # the rest makes no difference here
        function, tensors = (write_over, (p, scale)) if p.data_ptr() == w.data_ptr() else (write, (p, w, scale))
        _Compiler.call((function, how, None, "row"), tensors, lambda: write_values(p, w, scale, how.grid))
        increment_version(p)  # the alias that was written to has a count of its own
    else:
        write_values(p, w, scale, how.grid)


def _add_into_bins(*tensors: Tensor) -> None:
    _Compiler.call((add_into_bins, None, None, "bins"), tensors, lambda: add_into_bins(*tensors))


def _mark(*tensors: Tensor) -> None:
    _Compiler.call((mark, None, None, "row"), tensors, lambda: mark(*tensors))


_LOOPS = Loops(_add_into_bins, _mark, chunk=2**20, intervals=2, fill=True)  # chunks: a flag an entry takes memory


class _Compiler:
    """torch.compile, once for a pass and how it is used; given up, with a line in the log, where it does not work."""

    broken = False

    @classmethod
    def usable(cls) -> bool:
        return not cls.broken and not torch.compiler.is_compiling()

    @classmethod
    def call(
        cls,
        key: tuple[Callable[..., Any], How | None, tuple[bool, ...] | None, str],
        tensors: tuple[Tensor, ...],
        plain: Callable[[], Any],
    ) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler about torch's own code
                return _compiled(*key)(*map(_alias, tensors))
        except Exception as error:  # of the compiler, before anything is computed: their classes are torch's own affair
            cls.broken = True
            _log.warning(
                "torch.compile does not work here, steps run uncompiled (slower): %s", " ".join(str(error).split()[:40])
            )
            return plain()


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, as no view of anything: the compiler looks at what a view is of, and compiles anew for other shapes."""
    memory = tensor.untyped_storage()
    return tensor.new_empty(0).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


@functools.cache
def _compiled(
    function: Callable[..., Any], how: How | None, absent: tuple[bool, ...] | None, over: str
) -> Callable[..., Any]:
    """The pass with its numbers in one tensor, the last argument; those absent are None."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _COMPILERS:
        raise RuntimeError(f"torch {torch.__version__} is older than {'.'.join(map(str, _COMPILERS))}")

    def with_numbers(*arguments: Tensor) -> Any:
        if absent is None:
            return function(*arguments, how) if how is not None else function(*arguments)
        *tensors, numbers = arguments
        values = iter(numbers.unbind())
        aside, *rates = [None if missing else next(values) for missing in absent]
        return _scale_or_metric(function(*tensors, aside, Rates(*rates), how), how)  # type: ignore[arg-type]

    # torch.compile keeps what it compiled with the code object, and only some of it: each pass has one of its own.
    own = types.FunctionType(with_numbers.__code__.replace(), globals(), closure=with_numbers.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS[over])
