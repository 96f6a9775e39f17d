"""An exported ONNX file in ONNX Runtime, on the CPU."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from blaq.export.onnx_containers import FORMAT_VERSION

__all__ = ["OnnxSession"]

ROWS = 256  # of an identity matrix at a time
ERRORS_ONLY = 3


class OnnxSession:
    """See `blaq.export.runtimes.Session`. Everything it says of weights and layers is computed by ONNX Runtime."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self._path = path
        self._threads = threads
        self._options: Any = onnxruntime.SessionOptions()
        self._options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self._session = self._open(str(path))
        try:
            description = json.loads(self._session.get_modelmeta().custom_metadata_map["blaq"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"open_session({str(path)!r}): expected a file that `blaq export` wrote; it has no description."
            ) from error
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"open_session({str(path)!r}): format version {version}, expected {FORMAT_VERSION}; open it with the blaq that "
                "wrote it."
            )
        self._description: dict[str, Any] = description

    @property
    def preset(self) -> str:
        """``"exact"`` or ``"fast"``."""
        return str(self.description["preset"])

    @property
    def description(self) -> dict[str, Any]:
        """What the file says of itself."""
        return self._description

    @property
    def batch(self) -> int | None:
        """See `blaq.export.runtimes.Session`."""
        sizes = [value.shape[0] for value in self._session.get_inputs() if value.shape]
        return sizes[0] if sizes and all(isinstance(size, int) for size in sizes) else None

    def run(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """The first output."""
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """All outputs.

        Raises:
            ValueError: ONNX Runtime cannot compute them, as for an axis that the file has fixed.
        """
        try:
            return _run(self._session, inputs)
        except Exception as error:  # onnxruntime's errors have no common base
            shapes = ", ".join(str(x.shape) for x in inputs)
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"ONNX Runtime cannot run the file on inputs of shape {shapes}: {reason}") from error

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Every quantized weight as ONNX Runtime computes it from the file.

        What is unpacked at load is a value of the graph. What ``MatMulNBits`` takes packed is seen through the operator:
        the product with the identity, in float32, is the weight. Of one that is there twice, as it is and transposed, both
        are looked at: NaN where they differ.
        """
        model = onnx.load(self._path)
        described: dict[str, dict[str, Any]] = self.description["weights"]
        names = {name: entry["value"] for name, entry in described.items()}
        unpacked = [name for name, entry in described.items() if entry["container"] == "unpacked"]
        found = {}
        if unpacked:
            part = _part(model, [names[name] for name in unpacked], [])
            found = dict(zip(unpacked, _run(self._open(part), ()), strict=True))
        for name in described.keys() - found.keys():
            seen, *others = self._through_products(model, names[name])
            for other in others:
                seen = np.where(seen == other, seen, np.float32(np.nan))
            found[name] = seen
        return {name: found[name] for name in described}

    def layers(self, *inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What the layers with a quantized weight compute on the way, by the weight's name, in the order of the graph."""
        model = onnx.load(self._path)
        outputs = {entry["output"]: name for name, entry in self.description["weights"].items()}
        made = [output for node in model.graph.node for output in node.output if outputs.get(output)]
        if not made:
            return {}
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in made)
        values = _run(self._open(model), inputs)
        return {outputs[output]: value for output, value in zip(made, values, strict=True)}

    def _through_products(self, model: ModelProto, name: str) -> Iterator[NDArray[np.float32]]:
        """From a product that takes the weight as it is, and from one that takes its transpose, where there are such."""
        for transposed in (False, True):
            prefix = f"{name}.T/MatMulNBits/" if transposed else f"{name}/MatMulNBits/"
            node = next((node for node in model.graph.node if node.name.startswith(prefix)), None)
            if node is not None:
                weight_KN = self._through_product(model, node)
                yield weight_KN if transposed else np.ascontiguousarray(weight_KN.T)

    def _through_product(self, model: ModelProto, product: NodeProto) -> NDArray[np.float32]:
        """The second factor of a product, (K, N)."""
        node = NodeProto()
        node.CopyFrom(product)
        node.input[0], node.output[0] = "blaq.identity", "blaq.product"
        attributes = {attribute.name: attribute for attribute in node.attribute}
        attributes["accuracy_level"].i = 0
        K = attributes["K"].i
        part = _part(model, ["blaq.product"], [node])
        part.graph.input.append(helper.make_tensor_value_info("blaq.identity", TensorProto.FLOAT, ["rows", K]))
        session = self._open(part)
        return np.concatenate(
            [  # an identity by pieces: as a whole it can be larger than the weight by far
                _run(session, (np.eye(min(ROWS, K - start), K, k=start, dtype=np.float32),))[0]
                for start in range(0, K, ROWS)
            ]
        )

    def _open(self, model: str | ModelProto) -> Any:
        content = model if isinstance(model, str) else model.SerializeToString()
        try:
            return onnxruntime.InferenceSession(content, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"open_session({str(self._path)!r}): ONNX Runtime refuses the file: {reason}") from error


def _run(session: Any, inputs: Iterable[NDArray[Any]]) -> list[NDArray[Any]]:
    names = [value.name for value in session.get_inputs()]
    outputs: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
    return outputs


def _part(model: ModelProto, outputs: list[str], more: list[NodeProto]) -> ModelProto:
    """The part of a model that computes these values, with nodes added to it."""
    makers = {output: node for node in [*model.graph.node, *more] for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    needed: dict[str, NodeProto] = {}
    used: dict[str, TensorProto] = {}

    def visit(name: str) -> None:
        if name in constants:
            used[name] = constants[name]
        elif name in makers and makers[name].output[0] not in needed:
            for input_ in makers[name].input:
                visit(input_)
            needed[makers[name].output[0]] = makers[name]

    for output in outputs:
        visit(output)
    graph = GraphProto(name="part")
    graph.node.extend(needed.values())
    graph.initializer.extend(used.values())
    graph.output.extend(onnx.ValueInfoProto(name=output) for output in outputs)
    part = ModelProto(ir_version=model.ir_version, graph=graph)
    part.opset_import.extend(model.opset_import)
    return part
