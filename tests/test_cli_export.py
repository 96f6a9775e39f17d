"""The commands export and verify: what they write and print, and with which exit code."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from blaq.cli import app
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import train

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(method="laq", bits=2, lr=0.01, rules={"fc2": "ternary2"}),
    train=TrainConfig(epochs=1, threads=1),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train(RECIPE, path, progress=False)
    return path


def blaq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_onnx_and_verify(run: Path) -> None:
    for preset, given in (("exact", ()), ("fast", ("--preset", "fast"))):
        written = blaq("export", run, "--format", "onnx", *given)
        assert written.exit_code == 0, written.output
        path = run / f"model-{preset}.onnx"
        assert f"Written to {path}: {path.stat().st_size:,} bytes" in written.stdout
        assert f"matmulnbits{4 if preset == 'exact' else 2}" in written.stdout
        assert "float32 at load: two scales" in written.stdout
        assert "Weights: 2 of 2 quantized weights equal bit for bit" in written.stdout
        assert f"Outputs ({preset}): relative difference" in written.stdout
        assert "100 predictions" in written.stdout

        verified = blaq("verify", path, "--against", run, "--split", "test")
        assert verified.exit_code == 0, verified.output
        assert "200 predictions" in verified.stdout
        assert verified.stdout.splitlines()[-1] == f"{path}: verified against {run}, best checkpoint, test data"


def test_export_packed_and_verify(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "here.safetensors"
    written = blaq("export", run, "--format", "packed", "--out", path, "--checkpoint", "last")
    assert written.exit_code == 0, written.output
    assert written.stdout.startswith(f"Written to {path}: {path.stat().st_size:,} bytes")
    verified = blaq("verify", path, "--against", run, "--checkpoint", "last")
    assert verified.exit_code == 0, verified.output
    assert "Outputs (exact): relative difference 0.0e+00 at most" in verified.stdout


def test_export_compressed_tensors_and_verify(tmp_path: Path) -> None:
    options = {"image_size": 8, "input_channels": 1, "channels": [2], "hidden": 9}
    network = ModelConfig(name="vgg", loss="squared_hinge", options=options)
    train(replace(RECIPE, model=network, optim=replace(RECIPE.optim, rules={})), tmp_path / "run", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        written = blaq("export", tmp_path / "run", "--format", "compressed-tensors")
    assert written.exit_code == 0, written.output
    assert written.stderr == (
        "warning: export --format compressed-tensors: the format packs weights of Linear and Embedding only; "
        "written in full: conv1.weight, conv2.weight.\n"
    )
    folder = tmp_path / "run" / "model-compressed-tensors"
    verified = blaq("verify", folder, "--against", tmp_path / "run")
    assert verified.exit_code == 0, verified.output
    assert verified.stdout.startswith("Weights: 5 of 5 quantized weights equal bit for bit\nOutputs (exact): relative")


def test_a_damaged_file_fails(run: Path, tmp_path: Path) -> None:
    import onnx

    blaq("export", run, "--format", "onnx")
    model = onnx.load(run / "model-exact.onnx")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "fc1.weight.scale")
    scale.raw_data = bytes([scale.raw_data[0] ^ 1]) + scale.raw_data[1:]
    onnx.save(model, tmp_path / "damaged.onnx")
    verified = blaq("verify", tmp_path / "damaged.onnx", "--against", run)
    assert verified.exit_code == 2
    assert verified.stdout == ""
    assert verified.stderr.startswith("verify: 'fc1.weight' is not scale times level in the runtime")
    assert len(verified.stderr.splitlines()) == 1


def test_refused(run: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (
            ("export", run, "--format", "packed", "--preset", "fast"),
            "--format packed holds weights alone; drop --preset.",
        ),
        (("export", tmp_path / "none", "--format", "onnx"), "holds no run"),
        (("export", run, "--format", "onnx", "--out", tmp_path / "m.pt"), "expected a name that ends in .onnx"),
        (("verify", tmp_path / "m.onnx", "--against", run), "there is no such file"),
        (("export", run), "--format"),
    ]:
        refused = blaq(*arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.output
