"""The report of many long runs: how long it takes to make, and how large the page is.

    python benchmarks/report.py --out docs/results

Writes 200 run directories of 500 epochs with invented numbers: an ablation of 40 settings with 5 seeds each, and in a second
case 200 settings with one seed each, which leaves nothing to average. Every run has zig-zag measures of four layers at
every epoch and 2000 probes of eight weights a layer, the most that a run keeps. Writes report.md and report.json.
"""

import argparse
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from recording import table, versions, write

from blaq.report.page import build, write_page
from blaq.report.read import read_runs
from blaq.train.config import Recipe, load_recipe

RUNS, EPOCHS, STEPS, PROBES, WEIGHTS = 200, 500, 100, 2000, 8
LAYERS = ("fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight")


def cases() -> Iterator[tuple[str, list[tuple[float, int, int]]]]:
    """Name, and a, m and seed of every run."""
    yield "40 settings, 5 seeds", [(a / 8, m, seed) for a in range(8) for m in (1, 2, 5, 10, 20) for seed in range(5)]
    yield "200 settings, 1 seed", [(a / 40, m, 0) for a in range(40) for m in (1, 2, 5, 10, 20)]


def write_run(path: Path, recipe: Recipe, noise: random.Random, trajectories: str) -> None:
    """A run directory with every file that the report reads, but for checkpoints."""
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(recipe.to_toml())
    (path / "versions.json").write_text(json.dumps({"python": platform.python_version()}))
    rate = 0.01 * (1 + 0.1 * noise.random())
    metrics, zigzag = [], []
    for epoch in range(1, EPOCHS + 1):
        loss = 0.5 * math.exp(-rate * epoch) * (1 + 0.05 * noise.random()) + 0.001
        gradients = STEPS * (epoch + epoch // recipe.optim.period)
        where = {"epoch": epoch, "steps": STEPS * epoch, "gradient_evaluations": gradients}
        metrics.append(where | {
            "seconds": 1.234 * epoch, "train_loss": loss, "train_error": 20 * loss, "validation_loss": 1.5 * loss,
            "validation_error": 30 * loss, "lr": 0.001,
        })  # fmt: skip
        zigzag += [
            where | {
                "layer": layer, "gradient_cosine": noise.random(), "zigzag_rate": 0.3 * noise.random(),
                "path_efficiency": noise.random(), "flip_rate": 0.01 * noise.random(),
                "oscillation_frequency": 0.01 * noise.random(), "gradient_error": noise.random(),
                "trial_agreement": noise.random(),
            }
            for layer in ("total", *LAYERS)
        ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (path / "zigzag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in zigzag))
    (path / "trajectories.jsonl").write_text(trajectories)
    last = metrics[-1]
    result: dict[str, Any] = {name: last[name] for name in ("steps", "gradient_evaluations", "seconds", "train_loss")}
    result |= {
        "recipe": recipe.name, "method": "blaq", "bits": 1, "seed": recipe.train.seed, "epochs": EPOCHS, "test_loss": 0.1,
        "validation_loss": last["validation_loss"], "validation_error": last["validation_error"],
        "test_error": 2 + 0.1 * noise.random(), "parameters": 10**6, "bytes": 125_000, "float_bytes": 4 * 10**6,
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))


def paths_of_weights(noise: random.Random) -> str:
    """A full trajectories.jsonl."""
    latent = {layer: [noise.gauss(0, 0.05) for _ in range(WEIGHTS)] for layer in LAYERS}
    lines = []
    for probe in range(PROBES):
        for layer, weights in latent.items():
            weights[:] = [weight + noise.gauss(0, 0.01) for weight in weights]
            lines.append(json.dumps({
                "step": 25 * probe, "layer": layer, "index": list(range(WEIGHTS)), "latent": weights,
                "value": [math.copysign(0.05, weight) for weight in weights], "scale": [0.05] * WEIGHTS, "trial": True,
            }))  # fmt: skip
    return "\n".join(lines) + "\n"


def measure(settings: list[tuple[float, int, int]], folder: Path) -> tuple[float, float, float]:
    """Seconds of the wall clock and of the processor, and megabytes of the page."""
    noise = random.Random(0)
    recipe = load_recipe("demo", [f"train.epochs={EPOCHS}"])
    trajectories = paths_of_weights(noise)
    for number, (a, period, seed) in enumerate(settings):
        run = replace(
            recipe,
            optim=replace(recipe.optim, a=a, period=period),
            train=replace(recipe.train, seed=seed, epochs=EPOCHS),
        )
        write_run(folder / "runs" / f"{number:03}", run, noise, trajectories)
    out = folder / "report.html"
    wall, cpu = time.perf_counter(), time.process_time()
    write_page(build(read_runs([folder])), out)
    return time.perf_counter() - wall, time.process_time() - cpu, out.stat().st_size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and report.json")
    arguments = parser.parse_args()
    rows = []
    for name, settings in cases():
        assert len(settings) == RUNS
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu, size = measure(settings, Path(folder))
        rows.append(
            {"case": name, "wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "megabytes": round(size, 2)}
        )
        print(rows[-1], flush=True)
    machine = {
        "cores": os.cpu_count(), "platform": platform.platform(), **versions("python", "plotly"),
    }  # fmt: skip
    write(arguments.out, "report", {"machine": machine, "cases": rows}, lines(machine, rows), indent=2)


def lines(machine: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """report.md."""
    keys = ("wall_seconds", "cpu_seconds", "megabytes")
    cells = [[row["case"], *(f"{row[key]:.1f}" for key in keys)] for row in rows]
    found = table(["200 runs", ">seconds (wall)", ">seconds (processor)", ">page, MB"], cells)
    return TEXT.format(table="\n".join(found), **machine).splitlines()


TEXT = """\
# The report of many long runs

```
python benchmarks/report.py --out docs/results
```

{cores} cores shared with other work, Python {python}, plotly {plotly}: 200 runs of 500 epochs, each with zig-zag measures of
four layers at every epoch and {table_probes} probes of eight weights a layer. The aim is under 60 s and under 10 MB.

{table}

plotly.js is 4.8 MB of the page. All 500 epochs are drawn; longer curves would be drawn every k-th epoch, and the page says so
then. Of every 8 of the 2000 probes the lowest and the highest are drawn. Tables and verdict use every epoch.
""".replace("{table_probes}", str(PROBES))


if __name__ == "__main__":
    main()
