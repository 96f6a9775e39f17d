"""Figures as plotly takes them, with the words around them; the page shows them and `static` writes them as files."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blaq.report.contrast import AXIS_WORDS, RUNNING, challengers, compare, difference_at, featured, late_value
from blaq.report.panels import Band, Panel, Variant
from blaq.report.rules import Standing
from blaq.report.settings import setting_name

# Okabe and Ito (2008): told apart with any common colour vision. Grey in place of black, and no yellow: both have to
# be seen on white and on dark.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F",
)  # fmt: skip
COLOURS = {"laq": BLUE, "blaq": VERMILLION, "past": GREEN, "delayed": PURPLE, "bwn": ORANGE, "float": GREY}
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY, "#8C510A")
DASHES = {"laq": "solid", "blaq": "solid", "past": "dash", "delayed": "dot", "bwn": "dashdot", "float": "longdash"}
BLUES = ("#E8F1FA", "#C6DBEF", "#9ECAE1", "#6BAED6", "#4292C6")  # black text can be read on all of them
# The middle of plasma (matplotlib): its ends do not show on dark or on white.
PLASMA = ("#9C179E", "#B83289", "#CC4778", "#E16462", "#F2844B", "#FCA636")

MAX_POINTS = 500  # of a curve; longer ones show every k-th epoch
DECADE = 10.0
MOST_ENDS = 4  # named in a title
MAX_LEGEND = 12  # entries; beyond that the hover text names the curves

MEASURES = {
    "train_loss": "training loss",
    "validation_error": "validation error (%)",
    "validation_loss": "validation loss",
}
ZIGZAG_MEASURES = {
    "zigzag_rate": "zig-zag rate (% of steps)",
    "gradient_cosine": "cosine of successive gradients",
    "flip_rate": "flip rate (% of weights a step)",
    "oscillation_frequency": "oscillation (% of steps)",
    "path_efficiency": "path efficiency",
    "gradient_error": "gradient error (relative)",
    "trial_agreement": "trial agreement (cosine)",
}
PERCENT = frozenset({"zigzag_rate", "flip_rate", "oscillation_frequency"})

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class View:
    """One position of a switch: what it changes.

    Attributes:
        label: in the switch.
        traces: for each trace of the figure the entries to put over it.
        layout: entries to put over the layout.
    """

    label: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its switches.

    Attributes:
        slug: name of its files, and its place in the page.
        titles: the finding for each pair of positions of the switches, by ``"y x"``.
        caption: what is drawn, how it was computed.
        traces: what no switch changes.
        layout: the same.
        y: positions of the switch for the measure; the first is shown first. At least one.
        x: positions of the switch for the horizontal axis. At least one.
        height: in pixels.
    """

    slug: str
    titles: Mapping[str, str]
    caption: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]
    y: Mapping[str, View]
    x: Mapping[str, View] = field(default_factory=dict)
    height: int = 380

    @property
    def alt(self) -> str:
        """What a reader who does not see the chart is told."""
        return f"Chart: {next(iter(self.titles.values()))}. {self.caption}"


def encoded(values: NDArray[Any] | Sequence[float]) -> dict[str, str]:
    """Numbers as plotly reads them in a third of the room of text: base64 of little-endian float32."""
    return {"dtype": "f4", "bdata": base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")}


def thinned(epochs: int) -> NDArray[np.intp]:
    """The epochs of a curve that are drawn: all, or every k-th counted back from the last.

    Example:
        >>> thinned(3).tolist(), len(thinned(1000)), thinned(1000)[[0, 1, -1]].tolist()
        ([0, 1, 2], 500, [1, 3, 999])
    """
    every = -(-epochs // MAX_POINTS)
    return np.arange(epochs - 1, -1, -every)[::-1]


def convergence(panel: Panel, slug: str, *, text: bool) -> Figure:
    """Training and validation curves of a panel, per step and per gradient evaluation."""
    names = ["train_loss", "validation_loss"] if text else ["train_loss", "validation_error", "validation_loss"]
    measures = {name: [variant.band(name) for variant in panel.variants] for name in names}
    logarithmic = {
        name: name.endswith("loss") and all((band.mean > 0).all() for band in bands) for name, bands in measures.items()
    }
    titles = {
        f"{name} {axis}": _convergence_title(panel, name, axis, text=text) for name in names for axis in AXIS_WORDS
    }
    labels = {name: MEASURES[name] for name in names}
    return _curves(panel.variants, measures, labels, logarithmic, titles, slug, _seeds_caption(measures["train_loss"]))


def zigzag(panel: Panel, slug: str, *, text: bool) -> Figure | None:
    """The zig-zag measures of all quantized weights over training; None where nothing was probed."""
    variants = [variant for variant in featured(panel, text=text) if variant.zigzag_band("zigzag_rate") is not None]
    measures = {}
    for name in ZIGZAG_MEASURES:
        bands = [_scaled(variant.zigzag_band(name), 100.0 if name in PERCENT else 1.0) for variant in variants]
        if any(band is not None for band in bands):
            measures[name] = bands
    measures = dict(sorted(measures.items(), key=lambda item: not any(_moves(band) for band in item[1])))
    if not variants or not measures:
        return None
    titles = {
        f"{name} {axis}": _late_title(name, variants, bands) for name, bands in measures.items() for axis in AXIS_WORDS
    }
    running = " and ".join(ZIGZAG_MEASURES[name].partition(" (")[0] for name in measures if name in RUNNING)
    but = f", but of {running} the value at its end" if running else ""
    seeds = _seeds_caption([variant.zigzag_band("zigzag_rate") for variant in variants])
    caption = f"Over all quantized weights: means over the probes of an epoch{but}. {seeds}"
    labels = {name: ZIGZAG_MEASURES[name] for name in measures}
    return _curves(variants, measures, labels, {}, titles, slug, caption)


def _moves(band: Band | None) -> bool:
    """Whether there is anything to see: with momentum updates may never turn back."""
    return band is not None and bool(np.nanmax(np.abs(band.mean)) > 0)


def colours(variants: Sequence[Variant]) -> list[str]:
    """One colour a variant: that of its method, or, where a method has several, a scale over them. a = 1, alone, is LAQ."""
    alone = sum(variant.control for variant in variants) == 1
    methods = ["laq" if variant.control and alone else variant.method for variant in variants]
    found = []
    for index, method in enumerate(methods):
        count, rank = methods.count(method), methods[:index].count(method)
        if count == 1:
            found.append(COLOURS.get(method, SKY))
        else:
            found.append(_on_scale(rank / (count - 1)))
    return found


def base_layout(**more: Any) -> dict[str, Any]:
    """The layout that all charts share."""
    return {
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "xaxis": {"automargin": True, "zeroline": False},
        "yaxis": {"automargin": True, "zeroline": False},
        **more,
    }


def _curves(
    variants: Sequence[Variant],
    measures: Mapping[str, Sequence[Band | None]],
    labels: Mapping[str, str],
    logarithmic: Mapping[str, bool],
    titles: Mapping[str, str],
    slug: str,
    caption: str,
) -> Figure:
    """A line and, for several seeds, a band of mean +- sd for each variant: two traces, band first."""
    few = len(variants) <= MAX_LEGEND
    traces: list[Trace] = []
    for variant, colour in zip(variants, colours(variants), strict=True):
        shared = {"type": "scatter", "mode": "lines", "legendgroup": variant.label, "name": variant.label}
        traces.append(shared | {
            "fill": "toself", "fillcolor": colour, "opacity": 0.18, "line": {"width": 0, "color": colour},
            "hoverinfo": "skip", "showlegend": False,
        })  # fmt: skip
        dash = DASHES.get(variant.method, "solid")
        traces.append(
            shared
            | {"line": {"color": colour, "dash": dash, "width": 2 if few or variant.control else 1}, "showlegend": few}
        )
    first = [next(band for band in of if band is not None) for of in zip(*measures.values(), strict=True)]
    x: dict[str, View] = {}
    for axis, words in AXIS_WORDS.items():
        layout = {"xaxis.title.text": words, "xaxis.rangemode": "tozero"}
        x[axis] = View(f"per {words.removesuffix('s')}", _widths(first, axis), layout)
    y = {
        name: View(labels[name], _heights(bands, logarithmic.get(name, False)), {
            "yaxis.title.text": labels[name], "yaxis.type": "log" if logarithmic.get(name) else "linear",
            **({"yaxis.dtick": _ticks(bands), "yaxis.tickformat": "~g"} if logarithmic.get(name) else {}),
        })
        for name, bands in measures.items()
    }  # fmt: skip
    longest = max(len(band.mean) for band in first)
    every = -(-longest // MAX_POINTS)
    note = f" Every {every}{'nd' if every == 2 else 'rd' if every == 3 else 'th'} epoch is drawn." if every > 1 else ""
    if not few:
        note += " There are too many curves for a legend: point at one for its name."
    return Figure(slug, titles, caption + note, traces, base_layout(), y, x)


def _ticks(bands: Sequence[Band | None]) -> str:
    """Of a logarithmic axis: 1, 2 and 5, or every digit where those would leave a tick or two."""
    ends = [(band.mean.min(), band.mean.max()) for band in bands if band is not None]
    return "D1" if max(high for _, high in ends) < DECADE * min(low for low, _ in ends) else "D2"


def _widths(bands: Sequence[Band], axis: str) -> list[Trace]:
    """The x of band and line: the outline of a band runs there and back."""
    found: list[Trace] = []
    for band in bands:
        values = band.axes[axis][thinned(len(band.mean))]
        outline = np.concatenate([values, values[::-1]]) if band.runs > 1 else values[:0]
        found += [{"x": encoded(outline)}, {"x": encoded(values)}]
    return found


def _heights(bands: Sequence[Band | None], logarithmic: bool) -> list[Trace]:
    found: list[Trace] = []
    for band in bands:
        if band is None:
            found += [{"y": encoded([])}, {"y": encoded([])}]
            continue
        shown = thinned(len(band.mean))
        mean, sd = band.mean[shown], np.nan_to_num(band.sd[shown])
        low, high = mean - sd, mean + sd
        if logarithmic:  # what a logarithmic axis cannot show is cut off far below the mean
            low = np.maximum(low, mean / 10)
        outline = np.concatenate([high, low[::-1]]) if band.runs > 1 else mean[:0]
        found += [{"y": encoded(outline)}, {"y": encoded(mean)}]
    return found


def _scaled(band: Band | None, factor: float) -> Band | None:
    return None if band is None else Band(band.axes, factor * band.mean, factor * band.sd, band.runs)


def _convergence_title(panel: Panel, measure: str, axis: Any, *, text: bool) -> str:
    words, what = AXIS_WORDS[axis], MEASURES[measure].removesuffix(" (%)")
    parts = []
    for variant in challengers(panel, text=text):
        found = compare(variant, panel, axis, text=text)
        if found is None:
            continue
        difference = difference_at(variant, found.control, axis, measure, found.point)
        if difference is None:
            parts.append(f"{variant.label} not comparable")
            continue
        said: dict[Standing, str] = {
            "ahead": "lower", "behind": "higher", "level": "within seed noise", "early": found.early,
            "flat": "the same difference in every seed, no interval", "unknown": "one seed, no claim",
        }  # fmt: skip
        parts.append(f"{variant.label} {said[found.standing(difference)]}")
    if parts:
        return f"{what.capitalize()} against LAQ at equal {words}: {'; '.join(parts)}"
    ends = [f"{variant.label}: {variant.band(measure).mean[-1]:.3g}" for variant in panel.variants[:MOST_ENDS]]
    more = f"; and {len(panel.variants) - MOST_ENDS} more" if len(panel.variants) > MOST_ENDS else ""
    return f"{what.capitalize()} at the end: {'; '.join(ends)}{more}"


def _late_title(measure: str, variants: Sequence[Variant], bands: Sequence[Band | None]) -> str:
    what = ZIGZAG_MEASURES[measure].partition(" (")[0]
    parts = []
    for variant, band in zip(variants, bands, strict=True):
        late = np.nan if band is None else late_value(measure, band.mean)
        if not np.isnan(late):
            parts.append(f"{variant.label} {late:.3g}{' %' if measure in PERCENT else ''}")
    when = "at the end of training" if measure in RUNNING else "in the second half of training"
    return f"{what[0].upper()}{what[1:]} {when}: {'; '.join(parts)}"


def _seeds_caption(bands: Sequence[Band | None]) -> str:
    """Of how many runs the curves are: not every run need have been probed."""
    counts = sorted({band.runs for band in bands if band is not None})
    if counts == [1]:
        return "One seed each, so there is no band."
    seeds = " or ".join(map(str, counts)) if len(counts) < 3 else f"{counts[0]} to {counts[-1]}"
    return f"Mean of {seeds} seeds; the band is ± one standard deviation over them."


def _on_scale(position: float) -> str:
    """A colour of the scale, from dark to light, so that it can be told apart with any colour vision, as #RRGGBB."""
    at = position * (len(PLASMA) - 1)
    low = min(int(at), len(PLASMA) - 2)
    pairs = [(int(PLASMA[low][i : i + 2], 16), int(PLASMA[low + 1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(one + (at - low) * (two - one)):02X}" for one, two in pairs)


def axis_label(name: str) -> str:
    """A setting as the title of an axis."""
    meaning = {"optim.a": "a (weight of the current gradient)", "optim.period": "m (one epoch in m has two stages)"}
    return meaning.get(name, setting_name(name))
