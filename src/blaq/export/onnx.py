"""Export to ONNX, for ONNX Runtime: torch's own exporter first, then quantized weights from their codes."""

import functools
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from blaq.export.exporting import changing_axes, check_target, export_checkpoint, export_model, of_arguments, resized
from blaq.export.files import replacing
from blaq.export.layers import QuantizedWeight
from blaq.export.onnx_containers import FORMAT_VERSION
from blaq.export.packed_session import computed, tensors
from blaq.export.runtimes import Session
from blaq.export.verify import Verification
from blaq.optim.base import LatentOptimizer

if TYPE_CHECKING:
    import onnx

    from blaq.export.onnx_containers import Preset

__all__ = ["FORMAT_VERSION", "OPSET", "export_onnx", "export_run"]

# What torch writes without converting versions, and all that the graph needs: no 2- or 4-bit types, which came later and
# which runtimes handle differently (ONNX Runtime 1.32 has no kernels for the newest opset, 28).
OPSET = 20
LARGEST = 2**31 - 1  # bytes of a protobuf message


def export_onnx(
    model: nn.Module,
    opt: LatentOptimizer,
    example_inputs: Tensor | tuple[Tensor, ...],
    path: str | Path,
    preset: "Preset" = "exact",
    dynamic_shapes: Any = None,
) -> Path:
    """Write a trained model as an ONNX file for ONNX Runtime, quantized weights packed, and verify it.

    The weights are scale and codes of the optimizer, never rounded again. Linear layers go to ``MatMulNBits``; everything
    else is unpacked when the runtime loads the file. The file appears only after ONNX Runtime has shown the same weights
    bit for bit, and the same outputs on the example inputs, as torch. The model is left as it is.

    Args:
        model: exported in evaluation mode, and in float32: other dtypes are converted, quantized weights exactly.
        opt: the `blaq.BLAQ` or `blaq.LAQ` that trains it; with ``trial="past"`` the weights of ``opt.eval()`` are written.
        example_inputs: what the model is called with, at least two examples of it.
        path: of the file, ending in ``.onnx``.
        preset: ``"exact"``: float32 arithmetic; ``"fast"``: linear layers with activations rounded to 8 bits.
        dynamic_shapes: which axes may change, as in `torch.export.export`; None: the first axis of every input, and of
            integers of two dimensions (tokens) the second.

    Returns:
        The path.

    Raises:
        ValueError: a quantized weight that the exported graph does not have as it is; a model that torch cannot export, or that
            takes one size only where an axis may change; a graph of more than 2 GB; another path, preset or optimizer.
            `VerificationError`: the runtime disagrees; no file then.
        ImportError: onnx, onnxruntime or onnxscript is missing.

    Example:
        >>> import blaq, tempfile
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> opt = blaq.LAQ(blaq.param_groups(model, bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_onnx(model, opt, torch.randn(4, 16), Path(folder) / "model.onnx")
        ...     file.name, file.stat().st_size < 4000
        ('model.onnx', True)
    """
    path = _target(path, preset)
    to_graph = functools.partial(to_onnx, preset=preset, dynamic_shapes=dynamic_shapes)
    return export_model(model, opt, example_inputs, path, to_graph, unverified, dynamic_shapes, traced=False)


def export_run(
    run: Path,
    out: Path,
    checkpoint: Literal["best", "last"] = "best",
    preset: "Preset" = "exact",
    report: Callable[[Verification], None] | None = None,
) -> Path:
    """Write a run's checkpoint as an ONNX file, and verify it on the run's validation data; see `export_onnx`.

    Args:
        run: the run directory.
        out: path of the file, ending in ``.onnx``.
        checkpoint: the epoch of the lowest validation error, or the last.
        preset: as in `export_onnx`.
        report: called with the outcome of the verification.

    Raises:
        ValueError: no run there, or none whose first epoch has ended; else as `export_onnx`.
    """
    to_graph = functools.partial(to_onnx, preset=preset)
    return export_checkpoint(run, _target(out, preset), checkpoint, to_graph, unverified, report)


def to_onnx(
    model: nn.Module,
    weights: list[QuantizedWeight],
    inputs: tuple[Tensor, ...],
    preset: "Preset",
    dynamic_shapes: Any = None,
    recipe: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    axes: list[list[int]] | None = None,
) -> "onnx.ModelProto":
    """The graph of a model in evaluation mode with its quantized weights packed, and a description of them.

    `axes` of every input may change where there are no `dynamic_shapes`; None: `changing_axes`.
    """
    import onnx

    from blaq.export.onnx_graph import WeightGraph

    others = {}
    if dynamic_shapes is None:
        axes = [changing_axes(x) for x in inputs] if axes is None else axes
        inputs = tuple(map(_of_two, inputs, axes))
        others = resized(inputs, axes)
        dynamic_shapes = _by_parameter(model, [dict.fromkeys(each, torch.export.Dim.DYNAMIC) for each in axes])
    program = _trace(model, inputs, of_arguments(model, inputs, dynamic_shapes))
    claimed = [_claim(program.model.graph, weight) for weight in weights]
    program.optimize()  # gives a weight that is an output too another name
    names = [value.name for value in claimed]
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    floats = sum(constant.nbytes for constant in constants if constant is not None)
    if floats > LARGEST:
        raise ValueError(
            f"export_onnx: {floats / 2**30:.1f} GB of weights in float, an ONNX file holds 2 GB; quantize more of them."
        )
    graph = WeightGraph(program.model_proto)
    containers = [graph.hold(name, weight, preset) for name, weight in zip(names, weights, strict=True)]
    proto = graph.finish()
    _strip(proto)
    _name_axes(proto, model, inputs, others)
    description = {
        "format_version": FORMAT_VERSION,
        "format": "onnx",
        "preset": preset,
        "recipe": recipe,
        "data": data,
        "weights": {container.weight.name: container.description() for container in containers},
    }
    onnx.helper.set_model_props(proto, {"blaq": json.dumps(description)})
    onnx.checker.check_model(proto)
    return proto


@contextmanager
def unverified(proto: "onnx.ModelProto", path: Path) -> Iterator[Session]:
    """The session of a file that takes its name when the block ends, and is gone if the block raises."""
    from blaq.export.onnx_session import OnnxSession

    with replacing(path) as partial:
        partial.write_bytes(proto.SerializeToString())
        yield OnnxSession(partial)


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any) -> "torch.onnx.ONNXProgram":
    """What torch's exporter writes, before any optimisation: every parameter is a constant under its own name."""
    # During the export torch (2.13) replaces the kernels that unroll recurrent layers to a fixed length, but what was called
    # before, as by an earlier export, is remembered and would be taken in their place.
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        operator._dispatch_cache.clear()
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error)
        fixed = "Constraints violated" in cause or "conflicts between user-specified" in cause
        remedy = " If an axis cannot change, pass dynamic_shapes." if fixed else ""
        raise ValueError(
            f"export_onnx: torch cannot export this model: {' '.join(cause.split()[:60])}{remedy}"
        ) from error
    finally:
        log.setLevel(level)
    assert program is not None
    return program


def _of_two(x: Tensor, axes: list[int]) -> Tensor:
    """An input whose changing axes have two entries or more: torch takes those of 1 for fixed."""
    for axis in axes:
        x = torch.cat([x, x], axis) if x.shape[axis] == 1 else x
    return x


def _by_parameter(model: nn.Module, axes: list[Any]) -> tuple[Any, ...]:
    """An entry for each parameter of ``forward``: all that ``*xs`` takes is one."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    starred = inspect.Parameter.VAR_POSITIONAL
    first = kinds.index(starred) if starred in kinds else len(axes)
    return (*axes[:first], *([tuple(axes[first:])] if axes[first:] else []))


def _claim(graph: Any, weight: QuantizedWeight) -> Any:
    """Make a quantized weight an input of the graph: nothing that could be folded, transposed or merged from here on."""
    found = [name for name in weight.names if name in graph.initializers]
    values = weight.values.numpy()
    for name in found:
        if not np.array_equal(graph.initializers[name].const_value.numpy(), values):
            raise ValueError(
                f"export_onnx: torch's exporter changed {name!r}; expected scale times level, bit for bit."
            )
    if not found:
        raise ValueError(
            f"export_onnx: {weight.name!r} is not in the exported graph: the outputs do not depend on it; "
            "keep it in float with a rule, or let forward() use it."
        )
    first = graph.initializers.pop(found[0])
    for name in found[1:]:
        graph.initializers.pop(name).replace_all_uses_with(first)
    first.const_value = None
    graph.inputs.append(first)
    return first


def _name_axes(
    proto: "onnx.ModelProto", model: nn.Module, inputs: tuple[Tensor, ...], others: dict[str, tuple[Tensor, ...]]
) -> None:
    """Call the axes that change ``batch`` and ``sequence``. Those of the outputs are found by trying: the exporter takes
    some that change for fixed.
    """
    before = [*inputs, *tensors(computed(model, inputs))]
    values = [*proto.graph.input, *proto.graph.output]
    for axis, changed in others.items():
        after = [*changed, *tensors(computed(model, changed))]
        for value, x, y in zip(values, before, after, strict=True):
            if x.ndim != y.ndim:  # an axis of one entry that the model drops
                continue
            for dim, old, new in zip(value.type.tensor_type.shape.dim, x.shape, y.shape, strict=True):
                if old != new:
                    dim.dim_param = axis


def _strip(proto: "onnx.ModelProto") -> None:
    """Leave out what the exporter noted of the source code and of the machine."""
    del proto.graph.value_info[:]
    proto.graph.ClearField("metadata_props")
    for part in [*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _target(path: str | Path, preset: str) -> Path:
    return check_target("export_onnx", path, preset, ".onnx", ("onnx", "onnxruntime", "onnxscript"), "onnx")
