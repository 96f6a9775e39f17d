"""What probing costs a training step: `python benchmarks/probes.py --out docs/results`.

A LeNet-5 in the papers' size (20C3-MP2-50C3-MP2-500FC-10, batch 128) takes blocks of steps on random images. The cost is
the time inside the probe over the time of the steps around it, a reading a block included: the median over the blocks.
Times are CPU time of the process where it has one thread, else wall time. The target is 5 % with a probe at every 10th step.
Nothing here is a test: numbers are recorded, and those above the target marked.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from recording import listed, processor, table, versions, write
from torch import Tensor, nn

import blaq
from blaq.zigzag import ZigZag

TARGETS = {10: 5.0}  # steps between probes: percent of a step

METHODS: dict[str, dict[str, Any]] = {
    "laq": {"trial": "none", "a": 1.0},
    "blaq": {"trial": "fresh"},
    "past": {"trial": "past"},
}


def lenet5() -> nn.Module:
    """The papers' LeNet-5 for 28 x 28 images, in channels last as the command trains it."""
    layers = [
        nn.Conv2d(1, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 3, padding=1), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(50 * 7 * 7, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 10),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Training:
    """A network, its optimizer and a probe."""

    def __init__(self, bits: str, options: dict[str, Any], batch: int, every: int) -> None:
        torch.manual_seed(0)
        self.model = lenet5()
        self.inputs, self.targets = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
        self.opt = blaq.BLAQ(blaq.param_groups(self.model, bits), lr=1e-3, module=self.model, **options)
        self.zigzag = ZigZag(self.opt, every)

    def closure(self) -> Tensor:
        """One gradient."""
        self.opt.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    def run(self, steps: int) -> None:
        """Take steps, and read the probe at their end, as an epoch does."""
        for _ in range(steps):
            self.opt.step(self.closure)
        self.zigzag.read()


class Stopwatch:
    """Adds up the time of the calls that it is wrapped around."""

    def __init__(self, threads: int) -> None:
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.seconds = 0.0

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*arguments: Any) -> Any:
            start = self.clock()
            result = work(*arguments)
            self.seconds += self.clock() - start
            return result

        return timed


def cost(bits: str, method: str, every: int, options: argparse.Namespace) -> dict[str, Any]:
    """Percent of a step, median and range over the blocks, and the milliseconds of a step without its probe."""
    training = Training(bits, METHODS[method], options.batch, every)
    training.run(every)
    probe, whole = Stopwatch(options.threads), Stopwatch(options.threads)
    zigzag = training.zigzag
    for name in ("before_update", "after_update", "read"):
        setattr(zigzag, name, probe.around(getattr(zigzag, name)))
    run = whole.around(training.run)
    percent, step = [], []
    for _ in range(options.blocks):
        probe.seconds = whole.seconds = 0.0
        run(options.steps)
        step.append((whole.seconds - probe.seconds) / options.steps * 1e3)
        percent.append(100 * probe.seconds / (whole.seconds - probe.seconds))
    return {
        "method": method,
        "bits": bits,
        "every": every,
        "step_milliseconds": round(statistics.median(step), 1),
        "percent": round(statistics.median(percent), 1),
        "percent_range": [round(min(percent), 1), round(max(percent), 1)],
        "target": TARGETS.get(every),
    }


def missed(row: dict[str, Any]) -> bool:
    """Whether the median is above the target."""
    return row["target"] is not None and row["percent"] > row["target"]


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print; with --out also write probes.json and probes.md."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--blocks", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=50, help="steps in a block")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--every", type=int, nargs="*", default=[1, 10])
    arguments.add_argument("--bits", nargs="*", default=["binary", "ternary"])
    arguments.add_argument("--methods", nargs="*", default=[*METHODS])
    arguments.add_argument("--out", type=Path, help="folder for probes.json and probes.md")
    options = arguments.parse_args(given)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'method':<8} {'grid':<10} {'every':>5} {'ms a step':>10} {'cost of probing':>16}")
    for method in options.methods:
        for bits in options.bits:
            for every in options.every:
                row = cost(bits, method, every, options)
                rows.append(row)
                low, high = row["percent_range"]
                print(
                    f"{method:<8} {bits:<10} {every:>5} {row['step_milliseconds']:>10} {row['percent']:>8} % "
                    f"({low} to {high}){' MISSED' * missed(row)}",
                    flush=True,
                )
    torch.set_num_threads(before)
    if options.out:
        setting = {key: getattr(options, key) for key in ("blocks", "steps", "batch", "threads")}
        command = shlex.join(["python", "benchmarks/probes.py", *(sys.argv[1:] if given is None else given)])
        where = {"versions": versions("python", "torch", "blaq"), "machine": processor()}
        report = {"command": command, **where, **setting, "probes": rows}
        write(options.out, "probes", report, page(report))


def page(report: dict[str, Any]) -> list[str]:
    """The table to read."""
    rows = []
    for row in report["probes"]:
        low, high = row["percent_range"]
        target = "" if row["target"] is None else f"{row['target']:g}"
        cost = f"{row['percent']} ({low} to {high})"
        step = str(row["step_milliseconds"])
        rows.append([row["method"], row["bits"], str(row["every"]), step, cost, target, "missed" * missed(row)])
    return [
        "# What probing costs",
        "",
        f"```\n{report['command']}\n```",
        "",
        "Time inside the zig-zag probe over that of the step around it, in percent: median of the blocks, and the range.",
        f"LeNet-5 in the papers' size, batch {report['batch']}, {report['blocks']} blocks of {report['steps']} steps, without",
        "the gradient error (which costs two gradients a probe more). The target is 5 % with a probe at every 10th step.",
        "",
        f"{listed(report['versions'])}; {report['machine']['cpu']}, {report['machine']['capability']}, "
        f"{report['threads']} threads.",
        "",
        *table(["method", "grid", ">probe every", ">ms a step", ">cost of probing, %", ">target, %", ""], rows),
    ]


if __name__ == "__main__":
    main()
