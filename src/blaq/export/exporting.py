"""What the exports to a runtime share: what they accept, and that no file appears before the runtime has proved it."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from blaq.export.files import target_of
from blaq.export.layers import in_float32, plain, quantized_weights, shipped, weights_of_run
from blaq.export.packed_session import computed, copies, tensors
from blaq.export.preprocessing import preprocessing
from blaq.export.runtimes import Session
from blaq.export.verify import Verification, evaluation_batches, verify_outputs, verify_session, verify_weights
from blaq.optim.base import LatentOptimizer

Inputs = tuple[Tensor, ...]
ToGraph = Callable[..., Any]  # (model, weights, inputs, axes=, recipe=, data=) -> the runtime's graph
Unverified = Callable[[Any, Path], AbstractContextManager[Session]]


def export_model(
    model: nn.Module,
    opt: LatentOptimizer,
    example_inputs: Tensor | Inputs,
    path: Path,
    to_graph: ToGraph,
    unverified: Unverified,
    dynamic_shapes: Any = None,
    *,
    traced: bool,
) -> Path:
    """Write a model of the user's, proved on the example inputs, and on others of other sizes.

    `traced`: the exporter takes on trust which axes may change; else those that the user names are its own to prove.
    """
    inputs = example(example_inputs)
    model = plain(model)
    held = chain(model.parameters(), model.buffers())
    converted = any(x.is_floating_point() and x.dtype != torch.float32 for x in held)
    if converted:
        inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    with shipped(opt):
        weights = quantized_weights(model, opt)
        model = in_float32(model, weights)
    with torch.autocast("cpu", enabled=False):
        _check(model, inputs, converted)
        axes = given_axes(model, inputs, dynamic_shapes)
        if dynamic_shapes is None:
            axes = _without_columns(model, inputs, axes)
        others = resized(inputs, axes) if dynamic_shapes is None or traced else {}
        _check_others(model, others)
        graph = to_graph(model, weights, copies(inputs), axes=axes)
        with unverified(graph, path) as session:
            verify_weights(session, weights)
            verify_outputs(session, model, weights, [inputs, *others.values()])
    return path


def export_checkpoint(
    run: Path,
    out: Path,
    checkpoint: Literal["best", "last"],
    to_graph: ToGraph,
    unverified: Unverified,
    report: Callable[[Verification], None] | None,
) -> Path:
    """Write a run's checkpoint, proved on its validation data."""
    model, weights, recipe = weights_of_run(run, checkpoint)
    batches = evaluation_batches(recipe, "validation")
    inputs, _ = next(iter(batches))
    graph = to_graph(model, weights, (inputs[:2],), recipe=asdict(recipe), data=preprocessing(batches.dataset))
    with unverified(graph, out) as session:
        verification = verify_session(session, model, weights, batches)
    if report is not None:
        report(verification)
    return out


def example(inputs: Tensor | Inputs) -> Inputs:
    """What a model is called with, as a tuple of tensors on the CPU.

    Raises:
        ValueError: none, or something else than tensors.
    """
    owner = "export(example_inputs)"
    if not isinstance(inputs, Tensor | tuple | list):
        raise ValueError(f"{owner}: is {type(inputs).__name__}; expected a tensor or a tuple of tensors.")
    found = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not found:
        raise ValueError(f"{owner}: is empty; expected what the model is called with.")
    for index, x in enumerate(found):
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{owner}: the {_ordinal(index)} is {type(x).__name__}; expected tensors, one for each argument: wrap the "
                "model in a module that takes them."
            )
    return tuple(x.detach().cpu() for x in found)


def changing_axes(x: Tensor) -> list[int]:
    """The axes of an input that may change: examples, and of tokens the sequence.

    Example:
        >>> changing_axes(torch.zeros(2, 5, dtype=torch.int64)), changing_axes(torch.zeros(2, 5))
        ([0, 1], [0])
    """
    return [0, 1] if x.ndim == 2 and not x.is_floating_point() else [0] if x.ndim else []


def given_axes(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> list[list[int]]:
    """For every input the axes that may change, from what `torch.export.export` takes as ``dynamic_shapes``.

    Example:
        >>> tokens = torch.zeros(2, 5, dtype=torch.int64)
        >>> given_axes(nn.Embedding(9, 4), (tokens,), None)
        [[0, 1]]
        >>> given_axes(nn.Embedding(9, 4), (tokens,), {"input": {0: Dim.DYNAMIC}})
        [[0]]
    """
    if dynamic_shapes is None:
        return [changing_axes(x) for x in inputs]
    given = dynamic_shapes = of_arguments(model, inputs, dynamic_shapes)
    if isinstance(given, dict):
        names = _arguments(model, inputs)
        given = [given[name] for name in names if name in given]
    elif not isinstance(given, list | tuple):
        given = [given]
    if len(given) == 1 < len(inputs) and isinstance(given[0], list | tuple):
        given = given[0]  # those of ``*inputs``
    shapes = [leaf for entry in given for leaf in tree_leaves(entry, is_leaf=lambda of: of is None or _is_shape(of))]
    if len(shapes) != len(inputs) or not all(shape is None or _is_shape(shape) for shape in shapes):
        raise ValueError(
            f"export(dynamic_shapes={dynamic_shapes!r}): expected one entry for each input, {len(inputs)} in all, such as "
            "{0: torch.export.Dim.DYNAMIC}, or None."
        )
    for name in dynamic_shapes.keys() - set(names) if isinstance(dynamic_shapes, dict) else ():
        expected = ", ".join(map(repr, names))
        raise ValueError(
            f"export(dynamic_shapes): {name!r} is no argument that example_inputs give; expected {expected}."
        )
    sizes = [dict(shape if isinstance(shape, dict) else enumerate(shape or ())) for shape in shapes]
    for x, each in zip(inputs, sizes, strict=True):
        for axis in each.keys() - range(x.ndim):  # torch ignores them
            expected = f"0 to {x.ndim - 1}" if x.ndim else "None"
            raise ValueError(f"export(dynamic_shapes): axis {axis} of an input of {x.ndim} axes; expected {expected}.")
    fixed = None, Dim.STATIC
    return [[axis for axis, size in each.items() if not isinstance(size, int) and size not in fixed] for each in sizes]


def of_arguments(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> Any:
    """``dynamic_shapes`` without the names of arguments that are not given and have None there: torch takes none of them."""
    if not isinstance(dynamic_shapes, dict):
        return dynamic_shapes
    names = _arguments(model, inputs)
    return {name: shape for name, shape in dynamic_shapes.items() if name in names or shape is not None}


def _arguments(model: nn.Module, inputs: Inputs) -> list[str]:
    return list(inspect.signature(model.forward).bind(*inputs).arguments)


def _is_shape(entry: Any) -> bool:
    """Whether this says of one input how its axes change."""
    if isinstance(entry, dict):
        return all(isinstance(axis, int) for axis in entry)
    return isinstance(entry, list | tuple) and not any(isinstance(size, dict | list | tuple) for size in entry)


def _check(model: nn.Module, inputs: Inputs, converted: bool) -> None:
    """Find out here what cannot be exported: the exporters say it less clearly, and some runtimes not before the end."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ValueError(
                f"export: {name!r} is an LSTM with proj_size={module.proj_size}, which no runtime's exporter takes; write a "
                "packed file (blaq.save_packed, --format packed), which holds every module."
            )
    for index, x in enumerate(inputs):
        if x.dtype == torch.bfloat16:
            raise ValueError(
                f"export(example_inputs): the {_ordinal(index)} is {x.dtype}, and what runtimes are given are numpy's "
                "arrays; pass it as float32."
            )
    try:
        outputs = computed(model, inputs)
    except Exception as error:  # the model's own code
        what = ", converted to float32 as exports compute," if converted else ""
        out = "; name no dtype in forward(), or write a packed file (blaq.save_packed)" if converted else ""
        raise ValueError(f"export: the model{what} fails on the example inputs: {_first_line(error)}{out}.") from error
    numbers = [y for y in tree_leaves(outputs) if isinstance(y, int | float)]
    if numbers:
        raise ValueError(f"export: the model returns a number ({numbers[0]}); expected tensors alone as outputs.")
    if not tensors(outputs):
        raise ValueError(
            f"export: the model returns {type(outputs).__name__} without tensors in it that torch finds; return a tensor, or "
            "tuples, lists or dicts of them."
        )
    if not any(y.numel() for y in tensors(outputs)):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(
            f"export: the model returns no value for inputs of shape {shapes}, so nothing would be proved; pass an example for "
            "which it returns something."
        )
    if any(y.dtype == torch.bfloat16 for y in tensors(outputs)):
        raise ValueError(
            "export: the model returns torch.bfloat16, and what runtimes return are numpy's arrays; return it as float32."
        )


def _without_columns(model: nn.Module, inputs: Inputs, axes: list[list[int]]) -> list[list[int]]:
    """The axes that may change without those of one entry, but for the first, where the model itself takes no second: an input
    of integers is then a column of a table.
    """
    fixed = [[axis for axis in each if axis == 0 or x.shape[axis] != 1] for x, each in zip(inputs, axes, strict=True)]
    try:
        for name, changed in resized(inputs, axes).items() if fixed != axes else ():
            if name != "batch":
                computed(model, changed)
    except Exception:  # the model's own code
        return fixed
    return axes


def _check_others(model: nn.Module, others: dict[str, Inputs]) -> None:
    for axis, inputs in others.items():
        try:
            computed(model, inputs)
        except Exception as error:  # the model's own code
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"export: the model itself fails with another {axis} size, inputs {shapes}: {_first_line(error)}. If that "
                "axis cannot change, pass dynamic_shapes: ({0: torch.export.Dim.DYNAMIC},) if of one input the first alone "
                "can, (None,) if none can."
            ) from error


def _ordinal(index: int) -> str:
    return ("first", "second", "third")[index] if index < 3 else f"{index + 1}th"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def resized(inputs: Inputs, axes: Sequence[Sequence[int]]) -> dict[str, Inputs]:
    """The inputs with one axis changed, by the name of the axis: an exporter may have taken its size for a constant.

    Example:
        >>> x, y = torch.zeros(3, 4), torch.zeros(2)
        >>> {name: [tuple(z.shape) for z in changed] for name, changed in resized((x, y), [[0, 1], []]).items()}
        {'batch': [(1, 4), (2,)], 'sequence': [(3, 3), (2,)]}
    """
    found = {}
    for axis in sorted({axis for each in axes for axis in each}):
        pairs = zip(inputs, axes, strict=True)
        changed = tuple(_of_another_size(x, axis) if axis in each else x for x, each in pairs)
        if any(x.shape != y.shape for x, y in zip(inputs, changed, strict=True)):
            found[{0: "batch", 1: "sequence"}.get(axis, f"axis {axis}")] = changed
    return found


def _of_another_size(x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    if axis == 0:
        return x[:1] if size > 1 else torch.cat([x, x])
    return x.narrow(axis, 0, size - 1) if size > 1 else torch.cat([x, x], axis)


def check_target(owner: str, path: str | Path, preset: str, suffix: str, packages: Sequence[str], extra: str) -> Path:
    """The path, if an export can go there.

    Raises:
        ImportError: a package is missing.
        ValueError: another preset, another suffix; see `target_of`.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{owner}: needs {package}; pip install 'blaq[{extra}]'.")
    if preset not in ("exact", "fast"):
        raise ValueError(f"{owner}(preset={preset!r}): expected 'exact' or 'fast'.")
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{owner}(path={str(path)!r}): expected a name that ends in {suffix}.")
    if not path.parent.is_dir():
        raise ValueError(f"{owner}(path={str(path)!r}): there is no folder {str(path.parent)!r}.")
    if path.is_dir():
        raise ValueError(
            f"{owner}(path={str(path)!r}): is a folder; expected the name of a file, new or to be replaced."
        )
    target_of(path)
    return path
