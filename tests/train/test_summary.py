"""Settings over their seeds: how they are called, and what is told of one that lacks a seed."""

from typing import Any

import pytest

from blaq.train.ablate import Ablation
from blaq.train.compare import Comparison, Design
from blaq.train.config import load_recipe
from blaq.train.run import Result
from blaq.train.summary import Setting, settings_of
from blaq.train.sweep import Outcome, Run
from blaq.train.tables import cost_columns, markdown_table

RECIPE = load_recipe("demo")  # its task says by what is judged
VALUES: dict[str, Any] = {
    "recipe": "tiny", "method": "laq", "bits": 1, "epochs": 1, "steps": 10, "gradient_evaluations": 10, "seconds": 2.0,
    "train_loss": 0.1, "train_error": 1.0, "validation_loss": 0.2, "validation_error": 2.0, "best_epoch": 1,
    "test_loss": 0.3, "test_error": 3.0, "test_loss_last": 0.3, "test_error_last": 3.0,
    "parameters": 1000, "bytes": 200, "float_bytes": 4000,
}  # fmt: skip


def run(settings: dict[str, str], seed: int) -> Run:
    metrics = [{"train_loss": 0.1, "steps": 10, "gradient_evaluations": 10, "seconds": 2.0}]
    return Run(name=f"s{seed}", settings=settings, result=Result(**{**VALUES, "seed": seed}), metrics=metrics)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"method": "laq", "optim.lr": "0.1"}, "laq"),
        ({"optim.a": "0.3", "optim.period": "5"}, "a=0.3, period=5"),
        ({"optim.a": "0.3", "optim.period": ""}, "a=0.3"),
        (
            {"optim.rules.fc1.bits": "4", "optim.rules.fc2.bits": "2", "optim.a": "1"},
            "optim.rules.fc1.bits=4, optim.rules.fc2.bits=2, optim.a=1",
        ),
    ],
)
def test_a_setting_is_called_by_the_last_parts_of_its_keys_where_they_differ(values: dict[str, str], name: str) -> None:
    assert Setting(values, ()).name == name


def test_what_a_target_cost_is_told_only_of_all_seeds() -> None:
    settings = {"method": "laq", "bits": "1"}
    (two,) = settings_of([run(settings, 0), run(settings, 2)], seeds=(0, 1, 2))
    (three,) = settings_of([run(settings, seed) for seed in range(3)], seeds=(0, 1, 2))
    assert two.to_reach(0.1, "steps") is None
    assert three.to_reach(0.1, "steps") is not None


def test_comparison_and_ablation_tell_no_cost_of_a_setting_with_a_failed_seed() -> None:
    laq, blaq = ({"method": method, "bits": "1"} for method in ("laq", "blaq"))
    outcome = Outcome(
        (*(run(laq, seed) for seed in range(3)), run(blaq, 0)), {"blaq-b1-s1": "nan", "blaq-b1-s2": "nan"}
    )
    (compared,) = Comparison(RECIPE, Design(methods=["laq", "blaq"], seeds=range(3), target=0.2), outcome).groups
    assert cost_columns(compared)["steps to 0.2"] == ["10", "-"]
    one, other = {"optim.a": "1"}, {"optim.a": "0.5"}
    outcome = Outcome((*(run(one, seed) for seed in range(3)), run(other, 0)), {"a0.5-s1": "nan", "a0.5-s2": "nan"})
    (ablated,) = Ablation(RECIPE, {"optim.a": ["1", "0.5"]}, outcome, 0.2, seeds=range(3)).groups
    assert cost_columns(ablated)["gradients to 0.2"] == ["10", "-"]


def test_no_setting_breaks_a_table_in_markdown() -> None:
    table = markdown_table({"optim.rules.(fc1|fc2)": ["1|2", "4"], "seeds": ["3", "3"]})
    assert {line.count("|") for line in table.splitlines()} == {3}
    assert "| 1&#124;2 | 3 |" in table
