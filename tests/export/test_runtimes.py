"""Sessions: what they refuse, and what a user's own session of the same file computes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import blaq
from blaq.export.onnx import export_onnx
from blaq.export.runtimes import open_session


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, dict[str, Path]]:
    """A network exported with both presets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 65), nn.ReLU(), nn.Linear(65, 10))
    opt = blaq.LAQ(blaq.param_groups(model, 2, "channel"))
    x = torch.randn(40, 300)
    folder = tmp_path_factory.mktemp("files")
    return model, x, {p: export_onnx(model, opt, x, folder / f"{p}.onnx", p) for p in ("exact", "fast")}  # type: ignore[arg-type]


def options(**entries: str) -> Any:
    found = onnxruntime.SessionOptions()
    for key, value in entries.items():
        found.add_session_config_entry(key.replace("__", "."), value)
    return found


@pytest.mark.parametrize("entries", [{}, {"session__qdq_matmulnbits_accuracy_level": "4"}, {"mlas__use_lut_gemm": "1"}])
def test_an_exact_file_is_exact_in_any_session(files: Any, entries: dict[str, str]) -> None:
    model, x, paths = files
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ):
        chosen = options(**entries)
        chosen.graph_optimization_level = level
        session = onnxruntime.InferenceSession(str(paths["exact"]), chosen, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = model(x).numpy()
        y = session.run(None, {"input": x.numpy()})[0]
        assert np.abs(y - expected).max() / np.abs(expected).max() < 1e-6


def test_fast_rounds_activations_and_exact_does_not(files: Any) -> None:
    model, x, paths = files
    with torch.no_grad():
        expected = model(x).numpy()
    far = {
        p: np.abs(open_session(path).run(x.numpy()) - expected).max() / np.abs(expected).max()
        for p, path in paths.items()
    }
    assert far["exact"] < 1e-6
    assert 1e-4 < far["fast"] < 2e-2


def test_description(files: Any) -> None:
    _, _, paths = files
    session = open_session(paths["fast"], threads=1)
    assert session.preset == "fast"
    expected = {"format_version": 1, "format": "onnx", "preset": "fast", "recipe": None}
    assert expected.items() <= session.description.items()
    entry = session.description["weights"]["0.weight"]
    assert (entry["grid"], entry["granularity"], entry["shape"]) == ("ternary", "channel", [65, 300])
    assert (entry["container"], entry["transposed"]) == ("matmulnbits2", False)
    described = onnxruntime.InferenceSession(str(paths["fast"]), providers=["CPUExecutionProvider"]).get_modelmeta()
    assert '"preset": "fast"' in described.custom_metadata_map["blaq"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def foreign_model() -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "foreign", values[:1], values[1:])
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return content


def test_what_is_refused(files: Any, tmp_path: Path) -> None:
    _, _, paths = files
    with pytest.raises(ValueError, match=r"expected a file of type .onnx \(ONNX Runtime\) or .xml \(OpenVINO\)"):
        open_session(tmp_path / "model.tflite")
    with pytest.raises(ValueError, match=r"model.onnx'\): there is no such file"):
        open_session(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="expected a file that `blaq export` wrote; it has no description"):
        open_session(write(tmp_path / "foreign.onnx", foreign_model()))
    for content in (b"", b"no protobuf", paths["exact"].read_bytes()[:1000]):
        with pytest.raises(ValueError, match=r"broken.onnx'\): (ONNX Runtime refuses the file|expected a file that)"):
            open_session(write(tmp_path / "broken.onnx", content))
    model = onnx.load(paths["exact"])
    helper.set_model_props(model, {"blaq": "{not json"})
    with pytest.raises(ValueError, match="it has no description"):
        open_session(write(tmp_path / "json.onnx", model.SerializeToString()))


def test_inputs_that_do_not_fit(files: Any) -> None:
    _, _, paths = files
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run the file on inputs of shape \(2, 7\): "):
        open_session(paths["exact"]).run(np.zeros((2, 7), np.float32))
