"""The page: one HTML file with everything in it, which opens without a network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from blaq import __version__
from blaq.report.ablation import ablations
from blaq.report.contrast import challengers, featured
from blaq.report.figures import Figure, View, convergence, zigzag
from blaq.report.panels import Panel, Task, arrange, differing_settings, may_state, task_key
from blaq.report.read import Run, Sweep
from blaq.report.settings import OF_THE_LENGTH, OF_THE_METHOD, ORDER, method_name, read_settings, setting_name
from blaq.report.signs import PROBE, broken_off, failed, other_data, without_metrics
from blaq.report.tables import Table, costs, layer_table, run_table, version_table
from blaq.report.verdict import headline, verdict
from blaq.report.weights import layer_zigzag, trajectories
from blaq.report.words import Statement
from blaq.train.files import write_atomically

HOW_TO_PROBE = f"No run here was probed. Repeat with `{PROBE}`, as in `blaq compare RECIPE {PROBE}`."
HOW_TO_ABLATE = (
    "No method was run with several settings. For a grid of runs: `blaq ablate RECIPE --set optim.a=0:1:0.1 --set "
    "optim.period=1,5,10`."
)
ZIGZAG_TERMS = (
    "Zig-zag rate: share of steps whose update points against the one before (cosine below 0). Flip rate: share of weights "
    "whose level changes in a step. Oscillation: how often a level changes back. Path efficiency: distance from start to end "
    "over the length of the path. Gradient error: distance of the gradient at the quantized weights from that at the latent "
    "ones, relative to the latter. Agreement: cosine of the trial gradient with the current one."
)
PATH_TERMS = (
    "Latent weights in units of their scale, where the levels stand still; dashed: the thresholds at which the quantized level "
    "changes. Changes are counted from one kept probe to the next."
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a panel: its figures and table, or how to get them."""

    key: str
    title: str
    figures: Sequence[Figure]
    table: Table | None = None
    missing: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class PanelPart:
    """A panel as the page shows it."""

    key: str
    label: str
    statements: Sequence[Statement]
    sections: Sequence[Section]


@dataclass(frozen=True, slots=True)
class TaskPart:
    """A task as the page shows it."""

    key: str
    title: str
    summary: str
    headline: Sequence[str]
    statements: Sequence[Statement]
    panels: Sequence[PanelPart]
    recipe: str
    differences: Sequence[str]
    versions: Table
    runs: Table


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows, and the figures once more in their order."""

    tasks: Sequence[TaskPart]

    @property
    def figures(self) -> list[Figure]:
        """All figures."""
        return [
            f for task in self.tasks for panel in task.panels for section in panel.sections for f in section.figures
        ]


def build(runs: Sequence[Run], sweeps: Sequence[Sweep] = ()) -> Report:
    """The report of the runs, and of what the folders that they lie in say of them.

    Raises:
        ValueError: not one finished run; the same settings and seed twice.
    """
    tasks = arrange(runs)
    if not any(task.panels for task in tasks):
        for lost in without_metrics(runs):
            raise ValueError(f"report: {lost.head} ({lost.text.removesuffix('.')}). {lost.advice}")
        raise ValueError(
            "report: no run is finished yet; finish one, as with `blaq train RUN/recipe.toml --out RUN --resume`."
        )
    several = len(tasks) > 1
    return Report([_task(task, f"task-{n}-" if several else "", sweeps) for n, task in enumerate(tasks, start=1)])


def write_page(report: Report, out: Path) -> None:
    """Write the page; the file is whole or not there."""
    environment = Environment(
        loader=PackageLoader("blaq.report", "template"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = code_marked
    source = environment.loader.get_source  # type: ignore[union-attr]
    page = environment.get_template("page.html.j2").render(
        report=report,
        figures=_script_json({figure.slug: figure_json(figure) for figure in report.figures}),
        plotly=get_plotlyjs(),
        css=source(environment, "page.css")[0],
        js=source(environment, "page.js")[0],
        version=__version__,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def figure_json(figure: Figure) -> dict[str, Any]:
    """A figure as the page's script reads it."""
    return {
        "traces": list(figure.traces),
        "layout": dict(figure.layout),
        "titles": dict(figure.titles),
        "y": {name: _view_json(view) for name, view in figure.y.items()},
        "x": {name: _view_json(view) for name, view in figure.x.items()},
    }


def code_marked(text: str) -> list[tuple[bool, str]]:
    """Text in pieces, each with whether it stood between backquotes.

    Example:
        >>> code_marked("add `--seeds 5`.")
        [(False, 'add '), (True, '--seeds 5'), (False, '.')]
    """
    return [(bool(index % 2), piece) for index, piece in enumerate(text.split("`")) if piece]


def _view_json(view: View) -> dict[str, Any]:
    return {"label": view.label, "traces": list(view.traces), "layout": dict(view.layout)}


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element whatever its strings say."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _task(task: Task, prefix: str, sweeps: Sequence[Sweep]) -> TaskPart:
    text = task.text
    own = [sweep for sweep in sweeps if task_key(sweep.recipe) == task_key(task.runs[0].recipe)]
    keys: list[str] = []
    for panel in task.panels:  # labels that differ in signs alone have one slug
        key = f"{prefix}{slug(panel.label) or 'all'}"
        keys.append(key if key not in keys else f"{key}-{len(keys) + 1}")
    panels = [
        _panel(panel, key, costs(panel, own, task.unfinished, text=text), text=text)
        for panel, key in zip(task.panels, keys, strict=True)
    ]
    first = next((run for run in task.runs if run.counts), task.runs[0])
    return TaskPart(
        key=prefix.removesuffix("-") or "task",
        title=task.title,
        summary=_summary(task),
        headline=headline(task),
        statements=[
            *(panels[0].statements if len(panels) == 1 else []),
            *failed(own),
            *other_data(task),
            *broken_off(task),
        ],
        panels=panels,
        recipe=first.recipe.to_toml(),
        differences=_differences(task),
        versions=version_table(task),
        runs=run_table(task, text=text),
    )


def _panel(panel: Panel, key: str, cost: Table, *, text: bool) -> PanelPart:
    shown = featured(panel, text=text)
    rivals = challengers(panel, text=text)
    quantized = [*(variant for variant in shown if variant.control), *rivals]
    inspected = next(iter(rivals or quantized), None)
    paths = trajectories(quantized, f"{key}-weights")
    probed = [v for v in quantized if (v.control or v is inspected) and v.zigzag_band("zigzag_rate") is not None]
    rates = [f for f in (zigzag(panel, f"{key}-zigzag", text=text), layer_zigzag(quantized, f"{key}-layers")) if f]
    maps = list(ablations(panel, f"{key}-ablation", text=text))
    sections = [
        Section("convergence", "Convergence", [convergence(panel, f"{key}-convergence", text=text)]),
        Section("zigzag", "Zig-zag", rates, None, "" if rates else HOW_TO_PROBE, ZIGZAG_TERMS if rates else ""),
        Section(
            "weights", "Paths of a few weights", paths, None, "" if paths else HOW_TO_PROBE, PATH_TERMS if paths else ""
        ),
        Section("ablation", "Settings", maps, None, "" if maps else HOW_TO_ABLATE),
        Section("cost", "Cost", [], cost),
    ]
    if inspected is not None:
        sections.append(Section("layers", "Layers", [], layer_table(inspected, probed)))
    return PanelPart(key, panel.label, verdict(panel, text=text), sections)


def slug(text: str) -> str:
    """Text as a part of a file name.

    Example:
        >>> slug("2 bits (ternary), batch size = 50")
        '2-bits-ternary-batch-size-50'
    """
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split())


def _summary(task: Task) -> str:
    finished = [run for run in task.runs if run.counts]
    settings: dict[str, set[str]] = {}
    for panel in task.panels:
        for variant in panel.variants:
            settings.setdefault(variant.method, set()).add(variant.label)
    named = ", ".join(
        method_name(method) + (f" ({len(labels)} settings)" if len(labels) > 1 else "")
        for method, labels in settings.items()
    )
    seeds = len({run.seed for run in finished})
    runs = f"{len(finished)} {'run' if len(finished) == 1 else 'runs'}"
    return f"{runs}, {seeds} {'seed' if seeds == 1 else 'seeds'}: {named}."


def _differences(task: Task) -> list[str]:
    """What the runs differ in, beside what the shown recipe says."""
    lines = [f"seed: {', '.join(map(str, sorted({run.seed for run in task.runs})))}"]
    methods = dict.fromkeys(run.recipe.optim.method for run in task.runs)
    lines.append(f"method: {', '.join(methods)}")
    bits = dict.fromkeys(str(run.recipe.optim.bits) for run in task.runs if run.recipe.optim.trains_by.quantized)
    if len(bits) > 1:
        lines.append(f"bits: {', '.join(bits)}")
    varied: dict[str, dict[str, None]] = {}
    settings = [read_settings(run) for run in task.runs]
    for name in sorted(differing_settings(settings) - {*OF_THE_METHOD, *OF_THE_LENGTH, "optim.bits"}):
        if name == ORDER:
            varied[name] = dict.fromkeys(" before ".join(of[name]) for of in settings if name in of)
        else:
            varied[name] = dict.fromkeys(str(of.get(name, "none")) for of in settings if may_state(of, name))
    for panel in task.panels:
        for name, values in panel.varied.items():
            varied.setdefault(name, {}).update(dict.fromkeys(map(str, values)))
    return lines + [f"{setting_name(name)}: {', '.join(values)}" for name, values in varied.items()]
