"""Does the fall of the zig-zag go with a gain? Methods at several bits on several data, rank against rank."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.evidence.folders import Folder
from benchmarks.evidence.methods import FLOAT
from benchmarks.evidence.noise import LEVEL, rank_correlation
from benchmarks.evidence.words import bullets, p_is, p_text, table
from benchmarks.evidence.zigzag import FALLS, change
from blaq.train.compare import REFERENCE
from blaq.train.summary import Setting
from blaq.train.tables import write_csv
from blaq.zigzag.measures import TOTAL


@dataclass(frozen=True, slots=True)
class Point:
    """A method at some bits on some data: relative changes against LAQ."""

    folder: Folder
    bits: str
    method: str
    same_rate: bool
    oscillation: float
    flips: float
    train_loss: float
    test: float


def points_of(folders: Sequence[Folder]) -> list[Point]:
    """All methods but float and LAQ, at equal steps: at equal gradients the runs are not equally long."""
    found = []
    for folder in folders:
        for bits in folder.grids if folder.design["budget"] == "steps" else ():
            group = folder.group(bits)
            assert group.reference is not None
            for setting in group.settings:
                method = setting.values["method"]
                moved = [change(folder, bits, method, TOTAL, measure) for measure in FALLS]
                if method in (FLOAT, REFERENCE) or None in moved:
                    continue
                gains = [_relative(setting, group.reference, field) for field in ("train_loss", folder.measure.field)]
                first, second = (of.relative for of in moved if of is not None)
                assert moved[0] is not None
                found.append(Point(folder, bits, method, moved[0].same_rate, first, second, *gains))
    return found


def _relative(setting: Setting, reference: Setting, field: str) -> float:
    difference, base = setting.difference(reference, field), reference.sample(field).mean
    return difference.mean / base if difference is not None and base else 0.0


def sections(folders: Sequence[Folder]) -> tuple[list[str], list[str]]:
    """The sections of the page, and the answers."""
    sentences, correlations = correlation(points_of(folders))
    return [
        "## Does the fall go with a gain?",
        bullets(sentences),
        correlations,
        "A point is a method (not float, not LAQ) at some bits on some data: its relative change of zig-zag against "
        "that of training loss or of test error (text: loss). Rank correlation after Spearman; above 0: where "
        "zig-zag falls, the loss falls. p deals the methods anew within each data set and bits, so that what those "
        "share does not count (for blaq alone: the cells). Correlation over methods is no proof that one makes the "
        "other.",
    ], sentences


def correlation(points: Sequence[Point]) -> tuple[list[str], str]:
    """Sentences and the table, over all points and over parts of them."""
    parts = {
        "all": list(points),
        "same learning rate as LAQ": [point for point in points if point.same_rate],
        "without bwn": [point for point in points if point.method != "bwn"],
        "blaq alone": [point for point in points if point.method == "blaq"],
    }
    rows, sentences = [], []
    for name, members in parts.items():
        for zigzag in ("oscillation", "flips"):
            for gain in ("train_loss", "test"):
                x, y = (np.array([getattr(point, field) for point in members]) for field in (zigzag, gain))
                together = name == "blaq alone"  # one method a cell: the deal is over the cells
                cells = [0 if together else (point.folder.name, point.bits) for point in members]
                rho, p, within = rank_correlation(x, y, cells)
                shown = "-" if math.isnan(rho) else f"{rho:+z.2f}"
                rows.append([name, zigzag, gain.replace("_", " "), shown, p_text(p), str(len(members))])
                if zigzag == "oscillation" and name in ("all", "same learning rate as LAQ"):
                    sentences.append(_correlated(name, gain.replace("_", " "), rho, p, within, len(members)))
    return sentences, table(["points", "zig-zag", "gain in", "rank correlation", "p", "n"], rows)


def _correlated(name: str, gain: str, rho: float, p: float, within: float, count: int) -> str:
    where = f"{name}, {count} points"
    if math.isnan(rho):
        return f"Oscillation and {gain} ({where}): too few points to say."
    if p >= LEVEL:
        return f"Oscillation and {gain} ({where}): no connection shown (rank correlation {rho:+z.2f}, {p_is(p)})."
    way = "goes with a better result" if within > 0 else "goes with a WORSE result"
    return f"Oscillation and {gain} ({where}): its fall {way} (rank correlation {rho:+z.2f}, {p_is(p)})."


def write_points(folders: Sequence[Folder], out: Path) -> None:
    """points.csv: what is correlated."""
    write_csv(out / "points.csv", [{**asdict(point), "folder": point.folder.name} for point in points_of(folders)])
