"""The benchmarks run, on little: for correctness, not for time."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import data
import deploy
import epoch
import export_table
import memory
import probes
import pytest
import recording
import solvers
import step
import step_figure
import torch
import whole_epoch

from blaq.export import bench
from blaq.optim import compiled
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import evaluate, load_data, train

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(method="laq", bits=2, lr=0.01),
    train=TrainConfig(epochs=1, threads=1),
)

FOLDER = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds a pass, and is no part of what is asked here."""
    monkeypatch.setattr(compiled, "COMPILED_FROM", 2**30)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["--weights", "8192", "--foreach", "8192", "--threads", "1", "--pairs", "3", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "step.json").read_text())
    tables = [(table["weights"], table["peer"]) for table in report["tables"]]
    assert tables == [(8192, "fused"), (8192, "foreach"), ("ResNet-56", "foreach")]
    over_foreach = {(row["grid"], row["solver"], row["target"]) for row in report["tables"][1]["rows"]}
    solvers = ("alternating", "exact")
    assert over_foreach == {(grid, solver, None) for grid in ("binary", *step.GRIDS) for solver in solvers}
    rows = report["tables"][0]["rows"]
    assert [row["grid"] for row in rows] == [case.grid for case in step.CASES]
    relative = [row["granularity"] != "tensor" or row["trial"] != "none" for row in rows]
    assert ["laq" in row for row in rows] == relative
    ratios = [row[peer] for row in rows for peer in ("adamw", "laq") if peer in row]
    assert all(0 < low <= of["ratio"] <= high for of in ratios for low, high in [of["range"]])
    text = (tmp_path / "step.md").read_text()
    # Every case over fused, both solvers over foreach, and ResNet-56.
    assert text.count("| ternary |") == [case.grid for case in step.CASES].count("ternary") + 2 + 1
    assert "ResNet-56" in capsys.readouterr().out


SMALL = ["--set", "data.batch_size=4", "--blocks", "2", "--steps", "2", "--every", "2", "--solvers", "exact"]


def test_the_table_of_whole_steps_keeps_other_recipes(tmp_path: Path) -> None:
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
    recipe = epoch.load_recipe("mnist-lenet5", ["data.batch_size=4", "optim.method=blaq"])
    training = epoch.Probed(recipe, "cpu", 2)
    training.run(4)
    assert training.opt.gradient_evaluations == 8
    assert training.zigzag.read()["total"].flip_rate is None  # the block has read it
    peer = epoch.AdamW(recipe, "cpu")
    assert peer.opt.defaults["fused"] and peer.inputs.shape == (4, 1, 28, 28)


def test_the_table_of_whole_epochs_keeps_other_recipes(tmp_path: Path) -> None:
    short = ["--set", "data.train=120", "--set", "data.validation=40", "--every", "2", "--pairs", "2"]
    whole_epoch.main(["demo", *short, "--bits", "1", "2", "--out", str(tmp_path)])
    path = tmp_path / "whole-epoch.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({"recipes": {"another": report["recipes"]["demo"]}}))
    whole_epoch.main(["demo", *short, "--bits", "1", "--methods", "laq", "--out", str(tmp_path)])
    recipes = json.loads(path.read_text())["recipes"]
    assert list(recipes) == ["another", "demo"]
    rows = recipes["another"]["rows"]
    assert [(row["method"], row["bits"]) for row in rows] == [(m, b) for m in ("laq", "past", "blaq") for b in "12"]
    assert [row["target"] for row in rows] == [1.05] * 4 + [2.05] * 2
    assert all(0 < row["range"][0] <= row["ratio"] <= row["range"][1] for row in rows)
    assert "2 pairs of epochs of 120 examples, 40 to validate" in (tmp_path / "whole-epoch.md").read_text()


def test_whole_epochs_are_those_of_training() -> None:
    """Of blaq with a trial in every step, and of torch's AdamW as in a loop without Lightning; they go on where they were."""
    recipe = epoch.load_recipe("demo", ["data.train=120", "data.validation=40", "optim.method=blaq"])
    dataset = load_data(recipe.data)
    peer, ours = whole_epoch.AdamW(recipe, dataset), whole_epoch.Probed(recipe, dataset, 2)
    bare = whole_epoch.AdamW(recipe, dataset)
    with whole_epoch._settings(1):
        for _ in range(2):
            assert whole_epoch.epoch_of(peer) > 0 and whole_epoch.epoch_of(ours) > 0
            bare.training_batches.set_epoch(0)
            for inputs, targets in bare.training_batches:
                bare.plain.zero_grad()
                bare.loss(bare.model(inputs), targets).backward()
                bare.plain.step()
    assert all(torch.equal(p, q) for p, q in zip(peer.parameters(), bare.parameters(), strict=True))
    steps = 2 * len(ours.training_batches)
    assert (ours.optimizer.param_groups[0]["steps"], ours.optimizer.gradient_evaluations) == (steps, 2 * steps)
    assert ours.zigzag.read()["total"].flip_rate is None  # the epoch has read it
    assert peer.evaluation_tally.examples == ours.evaluation_tally.examples == 40


def test_a_miss_is_what_lies_above_its_target() -> None:
    row: dict[str, Any] = {
        "method": "laq",
        "bits": "1",
        "solver": "exact",
        "milliseconds": 5.0,
        "adamw_milliseconds": 4.0,
    }
    row |= {"range": [1.0, 1.2], "target": 1.05}
    assert [epoch.cells(row | {"ratio": ratio})[-1] for ratio in (1.05, 1.06)] == ["", "missed"]
    assert [probes.missed({"percent": percent, "target": 5.0}) for percent in (5.0, 5.1)] == [False, True]
    assert not probes.missed({"percent": 20.0, "target": None})


def test_the_table_of_probes(tmp_path: Path) -> None:
    probes.main([
        "--blocks", "2", "--steps", "10", "--batch", "4", "--bits", "binary", "--methods", "laq", "--out", str(tmp_path),
    ])  # fmt: skip
    report = json.loads((tmp_path / "probes.json").read_text())
    assert [(row["every"], row["target"]) for row in report["probes"]] == [(1, None), (10, 5.0)]
    lines = [cells(line) for line in (tmp_path / "probes.md").read_text().splitlines() if line.startswith("| laq")]
    assert [line[-2:] for line in lines] == [["", ""], ["5", "missed" * probes.missed(report["probes"][1])]]
    assert "--methods laq" in report["command"]


def test_the_memory_of_training(tmp_path: Path) -> None:
    chosen = ["adamw", "fresh-ternary-alternating-plain"]
    memory.main(["--weights", "4194304", "--cases", *chosen, "--out", str(tmp_path)])
    adamw, fresh = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert (adamw["weights"], fresh["weights"]) == (2**22, 2**22)
    # Two moments; and with a latent weight, a scale and a counter. What lies around in 16 MB tensors is not exact to the byte.
    assert (adamw["told"]["state"], fresh["told"]["state"]) == (8 * 2**22, 12 * 2**22 + 8)
    for row in (adamw, fresh):
        for kind in ("allocated", "resident"):
            assert abs(row["measured"]["state"][kind] - row["told"]["state"]) < 2**22
            assert row["measured"]["steps"][kind] > row["told"]["held"] - 2**22
        assert row["measured"]["steps"]["allocated"] < row["measured"]["steps"]["resident"] + 2**22
    assert "| fresh | ternary | alternating | no |" in (tmp_path / "memory.md").read_text()


def test_the_start_of_a_run(tmp_path: Path) -> None:
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
    report = json.loads((FOLDER / "docs" / "results" / "step.json").read_text())
    tables = [table for table in report["tables"] if table["peer"] == "fused"]
    targets, *measured = step_figure.figure(report).data
    for table, trace in zip(tables, measured, strict=True):
        ratios = [row["adamw"] for row in table["rows"]]
        assert list(trace.x) == [of["ratio"] for of in ratios]
        aims = {(name, row["target"]) for name, row in zip(trace.y, table["rows"], strict=True) if "laq" not in row}
        assert aims == set(zip(targets.y, targets.x, strict=True))
        ends = zip(trace.x, trace.error_x.arrayminus, trace.error_x.array, strict=True)
        assert [[round(x - low, 2), round(x + high, 2)] for x, low, high in ends] == [of["range"] for of in ratios]
    with pytest.raises(SystemExit, match="no table"):
        step_figure.figure({"tables": []})


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
    monkeypatch.setattr(bench, "resident_growth", lambda *_: 0)  # in processes of their own; not in these tables
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


def test_following_the_scale_against_solving_exactly(tmp_path: Path) -> None:
    quick = [word for setting in ("data.train=200", "train.epochs=2") for word in ("--set", setting)]
    solvers.main(["demo", *quick, "--grids", "ternary", "linear3", "--seeds", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "solvers.json").read_text())["rows"]
    assert [row["grid"] for row in rows] == ["ternary", "linear3"]
    # Three layers, two seeds, two epochs of four steps; nothing is better than the optimum, and the first step is it.
    assert [row["gaps"] for row in rows] == [3 * 2 * 8] * 2
    assert all(-1e-6 < row["gap_median"] <= row["gap_95"] <= row["gap_largest"] for row in rows)
    text = (tmp_path / "solvers.md").read_text()
    assert "| linear3 |" in text and "--set train.epochs=2" in text
