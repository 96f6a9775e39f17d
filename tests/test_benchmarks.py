"""The benchmarks run, on a few weights: for correctness, not for time."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_the_table_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = loaded("step")
    step.main(["--weights", "8192", "--threads", "1", "--pairs", "3", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "step.json").read_text())
    assert [table["peer"] for table in report["tables"]] == ["fused", "foreach"]
    rows = report["tables"][0]["rows"]
    assert [row["grid"] for row in rows] == [case.grid for case in step.CASES]
    assert all(low <= row["ratio"] <= high and low > 0 for row in rows for low, high in [row["range"]])
    text = (tmp_path / "step.md").read_text()
    assert text.count("| ternary |") == [case.grid for case in step.CASES].count("ternary") + 1  # and ResNet-56
    assert "ResNet-56" in capsys.readouterr().out


def test_the_memory_of_training(tmp_path: Path) -> None:
    memory = loaded("memory")
    chosen = ["adamw", "fresh-ternary-alternating-plain"]
    memory.main(["--weights", "4194304", "--cases", *chosen, "--out", str(tmp_path)])
    adamw, fresh = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert (adamw["weights"], fresh["weights"]) == (2**22, 2**22)
    # Two moments; and with a latent weight, a scale and a counter. What lies around in 16 MB tensors is not exact to the byte.
    assert (adamw["told"]["state"], fresh["told"]["state"]) == (8 * 2**22, 12 * 2**22 + 8)
    for row in (adamw, fresh):
        assert abs(row["measured"]["state"] - row["told"]["state"]) < 2**22
        assert row["measured"]["steps"] > row["told"]["held"] - 2**22
    assert "| fresh | ternary | alternating | no |" in (tmp_path / "memory.md").read_text()


def test_the_start_of_a_run(tmp_path: Path) -> None:
    data = loaded("data")
    data.STARTS = 1
    quick = [argument for setting in ("train=600", "batch_size=50") for argument in ("--set", f"data.{setting}")]
    data.main(["--sources", "digits", "--recipe", "demo", *quick, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "data.json").read_text())
    (row,) = report["starts"]
    for start in (row["first"], row["second"]):
        assert start["imports"] > 0 and abs(start["imports"] + start["data"] - start["all"]) < 0.02
    assert (report["loader"]["batch_size"], report["loader"]["batches"]) == (50, 12)
    assert "| digits |" in (tmp_path / "data.md").read_text()


def test_the_picture_of_the_steps() -> None:
    pytest.importorskip("plotly")
    picture = loaded("step_figure")
    report = json.loads((BENCHMARKS.parent / "docs" / "results" / "step.json").read_text())
    tables = [table for table in report["tables"] if table["peer"] == "fused"]
    targets, *measured = picture.figure(report).data
    for table, trace in zip(tables, measured, strict=True):
        assert list(trace.x) == [row["ratio"] for row in table["rows"]]
        assert [dict(zip(targets.y, targets.x, strict=True))[name] for name in trace.y] == [
            row["target"] for row in table["rows"]
        ]
        ends = zip(trace.x, trace.error_x.arrayminus, trace.error_x.array, strict=True)
        assert [[round(x - low, 2), round(x + high, 2)] for x, low, high in ends] == [
            row["range"] for row in table["rows"]
        ]
    with pytest.raises(SystemExit, match="no table"):
        picture.figure({"tables": []})
