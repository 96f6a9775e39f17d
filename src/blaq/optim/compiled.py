"""Compiled passes: `torch.compile` once for a pass and how it is used, and short calls from then on.

Every call through torch.compile asks anew whether the code that it has still fits, which takes as long as a pass over
half a million weights. Here that is asked once for the shapes of the tensors; calls with the same go to the code itself.
"""

import functools
import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

# Weights of an optimizer from which compiling pays back: it takes seconds, and a step of fewer is short.
COMPILED_FROM = 2**18
_TORCH = (2, 13)  # from which compiled sums are as exact as those of torch itself

_COMPILER = {
    "specialize_int": True,  # levels are constants of a grid: only sizes are what changes
    "specialize_float": True,
    "recompile_limit": 2**16,  # a pass serves layers of all shapes and dtypes
    "accumulated_recompile_limit": 2**16,
}

Options = tuple[tuple[str, Any], ...]

untraced = _disable_dynamo
"""Leaves a function out of what a user compiles. Private to torch, whose own optimizers use it: `torch.compiler.disable` would
import the compiler at once.
"""

_log = logging.getLogger("blaq")


def usable() -> bool:
    """Whether there is a compiler, as far as is known, and nobody compiles around us."""
    return not _Compiler.broken and not torch.compiler.is_compiling()


def surroundings() -> tuple[Any, ...]:
    """What compiled code depends on besides its tensors."""
    inference = torch.is_inference_mode_enabled()
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), inference


def call(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    plain: Callable[[], Any],
    options: Options = (),
    known: "Codes | None" = None,
) -> Any:
    """``function(*tensors)``, compiled; where there is no compiler, `plain` in its place, from now on, and a line in the log.

    Args:
        function: has a code object that nothing else is compiled from, and is the same one at every call.
        tensors: changed in place or read; their memory is what counts, whatever they are views of.
        plain: does the same, uncompiled.
        options: for the compiler.
        known: of a caller whose tensors have the same layouts at every call, in the same surroundings.
    """
    code = known.get(function) if known is not None else None
    if code is not None:
        return code.run(tensors)
    setting = _setting(tensors)
    code = _Compiler.codes.get((function, setting))
    if code is not None:
        if known is not None:
            known[function] = code
        return code.run(tensors)
    if not usable():
        return plain()
    try:
        compiled = _Compiler.of(function, options)
        aliases = [_alias(tensor) for tensor in tensors]
        versions = list(map(_version, aliases))
        with warnings.catch_warnings(), torch._dynamo.config.patch(_COMPILER), _noting() as runs:
            warnings.simplefilter("ignore")  # of the compiler about torch's own code
            result = compiled(*aliases)
    except Exception as error:  # of the compiler, before anything is computed: their classes are torch's own affair
        _Compiler.broken = True
        _log.warning(
            "torch.compile does not work here, steps run uncompiled (slower): %s", " ".join(str(error).split()[:40])
        )
        return plain()
    written = [i for i, alias in enumerate(aliases) if _version(alias) != versions[i]]
    code = _Code.that_ran(runs, aliases, result, written)
    if code is not None:
        _Compiler.codes[function, setting] = code
    return result


class _Run(NamedTuple):
    """A call of compiled code."""

    graph: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: Any


class _Code(NamedTuple):
    """Compiled code, with its arguments for some shapes: tensors, or numbers."""

    graph: Callable[..., Any]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    """Its arguments, of the tensors and the numbers after them."""
    numbers: tuple[int, ...]
    written: tuple[int, ...]
    """Positions of the tensors that it changes."""

    @staticmethod
    def that_ran(runs: list[_Run], tensors: list[Tensor], result: Any, written: list[int]) -> "_Code | None":
        """The code of a call, if all that it was given and gave is understood."""
        if len(runs) != 1 or not isinstance(runs[0].outputs, list | tuple):
            return None
        run = runs[0]
        given = [id(t) for t in tensors]
        numbers = tuple(a for a in run.arguments if id(a) not in given)
        whole = result is run.outputs[0] if len(run.outputs) == 1 else result is None and not run.outputs
        if not whole or len(run.arguments) < 2 or any(not isinstance(a, int) for a in numbers):
            return None
        after = iter(range(len(given), len(given) + len(numbers)))
        pick = itemgetter(*[given.index(id(a)) if id(a) in given else next(after) for a in run.arguments])
        return _Code(run.graph, pick, numbers, tuple(written))

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Call it."""
        outputs = self.graph(list(self.pick((*tensors, *self.numbers))))
        increment_version([tensors[at] for at in self.written])
        return outputs[0] if outputs else None


class Codes(dict[Callable[..., Any], _Code]):
    """Code by function."""

    @staticmethod
    def of(function: Callable[..., Any], tensors: Sequence[Tensor]) -> "Codes":
        """The code for such tensors, if there is any yet: to call it from other threads, which torch tells other settings."""
        code = _Compiler.codes.get((function, _setting(tensors)))
        return Codes() if code is None else Codes({function: code})


class _Compiler:
    """What is compiled so far."""

    broken: ClassVar[bool] = False
    codes: ClassVar[dict[tuple[Callable[..., Any], Any], _Code]] = {}

    @staticmethod
    @functools.cache
    def of(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
        """The compiled function, for tensors of every size."""
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _TORCH:
            raise RuntimeError(f"torch {torch.__version__} is older than {'.'.join(map(str, _TORCH))}")
        inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")

        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            code: Callable[..., Any] = inductor(graph, inputs, config_patches=dict(options))
            return code

        return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)


@contextmanager
def _noting() -> Iterator[list[_Run]]:
    """Notes which compiled loops are called, and with what.

    Around them torch calls two dozen functions of its own, which look after gradients and aliases. There are none here, and
    that takes as long as a small layer.
    """
    from torch._inductor.output_code import CompiledFxGraph

    runs: list[_Run] = []
    plain = CompiledFxGraph.__call__

    def noted(self: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        arguments = tuple(inputs)  # the call clears them
        outputs = plain(self, inputs)
        assert self.current_callable is not None
        runs.append(_Run(self.current_callable, arguments, outputs))
        return outputs

    CompiledFxGraph.__call__ = noted  # type: ignore[method-assign]
    try:
        yield runs
    finally:
        CompiledFxGraph.__call__ = plain  # type: ignore[method-assign]


def _setting(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that the code for some tensors may depend on."""
    return *surroundings(), tensors[0].device, *[(t.dtype, t.shape, t.stride()) for t in tensors]


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, as no view of anything: the compiler looks at what a view is of, and compiles anew for other shapes."""
    memory = tensor.untyped_storage()
    return tensor.new_empty(0).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # those of inference mode have none


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: torch.compile keeps what it compiled there, and only some of it."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
