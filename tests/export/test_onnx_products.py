"""Quantized weights in a graph: ONNX Runtime's products against numpy, for every grid, shape and way a weight is taken.

No torch export here: the graphs are written by hand, and sessions have the default options that a user's have.
"""

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from blaq.export.layers import QuantizedWeight
from blaq.export.onnx import FORMAT_VERSION
from blaq.export.onnx_containers import PRESETS, Container, Preset, compute_bits, packed, storage, table
from blaq.export.onnx_graph import WeightGraph
from blaq.export.onnx_session import OnnxSession
from blaq.export.runtimes import open_session
from blaq.export.verify import VerificationError, verify_weights
from blaq.grids import GRIDS, Grid

FLOAT = TensorProto.FLOAT
# Of these, all but 12 and 64 are among the widths for which ONNX Runtime 1.32 multiplies 2-bit weights wrongly where it
# fuses the operator itself.
WIDTHS = (1, 2, 3, 5, 6, 7, 10, 12, 30, 33, 64)
DEPTHS = (1, 16, 31, 64, 100, 129, 200)


def random_weight(
    grid: str, shape: tuple[int, ...], granularity: str | int = "channel", *, seed: int = 0
) -> QuantizedWeight:
    draw = torch.Generator().manual_seed(seed)
    parsed = Grid.parse(grid)
    size = int(np.prod(shape))
    rows = {"tensor": 1, "channel": shape[0]}.get(str(granularity)) or size // int(granularity)
    codes = torch.randint(0, len(parsed.levels), shape, generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, parsed.scales, generator=draw) * 0.05 + 0.01
    return QuantizedWeight("fc.weight", (), parsed, granularity, codes, scale)


def in_graph(
    weight: QuantizedWeight, nodes: list[Any], preset: Preset, inputs: int | str | None = None, **constants: np.ndarray
) -> tuple[onnx.ModelProto, Container]:
    """A graph from x to y in which the weight is an input, and then is filled in."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", FLOAT, None),
            helper.make_tensor_value_info("fc.weight", FLOAT, weight.shape),
        ],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    filled = WeightGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    container = filled.hold("fc.weight", weight, preset)
    model = filled.finish()
    description = {
        "format_version": FORMAT_VERSION,
        "preset": preset,
        "weights": {"fc.weight": container.description()},
    }
    helper.set_model_props(model, {"blaq": json.dumps(description)})
    return model, container


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def gemm(*inputs: str) -> list[Any]:
    return [helper.make_node("Gemm", list(inputs), ["y"], transB=1)]


def matmul() -> list[Any]:
    """What torch writes for a Linear whose input has three axes."""
    return [
        helper.make_node("Transpose", ["fc.weight"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
    ]


def assert_product(y: np.ndarray, x: np.ndarray, weight_NK: np.ndarray, preset: str) -> None:
    """y = x W^T: in float32; or with x rounded to 8 bits, every column by half a step at most."""
    expected = x.astype(np.float64) @ weight_NK.T.astype(np.float64)
    assert y.shape == expected.shape
    bound = 1e-6 * (np.abs(x) @ np.abs(weight_NK).T)
    if preset == "fast":
        step = np.abs(x).max(axis=-1, keepdims=True) / 127
        bound = bound + 0.51 * step * np.abs(weight_NK).sum(axis=1)
        bound = bound + 1e-6 * np.abs(x).sum(axis=-1, keepdims=True)  # the zero point's part is taken off in float32
    assert (np.abs(y - expected) <= bound + 1e-12).all()


def seen_by_runtime(model: onnx.ModelProto, folder: Any) -> np.ndarray:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return OnnxSession(path, threads=1).weights()["fc.weight"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_width_and_depth(grid: str, preset: Preset) -> None:
    draw = np.random.default_rng(1)
    for index, N in enumerate(WIDTHS):
        K = DEPTHS[(index + len(grid)) % len(DEPTHS)]
        weight = random_weight(grid, (N, K), "channel", seed=index)
        model, container = in_graph(weight, gemm("x", "fc.weight"), preset)
        x = draw.standard_normal((3, K)).astype(np.float32)
        bits = compute_bits(Grid.parse(grid), preset)
        assert container.kind == ("unpacked" if bits is None else f"matmulnbits{bits}")
        assert_product(run(model, x), x, weight.values.numpy(), preset if bits else "exact")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("N", WIDTHS)
def test_every_depth_of_two_bits(N: int, preset: Preset) -> None:
    draw = np.random.default_rng(2)
    for grid in ("binary", "ternary"):
        for K in DEPTHS:
            weight = random_weight(grid, (N, K), "tensor", seed=K)
            model, _ = in_graph(weight, gemm("x", "fc.weight"), preset)
            x = draw.standard_normal((2, K)).astype(np.float32)
            assert_product(run(model, x), x, weight.values.numpy(), preset)


@pytest.mark.parametrize(
    ("grid", "fast", "exact"),
    [
        ("binary", 2, 4),
        ("ternary", 2, 4),
        ("ternary2", None, None),
        ("linear3", 4, 4),
        ("linear4", 4, 4),
        ("linear5", 8, None),
        ("linear8", 8, None),
        ("log3", 4, 4),
        ("log4", 8, None),
        ("log5", None, None),
        ("midrise2", 4, 4),
        ("midrise3", 4, 4),
        ("midrise4", 8, None),
        ("midrise7", 8, None),
        ("midrise8", None, None),
    ],
)
def test_bits_of_the_product(grid: str, fast: int | None, exact: int | None) -> None:
    assert compute_bits(Grid.parse(grid), "fast") == fast
    assert compute_bits(Grid.parse(grid), "exact") == exact


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grid", ["binary", "ternary", "ternary2", "linear3", "log4", "log8", "midrise2", "midrise4"])
def test_the_runtime_sees_the_weight_bit_for_bit(grid: str, preset: Preset, tmp_path: Any) -> None:
    for shape, granularity in (((7, 50), "tensor"), ((10, 130), "channel"), ((6, 96), 32), ((3, 40), 5), ((3, 48), 16)):
        weight = random_weight(grid, shape, granularity)
        for nodes in (gemm("x", "fc.weight"), [helper.make_node("MatMul", ["fc.weight", "x"], ["y"])]):
            model, _ = in_graph(weight, nodes, preset)
            assert np.array_equal(seen_by_runtime(model, tmp_path), weight.values.numpy())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("granularity", "kind"),
    [
        ("tensor", "matmulnbits"),
        ("channel", "matmulnbits"),
        (16, "matmulnbits"),
        (256, "matmulnbits"),
        (12, "unpacked"),
        (8, "unpacked"),
    ],
)
def test_groups(granularity: str | int, kind: str, preset: Preset) -> None:
    K = 48 if granularity == 12 else 512
    weight = random_weight("ternary", (10, K), granularity)
    model, container = in_graph(weight, gemm("x", "fc.weight"), preset)
    assert container.kind.startswith(kind)
    assert ("scales not in blocks" in container.note) == (kind == "unpacked")
    x = np.random.default_rng(3).standard_normal((4, K)).astype(np.float32)
    assert_product(run(model, x), x, weight.values.numpy(), preset if kind == "matmulnbits" else "exact")


@pytest.mark.parametrize("preset", PRESETS)
def test_inputs_of_three_axes_and_a_bias(preset: Preset) -> None:
    weight = random_weight("ternary", (10, 40))
    x = np.random.default_rng(4).standard_normal((2, 5, 40)).astype(np.float32)
    model, container = in_graph(weight, matmul(), preset)
    assert container.output == "y"
    assert [node.op_type for node in model.graph.node].count("MatMulNBits") == 1
    assert not {"Transpose", "MatMul", "Gemm"} & {node.op_type for node in model.graph.node}
    assert_product(run(model, x), x, weight.values.numpy(), preset)

    bias = np.arange(10, dtype=np.float32)
    model, container = in_graph(weight, gemm("x", "fc.weight", "bias"), preset, bias=bias)
    assert container.output == "y"
    assert_product(run(model, x[0]) - bias, x[0], weight.values.numpy(), preset)


@pytest.mark.parametrize(
    ("granularity", "kind"), [("tensor", "matmulnbits4"), ("channel", "unpacked"), (8, "unpacked")]
)
@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_a_matrix_of_inputs_by_outputs(operator: str, granularity: str | int, kind: str, tmp_path: Any) -> None:
    """As transformers' Conv1D has it. A scale for each input is none that the operator knows."""
    weight = random_weight("linear3", (24, 16), granularity)
    model, container = in_graph(weight, [helper.make_node(operator, ["x", "fc.weight"], ["y"])], "exact")
    assert (container.kind, container.transposed) == (kind, kind != "unpacked")
    x = np.random.default_rng(5).standard_normal((3, 24)).astype(np.float32)
    assert_product(run(model, x), x, weight.values.numpy().T, "exact")
    assert np.array_equal(seen_by_runtime(model, tmp_path), weight.values.numpy())


def test_a_square_matrix_is_not_confused_with_its_transpose(tmp_path: Any) -> None:
    weight = random_weight("linear4", (32, 32), "tensor")
    x = np.random.default_rng(6).standard_normal((3, 32)).astype(np.float32)
    for nodes, values in ((gemm("x", "fc.weight"), weight.values), (matmul()[1:], weight.values.T)):
        nodes[-1].input[1] = "fc.weight"
        model, _ = in_graph(weight, nodes, "exact")
        assert_product(run(model, x), x, values.numpy(), "exact")
        assert np.array_equal(seen_by_runtime(model, tmp_path), weight.values.numpy())
    for granularity in ("channel", 16):  # scales of rows are not scales of columns
        weight = random_weight("linear4", (32, 32), granularity)
        model, container = in_graph(weight, [helper.make_node("MatMul", ["x", "fc.weight"], ["y"])], "exact")
        assert container.kind == "unpacked"
        assert_product(run(model, x), x, weight.values.numpy().T, "exact")


def test_products_that_share_a_weight_share_its_bytes() -> None:
    weight = random_weight("ternary", (40, 40), "tensor")
    twice = [helper.make_node("Gemm", ["x", "fc.weight"], ["h"], transB=1), *matmul()]
    twice[-1].input[0] = "h"
    model, container = in_graph(weight, twice, "exact")
    assert container.output is None  # there are two
    assert [tensor.name for tensor in model.graph.initializer].count("fc.weight.codes") == 1
    x = np.random.default_rng(7).standard_normal((3, 40)).astype(np.float32)
    once = x @ weight.values.numpy().T
    np.testing.assert_allclose(run(model, x), once @ weight.values.numpy().T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=1, alpha=2.0)],
        [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=1, transA=1)],
        [helper.make_node("MatMul", ["fc.weight", "x"], ["y"])],
        [helper.make_node("MatMul", ["fc.weight", "fc.weight"], ["h"]), helper.make_node("Add", ["x", "h"], ["y"])],
        [
            helper.make_node("Gemm", ["x", "fc.weight"], ["h"], transB=1),
            helper.make_node("Add", ["h", "fc.weight"], ["y"]),
        ],
        [helper.make_node("Transpose", ["fc.weight"], ["h"]), helper.make_node("Gemm", ["x", "h"], ["y"], transB=0)],
    ],
)
def test_other_uses_of_a_weight_keep_their_meaning(nodes: list[Any]) -> None:
    """Factors, transposed inputs, the weight as the left matrix or for something else besides: computed in float32."""
    weight = random_weight("ternary", (16, 16), "tensor")
    model, container = in_graph(weight, nodes, "fast")
    assert container.kind == "unpacked"
    x = np.random.default_rng(8).standard_normal((16, 16)).astype(np.float32)
    plain = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info("x", FLOAT, None)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(weight.values.numpy(), "fc.weight")],
    )
    expected = run(helper.make_model(plain, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), x)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "bits"), [("binary", 1), ("ternary", 2), ("linear3", 4), ("midrise2", 2), ("log4", 4)]
)
def test_bits_on_disk(grid: str, bits: int) -> None:
    """Of a product whose rows fill their blocks; whatever the bits inside the operator."""
    weight = random_weight(grid, (64, 256), "tensor")
    for preset in PRESETS:
        model, container = in_graph(weight, gemm("x", "fc.weight"), preset)
        assert container.bits == bits + 32 / 64 / 256
        size = model.ByteSize() - 2048 * (grid == "log4") * (preset == "exact")  # a table of float32
        assert size * 8 / 64 / 256 < bits + 1.5


def test_bits_on_disk_unpacked() -> None:
    convolution = [helper.make_node("Conv", ["x", "fc.weight"], ["y"])]
    for grid, bits in (("binary", 1), ("ternary", 1.6), ("ternary2", 1.6), ("linear4", 4), ("log5", 8), ("linear8", 8)):
        weight = random_weight(grid, (64, 32, 3, 3), "tensor")
        _, container = in_graph(weight, convolution, "exact")
        assert container.kind == "unpacked"
        assert container.bits == pytest.approx(bits, rel=0.01)


@given(st.data())
@settings(max_examples=60)
def test_a_table_undoes_the_packing(data: st.DataObject) -> None:
    levels = data.draw(st.integers(2, 256))
    container = storage(levels, whole_bits=data.draw(st.booleans()))
    codes = np.array(data.draw(st.lists(st.integers(0, levels - 1), max_size=40)), dtype=np.uint8)
    values = np.random.default_rng(0).permutation(levels).astype(np.float32)
    rows = table(values, container)
    stored = packed(codes, container)
    assert len(stored) == -(-len(codes) // rows.shape[1])
    assert np.array_equal(rows[stored].reshape(-1)[: len(codes)], values[codes])


def test_storage_is_dense() -> None:
    per_byte = [table(np.zeros(1), storage(levels)).shape[1] for levels in (2, 3, 4, 7, 15, 16, 17, 256)]
    assert per_byte == [8, 5, 4, 2, 2, 2, 1, 1]
    assert storage(3, whole_bits=True) == "bits2"


@pytest.mark.parametrize("preset", PRESETS)
def test_of_a_weight_that_is_there_twice_both_are_proved(preset: Preset, tmp_path: Any) -> None:
    weights = [random_weight("linear4", (64, 64), "tensor")]
    nodes = [
        helper.make_node("Gemm", ["x", "fc.weight"], ["h"], transB=1),
        helper.make_node("MatMul", ["h", "fc.weight"], ["y"]),
    ]
    model, _ = in_graph(weights[0], nodes, preset)
    onnx.save(model, tmp_path / "model.onnx")
    verify_weights(open_session(tmp_path / "model.onnx"), weights)
    for name in ("fc.weight.codes", "fc.weight.T.codes"):
        file = onnx.load(tmp_path / "model.onnx")
        codes = next(tensor for tensor in file.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(codes).copy()
        values.reshape(-1)[5] ^= 1
        codes.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(file, tmp_path / "other.onnx")
        with pytest.raises(VerificationError, match=r"'fc.weight' is not scale times level in the runtime: 1 of 4096"):
            verify_weights(open_session(tmp_path / "other.onnx"), weights)
