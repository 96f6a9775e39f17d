"""Quantized weights put into an exported graph in place of the float ones, from their codes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from blaq.export.layers import QuantizedWeight
from blaq.export.onnx_containers import Container, Preset, blocks, choose, packed, storage, table

__all__ = ["MICROSOFT", "WeightGraph"]

MICROSOFT = "com.microsoft"


class Use(NamedTuple):
    """A matrix product with a weight."""

    node: NodeProto
    transposed: bool


class WeightGraph:
    """An exported graph in which each quantized weight is an input, still to be filled.

    A weight that is an input is nothing the exporter could fold, merge with an equal one or transpose. `hold` makes it a
    value computed from packed constants, which a runtime folds when it loads the file, or lets ``MatMulNBits`` take the
    packed constant itself.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._made: list[NodeProto] = []  # from constants alone: first in the graph
        self._constants: set[str] = {tensor.name for tensor in model.graph.initializer}
        self._packed: dict[str, tuple[str, str]] = {}  # codes and scales of a product
        self._stored = 0  # bytes of the weight at hand

    def hold(self, name: str, weight: QuantizedWeight, preset: Preset) -> Container:
        """Fill in a weight under the name it has in the graph."""
        graph = self.model.graph
        uses = self._uses(name)
        bits, note = choose(weight, preset, None if uses is None else {use.transposed for use in uses})
        self._stored = 0
        value = next(value for value in graph.input if value.name == name)
        graph.input.remove(value)
        output = self._output(name)
        if uses is None or bits is None:
            self._unpack(name, weight)
            kind = "unpacked"
        else:
            for use in uses:
                self._multiply(name, weight, use, bits, accuracy_level=4 if preset == "fast" else 0)
            for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] == name]:
                graph.node.remove(node)
            kind = f"matmulnbits{bits}"
        return Container(
            weight=weight,
            value=name,
            kind=kind,
            note=note,
            bits=8 * self._stored / max(weight.codes.numel(), 1),
            transposed=bool(uses) and bits is not None and any(use.transposed for use in uses or ()),
            output=output,
        )

    def finish(self) -> onnx.ModelProto:
        """The model, all weights filled in."""
        nodes = [*self._made, *self.model.graph.node]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        if any(node.domain == MICROSOFT for node in nodes):
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        return self.model

    # --- who takes a weight ---------------------------------------------------------------------------------------------

    def _takers(self, name: str) -> list[NodeProto]:
        return [node for node in _all_nodes(self.model.graph) if name in node.input]

    def _uses(self, name: str) -> list[Use] | None:
        """The matrix products that take a weight; None where anything else takes it too."""
        if any(value.name == name for value in self.model.graph.output):
            return None
        uses: list[Use] = []
        top = {node.output[0] for node in self.model.graph.node}
        for node in self._takers(name):
            if node.output[0] not in top or list(node.input).count(name) > 1:
                return None
            if node.op_type == "Transpose" and list(_attribute(node, "perm", [])) == [1, 0]:
                products = self._uses(node.output[0])
                if products is None or any(not use.transposed for use in products):
                    return None
                uses += [Use(use.node, False) for use in products]
            elif node.op_type == "MatMul" and node.input[1] == name:
                uses.append(Use(node, True))
            elif node.op_type == "Gemm" and node.input[1] == name and _is_plain(node):
                uses.append(Use(node, not _attribute(node, "transB", 0)))
            else:
                return None
        return uses or None

    def _output(self, name: str) -> str | None:
        """The value that a layer's module returns: of the one node that takes the weight, its bias added."""
        takers = self._takers(name)
        while len(takers) == 1 and takers[0].op_type == "Transpose":
            takers = self._takers(takers[0].output[0])
        if len(takers) != 1 or takers[0].op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"):
            return None
        value = str(takers[0].output[0])
        after = self._takers(value)
        if takers[0].op_type == "MatMul" and len(after) == 1 and after[0].op_type == "Add":
            other = after[0].input[1] if after[0].input[0] == value else after[0].input[0]
            if other in self._constants:
                return str(after[0].output[0])
        return value

    # --- constants and the nodes that unpack them -------------------------------------------------------------------------

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        """An initialiser, written once."""
        if name not in self._constants:
            self._constants.add(name)
            self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            if name.endswith((".codes", ".scale")):
                self._stored += array.nbytes
        return name

    def _make(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._made.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output

    def _shape(self, *sizes: int) -> str:
        return self._constant(f"blaq.shape.{'x'.join(map(str, sizes))}", np.array(sizes, dtype=np.int64))

    def _looked_up(self, codes: str, rows: NDArray[Any], rows_name: str, prefix: str) -> str:
        """A row of a table for every byte of ``codes``."""
        index = self._make("Cast", [codes], f"{prefix}.bytes", to=TensorProto.INT32)
        return self._make("Gather", [self._constant(rows_name, rows), index], f"{prefix}.digits")

    def _unpack(self, name: str, weight: QuantizedWeight) -> None:
        """The weight in float32 under its name: ``scale * level``, as `QuantizedWeight.values` computes it."""
        grid, rows, size = weight.grid, len(weight.scale), weight.codes.numel()
        levels = grid.levels.numpy()
        container = storage(len(levels))
        codes = self._constant(f"{name}.codes", packed(weight.codes.numpy(), container))
        rows_of_levels = table(levels, container)
        value = self._looked_up(codes, rows_of_levels, f"blaq.levels.{grid.name}", name)
        if size % rows_of_levels.shape[1]:
            value = self._make("Reshape", [value, self._shape(-1)], f"{name}.flat")
            value = self._make("Slice", [value, self._shape(0), self._shape(size)], f"{name}.cut")
        value = self._make("Reshape", [value, self._shape(rows, size // rows)], f"{name}.rows")
        scale = weight.scale.numpy()
        if grid.two_scales:
            zero = self._constant("blaq.zero", np.zeros((), np.float32))
            sign = self._make("Less", [value, zero], f"{name}.sign")
            sides = [self._constant(f"{name}.{i}.scale", scale[:, i : i + 1]) for i in range(2)]
            factor = self._make("Where", [sign, *sides], f"{name}.factor")
        else:
            factor = self._constant(f"{name}.scale", scale)
        value = self._make("Mul", [factor, value], f"{name}.scaled")
        self._make("Reshape", [value, self._shape(*weight.shape)], name)

    def _multiply(self, name: str, weight: QuantizedWeight, use: Use, bits: int, accuracy_level: int) -> None:
        """A matrix product by MatMulNBits, in place of the node in float32."""
        name = f"{name}.T" if use.transposed else name
        codes_NK = weight.codes.numpy().T if use.transposed else weight.codes.numpy()
        N, K = codes_NK.shape
        in_blocks = blocks(weight, transposed=use.transposed)
        assert in_blocks is not None  # or `choose` would have said so
        size, scale = in_blocks
        if name not in self._packed:  # a weight that several products share is there once
            shape = self._shape(N, -(-K // size))
            scales = self._make("Expand", [self._constant(f"{name}.scale", scale), shape], f"{name}.scales")
            self._packed[name] = self._blocks(name, weight, codes_NK, size, bits), scales
        node = use.node
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else None
        product = node.output[0] if bias is None else f"{node.output[0]}.product"
        new = helper.make_node(
            "MatMulNBits",
            [node.input[0], *self._packed[name]],
            [product],
            name=f"{name}/MatMulNBits/{node.output[0]}",
            domain=MICROSOFT,
            K=K,
            N=N,
            bits=bits,
            block_size=size,
            accuracy_level=accuracy_level,
        )
        nodes = self.model.graph.node
        position = next(i for i, other in enumerate(nodes) if other.output[0] == node.output[0])
        del nodes[position]
        if bias is not None:
            nodes.insert(position, helper.make_node("Add", [product, bias], [node.output[0]], name=node.name))
        nodes.insert(position, new)

    def _blocks(self, name: str, weight: QuantizedWeight, codes_NK: NDArray[np.uint8], size: int, bits: int) -> str:
        """The second input of MatMulNBits, (N, blocks, bytes a block), from as few bits on disk as whole bits allow."""
        N, K = codes_NK.shape
        count = -(-K // size)
        padded = np.zeros((N, count * size), np.uint8)
        padded[:, :K] = codes_NK
        stored, held = storage(len(weight.grid.levels), whole_bits=True), f"bits{bits}"
        offset = (weight.grid.levels.numpy() + 2 ** (bits - 1)).astype(np.uint8)  # of every code
        shape = N, count, size * bits // 8
        if stored == held:
            return self._constant(f"{name}.codes", packed(offset[padded], held).reshape(shape))
        codes = self._constant(f"{name}.codes", packed(padded, stored))
        digits = table(offset, stored)
        rows = packed(digits, held).reshape(len(digits), -1)
        value = self._looked_up(codes, rows, f"blaq.blocks.{weight.grid.name}.{bits}", name)
        return self._make("Reshape", [value, self._shape(*shape)], f"{name}.blocks")


def _all_nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _all_nodes(inner)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _is_plain(gemm: NodeProto) -> bool:
    """``A @ B + C`` without factors, A as it is."""
    factors = _attribute(gemm, "alpha", 1.0), _attribute(gemm, "beta", 1.0)
    return factors == (1.0, 1.0) and not _attribute(gemm, "transA", 0)
