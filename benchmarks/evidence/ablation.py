"""The page of the ablation: is the effect of a, and of the period m, larger than seed noise?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.folders import Folder
from benchmarks.evidence.noise import LEVEL, Noise, Values, holm, noise_of, pooled_p
from benchmarks.evidence.words import NOISE, bullets, document, p_is, p_text, table
from blaq.train.statistics import Difference, Sample
from blaq.train.sweep import Run

A, PERIOD = "optim.a", "optim.period"
_TEST = (
    "Test: the values of each seed are dealt anew to the settings, 20,000 times; p is the share of deals whose means spread as "
    "far. Few settings and seeds have few deals, so that p cannot become small; F asks the same of normal noise, and answers "
    f"where p cannot fall below {LEVEL:g}. What seed noise alone gives is reckoned from the rest that settings and seeds leave."
)


@dataclass(frozen=True, slots=True)
class Row:
    """A setting: a, m, and its runs in the order of the seeds."""

    a: float
    period: int
    runs: tuple[Run, ...]

    def values(self, field: str) -> tuple[float, ...]:
        """A field of the result, seed by seed."""
        return tuple(float(getattr(run.result, field)) for run in self.runs)


@dataclass(frozen=True, slots=True)
class Grid:
    """The settings of an ablation that have every seed.

    Attributes:
        below: those with a < 1.
        laq: a = 1, once: it is the same training for every period.
        copies: a = 1 for the other periods.
        seeds: of every setting.
        left_out: names of settings that lack a seed.
    """

    below: tuple[Row, ...]
    laq: Row
    copies: tuple[Row, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether a = 1 came to the same numbers for every period."""
        return all(
            copy.values(field) == self.laq.values(field)
            for copy in self.copies
            for field in ("train_loss", "test_loss")
        )

    def table(self, field: str, rows: Sequence[Row]) -> Values:
        """(settings, seeds)."""
        return np.array([row.values(field) for row in rows])


def grid_of(folder: Folder) -> Grid:
    """The grid of a folder.

    Raises:
        ValueError: it varies other settings than a and the period, or lacks a = 1 or a setting below.
    """
    if not set(folder.design["sets"]) <= {A, PERIOD}:
        raise ValueError(
            f"evidence: {folder.path} varies {', '.join(folder.design['sets'])}; expected {A} and {PERIOD}."
        )
    seeds = tuple(folder.design["seeds"])
    found: dict[tuple[float, int], dict[int, Run]] = {}
    for run in folder.runs:
        optim = folder.recipe_of(run).optim
        found.setdefault((optim.a, optim.period), {})[run.result.seed] = run
    rows, left_out = [], []
    for (a, period), members in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        if set(members) == set(seeds):
            rows.append(Row(a, period, tuple(members[seed] for seed in seeds)))
        else:
            left_out.append(f"a = {a:g}, m = {period}")
    laq, below = [row for row in rows if row.a == 1], [row for row in rows if row.a < 1]
    if not laq or not below:
        raise ValueError(f"evidence: {folder.path} needs all seeds of a = 1 (LAQ) and of a setting with a < 1.")
    return Grid(tuple(below), laq[0], tuple(laq[1:]), seeds, tuple(left_out))


@dataclass(frozen=True, slots=True)
class Finding:
    """What a measure says.

    Attributes:
        tests: name to the spread of settings against seed noise; the first is of all of them, a = 1 once. One seed has none.
        differences: of each setting with a < 1 to a = 1, and the corrected p; NaN with one seed.
    """

    field: str
    name: str
    unit: str
    digits: int
    tests: Mapping[str, Noise]
    differences: Sequence[tuple[Row, Difference, float]]

    def sentence(self) -> str:
        """The answer."""
        best, lowest, _ = min(self.differences, key=lambda item: item[1].mean)
        which = f"Of a < 1 the lowest mean has a = {best.a:g}, m = {best.period}"
        if not self.tests:
            shown = f"{lowest.show(self.digits)}{self.unit}"
            return f"**{self.name}**: not tested; one seed shows no noise. {which} ({shown} against a = 1)."
        (_, noise), *parts = self.tests.items()
        answer, verdict = ("yes", "differ") if noise.beyond else ("not shown", "do not differ")
        lower, higher = (self._beyond(sign) for sign in (-1, 1))
        chance = LEVEL * len(self.differences)
        own = sum(difference.verdict != "open" for _, difference, _ in self.differences)
        told = noise.beyond or lower or higher
        return (
            f"**{self.name}**: {answer}; the {noise.settings} settings {verdict} beyond seed noise "
            f"({_p_of(noise)}{_cannot_tell(noise)}). Their means spread with a "
            f"standard deviation of {noise.spread:.{self.digits}f}{self.unit}, where seed noise alone gives "
            f"{noise.noise_spread:.{self.digits}f}, and over a range of {noise.range:.{self.digits}f}, where noise "
            f"alone gives {noise.noise_range:.{self.digits}f} (95 %: up to "
            f"{noise.noise_range_most:.{self.digits}f}). "
            f"{'; '.join(f'{name}: {_p_of(of)}' for name, of in parts)}. Against a = 1, "
            f"{len(lower)} of {len(self.differences)} settings are lower and {len(higher)} higher beyond noise "
            f"(corrected); by their own intervals {own}, of which {chance:.2g} by chance. {which}"
            + ("." if told else "; that it is this one is chance as far as these runs tell.")
        )

    def _beyond(self, sign: int) -> list[Row]:
        return [row for row, difference, p in self.differences if p < LEVEL and difference.mean * sign > 0]


def _p_of(noise: Noise) -> str:
    """The p that answers."""
    return p_is(noise.p) if noise.dealt else f"F, {p_is(noise.f[1])}"


def _cannot_tell(noise: Noise) -> str:
    """Why the permutation test does not answer, where it does not."""
    why = f"so few seeds cannot tell by permutation: its p is at least {p_text(noise.smallest)}"
    return "" if noise.dealt else f"; {why}"


def findings(folder: Folder, grid: Grid) -> list[Finding]:
    """Test error (text: loss), and training loss."""
    found = []
    measure = folder.measure
    for field, name, unit, digits in (
        (measure.field, measure.name.capitalize(), measure.unit, max(measure.digits, 3)),
        ("train_loss", "Training loss", "", 5),
    ):  # fmt: skip
        values = grid.table(field, [grid.laq, *grid.below])
        several = len(grid.seeds) > 1
        corrected = holm(pooled_p(values, 0)[1:]) if several else [math.nan] * len(grid.below)
        differences = [
            (row, Difference(tuple((of - values[0]).tolist())), p)
            for row, of, p in zip(grid.below, values[1:], corrected, strict=True)
        ]
        tests = {name: noise_of(part) for name, part in parts(grid, field).items() if several and len(part) > 1}
        found.append(Finding(field, name, unit, digits, tests, differences))
    return found


def parts(grid: Grid, field: str) -> dict[str, Values]:
    """What is tested, (settings, seeds) each: all; those with a < 1; a alone, the mean over m; a for each m, with a = 1."""
    tables = {"all": grid.table(field, [grid.laq, *grid.below]), "a < 1": grid.table(field, grid.below)}
    periods = sorted({row.period for row in grid.below})
    by_a = {a: [row for row in grid.below if row.a == a] for a in sorted({row.a for row in grid.below})}
    if len(periods) > 1:
        whole = [grid.table(field, rows).mean(axis=0) for rows in by_a.values() if len(rows) == len(periods)]
        tables["a < 1, mean over m"] = np.array(whole)
        for period in periods:
            rows = [grid.laq, *(row for row in grid.below if row.period == period)]
            tables[f"a up to 1 at m = {period}"] = grid.table(field, rows)
    return tables


def page(folder: Folder) -> tuple[str, list[str]]:
    """The page, and its answer in sentences."""
    grid = grid_of(folder)
    found = findings(folder, grid)
    check = (
        "gave the same numbers for every m, as it must" if grid.same else "did NOT give the same numbers for every m"
    )
    answers = [finding.sentence() for finding in found]
    caveats = [*folder.caveats(), f"a = 1 (LAQ) {check}; it is counted once."]
    caveats += [f"Left out for want of a seed: {', '.join(grid.left_out)}."] if grid.left_out else []
    caveats.append("All settings share one learning rate, though averaging two gradients changes the effective step.")
    sections = [
        f"# Ablation of a and m: {folder.task}",
        "Is the effect of a larger than seed noise? a weights the current gradient (a = 1 is LAQ), m is the period in "
        "epochs.",
        f"```\n{folder.command()}\n```",
        bullets(answers),
        _TEST if len(grid.seeds) > 1 else "",
        bullets(caveats),
    ]
    for finding in found:
        sections += [f"## {finding.name}", _grid_table(grid, finding), _noise_table(found=finding)]
    sections += ["## Differences to a = 1", _difference_table(found), NOISE]
    return document(sections), answers


def _grid_table(grid: Grid, finding: Finding) -> str:
    periods = sorted({row.period for row in grid.below})
    at = {(row.a, row.period): Sample(row.values(finding.field)).show(finding.digits) for row in grid.below}
    laq = Sample(grid.laq.values(finding.field)).show(finding.digits)
    rows = [
        [f"{a:g}", *(at.get((a, period), "-") for period in periods)] for a in sorted({row.a for row in grid.below})
    ]
    return table(["a", *(f"m = {period}" for period in periods)], [*rows, ["1 (LAQ)", *([laq] * len(periods))]])


def _noise_table(found: Finding) -> str:
    if not found.tests:
        return ""
    rows = []
    for name, noise in found.tests.items():
        d = found.digits
        rows.append([
            name, str(noise.settings), f"{noise.seed_sd:.{d}f}", f"{noise.spread:.{d}f}", f"{noise.noise_spread:.{d}f}",
            f"{noise.range:.{d}f}", f"{noise.noise_range:.{d}f} (95 %: {noise.noise_range_most:.{d}f})", p_text(noise.p),
            "-" if math.isnan(noise.f[0]) else f"{noise.f[0]:.2f} ({p_is(noise.f[1])})",
        ])  # fmt: skip
    head = ["settings", "number", "sd over seeds, pooled", "sd of means", "by noise alone", "range of means", "by noise alone",
            "p, permutation", "F"]  # fmt: skip
    head[6] = "range by noise alone"
    return table(head, rows)


def _difference_table(found: Sequence[Finding]) -> str:
    rows = [
        [f"{row.a:g}", str(row.period), *(
            cell for finding in found for _, difference, p in [finding.differences[index]]
            for cell in (difference.show(finding.digits), p_text(p))
        )]
        for index, (row, _, _) in enumerate(found[0].differences)
    ]  # fmt: skip
    return table(
        ["a", "m", *(text for of in found for text in (f"{of.name.lower()} minus a = 1", f"p ({of.field})"))], rows
    )
