"""The time of whole training epochs against AdamW: `python benchmarks/whole_epoch.py mnist-lenet5 --out docs/results`.

An epoch is what `blaq train` makes of it: the recipe's data, loader, Lightning, every training step, and the validation after
it; without log files and checkpoints. In one process, of the plain network with `torch.optim.AdamW(fused=True)`, and of every
method of blaq with quantizer and with the zig-zag probe at every 10th step (without the gradient error, which costs two
gradients a probe more), read at the end. Epochs are taken in turn, AdamW's and the method's, in alternating order; a ratio is
that of neighbouring epochs, and told are their median and range. BLAQ takes a trial in every step. `--set data.train=...`
makes epochs shorter; validation data should then shrink with it.

Nothing here is a test: numbers are recorded, and those above their target marked. Adds its recipe to whole-epoch.json and
writes whole-epoch.md anew.
"""

import argparse
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from epoch import TARGETS, missed, recorded, section
from lightning.pytorch import Callback
from recording import processor, spread, versions, write
from torch import Tensor

from blaq.tasks.data import Dataset
from blaq.train.config import METHODS, Recipe, load_recipe
from blaq.train.module import TaskModule
from blaq.train.run import _settings, _trainer, load_data
from blaq.zigzag import ZigZag


class AdamW(TaskModule):
    """The task, trained by torch's own optimizer, which outlives a call of the trainer."""

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        super().__init__(recipe, dataset)
        o = recipe.optim
        self.plain = torch.optim.AdamW(
            self.model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )

    def configure_optimizers(self) -> Any:
        """The optimizer, in the state that it is in."""
        return self.plain

    def on_train_epoch_start(self) -> None:
        """As `TaskModule`, without what only its optimizer can do."""
        self.training_batches.set_epoch(self.current_epoch)
        self.training_tally.reset()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """As `TaskModule`."""
        inputs, targets = batch
        logits = self.model(inputs)
        loss = self.loss(logits, targets)
        self.training_tally.add(loss, logits, targets)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """As `TaskModule`."""
        self.evaluation_tally.reset()

    def end(self) -> None:
        """Nothing to read."""


class Probed(TaskModule):
    """The task, trained by a method of blaq and probed; optimizer and probe outlive a call of the trainer."""

    def __init__(self, recipe: Recipe, dataset: Dataset, every: int) -> None:
        super().__init__(recipe, dataset)
        super().configure_optimizers()
        self.zigzag = ZigZag(self.optimizer, every)

    def configure_optimizers(self) -> Any:
        """The optimizer, in the state that it is in: at a rate of its own, as AdamW's."""
        return self.optimizer

    def end(self) -> None:
        """Read the probe, as a run does after every epoch."""
        self.zigzag.read()


class Clock(Callback):
    """The time of an epoch: from its start to the end of its validation."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning validates before it calls this."""
        pl_module.end()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began


def epoch_of(module: TaskModule) -> float:
    """Train the module for an epoch: its seconds."""
    clock = Clock()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        _trainer(max_epochs=1, logger=False, callbacks=[clock]).fit(module)
    return clock.seconds


def compared(ours: Probed, peer: AdamW, pairs: int) -> dict[str, Any]:
    """Pairs of epochs, taken in turn, after one of each that is not counted: it compiles, and brings data into memory."""
    own: list[float] = []
    theirs: list[float] = []
    epoch_of(peer)
    epoch_of(ours)
    for pair in range(pairs):
        turns: list[tuple[TaskModule, list[float]]] = [(peer, theirs), (ours, own)]
        for module, times in turns if pair % 2 == 0 else reversed(turns):
            times.append(epoch_of(module))
    each = [a / b for a, b in zip(own, theirs, strict=True)]
    steps = len(ours.training_batches)
    return {
        "milliseconds": round(statistics.median(own) / steps * 1e3, 2),
        "adamw_milliseconds": round(statistics.median(theirs) / steps * 1e3, 2),
        "ratio": round(statistics.median(each), 3),
        "range": [round(min(each), 3), round(max(each), 3)],
    }


def rows(recipe: Recipe, dataset: Dataset, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every method and grid."""
    peer = AdamW(recipe, dataset)
    for method in options.methods:
        for bits in options.bits:
            settings = [f"optim.method={method}", f"optim.bits={bits}"]
            settings += ["optim.period=1"] if METHODS[method].trial == "fresh" else []
            ours = Probed(recipe.with_(settings), dataset, options.every)
            found = compared(ours, peer, options.pairs)
            yield {
                "method": method,
                "bits": bits,
                "solver": recipe.optim.solver,
                **found,
                "target": TARGETS.get(method),
            }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write whole-epoch.json and whole-epoch.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a shipped recipe, or a TOML file")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="*", default=["laq", "past", "blaq"])
    parser.add_argument("--bits", nargs="*", default=["1", "2"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--every", type=int, default=10, help="steps between probes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.settings)
    dataset = load_data(recipe.data)
    print(f"{recipe.name}, {len(dataset.train)} examples, batch {recipe.data.batch_size}, over AdamW(fused=True)")
    found = []
    with _settings(options.threads):
        for row in rows(recipe, dataset, options):
            found.append(row)
            target = f", target {row['target']:g}{' MISSED' * missed(row)}" if row["target"] else ""
            what = f"{row['method']:<8} {row['bits']:<4} {row['milliseconds']:>9.2f} ms a step"
            print(f"{what} {spread(row['ratio'], *row['range'])}{target}", flush=True)
    if options.out is None:
        return
    entry = {
        "command": shlex.join(["python", "benchmarks/whole_epoch.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "model": recipe.model.name, "batch": recipe.data.batch_size,
        "train": len(dataset.train), "validation": len(dataset.validation),
        **{key: getattr(options, key) for key in ("pairs", "every", "threads")},
        "versions": versions("python", "torch", "blaq", "lightning"),
        "machine": {**processor(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"},
        "rows": found,
    }  # fmt: skip
    record({recipe.name: entry}, options.out)


def record(entries: dict[str, Any], folder: Path) -> None:
    """Take the entries into whole-epoch.json, and write whole-epoch.md to read."""
    recipes = recorded(folder / "whole-epoch.json") | entries
    lines = [
        "# The time of a training epoch",
        "",
        "What `blaq train` makes of an epoch (loader, Lightning, training steps, validation; without log files and",
        "checkpoints), over the same with `torch.optim.AdamW(fused=True)` on the plain network: median of neighbouring epochs,",
        "and the range. With quantizer, and with the zig-zag probe at every few steps (without the gradient error, which costs",
        "two gradients a probe more). BLAQ takes a trial in every step. Times are an epoch's, divided by its training steps.",
    ]
    for name, entry in recipes.items():
        what = f"{entry['pairs']} pairs of epochs of {entry['train']:,} examples, {entry['validation']:,} to validate"
        lines += section(name, entry, what)
    write(folder, "whole-epoch", {"recipes": recipes}, lines)


if __name__ == "__main__":
    main()
