"""The tables of a sweep: on the terminal, in Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blaq.optim.plan import size
from blaq.train.config import Recipe
from blaq.train.files import write_atomically
from blaq.train.grid import short_names
from blaq.train.summary import COSTS, Group, Measure, Setting, rows_of
from blaq.train.sweep import Outcome

Columns = Mapping[str, Sequence[str]]

EXPLANATION = """\
± after a mean is the standard deviation over seeds. Differences are means over the seeds of this setting minus the
reference, and ± after them half of the 95 % interval: Student's t of the paired differences. It holds for each
difference by itself: of twenty intervals around true zeros, one leaves zero out by chance. Test numbers are of the epoch
with the lowest validation error. A training loss counts as reached at the end of the first epoch whose mean is at most
it; if it was not given, it is the lowest that every run reached. Peak memory is the largest resident set of a run's
process, Python and torch included. Size is of all parameters, the quantized ones packed."""


def quality_columns(group: Group, measure: Measure) -> dict[str, list[str]]:
    """How good the settings are, one line each, by column."""
    settings = group.settings
    columns = _labels(settings)
    columns["seeds"] = [str(len(setting.runs)) for setting in settings]
    columns["test loss"] = [setting.sample("test_loss").show(4) for setting in settings]
    columns["test error %"] = [setting.sample("test_error").show(2) for setting in settings]
    if group.reference is not None:
        columns[f"minus {group.reference_name}"] = [
            "" if difference is None else difference.show(measure.digits)
            for difference in group.differences(measure.field)
        ]
    columns["train loss"] = [setting.sample("train_loss").show(4) for setting in settings]
    columns["gradients"] = [_count(setting, "gradient_evaluations") for setting in settings]
    columns["seconds"] = [f"{setting.sample('seconds').mean:.1f}" for setting in settings]
    columns["size"] = [size(round(setting.sample("bytes").mean)) for setting in settings]
    return columns


def cost_columns(group: Group) -> dict[str, list[str]]:
    """What the settings cost, one line each, by column."""
    settings, target = group.settings, group.target_loss
    columns = _labels(settings)
    columns["epochs"] = [_count(setting, "epochs") for setting in settings]
    columns["steps"] = [_count(setting, "steps") for setting in settings]
    if target is not None:
        for cost, name in zip(COSTS, ("steps", "gradients", "seconds"), strict=True):
            reach = [setting.to_reach(target, cost) for setting in settings]
            digits = 1 if cost == "seconds" else 0
            columns[f"{name} to {target:.4g}"] = ["-" if of is None else f"{of.mean:,.{digits}f}" for of in reach]
    peaks = [setting.peak_memory() for setting in settings]
    columns["peak memory"] = ["-" if peak is None else size(peak) for peak in peaks]
    columns["bits a weight"] = [
        f"{8 * setting.sample('bytes').mean / setting.sample('parameters').mean:.2f}" for setting in settings
    ]
    columns["smaller"] = [
        f"{setting.sample('float_bytes').mean / setting.sample('bytes').mean:.1f}x" for setting in settings
    ]
    return columns


def rich_tables(groups: Sequence[Group], recipe: Recipe) -> list[Table]:
    """Two tables a group for a terminal of 80 columns: without the numbers that matter less for the task."""
    measure = Measure.of(recipe)
    tables = []
    for group in groups:
        quality, cost = quality_columns(group, measure), cost_columns(group)
        seeds = " and ".join(dict.fromkeys(quality.pop("seeds")))
        quality.pop("test error %" if measure.field == "test_loss" else "test loss")
        quality["train loss"] = [text.partition(" ±")[0] for text in quality["train loss"]]
        if len(_labels(group.settings)) > 1:
            del quality["train loss"], quality["size"]
        del cost["epochs"]
        if len(set(cost["steps"])) == 1:
            del cost["steps"]
        tables.append(_rich(quality, f"{group.title} ({seeds} seeds)"))
        tables.append(_rich(cost, "Cost"))
    return tables


def _rich(columns: Columns, headline: str) -> Table:
    # Text: titles and settings are the user's, and may hold brackets.
    table = Table(title=Text(headline, style="table.title"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, (name, cells) in enumerate(columns.items()):
        narrow = max(map(len, cells)) < len(name)
        title = name.replace(" ", "\n", 1) if narrow else name
        table.add_column(Text(title), justify="right" if index else "left", no_wrap=True)
    for line in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, line))
    return table


def markdown_table(columns: Columns) -> str:
    """The table in Markdown."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *zip(*columns.values(), strict=True)]
    # A pattern of a rule may hold what parts cells.
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def write_tables(
    out: Path,
    recipe: Recipe,
    outcome: Outcome,
    groups: Sequence[Group],
    conclusion: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Write results.csv (a row a run), results.json (runs and groups) and results.md (tables and conclusion)."""
    measure = Measure.of(recipe)
    rows = rows_of(outcome.runs)
    write_csv(out / "results.csv", rows)
    groups_json = [group.as_json(measure) for group in groups]
    content = {"runs": rows, "groups": groups_json, "conclusion": list(conclusion), "failures": dict(outcome.failures)}
    write_atomically(out / "results.json", json.dumps(content, indent=2) + "\n")
    sections = [f"# {recipe.title}", *notes]
    for group in groups:
        if len(groups) > 1:
            sections.append(f"## {group.title}")
        sections += [markdown_table(quality_columns(group, measure)), markdown_table(cost_columns(group))]
    sections += [*conclusion, *(f"Failed: {name}: {why}" for name, why in outcome.failures.items()), EXPLANATION]
    write_atomically(out / "results.md", "\n\n".join(sections) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the names of all of them."""
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def _labels(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """What tells the settings apart, under the last part of the keys where that is enough."""
    names = short_names(name for setting in settings for name in setting.values)
    return {short: [setting.values.get(name, "") for setting in settings] for name, short in names.items()}


def _count(setting: Setting, field: str) -> str:
    return f"{setting.sample(field).mean:,.0f}"
