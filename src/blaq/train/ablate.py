"""A grid of settings on one recipe: the runs, their tables, and which settings differ from LAQ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blaq.train.config import METHODS, Recipe
from blaq.train.grid import GRID, METHOD, combinations, unquoted
from blaq.train.statistics import CONFIDENCE
from blaq.train.summary import Group, Measure, Setting, settings_of
from blaq.train.sweep import Outcome, Sweeper, claim, say_data, spelt_as_before
from blaq.train.tables import write_tables

# Settings of which LAQ is a special case; the others have to agree where a setting is set against LAQ.
STEP_BACK = frozenset({METHOD, "optim.a", "optim.period", "optim.trial_every"})
MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Ablation:
    """The finished runs of an ablation, and why the others failed.

    Attributes:
        recipe: what was run, but for the settings and the seed.
        sets: key to values, in the order they were given.
        outcome: of the runs.
        target: training loss whose cost is told; none takes the lowest that every run reached.
        seeds: every setting was to be run with them.
    """

    recipe: Recipe
    sets: Mapping[str, Sequence[str]]
    outcome: Outcome
    target: float | None = None
    seeds: Sequence[int] = ()

    @property
    def groups(self) -> list[Group]:
        """The settings, each group with its own LAQ where LAQ is among them: method laq, or blaq or delayed with a = 1."""
        settings = settings_of(self.outcome.runs, self.seeds)
        others = [key for key in self.sets if key not in STEP_BACK]
        if not any(self._is_laq(setting) for setting in settings):
            return [Group(title=self.recipe.title, settings=tuple(settings), reference=None, target=self.target)]
        each = [(tuple(setting.values[key] for key in others), setting) for setting in settings]
        # A method that does not read a setting stands beside every value of it: float beside all bits.
        apart = [
            values for values in dict.fromkeys(values for values, _ in each) if not _stands_beside_more(values, each)
        ]
        groups = []
        for values in apart:
            members = [setting for own, setting in each if _stands_beside(own, values)]
            title = ", ".join(f"{key}={value}" for key, value in zip(others, values, strict=True))
            found = [setting for setting in members if self._is_laq(setting)]
            # By method, where no seed is missing: what a = 1 costs is not what LAQ costs.
            reference = min(_fullest(found), key=lambda setting: setting.values.get(METHOD) != "laq", default=None)
            groups.append(
                Group(
                    title=title or self.recipe.title,
                    settings=tuple(members),
                    reference=reference,
                    target=self.target,
                )
            )
        return groups

    @property
    def failures(self) -> Mapping[str, str]:
        """Name to message of the runs that failed."""
        return self.outcome.failures

    def _is_laq(self, setting: Setting) -> bool:
        method = setting.values.get(METHOD) or self.recipe.optim.method
        a = float(setting.values.get("optim.a") or self.recipe.optim.a)
        return method == "laq" or (METHODS[method].trial in ("fresh", "delayed") and a == 1)

    def conclusion(self) -> list[str]:
        """How many settings differ from LAQ, how many would by chance, and which validation prefers."""
        groups = self.groups
        return [self._judge(group, Measure.of(self.recipe), several=len(groups) > 1) for group in groups]

    def _judge(self, group: Group, measure: Measure, *, several: bool) -> str:
        where = f" ({group.title})" if several else ""
        line = f"Look at {measure.name}{where}: {self._choice(group, measure)}; "
        if group.reference is None:
            return line + "LAQ is not among the settings (optim.a=1, or optim.method=laq), so none is set against it."
        laq = f"{group.reference.sample(measure.field).show(measure.digits)}{measure.unit}"
        found = {"lower": list[str](), "higher": list[str](), "open": list[str](), "flat": list[str]()}
        for setting, difference in zip(group.settings, group.differences(measure.field), strict=True):
            if difference is not None and len(difference.values) > 1 and not self._is_laq(setting):
                verdict = "flat" if difference.flat else difference.verdict
                found[verdict].append(f"{setting.name} ({difference.show(measure.digits)})")
        differences = [of for of in group.differences(measure.field) if of is not None]
        if all(len(of.values) == 1 for of in differences):
            why = "a single seed, which cannot tell anything from seed noise" if differences else "no setting beside it"
            return f"{line}LAQ ({group.reference.name}) has {laq} [{why}]."
        flat = f", {_some(found['flat'])} the same distance away in every seed" if found["flat"] else ""
        notes = ["95 % intervals, paired t"]
        if flat:
            notes.append("differences without any spread have no interval")
        if count := sum(len(found[verdict]) for verdict in ("lower", "higher", "open")):
            chance = (1 - CONFIDENCE) * count
            notes.append(f"by chance alone about {chance:.2g} of {count} would be ahead or behind")
        return (
            f"{line}against LAQ ({group.reference.name}: {laq}) {_some(found['lower'])} ahead, {_some(found['higher'])} "
            f"behind, {len(found['open'])} not told apart from seed noise{flat} [{'; '.join(notes)}]."
        )

    def _choice(self, group: Group, measure: Measure) -> str:
        """Which setting validation prefers, and which could not be preferred."""
        field = measure.field.replace("test", "validation")
        best = min(_fullest(group.settings), key=lambda setting: setting.sample(field).mean)
        most = max(len(setting.runs) for setting in group.settings)
        fewer = [f"{of.name}: {len(of.runs)} of {most}" for of in group.settings if len(of.runs) < most]
        return (
            f"the lowest {field.replace('_', ' ')} has {best.name}, with {measure.name} "
            f"{best.sample(measure.field).show(measure.digits)}{measure.unit}"
            + (f"; with missing seeds, so not chosen beside fuller ones: {_some(fewer)}" if fewer else "")
        )


def ablate(
    recipe: Recipe,
    sets: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    out: Path | str,
    sweeper: Sweeper,
    *,
    target: float | None = None,
) -> Ablation:
    """Train a recipe with every combination of settings and every seed, each into ``out/runs/<name>``; write the tables.

    Runs that are finished are not repeated, those begun are resumed. A run that fails is reported and the others go on.
    Writes the files of `blaq.train.compare.compare`, in results.csv the settings as further columns.

    Raises:
        ValueError: an unknown setting or value, settings that do not fit together; the directory holds something else.
    """
    if target is not None and not math.isfinite(target):
        raise ValueError(f"ablate(target={target}): expected a finite training loss.")
    out = Path(out)
    if GRID in sets:
        values = spelt_as_before([unquoted(GRID, value) for value in sets[GRID]], out)
        if len(set(values)) == len(values):  # else two of them are one grid, which is refused below
            sets = {**sets, GRID: list(map(str, values))}
    jobs = combinations(recipe, sets, seeds)
    quantized = [job.recipe.optim for job in jobs if job.recipe.optim.trains_by.quantized]
    description = {
        "kind": "ablate",
        "recipe": recipe.name,
        "methods": list(dict.fromkeys(job.recipe.optim.method for job in jobs)),
        "bits": list(dict.fromkeys(optim.bits for optim in quantized)),
        "seeds": list(seeds),
        "budget": "steps",
        "target": target,
        "sets": {key: list(values) for key, values in sets.items()},
    }
    claim(out, recipe, description, {"runs": jobs})
    say_data(jobs, sweeper.console)

    def write(outcome: Outcome) -> None:
        ablation = Ablation(recipe, sets, outcome, target, seeds)
        write_tables(out, recipe, outcome, ablation.groups, ablation.conclusion(), [])

    return Ablation(recipe, sets, sweeper.run(jobs, out / "runs", finished=write), target, seeds)


def _fullest(settings: Sequence[Setting]) -> list[Setting]:
    """Those with the most seeds: the error of the one that a failing setting left may be luck."""
    most = max((len(setting.runs) for setting in settings), default=0)
    return [setting for setting in settings if len(setting.runs) == most]


def _stands_beside(own: tuple[str, ...], values: tuple[str, ...]) -> bool:
    """Whether what is stated of some settings is what others have; "" is not stated."""
    return all(one in ("", other) for one, other in zip(own, values, strict=True))


def _stands_beside_more(own: tuple[str, ...], each: Sequence[tuple[tuple[str, ...], Setting]]) -> bool:
    return any(own != values and _stands_beside(own, values) for values, _ in each)


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them by name."""
    if not names:
        return "none"
    more = ", .." if len(names) > MOST_NAMED else ""
    return f"{len(names)} ({'; '.join(names[:MOST_NAMED])}{more})"
