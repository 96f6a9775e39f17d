"""Ablations: real runs of a grid, set against LAQ where LAQ is among them."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blaq.train.ablate import Ablation, ablate
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import Result
from blaq.train.sweep import Outcome, Run, Sweeper
from blaq.train.tables import rich_tables

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=1, threads=1),
)
VALUES: dict[str, Any] = {
    "recipe": "tiny", "method": "blaq", "bits": 1, "epochs": 1, "steps": 100, "gradient_evaluations": 100, "seconds": 2.0,
    "train_loss": 0.1, "train_error": 1.0, "validation_loss": 0.2, "best_epoch": 1, "test_loss": 0.3,
    "test_loss_last": 0.3, "test_error_last": 3.0, "parameters": 1000, "bytes": 200, "float_bytes": 4000,
}  # fmt: skip


def runs(settings: dict[str, str], *errors: float, validation: float = 2.0) -> list[Run]:
    return [
        Run(
            name=f"{seed}",
            settings=settings,
            result=Result(**{**VALUES, "seed": seed, "test_error": error, "validation_error": validation}),
        )
        for seed, error in enumerate(errors)
    ]


def ablation(*groups: list[Run]) -> Ablation:
    sets = {key: [""] for group in groups for run in group for key in run.settings}
    return Ablation(RECIPE, sets, Outcome(tuple(run for group in groups for run in group), {}))


def test_settings_are_counted_against_laq() -> None:
    found = ablation(
        runs({"optim.a": "0.3", "optim.period": "1"}, 3.0, 3.2, 3.1),
        runs({"optim.a": "0.6", "optim.period": "1"}, 1.0, 1.22, 1.1, validation=1.0),
        runs({"optim.a": "0.6", "optim.period": "5"}, 1.5, 2.5, 1.7),
        runs({"optim.a": "1", "optim.period": "1"}, 2.0, 2.2, 2.11),
        runs({"optim.a": "1", "optim.period": "5"}, 2.0, 2.2, 2.11),
    )
    (group,) = found.groups
    assert group.reference is not None
    assert group.reference.name == "a=1, period=1"
    (line,) = found.conclusion()
    assert line == (
        "Look at test error: the lowest validation error has a=0.6, period=1, with test error 1.11 ± 0.11 %; against LAQ "
        "(a=1, period=1: 2.10 ± 0.10 %) 1 (a=0.6, period=1 (-1.00 ± 0.04)) ahead, 1 (a=0.3, period=1 (+1.00 ± 0.01)) behind, "
        "1 not told apart from seed noise [95 % intervals, paired t; by chance alone about 0.15 of 3 would be ahead or "
        "behind]."
    )


def test_other_settings_make_groups_each_with_its_own_laq() -> None:
    found = ablation(
        runs({"optim.bits": "1", "optim.a": "0.6"}, 1.0, 1.2),
        runs({"optim.bits": "1", "optim.a": "1"}, 1.5, 1.6),
        runs({"optim.bits": "2", "optim.a": "0.6"}, 0.5, 0.7),
        runs({"optim.bits": "2", "optim.a": "1"}, 0.6, 0.9),
    )
    assert [group.title for group in found.groups] == ["optim.bits=1", "optim.bits=2"]
    for group, expected in zip(found.groups, ((-0.5, -0.4), (-0.1, -0.2)), strict=True):
        ours, none = group.differences("test_error")
        assert ours is not None
        assert ours.values == pytest.approx(expected)
        assert none is None
    assert [line.partition(":")[0] for line in found.conclusion()] == [
        "Look at test error (optim.bits=1)", "Look at test error (optim.bits=2)",
    ]  # fmt: skip


def test_laq_by_name_comes_before_a_of_one() -> None:
    found = ablation(
        runs({"optim.method": "blaq", "optim.a": "1"}, 1.5, 1.6),
        runs(
            {"optim.method": "past", "optim.a": "1"}, 1.5, 1.6
        ),  # its one gradient is taken elsewhere: this is not LAQ
        runs({"optim.method": "laq", "optim.a": ""}, 1.5, 1.6),
    )
    (group,) = found.groups
    assert group.reference is group.settings[2]
    only_past = ablation(runs({"optim.method": "past", "optim.a": "1"}, 1.5, 1.6))
    assert only_past.groups[0].reference is None


def test_without_laq_nothing_is_set_against_it() -> None:
    (line,) = ablation(
        runs({"optim.lr": "0.1"}, 1.5, validation=3.0), runs({"optim.lr": "0.2"}, 2.5, validation=2.0)
    ).conclusion()
    assert line == (
        "Look at test error: the lowest validation error has lr=0.2, with test error 2.50 %; LAQ is not among the settings "
        "(optim.a=1, or optim.method=laq), so none is set against it."
    )


def test_a_method_that_does_not_read_a_setting_stands_beside_every_value_of_it() -> None:
    found = ablation(
        runs({"optim.method": "float", "optim.bits": ""}, 0.5, 0.6),
        *[runs({"optim.method": m, "optim.bits": bits}, 1.5, 1.6) for m in ("laq", "blaq") for bits in ("1", "2")],
    )
    names = {group.title: [setting.name for setting in group.settings] for group in found.groups}
    assert names == {
        f"optim.bits={bits}": ["method=float", f"method=laq, bits={bits}", f"method=blaq, bits={bits}"] for bits in "12"
    }
    assert all(
        group.reference is not None and group.reference.values["optim.method"] == "laq" for group in found.groups
    )


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_a_target_is_a_loss(target: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ablate\(target=.*\): expected a finite training loss"):
        ablate(
            RECIPE,
            {"optim.a": ["0.3", "1"]},
            [0],
            tmp_path / "out",
            Sweeper(console=Console(quiet=True)),
            target=target,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("server")
def test_the_grid_is_run_and_written(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    sets = {"optim.a": ["0.3", "1"], "optim.bits": ["1", "log3"]}
    found = ablate(RECIPE, sets, [5], tmp_path, Sweeper(console=console), target=9.0)
    assert not found.failures
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["optim.a"], row["optim.bits"], row["bits"], row["seed"]) for row in rows] == [
        ("a0.3-bits1-s5", "0.3", "1", "1", "5"), ("a0.3-bitslog3-s5", "0.3", "log3", "log3", "5"),
        ("a1-bits1-s5", "1", "1", "1", "5"), ("a1-bitslog3-s5", "1", "log3", "log3", "5"),
    ]  # fmt: skip
    described = json.loads((tmp_path / "comparison.json").read_text())
    assert (described["kind"], described["sets"], described["methods"]) == ("ablate", sets, ["blaq"])
    groups = json.loads((tmp_path / "results.json").read_text())["groups"]
    assert [group["target_loss"] for group in groups] == [9.0, 9.0]
    assert groups[0]["settings"][0]["to_target"]["steps"] == 6
    markdown = (tmp_path / "results.md").read_text()
    assert "| a | bits | seeds |" in markdown
    assert all(line in markdown for line in found.conclusion())
    screen = Console(file=io.StringIO(), width=80)
    for table in rich_tables(found.groups, RECIPE):
        screen.print(table)
    assert "…" not in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_single_seed_claims_nothing() -> None:
    (line,) = ablation(
        runs({"optim.a": "0.3"}, 3.0), runs({"optim.a": "0.6"}, 1.0, validation=1.0), runs({"optim.a": "1"}, 2.0)
    ).conclusion()
    assert line.endswith("LAQ (a=1) has 2.00 % [a single seed, which cannot tell anything from seed noise].")


def test_the_same_difference_in_every_seed_is_no_claim() -> None:
    (line,) = ablation(
        runs({"optim.a": "0.3"}, 1.0, 1.5, 2.0),
        runs({"optim.a": "0.6"}, 2.5, 2.6, 3.3),
        runs({"optim.a": "1"}, 2.0, 2.5, 3.0),
    ).conclusion()
    assert line.endswith(
        "none ahead, none behind, 1 not told apart from seed noise, 1 (a=0.3 (-1.00)) the same distance away in every seed "
        "[95 % intervals, paired t; differences without any spread have no interval; by chance alone about 0.05 of 1 would be "
        "ahead or behind]."
    )


def test_the_seed_that_a_failing_setting_left_is_not_chosen() -> None:
    found = ablation(
        runs({"optim.a": "0.3", "optim.period": "1"}, 0.5, validation=0.1),
        runs({"optim.a": "0.6", "optim.period": "1"}, 1.0, 1.2, 1.1, validation=1.0),
        runs({"optim.a": "1", "optim.period": "1"}, 2.0),
        runs({"optim.a": "1", "optim.period": "5"}, 2.0, 2.2, 2.11),
    )
    (group,) = found.groups
    assert group.reference is not None and group.reference.name == "a=1, period=5"
    (line,) = found.conclusion()
    assert line.startswith(
        "Look at test error: the lowest validation error has a=0.6, period=1, with test error 1.10 ± 0.10 %; with missing "
        "seeds, so not chosen beside fuller ones: 2 (a=0.3, period=1: 1 of 3; a=1, period=1: 1 of 3); against LAQ (a=1, "
        "period=5: 2.10 ± 0.10 %) 1 (a=0.6, period=1"
    )


def test_laq_alone_is_not_called_a_single_seed() -> None:
    lines = ablation(
        *[runs({"optim.method": "laq", "optim.bits": bits}, 2.0, 2.1, 2.2) for bits in ("1", "2")]
    ).conclusion()
    assert len(lines) == 2
    assert all(line.endswith("2.10 ± 0.10 % [no setting beside it].") for line in lines)
