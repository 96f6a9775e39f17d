"""OpenVINO files in their runtime, with the settings that make it compute what it should."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
from numpy.typing import NDArray

from blaq.export.files import bin_of

__all__ = ["FORMAT_VERSION", "OpenVINOSession", "checksum", "read", "settings", "write"]

FORMAT_VERSION = 1
GROUP_SIZE = 64  # inputs that share a scale where the preset "fast" rounds them to 8 bits
ROWS = 256  # of an identity matrix at a time


def settings(preset: str, threads: int | None = None) -> dict[str, str]:
    """The options that `openvino.Core.compile_model` needs for a file of blaq: it computes in bfloat16, and rounds
    activations to 8 bits, where it is not told otherwise.

    Example:
        >>> settings("exact")
        {'INFERENCE_PRECISION_HINT': 'f32', 'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0'}
    """
    group_size = GROUP_SIZE if preset == "fast" else 0
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group_size)}
    return options if threads is None else {**options, "INFERENCE_NUM_THREADS": str(threads)}


class OpenVINOSession:
    """A file that `blaq.export_openvino` wrote, loaded by OpenVINO; see `blaq.export.runtimes.Session`.

    Args:
        path: of the ``.xml``; its ``.bin`` lies beside it.
        threads: of the runtime; None leaves the choice to it.

    Raises:
        ValueError: a file that OpenVINO refuses or that blaq did not write; a ``.bin`` that is missing or of another file.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        path = Path(path)
        self._graph, self.description = read(path)
        self.preset: str = self.description["preset"]
        self._threads = threads
        self._core = ov.Core()
        self._request = self._compiled(self._graph, self.preset).create_infer_request()

    @property
    def batch(self) -> int | None:
        """See `blaq.export.runtimes.Session`."""
        shapes = [value.get_partial_shape() for value in self._graph.inputs]
        sizes = [shape[0] for shape in shapes if len(shape)]
        return int(sizes[0].get_length()) if sizes and all(size.is_static for size in sizes) else None

    def run(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """The first output."""
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """All outputs.

        Raises:
            ValueError: OpenVINO cannot compute them, as for an axis that the graph has fixed.
        """
        try:
            results = self._request.infer(list(inputs), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            shapes = ", ".join(str(x.shape) for x in inputs)
            raise ValueError(f"OpenVINO cannot compute the outputs of inputs {shapes}: {reason}") from error
        return [results[k] for k in range(len(results))]

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Every quantized weight as the runtime computes it: that of a packed product by multiplying the identity with it,
        others as the graph unpacks them; in float32 arithmetic, also of a file for 8-bit activations.
        """
        nodes = {node.get_friendly_name(): node for node in self._graph.get_ordered_ops()}
        found = {}
        for name, entry in self.description["weights"].items():
            if entry["note"]:
                found[name] = self._unpacked(nodes[name])
            else:
                found[name] = self._multiplied(nodes[name])[:, : entry["shape"][1]]
        return found

    def layers(self, *inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What every layer with a quantized weight computes on the way, by the weight's name, first layer first."""
        outputs = {entry["output"]: name for name, entry in self.description["weights"].items() if entry["output"]}
        taken = [node for node in self._graph.get_ordered_ops() if node.get_friendly_name() in outputs]
        if not taken:
            return {}
        graph = ov.Model([op.result(node.output(0)) for node in taken], self._graph.get_parameters(), "layers")
        request = self._compiled(graph, self.preset).create_infer_request()
        results = request.infer(list(inputs), share_outputs=False)
        return {outputs[node.get_friendly_name()]: results[k] for k, node in enumerate(taken)}

    def _compiled(self, graph: ov.Model, preset: str) -> ov.CompiledModel:
        return self._core.compile_model(graph, "CPU", settings(preset, self._threads))

    def _unpacked(self, weight: ov.Node) -> NDArray[np.float32]:
        graph = ov.Model([op.result(weight.output(0))], [], "weight")
        values: NDArray[np.float32] = self._compiled(graph, "exact")([], share_outputs=False)[0]
        return values

    def _multiplied(self, weight: ov.Node) -> NDArray[np.float32]:
        """By the kernel for many rows, and by that for few in up to `ROWS` of the columns; NaN where the two differ."""
        N, K = weight.get_output_shape(0)
        x = op.parameter([-1, K], np.float32)
        graph = ov.Model([op.result(op.matmul(x, weight.output(0), False, True))], [x], "weight")
        product = self._compiled(graph, "exact")
        values = np.empty((N, K), np.float32)
        for start in range(0, K, ROWS):
            rows = np.eye(min(ROWS, K - start), K, k=start, dtype=np.float32)
            values[:, start : start + len(rows)] = product(rows)[0].T
        for k in np.linspace(0, K - 1, min(ROWS, K)).astype(int):
            alone = product(np.eye(1, K, k=k, dtype=np.float32))[0][0]
            values[alone != values[:, k], k] = np.nan
        return values


def read(path: Path) -> tuple[ov.Model, dict[str, Any]]:
    """The graph of a file, and what blaq has written about it.

    Raises:
        ValueError: see `OpenVINOSession`.
    """
    owner = f"open_session({str(path)!r})"
    bin_file = bin_of(path)
    if not bin_file.is_file():
        raise ValueError(f"{owner}: there is no {bin_file.name} beside it, which holds the weights; copy both files.")
    try:
        graph = ov.Core().read_model(path, bin_file)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{owner}: OpenVINO cannot read it ({lines[-1]}); export it again.") from error
    if not graph.has_rt_info(["blaq"]):
        raise ValueError(f"{owner}: it was not written by `blaq export`; expected its description in the file.")
    description = json.loads(graph.get_rt_info(["blaq"]).astype(str))
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{owner}: format version {version}, expected {FORMAT_VERSION}; open it with the blaq that wrote it."
        )
    if graph.get_rt_info(["blaq_bin"]).astype(str) != checksum(bin_file):
        raise ValueError(f"{owner}: {bin_file.name} is damaged or of another export; export again, or copy both files.")
    return graph, description


def write(graph: ov.Model, path: Path) -> None:
    """Write a graph as an .xml and the .bin beside it. The one would be read with the .bin of another export without a
    complaint, so the .xml knows the checksum of its own.
    """
    weights = path.with_suffix(".bin")
    ov.serialize(graph, path, weights)
    graph.set_rt_info(checksum(weights), ["blaq_bin"])
    ov.serialize(graph, path, weights)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
