"""The time of one step against torch's AdamW, side by side: `python benchmarks/step.py --out docs/results`.

Each pair times AdamW and a step of blaq in turn on equal parameters and gradients; a ratio is the median over the pairs. The
steps of channels, of groups and of two halves are timed beside LAQ's of the same grid with one scale a tensor as well.
Steps of `trial="fresh"` are both halves together, without the forward and backward passes between them. Nothing here is a
test: numbers are recorded, not gated.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recording import listed, processor, spread, table, versions
from recording import write as record

import blaq
from blaq.tasks.models import build_model

GRIDS = ["ternary", "ternary2", "linear3", "linear4", "log3", "midrise2"]
COLUMNS = 4096
HEADINGS = ("grid", "solver", "scale for each", "trial", ">ms", ">over AdamW", ">over LAQ", ">target", "")


class Case(NamedTuple):
    """What is timed; `target` is the ratio we want: over AdamW, or over LAQ where it has a `plain` case."""

    grid: str
    solver: str
    granularity: str | int
    trial: str
    target: float | None  # None: recorded only

    @property
    def plain(self) -> "Case | None":
        """LAQ with one scale a tensor, which other granularities and trials are held against."""
        plain = self._replace(granularity="tensor", trial="none", target=None)
        return None if plain == self._replace(target=None) else plain


CASES = [
    Case("binary", "alternating", "tensor", "none", 2.0),
    Case("binary", "exact", "tensor", "none", 2.0),  # the closed form, as one alternation is
    *(Case(grid, "alternating", "tensor", "none", 3.0) for grid in GRIDS),
    *(Case(grid, "exact", "tensor", "none", 10.0 if grid == "ternary" else 25.0) for grid in GRIDS),
    *(Case(grid, "alternating", rows, "none", 1.3) for grid in ("ternary", "linear4") for rows in ("channel", 64)),
    *(Case(grid, "alternating", "tensor", "fresh", 2.2) for grid in ("binary", "ternary", "linear4")),
]
# Over AdamW(foreach=True), which is the slower of torch's two: one LAQ step of every grid and solver.
LAQ = [case._replace(target=None) for case in CASES if (case.granularity, case.trial) == ("tensor", "none")]


def parameter(weights: int) -> torch.nn.Parameter:
    """A matrix with a gradient, both normal."""
    p = torch.nn.Parameter(torch.randn(max(weights // COLUMNS, 1), min(COLUMNS, weights)) * 0.05)
    p.grad = torch.randn_like(p) * 0.01
    return p


def stepper(parameters: list[torch.nn.Parameter], case: Case, compile: bool | None) -> Callable[[], Any]:
    """One step of blaq on parameters that have gradients."""
    quantized = [p for p in parameters if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": quantized, "grid": case.grid, "solver": case.solver, "granularity": case.granularity}
    ]
    if len(quantized) < len(parameters):
        groups.append({"params": [p for p in parameters if p.ndim <= 1]})
    opt = blaq.BLAQ(groups, trial=case.trial, compile=compile)
    if case.trial == "none":
        return opt.step
    gradients = [p.grad for p in parameters]

    def both_halves() -> None:
        for half in (opt.forward_step, opt.backtrack_step):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            half()

    return both_halves


def seconds(step: Callable[[], Any]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compared(step: Callable[[], Any], peers: dict[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """The time of a call, and its ratios to those of peers taken in turn: the median of the pairs, and their range."""
    calls = {**peers, "own": step}
    for _ in range(3):  # the first is solved exactly, the second compiles
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {
        "milliseconds": round(statistics.median(times["own"]) * 1e3, 2),
        **{name: over(times["own"], times[name]) for name in peers},
    }


def over(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Ratios of times that were taken in turn."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "milliseconds": round(statistics.median(theirs) * 1e3, 2),
        "ratio": round(statistics.median(each), 2),
        "range": [round(min(each), 2), round(max(each), 2)],
    }


def large_tensor(weights: int, pairs: int, cases: list[Case], peer: str) -> list[dict[str, Any]]:
    """One large tensor against AdamW, its form "fused" or "foreach", and against LAQ."""
    print(f"{weights:,} weights, {torch.get_num_threads()} threads, over AdamW({peer}=True)")
    adamw, rows = torch.optim.AdamW([parameter(weights)], **{peer: True}), []
    for case in cases:
        peers: dict[str, Callable[[], Any]] = {"adamw": adamw.step}
        if case.plain is not None:
            peers["laq"] = stepper([parameter(weights)], case.plain, None)
        rows.append({**case._asdict(), **compared(stepper([parameter(weights)], case, None), peers, pairs)})
        print(line(rows[-1]), flush=True)
    return rows


def judged(row: dict[str, Any]) -> float:
    """The ratio that its target is for."""
    return float(row["laq" if "laq" in row else "adamw"]["ratio"])


def slopes(tables: list[dict[str, Any]], threads: int) -> list[list[str]]:
    """How time grows with weights: the slope of log time over log weights, of every case and of AdamW beside it."""
    tables = [part for part in tables if part["peer"] == "fused" and part["threads"] == threads]
    weights = [part["weights"] for part in tables]
    found = []
    for first in tables[0]["rows"]:
        rows = [row for part in tables for row in part["rows"] if cells(row)[:4] == cells(first)[:4]]
        if len(rows) < len(tables):
            continue  # a case that is not timed at every size
        ours = [row["milliseconds"] for row in rows]
        theirs = [row["adamw"]["milliseconds"] for row in rows]
        found.append([*cells(rows[0])[:4], *(f"{_slope(weights, of):.3f}" for of in (ours, theirs))])
    return found


def _slope(x: list[float], y: list[float]) -> float:
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def many_tensors(pairs: int) -> dict[str, Any]:
    """ResNet-56, some 60 quantized tensors, against AdamW(foreach=True)."""
    copies = []
    for _ in range(2):
        parameters = list(build_model("resnet56").parameters())
        for p in parameters:
            p.grad = torch.randn_like(p) * 0.01
        copies.append(parameters)
    case = Case("ternary", "alternating", "tensor", "none", 3.0)
    return {
        **case._asdict(),
        **compared(stepper(copies[0], case, None), {"adamw": torch.optim.AdamW(copies[1], foreach=True).step}, pairs),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write step.json and step.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, nargs="*", default=[4_194_304])
    parser.add_argument(
        "--foreach", type=int, nargs="*", default=[4_194_304], help="of these weights, over foreach=True too"
    )
    parser.add_argument("--exact-up-to", type=int, default=10**9, help="weights that the exact solver is timed with")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tables: list[dict[str, Any]] = []
    before = torch.get_num_threads()

    def add(part: dict[str, Any]) -> None:
        """Written after every table: a long run that is stopped leaves what it has."""
        tables.append(part)
        if options.out:
            setting = {"versions": versions("python", "torch", "blaq"), "machine": processor(), "pairs": options.pairs}
            setting["huge_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"  # read by torch where it allocates
            write({**setting, "tables": tables}, options.out)

    for threads in options.threads:
        torch.set_num_threads(threads)
        for weights in options.weights:
            cases = [case for case in CASES if case.solver != "exact" or weights <= options.exact_up_to]
            rows = large_tensor(weights, options.pairs, cases, "fused")
            add({"weights": weights, "threads": threads, "peer": "fused", "rows": rows})
            if weights in options.foreach:
                rows = large_tensor(weights, options.pairs, LAQ, "foreach")
                add({"weights": weights, "threads": threads, "peer": "foreach", "rows": rows})
        row = many_tensors(options.pairs)
        print(f"ResNet-56, {threads} threads, over AdamW(foreach=True)\n{line(row)}", flush=True)
        add({"weights": "ResNet-56", "threads": threads, "peer": "foreach", "rows": [row]})
    torch.set_num_threads(before)


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    ratios = [f"{spread(row[peer]['ratio'], *row[peer]['range'])} {peer}" for peer in ("adamw", "laq") if peer in row]
    return (
        f"{row['grid']:<9} {row['solver']:<12} {row['granularity']!s:<8} {row['trial']:<6} {row['milliseconds']:>9.2f} ms "
        + ", ".join(ratios)
        + (f", target {row['target']:g}{' MISSED' * (judged(row) > row['target'])}" if row["target"] else "")
    )


def write(report: dict[str, Any], folder: Path) -> None:
    """step.json, and step.md to read."""
    lines = [
        "# The cost of a step",
        "",
        f"One step over one step of AdamW on the same weights: median of {report['pairs']} pairs taken in turn, and the",
        "range. `fresh` is both halves of BLAQ's step together, without the passes of the network. Targets are over AdamW,",
        "those of channels, groups and `fresh` over LAQ's step of the same grid, timed in the same turns. Repeat with",
        "`make bench`.",
        "",
        f"{listed(report['versions'])}; {report['machine']['cpu']}, {report['machine']['capability']}"
        f"{', memory in huge pages (`THP_MEM_ALLOC_ENABLE=1`)' if report['huge_pages'] else ''}.",
    ]
    for part in report["tables"]:
        weights = part["weights"]
        weights = f"{weights:,} float32 weights in one tensor" if isinstance(weights, int) else weights
        lines += [
            "",
            f"## {weights}, {part['threads']} thread{'s' if part['threads'] > 1 else ''}, over AdamW({part['peer']}=True)",
            "",
            *table(HEADINGS, map(cells, part["rows"])),
        ]
    for threads in dict.fromkeys(part["threads"] for part in report["tables"]):
        sizes = [part["weights"] for part in report["tables"] if part["threads"] == threads and part["peer"] == "fused"]
        if len(sizes) > 1:
            lines += [
                "",
                f"## How time grows, {threads} thread{'s' if threads > 1 else ''}",
                "",
                f"The slope of log time over log weights, {', '.join(f'{size:,}' for size in sizes)}; 1 is proportional.",
                "",
                *table(
                    ("grid", "solver", "scale for each", "trial", ">slope", ">AdamW's"),
                    slopes(report["tables"], threads),
                ),
            ]
    record(folder, "step", report, lines)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of step.md."""
    names = [str(row[key]) for key in ("grid", "solver", "granularity", "trial")]
    ratios = [spread(row[peer]["ratio"], *row[peer]["range"]) if peer in row else "" for peer in ("adamw", "laq")]
    target = row["target"]
    verdict = ["", ""] if target is None else [f"{target:g}", "" if judged(row) <= target else "missed"]
    return [*names, f"{row['milliseconds']:.1f}", *ratios, *verdict]


if __name__ == "__main__":
    main()
