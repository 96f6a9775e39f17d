"""The pages of evidence: the statistics against independent formulas, the pages against folders of known numbers."""

import csv
import importlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import permutations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from blaq.train.config import OptimConfig, ProbeConfig, Recipe, load_recipe
from blaq.train.directory import RunDirectory
from blaq.train.run import Result, read_result
from blaq.zigzag import Measures

ROOT = Path(__file__).parents[1]
LAYERS = ("fc1.weight", "fc2.weight")

Module = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.evidence.{name}")


# --- statistics -------------------------------------------------------------------------------------------------------


def least_squares(values: np.ndarray) -> tuple[float, float]:
    """F of the settings and the residual sum of squares, by two linear models with indicator columns."""
    settings, seeds = values.shape
    rows = [(i, j) for i in range(settings) for j in range(seeds)]
    of_seed = np.array([[float(j == k) for k in range(seeds)] for _, j in rows])
    of_setting = np.array([[float(i == k) for k in range(settings)] for i, _ in rows])
    y = values.ravel()

    def rest(design: np.ndarray) -> float:
        return float(np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).sum())

    small, full = rest(of_seed), rest(np.hstack([of_seed, of_setting]))
    freedom = (settings - 1) * (seeds - 1)
    return ((small - full) / (settings - 1)) / (full / freedom), full


def test_f_and_the_noise_are_those_of_linear_models(module: Module) -> None:
    values = np.random.default_rng(1).normal(size=(5, 3)) + np.array([3.0, -2.0, 0.0])
    found = module("noise").noise_of(values, deals=50)
    f, full = least_squares(values)
    assert found.f[0] == pytest.approx(f)
    assert found.f[1] == pytest.approx(stats.f.sf(f, 4, 8))
    assert found.noise_spread == pytest.approx(math.sqrt(full / 8 / 3))
    assert found.seed_sd == pytest.approx(math.sqrt(np.mean([np.var(row, ddof=1) for row in values])))
    # Adding a constant to a seed changes nothing of what is said about settings.
    shifted = module("noise").noise_of(values + np.array([0.0, 10.0, 0.0]), deals=50)
    assert (shifted.f[0], shifted.p) == (pytest.approx(found.f[0]), found.p)


def test_the_permutation_test_is_that_of_all_deals(module: Module) -> None:
    values = np.array([[1.0, 2.0, 1.5], [2.0, 2.5, 2.4], [1.2, 2.6, 3.0]])
    spreads = [
        np.stack([values[list(order), j] for j, order in enumerate(orders)], axis=1).mean(axis=1).std()
        for orders in product(permutations(range(3)), repeat=3)
    ]
    exact = np.mean(np.array(spreads) >= values.mean(axis=1).std() * (1 - 1e-12))
    assert module("noise").noise_of(values).p == pytest.approx(exact, abs=0.02)


def test_where_no_deal_can_tell_f_answers(module: Module) -> None:
    noise = module("noise")
    values = np.array([[1.0, 1.1], [2.0, 2.05], [3.0, 3.2]])
    found = noise.noise_of(values)
    assert found.smallest == pytest.approx(1 / 6)  # six deals of the second seed to what the first is dealt to
    assert found.p == pytest.approx(found.smallest, abs=0.01)
    assert not found.dealt and found.f[1] < 0.01 and found.beyond
    assert not noise.noise_of(np.array([[1.0, 2.0], [2.0, 1.0], [1.4, 1.5]])).beyond
    assert noise.noise_of(np.repeat(values, 2, axis=0) + np.arange(6.0)[:, None]).dealt  # 6!


@pytest.mark.parametrize("seeds", [2, 3])
def test_settings_that_are_the_same_have_no_f(module: Module, seeds: int) -> None:
    values = np.tile([0.1, 0.7, 0.3][:seeds], (3, 1))
    values[0] += 1e-16  # rounding
    found = module("noise").noise_of(values, deals=200)
    assert math.isnan(found.f[0])
    assert (found.f[1], found.p, found.beyond) == (1, 1, False)


def test_without_noise_there_is_no_f(module: Module) -> None:
    found = module("noise").noise_of(np.array([[0.1, 1.1], [0.7, 1.7], [0.3, 1.3]]), deals=200)
    assert math.isnan(found.f[0])
    assert (found.f[1], found.beyond) == (1, False)  # nor can two seeds tell by permutation


def test_noise_alone_is_called_an_effect_as_often_as_stated(module: Module) -> None:
    noise, generator = module("noise"), np.random.default_rng(0)
    found = [noise.noise_of(generator.normal(size=(6, 3)) + generator.normal(size=3), deals=200) for _ in range(300)]
    assert 0.02 < np.mean([one.beyond for one in found]) < 0.09
    assert np.mean([one.f[1] < 0.05 for one in found]) == pytest.approx(0.05, abs=0.03)
    wider = [one.range > one.noise_range_most for one in found]
    assert 0.02 < np.mean(wider) < 0.15  # the noise is itself estimated, from 10 degrees of freedom
    effect = np.arange(6)[:, None] * 1.5
    assert noise.noise_of(generator.normal(size=(6, 3)) + effect).beyond


def test_pooled_p_is_that_of_the_linear_model(module: Module) -> None:
    values = np.random.default_rng(2).normal(size=(4, 3))
    _, full = least_squares(values)
    error = math.sqrt(2 * full / 6 / 3)
    expected = [2 * stats.t.sf(abs(row.mean() - values[1].mean()) / error, 6) for row in values]
    assert module("noise").pooled_p(values, 1) == pytest.approx(expected)
    assert module("noise").pooled_p(np.ones((3, 2)), 0) == [1.0, 1.0, 1.0]


def test_rank_correlation_within_groups(module: Module) -> None:
    noise, generator = module("noise"), np.random.default_rng(3)
    x, y = generator.normal(size=12), generator.normal(size=12)
    rho, p, within = noise.rank_correlation(x, y, [0] * 12)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert p == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.05)
    # A connection that is between the groups alone does not count.
    groups = np.repeat(np.arange(6), 4)
    x, y = (10 * groups + generator.normal(size=24) for _ in range(2))
    rho, p, within = noise.rank_correlation(x, y, groups.tolist())
    assert rho > 0.8
    assert p > 0.05
    assert noise.rank_correlation(x, x, groups.tolist())[1] < 0.001
    # One that is reversed within them is told as such.
    x, y = 10.0 * groups + np.tile(np.arange(4), 6), 10.0 * groups + np.tile(np.arange(4)[::-1], 6)
    rho, p, within = noise.rank_correlation(x, y, groups.tolist())
    assert rho > 0.8
    assert p < 0.001
    assert within < 0
    assert math.isnan(noise.rank_correlation(np.ones(5), np.arange(5.0), [0] * 5)[0])


def test_the_sign_test(module: Module) -> None:
    assert module("noise").sign_test(10, 0) == pytest.approx(2 / 2**10)
    assert module("noise").sign_test(0, 0) == 1


# --- pages ------------------------------------------------------------------------------------------------------------


def write_run(
    path: Path, recipe: Recipe, *, train_loss: float, test_error: float, oscillation: float | None = None
) -> None:
    """A finished run of two epochs of 10 steps; its first epoch ends with twice the loss."""
    path.mkdir(parents=True)
    optim, seed = recipe.optim, recipe.train.seed
    each = 2 if optim.method == "blaq" else 1
    (path / "recipe.toml").write_text(recipe.to_toml())
    (path / "versions.json").write_text(json.dumps({"python": "3.11.2", "torch": "2.13.0", "threads": 1}))
    metrics = [
        {"epoch": e, "steps": 10 * e, "gradient_evaluations": 10 * each * e, "seconds": 1.0 * e, "train_loss": loss}
        for e, loss in ((1, 2 * train_loss), (2, train_loss))
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    result = {
        "recipe": recipe.name, "method": optim.method, "bits": optim.bits if optim.method != "float" else "float", "seed": seed,
        "epochs": 2, "steps": 20, "gradient_evaluations": 20 * each, "seconds": 2.0, "train_loss": train_loss,
        "train_error": 1.0, "validation_loss": 0.1, "validation_error": 2.0, "best_epoch": 2, "test_loss": test_error / 10,
        "test_error": test_error, "test_loss_last": 0.2, "test_error_last": 2.0, "parameters": 1000, "bytes": 125,
        "float_bytes": 4000, "peak_memory": 400_000_000 * each,
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))
    if oscillation is not None:
        rows = [
            {"epoch": epoch, "steps": 10 * epoch, "gradient_evaluations": 10, "layer": layer,
             **dict.fromkeys(Measures.__dataclass_fields__, 0.5),
             "oscillation_frequency": oscillation * (10 if epoch == 1 else 1), "flip_rate": 0.1 + 0.001 * seed}
            for epoch in (1, 2) for layer in (*LAYERS, "total")
        ]  # fmt: skip
        (path / "zigzag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_folder(path: Path, recipe: Recipe, design: dict[str, Any], failures: dict[str, str] | None = None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.toml").write_text(recipe.to_toml())
    (path / "comparison.json").write_text(json.dumps(design))
    directories = [RunDirectory(run) for run in sorted((path / "runs").iterdir())] if (path / "runs").exists() else []
    with (path / "results.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *Result.__dataclass_fields__, "optim.lr", *design.get("sets", {})])
        for directory in directories:
            result, optim = read_result(directory), load_recipe(directory.recipe_file).optim
            varied = [getattr(optim, key.removeprefix("optim.")) for key in design.get("sets", {})]
            writer.writerow([directory.path.name, *asdict(result).values(), optim.lr, *varied])
    (path / "results.json").write_text(json.dumps({"runs": [], "failures": failures or {}}))


def with_(recipe: Recipe, seed: int, **optim: Any) -> Recipe:
    return replace(recipe, optim=replace(recipe.optim, **optim), train=replace(recipe.train, seed=seed))


DEMO = replace(load_recipe("demo", ["train.epochs=2"]), probes=ProbeConfig(every=10))
SEEDS = (0, 1, 2)


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """BLAQ 1.0 points ahead of LAQ with a third of its oscillation, delayed level; past lacks a run, 2 bits are a copy."""
    path = tmp_path / "demo-steps"
    for bits, seed in product((1, 2), SEEDS):
        jitter = (0.03, -0.02, 0.01)[seed]
        made = {
            "float": (0.1, 2.0 + 0.1 * seed, None), "laq": (0.4, 4.0 + 0.1 * seed, 0.003),
            "blaq": (0.3, 3.0 + 0.1 * seed + jitter, 0.001), "delayed": (0.4, 4.0 + 0.1 * seed + jitter, 0.003 + jitter / 100),
        }  # fmt: skip
        for method, (loss, error, oscillation) in made.items():
            name = "float" if method == "float" else f"{method}-b{bits}"
            run = path / "runs" / f"{name}-s{seed}"
            if not run.exists():
                lr = 0.003 if method == "delayed" else 0.01
                recipe = with_(DEMO, seed, method=method, bits=bits, lr=lr)
                write_run(run, recipe, train_loss=loss + jitter / 50, test_error=error, oscillation=oscillation)
    design = {
        "kind": "compare", "recipe": "demo", "methods": ["float", "laq", "blaq", "past", "delayed"], "bits": [1, 2],
        "seeds": list(SEEDS), "budget": "steps", "rates": [0.003, 0.01, 0.03], "tune_seeds": 1, "target": None,
    }  # fmt: skip
    write_folder(path, DEMO, design, {"past-b1-s0": "diverged"})
    with (path / "tuning.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "lr", "seeds", "validation_error", "validation_loss", "chosen"])
        for name in ("float", "laq-b1", "laq-b2", "blaq-b1", "blaq-b2", "delayed-b1", "delayed-b2"):
            for lr in (0.003, 0.01, 0.03):
                writer.writerow([name, lr, 1, 2.0, 0.1, lr == (0.003 if "delayed" in name else 0.01)])
    return path


def write_ablation(path: Path, effect: float) -> None:
    noise = np.random.default_rng(5).normal(size=(2, 4, 3))
    for (i, period), (j, a), seed in product(enumerate((1, 2)), enumerate((0.3, 0.6, 0.9, 1.0)), SEEDS):
        # a = 1 is the same training for every period
        error = 3.0 + (0.2 * noise[0 if a == 1 else i, j, seed]) + effect * (1 - a)
        recipe = with_(DEMO, seed, a=a, period=period)
        write_run(path / "runs" / f"a{a}-period{period}-s{seed}", recipe, train_loss=error / 10, test_error=error)
    write_folder(path, DEMO, ablate_design(SEEDS, {"optim.a": ["0.3", "0.6", "0.9", "1"], "optim.period": ["1", "2"]}))


def ablate_design(seeds: Iterable[int], sets: dict[str, list[str]]) -> dict[str, Any]:
    return {"kind": "ablate", "recipe": "demo", "seeds": list(seeds), "budget": "steps", "target": None, "sets": sets}


def make(module: Module, out: Path, *arguments: str) -> str:
    module("__main__").main([*arguments, "--out", str(out)])
    return flat((out / "README.md").read_text())


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_pages_of_a_comparison_say_what_is_in_it(module: Module, compared: Path, tmp_path: Path) -> None:
    front = make(module, tmp_path / "out", "--compare", str(compared))
    assert "beyond noise blaq ahead in 2 of 2 (demo at 1 bit and demo at 2 bits). (Own intervals" in front
    assert "delayed ahead" not in front and "delayed behind" not in front
    methods = flat((tmp_path / "out" / "methods.md").read_text())
    assert "**1 bit**. Test error: ahead beyond noise: blaq by 0.99; not told apart from LAQ: delayed." in methods
    assert "| 1 | blaq | 0.01 | 20 | 40 | 3.11 ± 0.09 | -0.99 ± 0.06 |" in methods
    assert "| 1 | delayed | 0.003 (edge) |" in methods
    assert "at the edge of the grid, so that a better one may lie outside: delayed-b1, delayed-b2." in methods
    assert "Failed: past-b1-s0 (diverged)." in methods
    assert "train.epochs 2 (not 30)" in methods
    assert "## demo, shortened, equal steps" in methods  # the title of the recipe tells what the runs were not
    assert "epoch.md" not in (tmp_path / "out" / "cost.md").read_text()  # nothing was timed


def test_the_zigzag_is_that_of_the_second_half(module: Module, compared: Path, tmp_path: Path) -> None:
    front = make(module, tmp_path / "out", "--compare", str(compared))
    # Seed by seed exactly -0.002: a difference without spread has no interval, and nothing is called.
    assert "**blaq**: the oscillation frequency is lower than LAQ's beyond its own interval in 0 of 2 cells" in front
    page = (tmp_path / "out" / "zigzag.md").read_text()
    assert "| total | 0.003 | -67 % | +2 % |" in page
    assert "demo, 1 bit, **delayed** (another learning rate than LAQ's)" in flat(page)
    with (tmp_path / "out" / "zigzag.csv").open() as file:
        rows = [
            row for row in csv.DictReader(file) if (row["method"], row["seed"], row["layer"]) == ("laq", "0", "total")
        ]
    assert [(row["half"], row["oscillation_frequency"]) for row in rows] == 2 * [("first", "0.03"), ("second", "0.003")]


def test_costs_to_equal_loss(module: Module, compared: Path, tmp_path: Path) -> None:
    options = dict(DEMO.model.options)
    times = [("float", "32", "-", 1.1), ("blaq", "1", "alternating", 2.2), ("laq", "1", "exact", 9.0)]
    entry = {"model": "mlp", "options": options, "batch": 50, "rows": [
        {"method": method, "bits": bits, "solver": solver, "ratio": ratio, "target": 2.05 if method == "blaq" else None}
        for method, bits, solver, ratio in times
    ]}  # fmt: skip
    (tmp_path / "epoch.json").write_text(json.dumps({"recipes": {"demo": entry}}))
    front = make(module, tmp_path / "out", "--compare", str(compared), "--epoch", str(tmp_path / "epoch.json"))
    assert "A step of demo over AdamW's: float 1.10, blaq 2.20 (target 2.05), laq 9.00." in front
    with (tmp_path / "out" / "cost.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["group"] == "1"}
    # The target is what the worst run reached, 0.4006; float's first epoch ends at 0.2, the others' at 0.6 and 0.8.
    assert {name: float(row["steps_to_target"]) for name, row in rows.items()} == {
        "float": 10, "laq": 20, "blaq": 20, "delayed": 20,
    }  # fmt: skip
    assert float(rows["blaq"]["gradients_over_float"]) == 4
    assert float(rows["blaq"]["memory_over_float"]) == 2
    assert float(rows["blaq"]["time_over_float"]) == pytest.approx(20 * 2.2 / (10 * 1.1))
    assert rows["laq"]["time_over_float"] == ""  # timed with another solver alone
    (tmp_path / "epoch.json").write_text(json.dumps({"recipes": {"other": entry | {"batch": 51}}}))
    make(module, tmp_path / "out", "--compare", str(compared), "--epoch", str(tmp_path / "epoch.json"))
    with (tmp_path / "out" / "cost.csv").open() as file:
        assert {row["step_over_adamw"] for row in csv.DictReader(file)} == {""}


def test_equal_gradients_stay_apart_from_equal_steps(module: Module, compared: Path, tmp_path: Path) -> None:
    design_file = compared / "comparison.json"
    design = json.loads(design_file.read_text())
    design_file.write_text(json.dumps(design | {"budget": "gradients", "rates": []}))
    (compared / "tuning.csv").unlink()
    make(module, tmp_path / "out", "--compare", str(compared))
    assert not (tmp_path / "out" / "zigzag.md").exists()
    methods = flat((tmp_path / "out" / "methods.md").read_text())
    assert "equal gradient evaluations" in methods
    assert "One learning rate for all methods" in methods


@pytest.mark.parametrize(
    ("effect", "answer"), [(0.0, "not shown; the 7 settings do not"), (3.0, "yes; the 7 settings")]
)
def test_an_ablation_tells_an_effect_from_noise(module: Module, tmp_path: Path, effect: float, answer: str) -> None:
    write_ablation(tmp_path / "ablation", effect)
    front = make(module, tmp_path / "out", "--ablation", str(tmp_path / "ablation"))
    assert f"**Test error**: {answer}" in front
    page = flat((tmp_path / "out" / "ablation.md").read_text())
    assert "a = 1 (LAQ) gave the same numbers for every m, as it must; it is counted once." in page
    _, error, loss = page.split("Against a = 1, ")
    higher = [int(part.split(" settings are lower and ")[1].split(" higher")[0]) for part in (error, loss)]
    assert error.startswith("0 of 6") and loss.startswith("0 of 6")
    assert higher[0] == higher[1] == (0 if effect == 0 else 4)  # 0.3 points, at a = 0.9, are within the noise
    assert "--set optim.a=0.3,0.6,0.9,1 --set optim.period=1,2" in page


def write_small_ablation(path: Path, seeds: int, errors: dict[float, float]) -> None:
    for (a, error), seed in product(errors.items(), range(seeds)):
        recipe = with_(DEMO, seed, a=a)
        error += (0.0, 0.1)[seed] * (1 + a)
        write_run(path / "runs" / f"a{a}-s{seed}", recipe, train_loss=error / 10, test_error=error)
    write_folder(path, DEMO, ablate_design(range(seeds), {"optim.a": [str(a) for a in errors]}))


def test_an_ablation_of_few_seeds_is_answered_by_f(module: Module, tmp_path: Path) -> None:
    write_small_ablation(tmp_path / "ablation", 2, {0.5: 2.0, 0.75: 3.0, 1.0: 4.0})
    front = make(module, tmp_path / "out", "--ablation", str(tmp_path / "ablation"))
    assert (
        "**Test error**: yes; the 3 settings differ beyond seed noise (F, p < 0.001; so few seeds cannot tell by permutation: "
        "its p is at least 0.17)." in front
    )
    assert "a < 1: F, p = 0.0" in front
    assert "Of a < 1 the lowest mean has a = 0.5, m = 1." in front


def test_what_a_corrected_difference_shows_is_not_called_chance(module: Module) -> None:
    page, noise = module("ablation"), module("noise")
    values = np.random.default_rng(0).normal(size=(6, 3))
    row, difference = page.Row(0.5, 1, ()), module("ablation").Difference((-1.0, -1.1, -0.9))
    for p, chance in ((0.01, False), (0.5, True)):
        finding = page.Finding(
            "test_error", "Test error", " %", 2, {"all": noise.noise_of(values)}, [(row, difference, p)]
        )
        assert "not shown; the 6 settings do not differ" in finding.sentence()
        assert ("is chance" in finding.sentence()) == chance


def test_an_ablation_of_one_seed_has_means_and_no_tests(module: Module, tmp_path: Path) -> None:
    write_small_ablation(tmp_path / "ablation", 1, {0.5: 2.0, 0.75: 3.0, 1.0: 4.0})
    front = make(module, tmp_path / "out", "--ablation", str(tmp_path / "ablation"))
    assert (
        "**Test error**: not tested; one seed shows no noise. Of a < 1 the lowest mean has a = 0.5, m = 1 (-2.000 % against "
        "a = 1)." in front
    )
    page = (tmp_path / "out" / "ablation.md").read_text()
    assert "| 0.75 | 3.000 |" in page and "| 0.5 | 1 | -2.000 | - |" in page
    assert "permutation" not in page and "nan" not in page


def test_an_ablation_with_holes_and_a_wrong_control_says_so(module: Module, tmp_path: Path) -> None:
    path = tmp_path / "ablation"
    write_ablation(path, 0.0)
    (path / "runs" / "a0.3-period2-s1" / "result.json").unlink()
    result = path / "runs" / "a1.0-period2-s0" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"train_loss": 9.0}))
    make(module, tmp_path / "out", "--ablation", str(path))
    page = flat((tmp_path / "out" / "ablation.md").read_text())
    assert "Left out for want of a seed: a = 0.3, m = 2." in page
    assert "Not finished: a0.3-period2-s1." in page
    assert "did NOT give the same numbers for every m" in page


def test_raw_results_and_the_command_are_copied(module: Module, compared: Path, tmp_path: Path) -> None:
    make(module, tmp_path / "out", "--compare", str(compared))
    copied = tmp_path / "out" / "demo-steps"
    assert {path.name for path in copied.iterdir()} == {
        "results.csv", "recipe.toml", "comparison.json", "tuning.csv", "versions.json", "command.txt", "unfinished.json",
    }  # fmt: skip
    command = (copied / "command.txt").read_text()
    assert command == (
        "blaq compare demo --methods float,laq,blaq,past,delayed --bits 1,2 --lr 0.003,0.01,0.03 --budget steps --seeds 3 "
        "--set train.epochs=2 --set probes.every=10 --out runs/demo-steps\n"
    )


def test_pages_can_be_written_anew_from_what_they_left(module: Module, compared: Path, tmp_path: Path) -> None:
    write_ablation(tmp_path / "ablation", 1.0)
    before, after = tmp_path / "before", tmp_path / "after"
    make(module, before, "--ablation", str(tmp_path / "ablation"), "--compare", str(compared))
    make(module, after, "--ablation", str(before / "ablation"), "--compare", str(before / compared.name))
    names = [str(path.relative_to(before)) for path in before.rglob("*") if path.is_file()]
    assert len(names) > 15
    for name in set(names) - {"README.md"}:  # which states the command
        assert (after / name).read_text() == (before / name).read_text(), name
    front = [(out / "README.md").read_text().split("Computed with")[1] for out in (before, after)]
    assert front[0] == front[1]
    # In place: what is read is not lost.
    make(module, after, "--ablation", str(after / "ablation"), "--compare", str(after / compared.name))
    assert (after / "methods.md").read_text() == (before / "methods.md").read_text()


def test_choices_at_the_edge_can_be_tried_beyond_it(module: Module, compared: Path, tmp_path: Path) -> None:
    wider = compared / "wider"
    design = json.loads((compared / "comparison.json").read_text())
    write_folder(wider, DEMO, design | {"methods": ["delayed"], "rates": [0.001, 0.003]})
    rows = [("delayed-b1", 0.001, 5.0), ("delayed-b1", 0.003, 2.0)]
    with (wider / "tuning.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "lr", "seeds", "validation_error", "validation_loss", "chosen"])
        writer.writerows([name, lr, 1, error, 0.1, error == 2] for name, lr, error in rows)
    out = tmp_path / "out"
    make(module, out, "--compare", str(compared))
    methods = flat((out / "methods.md").read_text())
    assert "| 1 | delayed | 0.003 |" in methods
    assert "| 2 | delayed | 0.003 (edge) |" in methods
    assert (
        "so that a better one may lie outside: delayed-b2. Beyond the edge, by validation error in wider/tuning.csv: "
        "delayed-b1 2 at 0.003, 5 at 0.001." in methods
    )
    commands = (out / "demo-steps" / "command.txt").read_text().splitlines()
    assert "--methods delayed --bits 1,2 --lr 0.001,0.003" in commands[1]
    assert commands[1].endswith("--out runs/demo-steps/wider")
    make(module, out, "--compare", str(out / "demo-steps"))
    assert flat((out / "methods.md").read_text()) == methods
    (wider / "tuning.csv").write_text((wider / "tuning.csv").read_text().replace(",5.0,", ",1.0,"))
    make(module, out, "--compare", str(compared))
    assert "delayed-b1 2 at 0.003, 1 at 0.001 (BETTER)." in flat((out / "methods.md").read_text())


def test_what_is_no_comparison_is_refused(module: Module, compared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no comparison\.json"):
        make(module, tmp_path / "out", "--compare", str(tmp_path / "empty"))
    (compared / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has no runs, and no cost\.csv beside it; name the folder of the runs"):
        make(module, tmp_path / "out", "--compare", str(compared))
    with pytest.raises(ValueError, match="is a folder of blaq compare, expected one of blaq ablate"):
        make(module, tmp_path / "out", "--ablation", str(compared))


def test_unknown_recipes_are_repeated_from_their_copy(module: Module, compared: Path) -> None:
    own = replace(DEMO, name="mine", optim=OptimConfig(lr=0.02))
    (compared / "recipe.toml").write_text(own.to_toml())
    folder = module("folders").read_folder(compared, "compare")
    assert folder.command().startswith("blaq compare docs/results/evidence/demo-steps/recipe.toml --methods")
    assert folder.shortened() == ""
