"""Quantized weights put into an OpenVINO graph in place of the float ones, from their codes."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op

from blaq.export.layers import QuantizedWeight
from blaq.export.openvino_weights import Container, Preset, choose, dequantized

__all__ = ["hold", "outputs_of_layers"]


def hold(graph: ov.Model, weight: QuantizedWeight, preset: Preset) -> Container:
    """Put a packed weight in the place of the float constants that hold its values."""
    wanted = {f"self.{name}" for name in weight.names} | set(weight.names)
    found = [n for n in graph.get_ordered_ops() if n.get_type_name() == "Constant" and n.get_friendly_name() in wanted]
    if not found:
        raise ValueError(
            f"export_openvino: {weight.name!r} is not in the converted graph: the outputs do not depend on it; keep it in "
            "float with a rule, or let forward() use it."
        )
    values = weight.values.numpy()
    for constant in found:
        if not np.array_equal(constant.data, values):
            raise ValueError(
                f"export_openvino: OpenVINO's converter changed {weight.name!r}; expected scale times level, bit for bit."
            )
    users = [user for constant in found for user in constant.output(0).get_target_inputs()]
    linear = len(weight.shape) == 2 and all(_is_linear(user) for user in users)
    container = choose(weight, preset, linear=linear)
    values = dequantized(weight, container)
    for user in users:
        product = user.get_node() if user.get_node().get_type_name() == "MatMul" else None
        if product is not None and container.packed:
            _pad(product, container.padding(weight.shape[1]))
            _guard(product)
        user.replace_source_output(values if product is None or container.packed else _identity(values))
    return container


def _is_linear(user: Any) -> bool:
    """Whether a use of a weight (N, K) is ``x @ weight.T``: what the packed kernels compute."""
    node = user.get_node()
    if node.get_type_name() != "MatMul" or user.get_index() != 1:
        return False
    attributes = node.get_attributes()
    x = node.input_value(0).get_partial_shape()
    return bool(attributes["transpose_b"] and not attributes["transpose_a"] and x.rank.is_static)


def _pad(product: Any, columns: int) -> None:
    """Add zeros to the first factor, for the columns that fill the rows of the second."""
    if columns:
        x = product.input_value(0)
        rank = x.get_partial_shape().rank.get_length()
        begin, end = np.zeros(rank, np.int64), np.array([0] * (rank - 1) + [columns], np.int64)
        product.input(0).replace_source_output(op.pad(x, begin, end, "constant", np.float32(0)).output(0))


def _guard(product: Any) -> None:
    """Keep the runtime from multiplying what comes after a packed product, BatchNorm say, into the weight: that would
    unpack it.
    """
    users = product.output(0).get_target_inputs()
    guard = _identity(product.output(0))
    for user in users:
        user.replace_source_output(guard)


def _identity(value: ov.Output) -> ov.Output:
    """The same value behind an operator that the runtime does not look through, nor spends time on: ``PReLU`` of slope 1,
    which changes nothing, not even NaN.
    """
    identity = op.prelu(value, op.constant(np.ones(1, np.float32)))
    identity.set_friendly_name(f"{value.get_node().get_friendly_name()}/as_is")
    return identity.output(0)


def outputs_of_layers(graph: ov.Model, weights: list[QuantizedWeight]) -> dict[str, str]:
    """The node that computes what the module of each weight returns, by the weight's name, where there is one: the last of
    those that the converter has named after the module.
    """
    nodes = {weight.name: "" for weight in weights}
    for node in graph.get_ordered_ops():
        for weight in weights:
            module = weight.name.rpartition(".")[0]
            prefix = f"__module.{module}/aten::" if module else "aten::"
            if node.get_friendly_name().startswith(prefix) and len(node.outputs()) == 1:
                nodes[weight.name] = node.get_friendly_name()
    return {name: node for name, node in nodes.items() if node}
