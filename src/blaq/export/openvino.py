"""Export to OpenVINO, for x86 processors: torch's module converted, then quantized weights from their codes.

OpenVINO's own simplifications are left to the moment when the runtime loads the file: a BatchNorm that they fold into a
convolution, or the gates that they reorder in an LSTM, would leave other weights in the file than were trained.
"""

import functools
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from blaq.export.exporting import changing_axes, check_target, export_checkpoint, export_model
from blaq.export.files import bin_of, flush, target_of
from blaq.export.layers import QuantizedWeight
from blaq.optim.base import LatentOptimizer

if TYPE_CHECKING:
    import openvino as ov

    from blaq.export.openvino_weights import Container, Preset
    from blaq.export.runtimes import Session
    from blaq.export.verify import Verification

__all__ = ["export_openvino", "export_run"]


def export_openvino(
    model: nn.Module,
    opt: LatentOptimizer,
    example_inputs: Tensor | tuple[Tensor, ...],
    path: str | Path,
    preset: "Preset" = "exact",
    dynamic_shapes: Any = None,
) -> Path:
    """Write a trained model as an OpenVINO file, quantized weights packed, and verify it.

    The weights are scale and codes of the optimizer, never rounded again: constants of 2, 4 or 8 bits, which stay packed
    in memory where a Linear layer has them, and are unpacked at load elsewhere. The file appears only after OpenVINO has
    shown the same weights bit for bit, and the same outputs on the example inputs, as torch. The model is left as it is.

    Args:
        model: exported in evaluation mode, and in float32: other dtypes are converted, quantized weights exactly.
        opt: the `blaq.BLAQ` or `blaq.LAQ` that trains it; with ``trial="past"`` the weights of ``opt.eval()`` are written.
        example_inputs: what the model is called with.
        path: of the file, ending in ``.xml``; the weights go beside it, into a file that ends in ``.bin``.
        preset: ``"exact"``: float32 arithmetic; ``"fast"``: Linear layers with activations rounded to 8 bits. OpenVINO
            computes in bfloat16 by itself where the processor can: load the file with `blaq.export.runtimes.open_session`,
            or pass ``INFERENCE_PRECISION_HINT=f32``; the other setting that matters is in the file.
        dynamic_shapes: which axes may change, as in `torch.export.export`; None: the first axis of every input, and of
            integers of two dimensions (tokens) the second.

    Returns:
        The path.

    Raises:
        ValueError: a quantized weight that the converted graph does not have as it is; a model that OpenVINO cannot convert, or
            that takes one size only where an axis may change; another path, preset or optimizer. `VerificationError`: the
            runtime disagrees; no file then.
        ImportError: openvino is missing.

    Example:
        >>> import blaq, tempfile, torch
        >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> opt = blaq.LAQ(blaq.param_groups(model, bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_openvino(model, opt, torch.randn(4, 256), Path(folder) / "model.xml")
        ...     file.name, file.with_suffix(".bin").stat().st_size < 5000
        ('model.xml', True)
    """
    to_graph = functools.partial(to_openvino, preset=preset)
    target = _target(path, preset)
    return export_model(model, opt, example_inputs, target, to_graph, unverified, dynamic_shapes, traced=True)


def export_run(
    run: Path,
    out: Path,
    checkpoint: Literal["best", "last"] = "best",
    preset: "Preset" = "exact",
    report: "Callable[[Verification], None] | None" = None,
) -> Path:
    """Write a run's checkpoint as an OpenVINO file, and verify it on the run's validation data; see `export_openvino`.

    Args:
        run: the run directory.
        out: path of the file, ending in ``.xml``.
        checkpoint: the epoch of the lowest validation error, or the last.
        preset: as in `export_openvino`.
        report: called with the outcome of the verification.

    Raises:
        ValueError: no run there, or none whose first epoch has ended; else as `export_openvino`.
    """
    to_graph = functools.partial(to_openvino, preset=preset)
    return export_checkpoint(run, _target(out, preset), checkpoint, to_graph, unverified, report)


def to_openvino(
    model: nn.Module,
    weights: list[QuantizedWeight],
    inputs: tuple[Tensor, ...],
    preset: "Preset",
    recipe: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    axes: list[list[int]] | None = None,
) -> "ov.Model":
    """The graph of a model in evaluation mode with its quantized weights packed, and a description of them.

    `axes` of every input may change; None: `changing_axes`.
    """
    from blaq.export.openvino_convert import convert
    from blaq.export.openvino_graph import hold, outputs_of_layers
    from blaq.export.openvino_session import FORMAT_VERSION, settings

    graph = convert(model, inputs)
    axes = [changing_axes(x) for x in inputs] if axes is None else axes
    for value, x, each in zip(graph.inputs, inputs, axes, strict=True):
        value.get_node().set_partial_shape(_shape(x, each))
    graph.validate_nodes_and_infer_types()
    containers = {weight.name: hold(graph, weight, preset) for weight in weights}
    graph.validate_nodes_and_infer_types()
    outputs = outputs_of_layers(graph, weights)
    description = {
        "format_version": FORMAT_VERSION,
        "format": "openvino",
        "preset": preset,
        "recipe": recipe,
        "data": data,
        "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in inputs],
        "weights": {
            weight.name: {**_description(weight, containers[weight.name]), "output": outputs.get(weight.name)}
            for weight in weights
        },
    }
    graph.set_rt_info(json.dumps(description), ["blaq"])
    # The one setting that OpenVINO itself reads from a file.
    option = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
    graph.set_rt_info(settings(preset)[option], ["runtime_options", option])
    return graph


def _description(weight: QuantizedWeight, container: "Container") -> dict[str, Any]:
    return {
        "grid": weight.grid.name,
        "granularity": weight.granularity,
        "shape": list(weight.shape),
        "container": container.element,
        "holds": container.holds,
        "bits": container.bits,
        "padding": container.padding(weight.shape[-1]),
        "note": container.note,
    }


@contextmanager
def unverified(graph: "ov.Model", path: Path) -> "Iterator[Session]":
    """The session of two files that get their names when the block ends, and are gone if the block raises."""
    from blaq.export.openvino_session import write
    from blaq.export.runtimes import open_session

    target = target_of(path)
    weights = target_of(bin_of(path))  # which is what will be read with it
    if weights.exists() and not target.exists():
        raise ValueError(
            f"export_openvino(path={str(path)!r}): {weights.name!r}, which would be replaced, is there without"
            f" {target.name!r}; delete it, or choose another name."
        )
    if weights.parent != target.parent:
        raise ValueError(
            f"export_openvino(path={str(path)!r}): its weights, {str(weights)!r}, lie in another folder than {str(target)!r};"
            " delete that .bin or link, or choose another name."
        )
    partial = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(4)}.partial.xml")
    try:
        write(graph, partial)
        yield open_session(partial)
        for made, name in ((partial.with_suffix(".bin"), weights), (partial, target)):
            flush(made)
            os.replace(made, name)
        flush(target.parent)
    finally:
        partial.unlink(missing_ok=True)
        partial.with_suffix(".bin").unlink(missing_ok=True)


def _shape(x: Tensor, axes: list[int]) -> "ov.PartialShape":
    """The shape of an input, -1 for axes that may change."""
    import openvino as ov

    return ov.PartialShape([-1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _target(path: str | Path, preset: str) -> Path:
    return check_target("export_openvino", path, preset, ".xml", ("openvino",), "openvino")
