"""Probes of runs: they change nothing, and an interrupted run leaves the same files as an uninterrupted one."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import blaq
from blaq.cli import app
from blaq.train import probes
from blaq.train.config import (
    METHODS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    Recipe,
    TrainConfig,
    load_recipe,
)
from blaq.train.directory import RunDirectory
from blaq.train.display import Display
from blaq.train.files import read_rows, write_rows
from blaq.train.run import train
from blaq.zigzag import Measures

STEPS = 6  # an epoch
RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits="ternary", lr=0.01),
    train=TrainConfig(epochs=3, threads=1),
)
EVERY_4 = ["probes.every=4", "probes.gradient_error=true"]  # no divisor of the epoch: windows cross its end


class Interruption(Display):
    """Presses Ctrl-C after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(Console(quiet=True))
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt


def checkpoint(run: Path, name: str) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict | list | tuple):
        assert len(one) == len(other), where
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.equal(other), where
    else:
        assert one == other, where


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{**row, "seconds": 0} for row in read_rows(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run with probes of every method."""
    folder = tmp_path_factory.mktemp("probed")
    for method in METHODS:
        train(RECIPE.with_([f"optim.method={method}", *EVERY_4]), folder / method, progress=False)
    return {method: folder / method for method in METHODS}


# --- they change nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_probes_ends_bit_identical_to_one_without(
    method: str, probed: dict[str, Path], tmp_path: Path
) -> None:
    train(RECIPE.with_([f"optim.method={method}"]), tmp_path / "plain", progress=False)
    assert without_times(tmp_path / "plain") == without_times(probed[method])
    results = [json.loads((run / "result.json").read_text()) for run in (tmp_path / "plain", probed[method])]
    of_the_process = {"seconds": 0, "peak_memory": 0}
    assert {**results[0], **of_the_process} == {**results[1], **of_the_process}
    for name in ("best", "last"):
        plain, other = checkpoint(tmp_path / "plain", name), checkpoint(probed[method], name)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            assert_equal(plain[part], other[part], part)
    assert not (tmp_path / "plain" / "zigzag.jsonl").exists()
    assert not (tmp_path / "plain" / "trajectories.jsonl").exists()


def test_dropout_and_statistics_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(name: str, **options: object) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 10)
        )

    monkeypatch.setattr("blaq.train.module.build_model", network)
    for name, settings in (("plain", []), ("probed", ["probes.every=1", "probes.gradient_error=true"])):
        train(RECIPE.with_(["train.epochs=2", *settings]), tmp_path / name, progress=False)
    assert without_times(tmp_path / "plain") == without_times(tmp_path / "probed")
    one, other = (checkpoint(tmp_path / name, "last")["state_dict"] for name in ("plain", "probed"))
    assert_equal(one, other)


# --- what they write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_lines_of_an_epoch(method: str, probed: dict[str, Path]) -> None:
    lines = read_rows(probed[method] / "zigzag.jsonl")
    measures = [field.name for field in fields(Measures)]
    metrics = read_rows(probed[method] / "metrics.jsonl")
    at = ("epoch", "steps", "gradient_evaluations")
    assert len(lines) == 9
    for i, line in enumerate(lines):
        assert list(line) == [*at, "layer", *measures]
        assert {key: line[key] for key in at} == {key: metrics[i // 3][key] for key in at}
    assert [line["layer"] for line in lines] == ["fc1.weight", "fc2.weight", "total"] * 3
    quantized, trial = METHODS[method].quantized, METHODS[method].trial
    for line in lines:
        assert -1 <= line["gradient_cosine"] <= 1
        assert 0 <= line["zigzag_rate"] <= 1
        assert line["path_efficiency"] > 0
        for name in ("flip_rate", "oscillation_frequency", "gradient_error"):
            assert (line[name] is not None) == quantized, name
        assert (line["trial_agreement"] is not None) == (trial != "none")
    if quantized:
        assert any(line["flip_rate"] > 0 for line in lines)
        assert all(line["gradient_error"] > 0 for line in lines)


def test_the_lines_are_those_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    """The same training in a plain loop, with the same probe."""
    from blaq.train.module import TaskModule, build_optimizer
    from blaq.train.run import load_data
    from blaq.zigzag import ZigZag

    recipe = RECIPE.with_(["optim.method=blaq", "train.epochs=2", *EVERY_4])
    train(recipe, tmp_path / "run", progress=False)
    module = TaskModule(recipe, load_data(recipe.data))
    opt = build_optimizer(module.model, recipe.optim)
    zigzag = ZigZag(opt, 4)
    rows = []
    for epoch in range(2):
        torch.manual_seed((recipe.train.seed << 24) + epoch + 1)
        module.training_batches.set_epoch(epoch)
        for inputs, targets in module.training_batches:

            def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
                opt.zero_grad()
                loss = module.loss(module.model(inputs), targets)
                loss.backward()
                return loss

            if zigzag.due:
                zigzag.probe_gradient_error(closure)
            opt.step(closure)
        rows += [{"layer": layer, **asdict(measures)} for layer, measures in zigzag.read().items()]
    written = [
        {key: row[key] for key in row if key not in ("epoch", "steps", "gradient_evaluations")}
        for row in read_rows(tmp_path / "run" / "zigzag.jsonl")
    ]
    assert written == rows


@pytest.mark.parametrize("method", METHODS)
def test_trajectories_follow_weights_onto_their_grid(method: str, probed: dict[str, Path]) -> None:
    lines = read_rows(probed[method] / "trajectories.jsonl")
    assert [line["step"] for line in lines] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert [line["layer"] for line in lines] == ["fc1.weight", "fc2.weight"] * 4
    for line in lines:
        assert len(line["index"]) == len(set(line["index"])) == 8
        assert line["index"] == next(other["index"] for other in lines if other["layer"] == line["layer"])
        assert line["trial"] == (METHODS[method].trial in ("fresh", "past"))
        if not METHODS[method].quantized:
            assert line["scale"] is None
            assert line["value"] == line["latent"]
            continue
        for latent, value, scale in zip(line["latent"], line["value"], line["scale"], strict=True):
            assert scale > 0
            assert value in (-scale, 0.0, scale)
            if METHODS[method].trial != "past":  # else held is the trial point of the next step
                assert abs(latent - value) <= min(abs(latent - level) for level in (-scale, 0.0, scale)) + 1e-6
    assert len({line["latent"][0] for line in lines}) == len(lines)  # they move


def test_trajectories_hold_what_the_checkpoint_holds(tmp_path: Path) -> None:
    """The last probe of an epoch is its last step: latent weights, scales of rows, two scales, few weights."""
    settings = ["probes.every=3", "probes.trajectories=20", "optim.method=laq", "optim.granularity=channel"]
    settings += ["optim.rules.fc2=ternary2", "train.epochs=1", "model.options={inputs=64, hidden=[1]}"]
    train(RECIPE.with_(settings), tmp_path / "run", progress=False)
    saved = checkpoint(tmp_path / "run", "last")
    lines = {line["layer"]: line for line in read_rows(tmp_path / "run" / "trajectories.jsonl") if line["step"] == 6}
    assert sorted(map(len, (line["index"] for line in lines.values()))) == [10, 20]
    names = [name for group in saved["optimizer_states"][0]["param_groups"] for name in group["param_names"]]
    for name, line in lines.items():
        state = saved["optimizer_states"][0]["state"][names.index(name)]
        held = saved["state_dict"][f"model.{name}"]
        index = torch.tensor(line["index"])
        assert torch.tensor(line["latent"]).equal(state["latent"].flatten()[index])
        assert torch.tensor(line["value"]).equal(held.flatten()[index])
        rows = index // held.shape[1]
        side = (state["latent"].flatten()[index] >= 0).long() if state["scale"].shape[1] == 2 else 0
        assert torch.tensor(line["scale"]).equal(state["scale"][rows, side])


def test_no_trajectories_where_none_are_asked_for(tmp_path: Path) -> None:
    settings = ["probes.every=2", "probes.trajectories=0", "train.epochs=1"]
    train(RECIPE.with_(settings), tmp_path / "run", progress=False)
    assert len(read_rows(tmp_path / "run" / "zigzag.jsonl")) == 3
    assert not (tmp_path / "run" / "trajectories.jsonl").exists()


def test_an_epoch_shorter_than_the_distance_of_probes_measures_nothing(tmp_path: Path) -> None:
    train(RECIPE.with_(["probes.every=9", "train.epochs=2"]), tmp_path / "run", progress=False)
    first, second = (row for row in read_rows(tmp_path / "run" / "zigzag.jsonl") if row["layer"] == "total")
    assert first["flip_rate"] is first["gradient_cosine"] is first["oscillation_frequency"] is None
    assert second["flip_rate"] is not None


@pytest.mark.parametrize(
    ("probes_made", "stride", "kept"), [(8, 1, 8), (9, 2, 5), (16, 2, 8), (17, 4, 5), (18, 4, 6), (65, 16, 5)]
)
@pytest.mark.parametrize("flush_every", [1, 7])
def test_trajectories_are_thinned_by_pairs_of_successive_probes(
    probes_made: int, stride: int, kept: int, flush_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "LARGEST", 8)
    p = nn.Parameter(torch.ones(2, 3))
    opt = blaq.LAQ([{"params": [p], "grid": "binary"}])
    trajectories = probes.Trajectories(tmp_path / "t.jsonl", opt, {"w": p}, 2, every=5)
    for probe in range(probes_made):
        trajectories.record(5 * (probe + 1), trial=False)
        if probe % flush_every == 0:
            trajectories.flush()
    trajectories.flush()
    steps = [row["step"] for row in read_rows(tmp_path / "t.jsonl")]
    pairs = [probe for probe in range(probes_made) if probe // 2 % stride == 0]
    assert steps == [5 * (probe + 1) for probe in pairs]
    assert len(steps) == kept


# --- resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(3, STEPS + 2), (2 * STEPS, 2 * STEPS + 5)])  # another epoch is begun anew each time
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_writes_the_same_lines(
    method: str, stops: tuple[int, int], probed: dict[str, Path], tmp_path: Path
) -> None:
    recipe = RECIPE.with_([f"optim.method={method}", *EVERY_4])
    for steps in stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "resumed", display=Interruption(steps), resume=True)
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    for name in ("zigzag.jsonl", "trajectories.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (probed[method] / name).read_bytes(), name
    saved = [checkpoint(run, "last")["callbacks"] for run in (tmp_path / "resumed", probed[method])]
    key = next(key for key in saved[0] if "Probes" in key)
    assert_equal(saved[0][key], saved[1][key])


def test_thinned_trajectories_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LARGEST", 4)
    recipe = RECIPE.with_(["probes.every=1"])
    train(recipe, tmp_path / "straight", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "resumed", display=Interruption(2 * STEPS + 1))
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert {row["step"] for row in read_rows(tmp_path / "straight" / "trajectories.jsonl")} == {1, 2, 17, 18}
    for name in ("zigzag.jsonl", "trajectories.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_what_the_checkpoint_does_not_know_is_cut(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    probes.truncate(directory, 1, 10)
    assert list(tmp_path.iterdir()) == []
    write_rows(directory.zigzag_file, [{"epoch": epoch} for epoch in (1, 1, 2, 2)])
    write_rows(directory.trajectories_file, [{"step": step} for step in (5, 10, 11, 15)])
    with directory.zigzag_file.open("a") as file:
        file.write('{"epoch": 1, "st')  # cut short by a kill
    probes.truncate(directory, 1, 10)
    assert read_rows(directory.zigzag_file) == [{"epoch": 1}, {"epoch": 1}]
    assert directory.zigzag_file.read_text().endswith("}\n")
    assert read_rows(directory.trajectories_file) == [{"step": 5}, {"step": 10}]


# --- asking for them ------------------------------------------------------------------------------------------------------


def test_the_command_takes_them_by_set(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE.to_toml().replace("epochs = 3", "epochs = 1"))
    arguments = ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--set", "probes.every=2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(read_rows(tmp_path / "run" / "zigzag.jsonl")) == 3
    assert load_recipe(tmp_path / "run" / "recipe.toml").probes == ProbeConfig(every=2)


def test_a_recipe_has_none_unless_it_asks() -> None:
    assert RECIPE.probes == ProbeConfig()
    assert ProbeConfig().every is None
    assert load_recipe("demo").probes == ProbeConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["probes.every=0"], r"ProbeConfig\(every=0\): expected at least 1 \(steps\), or none"),
        (["probes.every=1", "probes.trajectories=-1"], r"ProbeConfig\(trajectories=-1\): expected at least 0"),
        (["probes.gradient_error=true"], r"gradient_error=True\): expected false: every=none .* set probes.every"),
        (["probes.trajectories=3"], r"trajectories=3\): expected 8, the default: every=none .* set probes.every"),
        (["probes.evry=3"], r"did you mean probes.every"),
    ],
)
def test_bad_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RECIPE.with_(settings)


def test_a_callback_without_a_distance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Probes\(every=None\)"):
        probes.Probes(RunDirectory(tmp_path), ProbeConfig())
