"""Sweeps: real runs in processes of their own, side by side, interrupted, failing, and on Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import blaq
from blaq.train import sweep
from blaq.train.board import Board
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.directory import RunDirectory
from blaq.train.executors import LocalExecutor, RayExecutor, cores, open_executor
from blaq.train.run import train
from blaq.train.sweep import Job, Outcome, Sweeper, claim

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=2, threads=1),
)
MEASURED = ("seconds", "peak_memory")
LONG = 100_000

pytestmark = pytest.mark.usefixtures("server")


def job(seed: int, *overrides: str) -> Job:
    return Job(name=f"s{seed}", recipe=RECIPE.with_([f"train.seed={seed}", *overrides]), settings={"seed": str(seed)})


def broken(seed: int) -> Job:
    """A run that is refused once its process looks at the data."""
    return job(seed, "model.options.inputs=65")


def make(jobs: list[Job], folder: Path, **options: Any) -> tuple[Outcome, str]:
    console = Console(file=io.StringIO(), width=200)
    outcome = Sweeper(console=console, **options).run(jobs, folder)
    return outcome, console.file.getvalue()  # type: ignore[attr-defined]


def numbers(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Everything a run computed."""
    directory = RunDirectory(run)
    result = json.loads(directory.result_file.read_text())
    rows = [{name: value for name, value in row.items() if name not in MEASURED} for row in directory.metrics()]
    saved = torch.load(directory.checkpoint("last"), weights_only=True)["state_dict"]
    return {name: value for name, value in result.items() if name not in MEASURED}, rows, saved


def assert_same(one: Path, other: Path) -> None:
    (result, rows, weights), (other_result, other_rows, other_weights) = numbers(one), numbers(other)
    assert (result, rows, weights.keys()) == (other_result, other_rows, other_weights.keys())
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_one_worker_or_two_or_none_compute_the_same(tmp_path: Path) -> None:
    jobs = [job(1), job(2), broken(3)]
    two, _ = make(jobs, tmp_path / "two", workers=2)
    one, _ = make(jobs[:2], tmp_path / "one", workers=1)
    assert [run.name for run in two.runs] == [run.name for run in one.runs] == ["s1", "s2"]
    for run, seed in zip(two.runs, (1, 2), strict=True):
        train(job(seed).recipe, tmp_path / "none" / run.name, progress=False)
        assert_same(tmp_path / "two" / run.name, tmp_path / "one" / run.name)
        assert_same(tmp_path / "two" / run.name, tmp_path / "none" / run.name)
    assert list(two.failures) == ["s3"]
    assert "does not take inputs of shape" in two.failures["s3"]
    assert not (tmp_path / "two/s1/output.txt").exists()


def test_metrics_memory_and_settings_come_with_the_runs(tmp_path: Path) -> None:
    outcome, text = make([job(4)], tmp_path)
    (run,) = outcome.runs
    assert run.settings == {"seed": "4"}
    assert [row["epoch"] for row in run.metrics] == [1, 2]
    assert run.metrics[-1]["train_loss"] == run.result.train_loss
    assert run.result.peak_memory is not None
    # Less than this process, which has loaded much more, and far more than an interpreter without torch.
    assert 100e6 < run.result.peak_memory < 2e9
    assert text == f"s4 (1/1): test error {run.result.test_error:.2f} %, {run.result.seconds:.1f} s\n"
    written = (tmp_path / "s4/result.json").stat().st_mtime_ns
    again, repeated = make([job(4)], tmp_path)
    assert (again, repeated) == (outcome, text)
    assert (tmp_path / "s4/result.json").stat().st_mtime_ns == written


def when_begun(folder: Path, names: list[str], act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act, once, as soon as all the runs have ended an epoch."""
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    acted: list[bool] = []

    def refresh(self: Board) -> None:
        if not acted and all(RunDirectory(folder / name).metrics() for name in names):
            acted.append(True)
            act()

    monkeypatch.setattr(Board, "refresh", refresh)


INTERRUPTED = """
import json, os, signal, sys
from pathlib import Path
import pytest
from test_sweep import LONG, job, make, when_begun

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits an ignored signal
for number, epochs in ((signal.SIGINT, 40), (signal.SIGTERM, LONG), (signal.SIGKILL, LONG)):
    folder = Path(sys.argv[1], number.name)
    when_begun(folder, ["s1", "s2"], lambda: os.kill(os.getpid(), number), pytest.MonkeyPatch())
    handler = signal.getsignal(number)
    try:
        make([job(seed, f"train.epochs={epochs}") for seed in (1, 2)], folder, workers=2)
    except BaseException as error:
        kept = signal.getsignal(number) is handler
        print(json.dumps([type(error).__name__, getattr(error, "code", None), kept]), flush=True)
"""


def test_interrupted_runs_stop_and_end_as_if_they_had_not(tmp_path: Path) -> None:
    """By Ctrl-C and SIGTERM, and when the process that made them is killed."""
    # In a process of its own: what other tests have loaded here may act on a signal too, and end this one.
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(blaq.__file__).parents[1])])
    said = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert said.returncode == -signal.SIGKILL
    assert [json.loads(line) for line in said.stdout.splitlines()] == [
        ["KeyboardInterrupt", None, True],
        ["SystemExit", 143, True],
    ]
    for number, epochs in ((signal.SIGINT, 40), (signal.SIGTERM, LONG), (signal.SIGKILL, LONG)):
        for name in ("s1", "s2"):
            run = RunDirectory(tmp_path / number.name / name)
            with FileLock(run.path / ".lock", timeout=60):  # nobody trains there any more
                assert not run.finished
                assert 0 < len(run.metrics()) < epochs
    folder, jobs = tmp_path / "SIGINT", [job(1, "train.epochs=40"), job(2, "train.epochs=40")]
    outcome, _ = make(jobs, folder, workers=2)
    assert not outcome.failures
    assert "csv/version_1" in {str(path.relative_to(folder / "s1")) for path in (folder / "s1").rglob("version_1")}
    train(jobs[0].recipe, tmp_path / "uninterrupted", progress=False)
    assert_same(folder / "s1", tmp_path / "uninterrupted")


def test_runs_end_with_the_command_even_if_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE.to_toml())
    command = [sys.executable, "-m", "blaq", "compare", "tiny.toml", "--methods", "laq", "--seeds", "1", "--out", "out"]
    run = RunDirectory(tmp_path / "out/runs/laq-b1-s0")
    process = subprocess.Popen(
        [*command, "--set", f"train.epochs={LONG}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(blaq.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not run.metrics():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    with FileLock(run.path / ".lock", timeout=60):
        assert not run.finished


def test_a_process_that_is_killed_is_a_failure_of_its_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = LocalExecutor.start

    def remember(self: LocalExecutor, run: Path, threads: int) -> Any:
        started.append(start(self, run, threads))
        return started[-1]

    monkeypatch.setattr(LocalExecutor, "start", remember)
    when_begun(tmp_path, ["s1"], lambda: started[0]._process.kill(), monkeypatch)
    outcome, text = make([job(1, f"train.epochs={LONG}"), job(2)], tmp_path, workers=1)
    assert dict(outcome.failures) == {"s1": "its process was ended by SIGKILL"}
    assert [run.name for run in outcome.runs] == ["s2"]
    assert "s1 (1/2): failed: its process was ended by SIGKILL" in text


def test_what_nobody_foresaw_leaves_its_traceback_in_the_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "s1")
    with directory.locked():
        directory.create(job(1).recipe, {})
    (tmp_path / "s1" / "csv").touch()  # where a logger wants a folder
    outcome, _ = make([job(1)], tmp_path)
    assert outcome.failures["s1"].startswith("FileExistsError: ")
    output = (tmp_path / "s1/output.txt").read_text()
    assert output.startswith("Traceback")
    assert outcome.failures["s1"] in output


def test_a_directory_of_something_else_fails_without_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalExecutor, "start", lambda *_: pytest.fail("started a process"))
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1/notes.txt").touch()
    train(job(2).recipe, tmp_path / "s2", progress=False)
    outcome, text = make([job(1), job(2, "optim.lr=0.5")], tmp_path)
    assert "expected a new or empty directory" in outcome.failures["s1"]
    assert "optim.lr=0.01, not 0.5" in outcome.failures["s2"]
    assert "s2 (2/2): failed: train(" in text
    assert [path.name for path in (tmp_path / "s1").iterdir()] == ["notes.txt"]


def test_threads_are_a_share_of_the_cores_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = RECIPE.with_(["train.threads=none"])
    monkeypatch.setattr(sweep, "cores", lambda: 8)
    console = Console(quiet=True)
    assert [Sweeper(console=console, workers=workers).threads(free) for workers in (None, 1, 2, 3, 9)] == [
        1,
        8,
        4,
        2,
        1,
    ]
    assert Sweeper(console=console, workers=2).threads(RECIPE) == 1
    assert Sweeper(console=console, workers=2, executor="ray").threads(free) == 1
    short = free.with_(["train.epochs=1", "data.train=50"])  # threads wait for one another where cores are few
    begun = replace(short, train=replace(short.train, threads=2))
    train(begun, tmp_path / "run", progress=False)
    outcome, _ = make([Job(name="run", recipe=short, settings={})], tmp_path, workers=8)
    assert not outcome.failures  # a run keeps the threads it was begun with


@pytest.mark.parametrize(("workers", "threads", "slots"), [(None, None, 1.0), (None, 2, 0.5), (3, 2, None)])
def test_runs_side_by_side(workers: int | None, threads: int | None, slots: float | None) -> None:
    with open_executor("local", workers, threads) as executor:
        assert executor.slots == (3 if slots is None else max(1, int(cores() * slots)))


def test_without_workers_nothing_can_run() -> None:
    with pytest.raises(ValueError, match="workers=0: expected at least 1"), open_executor("local", 0, 1):
        pass


def test_ray_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'blaq\[ray\]'"), open_executor("ray", None, None):
        pass


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    design = {"kind": "compare", "budget": "steps"}
    claim(tmp_path / "new", RECIPE, design, {})
    claim(tmp_path / "new", RECIPE, design, {})
    for changed, message in (
        ({"kind": "ablate"}, "its runs are of kind 'compare', not 'ablate'"),
        ({"budget": "gradients"}, "its runs are of budget 'steps', not 'gradients'"),
    ):
        with pytest.raises(ValueError, match=message):
            claim(tmp_path / "new", RECIPE, design | changed, {})
    with pytest.raises(ValueError, match=r"its runs have optim\.lr=0\.01, not 0\.5; keep"):
        claim(tmp_path / "new", RECIPE.with_(["optim.lr=0.5"]), design, {})
    train(RECIPE, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="the directory holds a run"):
        claim(tmp_path / "run", RECIPE, design, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a new or empty directory, or one of a comparison; choose another"):
        claim(tmp_path / "mine", RECIPE, design, {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["results.csv"]


def test_the_order_of_rules_is_part_of_a_recipe(tmp_path: Path) -> None:
    """The first match wins."""
    one, other = (RECIPE.with_([f"optim.rules={{{rules}}}"]) for rules in ('"fc*"=4, "*1"=2', '"*1"=2, "fc*"=4'))
    design = {"kind": "compare", "budget": "steps"}
    claim(tmp_path, one, design, {})
    claim(tmp_path, one, design, {})
    with pytest.raises(
        ValueError, match=r"its runs have optim\.rules in the order 'fc\*', '\*1', not '\*1', 'fc\*'; keep"
    ):
        claim(tmp_path, other, design, {})


def test_a_damaged_result_is_a_failed_run(tmp_path: Path) -> None:
    assert not make([job(1)], tmp_path)[0].failures
    (result,) = tmp_path.glob("*/result.json")
    for text, message in (
        ("", "result.json' is damaged"),
        ("[1]", "expected JSON objects"),
        ('{"new": 1}', "of another version of blaq"),
    ):
        result.write_text(text)
        found, _ = make([job(1)], tmp_path)
        assert not found.runs
        assert [message in failure for failure in found.failures.values()] == [True]


def test_the_tables_are_written_once_for_all_finished_runs(tmp_path: Path) -> None:
    jobs = [job(seed, "train.epochs=1") for seed in (1, 2, 3)]
    make(jobs[:2], tmp_path)
    told: list[int] = []
    sweeper = Sweeper(console=Console(quiet=True))
    sweeper.run(jobs, tmp_path, finished=lambda outcome: told.append(len(outcome.runs)))
    sweeper.run(jobs, tmp_path, finished=lambda outcome: told.append(len(outcome.runs)))
    assert told == [2, 3, 3]


def test_names_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names that differ"):
        make([job(1), job(1, "optim.lr=0.5")], tmp_path)


def test_a_terminal_shows_the_running_runs(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    train(job(1).recipe, tmp_path / "s1", progress=False)
    (row,) = RunDirectory(tmp_path / "s1").metrics()[1:]
    with Board(console, ["s1", "s2", "s3", "s4"]) as board:
        board.ended("s3", "failed: for a test")
        board.began("s1", RunDirectory(tmp_path / "s1"), 7)
        board.began("s2", RunDirectory(tmp_path / "s2"), 7)
        board.refresh()
    shown = Console(width=100, file=io.StringIO())
    shown.print(board.table())
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split() for line in text.splitlines() if line.strip()[:2] in ("s1", "s2")] == [
        ["s1", "2/7", f"{row['train_loss']:.4f}", f"{row['validation_error']:.2f}", f"{row['seconds']:.1f}"],
        ["s2", "0/7"],
    ]
    assert "1 of 4 runs ended, 1 waiting" in text
    live = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/7" in live
    assert "s3 (3/4): failed: for a test" in live


def test_ray_runs_the_same_and_reports_what_fails(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with open_executor("ray", None, 1) as executor:
            assert isinstance(executor, RayExecutor)
            assert executor.slots == 2
        outcome, _ = make([job(1), broken(2)], tmp_path, executor="ray")
        assert ray.is_initialized()  # a cluster that was there before is left
    finally:
        ray.shutdown()
    assert [run.name for run in outcome.runs] == ["s1"]
    assert "does not take inputs of shape" in outcome.failures["s2"]
    train(job(1).recipe, tmp_path / "here", progress=False)
    assert_same(tmp_path / "s1", tmp_path / "here")
