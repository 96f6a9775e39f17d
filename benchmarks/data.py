"""How long data take to be there, and whether they hold training up: `python benchmarks/data.py --out docs/results`.

A run starts in a process of its own, with an empty cache and again with the cache of the first: from the start of the process
to the first batch, and apart how much of that is importing. Then, in one process, the time of a batch of the loader beside
that of a gradient of LeNet-5 on it, in turn, over an epoch. Nothing here is a test: numbers are recorded, not gated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recording import listed, processor, versions, write

SOURCES = {
    "MNIST": ("mnist-lenet5", False),
    "CIFAR-10": ("cifar10-vgg", True),
}  # a recipe on it, and whether it augments
TARGET = 2.0  # seconds to a second start
STARTS = 5  # of a filled cache
CHILD = """
import json, sys, time
from blaq.tasks.data import Batches, load_dataset
import blaq.tasks.images
import torch
imported = time.time()
torch.set_num_threads(1)
source, augment, train, validation = json.loads(sys.argv[1])
dataset = load_dataset(source, train=train, validation=validation)
inputs, _ = next(iter(Batches(dataset.train, dataset, 128, shuffle=True, augment=augment, seed=0)))
print(json.dumps({"imported": imported, "ready": time.time(), "shape": list(inputs.shape)}))
"""


def start(source: str, augment: bool, train: int | None, validation: int | None, cache: str) -> dict[str, float]:
    """Seconds from the start of a process to its first batch, and those of importing."""
    asked = json.dumps([source, augment, train, validation])
    began = time.time()
    environment = {**os.environ, "BLAQ_CACHE": cache}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, asked], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    return {"imports": told["imported"] - began, "data": told["ready"] - told["imported"], "all": told["ready"] - began}


def starts(name: str, source: str, augment: bool, train: int | None, validation: int | None) -> dict[str, Any]:
    """The first start, and the median of the later ones."""
    with tempfile.TemporaryDirectory() as cache:
        first, *later = (start(source, augment, train, validation, cache) for _ in range(1 + STARTS))
    second = {key: round(statistics.median(one[key] for one in later), 2) for key in first}
    return {"data set": name, "first": {key: round(value, 2) for key, value in first.items()}, "second": second}


def loader(recipe: str, overrides: list[str], most: int) -> dict[str, Any]:
    """The medians over an epoch: milliseconds of a batch, and of a gradient on it, one thread."""
    from blaq.tasks.losses import LOSSES
    from blaq.train.config import load_recipe
    from blaq.train.module import TaskModule
    from blaq.train.run import load_data

    resolved = load_recipe(recipe, overrides)
    module = TaskModule(resolved, load_data(resolved.data))
    module.model.train()
    loss, batches = LOSSES[resolved.model.loss], iter(module.training_batches)
    loading, computing = [], []
    for _ in range(min(most, len(module.training_batches))):
        began = time.perf_counter()
        inputs, targets = next(batches)
        loaded = time.perf_counter()
        module.model.zero_grad()
        loss(module.model(inputs), targets).backward()
        loading.append(loaded - began)
        computing.append(time.perf_counter() - loaded)
    # The first holds the shuffle of the epoch, the first gradient what torch sets up.
    both = [1e3 * statistics.median(times[1:]) for times in (loading, computing)]
    return {
        "recipe": recipe,
        "batch_size": resolved.data.batch_size,
        "batches": len(loading),
        "batch_ms": round(both[0], 3),
        "gradient_ms": round(both[1], 2),
        "share": round(both[0] / both[1], 4),
        "first_batch_ms": round(1e3 * loading[0], 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write data.json and data.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mnist-lenet5", help="whose gradient stands beside a batch")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of that recipe"
    )
    parser.add_argument("--sources", nargs="*", help="MNIST, CIFAR-10, or what data.source takes; default: both")
    parser.add_argument("--batches", type=int, default=390, help="at most so many of an epoch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    from blaq.train.config import load_recipe

    rows = []
    for name in SOURCES if options.sources is None else options.sources:
        recipe, augment = SOURCES.get(name, (None, False))
        data = load_recipe(recipe).data if recipe else None
        asked = (data.source, augment, data.train, data.validation) if data else (name, augment, None, None)
        rows.append(starts(name, *asked))
        print(rows[-1], flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    beside = loader(options.recipe, options.set, options.batches)
    torch.set_num_threads(threads)
    print(beside, flush=True)
    if options.out:
        where = {"versions": versions("python", "torch", "blaq"), "machine": processor()}
        report = {**where, "starts": rows, "loader": beside}
        write(options.out, "data", report, page(report))


def page(report: dict[str, Any]) -> list[str]:
    """The tables to read."""
    beside = report["loader"]
    lines = [
        "# Data: starting, and keeping up",
        "",
        "`python benchmarks/data.py --out docs/results`. Images are decoded once into a memory-mapped file, keyed by the",
        "content of their files; mean and deviation of the training images are found at every start, and images are normalised",
        "batch by batch, for they depend on the split that is asked for.",
        "",
        f"{listed(report['versions'])}; {report['machine']['cpu']}, {report['machine']['capability']}, one thread.",
        "",
        "## Starting",
        "",
        "Seconds from the start of a process to its first batch: starting Python and importing torch and the readers of data;",
        f"and the rest. The first start decodes; the second is the median of {STARTS} with the cache of the first. Aim: the",
        f"second within {TARGET:g} s, without the imports.",
        "",
        "| data set | first: imports | first: data | second: imports | second: data | second: all | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["starts"]:
        numbers = [
            row["first"]["imports"],
            row["first"]["data"],
            *(row["second"][key] for key in ("imports", "data", "all")),
        ]
        missed = "" if row["second"]["data"] < TARGET else "missed"
        lines.append(f"| {row['data set']} | {' | '.join(f'{number:.2f}' for number in numbers)} | {missed} |")
    lines += [
        "",
        "## Keeping up",
        "",
        f"Recipe `{beside['recipe']}`, batches of {beside['batch_size']}, medians of {beside['batches']}, in turn: a batch",
        f"takes {beside['batch_ms']:.2f} ms, a gradient on it {beside['gradient_ms']:.1f} ms: {100 * beside['share']:.1f} %.",
        f"The first batch, which shuffles the epoch, takes {beside['first_batch_ms']:.1f} ms.",
    ]
    return lines


if __name__ == "__main__":
    main()
