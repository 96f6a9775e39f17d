"""Learning rates: the choice that validation data lead to, and that test data have no part in it."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blaq.train.compare import Design, compare
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.directory import RunDirectory, load_recipe
from blaq.train.sweep import Run, Sweeper
from blaq.train.tuning import choose

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=2, threads=1),
)


class Untouched:
    """A result that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the choice looked at {name}")


def run(setting: str, rate: float, *epochs: tuple[float, float]) -> Run:
    """A run with these validation errors and losses."""
    metrics = [{"validation_error": error, "validation_loss": loss} for error, loss in epochs]
    result: Any = Untouched()
    return Run(name="", settings={"setting": setting, "lr": repr(rate)}, result=result, metrics=metrics)


def test_the_lowest_mean_of_the_lowest_validation_errors() -> None:
    found = [
        run("laq", 0.1, (5.0, 0.5), (2.0, 0.9)), run("laq", 0.1, (4.0, 0.5), (6.0, 0.1)),  # 3.0
        run("laq", 0.2, (2.5, 0.9), (9.0, 0.9)), run("laq", 0.2, (3.0, 0.9)),  # 2.75, though its losses are higher
        run("blaq", 0.1, (1.0, 0.3)), run("blaq", 0.1, (1.0, 0.3)),
        run("blaq", 0.2, (1.0, 0.3)), run("blaq", 0.2, (1.0, 0.2)),  # as good, at a lower loss
    ]  # fmt: skip
    tuning = choose(["laq", "blaq"], [0.1, 0.2], 2, found, {}, by_loss=False)
    assert tuning.chosen == {"laq": 0.2, "blaq": 0.2}
    assert [(row["setting"], row["lr"], row["validation_error"], row["chosen"]) for row in tuning.rows] == [
        ("laq", 0.1, 3.0, False), ("laq", 0.2, 2.75, True), ("blaq", 0.1, 1.0, False), ("blaq", 0.2, 1.0, True),
    ]  # fmt: skip
    assert choose(["laq"], [0.1, 0.2], 2, found, {}, by_loss=True).chosen == {"laq": 0.1}


def test_equal_rates_leave_the_first() -> None:
    found = [run("laq", rate, (1.0, 0.3)) for rate in (0.3, 0.1, 0.2)]
    assert choose(["laq"], [0.3, 0.1, 0.2], 1, found, {}, by_loss=False).chosen == {"laq": 0.3}


def test_a_rate_with_a_failed_run_is_not_chosen() -> None:
    found = [run("laq", 0.1, (3.0, 0.3)), run("laq", 0.1, (3.0, 0.3)), run("laq", 0.2, (1.0, 0.1))]
    tuning = choose(["laq", "past"], [0.1, 0.2], 2, found, {"laq-lr0.2-s1": "diverged"}, by_loss=False)
    assert tuning.chosen == {"laq": 0.1}
    assert tuning.rows[1]["validation_error"] is None
    assert tuning.failures == {"laq-lr0.2-s1": "diverged"}


def test_a_rate_whose_run_has_lost_its_metrics_is_not_chosen() -> None:
    found = [run("laq", 0.1, (3.0, 0.3)), run("laq", 0.2)]
    assert choose(["laq"], [0.1, 0.2], 1, found, {}, by_loss=False).chosen == {"laq": 0.1}


def test_a_choice_at_the_edge_is_told() -> None:
    found = [run("laq", rate, (rate, 0.3)) for rate in (0.1, 0.2, 0.3)]
    found += [run("blaq", rate, (abs(rate - 0.2), 0.3)) for rate in (0.1, 0.2, 0.3)]
    assert choose(["laq", "blaq"], [0.1, 0.2, 0.3], 1, found, {}, by_loss=False).at_the_edge() == ["laq"]
    assert choose(["laq"], [0.1], 1, found, {}, by_loss=False).at_the_edge() == []


@pytest.mark.usefixtures("server")
def test_each_method_is_run_with_its_own_rate(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    rates = [0.00001, 0.01]
    design = Design(methods=["float", "laq"], seeds=[0], rates=rates)
    found = compare(RECIPE, design, tmp_path, Sweeper(console=console))
    assert not found.failures
    with (tmp_path / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], float(row["lr"])) for row in rows] == [(m, r) for m in ("float", "laq-b1") for r in rates]
    tuning = sorted((tmp_path / "tuning").iterdir())
    assert len(tuning) == 4
    assert {load_recipe(run / "recipe.toml").train.seed for run in tuning} == {10_000}
    for row in rows:
        (metrics,) = [
            RunDirectory(run).metrics()
            for run in tuning
            if run.name.startswith(f"{row['setting']}-")
            and load_recipe(run / "recipe.toml").optim.lr == float(row["lr"])
        ]
        assert float(row["validation_error"]) == min(line["validation_error"] for line in metrics)
        assert not [name for name in row if "test" in name]
    chosen = {row["setting"]: float(row["lr"]) for row in rows if row["chosen"] == "True"}
    assert chosen == {"float": 0.01, "laq-b1": 0.01}
    for run in (tmp_path / "runs").iterdir():
        assert load_recipe(run / "recipe.toml").optim.lr == 0.01
    with (tmp_path / "results.csv").open() as file:
        assert [row["optim.lr"] for row in csv.DictReader(file)] == ["0.01"] * 2
    assert "Learning rates, on validation data" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "At the edge of the grid, so a better rate may lie outside: float, laq-b1." in console.file.getvalue()  # type: ignore
    assert json.loads((tmp_path / "comparison.json").read_text())["rates"] == rates
