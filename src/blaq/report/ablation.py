"""Figures of settings: a heat map over two, points with their spread over one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from blaq.report.contrast import AXIS_WORDS, fullest, validation_field
from blaq.report.contrast import best as lowest
from blaq.report.figures import BLUE, BLUES, VERMILLION, Figure, View, axis_label, base_layout, encoded
from blaq.report.panels import Panel, Variant
from blaq.report.rules import Standing, equal_lengths, standing
from blaq.report.settings import method_name, setting_text
from blaq.report.words import loss_digits
from blaq.train.statistics import paired

AXIS_TITLE = 200  # pixels that the title of a map's vertical axis takes
FIELDS = {
    "test_error": "test error (%)",
    "test_loss": "test loss",
    "train_loss": "training loss",
}


def ablations(panel: Panel, slug: str, *, text: bool) -> Iterator[Figure]:
    """A figure for every method that was run with several settings: of one setting points, of two or more heat maps."""
    for method in dict.fromkeys(variant.method for variant in panel.variants):
        variants = [variant for variant in panel.variants if variant.method == method]
        names = [name for name in panel.varied if len(_values(variants, name)) > 1]
        where = f"{slug}-{method}"
        if len(names) == 1:
            yield _points(panel, variants, names[0], where, text=text)
        elif names:
            yield from _heat_maps(panel, variants, names, where, text=text)


def _values(variants: Sequence[Variant], name: str) -> list[Any]:
    found = {variant.settings.get(name) for variant in variants}
    return sorted(
        found, key=lambda value: (not isinstance(value, int | float), value if value is not None else math.inf)
    )


def _fields(text: bool) -> list[str]:
    return ["test_loss", "train_loss"] if text else ["test_error", "train_loss"]


def _shown(variant: Variant, name: str) -> str:
    sample = variant.sample(name)
    return sample.show(2 if name == "test_error" else loss_digits(sample.mean))


def _title(panel: Panel, variants: Sequence[Variant], name: str, *, text: bool) -> str:
    """The setting that validation data choose, and where LAQ stands to it."""
    best = min(fullest(variants), key=lambda variant: variant.mean(validation_field(text)))
    what, unit = FIELDS[name].removesuffix(" (%)"), " %" if name == "test_error" else ""
    title = f"Validation data choose {best.label}: {what} {_shown(best, name)}{unit}"
    named = [variant for variant in panel.controls if variant.method == "laq"]
    laq = lowest(named or panel.controls, best.seeds, text=text)
    if laq is None or laq is best or best.method == "laq":
        return title
    alike = any(equal_lengths(best.mean(axis), laq.mean(axis)) for axis in AXIS_WORDS)
    stands = standing(paired(best.results(name), laq.results(name))) if alike else "unknown"
    whose = ("LAQ's" if len(named) == 1 else f"{laq.label}'s") if named else "LAQ's (a = 1)"
    said: dict[Standing, str] = {
        "ahead": "lower than", "behind": "higher than", "level": "within seed noise of", "unknown": "beside",
        "flat": "with the same difference in every seed, so no interval, to",
    }  # fmt: skip
    longer = "" if alike else f" after {laq.mean('steps'):,.0f} steps to {best.mean('steps'):,.0f}"
    return f"{title}, {said[stands]} {whose} {_shown(laq, name)}{unit}{longer}"


def _caption(variants: Sequence[Variant]) -> str:
    seeds = sorted({len(variant.runs) for variant in variants})
    of = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    spread = "mean ± one standard deviation" if seeds[-1] > 1 else "one run"
    passed_over = "" if len(seeds) == 1 else " Validation chooses among those with the most seeds."
    return (
        f"Every value is the {spread} of {of} {'seed' if seeds == [1] else 'seeds'}: test values at the epoch with the lowest "
        f"validation error, training loss of the last epoch.{passed_over}"
    )


def _heat_maps(
    panel: Panel, variants: Sequence[Variant], names: Sequence[str], slug: str, *, text: bool
) -> Iterator[Figure]:
    """A map over the first two settings for every combination of the others."""
    rows, columns, *others = names
    for number, rest in enumerate(product(*(_values(variants, name) for name in others))):
        fixed = dict(zip(others, rest, strict=True))
        members = [v for v in variants if all(v.settings.get(name) == value for name, value in fixed.items())]
        if len(members) > 1:
            label = ", ".join(setting_text(name, value) for name, value in fixed.items())
            yield _heat_map(
                panel, members, (rows, columns), f"{slug}-{number + 1}" if others else slug, label, text=text
            )


def _heat_map(
    panel: Panel, variants: Sequence[Variant], names: tuple[str, str], slug: str, label: str, *, text: bool
) -> Figure:
    rows, columns = (_values(variants, name) for name in names)
    at = {(variant.settings.get(names[0]), variant.settings.get(names[1])): variant for variant in variants}
    grid = [[at.get((row, column)) for column in columns] for row in rows]
    y = {}
    for name in _fields(text):
        shown = [[_shown(cell, name) if cell else "" for cell in line] for line in grid]
        values = [[cell.mean(name) if cell else None for cell in line] for line in grid]
        trace = {"z": values, "text": shown}
        y[name] = View(FIELDS[name], [trace])
    trace = {
        "type": "heatmap", "x": [_tick(value) for value in columns], "y": [_tick(value) for value in rows],
        "colorscale": [[index / (len(BLUES) - 1), colour] for index, colour in enumerate(BLUES)],
        "texttemplate": "%{text}", "showscale": False, "textfont": {"color": "#1B1F24"}, "xgap": 2, "ygap": 2,
        "hovertemplate": "%{y}, %{x}: %{text}<extra></extra>",
    }  # fmt: skip
    layout = base_layout()
    layout["xaxis"] |= {"type": "category", "title": {"text": axis_label(names[1])}, "showgrid": False}
    layout["yaxis"] |= {"type": "category", "title": {"text": axis_label(names[0])}, "showgrid": False}
    method = method_name(variants[0].method)
    caption = f"{method}{f', {label}' if label else ''}. The darker, the worse. {_caption(variants)}"
    titles = {f"{name} ": _title(panel, variants, name, text=text) for name in y}
    return Figure(slug, titles, caption, [trace], layout, y, height=150 + max(44 * len(rows), AXIS_TITLE))


def _points(panel: Panel, variants: Sequence[Variant], setting: str, slug: str, *, text: bool) -> Figure:
    ordered = sorted(variants, key=lambda variant: _values(variants, setting).index(variant.settings.get(setting)))
    values = [variant.settings.get(setting) for variant in ordered]
    laq = lowest([v for v in panel.controls if v.method == "laq" and v not in variants], text=text)
    y = {}
    for name in _fields(text):
        samples = [variant.sample(name) for variant in ordered]
        sds = [0.0 if math.isnan(of.sd) else of.sd for of in samples]
        layers: list[Mapping[str, Any]] = [
            {"y": encoded([of.mean for of in samples]), "error_y": {"type": "data", "array": sds, "thickness": 1.5}}
        ]
        if laq is not None:
            layers.append({"y": encoded([laq.mean(name)] * len(ordered))})
        y[name] = View(FIELDS[name], [dict(layer) for layer in layers], {"yaxis.title.text": FIELDS[name]})
    x = [_tick(value) for value in values]
    traces: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines+markers", "name": method_name(variants[0].method), "x": x,
        "line": {"color": VERMILLION, "width": 1}, "marker": {"size": 8, "color": VERMILLION},
    }]  # fmt: skip
    if laq is not None:
        traces.append(
            {"type": "scatter", "mode": "lines", "name": laq.label, "x": x, "line": {"color": BLUE, "dash": "dash"}}
        )
    layout = base_layout()
    layout["xaxis"] |= {"type": "category", "title": {"text": axis_label(setting)}}
    caption = f"{method_name(variants[0].method)}. {_caption(variants)}"
    titles = {f"{name} ": _title(panel, variants, name, text=text) for name in y}
    return Figure(slug, titles, caption, traces, layout, y)


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
