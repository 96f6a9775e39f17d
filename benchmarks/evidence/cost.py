"""The page of the cost: gradients, memory and time of every method against float Adam, a step and to equal loss."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.folders import Folder
from benchmarks.evidence.methods import FLOAT
from benchmarks.evidence.sources import REACHED
from benchmarks.evidence.words import bits_text, bullets, document, table
from blaq.train.summary import Setting
from blaq.train.tables import write_csv

TIMED = (
    "Time to it, in units of what float took: its steps times the time of a step that [epoch.md](../epoch.md) measured, "
    "over the same of float; `-` where that network, batch, method, bits and solver were not timed. "
)


class Times:
    """The times of whole training steps over AdamW's, of `benchmarks/epoch.py`; none without its file."""

    def __init__(self, path: Path | None) -> None:
        self.report: Mapping[str, Any] = {} if path is None else json.loads(path.read_text(encoding="utf-8"))

    def of(self, folder: Folder, setting: Setting) -> float | None:
        """The ratio to AdamW of a step of the same network, method, bits and solver; None if it was not timed, as steps of BLAQ
        are but with a trial in each.
        """
        optim = folder.recipe_of(setting.runs[0]).optim
        if optim.trains_by.trial == "fresh" and (optim.period, optim.trial_every) != (1, 1):
            return None
        for entry in self.report.get("recipes", {}).values():
            network, batch = folder.recipe.model, folder.recipe.data.batch_size
            own = network.name, json.loads(json.dumps(dict(network.options))), batch
            if (entry["model"], entry["options"], entry["batch"]) != own:
                continue
            for row in entry["rows"]:
                same = (row["method"], str(row["bits"]), row["solver"])
                method = setting.values["method"]
                if same == (
                    method,
                    str(optim.bits) if method != FLOAT else "32",
                    optim.solver if method != FLOAT else "-",
                ):
                    return float(row["ratio"])
        return None


def page(folders: Sequence[Folder], times: Times, out: Path) -> tuple[str, list[str]]:
    """The page, its answers, and cost.csv."""
    rows = [row for folder in folders for bits in folder.grids for row in _rows(folder, bits, times)]
    write_csv(out / "cost.csv", rows)
    answers = [*_timed(times), *_to_loss(rows)]
    sections = [
        "# Cost",
        bullets(answers),
        "Losses are known an epoch at a time, so that what a loss cost is a multiple of an epoch. Gradients are "
        "counted. Memory is the largest resident set of a run's whole process, Python and torch included; over "
        "float's in brackets. To equal loss: the end of the first epoch whose mean training loss is at most the "
        "target, the mean over seeds; `-` where not every seed got there. The target is the lowest loss that every "
        "run of the same data, bits and budget reached, or the one that was asked for. "
        + (
            TIMED
            if times.report
            else "Time to it, in units of what float took, needs the times of a step (`--epoch`). "
        )
        + "The seconds of the runs themselves are in `results.csv`: they were taken side by side with other work, and "
        "say nothing about speed.",
    ]
    for folder in folders:
        sections.append(f"## {folder.title}")
        for bits in folder.grids:
            own = [row for row in rows if row["folder"] == folder.name and row["group"] == bits]
            target = own[0]["target_loss"]
            sections.append(f"{bits_text(bits)}, target loss {target:.4g}:" if target is not None else bits_text(bits))
            sections.append(_table(own))
    return document(sections), answers


def _rows(folder: Folder, bits: str, times: Times) -> list[dict[str, Any]]:
    group = folder.group(bits)
    base = next((one for one in group.settings if one.values["method"] == FLOAT), None)
    found = []
    for setting in group.settings:
        reached = folder.to_target(group, setting)
        row: dict[str, Any] = {"folder": folder.name, "group": bits, **setting.values}
        row["target_loss"] = reached["target_loss"]
        steps, gradients = (setting.sample(name).mean for name in ("steps", "gradient_evaluations"))
        row |= {"steps": steps, "gradients": gradients, "gradients_a_step": gradients / steps}
        row["peak_memory"] = setting.peak_memory()
        peak = None if base is None else base.peak_memory()
        row["memory_over_float"] = row["peak_memory"] / peak if row["peak_memory"] and peak else None
        row["step_over_adamw"] = times.of(folder, setting)
        row |= {name: reached[name] for name in REACHED[1:]}
        found.append(row)
    of_float = next((row for row in found if row["method"] == FLOAT), None)
    for row in found:
        row["gradients_over_float"] = _over(row, of_float, "gradients_to_target")
        time = [
            None if of is None or of["steps_to_target"] is None or of["step_over_adamw"] is None
            else of["steps_to_target"] * of["step_over_adamw"]
            for of in (row, of_float)
        ]  # fmt: skip
        row["time_over_float"] = time[0] / time[1] if time[0] and time[1] else None
    return found


def _over(row: Mapping[str, Any], base: Mapping[str, Any] | None, name: str) -> float | None:
    return row[name] / base[name] if base is not None and row[name] and base[name] else None


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    def show(value: float | None, spec: str) -> str:
        return "-" if value is None else f"{value:{spec}}"

    cells = []
    for row in rows:
        peak = "-"
        if row["peak_memory"] is not None:
            peak = f"{row['peak_memory'] / 1e6:,.0f} MB ({show(row['memory_over_float'], '.2f')})"
        cells.append([
            row["method"], show(row["gradients_a_step"], ".2f"), show(row["step_over_adamw"], ".2f"), peak,
            show(row["steps_to_target"], ",.0f"), show(row["gradients_to_target"], ",.0f"),
            show(row["gradients_over_float"], ".2f"), show(row["time_over_float"], ".2f"),
        ])  # fmt: skip
    head = ["method", "gradients a step", "time of a step over AdamW", "peak memory (over float)", "steps to target",
            "gradients to target", "over float", "time to target over float"]  # fmt: skip
    return table(head, cells)


def _timed(times: Times) -> list[str]:
    """The time of a step over AdamW's, a line for each network: the range of every method over bits and solvers."""
    lines = []
    for name, entry in times.report.get("recipes", {}).items():
        found = []
        for method in dict.fromkeys(row["method"] for row in entry["rows"]):
            rows = [row for row in entry["rows"] if row["method"] == method]
            span = " to ".join(dict.fromkeys(f"{pick(row['ratio'] for row in rows):.2f}" for pick in (min, max)))
            target = rows[0]["target"]
            found.append(f"{method} {span}" + ("" if target is None else f" (target {target:g})"))
        lines.append(f"A step of {name} over AdamW's: {', '.join(found)}.")
    return lines or ["No idle timing was given (`--epoch`): the times of a step are missing here."]


def _to_loss(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Gradients to equal loss against LAQ, a line for each method and budget."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] not in (FLOAT, "laq")):
        fewer, of = 0, 0
        for row in rows:
            laq = next(
                one
                for one in rows
                if (one["folder"], one["group"], one["method"]) == (row["folder"], row["group"], "laq")
            )
            if row["method"] == method and row["gradients_to_target"] and laq["gradients_to_target"]:
                of += 1
                fewer += row["gradients_to_target"] < laq["gradients_to_target"]
        if of:
            lines.append(
                f"**{method}** took fewer gradients than LAQ to the same training loss in {fewer} of {of} cells."
            )
    return lines
