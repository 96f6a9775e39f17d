"""The benchmarks run, on little: for correctness, not for time."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = benchmark("step")
    step.main(["--weights", "8192", "--threads", "1", "--pairs", "3", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "step.json").read_text())
    assert [table["peer"] for table in report["tables"]] == ["fused", "foreach"]
    rows = report["tables"][0]["rows"]
    assert [row["grid"] for row in rows] == [case.grid for case in step.CASES]
    assert all(low <= row["ratio"] <= high and low > 0 for row in rows for low, high in [row["range"]])
    text = (tmp_path / "step.md").read_text()
    assert text.count("| ternary |") == [case.grid for case in step.CASES].count("ternary") + 1  # and ResNet-56
    assert "ResNet-56" in capsys.readouterr().out


SMALL = ["--set", "data.batch_size=4", "--blocks", "2", "--steps", "2", "--every", "2", "--solvers", "exact"]


def test_the_table_of_whole_steps_keeps_other_recipes(tmp_path: Path) -> None:
    epoch = benchmark("epoch")
    epoch.main(
        ["mnist-lenet5", *SMALL, "--bits", "1", "2", "--methods", "float", "laq", "blaq", "--out", str(tmp_path)]
    )
    lstm = ["--set", "data.sequence=5", "--set", "model.options.hidden=8", "--name", "text"]
    epoch.main(["war-and-peace-lstm-quick", *SMALL, *lstm, "--bits", "1", "--methods", "past", "--out", str(tmp_path)])
    recipes = json.loads((tmp_path / "epoch.json").read_text())["recipes"]
    assert list(recipes) == ["mnist-lenet5", "text"]
    rows = recipes["mnist-lenet5"]["rows"]
    assert [(row["method"], row["bits"], row["solver"]) for row in rows] == [
        ("float", "32", "-"), ("laq", "1", "exact"), ("laq", "2", "exact"), ("blaq", "1", "exact"), ("blaq", "2", "exact"),
    ]  # fmt: skip
    assert [row["target"] for row in rows] == [None, 1.05, 1.05, 2.05, 2.05]
    assert all(0 < row["range"][0] <= row["ratio"] <= row["range"][1] for row in rows)
    text = (tmp_path / "epoch.md").read_text()
    assert "## text: char_lstm, batch 4" in text
    table = [cells(line) for line in text.splitlines() if line.startswith("| laq") or line.startswith("| float")]
    assert [line[-1] for line in table] == ["missed" * epoch.missed(row) for row in rows if row["method"] != "blaq"]


def test_blaq_takes_two_gradients_in_every_timed_step_and_its_probe_is_read() -> None:
    epoch = benchmark("epoch")
    recipe = epoch.load_recipe("mnist-lenet5", ["data.batch_size=4", "optim.method=blaq"])
    training = epoch.Probed(recipe, "cpu", 2)
    training.run(4)
    assert training.opt.gradient_evaluations == 8
    assert training.zigzag.read()["total"].flip_rate is None  # the block has read it
    peer = epoch.AdamW(recipe, "cpu")
    assert peer.opt.defaults["fused"] and peer.inputs.shape == (4, 1, 28, 28)


def test_a_miss_is_what_lies_above_its_target() -> None:
    epoch, probes = benchmark("epoch"), benchmark("probes")
    row: dict[str, Any] = {
        "method": "laq",
        "bits": "1",
        "solver": "exact",
        "milliseconds": 5.0,
        "adamw_milliseconds": 4.0,
    }
    row |= {"range": [1.0, 1.2], "target": 1.05}
    assert [cells(epoch.line(row | {"ratio": ratio}))[-1] for ratio in (1.05, 1.06)] == ["", "missed"]
    assert [probes.missed({"percent": percent, "target": 5.0}) for percent in (5.0, 5.1)] == [False, True]
    assert not probes.missed({"percent": 20.0, "target": None})


def test_the_table_of_probes(tmp_path: Path) -> None:
    probes = benchmark("probes")
    probes.main([
        "--blocks", "2", "--steps", "10", "--batch", "4", "--bits", "binary", "--methods", "laq", "--out", str(tmp_path),
    ])  # fmt: skip
    report = json.loads((tmp_path / "probes.json").read_text())
    assert [(row["every"], row["target"]) for row in report["probes"]] == [(1, None), (10, 5.0)]
    lines = [cells(line) for line in (tmp_path / "probes.md").read_text().splitlines() if line.startswith("| laq")]
    assert [line[-2:] for line in lines] == [["", ""], ["5", "missed" * probes.missed(report["probes"][1])]]
    assert "--methods laq" in report["command"]


def test_the_memory_of_training(tmp_path: Path) -> None:
    memory = benchmark("memory")
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
    data = benchmark("data")
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
    picture = benchmark("step_figure")
    report = json.loads((FOLDER.parent / "docs" / "results" / "step.json").read_text())
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
