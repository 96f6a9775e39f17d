"""The time of one LAQ step against torch's AdamW, side by side: `python benchmarks/step.py --out docs/results`.

Each pair times AdamW and LAQ in turn on equal parameters and gradients; a ratio is the median over the pairs. Times are
CPU time of the process where it has one thread, else wall time. Nothing here is a test: numbers are recorded, not gated.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import blaq

GRIDS = ["binary", "ternary", "ternary2", "linear3", "linear4", "linear8", "log3", "log4", "midrise2", "midrise4"]
SOLVERS = ["exact", "alternating"]
PEERS = {"fused": {"fused": True}, "foreach": {"foreach": True}}


def parameter(weights: int) -> torch.nn.Parameter:
    """A matrix with a gradient, both normal."""
    p = torch.nn.Parameter(torch.randn(weights // 1000, 1000) * 0.05)
    p.grad = torch.randn_like(p) * 0.01
    return p


def seconds(step: Callable[[], Any], threads: int) -> float:
    """The time of one call."""
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def ratios(step: Callable[[], Any], peers: dict[str, Callable[[], Any]], pairs: int, threads: int) -> dict[str, Any]:
    """LAQ's time over each peer's: the median of the pairs, and the range."""
    for warm in (step, *peers.values()):
        warm()
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(pairs):
        for name, peer in peers.items():
            theirs[name].append(seconds(peer, threads))
        ours.append(seconds(step, threads))
    result: dict[str, Any] = {"milliseconds": round(statistics.median(ours) * 1e3, 2)}
    for name, times in theirs.items():
        each = [a / b for a, b in zip(ours, times, strict=True)]
        result[f"over_{name}"] = round(statistics.median(each), 2)
        result[f"over_{name}_range"] = [round(min(each), 2), round(max(each), 2)]
    return result


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--weights", type=int, default=4_000_000)
    arguments.add_argument("--pairs", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--grids", nargs="*", default=GRIDS)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    peers = {
        name: torch.optim.AdamW([parameter(options.weights)], weight_decay=0.0, **flags).step
        for name, flags in PEERS.items()
    }
    rows = []
    print(f"{'grid':<10} {'solver':<12} {'ms':>9} {'over fused':>11} {'over foreach':>13}")
    for grid in options.grids:
        for solver in SOLVERS if grid != "binary" else ["exact"]:  # binary has a closed form: the solvers are one
            groups = [{"params": [parameter(options.weights)], "grid": grid, "solver": solver}]
            row = ratios(blaq.LAQ(groups).step, peers, options.pairs, options.threads)
            rows.append({"grid": grid, "solver": solver, **row})
            print(
                f"{grid:<10} {solver:<12} {row['milliseconds']:>9} {row['over_fused']:>11} {row['over_foreach']:>13}",
                flush=True,
            )
    if options.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "blaq": blaq.__version__}
        machine = {"cpu": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
        setting = {key: getattr(options, key) for key in ("weights", "pairs", "threads")}
        write({"versions": versions, "machine": machine, **setting, "steps": rows}, options.out)


def write(report: dict[str, Any], folder: Path) -> None:
    """step.json, and step.md to read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# The cost of a step",
        "",
        f"One step of LAQ on {report['weights']:,} float32 weights in one tensor, over one step of `torch.optim.AdamW` on the",
        f"same: median of {report['pairs']} pairs taken in turn, and their range; {report['threads']} thread. A BLAQ step with",
        "its trial projects twice. Repeat with `make bench`.",
        "",
        f"{versions}; {report['machine']['cpu']}, {report['machine']['capability']}.",
        "",
        "| grid | solver | ms | over AdamW(fused=True) | over AdamW(foreach=True) |",
        "|---|---|---:|---:|---:|",
    ]
    for row in report["steps"]:
        fused, foreach = (
            f"{row[f'over_{peer}']:.1f} ({row[f'over_{peer}_range'][0]:.1f} to {row[f'over_{peer}_range'][1]:.1f})"
            for peer in PEERS
        )
        lines.append(f"| {row['grid']} | {row['solver']} | {row['milliseconds']:.0f} | {fused} | {foreach} |")
    lines += [
        "",
        "The step is plain PyTorch in float64 where sums are taken, without a compiled kernel. Binary has a closed form; the",
        "exact solver sorts all magnitudes at every step. In training the step stands beside a forward and backward pass,",
        "which in a convolutional network cost many times more than it.",
    ]
    (folder / "step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
