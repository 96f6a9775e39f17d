"""``blaq bench``: the float32 model it compares with, the arithmetic of its numbers, its words. Nothing here is timed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import blaq
from blaq.cli import app
from blaq.export import bench as module
from blaq.export.bench import bench, interleaved, random_inputs, resident_growth
from blaq.export.files import bytes_of
from blaq.export.float_twin import Input, inputs_of, write_float32
from blaq.export.runtimes import open_session
from blaq.tasks.models import build_model


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(19, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 10)).eval()


def write(model: nn.Module, x: Tensor, path: Path, bits: str = "ternary", preset: Any = "exact") -> Path:
    opt = blaq.LAQ(blaq.param_groups(model, bits=bits, granularity="channel"))
    export = blaq.export_onnx if path.suffix == ".onnx" else blaq.export_openvino
    return export(model, opt, x, path, preset=preset)


@pytest.fixture(params=[".onnx", ".xml"])
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the float32 model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_the_twin_is_the_model_in_float32(suffix: str, preset: str, tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(6, 19)
    path = write(model, x, tmp_path / f"model{suffix}", preset=preset)
    twin = write_float32(open_session(path), path, tmp_path)
    session = open_session(twin)
    assert session.preset == "exact"
    assert session.weights() == {}
    expected = model(x).detach().numpy()
    assert np.abs(session.run(x.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()
    floats = 4 * sum(p.numel() for p in model.parameters())
    if suffix == ".onnx":
        graph = onnx.load(twin).graph
        assert {tensor.data_type for tensor in graph.initializer} == {onnx.TensorProto.FLOAT}
        assert {node.op_type for node in graph.node} <= {
            "MatMul",
            "Add",
            "BatchNormalization",
            "Relu",
            "Gemm",
            "Identity",
        }
        assert floats < twin.stat().st_size < floats + 3000
    else:
        kinds = {node.get_type_name() for node in ov.Core().read_model(twin).get_ordered_ops()}
        assert not kinds & {"PRelu", "Pad", "Subtract"}
        assert floats <= twin.with_suffix(".bin").stat().st_size < floats + 600


class Transition(nn.Module):
    """Two matrices that are called T: one is multiplied with as it is, of the other its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.turned = nn.Module(), nn.Module()
        self.plain.T, self.turned.T = (nn.Parameter(torch.randn(32, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x @ self.plain.T, self.turned.T)


def test_the_twin_of_a_matrix_with_a_name_like_a_transpose(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Transition().eval(), torch.randn(3, 32), tmp_path / f"model{suffix}"
    opt = blaq.LAQ(blaq.param_groups(model, 4, rules={"*.T": 4}))
    (blaq.export_onnx if suffix == ".onnx" else blaq.export_openvino)(model, opt, x, path)
    twin = write_float32(open_session(path), path, tmp_path)
    expected = model(x).detach().numpy()
    assert np.abs(open_session(twin).run(x.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["lenet5", "char_lstm"])
def test_the_twin_of_convolutions_and_lstms(suffix: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "lenet5":
        model, x = build_model("lenet5", image_size=12).eval(), torch.randn(3, 1, 12, 12)
    else:
        model, x = build_model("char_lstm", hidden=8, classes=20).eval(), torch.randint(20, (3, 5))
    path = write(model, x, tmp_path / f"model{suffix}", bits="linear4")
    packed = open_session(path)
    twin = write_float32(packed, path, tmp_path)
    expected = packed.run(x.numpy())
    assert np.abs(open_session(twin).run(x.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert name == "char_lstm" or bytes_of(twin) > 2 * bytes_of(path)


def test_inputs_are_those_of_the_file(suffix: str, tmp_path: Path) -> None:
    model = build_model("char_lstm", hidden=8, classes=20).eval()
    tokens = write(model, torch.randint(20, (3, 5)), tmp_path / f"tokens{suffix}")
    assert inputs_of(tokens) == [Input((None, None), np.dtype(np.int64))]
    images = write(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(2, 3, 2, 2), tmp_path / f"images{suffix}")
    assert inputs_of(images) == [Input((None, 3, 2, 2), np.dtype(np.float32))]


def test_random_inputs_have_the_batch_and_the_length() -> None:
    takes = [Input((None, 3, None), np.dtype(np.float32)), Input((None, None), np.dtype(np.int64))]
    x, tokens = random_inputs(takes, 5, sequence=7)
    assert (x.shape, x.dtype, tokens.shape, tokens.dtype) == ((5, 3, 7), np.float32, (5, 7), np.int64)
    assert 0.5 < x.std() < 1.5
    assert not tokens.any()


# --- the numbers --------------------------------------------------------------------------------------------------------------


def test_a_size_that_the_file_has_fixed_is_taken(suffix: str, tmp_path: Path) -> None:
    model, export = mlp(), blaq.export_onnx if suffix == ".onnx" else blaq.export_openvino
    opt, path = blaq.LAQ(blaq.param_groups(model, 2)), tmp_path / f"model{suffix}"
    export(model, opt, torch.randn(3, 19), path, dynamic_shapes=(None,))
    found = bench(path, rounds=1, memory=suffix == ".onnx")
    assert [timing.batch for timing in found.timings] == [3]


class Positions(nn.Module):
    """As many positions as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions, self.out = nn.Embedding(9, 8), nn.Embedding(16, 8), nn.Linear(8, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1])))
        return logits


def test_a_size_that_the_file_does_not_take_is_named(tmp_path: Path) -> None:
    path = write(Positions(), torch.randint(9, (2, 5)), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="does not take batches=1 with sequence=64; pass sizes that it takes"):
        bench(path, rounds=1, memory=False)
    assert bench(path, rounds=1, memory=False, sequence=16).timings


@pytest.mark.parametrize(("threads", "clock"), [(1, "process_time"), (2, "perf_counter")])
def test_interleaved_measures_each_function_by_the_right_clock(
    threads: int, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [0.0], []

    def function(name: str, seconds: float) -> Any:
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    other = "perf_counter" if clock == "process_time" else "process_time"
    monkeypatch.setattr(module.time, clock, lambda: now[0])
    monkeypatch.setattr(module.time, other, lambda: pytest.fail("the wrong clock"))
    ours, theirs = interleaved(function("a", 0.002), function("b", 0.05), 4, threads)
    assert ours == pytest.approx([0.002] * 4)
    assert theirs == pytest.approx([0.05] * 4)
    a, b = 11 * "a", 2 * "b"  # with the first call of a slice, which is not counted
    assert "".join(calls[12:]) == 4 * (a + b + b + a)  # after the warm-up


def test_the_numbers_follow_from_the_times(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(mlp(), torch.randn(2, 19), tmp_path / f"model{suffix}", preset="fast")
    monkeypatch.setattr(module, "interleaved", lambda *_: ([1e-3, 2e-3, 4e-3], [9e-3, 8e-3, 8e-3]))
    found = bench(path, rounds=3, batches=(1, 8), memory=False)
    assert [timing.batch for timing in found.timings] == [1, 8]
    timing = found.timings[1]
    assert timing.milliseconds == pytest.approx(2)
    assert timing.milliseconds_float32 == pytest.approx(8)
    assert timing.speedup == pytest.approx(4)
    assert timing.speedup_range == pytest.approx((2, 9))
    assert timing.examples_per_second == pytest.approx(4000)
    files = [path, path.with_suffix(".bin")] if suffix == ".xml" else [path]
    assert found.bytes == sum(len(file.read_bytes()) for file in files)
    assert found.bytes_float32 > 4 * 19 * 33
    assert (found.preset, found.threads, found.clock) == ("fast", 1, "CPU time of the process")
    assert found.resident is None


def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096, bias=False))
    path = write(model, torch.randn(2, 1024), tmp_path / "model.xml", bits="binary")
    twin = write_float32(open_session(path), path, tmp_path)
    packed, float32 = resident_growth(path, 1), resident_growth(twin, 1)
    assert packed is not None and float32 is not None
    assert float32 - packed > 0.8 * 4 * 1024 * 4096 - 2**21  # the runtime itself takes the same twice


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(mlp(), torch.randn(2, 19), tmp_path / "model.xml")
    monkeypatch.setattr(module, "resident_growth", lambda file, *_: 4_000_000 if file == path else 9_000_000)
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", str(path), "--rounds", "2", "--batches", "1,4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())
    assert [timing["batch"] for timing in numbers["timings"]] == [1, 4]
    assert numbers["resident"] == 4_000_000
    for words in (
        "batch 4",
        "4.0 MB",
        "9.0 MB",
        "x as fast",
        "x smaller",
        "preset exact, in OpenVINO",
        "median of 2 pairs",
    ):
        assert words in result.stdout
    assert f"{numbers['timings'][0]['speedup']:.2f} x as fast" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.safetensors"], "the file holds weights alone, no runtime computes from it"),
        (["compressed"], "the file holds weights alone, no runtime computes from it"),
        (["model.onnx"], "there is no such file"),
        (["model.pt"], "expected a file of type .onnx (ONNX Runtime) or .xml (OpenVINO)"),
        (["model.xml", "--batches", "1,x"], "expected numbers separated by commas"),
        (["model.xml", "--batches", "0"], "expected at least one, each 1 or more"),
        (["model.xml", "--out", "none/bench.json"], "there is no directory 'none'"),
        (["model.xml", "--out", "compressed"], "--out compressed: expected the name of a file, new or to be replaced"),
        (["model.xml", "--out", "pipe"], "--out pipe: expected the name of a file, new or to be replaced"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").touch()
    Path("compressed").mkdir()
    os.mkfifo("pipe")
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
