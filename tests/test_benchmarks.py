"""The benchmark of the step runs, on a few weights: for correctness, not for time."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "step.py"


def test_the_table_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_the_step", PATH)
    assert spec is not None and spec.loader is not None
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    step.main(["--weights", "8192", "--threads", "1", "--pairs", "3", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "step.json").read_text())
    assert [table["peer"] for table in report["tables"]] == ["fused", "foreach"]
    rows = report["tables"][0]["rows"]
    assert [row["grid"] for row in rows] == [case.grid for case in step.CASES]
    assert all(low <= row["ratio"] <= high and low > 0 for row in rows for low, high in [row["range"]])
    text = (tmp_path / "step.md").read_text()
    assert text.count("| ternary |") == [case.grid for case in step.CASES].count("ternary") + 1  # and ResNet-56
    assert "ResNet-56" in capsys.readouterr().out
