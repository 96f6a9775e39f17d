"""Figures of weights: the paths of a few around their thresholds, and how each layer zig-zags."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blaq.grids import Grid
from blaq.optim.plan import plan
from blaq.report.contrast import late_value, late_zigzag
from blaq.report.figures import (
    CYCLE,
    GREY,
    MAX_POINTS,
    PERCENT,
    ZIGZAG_MEASURES,
    Figure,
    View,
    base_layout,
    colours,
    encoded,
)
from blaq.report.panels import Variant
from blaq.report.read import TOTAL, Column, Run, Trajectory, read_trajectories
from blaq.tasks.models import build_model
from blaq.train.module import build_groups
from blaq.train.statistics import Sample

MAX_WEIGHTS = len(CYCLE)
MAX_LAYERS = 6
MAX_VARIANTS = 3


def grids_of(run: Run) -> dict[str, Grid]:
    """Parameter name to grid, of the quantized parameters of a run."""
    recipe = run.recipe
    model = build_model(recipe.model.name, **recipe.model.options)
    rows = plan(build_groups(model, recipe.optim)).rows
    return {row.name: Grid.parse(row.scheme) for row in rows if row.quantized}


def thresholds(grid: Grid) -> list[float]:
    """Where rounding to the nearest level turns over, in units of the scale.

    Example:
        >>> thresholds(Grid.parse("ternary")), thresholds(Grid.parse("midrise2"))
        ([-0.5, 0.5], [-2.0, 0.0, 2.0])
    """
    levels = grid.levels.tolist()
    return [(low + high) / 2 for low, high in pairwise(levels)]


def changes(trajectory: Trajectory) -> list[int]:
    """How often each followed weight has another quantized level at a probe than at the probe before."""
    level = np.rint(
        np.divide(trajectory.value, trajectory.scale, where=trajectory.scale > 0, out=np.zeros_like(trajectory.value))
    )
    return [int(count) for count in (np.diff(level, axis=0) != 0).sum(axis=0)]


def trajectories(variants: Sequence[Variant], slug: str) -> list[Figure]:
    """The followed weights of the first seed of each variant, a chart a variant, a layer at a time; probed runs alone."""
    probed = [(variant, read_trajectories(variant.runs[0])) for variant in variants if variant.quantized]
    probed = [(variant, found) for variant, found in probed if found][:MAX_VARIANTS]
    if not probed:
        return []
    names = _layers([found for _, found in probed])
    grids = grids_of(probed[0][0].runs[0])
    reach = {name: _reach([found[name] for _, found in probed], grids.get(name)) for name in names}
    return [
        _paths(variant, {name: found[name] for name in names}, grids, reach, f"{slug}-{_part(variant)}")
        for variant, found in probed
    ]


def _part(variant: Variant) -> str:
    """Of a slug: a = 1 of a method stands beside that method's best setting, and is LAQ."""
    return "laq" if variant.control else variant.method


def _layers(probed: Sequence[Mapping[str, Trajectory]]) -> list[str]:
    """The layers that all have, the liveliest first."""
    shared = [name for name in probed[0] if all(name in found for found in probed)]
    ordered = sorted(shared, key=lambda name: -sum(sum(changes(found[name])) for found in probed))
    return ordered[:MAX_LAYERS]


def _relative(trajectory: Trajectory) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Latent weights in units of their scale, where the thresholds stand still."""
    return np.divide(
        trajectory.latent, trajectory.scale, where=trajectory.scale > 0, out=np.full_like(trajectory.latent, np.nan)
    )


def _reach(found: Sequence[Trajectory], grid: Grid | None) -> float:
    """Half the height that the paths and the inner thresholds need."""
    highest = max((float(np.nanmax(np.abs(_relative(of)[:, :MAX_WEIGHTS]), initial=0.0)) for of in found), default=0.0)
    inner = min((abs(threshold) for threshold in thresholds(grid)), default=0.0) if grid else 0.0
    return 1.08 * max(highest, inner, 1e-3)


def _paths(
    variant: Variant, found: Mapping[str, Trajectory], grids: Mapping[str, Grid], reach: Mapping[str, float], slug: str
) -> Figure:
    traces = [
        {"type": "scatter", "mode": "lines", "name": f"weight {number + 1}", "line": {"color": colour, "width": 1.4}}
        for number, colour in enumerate(CYCLE)
    ]
    y, titles = {}, {}
    for name, trajectory in found.items():
        relative = _relative(trajectory)
        weights = min(relative.shape[1], MAX_WEIGHTS)
        lines: list[dict[str, Any]] = [{"x": [], "y": [], "visible": False} for _ in range(MAX_WEIGHTS)]
        for line, path in zip(lines, relative.T, strict=False):
            drawn = extremes(path)
            line.update(x=encoded(trajectory.steps[drawn]), y=encoded(path[drawn]), visible=True)
        y[name] = View(name, lines, {
            "yaxis.range": [-reach[name], reach[name]],
            "shapes": _lines(grids[name], reach[name]) if name in grids else [],
        })  # fmt: skip
        counts = changes(trajectory)[:weights]
        moved = sum(count > 0 for count in counts)
        titles[f"{name} "] = (
            f"{variant.label}: {moved} of {weights} followed weights of {name} change their level, {sum(counts)} "
            f"{'time' if sum(counts) == 1 else 'times'} in all"
        )
    layout = base_layout(showlegend=False)
    layout["xaxis"] |= {"title": {"text": "steps"}}
    layout["yaxis"] |= {"title": {"text": "latent weight / scale"}}
    together = max(_together(len(trajectory.steps)) for trajectory in found.values())
    caption = f"Seed {variant.runs[0].seed}." + (
        f" Of every {together} probes the lowest and the highest are drawn." if together > 1 else ""
    )
    return Figure(slug, titles, caption, traces, layout, y, height=340)


def extremes(path: Column) -> NDArray[np.intp]:
    """Which points of a path are drawn: all, or of every few the lowest and the highest, so that no crossing of a threshold is
    lost; every k-th would make a weight that goes to and fro at every probe a straight line.

    Example:
        >>> flipping = np.tile([0.1, -0.1], 450)
        >>> len(extremes(flipping)), bool(np.diff(flipping[extremes(flipping)]).all())
        (450, True)
    """
    together = _together(len(path))
    if together == 1:
        return np.arange(len(path))
    stretches = [range(at, min(at + together, len(path))) for at in range(0, len(path), together)]
    ends = {of[int(pick(path[of.start : of.stop]))] for of in stretches for pick in (np.argmin, np.argmax)}
    return np.array(sorted(ends))


def _together(probes: int) -> int:
    """How many probes are drawn as their lowest and highest."""
    return 1 if probes <= MAX_POINTS else -(-2 * probes // MAX_POINTS)


def _lines(grid: Grid, reach: float) -> list[dict[str, Any]]:
    return [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at, "layer": "above",
         "line": {"dash": "dash", "width": 1.5, "color": GREY}}
        for at in thresholds(grid) if abs(at) <= reach
    ]  # fmt: skip


def layer_zigzag(variants: Sequence[Variant], slug: str) -> Figure | None:
    """Zig-zag rate and flip rate of every layer, a dot a variant; None where nothing was probed."""
    probed = [variant for variant in variants if not math.isnan(late_zigzag(variant))]
    names = list(dict.fromkeys(name for variant in probed for name in variant.runs[0].zigzag if name != TOTAL))
    if not names:
        return None
    measures = {name: ZIGZAG_MEASURES[name] for name in ("zigzag_rate", "flip_rate", "gradient_cosine")}
    y: dict[str, View] = {}
    for measure, label in measures.items():
        traces: list[dict[str, Any]] = []
        for variant in probed:
            spread = [late_spread(variant, measure, name) for name in names]
            sds = [0.0 if math.isnan(sd) else sd for _, sd in spread]
            traces.append(
                {"x": encoded([mean for mean, _ in spread]), "error_x": {"type": "data", "array": sds, "thickness": 1}}
            )
        y[measure] = View(label, traces, {"xaxis.title.text": label})
    if all(late_spread(variant, "zigzag_rate", name)[0] == 0 for variant in probed for name in names):
        y["zigzag_rate"] = y.pop("zigzag_rate")  # momentum keeps the updates straight: nothing to see first
    symbols = ("circle", "square", "diamond", "triangle-up", "cross", "x")
    traces = [
        {"type": "scatter", "mode": "markers", "name": variant.label, "y": names,
         "marker": {"size": 9, "color": colour, "symbol": symbols[index % len(symbols)]}}
        for index, (variant, colour) in enumerate(zip(probed, colours(probed), strict=True))
    ]  # fmt: skip
    layout = base_layout()
    layout["xaxis"] |= {"rangemode": "tozero"}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed"}
    titles = {f"{measure} ": _layers_title(probed, names, measure) for measure in y}
    caption = (
        "Mean over the second half of training; whiskers are ± one standard deviation over the seeds. The title counts means, "
        "however near."
    )
    return Figure(slug, titles, caption, traces, layout, y, height=130 + 26 * len(names))


def late_spread(variant: Variant, measure: str, layer: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of what a measure came to late in training; rates in percent."""
    values = []
    for run in variant.runs:
        column = run.zigzag.get(layer, {}).get(measure, np.array([]))
        late = late_value(measure, column)
        if not math.isnan(late):
            values.append(late * (100 if measure in PERCENT else 1))
    if not values:
        return math.nan, math.nan
    sample = Sample(tuple(values))
    return sample.mean, sample.sd


def _layers_title(variants: Sequence[Variant], names: Sequence[str], measure: str) -> str:
    what = ZIGZAG_MEASURES[measure].partition(" (")[0].capitalize()
    control = next((variant for variant in variants if variant.control), None)
    others = [variant for variant in variants if variant is not control]
    if control is None or not others:
        rates = {name: late_spread(variants[0], measure, name)[0] for name in names}
        top = max(rates, key=lambda name: (rates[name] == rates[name], rates[name]))
        return f"{what} is highest in {top}: {rates[top]:.3g}{' %' if measure in PERCENT else ''} ({variants[0].label})"
    parts = []
    for variant in others:
        lower = sum(late_spread(variant, measure, n)[0] < late_spread(control, measure, n)[0] for n in names)
        parts.append(f"{variant.label} in {lower} of {len(names)} layers")
    return f"{what} lower than {control.label}'s: {'; '.join(parts)}"
