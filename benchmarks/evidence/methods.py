"""The page of the methods: who is ahead of LAQ beyond noise, at equal steps and at equal gradient evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.folders import Folder
from benchmarks.evidence.noise import LEVEL, holm, pooled_p, sign_test
from benchmarks.evidence.words import NOISE, bits_text, bullets, document, join, p_text, table
from blaq.train.statistics import Difference
from blaq.train.summary import Group, Setting

FLOAT = "float"
STANDINGS = ("ahead", "behind", "suggested ahead", "suggested behind")


@dataclass(frozen=True, slots=True)
class Contrast:
    """A method against LAQ at the same bits.

    Attributes:
        relative: the mean difference over LAQ's mean.
        rates: the learning rates, where the method chose another one than LAQ: its own and LAQ's.
        p: corrected over all contrasts of the same measure.
    """

    folder: Folder
    bits: str
    method: str
    field: str
    difference: Difference
    relative: float
    rates: tuple[float, float] | None
    p: float

    @property
    def standing(self) -> str:
        """ahead, behind: beyond noise; suggested ahead, suggested behind: by its own interval alone; open."""
        way = "ahead" if self.difference.mean < 0 else "behind"
        if self.p < LEVEL:
            return way
        return "open" if self.difference.verdict == "open" else f"suggested {way}"


def contrasts(folders: Sequence[Folder], *, loss: bool) -> list[Contrast]:
    """Every quantized method against LAQ; of training loss, or of what the task is judged by."""
    found: list[tuple[Folder, str, str, str, Difference, float, tuple[float, float] | None]] = []
    p: list[float] = []
    for folder in folders:
        field = "train_loss" if loss else folder.measure.field
        for bits in folder.grids:
            group = folder.group(bits)
            settings = [setting for setting in group.settings if setting.values["method"] != FLOAT]
            assert group.reference is not None
            pooled = _pooled(settings, group.reference, field)
            base = group.reference.sample(field).mean
            for setting in settings:
                difference = setting.difference(group.reference, field)
                if setting is group.reference or difference is None:
                    continue
                method = setting.values["method"]
                relative = difference.mean / base if base else 0.0
                own, theirs = folder.lr(setting), folder.lr(group.reference)
                rates = None if own == theirs else (own, theirs)
                found.append((folder, bits, method, field, difference, relative, rates))
                p.append(pooled.get(method, 1.0))
    return [Contrast(*of, p=corrected) for of, corrected in zip(found, holm(p), strict=True)]


def _pooled(settings: Sequence[Setting], reference: Setting, field: str) -> dict[str, float]:
    """p of the methods with all of LAQ's seeds; none with a single seed."""
    seeds = [run.result.seed for run in reference.runs]
    whole = [setting for setting in settings if [run.result.seed for run in setting.runs] == seeds]
    if len(seeds) < 2 or len(whole) < 2:
        return {}
    values = np.array([setting.sample(field).values for setting in whole])
    p = pooled_p(values, whole.index(reference))
    return {setting.values["method"]: of for setting, of in zip(whole, p, strict=True)}


def page(folders: Sequence[Folder]) -> tuple[str, list[str]]:
    """The page, and its answers: a line for each budget, method and measure."""
    judged = {False: contrasts(folders, loss=False), True: contrasts(folders, loss=True)}
    answers, in_sum = _in_sum(judged)
    sections = [
        "# Methods against LAQ",
        "Every method with the learning rate that it chose itself on validation data, unless it says otherwise "
        "below. Test numbers are of the epoch with the lowest validation error; the training loss is the mean of "
        "the last epoch.",
        NOISE,
        "## In sum",
        bullets(answers),
        in_sum,
        "Cells are data set times bits; they share seeds within a data set, so the sign test takes them for more "
        "independent than they are. Where a method chose another learning rate than LAQ, part of a difference in "
        "training loss is that of the rates: they were chosen by validation error (text: loss), not by training "
        "loss.",
    ]
    for folder in folders:
        sections += [f"## {folder.title}", f"```\n{folder.command()}\n```", bullets([*folder.caveats()])]
        sections.append(_table(folder, judged))
        sections.append(bullets([_sentence(folder, bits, judged) for bits in folder.grids]))
    return document(sections), answers


def _in_sum(judged: dict[bool, list[Contrast]]) -> tuple[list[str], str]:
    """A sentence for each measure and budget, and the table of every method."""
    sentences, rows = [], []
    for loss, name in ((False, "test error (text: test loss)"), (True, "training loss")):
        for equal in dict.fromkeys(of.folder.equal for of in judged[loss]):
            here = [of for of in judged[loss] if of.folder.equal == equal]
            said = []
            for method in dict.fromkeys(of.method for of in here):
                cells = [of for of in here if of.method == method]
                lower, higher = (sum(of.difference.mean * sign > 0 for of in cells) for sign in (-1, 1))
                count = {standing: len(_names(cells, standing)) for standing in STANDINGS}
                rows.append([
                    method, equal, name, str(len(cells)), f"{lower} / {higher}", p_text(sign_test(lower, higher)),
                    f"{100 * float(np.median([of.relative for of in cells])):+z.1f} %", f"{count['ahead']} / "
                    f"{count['behind']}",
                    f"{count['suggested ahead']} / {count['suggested behind']}", str(sum(of.rates is not None for of in cells)),
                ])  # fmt: skip
                parts = [
                    f"{standing} in {count[standing]} of {len(cells)} ({join(_names(cells, standing))})"
                    for standing in ("ahead", "behind") if count[standing]
                ]  # fmt: skip
                said += [f"{method} {' and '.join(parts)}"] if parts else []
            intervals = sum(of.difference.verdict != "open" for of in here)
            sentences.append(
                f"**{name}, {equal}**: beyond noise {'; '.join(said) or 'no method is ahead of LAQ or behind it'}. "
                f"(Own intervals without zero: {intervals} of {len(here)}, about {LEVEL * len(here):.1g} of them by "
                "chance.)"
            )
    head = ["method", "at", "measure", "cells", "lower / higher than LAQ", "p, sign test", "median change",
            "ahead / behind beyond noise", "suggested ahead / behind", "other lr than LAQ"]  # fmt: skip
    return sentences, table(head, rows)


def _names(cells: Sequence[Contrast], standing: str) -> list[str]:
    return [f"{of.folder.recipe.name} at {bits_text(of.bits)}" for of in cells if of.standing == standing]


def _table(folder: Folder, judged: dict[bool, list[Contrast]]) -> str:
    measure, edges = folder.measure, folder.edges()
    own = {(of.bits, of.method, loss): of for loss, found in judged.items() for of in found if of.folder is folder}
    rows, seen = [], False
    for bits in folder.grids:
        for setting in _rows(folder.group(bits), with_float=not seen):
            method = setting.values["method"]
            variant = method if method == FLOAT else f"{method}-b{bits}"
            row = ["32" if method == FLOAT else bits, method, f"{folder.lr(setting):g}{' (edge)' * (variant in edges)}"]
            row += [f"{setting.sample(name).mean:,.0f}" for name in ("steps", "gradient_evaluations")]
            for loss, field, digits in ((False, measure.field, measure.digits), (True, "train_loss", 5)):
                contrast = own.get((bits, method, loss)) if method != FLOAT else None
                row.append(setting.sample(field).show(digits))
                row += ["", ""] if contrast is None else [contrast.difference.show(digits), p_text(contrast.p)]
            rows.append([*row, str(len(setting.runs))])
        seen = True
    head = ["bits", "method", "lr", "steps", "gradients", f"{measure.name}{measure.unit}", "minus laq", "p", "training loss",
            "minus laq, loss", "p, loss", "seeds"]  # fmt: skip
    return table(head, rows)


def _rows(group: Group, *, with_float: bool) -> list[Setting]:
    return [setting for setting in group.settings if with_float or setting.values["method"] != FLOAT]


def _rates(contrast: Contrast) -> str:
    """What has to be known where the learning rates differ: part of the difference is theirs."""
    return "" if contrast.rates is None else f" (at lr {contrast.rates[0]:g}, LAQ {contrast.rates[1]:g})"


def _sentence(folder: Folder, bits: str, judged: dict[bool, list[Contrast]]) -> str:
    parts = []
    for loss, name in ((False, folder.measure.name), (True, "training loss")):
        digits = 5 if loss else folder.measure.digits
        cells = [of for of in judged[loss] if of.folder is folder and of.bits == bits]
        said = []
        for standing in STANDINGS:
            names = [
                f"{of.method} by {abs(of.difference.mean):.{digits}f}{_rates(of)}"
                for of in cells
                if of.standing == standing
            ]
            if names:
                said.append(f"{standing}{' beyond noise' * (' ' not in standing)}: {join(names)}")
        open_ = [of.method for of in cells if of.standing == "open"]
        said += [f"not told apart from LAQ: {join(open_)}"] if open_ else []
        parts.append(f"{name}: {'; '.join(said)}")
    return f"**{bits_text(bits)}**. {'. '.join(part[0].upper() + part[1:] for part in parts)}."
