"""The benchmarks run, on little: for correctness, not for time."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deploy
import export_table
import pytest
import recording
import step

from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import evaluate, train

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(method="laq", bits=2, lr=0.01),
    train=TrainConfig(epochs=1, threads=1),
)


def test_the_table_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["--weights", "8192", "--threads", "1", "--pairs", "3", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "step.json").read_text())
    assert [table["peer"] for table in report["tables"]] == ["fused", "foreach"]
    rows = report["tables"][0]["rows"]
    assert [row["grid"] for row in rows] == [case.grid for case in step.CASES]
    assert all(low <= row["ratio"] <= high and low > 0 for row in rows for low, high in [row["range"]])
    text = (tmp_path / "step.md").read_text()
    assert text.count("| ternary |") == [case.grid for case in step.CASES].count("ternary") + 1  # and ResNet-56
    assert "ResNet-56" in capsys.readouterr().out


def test_a_table() -> None:
    assert recording.table(["grid", ">ms", ""], [["ternary", "1.5", "missed"], ["binary", "1.0", ""]]) == [
        "| grid | ms | |",
        "|---|---:|---|",
        "| ternary | 1.5 | missed |",
        "| binary | 1.0 |  |",
    ]


def test_every_format_has_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torch, which none of these formats changes; and what a format cannot hold is told."""
    two_scales = replace(RECIPE, optim=replace(RECIPE.optim, rules={"fc2": "ternary2"}))
    for name, recipe in (("plain", RECIPE), ("refused", two_scales)):
        train(recipe, tmp_path / name, progress=False)
    formats = {key: export_table.FORMATS[key] for key in ("packed", "compressed-tensors", "onnx exact")}
    monkeypatch.setattr(export_table, "FORMATS", formats)
    runs = [str(tmp_path / name) for name in ("plain", "refused")]
    monkeypatch.setattr(sys, "argv", ["export_table.py", *runs, "--rounds", "1", "--out", str(tmp_path / "out")])
    export_table.main()

    plain, refused = json.loads((tmp_path / "out" / "export.json").read_text())["runs"]
    error = evaluate(tmp_path / "plain").error
    assert [(row["format"], row["error"], row["weights"]) for row in plain["formats"]] == [
        (name, error, 2) for name in formats
    ]
    assert "'fc2.weight' is ternary2" in refused["formats"][1]["refused"]
    lines = (tmp_path / "out" / "export.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 * (1 + len(formats))
    assert {row.count("|") for row in rows} == {8}
    assert [row.split(" | ")[4] for row in rows[1:4]] == [f"{error:.2f}"] * 3


def row(network: str, speed: float, grid: str = "binary", preset: str = "exact") -> dict[str, Any]:
    return {
        "network": network, "grid": grid, "preset": preset, "runtime": "ONNX Runtime",
        "timings": [{"speedup": 1.5}, {"speedup": speed}],
    }  # fmt: skip


def test_targets_are_about_the_perceptron_and_convolutions() -> None:
    """LeNet-5 with its linear layers packed is measured, but says nothing of convolutions."""
    assert deploy.targets([row("lenet5", 0.5)]) == []
    found = deploy.targets([row("lenet5-conv", 0.96), row("lenet5-conv", 0.94, "ternary"), row("resnet18", 0.95)])
    assert [(text.partition(",")[0], ok) for text, ok in found] == [
        ("LeNet-5", True),
        ("LeNet-5", False),
        ("ResNet-18", True),
    ]
    perceptron = [row("mlp", 1.6, grid, preset) for grid in ("binary", "ternary") for preset in ("fast", "exact")]
    assert [ok for _, ok in deploy.targets(perceptron)] == [False, False, True, True, False, False]
