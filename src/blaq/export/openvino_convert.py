"""OpenVINO's converter for torch modules, and what of transformers' models it does not know."""

import logging
import warnings
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
import torch
from openvino.frontend import FrontEndManager, GeneralFailure, OpConversionFailure
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

__all__ = ["convert"]


def convert(model: nn.Module, inputs: tuple[Tensor, ...]) -> ov.Model:
    """What OpenVINO's converter makes of a module before any simplification: parameters are constants of their names."""
    log = logging.getLogger("openvino.frontend.pytorch.ts_decoder")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer, about the model's Python
            decoder = TorchScriptPythonDecoder(model, example_input=inputs, shared_memory=False)
            frontend = FrontEndManager().load_by_framework("pytorch")
            frontend.add_extension(ConversionExtension("aten::diff", _diff))
            graph = frontend.convert(frontend.load(decoder))
    except (RuntimeError, GeneralFailure, OpConversionFailure) as error:
        raise ValueError(f"export_openvino: OpenVINO cannot convert this model: {_cause(str(error))}") from error
    finally:
        log.setLevel(level)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "AvgPool":
            _let_windows_overhang(node)
    return graph


def _cause(text: str) -> str:
    """Of a message of many lines, those that say what is wrong; the summary at its end, where there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Check ")]
    if "Summary:" in lines:
        lines = lines[lines.index("Summary:") + 1 :]
    return " ".join(lines[:3])


def _diff(node: Any) -> list[ov.Output]:
    """``torch.diff`` of first order, which transformers' masks of text use: ``y[1:] - y[:-1]``, y with its ends put on."""
    order, axis = node.get_values_from_const_input(1), node.get_values_from_const_input(2)
    if order != 1:
        raise ValueError(f"torch.diff(n={order}): expected n=1.")
    before, after = (None if _is_none(node, index) else node.get_input(index) for index in (3, 4))
    y = op.concat([part for part in (before, node.get_input(0), after) if part is not None], axis)
    one, last, end, along = (op.constant(np.array([value], np.int64)) for value in (1, -1, 2**63 - 1, axis))
    upper, lower = op.slice(y, one, end, one, along), op.slice(y, op.constant(np.zeros(1, np.int64)), last, one, along)
    return [op.subtract(upper, lower).output(0)]


def _is_none(node: Any, index: int) -> bool:
    """Whether an optional tensor was left out."""
    try:
        return node.get_values_from_const_input(index) is None
    except GeneralFailure:  # a tensor, and no constant
        return False


def _let_windows_overhang(pool: Any) -> None:
    """Let the last window of an average reach beyond the picture, as torch's ``ceil_mode`` does: OpenVINO refuses a window
    larger than the whole picture, which transformers' EfficientNet averages by. Averages are over what is there.
    """
    kernel, strides, begin, end, rounding = (
        pool.get_attributes()[name] for name in ("kernel", "strides", "pads_begin", "pads_end", "rounding_type")
    )
    if not rounding.startswith("ceil") or list(kernel) != list(strides) or any([*begin, *end]):
        return
    beyond = [size - 1 for size in kernel]
    padded = op.avg_pool(pool.input_value(0), strides, begin, beyond, kernel, exclude_pad=True, rounding_type="floor")
    padded.set_friendly_name(pool.get_friendly_name())
    for user in pool.output(0).get_target_inputs():
        user.replace_source_output(padded.output(0))
