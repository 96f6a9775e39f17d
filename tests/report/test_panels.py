"""What is compared with what."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blaq.report.page import _differences
from blaq.report.panels import Panel, arrange
from blaq.report.read import read_runs
from blaq.train.config import Recipe, RuleConfig

WriteRun = Callable[..., Path]


def labels(panel: Panel) -> list[str]:
    return [variant.label for variant in panel.variants]


def test_seeds_make_a_variant_and_methods_share_a_panel(tmp_path: Path, write_run: WriteRun) -> None:
    for seed in (2, 0, 1):
        for method in ("past", "blaq", "laq", "float"):
            write_run(tmp_path / f"{method}-s{seed}", method=method, seed=seed)
    (task,) = arrange(read_runs([tmp_path]))
    (panel,) = task.panels
    assert panel.label == "1 bit (binary)"
    assert labels(panel) == ["float32", "LAQ", "BLAQ", "Past"]
    assert all(variant.seeds == (0, 1, 2) for variant in panel.variants)
    assert [variant.label for variant in panel.controls] == ["LAQ"]
    assert not panel.varied


def test_bits_make_panels_and_float_runs_stand_in_each(tmp_path: Path, write_run: WriteRun) -> None:
    for bits in (3, 1, "ternary"):
        write_run(tmp_path / f"laq-{bits}", bits=bits)
        write_run(tmp_path / f"blaq-{bits}", method="blaq", bits=bits)
    write_run(tmp_path / "same", bits="binary", seed=1)  # another word for 1
    write_run(tmp_path / "float", method="float", bits=3)
    (task,) = arrange(read_runs([tmp_path]))
    assert [panel.label for panel in task.panels] == ["1 bit (binary)", "2 bits (ternary)", "3 bits (linear3)"]
    assert all(labels(panel) == ["float32", "LAQ", "BLAQ"] for panel in task.panels)
    assert task.panels[0].variants[1].seeds == (0, 1)


def test_settings_that_differ_are_in_the_label_and_those_not_read_are_not(tmp_path: Path, write_run: WriteRun) -> None:
    for a in (0.6, 0.8):
        for period in (1, 5):
            write_run(tmp_path / f"blaq-{a}-{period}", method="blaq", a=a, period=period)
    write_run(tmp_path / "laq-0", a=0.3)
    write_run(tmp_path / "laq-1", a=0.4, seed=1)  # LAQ does not read a
    (task,) = arrange(read_runs([tmp_path]))
    (panel,) = task.panels
    assert labels(panel) == [
        "LAQ", "BLAQ, a = 0.6, m = 1", "BLAQ, a = 0.6, m = 5", "BLAQ, a = 0.8, m = 1", "BLAQ, a = 0.8, m = 5",
    ]  # fmt: skip
    assert dict(panel.varied) == {"optim.a": (0.6, 0.8), "optim.period": (1, 5)}


def test_lengths_that_follow_from_the_settings_are_not_named(tmp_path: Path, write_run: WriteRun) -> None:
    for period, epochs in ((1, 10), (5, 16)):
        write_run(tmp_path / f"blaq-{period}", method="blaq", period=period, epochs=epochs)
    for epochs in (10, 20):
        write_run(tmp_path / f"laq-{epochs}", epochs=epochs)
    ((panel,),) = [task.panels for task in arrange(read_runs([tmp_path]))]
    assert labels(panel) == ["LAQ, epochs = 10", "LAQ, epochs = 20", "BLAQ, m = 1", "BLAQ, m = 5"]


def test_a_setting_that_is_not_the_methods_makes_panels(tmp_path: Path, write_run: WriteRun) -> None:
    for granularity in ("tensor", "channel"):
        for method in ("laq", "blaq"):
            write_run(tmp_path / f"{method}-{granularity}", method=method, granularity=granularity)
    (task,) = arrange(read_runs([tmp_path]))
    assert sorted(panel.label for panel in task.panels) == [
        "1 bit (binary), granularity = channel", "1 bit (binary), granularity = tensor",
    ]  # fmt: skip
    assert all(labels(panel) == ["LAQ", "BLAQ"] for panel in task.panels)


def test_a_rule_that_some_runs_have_makes_panels(tmp_path: Path, write_run: WriteRun) -> None:
    for name, rules in (("without", {}), ("with", {"fc1": "float"})):
        for method in ("float", "laq"):
            write_run(tmp_path / name / method, method=method, rules=rules, seed=len(rules))
    (task,) = arrange(read_runs([tmp_path / "without", tmp_path / "with"]))
    assert [panel.label for panel in task.panels] == ["1 bit (binary), fc1: no rule", "1 bit (binary), fc1: float"]
    assert [labels(panel) for panel in task.panels] == [["float32", "LAQ"]] * 2  # float reads no rules


def test_rules_are_called_by_their_pattern_and_what_they_state(tmp_path: Path, write_run: WriteRun) -> None:
    made = (
        {"fc1": RuleConfig(bits=4)},
        {"fc1": "linear4"},  # the same in other words
        {"fc2": RuleConfig(bits=4)},
        {"fc1.weight": RuleConfig(bits="float"), "fc2.weight": RuleConfig(granularity="channel", solver="exact")},
    )
    for seed, rules in enumerate(made):
        write_run(tmp_path / f"{seed}", seed=seed, rules=rules)
    (task,) = arrange(read_runs([tmp_path]))
    rest = {panel.label.removeprefix("1 bit (binary), "): panel.variants[0].seeds for panel in task.panels}
    assert rest == {
        "fc1: 4 bits (linear4), fc1.weight: no rule, fc2: no rule, fc2.weight: no rule": (0, 1),
        "fc2: 4 bits (linear4), fc1: no rule, fc1.weight: no rule, fc2.weight: no rule": (2,),
        "fc1.weight: float, fc2.weight: granularity = channel and solver = exact, fc1: no rule, fc2: no rule": (3,),
    }


def test_rules_in_another_order_are_other_runs(tmp_path: Path, write_run: WriteRun) -> None:
    orders = ({"fc*": 2, "fc1": "float"}, {"fc1": "float", "fc*": 2})  # the first that matches wins
    for name, rules in enumerate(orders):
        write_run(tmp_path / f"{name}", rules=rules)
    write_run(tmp_path / "float", method="float", rules=orders[0])
    (task,) = arrange(read_runs([tmp_path]))
    assert [panel.label for panel in task.panels] == [
        "1 bit (binary), rules in the order fc*, fc1", "1 bit (binary), rules in the order fc1, fc*",
    ]  # fmt: skip
    assert [labels(panel) for panel in task.panels] == [["float32", "LAQ"]] * 2
    write_run(tmp_path / "plain", rules={})
    (task,) = arrange(read_runs([tmp_path]))
    assert [panel.label for panel in task.panels][-1] == "1 bit (binary), fc*: no rule, fc1: no rule"
    assert "rules: fc* before fc1, fc1 before fc*" in _differences(task)


def test_a_float_run_of_another_network_stands_apart(tmp_path: Path, write_run: WriteRun, recipe: Recipe) -> None:
    larger = replace(
        recipe, model=replace(recipe.model, options={"inputs": 64})
    )  # hidden layers as the network has them
    for seed in range(2):
        write_run(tmp_path / f"laq-{seed}", seed=seed)
        write_run(tmp_path / f"float-{seed}", method="float", seed=seed)
        write_run(tmp_path / f"larger-{seed}", method="float", seed=seed, recipe=larger)
    (task,) = arrange(read_runs([tmp_path]))
    assert {panel.label: labels(panel) for panel in task.panels} == {
        "hidden = none": ["float32"], "hidden = (16,), 1 bit (binary)": ["float32", "LAQ"],
    }  # fmt: skip


def test_a_equal_to_one_is_laq(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a", method="blaq", a=1.0)
    write_run(tmp_path / "b", method="blaq", a=0.9)
    write_run(tmp_path / "c", method="past", a=1.0)  # which is not: its gradient is at the trial point
    ((panel,),) = [task.panels for task in arrange(read_runs([tmp_path]))]
    assert [variant.label for variant in panel.controls] == ["BLAQ, a = 1"]


def test_other_data_are_another_task(tmp_path: Path, write_run: WriteRun, recipe: Recipe) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", recipe=replace(recipe, title="other", data=replace(recipe.data, source="mnist")))
    assert [task.title for task in arrange(read_runs([tmp_path]))] == ["Digits: a small perceptron", "other"]


def test_unfinished_runs_stand_aside(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, finished=False)
    (task,) = arrange(read_runs([tmp_path]))
    assert [run.name for run in task.unfinished] == ["b"]
    assert task.panels[0].variants[0].seeds == (0,)


def test_a_seed_does_not_count_twice(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(ValueError, match=r"'a' and 'b' are the same run \(LAQ, seed 0\); leave one out"):
        arrange(read_runs([tmp_path]))


def test_bands_are_means_and_sample_deviations(tmp_path: Path, write_run: WriteRun) -> None:
    losses = [[0.9, 0.5, 0.25], [0.8, 0.3, 0.2], [0.7, 0.6, 0.3]]
    for seed, loss in enumerate(losses):
        write_run(tmp_path / f"s{seed}", seed=seed, epochs=3, loss=loss, zigzag_rate=0.1 * (seed + 1))
    ((panel,),) = [task.panels for task in arrange(read_runs([tmp_path]))]
    band = panel.variants[0].band("train_loss")
    columns = list(zip(*losses, strict=True))
    assert band.mean.tolist() == pytest.approx([statistics.fmean(column) for column in columns])
    assert band.sd.tolist() == pytest.approx([statistics.stdev(column) for column in columns])
    assert band.axes["gradient_evaluations"].tolist() == [6, 12, 18]
    assert band.runs == 3
    zigzag = panel.variants[0].zigzag_band("zigzag_rate")
    assert zigzag is not None and zigzag.sd.tolist() == pytest.approx([0.1] * 3)
    assert panel.variants[0].zigzag_band("gradient_error") is None
