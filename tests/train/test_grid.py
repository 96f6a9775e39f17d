"""The grid of an ablation: which values a text stands for, and which runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.grid import combinations, parse_values

RECIPE = Recipe(
    name="tiny",
    title="",
    data=DataConfig(source="digits"),
    model=ModelConfig(name="mlp"),
    optim=OptimConfig(),
    train=TrainConfig(epochs=10, seed=3),
)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.a=0:1:0.1", ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        ("optim.a=1:0:-0.5", ["1", "0.5", "0"]),
        ("optim.period=1:10:3", ["1", "4", "7", "10"]),
        ("optim.period=10:30:10", ["10", "20", "30"]),
        ("optim.lr=1e-4:3e-4:1e-4", ["0.0001", "0.0002", "0.0003"]),
        ("optim.a=0.5, 0.7:0.8:0.1", ["0.5", "0.7", "0.8"]),
        ("optim.bits=1,ternary2", ["1", "ternary2"]),
        ('optim.rules.fc*={bits=2, solver="exact"},float', ['{bits=2, solver="exact"}', "float"]),
        ("data.source='a,b',c", ["'a,b'", "c"]),
        ("model.name=hf:llama", ["hf:llama"]),
        ("optim.a=0.3", ["0.3"]),
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert parse_values(text) == (text.partition("=")[0], values)


@given(start=st.integers(-50, 50), step=st.integers(1, 20), count=st.integers(0, 60), digits=st.integers(0, 6))
def test_a_range_counts_exactly(start: int, step: int, count: int, digits: int) -> None:
    """Integers scaled by a power of ten: what the texts mean is known without any floating point."""

    def text(number: int) -> str:
        sign, size = "-" if number < 0 else "", str(abs(number)).rjust(digits + 1, "0")
        whole, fraction = size[: len(size) - digits], size[len(size) - digits :].rstrip("0")
        return f"{sign}{whole}{'.' if fraction else ''}{fraction}"

    written = f"k={text(start)}:{text(start + count * step)}:{text(step)}"
    expected = [text(start + number * step) for number in range(count + 1)]
    assert parse_values(written)[1] == ["0" if value == "-0" else value for value in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.a", "expected key=value"),
        ("=1", "expected key=value"),
        ("optim.a=0.1,,0.2", "expected key=value"),
        ("optim.a=0.1,0.2,0.1", "each value once"),
        ("optim.a=0.1:0.3:0.1,0.2", "each value once"),
        ("optim.a=0:1:0.3", "whole steps reach"),
        ("optim.a=0:1:-0.1", "whole steps reach"),
        ("optim.a=0:1:0", "step not 0"),
        ("optim.a=0:one:0.1", "three numbers"),
        ("optim.a=0:1:1e-9", "fewer than 10000"),
        ("optim.a=0:inf:1", "whole steps reach"),
    ],
)
def test_what_is_no_grid_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_values(text)


def test_every_combination_and_seed_is_a_run() -> None:
    jobs = combinations(RECIPE, {"optim.a": ["0", "0.3", "1"], "optim.period": ["1", "5"]}, [3, 4])
    assert [job.name for job in jobs[:5]] == [
        "a0-period1-s3", "a0-period1-s4", "a0-period5-s3", "a0-period5-s4", "a0.3-period1-s3",
    ]  # fmt: skip
    assert len({job.name for job in jobs}) == 12
    assert {(job.recipe.optim.a, job.recipe.optim.period, job.recipe.train.seed) for job in jobs} == {
        (a, period, seed) for a in (0, 0.3, 1) for period in (1, 5) for seed in (3, 4)
    }
    assert jobs[4].settings == {"optim.a": "0.3", "optim.period": "1"}


def test_what_a_method_does_not_read_makes_no_further_runs() -> None:
    jobs = combinations(RECIPE, {"optim.a": ["0.5", "0.7"], "optim.method": ["laq", "blaq"]}, [0])
    assert [job.name for job in jobs] == ["methodlaq-s0", "a0.5-methodblaq-s0", "a0.7-methodblaq-s0"]
    assert jobs[0].settings == {"optim.a": "", "optim.method": "laq"}
    assert jobs[0].recipe.optim.a == RECIPE.optim.a


def test_quotes_are_no_part_of_a_text() -> None:
    jobs = combinations(RECIPE, {"optim.method": ['"laq"', "'blaq'"], "optim.a": ["0.5", "0.7"]}, [0])
    assert [job.name for job in jobs] == ["methodlaq-s0", "methodblaq-a0.5-s0", "methodblaq-a0.7-s0"]
    assert jobs[0].settings == {"optim.method": "laq", "optim.a": ""}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"optim.method": ["laq", "float"], "optim.a": ["0.5", "0.7"]}, "does not read optim.a"),
        ({"optim.a": ["0.5", "1.5"]}, "0 <= a <= 1"),
        ({"optim.aa": ["0.5", "0.7"]}, "did you mean optim.a"),
        ({"optim.period": ["1", "11"]}, "expected period <= epochs"),
        ({"optim.a": ["0.5", "0.50"]}, "two combinations are the same run"),
        ({"optim.bits": ["1", "binary"]}, "two combinations are the same run"),
        ({"optim.rules.fc1": ["4", "linear4"]}, "two combinations are the same run"),
        ({"optim.rules.fc1": ["4", "{bits = 4}"]}, "two combinations are the same run"),
        ({"optim.rules.fc1": ["4", "{bits = 4, granularity = 'tensor'}"]}, "two combinations are the same run"),
        ({"optim.method": ["laq", "lqa"]}, "did you mean 'laq'"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(sets: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combinations(RECIPE, sets, [0])


def test_names_can_be_folders_and_differ() -> None:
    sets = {
        "data.source": ["a/b", "a_b"],
        "optim.rules.fc*.weight": ["2", "float"],
        "train.gradient_clip": ["1", "none"],
    }
    jobs = combinations(RECIPE, sets, [0])
    assert len({job.name for job in jobs}) == 8
    assert not any(set(job.name) & set("/\\*\0") for job in jobs)
    double = combinations(RECIPE, {"optim.rules.a.weight": ["2", "3"], "optim.rules.b.weight": ["2", "3"]}, [0])
    assert double[1].name == "optim.rules.a.weight2-optim.rules.b.weight3-s0"
