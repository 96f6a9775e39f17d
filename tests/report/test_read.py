"""Reading run directories: what is found, how it is named, what is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blaq.report.read import find_runs, read_run, read_runs, read_sweeps, read_trajectories

WriteRun = Callable[..., Path]


def test_a_run_is_read_as_it_was_written(tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "run", method="blaq", seed=3, epochs=4, loss=[0.9, 0.5, 0.3, 0.2], zigzag_rate=0.2)
    run = read_run(path)
    assert (run.name, run.seed, run.epochs, run.recipe.optim.method) == ("run", 3, 4, "blaq")
    assert run.metrics["train_loss"].tolist() == [0.9, 0.5, 0.3, 0.2]
    assert run.metrics["gradient_evaluations"].tolist() == [12, 24, 36, 48]
    assert run.result is not None and run.result["steps"] == 24
    assert list(run.zigzag) == ["total", "fc1.weight", "fc2.weight"]
    assert run.zigzag["fc1.weight"]["zigzag_rate"].tolist() == pytest.approx([0.21] * 4)
    assert np.isnan(run.zigzag["total"]["gradient_error"]).all()  # null in the file
    assert run.versions["torch"] == "2.13.0"


def test_folders_of_comparisons_old_and_new_are_opened(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "new" / "runs" / "laq-s0")
    write_run(tmp_path / "new" / "runs" / "laq-s1", seed=1)
    (tmp_path / "new" / "recipe.toml").write_text((tmp_path / "new/runs/laq-s0/recipe.toml").read_text())
    (tmp_path / "new" / "comparison.json").write_text("{}")
    write_run(tmp_path / "new" / "tuning" / "laq-s9", seed=9)  # the choice of a learning rate is no result
    write_run(tmp_path / "old" / "blaq-s0", method="blaq")
    found = find_runs([tmp_path / "new", tmp_path / "old", tmp_path / "old" / "blaq-s0"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["new/runs/laq-s0", "new/runs/laq-s1", "old/blaq-s0"]


def test_names_are_as_long_as_needed(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "one" / "laq-s0")
    write_run(tmp_path / "two" / "laq-s0", seed=1)
    runs = read_runs([tmp_path / "one" / "laq-s0", tmp_path / "two" / "laq-s0"])
    assert [run.name for run in runs] == ["one/laq-s0", "two/laq-s0"]


def test_a_line_cut_short_is_left_out(tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "run", epochs=3, finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "ste')
    run = read_run(path)
    assert (run.epochs, run.result) == (3, None)


def test_a_run_before_its_first_epoch(tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "run", finished=False)
    (path / "metrics.jsonl").unlink()
    (path / "versions.json").unlink()
    run = read_run(path)
    assert (run.epochs, dict(run.metrics), dict(run.versions), dict(run.zigzag)) == (0, {}, {}, {})
    assert read_trajectories(run) == {}


@pytest.mark.parametrize("name", ["metrics.jsonl", "zigzag.jsonl", "result.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "run", zigzag_rate=0.1)
    (path / name).write_text('{"epoch": oops}\n')
    with pytest.raises(ValueError, match=rf"'.*{name}' is damaged"):
        read_run(path)


@pytest.mark.parametrize("value", [None, "2.0", True, math.nan])
def test_a_result_without_its_numbers_does_not_drop_out_of_the_means(
    value: object, tmp_path: Path, write_run: WriteRun
) -> None:
    path = write_run(tmp_path / "run") / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_error": value}))
    with pytest.raises(ValueError, match=r"result.json' is damaged \(test_error=.*: expected a finite number\)"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("comparison.json", {"target": "low"}, "target='low': expected a number or null"),
        ("comparison.json", {"seeds": 3}, "seeds=3: expected a list of numbers"),
        ("results.json", {"failures": ["laq-s0"]}, "failures=['laq-s0']: expected a table of run names and messages"),
    ],
)
def test_a_damaged_file_of_a_comparison_is_named(
    name: str, content: object, why: str, tmp_path: Path, write_run: WriteRun
) -> None:
    recipe = write_run(tmp_path / "runs" / "laq-s0") / "recipe.toml"
    (tmp_path / "recipe.toml").write_text(recipe.read_text())
    (tmp_path / "comparison.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"'.*{name}' is damaged \({re.escape(why)}\)"):
        read_sweeps([tmp_path])


def test_a_damaged_recipe_is_found_among_many(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "laq-s0")
    (write_run(tmp_path / "laq-s1", seed=1) / "recipe.toml").write_text("title = ")
    with pytest.raises(ValueError, match=r"report: '.*laq-s1': recipe.toml: not a readable TOML file"):
        read_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "key", "value", "why"),
    [
        ("metrics.jsonl", "train_loss", [0.1], "lists for train_loss: expected numbers"),
        ("metrics.jsonl", "gradient_evaluations", None, "a line without 'gradient_evaluations'"),
        ("metrics.jsonl", "train_loss", "low", "could not convert string to float: 'low'"),
        ("zigzag.jsonl", "layer", None, "a line without 'layer'"),
        ("zigzag.jsonl", "epoch", None, "a line without 'epoch'"),
        ("trajectories.jsonl", "scale", None, "a line without 'scale'"),
        ("trajectories.jsonl", "value", [0.1], "latent, value and scale of different lengths"),
        ("trajectories.jsonl", "latent", 0.1, "latent, value and scale of different lengths"),
    ],
)
def test_lines_that_are_not_those_of_a_run_are_named(
    name: str, key: str, value: object, why: str, tmp_path: Path, write_run: WriteRun
) -> None:
    path = write_run(tmp_path / "run", zigzag_rate=0.1) / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row[key]
        row |= {} if value is None else {key: value}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"'.*{name}' is damaged \({re.escape(why)}\)"):
        read_trajectories(read_run(tmp_path / "run"))


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: expected a directory that `blaq train`, `blaq compare`"):
        find_runs([tmp_path])


def test_trajectories_by_layer(tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "run", epochs=2, zigzag_rate=0.1)
    lines = [json.loads(line) for line in (path / "trajectories.jsonl").read_text().splitlines()]
    found = read_trajectories(read_run(path))
    assert list(found) == ["fc1.weight", "fc2.weight"]
    for layer, trajectory in found.items():
        own = [line for line in lines if line["layer"] == layer]
        assert trajectory.steps.tolist() == [line["step"] for line in own] == list(range(13))
        assert trajectory.latent.tolist() == [line["latent"] for line in own]
        assert trajectory.value.tolist() == [line["value"] for line in own]


def test_a_layer_in_float_has_no_thresholds_to_be_drawn_around(tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "run", method="float")
    line = {
        "step": 1,
        "layer": "fc1.weight",
        "index": [0],
        "latent": [0.5],
        "value": [0.5],
        "scale": None,
        "trial": False,
    }
    (path / "trajectories.jsonl").write_text(json.dumps(line) + "\n")
    assert read_trajectories(read_run(path)) == {}


def test_a_measure_without_a_value_is_nan(tmp_path: Path, write_run: WriteRun) -> None:
    run = read_run(
        write_run(tmp_path / "run", epochs=6, zigzag_rate=0.1, gradient_error=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    )
    assert run.zigzag["total"]["gradient_error"].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert math.isnan(run.zigzag["total"]["trial_agreement"][0])
