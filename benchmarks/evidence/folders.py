"""A folder of `blaq compare` or `blaq ablate`: its runs, what was asked for, and what a reader has to be told of it."""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.evidence.sources import LEFT, REACHED, Reached, flat, read, read_csv, read_json
from blaq.train.compare import REFERENCE
from blaq.train.config import Recipe, load_recipe
from blaq.train.summary import COSTS, Group, Measure, Setting, settings_of
from blaq.train.sweep import Run

RAW = ("results.csv", "recipe.toml", "comparison.json", "tuning.csv")
WIDER = "wider"  # folder in a comparison's: another one, of a few methods, with learning rates beyond the grid
CHOSEN = ("name", "title", "optim.method", "optim.bits", "train.seed", "train.threads")  # not what shortens a run


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder holds.

    Attributes:
        name: of the folder.
        recipe: what all runs share.
        design: comparison.json.
        runs: the finished ones; settings are method and bits, in an ablation what it varies.
        recipes: run name to its recipe.
        zigzag: run name to the lines of its zigzag.jsonl.
        tuning: the rows of tuning.csv; none where no learning rate was chosen.
        failures: run name to message.
        versions: what the first run was computed with.
        missing: names of the runs that are not finished.
        reached: bits and method to what the target loss cost, where no metrics tell it any more.
        wider: recipe and design of the comparison that tried rates beyond the grid, and the rows of its tuning.csv.
    """

    name: str
    path: Path
    recipe: Recipe
    design: Mapping[str, Any]
    runs: tuple[Run, ...]
    recipes: Mapping[str, Recipe]
    zigzag: Mapping[str, Sequence[Mapping[str, Any]]]
    tuning: Sequence[Mapping[str, str]]
    failures: Mapping[str, str]
    versions: Mapping[str, Any]
    missing: Sequence[str]
    reached: Mapping[tuple[str, str], Reached] | None = None
    wider: tuple[Recipe, Mapping[str, Any], Sequence[Mapping[str, str]]] | None = None

    @property
    def measure(self) -> Measure:
        """By what the task judges: test error, for text test loss."""
        return Measure.of(self.recipe)

    @property
    def equal(self) -> str:
        """What the methods had in equal amounts."""
        return "equal steps" if self.design["budget"] == "steps" else "equal gradient evaluations"

    @property
    def title(self) -> str:
        """The task and the budget."""
        return f"{self.task}, {self.equal}"

    @property
    def task(self) -> str:
        """The recipe's title; but where it was changed, its title may tell other sizes than these runs had."""
        changed = self._of_task(_changed(self.recipe.name, self.recipe))
        return f"{self.recipe.name.removesuffix('-quick')}, shortened" if changed else self.recipe.title

    @property
    def grids(self) -> list[str]:
        """The bits of a comparison, in its order."""
        return [bits for bits in dict.fromkeys(run.settings["bits"] for run in self.runs) if bits != "float"]

    def group(self, bits: str) -> Group:
        """The methods of a comparison at these bits, float among them, against LAQ."""
        members = [run for run in self.runs if run.settings["bits"] in (bits, "float")]
        settings = settings_of(members, self.design["seeds"])
        reference = next((one for one in settings if one.values["method"] == REFERENCE), None)
        if reference is None:
            raise ValueError(f"evidence: {self.path} has no finished run of laq at bits {bits}, the reference; run it.")
        return Group(title=bits, settings=tuple(settings), reference=reference, target=self.design.get("target"))

    def to_target(self, group: Group, setting: Setting) -> Reached:
        """The target loss, and the mean of what it cost a setting: steps, gradients, seconds; None if not all reached it."""
        if self.reached is not None:
            return self.reached[group.title, setting.values["method"]]
        target, costs = group.target_loss, zip(REACHED[1:], COSTS, strict=True)
        samples = {name: None if target is None else setting.to_reach(target, cost) for name, cost in costs}
        return {REACHED[0]: target} | {name: of and of.mean for name, of in samples.items()}

    def lr(self, setting: Setting) -> float:
        """The learning rate that a setting was run with."""
        return self.recipe_of(setting.runs[0]).optim.lr

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe of a run."""
        return self.recipes[run.name]

    def edges(self) -> list[str]:
        """Variants whose chosen learning rate is the lowest or highest of the grid, and which nobody tried beyond it."""
        return [name for name in self._at_the_edge() if name not in self.beyond()]

    def _at_the_edge(self) -> dict[str, Mapping[str, str]]:
        rates = self._rates()
        edge = {min(rates), max(rates)} if len(rates) > 1 else set()
        chosen = [row for row in self.tuning if row["chosen"] == "True"]
        return {row["setting"]: row for row in chosen if float(row["lr"]) in edge}

    def beyond(self) -> dict[str, str]:
        """Variants at the edge that were tried beyond it, and what came of it in words."""
        field = self.measure.field.replace("test", "validation")
        said: dict[str, str] = {}
        for name, row in self._at_the_edge().items():
            rows = [of for of in (self.wider[2] if self.wider else ()) if of["setting"] == name and of[field]]
            tried = {float(of["lr"]): float(of[field]) for of in rows}
            edge = tried.pop(float(row["lr"]), None)
            outside = {rate: value for rate, value in tried.items() if rate not in self._rates()}
            if edge is not None and outside:
                # Another version may round otherwise; what is compared is of one.
                before = f" ({float(row[field]):.4g} when it was chosen)" * (float(row[field]) != edge)
                values = ", ".join(f"{value:.4g} at {rate:g}" for rate, value in outside.items())
                better = " (BETTER)" * (min(outside.values()) < edge)
                said[name] = f"{name} {edge:.4g} at {float(row['lr']):g}{before}, {values}{better}"
        return said

    def _rates(self) -> set[float]:
        return {float(row["lr"]) for row in self.tuning}

    def command(self) -> str:
        """The command that makes these runs."""
        recipe, overrides = self._call()
        words = ["blaq", str(self.design["kind"]), recipe]
        if self.design["kind"] == "compare":
            words += ["--methods", _list(self.design["methods"]), "--bits", _list(self.design["bits"])]
            words += ["--lr", _list(self.design["rates"])] if self.design["rates"] else []
            words += ["--tune-seeds", str(self.design["tune_seeds"])] if self.design.get("tune_seeds", 1) > 1 else []
            words += ["--budget", self.design["budget"]]
        else:
            overrides = [*overrides, *(f"{key}={_list(values)}" for key, values in self.design["sets"].items())]
        words += ["--seeds", str(len(self.design["seeds"]))]
        words += [] if self.design.get("target") is None else ["--target", str(self.design["target"])]
        words += [word for override in overrides for word in ("--set", override)]
        return shlex.join([*words, "--out", f"runs/{self.name}"])

    def _call(self) -> tuple[str, list[str]]:
        """A shipped recipe and what is set on it; or the recipe that is copied beside the results."""
        overrides = [f"{key}={_toml(value)}" for key, (_, value) in _changed(self.recipe.name, self.recipe).items()]
        try:
            if load_recipe(self.recipe.name, overrides) == self.recipe:
                return self.recipe.name, overrides
        except ValueError:
            pass
        return f"docs/results/evidence/{self.name}/recipe.toml", []

    def shortened(self) -> str:
        """Where the runs differ from the recipe in full, in words; empty where they do not."""
        changed = self._of_task(_changed(self.recipe.name.removesuffix("-quick"), self.recipe))
        return "; ".join(f"{key} {_toml(now)} (not {_toml(before)})" for key, (before, now) in changed.items())

    def _of_task(self, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
        """Those of the changes that change the task: not what is compared, nor that it is probed."""
        compared = {*CHOSEN, *(["optim.lr"] if self.tuning else []), *self.design.get("sets", {})}
        return {key: of for key, of in changed.items() if key not in compared and not key.startswith("probes.")}

    def caveats(self) -> Iterator[str]:
        """What weakens the numbers of this folder, a sentence each."""
        seeds = len(self.design["seeds"])
        if seeds < 5:
            yield f"{seeds} {'seed' if seeds == 1 else 'seeds'}: only large differences can be told from noise."
        if shortened := self.shortened():
            yield f"Against the recipe `{self.recipe.name.removesuffix('-quick')}`: {shortened}."
        if self.design["kind"] == "compare" and not self.design["rates"]:
            yield "One learning rate for all methods, not each its own: a method that prefers another one is wronged."
        if self.tuning:
            grid = ", ".join(dict.fromkeys(f"{float(row['lr']):g}" for row in self.tuning))
            edges, beyond = self.edges(), self.beyond()
            chosen = "none of the choices lies at an edge of the grid" + " untried beyond it" * bool(beyond)
            if edges:
                chosen = f"at the edge of the grid, so that a better one may lie outside: {', '.join(edges)}"
            if beyond:
                what = self.measure.name.replace("test", "validation")
                chosen += f". Beyond the edge, by {what} in {WIDER}/tuning.csv: {'; '.join(beyond.values())}"
            each = int(self.tuning[0]["seeds"])
            yield f"Learning rates {grid}, chosen with {each} seed{'s' * (each > 1)} on validation data; {chosen}."
        if self.failures:
            messages = "; ".join(f"{name} ({why})" for name, why in self.failures.items())
            yield f"Failed: {messages}."
        if unfinished := [name for name in self.missing if name not in self.failures]:
            yield f"Not finished: {', '.join(unfinished)}."

    def copy_raw(self, out: Path) -> None:
        """Copy the small files of a comparison, and of one run what all share; write the command beside them."""
        target = out / self.name
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() != self.path.resolve():
            for name in RAW:
                if (self.path / name).exists():
                    shutil.copyfile(self.path / name, target / name)
            if self.wider is not None:
                (target / WIDER).mkdir(exist_ok=True)
                for name in RAW[1:]:
                    shutil.copyfile(self.path / WIDER / name, target / WIDER / name)
        (target / LEFT).unlink(missing_ok=True)
        if left := {**dict.fromkeys(self.missing, ""), **self.failures}:
            (target / LEFT).write_text(json.dumps(left, indent=2) + "\n", encoding="utf-8")
        (target / "versions.json").write_text(json.dumps(self.versions, indent=2) + "\n", encoding="utf-8")
        commands = [self.command()]
        if self.wider is not None:
            recipe, design, _ = self.wider
            commands.append(replace(self, name=f"{self.name}/{WIDER}", recipe=recipe, design=design).command())
        (target / "command.txt").write_text("\n".join(commands) + "\n", encoding="utf-8")


def read_folder(path: Path, kind: Literal["compare", "ablate"]) -> Folder:
    """Read a folder of `blaq compare` or `blaq ablate`, or the copy of its small files beside earlier pages.

    Raises:
        ValueError: it is not of that kind, or has no finished run.
    """
    if not (path / "comparison.json").exists():
        raise ValueError(f"evidence: {path} has no comparison.json; name a folder that blaq compare or ablate wrote.")
    design = read_json(path / "comparison.json")
    if design["kind"] != kind:
        raise ValueError(f"evidence: {path} is a folder of blaq {design['kind']}, expected one of blaq {kind}.")
    source = read(path, design)
    runs = source.runs
    if not runs:
        raise ValueError(f"evidence: {path} has no finished run yet.")
    order = {name: number for number, name in enumerate(design.get("methods", []))}
    grids = [str(bits) for bits in design.get("bits", [])]
    if design["kind"] == "compare":
        runs.sort(key=lambda run: (
            run.settings["bits"] != "float", grids.index(run.settings["bits"]) if run.settings["bits"] in grids else 0,
            order[run.settings["method"]], run.result.seed,
        ))  # fmt: skip
    wider = path / WIDER
    return Folder(
        name=path.resolve().name,
        path=path,
        recipe=load_recipe(path / "recipe.toml"),
        design=design,
        runs=tuple(runs),
        recipes=source.recipes,
        zigzag=source.zigzag,
        tuning=read_csv(path / "tuning.csv"),
        failures=source.failures,
        versions=source.versions,
        missing=source.missing,
        reached=source.reached,
        wider=(load_recipe(wider / "recipe.toml"), read_json(wider / "comparison.json"), read_csv(wider / "tuning.csv"))
        if (wider / "tuning.csv").exists()
        else None,
    )


def _changed(name: str, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which a recipe differs from the shipped one of a name, with both values; nothing is shipped: none."""
    try:
        shipped = flat(load_recipe(name))
    except ValueError:
        return {}
    return {key: (shipped.get(key), value) for key, value in flat(recipe).items() if shipped.get(key) != value}


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, bool | list | tuple | dict) else str(value)


def _list(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
