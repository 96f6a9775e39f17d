"""The numbers in the figures against the files they come from."""

import base64
import json
import math
import statistics
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blaq.grids import Grid
from blaq.projection import project
from blaq.report.ablation import ablations
from blaq.report.figures import COLOURS, MAX_POINTS, Figure, colours, convergence, encoded, thinned, zigzag
from blaq.report.page import Report, build
from blaq.report.panels import Panel, arrange
from blaq.report.read import Trajectory, read_runs
from blaq.report.static import positions
from blaq.report.tables import layer_table
from blaq.report.weights import changes, grids_of, layer_zigzag, thresholds, trajectories

WriteRun = Callable[..., Path]


def decoded(spec: dict[str, str]) -> list[float]:
    assert spec["dtype"] == "f4"
    data = base64.b64decode(spec["bdata"])
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def lines(folder: Path, pattern: str, name: str = "metrics.jsonl") -> list[list[dict[str, Any]]]:
    """The rows of a file of the runs of a method, in the order of their seeds."""
    return [[json.loads(row) for row in (run / name).read_text().splitlines()] for run in sorted(folder.glob(pattern))]


def only_panel(folder: Path) -> Panel:
    (task,) = arrange(read_runs([folder]))
    (panel,) = task.panels
    return panel


@pytest.fixture
def compared(tmp_path: Path, write_run: WriteRun) -> Path:
    """LAQ and BLAQ, three seeds each, probed."""
    for seed in range(3):
        for method, rate, z in (("laq", 0.3, 0.3), ("blaq", 0.4, 0.2)):
            loss = [math.exp(-rate * epoch) * (1 + 0.1 * seed) for epoch in range(1, 8)]
            write_run(tmp_path / f"{method}-s{seed}", method=method, seed=seed, epochs=7, loss=loss,
                      test_error=2 + 0.1 * seed, zigzag_rate=z + 0.02 * seed)  # fmt: skip
    return tmp_path


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_encoding_keeps_float32(values: list[float]) -> None:
    assert decoded(encoded(values)) == values


@given(st.integers(1, 3000))
def test_thinning_keeps_the_end_and_the_spacing(epochs: int) -> None:
    shown = thinned(epochs).tolist()
    assert shown[-1] == epochs - 1
    assert len(shown) <= MAX_POINTS
    steps = {after - before for before, after in pairwise(shown)}
    assert len(steps) <= 1
    every = steps.pop() if steps else 1
    assert shown[0] < every
    assert every == 1 or epochs > MAX_POINTS


def test_curves_are_means_with_their_spread(compared: Path) -> None:
    figure = convergence(only_panel(compared), "c", text=False)
    assert [trace["name"] for trace in figure.traces] == ["LAQ", "LAQ", "BLAQ", "BLAQ"]
    for index, method in ((0, "laq"), (2, "blaq")):
        runs = lines(compared, f"{method}-s*")
        for measure in ("train_loss", "validation_error"):
            columns = [[run[epoch][measure] for run in runs] for epoch in range(7)]
            means, sds = [statistics.fmean(c) for c in columns], [statistics.stdev(c) for c in columns]
            band, line = (decoded(figure.y[measure].traces[index + i]["y"]) for i in (0, 1))
            assert line == pytest.approx(means, rel=1e-6)
            assert band[:7] == pytest.approx([m + s for m, s in zip(means, sds, strict=True)], rel=1e-6)
            assert band[7:] == pytest.approx([m - s for m, s in zip(means, sds, strict=True)][::-1], rel=1e-6)
        for axis in ("steps", "gradient_evaluations"):
            xs = [row[axis] for row in runs[0]]
            assert decoded(figure.x[axis].traces[index + 1]["x"]) == xs
            assert decoded(figure.x[axis].traces[index]["x"]) == xs + xs[::-1]


def test_one_seed_has_no_band(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "laq", epochs=4)
    figure = convergence(only_panel(tmp_path), "c", text=False)
    assert decoded(figure.y["train_loss"].traces[0]["y"]) == []
    assert figure.caption == "One seed each, so there is no band."


def test_a_band_that_reaches_zero_is_cut_on_a_logarithmic_axis(tmp_path: Path, write_run: WriteRun) -> None:
    for seed, value in enumerate((0.001, 0.001, 3.0)):
        write_run(tmp_path / f"s{seed}", seed=seed, epochs=2, loss=[value, value])
    figure = convergence(only_panel(tmp_path), "c", text=False)
    assert figure.y["train_loss"].layout["yaxis.type"] == "log"
    assert min(decoded(figure.y["train_loss"].traces[0]["y"])) == pytest.approx(3.002 / 3 / 10)
    assert figure.y["validation_error"].layout["yaxis.type"] == "linear"


@pytest.mark.parametrize(("last", "ticks"), [(0.45, "D1"), (0.01, "D2")])
def test_a_logarithmic_axis_has_ticks_however_short(
    last: float, ticks: str, tmp_path: Path, write_run: WriteRun
) -> None:
    write_run(tmp_path / "laq", epochs=2, loss=[0.8, last])
    figure = convergence(only_panel(tmp_path), "c", text=False)
    assert figure.y["train_loss"].layout["yaxis.dtick"] == ticks


def test_long_runs_are_thinned_and_say_so(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "laq", epochs=1000, loss=[1 / epoch for epoch in range(1, 1001)])
    figure = convergence(only_panel(tmp_path), "c", text=False)
    assert figure.caption.endswith("Every 2nd epoch is drawn.")
    shown = decoded(figure.y["train_loss"].traces[1]["y"])
    assert shown == pytest.approx([1 / epoch for epoch in range(2, 1001, 2)], rel=1e-6)


def test_titles_say_the_finding(compared: Path) -> None:
    figure = convergence(only_panel(compared), "c", text=False)
    assert figure.titles["train_loss steps"] == "Training loss against LAQ at equal steps: BLAQ lower"
    assert figure.titles["train_loss gradient_evaluations"].endswith("at equal gradient evaluations: BLAQ higher")
    zig = zigzag(only_panel(compared), "z", text=False)
    assert zig is not None
    title = "Zig-zag rate in the second half of training: LAQ 32 %; BLAQ 22 %"
    assert zig.titles["zigzag_rate steps"] == title
    assert decoded(zig.y["zigzag_rate"].traces[1]["y"]) == pytest.approx([32.0] * 7)  # percent
    assert "gradient_error" not in zig.y  # it was not probed
    assert decoded(zig.y["trial_agreement"].traces[1]["y"]) == []  # LAQ has no trial


def test_a_running_measure_is_told_as_it_ends(compared: Path) -> None:
    for run in compared.iterdir():
        rows = [json.loads(row) for row in (run / "zigzag.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"path_efficiency": 1 / row["epoch"], "oscillation_frequency": 0.01 * row["epoch"]}
        (run / "zigzag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = only_panel(compared)
    figure = zigzag(panel, "z", text=False)
    assert figure is not None
    assert figure.titles["path_efficiency steps"] == "Path efficiency at the end of training: LAQ 0.143; BLAQ 0.143"
    assert figure.titles["oscillation_frequency steps"] == "Oscillation at the end of training: LAQ 7 %; BLAQ 7 %"
    assert figure.caption.startswith(
        "Over all quantized weights: means over the probes of an epoch, but of oscillation and path efficiency the value at "
        "its end. Mean of 3 seeds;"
    )
    table = layer_table(panel.variants[0], panel.variants)
    assert [row[table.head.index("LAQ: oscillation (%)")] for row in table.rows if "fc1.weight" in row] == ["7"]


def test_of_runs_only_the_probed_are_counted(tmp_path: Path, write_run: WriteRun) -> None:
    for seed in range(3):
        write_run(tmp_path / f"laq-{seed}", seed=seed, zigzag_rate=0.3 if seed == 0 else None)
    panel = only_panel(tmp_path)
    figure = zigzag(panel, "z", text=False)
    assert figure is not None and figure.caption.endswith("One seed each, so there is no band.")
    assert convergence(panel, "c", text=False).caption.startswith("Mean of 3 seeds;")


def test_layers(compared: Path) -> None:
    figure = layer_zigzag(only_panel(compared).variants, "l")
    assert figure is not None
    assert figure.traces[0]["y"] == ["fc1.weight", "fc2.weight"]
    assert decoded(figure.y["zigzag_rate"].traces[0]["x"]) == pytest.approx([33.0, 34.0])
    assert figure.y["zigzag_rate"].traces[0]["error_x"]["array"] == pytest.approx([2.0, 2.0])
    assert figure.titles["zigzag_rate "] == "Zig-zag rate lower than LAQ's: BLAQ in 2 of 2 layers"


def test_what_does_not_move_is_not_shown_first(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "laq", zigzag_rate=0.0)
    panel = only_panel(tmp_path)
    over_time = zigzag(panel, "z", text=False)
    assert (
        over_time is not None
        and next(iter(over_time.y)) == "gradient_cosine"
        and list(over_time.y)[-1] == "zigzag_rate"
    )
    (tmp_path / "laq" / "zigzag.jsonl").write_text(
        (tmp_path / "laq" / "zigzag.jsonl").read_text().replace('"zigzag_rate": 0.01', '"zigzag_rate": 0.0').replace(
            '"zigzag_rate": 0.02', '"zigzag_rate": 0.0')
    )  # fmt: skip
    by_layer = layer_zigzag(only_panel(tmp_path).variants, "l")
    assert by_layer is not None and list(by_layer.y) == ["flip_rate", "gradient_cosine", "zigzag_rate"]


def test_without_probes_there_are_none(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "laq")
    panel = only_panel(tmp_path)
    assert zigzag(panel, "z", text=False) is None
    assert layer_zigzag(panel.variants, "l") is None
    assert trajectories(panel.variants, "t") == []


def test_paths_are_in_units_of_the_scale(compared: Path) -> None:
    laq, blaq = trajectories(only_panel(compared).variants, "w")
    (rows,) = lines(compared, "laq-s0", "trajectories.jsonl")
    own = [row for row in rows if row["layer"] == "fc1.weight"]
    drawn = laq.y["fc1.weight"].traces
    for weight in range(8):
        expected = [row["latent"][weight] / row["scale"][weight] for row in own]
        assert decoded(drawn[weight]["y"]) == pytest.approx(expected, rel=1e-5)
    signs = [[row["latent"][weight] >= 0 for row in own] for weight in range(8)]
    turned = [sum(a != b for a, b in pairwise(of)) for of in signs]
    assert laq.titles["fc1.weight "] == (
        f"LAQ: {sum(t > 0 for t in turned)} of 8 followed weights of fc1.weight change their level, {sum(turned)} times in all"
    )
    assert [shape["y0"] for shape in laq.y["fc1.weight"].layout["shapes"]] == [0.0]
    assert laq.y["fc1.weight"].layout["yaxis.range"] == blaq.y["fc1.weight"].layout["yaxis.range"]


def test_a_long_path_loses_no_crossing(tmp_path: Path, write_run: WriteRun) -> None:
    path = write_run(tmp_path / "laq", zigzag_rate=0.1)
    lines = [
        {"step": step, "layer": "fc1.weight", "index": [0, 1], "latent": [(-1) ** step * 0.1, 0.001 * step - 0.45],
         "value": [(-1) ** step * 0.1, 0.1], "scale": [0.1, 0.1], "trial": False}
        for step in range(1, 901)
    ]  # fmt: skip
    (path / "trajectories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (figure,) = trajectories(only_panel(tmp_path).variants, "w")
    assert figure.caption == "Seed 0. Of every 4 probes the lowest and the highest are drawn."
    flipping, crossing = figure.y["fc1.weight"].traces[:2]
    assert set(decoded(flipping["y"])) == {1.0, -1.0}
    assert len(decoded(flipping["y"])) == 450 <= MAX_POINTS
    assert all(one != other for one, other in pairwise(decoded(flipping["y"])))
    steps = decoded(crossing["x"])
    assert (steps[0], steps[-1]) == (1, 900) and steps == sorted(steps)
    assert decoded(crossing["y"]) == pytest.approx([0.01 * step - 4.5 for step in steps], abs=1e-5)


def test_changes_follow_the_level_not_the_scale() -> None:
    import numpy as np

    value = np.array([[0.1, 0.1], [0.3, -0.2], [0.2, 0.2]])
    scale = np.array([[0.1, 0.1], [0.3, 0.2], [0.2, 0.2]])
    assert changes(Trajectory(np.arange(3.0), value, value, scale)) == [0, 2]


@pytest.mark.parametrize("name", ["binary", "ternary", "linear3", "log4", "midrise2"])
def test_thresholds_are_where_the_projection_turns_over(name: str) -> None:
    import torch

    grid = Grid.parse(name)
    scale = 0.1
    for at in thresholds(grid):
        # The levels themselves hold the scale, and two weights stand just beside the threshold.
        anchors = scale * grid.levels.repeat(2000)
        step = 0.01 * max(1.0, abs(at))
        beside = torch.tensor([scale * (at - step), scale * (at + step)])
        codes = project(torch.cat([anchors, beside]), None, grid).codes[-2:].tolist()
        assert codes[1] == codes[0] + 1


def test_grids_of_a_run_follow_its_rules(tmp_path: Path, write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(tmp_path / "a", bits=2, rules={"fc1": 4, "fc2*": "float"})])
    assert {name: grid.name for name, grid in grids_of(run).items()} == {"fc1.weight": "linear4"}


def test_a_heat_map_over_two_settings(tmp_path: Path, write_run: WriteRun) -> None:
    errors = {}
    for a in (0.5, 0.7, 1.0):
        for period in (1, 5):
            if (a, period) == (0.5, 5):
                continue  # a run that failed leaves a hole
            errors[a, period] = [a + period + seed for seed in range(3)]
            for seed, error in enumerate(errors[a, period]):
                write_run(
                    tmp_path / f"{a}-{period}-{seed}", method="blaq", a=a, period=period, seed=seed, test_error=error
                )
    (figure,) = ablations(only_panel(tmp_path), "m", text=False)
    assert figure.traces[0]["x"] == ["1", "5"]
    assert figure.traces[0]["y"] == ["0.5", "0.7", "1"]
    shown = figure.y["test_error"].traces[0]
    for row, a in enumerate((0.5, 0.7, 1.0)):
        for column, period in enumerate((1, 5)):
            values = errors.get((a, period))
            assert shown["z"][row][column] == (None if values is None else pytest.approx(statistics.fmean(values)))
            expected = "" if values is None else f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
            assert shown["text"][row][column] == expected


def test_points_over_one_setting_beside_laq(tmp_path: Path, write_run: WriteRun) -> None:
    for seed in range(2):
        write_run(tmp_path / f"laq-{seed}", seed=seed, test_error=2.0 + seed)
        for lr in (0.1, 0.001, 0.01):
            loss = [0.5, 0.2 if lr == 0.01 else 0.3]
            write_run(
                tmp_path / f"{lr}-{seed}", method="past", lr=lr, seed=seed, epochs=2, loss=loss, test_error=lr + seed
            )
    (figure,) = ablations(only_panel(tmp_path), "m", text=False)
    assert figure.traces[0]["x"] == ["0.001", "0.01", "0.1"]
    past, laq = figure.y["test_error"].traces
    assert decoded(past["y"]) == pytest.approx([0.501, 0.51, 0.6])
    assert past["error_y"]["array"] == pytest.approx([statistics.stdev([0, 1])] * 3)
    assert decoded(laq["y"]) == [2.5] * 3
    assert figure.titles["test_error "].startswith(
        "Validation data choose Past, learning rate = 0.01: test error 0.51 ± 0.71"
    )


def test_three_settings_make_a_map_for_each_value_of_the_third(tmp_path: Path, write_run: WriteRun) -> None:
    for a in (0.5, 0.7):
        for period in (1, 2):
            for lr in (0.1, 0.01):
                write_run(tmp_path / f"{a}-{period}-{lr}", method="blaq", a=a, period=period, lr=lr)
    found = list(ablations(only_panel(tmp_path), "m", text=False))
    assert [figure.slug for figure in found] == ["m-blaq-1", "m-blaq-2"]
    assert [figure.caption.partition(".  ")[0][:27] for figure in found] == [
        "BLAQ, learning rate = 0.01.",
        "BLAQ, learning rate = 0.1. ",
    ]


def test_colours_belong_to_methods(compared: Path, tmp_path: Path, write_run: WriteRun) -> None:
    assert colours(only_panel(compared).variants) == [COLOURS["laq"], COLOURS["blaq"]]
    for a in (0.1, 0.2, 0.3):
        write_run(tmp_path / "more" / f"{a}", method="blaq", a=a)
    scale = colours(only_panel(tmp_path / "more").variants)
    assert len(set(scale)) == 3
    brightness = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in scale]
    assert brightness == sorted(brightness)  # told apart without any colour
    assert all(200 < of < 600 for of in brightness)  # seen on dark, and on white
    steps = [abs(int(one[i : i + 2], 16) - int(two[i : i + 2], 16)) for one, two in pairwise(scale) for i in (1, 3, 5)]
    assert sum(steps) > 250  # and from each other
    for a in (0.4, 1.0):
        write_run(tmp_path / "one" / f"{a}", method="blaq", a=a)
    assert set(colours(only_panel(tmp_path / "one").variants)) == {COLOURS["laq"], COLOURS["blaq"]}


def test_a_title_that_names_some_says_of_how_many_more(tmp_path: Path, write_run: WriteRun) -> None:
    for a in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        write_run(tmp_path / f"{a}", method="blaq", a=a)
    title = convergence(only_panel(tmp_path), "c", text=False).titles["train_loss steps"]
    assert "BLAQ, a = 0.4: " in title and title.endswith("; and 2 more")


def every_figure(report: Report) -> list[Figure]:
    assert report.figures
    return report.figures


def test_plotly_accepts_every_figure(compared: Path) -> None:
    names = []
    for figure in every_figure(build(read_runs([compared]))):
        for name, height, spec in positions(figure):
            go.Figure(spec)  # raises for what plotly does not know
            names.append(name)
            assert height > 100
            assert set(figure.titles) == {f"{y} {x}" for y in figure.y for x in figure.x or [""]}
    assert len(set(names)) == len(names)
    assert "1-bit-binary-convergence-train-loss-gradient-evaluations" in names
    assert "1-bit-binary-weights-blaq-fc2-weight" in names
