"""Comparisons: the numbers of the tables, and a closing line that claims no more than they say."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typing_extensions import override

from blaq.train.ablate import ablate
from blaq.train.compare import Comparison, Design, compare
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import Result
from blaq.train.summary import Measure
from blaq.train.sweep import Job, Outcome, Run, Sweeper
from blaq.train.tables import EXPLANATION, cost_columns, quality_columns, rich_tables

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=1, threads=1),
)
TEXT = Recipe(
    name="text",
    title="characters",
    data=DataConfig(source="war_and_peace", sequence=100),
    model=ModelConfig(name="char_lstm"),
    optim=OptimConfig(),
    train=TrainConfig(epochs=1),
)
VALUES: dict[str, Any] = {
    "recipe": "tiny", "epochs": 1, "steps": 100, "gradient_evaluations": 100, "seconds": 2.0,
    "train_loss": 0.1, "train_error": 1.0, "validation_loss": 0.2, "validation_error": 2.0, "best_epoch": 1,
    "test_loss": 0.3, "test_error": 3.0, "test_loss_last": 0.3, "test_error_last": 3.0,
    "parameters": 1000, "bytes": 200, "float_bytes": 4000,
}  # fmt: skip


def runs(
    method: str,
    errors: list[float],
    *,
    bits: int | str = 1,
    losses: Sequence[Sequence[float]] = (),
    first_seed: int = 0,
    **values: Any,
) -> tuple[Run, ...]:
    """Runs with these test errors; `losses` are the training losses of every epoch, 10 steps each."""
    found = []
    bits = "float" if method == "float" else bits
    for number, error in enumerate(errors):
        seed = first_seed + number
        result = Result(**{**VALUES, "method": method, "bits": bits, "seed": seed, "test_error": error, **values})
        metrics = [
            {"train_loss": loss, "steps": 10 * epoch, "gradient_evaluations": 20 * epoch, "seconds": 0.5 * epoch}
            for epoch, loss in enumerate(losses[number] if losses else (), start=1)
        ]
        settings = {"method": method, "bits": str(bits)}
        found.append(Run(name=f"{method}-s{seed}", settings=settings, result=result, metrics=metrics))
    return tuple(found)


def comparison(*groups: tuple[Run, ...], recipe: Recipe = RECIPE, **design: Any) -> Comparison:
    return Comparison(recipe, Design(methods=["laq"], seeds=[0], **design), Outcome(sum(groups, ()), {}))


def conclusion(*groups: tuple[Run, ...], recipe: Recipe = RECIPE) -> str:
    (line,) = comparison(*groups, recipe=recipe).conclusion()
    return line


def test_a_difference_beyond_its_interval_is_called_so() -> None:
    laq = runs("laq", [2.5, 2.6, 2.7])
    blaq = runs("blaq", [2.0, 2.12, 2.18], gradient_evaluations=120)
    past = runs("past", [3.5, 3.62, 3.7])
    bwn = runs("bwn", [2.4, 2.6, 2.9])
    # Student's t for three pairs is 4.3027.
    width = {
        name: 4.302653 * statistics.stdev(values) / math.sqrt(3)
        for name, values in {"blaq": [-0.5, -0.48, -0.52], "past": [1.0, 1.02, 1.0], "bwn": [-0.1, 0, 0.2]}.items()
    }
    assert conclusion(laq, blaq, past, bwn) == (
        f"Look at test error: laq has 2.60 ± 0.10 %; ahead of it: blaq by 0.50 ± {width['blaq']:.2f}; behind it: past by "
        f"1.01 ± {width['past']:.2f}; no difference beyond seed noise shown: bwn (+0.03 ± {width['bwn']:.2f}) [95 % "
        "intervals, paired t, 3 seeds; equal steps]. blaq took 1.20 times the gradients of laq. Packed weights are 20.0 "
        "times smaller than float32."
    )


def test_one_seed_says_nothing_about_noise() -> None:
    line = conclusion(runs("blaq", [1.0]), runs("laq", [9.0]))
    assert "ahead" not in line
    assert "no difference beyond seed noise shown: blaq (-8.00) [a single seed, which cannot tell anything" in line
    # Two seeds of the one are no two pairs.
    assert "a single seed" in conclusion(runs("blaq", [1.0, 1.1]), runs("laq", [9.0]))
    assert "[no seed in common" in conclusion(runs("blaq", [1.0], first_seed=5), runs("laq", [9.0]))


def test_differences_that_are_all_equal_are_no_evidence_of_anything() -> None:
    line = conclusion(runs("blaq", [1.0, 2.0]), runs("laq", [1.5, 2.5]))
    assert "ahead" not in line
    assert "blaq (-0.50) [95 % intervals, paired t, 2 seeds; differences without any spread have no interval" in line


def test_what_has_no_interval_is_not_said_to_be_within_seed_noise() -> None:
    laq, past = runs("laq", [1.5, 2.5, 2.0]), runs("past", [1.6, 2.3, 2.2])
    flat, apart = runs("blaq", [1.0, 2.0, 1.5]), runs("bwn", [1.0], first_seed=7)
    line = conclusion(laq, flat, past, apart)
    assert "no difference beyond seed noise shown: past (+0.03 ± " in line
    assert (
        "; the same difference in every seed, so no claim: blaq (-0.50); without a seed in common with it: bwn ["
        in line
    )


def test_the_reference_is_laq_or_what_came_first() -> None:
    assert "Look at test error: float has 1.00 %" in conclusion(runs("float", [1.0]), runs("blaq", [2.0]))
    assert "Look at test error: laq has 1.00 %" in conclusion(runs("float", [2.0]), runs("laq", [1.0]))
    assert conclusion(runs("laq", [2.0, 2.1])) == (
        "Look at test error: one method alone; run another with the same seeds to compare it with."
    )


def test_text_is_judged_by_its_cross_entropy() -> None:
    line = conclusion(runs("blaq", [9.0], test_loss=1.3), runs("laq", [1.0], test_loss=1.2875), recipe=TEXT)
    assert line.startswith(
        "Look at test loss: laq has 1.2875 nats; no difference beyond seed noise shown: blaq (+0.0125)"
    )


def test_a_line_and_a_table_for_each_grid_with_float_in_all() -> None:
    found = comparison(
        runs("float", [1.0, 1.2]),
        runs("laq", [2.0, 2.1], bits=1),
        runs("laq", [1.5, 1.7], bits="log3"),
        runs("blaq", [1.9, 2.3], bits=1),
        runs("blaq", [1.3, 1.6], bits="log3", gradient_evaluations=200),
    )
    assert [group.title for group in found.groups] == ["bits 1", "bits log3"]
    for group in found.groups:
        assert [setting.name for setting in group.settings] == ["float", "laq", "blaq"]
    one, other = found.conclusion()
    assert one.startswith("Look at test error (bits 1): laq has 2.05")
    assert "the gradients" not in one
    assert other.startswith("Look at test error (bits log3): laq has 1.60")
    assert "blaq took 2.00 times the gradients of laq." in other
    assert found.groups[1].differences("test_error")[2].values == pytest.approx((-0.2, -0.1))  # type: ignore[union-attr]


def test_what_a_target_loss_cost() -> None:
    laq = runs("laq", [1.0, 1.0], losses=[[0.9, 0.5, 0.3], [0.8, 0.4, 0.35]])
    blaq = runs("blaq", [1.0, 1.0], losses=[[0.5, 0.2, 0.25], [0.4, 0.3, 0.1]])
    (group,) = comparison(laq, blaq).groups
    assert group.target_loss == 0.35  # of the lowest losses 0.3, 0.35, 0.2, 0.1 the largest
    one, other = group.settings
    assert [one.to_reach(0.35, cost).values for cost in ("steps", "gradient_evaluations", "seconds")] == [  # type: ignore
        (30, 30), (60, 60), (1.5, 1.5),
    ]  # fmt: skip
    assert other.to_reach(0.35, "steps").values == (20, 20)  # type: ignore[union-attr]
    assert one.to_reach(0.34, "steps") is None  # one of its runs never gets there
    (asked,) = comparison(laq, blaq, target=0.5).groups
    assert cost_columns(asked)["steps to 0.5"] == ["20", "10"]
    assert asked.as_json(Measure.of(RECIPE))["settings"][1]["to_target"] == {
        "steps": 10, "gradient_evaluations": 20, "seconds": 0.5,
    }  # fmt: skip
    (never,) = comparison(laq, blaq, target=0.01).groups
    assert cost_columns(never)["seconds to 0.01"] == ["-", "-"]


def test_costs_are_means_and_the_largest_memory() -> None:
    old = runs("laq", [1.0], seconds=1.0)
    new = runs("laq", [1.0], first_seed=1, seconds=2.0, peak_memory=3_000_000)
    more = runs("laq", [1.0], first_seed=2, seconds=4.5, peak_memory=5_000_000)
    (group,) = comparison(old, new, more).groups
    assert group.settings[0].peak_memory() == 5_000_000
    assert cost_columns(group)["peak memory"] == ["5.0 MB"]
    assert cost_columns(group)["bits a weight"] == ["1.60"]
    assert quality_columns(group, Measure.of(RECIPE))["seconds"] == ["2.5"]
    (unknown,) = comparison(old).groups
    assert cost_columns(unknown)["peak memory"] == ["-"]


@pytest.mark.parametrize("recipe", [RECIPE, TEXT])
def test_the_tables_fit_80_columns(recipe: Recipe) -> None:
    losses = [[0.123456, 0.1], [0.2, 0.1], [0.2, 0.1]]
    values: dict[str, Any] = {"seconds": 12345.6, "bytes": 123_456_789, "float_bytes": 10**9, "losses": losses}
    found = comparison(
        runs("delayed", [12.25, 13.5, 14.0], gradient_evaluations=1_234_567, peak_memory=123_456_789, **values),
        runs("laq", [1.25, 33.5, 14.0], gradient_evaluations=1_234_567, **values),
        recipe=recipe,
    )
    console = Console(file=io.StringIO(), width=80)
    for table in rich_tables(found.groups, recipe):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    main = "13.25 ± 0.90" if recipe is RECIPE else "0.3000 ± 0.0000"
    for cell in (main, "0.1000", "1,234,567", "12345.6", "123.5 MB", "(3 seeds)", "to 0.1", "minus", "8.1x"):
        assert cell in text


def made(design: Design, out: Path, recipe: Recipe = RECIPE) -> tuple[Comparison, list[dict[str, str]], str]:
    console = Console(file=io.StringIO(), width=120)
    found = compare(recipe, design, out, Sweeper(console=console))
    with (out / "results.csv").open() as file:
        return found, list(csv.DictReader(file)), console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("server")
def test_runs_are_written_and_tabulated(tmp_path: Path) -> None:
    design = Design(methods=["float", "laq", "blaq"], bits=[1, "ternary2"], seeds=[3, 4], budget="gradients")
    found, rows, printed = made(design, tmp_path)
    assert not found.failures
    names = [
        f"{run}-s{seed}" for run in ("float", "laq-b1", "laq-bternary2", "blaq-b1", "blaq-bternary2") for seed in (3, 4)
    ]
    assert [row["run"] for row in rows] == names
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)
    assert {(row["method"], row["epochs"], row["steps"], row["gradient_evaluations"]) for row in rows} == {
        ("float", "2", "12", "12"), ("laq", "2", "12", "12"), ("blaq", "1", "6", "12"),
    }  # fmt: skip
    assert [row["bits"] for row in rows[::2]] == ["float", "1", "ternary2", "1", "ternary2"]
    content = json.loads((tmp_path / "results.json").read_text())
    for row, saved in zip(rows, content["runs"], strict=True):
        run = json.loads((tmp_path / "runs" / row["run"] / "result.json").read_text())
        assert saved == {"run": row["run"], **run}
        assert row == {name: str(value) for name, value in saved.items()}
    note = "epochs, 1 in the recipe: float 2, laq 2, blaq 1. Schedules are stretched"
    markdown = (tmp_path / "results.md").read_text()
    assert note in printed
    assert note in markdown
    assert EXPLANATION in markdown
    for group, bits in zip(content["groups"], ("1", "ternary2"), strict=True):
        errors = {
            method: [float(row["test_error"]) for row in rows if (row["method"], row["bits"]) == (method, bits)]
            for method in ("laq", "blaq")
        }
        laq, blaq = group["settings"][1:]
        assert laq["test_error"] == {
            "mean": pytest.approx(statistics.fmean(errors["laq"])),
            "sd": pytest.approx(statistics.stdev(errors["laq"])),
        }
        assert laq["difference"] is None
        differences = [ours - theirs for ours, theirs in zip(errors["blaq"], errors["laq"], strict=True)]
        assert blaq["difference"]["values"] == pytest.approx(differences)
        assert f"{statistics.fmean(errors['laq']):.2f} ± {statistics.stdev(errors['laq']):.2f}" in markdown
    assert content["conclusion"] == found.conclusion()
    assert all(line in markdown for line in found.conclusion())
    described = json.loads((tmp_path / "comparison.json").read_text())
    assert described["kind"] == "compare"
    assert described["seeds"] == [3, 4]
    assert described["epochs"] == {"float": 2, "laq-b1": 2, "laq-bternary2": 2, "blaq-b1": 1, "blaq-bternary2": 1}


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.usefixtures("server")
def test_runs_are_not_given_other_epochs(tmp_path: Path) -> None:
    recipe, quiet = RECIPE.with_(["train.epochs=2"]), Sweeper(console=Console(quiet=True))
    made(Design(methods=["laq", "past"], seeds=[0], budget="gradients"), tmp_path, recipe)
    before = files_of(tmp_path)
    more = Design(methods=["laq", "past", "blaq"], seeds=[0, 1], budget="gradients")
    with pytest.raises(ValueError, match=r"its run laq-b1-s0 has train\.epochs=2, not 4; choose another directory"):
        compare(recipe, more, tmp_path, quiet)
    assert files_of(tmp_path) == before
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.usefixtures("server")
def test_runs_are_not_given_other_learning_rates(tmp_path: Path) -> None:
    made(Design(methods=["laq"], seeds=[0], rates=[1e-5]), tmp_path)
    before = files_of(tmp_path)
    more = Design(methods=["laq"], seeds=[0, 1], rates=[1e-5, 0.01])
    with pytest.raises(ValueError, match=r"its run laq-b1-s0 has optim\.lr=1e-05, not 0\.01; choose another directory"):
        compare(RECIPE, more, str(tmp_path), Sweeper(console=Console(quiet=True)))  # type: ignore[arg-type]
    assert files_of(tmp_path) == before
    assert len(list((tmp_path / "runs").iterdir())) == 1
    found, rows, _ = made(Design(methods=["laq"], seeds=[0, 1], rates=[1e-5, 1e-6]), tmp_path)
    assert not found.failures
    assert len(rows) == 2


class Planned(Sweeper):
    """Lays the recipes of the runs down and makes none."""

    @override
    def run(self, jobs: Sequence[Job], folder: Path, **_: Any) -> Outcome:
        for job in jobs:
            (folder / job.name).mkdir(parents=True, exist_ok=True)
            (folder / job.name / "recipe.toml").write_text(job.recipe.to_toml())
        return Outcome((), {})


@pytest.mark.parametrize(
    ("first", "then", "names"),
    [
        ([1, "linear3"], ["binary", 3], ["laq-b1-s0", "laq-blinear3-s0"]),
        (["binary"], [1], ["laq-bbinary-s0"]),
        (["ternary"], [1], ["laq-b1-s0", "laq-bternary-s0"]),
        (["binary"], [], ["laq-bbinary-s0"]),  # the recipe's, which is 1
    ],
)
def test_a_grid_keeps_the_name_that_its_runs_have(
    first: list[int | str], then: list[int | str], names: list[str], tmp_path: Path
) -> None:
    planned = Planned(console=Console(quiet=True))
    for bits in (first, then, first):
        found = compare(RECIPE, Design(methods=["laq", "float"], seeds=[0], bits=bits), tmp_path, planned)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(["float-s0", *names])
    assert list(found.design.bits) == first
    assert json.loads((tmp_path / "comparison.json").read_text())["bits"] == first


def test_an_ablation_keeps_the_names_of_its_grids(tmp_path: Path) -> None:
    planned = Planned(console=Console(quiet=True))
    for values in (["1", "linear3"], ["binary", "3", "4"]):
        ablate(RECIPE, {"optim.bits": values}, [0], tmp_path, planned)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["bits1-s0", "bits4-s0", "bitslinear3-s0"]


def test_brackets_and_colons_of_a_title_are_printed_as_they_are() -> None:
    recipe = replace(RECIPE, title="digits [quick] [/x] :100:")
    found = comparison(runs("laq", [1.0]), recipe=recipe)
    console = Console(file=io.StringIO(), width=120)
    for table in rich_tables(found.groups, recipe):
        console.print(table)
    assert "digits [quick] [/x] :100: (1 seeds)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_result_without_peak_memory_can_still_be_read() -> None:
    assert Result(**{**VALUES, "method": "laq", "bits": 1, "seed": 0}).peak_memory is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ["laq", "laq"]}, r"compare\(methods='laq,laq'\): expected at least one, each once"),
        ({"methods": []}, "expected at least one"),
        ({"seeds": []}, "expected at least one"),
        ({"bits": [1, "binary"]}, r"compare\(bits='1,binary'\): expected each grid once"),
        ({"bits": ["ternery"]}, "ternary"),
        ({"rates": [0.1, 0.1]}, "each once"),
        ({"rates": [0.1, 0.10000001]}, "differ in six digits"),
        ({"tune_seeds": 0}, "at least 1"),
        ({"tune_seeds": 5}, r"compare\(tune_seeds=5\): without learning rates to choose among nothing is chosen"),
        ({"target": math.nan}, "finite training loss"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Design(**{"methods": ["laq"], "seeds": [0], **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rates": [0.1], "seeds": [2**32 - 10]}, r"seed=4294977286\): expected 0 to"),
        ({"methods": ["laq", "blac"]}, "did you mean 'blaq'"),
        ({"rates": [-1.0]}, "finite numbers > 0"),
        ({"methods": ["float"], "bits": [1, 2]}, r"compare\(bits='1,2'\): none of the methods float quantizes"),
    ],
)
def test_what_does_not_fit_stops_before_any_run(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(
            RECIPE.with_([f"train.seed={changed.get('seeds', [0])[0]}"]),
            Design(**{"methods": ["laq"], "seeds": [0], **changed}),
            tmp_path / "out",
            Sweeper(console=Console(quiet=True)),
        )
    assert not (tmp_path / "out").exists()
