"""Many runs: several side by side, finished ones not repeated, a failing one reported and the others kept."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from blaq.grids import Grid
from blaq.tasks.data import find_dataset
from blaq.train.board import Board
from blaq.train.config import Recipe, load_recipe
from blaq.train.directory import RunDirectory, comparison_file, differences, names_in, open_run
from blaq.train.display import Display
from blaq.train.executors import ExecutorName, Handle, cores, open_executor
from blaq.train.files import read_json, refuse_below_a_file, write_atomically
from blaq.train.interrupts import terminable
from blaq.train.run import Result, read_result

POLL_SECONDS = 0.2
_OWN = {"runs", "tuning"}  # folders of a sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run to be made: the name of its directory, its recipe, and which settings tell it from the others, as text."""

    name: str
    recipe: Recipe
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run: its job's name and settings, its result, and its line of metrics of every epoch."""

    name: str
    settings: Mapping[str, str]
    result: Result
    metrics: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The finished runs in the order of the jobs, and run name to message of those that failed."""

    runs: tuple[Run, ...]
    failures: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeper:
    """How runs are made.

    Attributes:
        console: where a table of the running ones is shown, and a line of every ended one.
        workers: how many side by side; none: as many as there are cores for.
        executor: ``local`` processes, or tasks of a ``ray`` cluster.
    """

    console: Console
    workers: int | None = None
    executor: ExecutorName = "local"

    def threads(self, recipe: Recipe) -> int:
        """The threads of a run: those its recipe states, else its share of the cores; on a cluster else 1."""
        if recipe.train.threads is not None:
            return recipe.train.threads
        return max(1, cores() // (self.workers or cores())) if self.executor == "local" else 1

    def run(
        self, jobs: Sequence[Job], folder: Path, *, finished: Callable[[Outcome], None] = lambda outcome: None
    ) -> Outcome:
        """Make the runs, each in ``folder/<name>``; those that are finished are not repeated, those begun are resumed.

        Args:
            jobs: the runs, each with a name of its own.
            folder: where their directories are.
            finished: called with what there is when all have been looked at, and whenever a run has ended, once one of
                them has ended well.

        Raises:
            KeyboardInterrupt: on Ctrl-C; SystemExit on SIGTERM. No process is left, and a repeated call continues.
        """
        if len({job.name for job in jobs}) < len(jobs):
            raise ValueError("Sweeper.run(jobs): expected names that differ.")
        board = Board(self.console, [job.name for job in jobs])
        waiting: list[Job] = []
        runs: dict[str, Run] = {}
        failures: dict[str, str] = {}

        def outcome() -> Outcome:
            return Outcome(tuple(runs[job.name] for job in jobs if job.name in runs), dict(failures))

        def note(job: Job, failure: str | None) -> None:
            directory = RunDirectory(folder / job.name)
            if failure is None:
                try:
                    result, metrics = read_result(directory), tuple(directory.metrics())
                except ValueError as error:
                    failure = str(error)
            if failure is None:
                runs[job.name] = Run(name=job.name, settings=job.settings, result=result, metrics=metrics)
                board.ended(job.name, f"test error {result.test_error:.2f} %, {result.seconds:.1f} s")
            else:
                failures[job.name] = failure
                board.ended(job.name, f"failed: {failure}")

        def tell() -> None:
            if runs:
                finished(outcome())

        def end(job: Job, failure: str | None) -> None:
            note(job, failure)
            tell()

        for job in jobs:
            try:
                done = _begin(job, folder, self.threads(job.recipe))
            except (ValueError, OSError) as error:
                note(job, str(error))
            else:
                if done:
                    note(job, None)
                else:
                    waiting.append(job)
        tell()
        if waiting:
            self._work(waiting, folder, board, end)
        return outcome()

    def _work(self, waiting: list[Job], folder: Path, board: Board, end: Callable[[Job, str | None], None]) -> None:
        running: dict[str, tuple[Job, Handle]] = {}
        threads = max(job.recipe.train.threads or 1 for job in waiting)
        with terminable(), open_executor(self.executor, self.workers, threads) as executor, board:
            try:
                while waiting or running:
                    while waiting and len(running) < executor.slots:
                        job = waiting.pop(0)
                        run = folder / job.name
                        running[job.name] = job, executor.start(run, self.threads(job.recipe))
                        board.began(job.name, RunDirectory(run), job.recipe.train.epochs)
                    for job, handle in list(running.values()):
                        if handle.done():
                            del running[job.name]
                            end(job, handle.failure())
                    board.refresh()
                    time.sleep(POLL_SECONDS)
            finally:
                for _, handle in running.values():
                    handle.stop()


def _begin(job: Job, folder: Path, threads: int) -> bool:
    """Lay the recipe into the run's directory; whether the run is finished.

    A run that was begun keeps its threads, so that it ends as it would have without the interruption.
    """
    directory = RunDirectory(folder / job.name)
    recipe = _with_threads(job.recipe, threads)
    if directory.recipe_file.exists():
        with suppress(ValueError):
            begun = load_recipe(directory.recipe_file)
            recipe = _with_threads(job.recipe, job.recipe.train.threads or begun.train.threads or threads)
    directory.check(recipe, resume=True)
    if not directory.recipe_file.exists():
        directory.path.mkdir(parents=True, exist_ok=True)
        write_atomically(directory.recipe_file, recipe.to_toml())
    return directory.finished


def _with_threads(recipe: Recipe, threads: int | None) -> Recipe:
    return replace(recipe, train=replace(recipe.train, threads=threads))


def claim(
    folder: Path, recipe: Recipe, design: Mapping[str, Any], jobs: Mapping[str, Sequence[Job]], *, extend: bool = True
) -> None:
    """Begin or continue a sweep in a folder: write comparison.json (the design) and recipe.toml (what all runs share).

    Args:
        folder: the directory of the sweep.
        recipe: what all runs share.
        design: what is run, for comparison.json.
        jobs: the runs to be made, by the folder in the directory that they are in.
        extend: whether the design takes the place of the one that is there.

    Raises:
        ValueError: it holds a run, a sweep of another kind, recipe or budget, or something else; or one of the runs that
            are there has other settings than its job: it could not go on, and the tables would lose it.
    """
    design_file, recipe_file = comparison_file(folder), folder / "recipe.toml"
    owner = f"{design['kind']}(out={str(folder)!r})"
    way_out = "choose another directory with --out."
    if recipe_file.exists() and not design_file.exists():
        raise ValueError(f"{owner}: the directory holds a run; {way_out}")
    if not design_file.exists() and folder.exists() and (not folder.is_dir() or not names_in(folder) <= _OWN):
        raise ValueError(f"{owner}: expected a new or empty directory, or one of a comparison; {way_out}")
    refuse_below_a_file(design_file, owner)
    if design_file.exists():
        before = read_json(design_file)
        for key in ("kind", "budget"):
            if before.get(key) != design.get(key):
                raise ValueError(
                    f"{owner}: its runs are of {key} {before.get(key)!r}, not {design.get(key)!r}; {way_out}"
                )
    if recipe_file.exists() and (changed := differences(load_recipe(recipe_file), recipe)):
        raise ValueError(f"{owner}: its runs have {'; '.join(changed)}; keep the recipe's settings, or {way_out}")
    for part, its_jobs in jobs.items():
        for job in its_jobs:
            if changed := _changes(folder / part / job.name, job.recipe):
                raise ValueError(f"{owner}: its run {job.name} has {'; '.join(changed)}; {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    if extend or not design_file.exists():
        write_atomically(design_file, json.dumps(design, indent=2) + "\n")
    write_atomically(recipe_file, recipe.to_toml())


def say_data(jobs: Sequence[Job], console: Console) -> None:
    """Print where the data of the runs are found, once, as ``blaq train`` does; where there are none, each run says why."""
    for source, text in dict.fromkeys((of.recipe.data.source, of.recipe.data.sequence is not None) for of in jobs):
        with suppress(ValueError, OSError):
            name, place = find_dataset(source, text=text)
            Display(console).say(f"data {name} from {place}")


def spelt_as_before(grids: Iterable[int | str], folder: Path) -> list[int | str]:
    """Grids as the runs of a sweep's directory call them, by which the runs are named: 1 and binary are one grid.

    Those without a run there, and what is no grid, stay as they are.
    """
    before: dict[str, dict[str, int | str]] = {}  # name of a grid to how it is spelt
    for file in sorted(folder.glob("*/*/recipe.toml")):
        with suppress(ValueError):  # a damaged one fails by itself
            optim = load_recipe(file).optim
            if optim.trains_by.quantized:
                before.setdefault(Grid.parse(optim.bits).name, {})[str(optim.bits)] = optim.bits
    spelt: list[int | str] = []
    for grid in grids:
        known: dict[str, int | str] = {}
        with suppress(ValueError):
            known = before.get(Grid.parse(grid).name, {})
        spelt.append(grid if str(grid) in known else next(iter(known.values()), grid))
    return spelt


def _changes(run: Path, recipe: Recipe) -> list[str]:
    """In what a run that has been begun differs from a recipe, but for its threads, which it keeps."""
    try:
        _, begun = open_run(run)
    except ValueError:  # none yet, or a damaged one: it fails by itself
        return []
    return differences(_with_threads(begun, None), _with_threads(recipe, None))
