"""Comparisons: the numbers of the table, and a closing line that claims no more than they say."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blaq.train.compare import Comparison, compare, rich_table
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import Result

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=1, threads=1),
)
VALUES: dict[str, Any] = {
    "recipe": "tiny", "bits": 1, "epochs": 1, "steps": 100, "gradient_evaluations": 100, "seconds": 2.0,
    "train_loss": 0.1, "train_error": 1.0, "validation_loss": 0.2, "validation_error": 2.0, "best_epoch": 1,
    "test_loss": 0.3, "test_error": 3.0, "test_loss_last": 0.3, "test_error_last": 3.0,
    "parameters": 1000, "bytes": 200, "float_bytes": 4000,
}  # fmt: skip


def results(method: str, errors: list[float], **values: Any) -> tuple[Result, ...]:
    return tuple(
        Result(**{**VALUES, "method": method, "seed": seed, "test_error": error, **values})
        for seed, error in enumerate(errors)
    )


def conclusion(*groups: tuple[Result, ...], recipe: Recipe = RECIPE) -> str:
    return Comparison(recipe, sum(groups, ()), {}).conclusion()


def test_a_difference_beyond_the_combined_standard_deviation_is_called_so() -> None:
    blaq = results("blaq", [2.0, 2.1, 2.2], gradient_evaluations=120)
    laq = results("laq", [2.5, 2.6, 2.7])
    noise = math.hypot(statistics.stdev([2.0, 2.1, 2.2]), statistics.stdev([2.5, 2.6, 2.7]))
    assert conclusion(laq, blaq) == (
        "Look at test error: blaq 2.10 % against laq 2.60 %, 0.50 lower: beyond seed noise (combined sd "
        f"{noise:.2f}, 3 seeds); blaq took 1.20 times the gradients of laq, and its packed weights are 20.0 times smaller "
        "than float32."
    )


def test_a_difference_within_it_is_not_called_more() -> None:
    line = conclusion(results("blaq", [2.0, 3.0]), results("laq", [2.4, 3.4]))
    assert "0.40 lower: within seed noise (combined sd 1.00, 2 seeds)" in line
    assert "0.40 higher: within seed noise" in conclusion(results("blaq", [2.4, 3.4]), results("laq", [2.0, 3.0]))
    assert "no difference: within seed noise" in conclusion(results("blaq", [2.0, 3.0]), results("laq", [3.0, 2.0]))


def test_one_seed_says_nothing_about_noise() -> None:
    line = conclusion(results("blaq", [1.0]), results("laq", [9.0]))
    assert "8.00 lower: a single seed cannot tell this from seed noise" in line
    assert "single seed" in conclusion(results("blaq", [1.0, 1.1]), results("laq", [9.0]))


def test_the_pair_is_the_one_that_was_run() -> None:
    assert "laq 2.00 % against float 1.00 %" in conclusion(results("float", [1.0]), results("laq", [2.0]))
    assert "one method alone" in conclusion(results("laq", [2.0, 2.1]))


def test_text_is_judged_by_its_cross_entropy() -> None:
    text = Recipe(
        name="text",
        title="characters",
        data=DataConfig(source="war_and_peace", sequence=100),
        model=ModelConfig(name="char_lstm"),
        optim=OptimConfig(),
        train=TrainConfig(epochs=1),
    )
    line = conclusion(results("blaq", [9.0], test_loss=1.3), results("laq", [1.0], test_loss=1.2875), recipe=text)
    assert line.startswith("Look at test loss: blaq 1.3000 nats against laq 1.2875 nats, 0.0125 higher")


def test_the_table_fits_80_columns() -> None:
    many = results("blaq", [12.25, 13.5, 14.0], gradient_evaluations=1_234_567, seconds=12345.6, bytes=123_456_789)
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_table(Comparison(RECIPE, many, {})))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in ("13.25 ± 0.90", "0.1000 ± 0.0000", "1,234,567", "12345.6", "123.5 MB", "(3 seeds)"):
        assert cell in text


def test_runs_are_written_and_tabulated(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    comparison = compare(RECIPE, ["float", "laq", "blaq"], [3, 4], tmp_path, console)
    assert not comparison.failures
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("float", "laq", "blaq") for s in "34"]
    assert {row["gradient_evaluations"] for row in rows if row["method"] == "blaq"} == {"12"}
    assert [row["bits"] for row in rows] == ["float", "float", "1", "1", "1", "1"]
    for row, saved in zip(rows, json.loads((tmp_path / "results.json").read_text()), strict=True):
        run = json.loads((tmp_path / f"{row['method']}-s{row['seed']}" / "result.json").read_text())
        assert saved == run
        assert row == {name: str(value) for name, value in run.items()}
    markdown = (tmp_path / "results.md").read_text()
    errors = [float(row["test_error"]) for row in rows if row["method"] == "laq"]
    assert f"{statistics.fmean(errors):.2f} ± {statistics.stdev(errors):.2f}" in markdown
    assert comparison.conclusion() in markdown


def test_a_method_that_does_not_fit_stops_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'blaq'"):
        compare(RECIPE, ["laq", "blac"], [0], tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()
