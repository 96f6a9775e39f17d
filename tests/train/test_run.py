"""Runs: what they leave behind, and that an interrupted one ends as if it had not been interrupted."""

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from blaq.optim.blaq import BLAQ
from blaq.tasks.data import Batches, Dataset, Split
from blaq.tasks.losses import squared_hinge
from blaq.train import journal
from blaq.train import run as run_module
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, load_recipe
from blaq.train.directory import Checkpoint, RunDirectory
from blaq.train.display import Display
from blaq.train.module import TaskModule
from blaq.train.restore import restore
from blaq.train.run import Result, _settings, _trainer, evaluate, load_data, train

STEPS = 6  # an epoch: 300 examples, 50 a batch
SETTINGS = {
    "float": ["optim.method=float"],
    "laq": ["optim.method=laq", "optim.schedule=cosine"],
    "blaq": [
        "optim.method=blaq",
        "optim.period=2",
        "optim.schedule=step",
        "optim.schedule_every=2",
        "optim.schedule_factor=0.5",
    ],
    "past": ["optim.method=past", "optim.bits=ternary"],
    "convolutions": [
        "model.name=vgg",
        "model.options={channels=[4, 8], hidden=16, input_channels=1, image_size=8}",
        "optim.method=past",
        "optim.granularity=channel",
        "optim.solver=alternating",
    ],
}
RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=4, threads=1),
)


class Spy(Display):
    """A silent display that tests hang things on."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


class Interruption(Spy):
    """Presses Ctrl-C after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt  # what the handler of the signal does; a real one: test_ctrl_c_of_a_process


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(tree, dict):
        tree = list(tree.items())
    elif isinstance(tree, list | tuple):
        tree = list(enumerate(tree))
    else:
        return {path: tree}
    return {key: leaf for name, part in tree for key, leaf in leaves(part, f"{path}/{name}").items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Equal but for times: metrics, result, and all that the checkpoints hold."""
    without_times = [[{**row, "seconds": 0} for row in rows(run)] for run in (one, other)]
    assert without_times[0] == without_times[1]
    results = [
        {**json.loads((run / "result.json").read_text()), "seconds": 0, "peak_memory": 0} for run in (one, other)
    ]
    assert results[0] == results[1]
    for name in ("best", "last"):
        saved = [checkpoint(run, name) for run in (one, other)]
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            a, b = (leaves(each[part]) for each in saved)
            assert a.keys() == b.keys()
            for key, value in a.items():
                same = value.equal(b[key]) if isinstance(value, torch.Tensor) else value == b[key]
                assert same, f"{name} {part} {key}"


# Run directory


def test_a_finished_run_is_complete(tmp_path: Path) -> None:
    recipe = RECIPE.with_(SETTINGS["blaq"])
    result = train(recipe, tmp_path / "run", progress=False)
    assert load_recipe(tmp_path / "run" / "recipe.toml") == recipe
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == asdict(result)
    table = rows(tmp_path / "run")
    assert list(table[0]) == [
        "epoch", "steps", "gradient_evaluations", "seconds", "train_loss", "train_error",
        "validation_loss", "validation_error", "lr",
    ]  # fmt: skip
    assert [row["epoch"] for row in table] == [1, 2, 3, 4]
    assert [row["steps"] for row in table] == [6, 12, 18, 24]
    assert [row["lr"] for row in table] == [0.01, 0.01, 0.005, 0.005]
    assert all(after["seconds"] > before["seconds"] for before, after in pairwise(table))
    assert all(math.isfinite(value) for row in table for value in row.values())
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert versions["threads"] == 1
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_the_period_decides_which_epochs_take_two_gradients(tmp_path: Path) -> None:
    train(RECIPE.with_(SETTINGS["blaq"]), tmp_path / "blaq", progress=False)
    assert [row["gradient_evaluations"] for row in rows(tmp_path / "blaq")] == [STEPS * k for k in (1, 3, 4, 6)]
    result = train(RECIPE.with_(["train.epochs=2"]), tmp_path / "every", progress=False)
    assert (result.steps, result.gradient_evaluations) == (2 * STEPS, 4 * STEPS)


@pytest.mark.parametrize("method", ["float", "laq", "past"])
def test_other_methods_take_one_gradient_a_step(method: str, tmp_path: Path) -> None:
    result = train(RECIPE.with_([f"optim.method={method}", "train.epochs=1"]), tmp_path / "run", progress=False)
    assert result.gradient_evaluations == result.steps == STEPS


def test_learning_rates_follow_the_schedules(tmp_path: Path) -> None:
    cosine = ["optim.schedule=cosine", "train.epochs=3", "optim.method=laq"]
    train(RECIPE.with_(cosine), tmp_path / "cosine", progress=False)
    expected = [0.01 * 0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    assert [row["lr"] for row in rows(tmp_path / "cosine")] == pytest.approx(expected, rel=1e-9)
    exponential = ["optim.schedule=exponential", "optim.schedule_factor=0.9", "train.epochs=3", "optim.method=laq"]
    train(RECIPE.with_(exponential), tmp_path / "exponential", progress=False)
    assert [row["lr"] for row in rows(tmp_path / "exponential")] == pytest.approx([0.01, 0.009, 0.0081], rel=1e-9)


def test_the_first_epoch_of_the_lowest_validation_error_is_tested(tmp_path: Path) -> None:
    # Ten validation examples: ties are certain within ten epochs.
    recipe = RECIPE.with_(["data.validation=10", "train.epochs=10", "optim.method=laq"])
    result = train(recipe, tmp_path / "run", progress=False)
    errors = [row["validation_error"] for row in rows(tmp_path / "run")]
    assert len(set(errors)) < len(errors)
    assert result.best_epoch == 1 + errors.index(min(errors))
    assert result.validation_error == min(errors)
    assert checkpoint(tmp_path / "run", "best")["epoch"] == result.best_epoch - 1
    assert checkpoint(tmp_path / "run", "last")["epoch"] == 9


@pytest.mark.parametrize("method", ["laq", "past"])
def test_reported_errors_are_those_of_the_checkpoints(method: str, tmp_path: Path) -> None:
    recipe = RECIPE.with_(SETTINGS[method])
    result = train(recipe, tmp_path / "run", progress=False)
    for name in ("best", "last"):
        assert_reported(result, tmp_path / "run", name)


def assert_reported(result: Result, run: Path, name: Checkpoint) -> None:
    data = load_data(RECIPE.data)
    weights = {key.removeprefix("model."): value for key, value in checkpoint(run, name)["state_dict"].items()}
    values = (data.test.inputs - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    for layer in ("1", "2"):
        values = nn.functional.linear(values.flatten(1), weights[f"fc{layer}.weight"])
        centred = values - weights[f"bn{layer}.running_mean"]
        scale = weights[f"bn{layer}.weight"] / (weights[f"bn{layer}.running_var"] + 1e-4).sqrt()
        values = centred * scale + weights[f"bn{layer}.bias"]
        logits, values = values, values.relu()
    error = 100 * (logits.argmax(1) != data.test.targets).float().mean().item()
    measured = evaluate(run, checkpoint=name)
    assert measured.error == pytest.approx(error, abs=1e-4)
    assert measured.loss == pytest.approx(squared_hinge(logits, data.test.targets).item(), rel=1e-5)
    told = (result.test_error, result.test_loss) if name == "best" else (result.test_error_last, result.test_loss_last)
    assert (measured.error, measured.loss) == told
    held = evaluate(run, checkpoint=name, split="validation")
    row = rows(run)[result.best_epoch - 1 if name == "best" else -1]
    assert (held.error, held.loss) == (row["validation_error"], row["validation_loss"])


@pytest.mark.parametrize("method", ["laq", "past"])
def test_a_checkpoint_holds_the_nearest_levels_of_its_latent_weights(method: str, tmp_path: Path) -> None:
    """What "past" evaluates and saves is no trial point."""
    train(RECIPE.with_([f"optim.method={method}", "optim.bits=ternary"]), tmp_path / "run", progress=False)
    saved = checkpoint(tmp_path / "run")
    for index, name in enumerate(("fc1", "fc2")):
        state = saved["optimizer_states"][0]["state"][index]
        nearest = (state["latent"] / state["scale"]).round().clamp(-1, 1)
        assert saved["state_dict"][f"model.{name}.weight"].equal(nearest * state["scale"])


def test_checkpoints_hold_no_paths(tmp_path: Path) -> None:
    train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", progress=False)
    texts = [leaf for leaf in leaves(checkpoint(tmp_path / "run")).values() if isinstance(leaf, str)]
    assert texts
    assert not any(str(tmp_path) in text for text in texts)


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every method."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for method, settings in SETTINGS.items():
        train(RECIPE.with_(settings), folder / method, progress=False)
    return {method: folder / method for method in SETTINGS}


@pytest.mark.parametrize("stops", [(3, STEPS + 1), (STEPS, 3 * STEPS + 4)])  # one before a checkpoint, one after
@pytest.mark.parametrize("method", SETTINGS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    method: str, stops: tuple[int, int], uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    recipe = RECIPE.with_(SETTINGS[method])
    handler = signal.getsignal(signal.SIGINT)
    for steps in stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "resumed", display=Interruption(steps), resume=True)
        assert signal.getsignal(signal.SIGINT) is handler
        assert not (tmp_path / "resumed" / "result.json").exists()
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(uninterrupted[method], tmp_path / "resumed")


def test_a_run_can_be_moved(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    recipe = RECIPE.with_(SETTINGS["laq"])
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "here", display=Interruption(2 * STEPS + 2))
    (tmp_path / "here").rename(tmp_path / "there")
    train(recipe, tmp_path / "there", resume=True, progress=False)
    assert_same_run(uninterrupted["laq"], tmp_path / "there")


def test_a_network_with_dropout_resumes_after_two_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(name: str, **options: object) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 10)
        )

    monkeypatch.setattr("blaq.train.module.build_model", network)
    train(RECIPE, tmp_path / "straight", progress=False)
    for steps in (STEPS + 2, 2 * STEPS + 5):
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, tmp_path / "resumed", display=Interruption(steps), resume=True)
    train(RECIPE, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("moment", ["last best", "second last"])
def test_a_kill_between_the_files_of_an_epoch_loses_nothing(
    moment: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.with_(SETTINGS["laq"])
    errors = [row["validation_error"] for row in rows(uninterrupted["laq"])]
    improvements = len(set(accumulate(errors, min)))  # after the last of them nothing repairs a best checkpoint
    name, count = {"last best": ("best", improvements), "second last": ("last", 2)}[moment]
    renames: list[str] = []

    def killed(source: Path, target: Path) -> None:
        renames.append(target.stem)
        if target.stem == name and renames.count(name) == count:
            raise SystemExit("killed")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "replace", killed)
        with pytest.raises(SystemExit, match="killed"):
            train(recipe, tmp_path / "resumed", progress=False)
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')  # a line cut short
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(uninterrupted["laq"], tmp_path / "resumed")


def test_a_run_killed_before_its_result_gets_it_on_resuming(tmp_path: Path) -> None:
    first = train(RECIPE, tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "result.json").unlink()
    resumed = train(RECIPE, tmp_path / "run", resume=True, progress=False)
    assert replace(resumed, peak_memory=None) == replace(first, peak_memory=None)  # which is the process's own
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", resume=True, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resuming_with_other_versions_is_said(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path / "run", display=Interruption(STEPS + 1))
    versions = tmp_path / "run" / "versions.json"
    versions.write_text(versions.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.5.0"'))
    console = Console(file=io.StringIO())
    train(RECIPE, tmp_path / "run", resume=True, display=Display(console))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"Note: torch was 2.5.0, is {torch.__version__}; the end may differ" in said
    assert "Resumed after epoch 1 of 4." in said


def test_other_data_are_said(tmp_path: Path) -> None:
    """Wherever they differ: in number, in their names, in a single input or target."""
    dataset = load_data(RECIPE.data)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path / "run", display=Interruption(STEPS + 1))
    evaluate(tmp_path / "run")  # and no warning
    inputs, targets = dataset.test.inputs, dataset.test.targets
    others = {
        "test was 200, is 199": replace(dataset, test=dataset.test.select(torch.arange(199))),
        "digest was": replace(dataset, class_names=dataset.class_names[::-1]),
        "digest": replace(dataset, test=Split(inputs.index_fill(0, torch.tensor(3), 0.5), targets)),
        "was": replace(dataset, test=Split(inputs, targets.roll(1))),
    }
    directory = RunDirectory(tmp_path / "run")
    for said, other in others.items():
        assert any(said in change for change in directory.data_changes(other.description()))
    (tmp_path / "run" / "data.json").write_text('{"train": 1}')
    with pytest.warns(UserWarning, match=r"run' was trained on other data: train was 1, is \d+"):
        evaluate(tmp_path / "run")
    console = Console(file=io.StringIO())
    train(RECIPE, tmp_path / "run", resume=True, display=Display(console))
    assert "Note: train was 1, is" in console.file.getvalue()  # type: ignore[attr-defined]
    (tmp_path / "run" / "data.json").unlink()  # as older versions left it
    evaluate(tmp_path / "run")


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import blaq.train.run  # seconds: once for both
from blaq.__main__ import main

# Set by hand, for a process started in the background inherits an ignored signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
recipe, folder = sys.argv[1], Path(sys.argv[2])
for number in (signal.SIGINT, signal.SIGTERM):
    run = folder / f"a run, {number.name}"
    process = os.fork()
    if process == 0:
        for stream, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(folder / f"{number.name}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = ["blaq", "train", recipe, "--out", str(run)]
        sys.exit(main())
    ended = 0
    while not ended and not (run / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, number)
        _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_stopped_process_can_be_resumed(tmp_path: Path) -> None:
    recipe = RECIPE.with_([*SETTINGS["past"], "train.epochs=40"])
    (tmp_path / "tiny.toml").write_text(recipe.to_toml())
    # torch 2.6 leaves a temporary directory of its own to the end of the process.
    strict = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    command = [sys.executable, *strict, "-c", STOPPED, str(tmp_path / "tiny.toml"), str(tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # of numpy's: a process that has several must not fork
    stopped = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300, check=False)
    assert (stopped.stdout.split(), stopped.stderr) == (["130", "143"], "")
    train(recipe, tmp_path / "straight", progress=False)
    for name, what in (("SIGINT", "Interrupted"), ("SIGTERM", "Terminated")):
        run = tmp_path / f"a run, {name}"
        errors = (tmp_path / f"{name}.errors").read_text()
        assert errors == f"{what}. Continue with: blaq train '{run}/recipe.toml' --out '{run}' --resume\n"
        assert "epoch  1/40" in (tmp_path / f"{name}.output").read_text()
        assert 1 <= len(rows(run)) < 40
        train(load_recipe(run / "recipe.toml"), run, resume=True, progress=False)
        assert_same_run(tmp_path / "straight", run)


# Refusals


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", progress=False)
    with pytest.raises(
        ValueError, match=r"holds a finished run; continue it with --resume, or choose another with --out"
    ):
        train(RECIPE, tmp_path / "run", progress=False)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"holds a run; continue it with --resume"):
        train(RECIPE, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"has optim\.lr=0\.01, not 0\.02; train\.epochs=1, not 4; keep its settings"):
        train(RECIPE.with_(["optim.lr=0.02"]), tmp_path / "run", resume=True, progress=False)


def test_what_a_kill_left_of_a_recipe_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml.partial").write_text(RECIPE.to_toml()[:50])
    train(RECIPE.with_(["train.epochs=1"]), tmp_path, resume=True, progress=False)
    assert not (tmp_path / "recipe.toml.partial").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        replace(RECIPE, model=replace(RECIPE.model, options={"inputs": 64, "hidden": (16,)})),
        replace(RECIPE, optim=replace(RECIPE.optim, betas=[0.9, 0.99])),  # type: ignore[arg-type]
    ],
)
def test_tuples_and_lists_are_the_same_settings(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, display=Interruption(STEPS + 1))
    assert train(recipe, tmp_path, resume=True, progress=False).epochs == 4


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a new or empty directory"):
        train(RECIPE, tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="holds no run"):
        evaluate(tmp_path)


def test_a_comparison_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    (tmp_path / "recipe.toml").write_text(RECIPE.to_toml())
    with pytest.raises(ValueError, match=r"the directory holds a comparison; choose another with --out"):
        train(RECIPE, tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"holds a comparison; its runs are the directories in '.*runs'"):
        evaluate(tmp_path)


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_damaged_checkpoint_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, progress=False, display=Interruption(STEPS + 1))
    path = tmp_path / "checkpoints" / f"{name}.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=rf"{name}\.ckpt' cannot be read .*; if it is damaged, take the other checkpoint"
    ):
        evaluate(tmp_path, checkpoint=name)  # type: ignore[arg-type]
    if name == "last":
        with pytest.raises(ValueError, match="cannot be read"):
            train(RECIPE, tmp_path, resume=True, progress=False)


def test_a_checkpoint_without_all_that_a_run_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, progress=False, display=Interruption(STEPS + 1))
    path = tmp_path / "checkpoints" / "last.ckpt"
    shutil.copyfile(path, tmp_path / "checkpoints" / "best.ckpt")
    saved = torch.load(path, weights_only=True)
    weights = saved["state_dict"]
    spoilt = [
        ({key: value for key, value in saved.items() if key != lost}, f"best.ckpt' is not .*: it lacks '{lost}'; make")
        for lost in ("state_dict", "optimizer_states", "callbacks", "loops")
    ]
    spoilt += [
        ({**saved, "optimizer_states": []}, "it lacks 'optimizer_states'"),
        ([saved], "it lacks 'epoch', 'global_step', 'state_dict'"),
        (
            {**saved, "state_dict": {**weights, "model.fc1.weight": weights["model.fc1.weight"][:1]}},
            r"does not fit the network of the recipe beside it \(size mismatch for .*fc1\.weight: ",
        ),
        (
            {**saved, "state_dict": {}},
            r"does not fit the network .* \(Missing key.*\); if another version of a library",
        ),
    ]
    for content, message in spoilt:
        for name in ("best", "last"):
            torch.save(content, tmp_path / "checkpoints" / f"{name}.ckpt")
        for read in (evaluate, restore):
            with pytest.raises(ValueError, match=message):
                read(tmp_path)
        with pytest.raises(ValueError, match=message.replace("best", "last")):
            train(RECIPE, tmp_path, resume=True, progress=False)


def test_a_lost_checkpoint_is_said_before_training_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, progress=False, display=Interruption(STEPS + 1))
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(ValueError, match=r"best\.ckpt' is lost, though an epoch has ended; put it back"):
        train(RECIPE, tmp_path, resume=True, progress=False)
    assert checkpoint(tmp_path)["epoch"] == 0
    with pytest.raises(ValueError, match=r"best\.ckpt' is lost"):
        evaluate(tmp_path)


def test_an_empty_or_a_lost_checkpoint_is_said_before_training_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, progress=False, display=Interruption(2 * STEPS + 1))
    best = tmp_path / "checkpoints" / "best.ckpt"
    kept = best.read_bytes()
    best.write_bytes(b"")
    with pytest.raises(ValueError, match=r"best\.ckpt' cannot be read"):
        train(RECIPE, tmp_path, resume=True, progress=False)
    best.write_bytes(kept)
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"last\.ckpt' is lost, though an epoch has ended"):
        train(RECIPE, tmp_path, resume=True, progress=False)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_run_finished_meanwhile_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, while this one reads its data."""
    recipe = RECIPE.with_(["train.epochs=1"])
    load, results = run_module.load_data, []

    def slowly(data: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "load_data", load)
            results.append(train(recipe, tmp_path, progress=False))
        results.append((tmp_path / "result.json").stat().st_mtime_ns)
        return load(data)

    monkeypatch.setattr(run_module, "load_data", slowly)
    assert train(recipe, tmp_path, resume=True, progress=False) == results[0]
    assert (tmp_path / "result.json").stat().st_mtime_ns == results[1]


def test_lost_metrics_are_said_before_training_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, progress=False, display=Interruption(2 * STEPS + 1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for text in ("", lines[0], lines[1], '{"a": 1}\n' * 2):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.jsonl' is damaged \(expected the lines of epochs 1 to 2\)"):
            train(RECIPE, tmp_path, resume=True, progress=False)
        assert checkpoint(tmp_path)["epoch"] == 1


def test_damaged_metrics_are_said(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, progress=False, display=Interruption(STEPS + 1))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": \n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl' is damaged"):
        train(RECIPE, tmp_path, resume=True, progress=False)


def test_a_run_without_a_trial_is_refused(tmp_path: Path) -> None:
    recipe = RECIPE.with_(["optim.method=blaq", "optim.period=1", f"optim.trial_every={4 * STEPS + 1}"])
    message = (
        r"optim\.trial_every=.*, optim\.period=.*: no step of the run would have a trial, for an epoch has 6 steps"
    )
    in_an_epoch_of_laq = [
        "optim.period=2",
        f"optim.trial_every={2 * STEPS + 1}",
    ]  # the only multiple is in the third epoch
    for refused in (recipe, recipe.with_(in_an_epoch_of_laq)):
        with pytest.raises(ValueError, match=message):
            train(refused, tmp_path / "run", progress=False)
    train(recipe.with_([f"optim.trial_every={4 * STEPS}"]), tmp_path / "run", progress=False)
    assert rows(tmp_path / "run")[-1]["gradient_evaluations"] == 4 * STEPS + 1


def test_ctrl_c_in_a_test_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of the process, which Lightning makes of it."""
    train(RECIPE.with_(["train.epochs=1"]), tmp_path, progress=False)

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TaskModule, "on_test_epoch_start", pressed)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_recipe_that_cannot_run_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rule 'conv1' matched no parameter"):
        train(RECIPE.with_(["optim.rules.conv1=float"]), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"'mlp': the network does not take inputs of shape \(1, 8, 8\)"):
        train(RECIPE.with_(["model.options.inputs=63"]), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"5 outputs, but digits has 10 classes; set model\.options\.classes=10"):
        train(RECIPE.with_(["model.options.classes=5"]), tmp_path / "run", progress=False)
    for single in ("data.batch_size=1", "data.train=1"):
        with pytest.raises(ValueError, match=rf"{single}.*cannot train on mini-batches of a single example"):
            train(RECIPE.with_([single]), tmp_path / "run", progress=False)
    pairs = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Unflatten(1, (2, 10)))
    monkeypatch.setattr("blaq.train.module.build_model", lambda *_, **__: pairs)
    with pytest.raises(
        ValueError, match=r"'mlp': outputs of shape \(50, 2, 10\) .*, expected \(50, 10\); choose another"
    ):
        train(RECIPE, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_network_that_refuses_the_inputs_itself_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of transformers do, which compare the number of channels."""

    class Particular(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise ValueError("Expected 3 but got 1.")

    monkeypatch.setattr("blaq.train.module.build_model", lambda name, **options: Particular(64, 10))
    message = (
        r"model\.options of 'mlp': the network does not take inputs of shape \(1, 8, 8\) .* \(Expected 3 but got 1"
    )
    with pytest.raises(ValueError, match=message):
        train(RECIPE, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_check_of_single_examples_leaves_the_network_as_it_is() -> None:
    recipe = RECIPE.with_(["data.batch_size=1"])
    module = TaskModule(recipe, load_data(recipe.data))
    # 64 values a channel
    module.model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(64, 10))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    state = torch.random.get_rng_state()
    module.check()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_evaluating_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    train(RECIPE.with_(["train.epochs=1"]), tmp_path, progress=False)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    evaluate(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tensorboard_has_every_step_once_after_an_interrupted_first_epoch(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = RECIPE.with_(["data.batch_size=2", "train.epochs=1", "optim.method=laq"])  # 150 steps, logged every 50
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, display=Interruption(120))
    train(recipe, tmp_path, resume=True, progress=False)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [49, 99, 149]


def test_every_epoch_has_its_own_batches(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watch(Spy):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                seen.append(batch[1].tolist())

    recipe = RECIPE.with_(["optim.method=laq"])
    train(recipe, tmp_path / "run", display=Watch())
    data = load_data(recipe.data)
    batches = Batches(data.train, data, 50, shuffle=True, seed=recipe.train.seed)
    expected = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        expected.append(next(iter(batches))[1].tolist())
    assert seen == expected
    assert len({tuple(targets) for targets in seen}) == 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskModule, "training_step", lambda self, batch, index: self.model(batch[0]).mean())
    with pytest.raises(ValueError, match=r"the training loss is nan in epoch 1; lower optim\.lr"):
        train(RECIPE, tmp_path / "run", progress=False)


# Under Lightning's automatic optimization


@pytest.mark.parametrize(("bits", "most"), [(1, 2), ("ternary", 3), (3, 7)])
@pytest.mark.parametrize("method", ["laq", "blaq", "past"])
def test_every_evaluation_sees_quantized_weights(method: str, bits: int | str, most: int, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(Spy):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def count(network: nn.Module, inputs: object) -> None:
                seen.extend(layer.weight.unique().numel() for layer in (network.fc1, network.fc2) if network.training)

            pl_module.model.register_forward_pre_hook(count)

    recipe = RECIPE.with_([f"optim.method={method}", f"optim.bits={bits}", "train.epochs=2"])
    result = train(recipe, tmp_path / "run", display=Watch())
    assert len(seen) == 2 * result.gradient_evaluations
    assert max(seen) <= most
    assert min(seen) > 1


def test_a_step_is_counted_and_logged_once(tmp_path: Path) -> None:
    losses: list[float] = []
    examples: list[int] = []

    class Watch(Spy):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loss = pl_module.loss

            def recorded(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                value: torch.Tensor = loss(logits, targets)
                if logits.requires_grad:
                    losses.append(value.item())
                return value

            pl_module.loss = recorded

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            examples.append(pl_module.training_tally.examples)

    train(RECIPE.with_(["train.epochs=2"]), tmp_path / "run", display=Watch())
    first = losses[::2]  # the losses at the trial points lie between them
    assert len(losses) == 4 * STEPS
    assert examples == [300, 300]
    expected = [sum(first[:STEPS]) / STEPS, sum(first[STEPS:]) / STEPS]
    assert [row["train_loss"] for row in rows(tmp_path / "run")] == pytest.approx(expected, rel=1e-6)
    with (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["loss"]]
    assert [int(row["step"]) for row in logged] == [STEPS - 1, 2 * STEPS - 1]
    assert [float(row["loss"]) for row in logged] == pytest.approx([first[STEPS - 1], first[-1]], rel=1e-6)


def test_the_gradient_is_clipped_at_every_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = BLAQ.step

    def watched(self: BLAQ, closure: Any = None) -> Any:
        def evaluated() -> Any:
            loss = closure()
            grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat(grads).norm().item())
            return loss

        return step(self, evaluated)

    monkeypatch.setattr(BLAQ, "step", watched)
    result = train(RECIPE.with_(["train.epochs=1", "train.gradient_clip=0.01"]), tmp_path / "run", progress=False)
    assert len(norms) == result.gradient_evaluations == 2 * STEPS
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_runs_of_one_seed_are_equal_and_of_two_are_not(tmp_path: Path) -> None:
    recipe = RECIPE.with_(["train.epochs=1"])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(replace(recipe, train=replace(recipe.train, seed=seed)), tmp_path / name, progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a")[0]["train_loss"] != rows(tmp_path / "c")[0]["train_loss"]


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    class Second(Spy):
        """Tries to continue the run while it is being trained."""

        refusal = ""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if not self.refusal:
                with pytest.raises(ValueError, match="another process is training there") as refused:
                    train(RECIPE, tmp_path / "run", resume=True, progress=False)
                self.refusal = str(refused.value)

    second = Second()
    train(RECIPE, tmp_path / "run", display=second)
    assert "choose another directory" in second.refusal
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_run_made_while_the_data_were_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes begin at once, and one is done before the other has its data."""

    def slow(data: DataConfig) -> Dataset:
        dataset = load_data(data)
        train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", progress=False, dataset=dataset)
        return dataset

    monkeypatch.setattr("blaq.train.run.load_data", slow)
    with pytest.raises(ValueError, match="holds a finished run"):
        train(RECIPE, tmp_path / "run", progress=False)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1]


def test_an_epoch_is_on_the_disk_before_its_checkpoint_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure then leaves the epoch before, or this one."""
    done: list[str] = []

    def fsync(number: int) -> None:
        inode = os.fstat(number).st_ino
        done.extend(path.name for path in (tmp_path / "run").rglob("*") if path.stat().st_ino == inode)

    def renamed(source: Path, target: Path) -> None:
        done.append(Path(target).name)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", fsync)
        patch.setattr(journal.os, "replace", renamed)
        train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", progress=False)
    names = ("metrics.jsonl", "best.partial", "best.ckpt", "last.partial", "last.ckpt")
    assert [done.index(name) for name in names] == sorted(done.index(name) for name in names)


def test_a_run_says_where_its_data_are_from(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    train(RECIPE.with_(["train.epochs=1"]), tmp_path / "run", display=Display(console))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("data digits from scikit-learn: 300 examples to train on, 100 to validate, 200 to test") == 1


def test_gradients_that_lightning_accumulates_are_refused_for_two() -> None:
    """The second evaluation would be of the last batch alone."""
    recipe = RECIPE.with_(["optim.method=blaq", "optim.period=1"])
    module = TaskModule(recipe, load_data(recipe.data))
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "logger": False}
    message = r"the closure leaves 'fc1.weight' the gradient it had before, .* evaluation\(\)"
    with _settings(1), pytest.raises(ValueError, match=message):
        _trainer(**options).fit(module)
    laq = TaskModule(RECIPE.with_(["optim.method=laq"]), module.dataset)
    with _settings(1):
        _trainer(**options).fit(laq)
    assert laq.optimizer.gradient_evaluations == STEPS // 2
