"""Compiled passes: `torch.compile` once for a pass and how it is used, and short calls from then on.

Every call through torch.compile asks anew whether the code that it has still fits, which takes as long as a pass over
half a million weights. Here that is asked once for the shapes of the tensors; calls with the same go to the code itself.
"""

import functools
import logging
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

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
        with warnings.catch_warnings(), torch._dynamo.config.patch(_COMPILER):
            warnings.simplefilter("ignore")  # of the compiler about torch's own code
            result = compiled(*aliases)
    except Exception as error:  # of the compiler, before anything is computed: their classes are torch's own affair
        _Compiler.broken, _Compiler.last = True, None
        _log.warning(
            "torch.compile does not work here, steps run uncompiled (slower): %s", " ".join(str(error).split()[:40])
        )
        return plain()
    code = _Code.that_ran(_Compiler.last, aliases, result)
    if code is not None:
        _Compiler.codes[function, setting] = code
    _Compiler.last = None
    return result


class _Run(NamedTuple):
    """What torch.compile called last."""

    graph: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: Any


class _Code(NamedTuple):
    """Compiled code, with its arguments for some shapes: positions of tensors, or numbers."""

    graph: Callable[..., Any]
    positions: list[int | None]
    numbers: list[Any]

    @staticmethod
    def that_ran(run: _Run | None, tensors: list[Tensor], result: Any) -> "_Code | None":
        """The code of a call, if all that it was given and gave is understood."""
        if run is None or not isinstance(run.outputs, list | tuple):
            return None
        given = [id(t) for t in tensors]
        positions = [given.index(id(a)) if id(a) in given else None for a in run.arguments]
        whole = result is run.outputs[0] if len(run.outputs) == 1 else result is None and not run.outputs
        rest = [a for a, position in zip(run.arguments, positions, strict=True) if position is None]
        if not whole or any(not isinstance(a, int) for a in rest):
            return None
        numbers = [a if position is None else None for a, position in zip(run.arguments, positions, strict=True)]
        return _Code(run.graph, positions, numbers)

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Call it."""
        pairs = zip(self.positions, self.numbers, strict=True)
        outputs = self.graph(*[number if at is None else tensors[at] for at, number in pairs])
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
    last: ClassVar[_Run | None] = None

    @staticmethod
    @functools.cache
    def of(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
        """The compiled function, for tensors of every size."""
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _TORCH:
            raise RuntimeError(f"torch {torch.__version__} is older than {'.'.join(map(str, _TORCH))}")
        inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")

        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            code = inductor(graph, inputs, config_patches=dict(options))

            def noted(*arguments: Any) -> Any:
                outputs = code(*arguments)
                _Compiler.last = _Run(code, arguments, outputs)
                return outputs

            return noted

        return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)


def _setting(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that the code for some tensors may depend on."""
    return *surroundings(), tensors[0].device, *[(t.dtype, t.shape, t.stride()) for t in tensors]


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, as no view of anything: the compiler looks at what a view is of, and compiles anew for other shapes."""
    memory = tensor.untyped_storage()
    return tensor.new_empty(0).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: torch.compile keeps what it compiled there, and only some of it."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
