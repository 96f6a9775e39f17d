"""Tables of the report: what it cost, what the layers look like, every run."""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from blaq.grids import Grid
from blaq.optim.plan import plan, size
from blaq.report import rules
from blaq.report.panels import Panel, Task, Variant
from blaq.report.read import Run, Sweep
from blaq.report.settings import read_settings
from blaq.report.weights import late_spread
from blaq.report.words import loss_digits
from blaq.tasks.models import build_model
from blaq.train.inspect import Layer, layers, occupancy
from blaq.train.module import build_groups
from blaq.train.statistics import Sample

MAX_CHECKPOINT = 200_000_000  # bytes; larger ones are left to `blaq inspect`


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the first column names the row, numbers stand to the right.

    Attributes:
        caption: what the numbers are.
        head: one a column.
        rows: cells as text.
        words: columns of text, by index, which stand to the left.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})


def costs(panel: Panel, sweeps: Sequence[Sweep] = (), unfinished: Sequence[Run] = (), *, text: bool) -> Table:
    """What each variant reached and what it took, to the one target that sweeps were given or else to `target_loss`."""
    targets = {sweep.target for sweep in sweeps if sweep.target is not None}
    target = next(iter(targets)) if len(targets) == 1 else target_loss(panel)
    memory = any(variant.results("peak_memory") for variant in panel.variants)
    rates = len({variant.settings.get("optim.lr") for variant in panel.variants}) > 1
    head = ["Method", *(["Learning rate"] if rates else []), "Seeds", "Test loss" if text else "Test error (%)",
            "Training loss", "Steps", "Gradients", "Time (s)", "Time a step (ms)", *(["Peak memory"] if memory else []),
            "Size", "Smaller than float32", "Steps to target", "Gradients to target", "Time to target (s)"]  # fmt: skip
    rows = []
    for variant in panel.variants:
        times = {run.seed: 1000 * run.metrics["seconds"][-1] / run.metrics["steps"][-1] for run in variant.runs}
        rows.append([
            variant.label, *([f"{variant.settings['optim.lr']:g}"] if rates else []), str(len(variant.runs)),
            _loss(variant, "test_loss") if text else _spread(variant.results("test_error"), ".2f"),
            _loss(variant, "train_loss"), _spread(variant.results("steps"), ",.0f"),
            _spread(variant.results("gradient_evaluations"), ",.0f"), _spread(variant.results("seconds"), ",.1f"),
            _spread(times, ",.1f"), *([_bytes(_peak(variant))] if memory else []), _bytes(variant.mean("bytes")),
            f"{variant.mean('float_bytes') / variant.mean('bytes'):.1f}x",
            *(
                "-" if _lacks_a_seed(variant, sweeps, unfinished) else _to_target(variant, axis, target, spec)
                for axis, spec in _TARGET_AXES
            ),
        ])  # fmt: skip
    caption = (
        f"Mean ± standard deviation over the seeds. Time is that of training, without validation. Target: training loss "
        f"{target:.4g}, {_whence(targets)}, counted at the end of an epoch; - where not every seed gets there."
        + (
            " Peak memory: the largest over the seeds of a run's whole process, Python and torch included."
            if memory
            else ""
        )
    )
    return Table(caption, head, rows)


def _whence(targets: Set[float]) -> str:
    """Where the target comes from."""
    if len(targets) == 1:
        return "as the comparison was given"
    several = (
        f" (the comparisons were given {' and '.join(f'{one:.4g}' for one in sorted(targets))})" if targets else ""
    )
    return f"the lowest that every run reaches{several}"


def target_loss(panel: Panel) -> float:
    """The lowest training loss that every run reaches, as in the tables of ``blaq compare``."""
    return max(float(np.min(run.metrics["train_loss"])) for variant in panel.variants for run in variant.runs)


_TARGET_AXES = (("steps", ",.0f"), ("gradient_evaluations", ",.0f"), ("seconds", ",.1f"))


def _lacks_a_seed(variant: Variant, sweeps: Sequence[Sweep], unfinished: Sequence[Run]) -> bool:
    """Whether a run of the variant failed, is not finished or not begun: what the others took is no mean over the seeds."""
    for sweep in sweeps:
        if any(map(sweep.failed_beside, variant.runs)):
            return True
        if any(map(sweep.holds, variant.runs)) and not sweep.seeds <= set(variant.seeds):
            return True
    return any(run.seed not in variant.seeds and read_settings(run) == variant.settings for run in unfinished)


def _to_target(variant: Variant, axis: str, target: float, spec: str) -> str:
    at = {run.seed: rules.reached(run.metrics[axis], run.metrics["train_loss"], target) for run in variant.runs}
    return "-" if math.inf in at.values() else _spread(at, spec)


def layer_table(variant: Variant, probed: Sequence[Variant]) -> Table:
    """The layers of a variant's first seed, and the zig-zag of all that were probed."""
    run = variant.runs[0]
    found, note = _layers(run)
    measures = {"zigzag_rate": "zig-zag (%)", "flip_rate": "flips (%)", "oscillation_frequency": "oscillation (%)"}
    columns: list[tuple[str, Callable[[str], str]]] = [
        (f"{of.label}: {words}", lambda name, of=of, measure=measure: _number(late_spread(of, measure, name)[0]))  # type: ignore[misc]
        for of in probed
        for measure, words in measures.items()
    ]
    head = [
        "Layer",
        "Shape",
        "Grid",
        "Bits",
        "Scale",
        "Zeros (%)",
        "Levels taken",
        "Size",
        *(name for name, _ in columns),
    ]
    rows = [_layer(layer) + [show(layer.name) for _, show in columns] for layer in found]
    caption = f"{variant.label}, seed {run.seed}{note}."
    if probed:
        caption += " Zig-zag and flips: mean of all seeds over the second half of training; oscillation: at its end."
    return Table(caption, head, rows, frozenset({0, 1, 2, 6}))


def _layers(run: Run) -> tuple[list[Layer], str]:
    checkpoint = run.path / "checkpoints" / "best.ckpt"
    if not checkpoint.exists():
        missing = "not there any more, nor are its levels"
    elif checkpoint.stat().st_size > MAX_CHECKPOINT:
        missing = "too large to read here; `blaq inspect RUN` shows its levels"
    else:
        try:
            return layers(run.path), ", best checkpoint"
        except ValueError:
            missing = "damaged and cannot be read, nor can its levels"
    model = build_model(run.recipe.model.name, **run.recipe.model.options)
    rows = plan(build_groups(model, run.recipe.optim)).rows
    planned = [
        Layer(name=row.name, shape=row.shape, scheme=row.scheme, scales=None, levels=(), counts=(), bytes=row.bytes_packed,
              note=row.note)
        for row in rows
    ]  # fmt: skip
    return planned, f"; its checkpoint is {missing}"


def _layer(layer: Layer) -> list[str]:
    shape = " x ".join(map(str, layer.shape)) or "scalar"
    if layer.scheme == "float":
        return [layer.name, shape, "float32", "32", "", "", layer.note, size(layer.bytes)]
    bits = str(Grid.parse(layer.scheme).bits)
    if layer.scales is None:
        return [layer.name, shape, layer.scheme, bits, "", "", "", size(layer.bytes)]
    zeros = f"{100 * layer.counts[layer.levels.index(0)] / sum(layer.counts):.1f}" if 0 in layer.levels else ""
    low, high = (f"{scale:.3g}" for scale in layer.scales)
    scale = low if low == high else f"{low} to {high}"
    taken = occupancy(layer.levels, layer.counts).replace("  ", "; ")
    return [layer.name, shape, layer.scheme, bits, scale, zeros, taken, size(layer.bytes)]


def run_table(task: Task, *, text: bool) -> Table:
    """Every run, in the order of the panels."""
    error = "test_loss" if text else "test_error"
    rows: dict[str, list[str]] = {}
    for panel in task.panels:
        for variant in panel.variants:
            for run in variant.runs:
                grid = "" if not variant.quantized else str(variant.settings["optim.bits"])
                rows.setdefault(run.name, [
                    run.name, variant.label, grid, str(run.seed), *(_cell(run, name, spec) for name, spec in (
                        (error, ".4g" if text else ".2f"), ("train_loss", ".4g"), ("steps", ",.0f"),
                        ("gradient_evaluations", ",.0f"), ("seconds", ",.1f"),
                    )),
                ])  # fmt: skip
    head = ["Run", "Method", "Grid", "Seed", "Test loss" if text else "Test error (%)", "Training loss", "Steps",
            "Gradients", "Time (s)"]  # fmt: skip
    return Table("Test values are those of the epoch with the lowest validation error.", head, list(rows.values()),
                 frozenset({0, 1, 2}))  # fmt: skip


def version_table(task: Task) -> Table:
    """What the runs were computed with; several values where they differ."""
    names = dict.fromkeys(name for run in task.runs for name in run.versions)
    rows = [[name, ", ".join(dict.fromkeys(str(run.versions.get(name)) for run in task.runs))] for name in names]
    return Table("As each run recorded it when it began.", ["", "Version"], rows, frozenset({0, 1}))


def _peak(variant: Variant) -> float:
    return max(variant.results("peak_memory").values(), default=math.nan)


def _loss(variant: Variant, name: str) -> str:
    return _spread(variant.results(name), f".{loss_digits(variant.mean(name))}f")


def _cell(run: Run, name: str, spec: str) -> str:
    value: Any = (run.result or {}).get(name)
    return "" if value is None else f"{value:{spec}}"


def _spread(values: dict[int, float], spec: str) -> str:
    if not values:
        return ""
    sample = Sample(tuple(values.values()))
    spread = f" ± {sample.sd:{spec}}" if sample.sd > 0 else ""  # what is equal by design, such as steps, has none
    return f"{sample.mean:{spec}}{spread}"


def _bytes(count: float) -> str:
    return "" if math.isnan(count) else size(round(count))


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
