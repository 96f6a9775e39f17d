"""Run directories and folders of them, read into memory: only what the files say."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blaq.train.config import Recipe, load_recipe
from blaq.train.directory import RunDirectory, comparison_file, open_run
from blaq.train.files import damaged, read_json, read_rows

Column = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]
T = TypeVar("T")

TOTAL = "total"  # the layer of zigzag.jsonl that stands for all quantized weights
# Columns that every line has to have; of the others those are read that are there.
AXES = ("epoch", "steps", "gradient_evaluations")
METRICS = (*AXES, "seconds", "train_loss", "validation_loss", "validation_error")
# Of a result; a run that lacked one would drop out of its means and pairs without a word.
RESULT = ("steps", "gradient_evaluations", "seconds", "train_loss", "validation_loss", "validation_error", "test_loss",
          "test_error")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run, as its directory tells it.

    Attributes:
        name: of the directory, with as many of its parents as tell it from the other runs' of the report.
        path: the directory.
        recipe: what was run.
        versions: what it was computed with.
        data: what it was computed on; empty in runs of versions that did not note it.
        metrics: the columns of metrics.jsonl, one value an epoch; empty before the first epoch has ended.
        result: the outcome; None for an unfinished run.
        zigzag: layer to the columns of zigzag.jsonl, NaN where a measure has no value; empty for a run without probes.
    """

    name: str
    path: Path
    recipe: Recipe
    versions: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Mapping[str, Column]
    result: Mapping[str, Any] | None
    zigzag: Mapping[str, Mapping[str, Column]]

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.recipe.train.seed

    @property
    def epochs(self) -> int:
        """How many epochs have ended."""
        return len(self.metrics.get("epoch", ()))

    @property
    def counts(self) -> bool:
        """Whether it is one of the report's: with a result, and with the metrics that led to it."""
        return self.result is not None and self.epochs > 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """A folder that `blaq compare` or `blaq ablate` wrote.

    Attributes:
        path: the folder.
        recipe: what its runs share.
        target: the training loss whose cost was asked for; None if none was named.
        failures: run name to message; without those that have a result by now.
        seeds: those of every setting; empty if the folder does not tell.
    """

    path: Path
    recipe: Recipe
    target: float | None
    failures: Mapping[str, str]
    seeds: frozenset[int] = frozenset()

    def holds(self, run: Run) -> bool:
        """Whether the run is one of this folder."""
        return self.path.resolve() in run.path.resolve().parents

    def failed_beside(self, run: Run) -> bool:
        """Whether a run of the same settings failed with another seed, which is what a name ends with."""
        return self.holds(run) and any(_stem(name) == _stem(run.path.name) for name in self.failures)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A few weights of a layer at the probes of a run.

    Attributes:
        steps: (probes,) the step of each probe.
        latent: (probes, weights) latent weights.
        value: (probes, weights) quantized values the network computed with.
        scale: (probes, weights) scale of the side (negative or positive) that each latent weight is on.
    """

    steps: Column
    latent: Column
    value: Column
    scale: Column


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run directories among `paths`, and those inside the folders of ``blaq compare`` and ``blaq ablate``.

    Raises:
        ValueError: a path that holds no run.
    """
    found: list[Path] = []
    for path in paths:
        beside = (file.parent for folder in (path / "runs", path) for file in folder.glob("*/recipe.toml"))
        inside = sorted(run for run in beside if not comparison_file(run).exists())
        if not inside and (path / "recipe.toml").is_file() and not comparison_file(path).exists():
            inside = [path]
        if not inside:
            raise ValueError(
                f"report: {str(path)!r} holds no run: expected a directory that `blaq train`, `blaq compare` or "
                "`blaq ablate` wrote."
            )
        found += inside
    return list({run.resolve(): run for run in found}.values())


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run of `paths` in their order, each once.

    Raises:
        ValueError: a path without a run, a file that is not what a run writes.
    """
    directories = find_runs(paths)
    return [read_run(path, name) for path, name in zip(directories, _names(directories), strict=True)]


def read_sweeps(paths: Iterable[Path]) -> list[Sweep]:
    """The folders among `paths` that `blaq compare` or `blaq ablate` wrote, each once.

    Raises:
        ValueError: a file that is not what they write.
    """
    folders = {path.resolve(): path for path in paths if comparison_file(path).exists()}
    return [_read_sweep(path) for path in folders.values()]


def _read_sweep(path: Path) -> Sweep:
    results, design = path / "results.json", comparison_file(path)
    failures = (_if_there(results) or {}).get("failures", {})
    if not isinstance(failures, dict):
        raise damaged(results, f"failures={failures!r}: expected a table of run names and messages")
    found = read_json(design)
    target, seeds = found.get("target"), found.get("seeds", [])
    if target is not None and not _is_number(target):
        raise damaged(design, f"target={target!r}: expected a number or null")
    if not isinstance(seeds, list) or not all(map(_is_number, seeds)):
        raise damaged(design, f"seeds={seeds!r}: expected a list of numbers")
    return Sweep(
        path=path,
        recipe=load_recipe(path / "recipe.toml"),
        target=target,
        failures={
            name: str(why)
            for name, why in failures.items()
            if not any((path / part / name / "result.json").exists() for part in ("runs", "tuning"))
        },
        seeds=frozenset(seeds),
    )


def read_run(path: Path, name: str = "") -> Run:
    """One run directory.

    Raises:
        ValueError: no run, or a file that is not what a run writes.
    """
    try:
        directory, recipe = open_run(path)
    except ValueError as error:  # of a recipe it names the file alone, and there is one in every run
        raise ValueError(f"report: {str(path)!r}: {error}") from None
    return Run(
        name=name or path.resolve().name,
        path=path,
        recipe=recipe,
        versions=_if_there(path / "versions.json") or {},
        data=_if_there(path / "data.json") or {},
        metrics=_parsed(directory.metrics_file, lambda rows: _columns(rows, METRICS)),
        result=_result(directory.result_file),
        zigzag=_parsed(directory.zigzag_file, _zigzag),
    )


def read_trajectories(run: Run) -> dict[str, Trajectory]:
    """Layer to the followed weights of a run; empty for a run without probes, and without the layers kept in float.

    Raises:
        ValueError: a file that is not what a run writes.
    """
    return _parsed(RunDirectory(run.path).trajectories_file, _trajectories)


def _trajectories(rows: Rows) -> dict[str, Trajectory]:
    return {layer: _trajectory(own) for layer, own in _by_layer(rows).items() if own[0]["scale"] is not None}


def _trajectory(rows: Rows) -> Trajectory:
    latent = np.array([row["latent"] for row in rows], dtype=float)
    scale = np.array([row["scale"] for row in rows], dtype=float)
    value = np.array([row["value"] for row in rows], dtype=float)
    if latent.ndim != 2 or not latent.shape == value.shape == scale.shape:
        raise ValueError("latent, value and scale of different lengths")
    return Trajectory(
        steps=np.array([row["step"] for row in rows], dtype=float), latent=latent, value=value, scale=scale
    )


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [path.resolve().parts for path in directories]
    length = 1
    while len({tail[-length:] for tail in parts}) < len(parts):
        length += 1
    return ["/".join(tail[-length:]) for tail in parts]


def _if_there(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None


def _result(file: Path) -> dict[str, Any] | None:
    found = _if_there(file)
    if found is None:
        return None
    for name in RESULT:
        if not _is_number(found.get(name)):
            raise damaged(file, f"{name}={found.get(name)!r}: expected a finite number")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stem(name: str) -> str:
    """The name of a comparison's run without its seed."""
    return name.rpartition("-s")[0]


def _parsed(path: Path, parse: Callable[[Rows], T]) -> T:
    """What the lines of a file come to; where they are not those of a run, the error names the file."""
    rows = read_rows(path)
    try:
        return parse(rows)
    except KeyError as error:
        raise damaged(path, f"a line without {error}") from None
    except (TypeError, ValueError, IndexError) as error:  # text for a number, lists of several lengths
        raise damaged(path, error) from None


def _zigzag(rows: Rows) -> dict[str, dict[str, Column]]:
    return {layer: _columns(own, AXES) for layer, own in _by_layer(rows).items()}


def _by_layer(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row)
    return found


def _columns(rows: Rows, needed: Sequence[str]) -> dict[str, Column]:
    """The numbers of the rows by name; null is NaN."""
    if not rows:
        return {}
    columns = {name: [row[name] for row in rows] for name in needed}
    columns |= {name: [row.get(name) for row in rows] for name in rows[0] if name not in (*needed, "layer")}
    arrays = {name: np.array(column, dtype=float) for name, column in columns.items()}
    if lists := [name for name, array in arrays.items() if array.ndim != 1]:
        raise ValueError(f"lists for {', '.join(lists)}: expected numbers")
    return arrays
