"""The float32 model that an exported file stands for, as a file of the same runtime: what a speed is compared with.

It is made from the exported file alone: every quantized weight becomes the float32 constant that the runtime sees, and
the operators around it become those that an exporter would have written for a float model.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blaq.export.runtimes import Session

if TYPE_CHECKING:
    import onnx

__all__ = ["Input", "inputs_of", "write_float32"]


class Input(NamedTuple):
    """What a file takes: the sizes of its axes, None for one that may change, and the type."""

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


def inputs_of(path: Path) -> list[Input]:
    """The inputs of an exported file, in their order."""
    if path.suffix == ".xml":
        from blaq.export.openvino_session import read

        graph, _ = read(path)
        return [
            Input(
                tuple(axis.get_length() if axis.is_static else None for axis in value.get_partial_shape()),
                np.dtype(value.get_element_type().to_dtype()),
            )
            for value in graph.inputs
        ]
    import onnx

    types = [value.type.tensor_type for value in onnx.load(path).graph.input]
    return [
        Input(
            tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in each.shape.dim),
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(each.elem_type)),
        )
        for each in types
    ]


def write_float32(session: Session, path: Path, folder: Path) -> Path:
    """Write the float32 model of an exported file into a folder.

    Args:
        session: of the file.
        path: of the file.
        folder: where to write; the file is called ``float32`` with the suffix of `path`.

    Returns:
        The path; `blaq.export.runtimes.open_session` loads it.
    """
    twin = folder / f"float32{path.suffix}"
    description = {**session.description, "preset": "exact", "weights": {}}
    if path.suffix == ".xml":
        _write_openvino(session, path, twin, description)
    else:
        _write_onnx(session, path, twin, description)
    return twin


def _write_onnx(session: Session, path: Path, twin: Path, description: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(path)
    values = {entry["value"]: name for name, entry in session.description["weights"].items()}
    weights = session.weights()
    made: dict[str, NDArray[Any]] = {}
    kept = []
    for node in model.graph.node:
        value = node.name.partition("/MatMulNBits")[0]
        if node.op_type == "MatMulNBits":
            name = value if value in values else value.removesuffix(".T")
            weight_NK = weights[values[name]]
            # From the right as it is, else its transpose; both laid out as the product reads them.
            made[value] = np.ascontiguousarray(weight_NK.T if name == value else weight_NK)
            kept.append(onnx.helper.make_node("MatMul", [node.input[0], value], list(node.output), name=node.name))
        elif node.output[0] in values:
            made[node.output[0]] = weights[values[node.output[0]]]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in made.items())
    _prune(model)
    onnx.helper.set_model_props(model, {"blaq": json.dumps(description)})
    onnx.save(model, twin)


def _prune(model: "onnx.ModelProto") -> None:
    """Leave out what no output depends on: the packed codes, and the nodes that unpacked them."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
            for attribute in node.attribute:  # graphs inside a node may use what lies outside
                needed.update(name for inner in attribute.g.node for name in inner.input)
    nodes.reverse()
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, content in ((graph.node, nodes), (graph.initializer, constants)):
        content = list(content)
        del field[:]
        field.extend(content)


def _write_openvino(session: Session, path: Path, twin: Path, description: dict[str, Any]) -> None:
    import openvino.opset13 as op

    from blaq.export.openvino_session import read, write

    graph, _ = read(path)
    weights = session.weights()
    for node in graph.get_ordered_ops():
        name = node.get_friendly_name()
        if name in weights:
            constant = op.constant(weights[name])
            for user in node.output(0).get_target_inputs():
                user.replace_source_output(constant.output(0))
                columns = session.description["weights"][name]["padding"]
                product = user.get_node()
                if columns and product.get_type_name() == "MatMul":
                    padded = product.input_value(0).get_node()
                    product.input(0).replace_source_output(padded.input_value(0))
        elif name.endswith("/as_is"):
            for user in node.output(0).get_target_inputs():
                user.replace_source_output(node.input_value(0))
    graph.validate_nodes_and_infer_types()
    graph.set_rt_info(json.dumps(description), ["blaq"])
    write(graph, twin)
