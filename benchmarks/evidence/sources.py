"""Where the runs of a folder are read from: its run directories, or the small files that earlier pages left of them.

Run directories are large and not kept. What the pages tell of them is: results.csv in the folder's own copy, and beside that
copy zigzag.csv and cost.csv, of all folders. So pages can be written anew when some of their folders were run again.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blaq.train.config import Recipe, load_recipe
from blaq.train.directory import RunDirectory
from blaq.train.files import read_rows
from blaq.train.run import Result, read_result
from blaq.train.sweep import Run
from blaq.train.toml import to_tree
from blaq.zigzag.measures import Measures

Reached = Mapping[str, float | None]

LEFT = "unfinished.json"  # run name to why it has no result; only where there is one
REACHED = ("target_loss", "steps_to_target", "gradients_to_target", "shared_seconds_to_target")


@dataclass(frozen=True, slots=True)
class Source:
    """What is read of the runs; the fields are those of `Folder`."""

    runs: list[Run]
    recipes: Mapping[str, Recipe]
    zigzag: Mapping[str, Sequence[Mapping[str, Any]]]
    failures: Mapping[str, str]
    versions: Mapping[str, Any]
    missing: Sequence[str]
    reached: Mapping[tuple[str, str], Reached] | None


def read(path: Path, design: Mapping[str, Any]) -> Source:
    """Read run directories where there are any, else what earlier pages left.

    Raises:
        ValueError: there is neither.
    """
    return _from_directories(path, design) if (path / "runs").is_dir() else _from_pages(path, design)


def _from_directories(path: Path, design: Mapping[str, Any]) -> Source:
    runs, recipes, zigzag, missing, versions = [], {}, {}, [], None
    for recipe_file in sorted((path / "runs").glob("*/recipe.toml")):
        directory = RunDirectory(recipe_file.parent)
        name = directory.path.name
        if not directory.finished:
            missing.append(name)
            continue
        result, recipe = read_result(directory), load_recipe(recipe_file)
        settings = _settings(design, recipe, result)
        runs.append(Run(name=name, settings=settings, result=result, metrics=directory.metrics()))
        recipes[name] = recipe
        zigzag[name] = read_rows(directory.zigzag_file)
        versions = versions or read_json(directory.path / "versions.json")
    failures = read_json(path / "results.json").get("failures", {})
    return Source(runs, recipes, zigzag, failures, versions or {}, missing, reached=None)


def _from_pages(path: Path, design: Mapping[str, Any]) -> Source:
    shared, costs = load_recipe(path / "recipe.toml"), path.parent / "cost.csv"
    if design["kind"] == "compare" and not costs.exists():
        raise ValueError(f"evidence: {path} has no runs, and no cost.csv beside it; name the folder of the runs.")
    runs, recipes = [], {}
    for row in read_csv(path / "results.csv"):
        result = Result(**{field.name: _value(row[field.name], field.type) for field in fields(Result)})
        own = {"optim.method": result.method, "train.seed": result.seed}
        own |= {} if result.method == "float" else {"optim.bits": result.bits}
        own |= {key: value for key, value in row.items() if "." in key and value}
        recipe = shared.with_([f"{key}={value}" for key, value in own.items()])
        runs.append(Run(name=row["run"], settings=_settings(design, recipe, result), result=result))
        recipes[row["run"]] = recipe
    left = read_json(path / LEFT)
    return Source(
        runs=runs,
        recipes=recipes,
        zigzag=_zigzag(path, runs),
        failures={name: why for name, why in left.items() if why},
        versions=read_json(path / "versions.json"),
        missing=list(left),
        reached={
            (row["group"], row["method"]): {name: float(row[name]) if row[name] else None for name in REACHED}
            for row in read_csv(costs)
            if row["folder"] == path.name
        },
    )


def _zigzag(path: Path, runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """The halves of every run and layer as if they were two epochs, of which each half is one."""
    names = {(run.result.method, str(run.result.bits), str(run.result.seed)): run.name for run in runs}
    found: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs}
    for row in read_csv(path.parent / "zigzag.csv"):
        if row["folder"] == path.name:
            measures = {name: float(row[name]) if row[name] else None for name in Measures.__dataclass_fields__}
            found[names[row["method"], row["bits"], row["seed"]]].append({"layer": row["layer"], **measures})
    return found


def flat(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe by their keys, as `--set` names them."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for name, member in value.items():
                yield from walk(member, f"{key}.{name}" if key else name)
        else:
            yield key, value

    return dict(walk(to_tree(asdict(recipe)), ""))


def _settings(design: Mapping[str, Any], recipe: Recipe, result: Result) -> dict[str, str]:
    """What tells a run from the others: method and bits, in an ablation what it varies."""
    if design["kind"] == "ablate":
        return {key: str(flat(recipe)[key]) for key in design["sets"]}
    return {"method": result.method, "bits": str(result.bits)}


def _value(text: str, kind: object) -> Any:
    """A cell of results.csv as the field's type has it."""
    if kind is str:
        return text
    if kind is float:
        return float(text)
    return int(text) if text.isdecimal() else text or None


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none without it."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing without it."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
