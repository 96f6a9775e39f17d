"""The time of whole training steps against AdamW: `python benchmarks/epoch.py mnist-lenet5 --out docs/results`.

A step is forward, backward and optimizer on random data of the recipe's shape, in one process: of
`torch.optim.AdamW(fused=True)` on the plain network, and of every method of blaq with quantizer and with the zig-zag probe at
every 10th step (without the gradient error, which costs two gradients a probe more). Blocks of steps are taken in turn,
AdamW's and the method's, in alternating order; a ratio is that of neighbouring blocks, and told are its median and range.
Nothing here is a test: numbers are recorded, and those above their target marked. Adds its recipe to epoch.json and writes
epoch.md anew.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from recording import listed, processor, spread, table, versions, write
from torch import Tensor, nn

from blaq.tasks.losses import LOSSES
from blaq.tasks.models import build_model
from blaq.train.config import METHODS, Recipe, load_recipe
from blaq.train.module import build_optimizer
from blaq.zigzag import ZigZag

TARGETS = {"laq": 1.05, "past": 1.05, "blaq": 2.05}  # over AdamW; blaq takes two gradients
FLOAT = "float"


class Training:
    """A network with its optimizer, and the batch that it sees in every step."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        torch.manual_seed(0)
        self.recipe = recipe
        model = build_model(recipe.model.name, **recipe.model.options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = model.to(device)
        self.loss = LOSSES[recipe.model.loss]
        self.inputs, self.targets = (of.to(device) for of in batch_of(recipe, self.model))
        self.opt: torch.optim.Optimizer

    def closure(self) -> Tensor:
        """One gradient, bounded as the recipe says."""
        self.opt.zero_grad()
        loss = self.loss(self.model(self.inputs), self.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.train.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.gradient_clip)
        return loss

    def run(self, steps: int) -> None:
        """Take steps."""
        for _ in range(steps):
            self.opt.step(self.closure)  # type: ignore[arg-type]


class AdamW(Training):
    """The network in float32 with torch's AdamW."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        super().__init__(recipe, device)
        o = recipe.optim
        self.opt = torch.optim.AdamW(
            self.model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )


class Probed(Training):
    """The network with a method of blaq, probed; probes are read at the end of a block, as at that of an epoch."""

    def __init__(self, recipe: Recipe, device: str, every: int) -> None:
        super().__init__(recipe, device)
        self.opt = build_optimizer(self.model, recipe.optim)
        self.zigzag = ZigZag(self.opt, every)

    def run(self, steps: int) -> None:
        """Take steps, and read the probe."""
        super().run(steps)
        self.zigzag.read()


def batch_of(recipe: Recipe, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Random inputs and targets of the recipe's shape."""
    count, options = recipe.data.batch_size, recipe.model.options
    if recipe.data.sequence is not None:
        tokens = torch.zeros(1, recipe.data.sequence, dtype=torch.int64)
        classes = model(tokens).shape[-1]
        inputs = torch.randint(classes, (count, recipe.data.sequence))
        return inputs, torch.randint(classes, inputs.shape)
    small = "mnist" in recipe.data.source.lower()
    channels = options.get("input_channels", 1 if small else 3)
    size = options.get("image_size", recipe.data.image_size or (28 if small else 32))
    assert isinstance(channels, int) and isinstance(size, int)
    inputs = torch.randn(count, channels, size, size).to(memory_format=torch.channels_last)
    return inputs, torch.randint(int(str(options.get("classes", 10))), (count,))


def seconds(run: Callable[[int], None], steps: int, device: str) -> float:
    """The time of a block."""
    start = time.perf_counter()
    run(steps)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compared(ours: Training, peer: Training, options: argparse.Namespace) -> dict[str, Any]:
    """The ratio of neighbouring blocks, after steps that warm both up and a first probe."""
    for training in (peer, ours):
        seconds(training.run, max(3, options.every), options.device)
    own: list[float] = []
    theirs: list[float] = []
    for block in range(options.blocks):
        turns: list[tuple[Training, list[float]]] = [(peer, theirs), (ours, own)]
        for training, times in turns if block % 2 == 0 else reversed(turns):
            times.append(seconds(training.run, options.steps, options.device) / options.steps)
    each = [a / b for a, b in zip(own, theirs, strict=True)]
    return {
        "milliseconds": round(statistics.median(own) * 1e3, 2),
        "adamw_milliseconds": round(statistics.median(theirs) * 1e3, 2),
        "ratio": round(statistics.median(each), 3),
        "range": [round(min(each), 3), round(max(each), 3)],
    }


def rows(recipe: Recipe, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every method, grid and solver."""
    peer = AdamW(recipe, options.device)
    for method in options.methods:
        quantized = METHODS[method].quantized
        for bits in options.bits if quantized else ["32"]:
            for solver in options.solvers if quantized else ["-"]:
                settings = [f"optim.method={method}"]
                settings += [f"optim.bits={bits}", f"optim.solver={solver}"] if quantized else []
                ours = Probed(recipe.with_(settings), options.device, options.every)
                found = compared(ours, peer, options)
                yield {"method": method, "bits": bits, "solver": solver, **found, "target": TARGETS.get(method)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write epoch.json and epoch.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a shipped recipe, or a TOML file")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", help="what it is called in the results; by default as the recipe")
    parser.add_argument("--methods", nargs="*", default=[FLOAT, "laq", "bwn", "past", "delayed", "blaq"])
    parser.add_argument("--bits", nargs="*", default=["1", "2", "3"])
    parser.add_argument("--solvers", nargs="*", default=["exact", "alternating"])
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="in a block; a multiple of --every")
    parser.add_argument("--every", type=int, default=10, help="steps between probes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.steps % options.every:
        parser.error(
            f"--steps {options.steps}: expected a multiple of --every {options.every}, its share of the probes."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, options.settings)
    name = options.name or recipe.name
    print(f"{name}, batch {recipe.data.batch_size}, over AdamW(fused=True)")
    found = []
    for row in rows(recipe, options):
        found.append(row)
        target = "" if row["target"] is None else f", target {row['target']:g}{' MISSED' * missed(row)}"
        what = f"{row['method']:<8} {row['bits']:<4} {row['solver']:<12} {row['milliseconds']:>9.2f} ms"
        print(f"{what} {spread(row['ratio'], *row['range'])}{target}", flush=True)
    torch.set_num_threads(before)
    if options.out is None:
        return
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    entry = {
        "command": shlex.join(["python", "benchmarks/epoch.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "model": recipe.model.name, "options": dict(recipe.model.options), "batch": recipe.data.batch_size,
        **{key: getattr(options, key) for key in ("blocks", "steps", "every", "threads")},
        "versions": versions("python", "torch", "blaq"),
        "machine": {**processor(), "device": device},
        "rows": found,
    }  # fmt: skip
    record({name: entry}, options.out)


def missed(row: dict[str, Any]) -> bool:
    """Whether the median is above the target."""
    return row["target"] is not None and row["ratio"] > row["target"]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    target = "" if row["target"] is None else f"{row['target']:g}"
    times = [f"{row['milliseconds']:.1f}", f"{row['adamw_milliseconds']:.1f}"]
    ratio = spread(row["ratio"], *row["range"])
    return [row["method"], row["bits"], row["solver"], *times, ratio, target, "missed" * missed(row)]


def recorded(path: Path) -> dict[str, Any]:
    """The recipes that a file has already."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["recipes"] if path.exists() else {}
    return found


def section(name: str, entry: dict[str, Any], what: str) -> list[str]:
    """The lines of a recipe: its command, what was timed, and the table."""
    machine, threads = entry["machine"], f"{entry['threads']} thread{'s' * (entry['threads'] > 1)}"
    columns = ["method", ">bits", "solver", ">ms a step", ">AdamW, ms", ">over AdamW", ">target", ""]
    return [
        "",
        f"## {name}: {entry['model']}, batch {entry['batch']}",
        "",
        f"```\n{entry['command']}\n```",
        "",
        f"{what}, a probe at every {entry['every']} steps; {machine['device']}, {machine['cpu']}, {machine['capability']}, "
        f"{threads}; {listed(entry['versions'])}.",
        "",
        *table(columns, map(cells, entry["rows"])),
    ]


def record(entries: dict[str, Any], folder: Path) -> None:
    """Take the entries into epoch.json, and write epoch.md to read."""
    recipes = recorded(folder / "epoch.json") | entries
    lines = [
        "# The time of a training step",
        "",
        "Forward, backward and optimizer, over the same with `torch.optim.AdamW(fused=True)` on the plain network: median of",
        "neighbouring blocks of steps, and the range. With quantizer, and with the zig-zag probe at every few steps (without",
        "the gradient error, which costs two gradients a probe more). `float` is blaq's own Adam without a grid. BLAQ takes a",
        "trial in every step.",
    ]
    for name, entry in recipes.items():
        lines += section(name, entry, f"{entry['blocks']} blocks of {entry['steps']} steps")
    write(folder, "epoch", {"recipes": recipes}, lines)


if __name__ == "__main__":
    main()
