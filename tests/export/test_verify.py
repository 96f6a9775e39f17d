"""Verification: whatever is wrong in a file, or in a runtime, is found and named, and no file appears."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import blaq
from blaq.export import compressed, packed
from blaq.export.layers import QuantizedWeight, quantized_weights, weights_of_run
from blaq.export.onnx import export_onnx, export_run
from blaq.export.onnx_session import OnnxSession
from blaq.export.packed_session import CompressedSession, PackedSession
from blaq.export.runtimes import open_session
from blaq.export.verify import (
    VerificationError,
    verify_file,
    verify_outputs,
    verify_session,
    verify_weights,
)
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import evaluate, train

Change = Callable[[onnx.ModelProto], None]


class Exported(SimpleNamespace):
    model: nn.Module
    weights: list[QuantizedWeight]
    path: Path
    inputs: torch.Tensor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.conv = nn.Conv2d(1, 4, 3)
    model.flat = nn.Flatten()
    model.fc1 = nn.Linear(64, 33)
    model.relu = nn.ReLU()
    model.fc2 = nn.Linear(33, 10)
    opt = blaq.LAQ(blaq.param_groups(model, "linear4", "channel", rules={"conv": 1}))
    inputs = torch.randn(6, 1, 6, 6)
    path = export_onnx(model, opt, inputs, tmp_path_factory.mktemp("export") / "model.onnx")
    return Exported(model=model.eval(), weights=quantized_weights(model, opt), path=path, inputs=inputs)


def constant(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor)
    changed = np.ascontiguousarray(change(values.copy())).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


def scaled(name: str, factor: float) -> Change:
    return lambda model: constant(model, name, lambda values: values * factor)


def unscaled(name: str) -> Change:
    return lambda model: constant(model, name, np.ones_like)


def not_a_number(name: str) -> Change:
    return lambda model: constant(model, name, lambda values: values * np.nan)


def one_code(name: str, index: int, bit: int) -> Change:
    def flip(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[index] ^= 1 << bit
        return values

    return lambda model: constant(model, name, flip)


def one_ulp(name: str) -> Change:
    return lambda model: constant(model, name, lambda values: np.nextafter(values, np.float32(1)))


def product(layer: str, **attributes: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.name.startswith(f"{layer}/MatMulNBits"))
        for attribute in node.attribute:
            attribute.i = attributes.get(attribute.name, attribute.i)

    return change


def described(change: Callable[[dict[str, Any]], None]) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        description = json.loads(model.metadata_props[0].value)
        change(description)
        helper.set_model_props(model, {"blaq": json.dumps(description)})

    return apply


def tampered(exported: Exported, folder: Path, change: Change) -> OnnxSession:
    model = onnx.load(exported.path)
    change(model)
    path = folder / "tampered.onnx"
    path.write_bytes(model.SerializeToString())
    return OnnxSession(path, threads=1)


def test_an_untouched_file_passes(exported: Exported, tmp_path: Path) -> None:
    session = tampered(exported, tmp_path, lambda model: None)
    verify_weights(session, exported.weights)
    assert verify_outputs(session, exported.model, exported.weights, [(exported.inputs,)]) < 1e-5
    layers = session.layers(exported.inputs.numpy())
    assert list(layers) == ["conv.weight", "fc1.weight", "fc2.weight"]
    with torch.no_grad():
        np.testing.assert_allclose(layers["conv.weight"], exported.model.conv(exported.inputs), atol=1e-5)
        np.testing.assert_allclose(layers["fc2.weight"], exported.model(exported.inputs), atol=1e-5)


@pytest.mark.parametrize("layer", ["conv.weight", "fc1.weight", "fc2.weight"])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: scaled(f"{name}.scale", 1.001),
        lambda name: one_ulp(f"{name}.scale"),
        lambda name: unscaled(f"{name}.scale"),
        lambda name: not_a_number(f"{name}.scale"),
        lambda name: one_code(f"{name}.codes", 3, 1),
    ],
    ids=["scale", "one ulp of the scale", "no scale", "nan", "one code"],
)
def test_a_changed_weight_is_found_and_named(exported: Exported, layer: str, change: Any, tmp_path: Path) -> None:
    session = tampered(exported, tmp_path, change(layer))
    with pytest.raises(
        VerificationError, match=f"'{layer}' is not scale times level in the runtime: .* differ, the first"
    ):
        verify_weights(session, exported.weights)


def test_one_wrong_weight_is_counted(exported: Exported, tmp_path: Path) -> None:
    session = tampered(exported, tmp_path, one_code("fc1.weight.codes", 0, 0))
    with pytest.raises(VerificationError, match=r"1 of 2112 weights differ, the first at \[0, 0\]: "):
        verify_weights(session, exported.weights)


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (scaled("conv.bias", 1.01), "conv.weight"),
        (scaled("fc1.bias", 1.1), "fc1.weight"),
        (not_a_number("fc1.bias"), "fc1.weight"),
        (scaled("fc2.bias", 1.01), "fc2.weight"),
        (product("fc1.weight", accuracy_level=4), "fc1.weight"),
    ],
    ids=["convolution", "first bias", "nan", "second bias", "8-bit activations in an exact file"],
)
def test_wrong_outputs_are_found_and_the_first_layer_named(
    exported: Exported, change: Change, layer: str, tmp_path: Path
) -> None:
    session = tampered(exported, tmp_path, change)
    verify_weights(session, exported.weights)  # which are right
    message = rf"verify \(exact\): .* allowed 1e-05; the first layer that differs is '{layer}'"
    with pytest.raises(VerificationError, match=message):
        verify_outputs(session, exported.model, exported.weights, [(exported.inputs,)])


def test_one_wrong_example_among_many_batches_is_found(exported: Exported, tmp_path: Path) -> None:
    """In whichever batch, and NaN is not lost among numbers."""
    session = tampered(exported, tmp_path, lambda model: None)
    batches = [(torch.randn(2, 1, 6, 6),) for _ in range(4)]
    right = session.outputs
    for position in range(4):
        for value in (np.nan, 1.0):
            calls = iter(range(4))

            def wrong(*inputs: Any, calls: Any = calls, value: float = value, position: int = position) -> Any:
                outputs = right(*inputs)
                outputs[0][1, 7] += value if next(calls) == position else 0
                return outputs

            session.outputs = wrong  # type: ignore[method-assign]
            with pytest.raises(VerificationError, match="no quantized layer differs by itself"):
                verify_outputs(session, exported.model, exported.weights, batches)


def test_the_layer_is_looked_for_in_the_worst_batch(exported: Exported, tmp_path: Path) -> None:
    session = tampered(exported, tmp_path, lambda model: None)
    batches = [torch.full((2, 1, 6, 6), float(i)) for i in range(3)]
    errors = {0.0: 0.5, 1.0: np.nan, 2.0: 2.0}
    right, searched = session.outputs, []
    session.outputs = lambda x: [right(x)[0] + np.float32(errors[x.max()])]  # type: ignore
    session.layers = lambda x: searched.append(x.max()) or {}  # type: ignore
    with pytest.raises(VerificationError, match="relative difference nan"):
        verify_outputs(session, exported.model, exported.weights, [(x,) for x in batches])
    assert searched == [1.0]


def test_weights_that_are_missing_or_too_many_are_named(exported: Exported, tmp_path: Path) -> None:
    session = tampered(exported, tmp_path, described(lambda entry: entry["weights"].pop("fc1.weight")))
    with pytest.raises(VerificationError, match=r"do not have the same quantized weights: 'fc1.weight'"):
        verify_weights(session, exported.weights)
    with pytest.raises(VerificationError, match=r"do not have the same quantized weights: 'fc1.weight', 'fc2.weight'"):
        verify_weights(session, [weight for weight in exported.weights if weight.name != "fc2.weight"])


def test_outputs_of_another_shape_or_number(exported: Exported) -> None:
    session = open_session(exported.path, threads=1)
    with pytest.raises(
        VerificationError, match=r"outputs of shape \[\(6, 10\)\] in the runtime, \[\(6, 33\)\] in torch"
    ):
        verify_outputs(session, exported.model[:3], exported.weights[:2], [(exported.inputs,)])


def test_a_diverged_model_is_told_from_a_wrong_runtime(exported: Exported) -> None:
    session = open_session(exported.path, threads=1)
    with pytest.raises(VerificationError, match="torch's own outputs are NaN"):
        verify_outputs(session, exported.model, exported.weights, [(exported.inputs * np.nan,)])


class Answers:
    """A session that answers what it is told."""

    def __init__(self, preset: str, outputs: np.ndarray) -> None:
        self.preset, self.description, self._outputs = preset, {"preset": preset, "weights": {}}, outputs
        self.batch = len(outputs)

    def outputs(self, *inputs: Any) -> list[np.ndarray]:
        return [self._outputs]

    def weights(self) -> dict[str, Any]:
        return {}

    def layers(self, *inputs: Any) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("examples", "wrong", "passes"),
    [(1000, 2, True), (1000, 3, False), (100, 1, True), (100, 2, False), (1000, 0, True)],
)
def test_accuracy(examples: int, wrong: int, passes: bool) -> None:
    """0.2 points, or one example of few: outputs may be near enough and answers not."""
    scores = torch.zeros(examples, 2)
    scores[:, 0] = 0.001
    scores[-1, 1] = 1
    answers = scores.numpy().copy()
    answers[:wrong, 1] += 0.002
    session: Any = Answers("fast", answers)
    batches: Any = [(scores, torch.cat([torch.zeros(examples - 1), torch.ones(1)]).long())]
    if passes:
        found = verify_session(session, nn.Identity(), [], batches)
        assert (found.error, found.torch_error, found.examples) == (pytest.approx(100 * wrong / examples), 0, examples)
        assert found.difference == pytest.approx(0.002 if wrong else 0)
    else:
        with pytest.raises(VerificationError, match=r"% wrong in the runtime, 0.00 % in torch.* preset 'exact'"):
            verify_session(session, nn.Identity(), [], batches)


def test_an_example_alone_is_compared_where_a_file_takes_it() -> None:
    """Runtimes have other kernels for few rows, and the batches of a run are large."""
    session: Any = Answers("exact", np.eye(4, dtype=np.float32))
    session.outputs = lambda x: [x if len(x) > 1 else x + 1]
    batches: Any = [(torch.eye(4), torch.arange(4))]
    assert verify_session(session, nn.Identity(), [], batches).examples == 4
    session.batch = None
    with pytest.raises(VerificationError, match=r"relative difference 1\.0e\+00"):
        verify_session(session, nn.Identity(), [], batches)


@pytest.mark.parametrize(
    ("seen", "expected", "message"),
    [
        ([1.0, -np.inf], [1.0, -np.inf], None),
        ([-np.inf, -np.inf], [-np.inf, -np.inf], None),
        ([1.5, -np.inf], [1.0, -np.inf], "relative difference 5.0e-01"),
        ([1.0, np.inf], [1.0, -np.inf], "relative difference inf"),
        ([1.0, 2.0], [1.0, -np.inf], "relative difference inf"),
        ([1.0, -np.inf], [1.0, 2.0], "relative difference inf"),
        ([1.0, np.nan], [1.0, -np.inf], "relative difference nan"),
        ([1.0, np.nan], [1.0, np.nan], "torch's own outputs are NaN"),
    ],
)
def test_infinite_outputs_are_compared(seen: list[float], expected: list[float], message: str | None) -> None:
    """As of what a mask leaves out."""
    session: Any = Answers("exact", np.array([seen], np.float32))
    batches = [(torch.tensor([expected]),)]
    if message is None:
        assert verify_outputs(session, nn.Identity(), [], batches) == 0
    else:
        with pytest.raises(VerificationError, match=re.escape(message)):
            verify_outputs(session, nn.Identity(), [], batches)


@pytest.mark.parametrize(("preset", "passes"), [("fast", True), ("exact", False)])
def test_tolerance_of_the_preset(preset: str, passes: bool) -> None:
    expected = torch.tensor([[1.0, -2.0]])
    session: Any = Answers(preset, expected.numpy() + np.float32(0.03))
    if passes:
        assert verify_outputs(session, nn.Identity(), [], [(expected,)]) == pytest.approx(0.015, rel=1e-3)
    else:
        with pytest.raises(VerificationError):
            verify_outputs(session, nn.Identity(), [], [(expected,)])
    with pytest.raises(VerificationError):
        verify_outputs(Answers(preset, expected.numpy() + np.float32(0.05)), nn.Identity(), [], [(expected,)])  # type: ignore[arg-type]


def test_a_runtime_that_disagrees_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    path = tmp_path / "model.onnx"
    weights = OnnxSession.weights
    monkeypatch.setattr(OnnxSession, "weights", lambda self: {k: v / 2 for k, v in weights(self).items()})
    with pytest.raises(VerificationError, match=r"'0.weight' is not scale times level in the runtime"):
        export_onnx(model, opt, torch.randn(4, 8), path)
    assert list(tmp_path.iterdir()) == []

    path.write_bytes(b"an earlier file")
    monkeypatch.setattr(OnnxSession, "weights", weights)
    monkeypatch.setattr(OnnxSession, "outputs", lambda self, x: [np.full((len(x), 2), np.nan, np.float32)])
    with pytest.raises(VerificationError, match="relative difference nan"):
        export_onnx(model, opt, torch.randn(4, 8), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"an earlier file"


RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=40),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(method="laq", bits=2, lr=0.01),
    train=TrainConfig(epochs=2, threads=1),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same recipe with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        train(RECIPE.with_([f"train.seed={seed}"]), folder / str(seed), progress=False)
    return [folder / "0", folder / "1"]


def test_a_run_and_its_onnx_file(runs: list[Path], tmp_path: Path) -> None:
    found = []
    path = export_run(runs[0], tmp_path / "model.onnx", "last", "fast", report=found.append)
    assert found[0].examples == 100
    assert verify_file(path, runs[0], checkpoint="last") == found[0]
    tested = verify_file(path, runs[0], checkpoint="last", split="test")
    assert tested.examples == 200
    assert tested.torch_error == pytest.approx(evaluate(runs[0], checkpoint="last", split="test").error)
    assert open_session(path).description["recipe"]["optim"]["bits"] == 2
    with pytest.raises(VerificationError, match=r"'fc1.weight' is not scale times level"):
        verify_file(path, runs[1], checkpoint="last")
    with pytest.raises(
        ValueError, match=r"expected what `blaq export` wrote: a file of type .onnx, .xml or .safetensors"
    ):
        verify_file(tmp_path / "model.pt", runs[0])


def test_a_run_and_its_packed_file(runs: list[Path], tmp_path: Path) -> None:
    path = packed.export_run(runs[0], tmp_path / "model.safetensors")
    assert verify_file(path, runs[0]).difference == 0
    with pytest.raises(VerificationError, match=r"'fc1.weight' is not scale times level"):
        verify_file(path, runs[1])

    model, weights, _ = weights_of_run(runs[0])
    state = model.state_dict()
    session = PackedSession(path, model)
    state["bn1.bias"] += 1
    model.load_state_dict(state)
    with pytest.raises(VerificationError, match=r"the first layer that differs is 'fc2.weight'"):
        verify_outputs(session, model, weights, [(torch.randn(3, 64),)])


def test_a_run_and_its_folder_for_compressed_tensors(runs: list[Path], tmp_path: Path) -> None:
    folder = compressed.export_run(runs[0], tmp_path / "out")
    found = verify_file(folder, runs[0], split="test")
    assert (found.difference, found.weights) == (0, len(weights_of_run(runs[0])[1]))
    assert found.error == evaluate(runs[0]).error
    with pytest.raises(VerificationError, match=r"'fc1.weight' is not scale times level"):
        verify_file(folder, runs[1])

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "bn1.bias": tensors["bn1.bias"] + 1}, folder / "model.safetensors")
    with pytest.raises(VerificationError, match=r"the first layer that differs is 'fc2.weight'"):
        verify_file(folder, runs[0])
    save_file({**tensors, "bn1.bias": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"out': 'bn1.bias' has shape \(3,\) in the file"):
        verify_file(folder, runs[0])
    for damage in (
        lambda: save_file({k: v for k, v in tensors.items() if k != "fc1.weight_scale"}, folder / "model.safetensors"),
        lambda: (folder / "model.safetensors").write_bytes(b"cut"),
        lambda: (folder / "config.json").write_text("{}"),
        lambda: (folder / "config.json").unlink(),
    ):
        damage()
        with pytest.raises(ValueError, match=r"out': no folder that compressed-tensors reads: "):
            verify_file(folder, runs[0])


def test_of_a_convolution_written_in_full_too_every_bit_counts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    with pytest.warns(UserWarning, match="written in full: 0.weight"):
        compressed.save_compressed(model, opt, tmp_path / "out")
    weights, names = quantized_weights(model, opt), ["0.weight", "2.weight"]
    verify_weights(CompressedSession(tmp_path / "out", model, names), weights)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["0.weight"][3, 0, 1, 2] *= 1.5
    tensors["0.weight"][3, 0, 1, 2] += 0.5
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(
        VerificationError, match=r"'0.weight' is not scale .* 1 of 36 weights differ, the first at \[3, 0, 1, 2\]"
    ):
        verify_weights(CompressedSession(tmp_path / "out", model, names), weights)
