"""The page of the zig-zag: does it fall, layer by layer?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.folders import Folder
from benchmarks.evidence.methods import FLOAT
from benchmarks.evidence.words import bits_text, bullets, document, join, percent, table
from blaq.train.compare import REFERENCE
from blaq.train.statistics import Difference, paired
from blaq.train.summary import Setting
from blaq.train.tables import write_csv
from blaq.zigzag.measures import TOTAL, Measures

MEASURES = tuple(Measures.__dataclass_fields__)
DIGITS = ".6g"
SHOWN_BITS = ("1", "2")
FALLS = ("oscillation_frequency", "flip_rate")


@dataclass(frozen=True, slots=True)
class Change:
    """A measure of a method minus LAQ's, over LAQ's mean: of a layer or in total; and whether the learning rates agree."""

    folder: Folder
    bits: str
    method: str
    layer: str
    measure: str
    difference: Difference
    relative: float
    same_rate: bool

    def show(self) -> str:
        """In percent of LAQ's; a star where the difference's own interval leaves zero out."""
        return percent(self.relative) + "*" * (self.difference.verdict != "open")


def of_run(folder: Folder, name: str, layer: str, measure: str, *, late: bool = True) -> float:
    """A measure of a run, its mean over the second half of the epochs or the first (path efficiency: its end); NaN if none.

    Rounded as zigzag.csv has it, so that the pages can be written from that file too.
    """
    rows = [row for row in folder.zigzag.get(name, ()) if row["layer"] == layer]
    half = len(rows) // 2
    rows = rows[half:] if late else rows[:half]
    values = [row[measure] for row in rows if row[measure] is not None]
    if not values:
        return math.nan
    value = values[-1] if measure == "path_efficiency" else math.fsum(values) / len(values)
    return float(f"{value:{DIGITS}}")


def layers_of(folder: Folder) -> list[str]:
    """The probed layers, "total" last."""
    names = dict.fromkeys(row["layer"] for rows in folder.zigzag.values() for row in rows)
    return [name for name in names if name != TOTAL] + [TOTAL] * (TOTAL in names)


def values_of(folder: Folder, setting: Setting, layer: str, measure: str) -> dict[int, float]:
    """A measure by seed, without the runs that have no value."""
    found = {run.result.seed: of_run(folder, run.name, layer, measure) for run in setting.runs}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def change(folder: Folder, bits: str, method: str, layer: str, measure: str) -> Change | None:
    """A method against LAQ; None where one of the two has no value, or LAQ's is zero."""
    group = folder.group(bits)
    assert group.reference is not None
    setting = next((one for one in group.settings if one.values["method"] == method), None)
    if setting is None:
        return None
    theirs = values_of(folder, group.reference, layer, measure)
    difference = paired(values_of(folder, setting, layer, measure), theirs)
    base = math.fsum(theirs.values()) / len(theirs) if theirs else 0.0
    if difference is None or not base:
        return None
    same = folder.lr(setting) == folder.lr(group.reference)
    return Change(folder, bits, method, layer, measure, difference, difference.mean / abs(base), same)


def page(folders: Sequence[Folder], gain_sections: Sequence[str]) -> tuple[str, list[str]]:
    """The page, with the sections about the gain in it, and its answers: what falls, by how much."""
    steps = [folder for folder in folders if folder.design["budget"] == "steps" and folder.zigzag and layers_of(folder)]
    if not steps:
        raise ValueError("evidence: no comparison at equal steps has probes; repeat one with --set probes.every=10.")
    cells = [line for folder in steps for bits in _shown(folder) for line in _falls(folder, bits)]
    answers, in_sum = _in_sum(steps)
    errors = [_errors(folder, bits) for folder in steps for bits in _shown(folder)]
    sections = [
        "# Zig-zag",
        "Means over seeds and over the second half of the epochs (path efficiency: the whole run), of runs at equal "
        "steps; `zigzag.csv` has every grid, both halves, and the runs at equal gradients. The measures are those "
        "of [zigzag.md](../../zigzag.md): codes are looked at every few steps, and with `past` they are those of "
        "the trial point. A star: the own 95 % interval of the difference to LAQ, seed by seed, leaves zero out; "
        "there are many of them, and one in twenty would by chance.",
        "A lower learning rate alone makes fewer flips. Where a method chose another rate than LAQ, that is said, "
        "and its fall is not put down to the method.",
        "## Does it fall?",
        bullets(answers),
        in_sum,
        f"Cells are data set times bits. At {' and '.join(SHOWN_BITS)} bits, one by one:",
        bullets(cells),
        "## The gradient error",
        "How far quantization misleads the gradient, against that at the full-precision weights on the same mini-batch:",
        bullets(errors),
        *gain_sections,
    ]
    for folder in steps:
        for bits in _shown(folder):
            sections += [f"## {folder.task}, {bits_text(bits)}", _totals(folder, bits)]
            sections += [part for measure in FALLS for part in _layers(folder, bits, measure)]
    return document(sections), [*answers, *errors]


def _in_sum(folders: Sequence[Folder]) -> tuple[list[str], str]:
    """A sentence for each method about its oscillation, and the table of all, over data sets, bits and layers."""
    sentences, rows = [], []
    cells = [(folder, bits) for folder in folders for bits in folder.grids]
    for method in dict.fromkeys(method for folder, bits in cells for method in _methods(folder, bits)):
        for measure in FALLS:
            totals = _found([change(folder, bits, method, TOTAL, measure) for folder, bits in cells])
            layers = _found([
                change(folder, bits, method, layer, measure)
                for folder, bits in cells for layer in layers_of(folder) if layer != TOTAL
            ])  # fmt: skip
            if not totals:
                continue
            same = [of for of in totals if of.same_rate]
            middle = percent(float(np.median([of.relative for of in totals])))
            rows.append([method, measure.replace("_", " "), _lower(totals), middle, _lower(same), _lower(layers)])
            if measure == FALLS[0]:
                lower, risen = (sum(of.difference.verdict == way for of in totals) for way in ("lower", "higher"))
                alike = sum(of.difference.verdict == "lower" for of in same)
                sentences.append(
                    f"**{method}**: the oscillation frequency is lower than LAQ's beyond its own interval in {lower} "
                    f"of {len(totals)} cells and higher so in {risen} (median change {middle}); with LAQ's learning "
                    f"rate it is lower so in {alike} of {len(same)}; layer by layer in "
                    f"{sum(of.difference.verdict == 'lower' for of in layers)} of {len(layers)}."
                )
    head = ["method", "measure", "cells: lower / beyond its interval / higher beyond", "median change",
            "the same where the learning rate is LAQ's", "the same by layers"]  # fmt: skip
    return sentences, table(head, rows)


def _found(changes: Sequence[Change | None]) -> list[Change]:
    return [of for of in changes if of is not None]


def _lower(changes: Sequence[Change]) -> str:
    verdicts = [of.difference.verdict for of in changes]
    fallen = sum(of.difference.mean < 0 for of in changes)
    return f"{fallen} / {verdicts.count('lower')} / {verdicts.count('higher')} of {len(changes)}"


def _shown(folder: Folder) -> list[str]:
    return [bits for bits in folder.grids if bits in SHOWN_BITS] or folder.grids[:1]


def _falls(folder: Folder, bits: str) -> Iterator[str]:
    names = [name for name in layers_of(folder) if name != TOTAL]
    for method in _methods(folder, bits):
        parts, same = [], True
        for measure in FALLS:
            total = change(folder, bits, method, TOTAL, measure)
            by_layer = [of for name in names if (of := change(folder, bits, method, name, measure)) is not None]
            if total is None:
                continue
            same = total.same_rate
            falls, certain = (
                [of for of in by_layer if of.difference.mean < 0],
                [of for of in by_layer if of.difference.verdict == "lower"],
            )
            rises = [of for of in by_layer if of.difference.verdict == "higher"]
            parts.append(
                f"{measure.replace('_', ' ')} {total.show()} in total, lower in {len(falls)} of {len(by_layer)} layers "
                f"({len(certain)} beyond its own interval; {len(rises)} higher so)"
            )
        if parts:
            rate = "" if same else " (another learning rate than LAQ's)"
            yield f"{folder.recipe.name}, {bits_text(bits)}, **{method}**{rate}: {'; '.join(parts)}."


def _errors(folder: Folder, bits: str) -> str:
    """LAQ's gradient error, and how that of the others differs."""
    found = _found([change(folder, bits, method, TOTAL, "gradient_error") for method in _methods(folder, bits)])
    reference = folder.group(bits).reference
    assert reference is not None
    values = values_of(folder, reference, TOTAL, "gradient_error").values()
    name = f"{folder.recipe.name}, {bits_text(bits)}"
    if not values:
        return f"{name}: not measured (`probes.gradient_error=true`)."
    others = join([f"{of.method} {of.show()}" + " (other lr)" * (not of.same_rate) for of in found])
    return f"{name}: gradient error of LAQ {math.fsum(values) / len(values):.2f}; against it {others}."


def _methods(folder: Folder, bits: str) -> list[str]:
    methods = [setting.values["method"] for setting in folder.group(bits).settings]
    return [method for method in methods if method not in (FLOAT, REFERENCE)]


def _totals(folder: Folder, bits: str) -> str:
    rows = []
    for setting in folder.group(bits).settings:
        cells = []
        for measure in MEASURES:
            values = list(values_of(folder, setting, TOTAL, measure).values())
            cells.append(f"{math.fsum(values) / len(values):.3g}" if values else "")
        rows.append([setting.values["method"], f"{folder.lr(setting):g}", *cells])
    return table(["method", "lr", *(measure.replace("_", " ") for measure in MEASURES)], rows)


def _layers(folder: Folder, bits: str, measure: str) -> Iterator[str]:
    methods = _methods(folder, bits)
    rows = []
    for layer in layers_of(folder):
        reference = folder.group(bits).reference
        assert reference is not None
        values = list(values_of(folder, reference, layer, measure).values())
        found = [change(folder, bits, method, layer, measure) for method in methods]
        own = f"{math.fsum(values) / len(values):.3g}" if values else "-"
        rows.append([layer, own, *("-" if of is None else of.show() for of in found)])
    yield f"{measure.replace('_', ' ').capitalize()}: LAQ's, and the change of the others against it."
    yield table(["layer", "laq", *methods], rows)


def write_measures(folders: Sequence[Folder], out: Path) -> None:
    """zigzag.csv: a row a run, layer and half of training."""
    rows: list[dict[str, Any]] = []
    for folder in folders:
        for run in folder.runs:
            rate = folder.recipe_of(run).optim.lr
            for layer in layers_of(folder):
                for half, late in (("first", False), ("second", True)):
                    found = {m: of_run(folder, run.name, layer, m, late=late) for m in MEASURES}
                    texts = {name: "" if math.isnan(value) else f"{value:{DIGITS}}" for name, value in found.items()}
                    if any(texts.values()):
                        at = {"folder": folder.name, **run.settings, "lr": rate, "seed": run.result.seed}
                        rows.append({**at, "layer": layer, "half": half, **texts})
    write_csv(out / "zigzag.csv", rows)
