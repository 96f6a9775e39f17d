"""Is following the scale as good as solving exactly: `python benchmarks/solvers.py RECIPE --out docs/results`.

A recipe is trained by LAQ with either solver, from several seeds. After every step of the run that follows, the gap: how
much larger its error, sum d (w - scale level)^2, is than with the exact scale for the same latent weights and metric. At
the end, what it did to the network: test error and training loss, each minus those of the exact run of the same seed.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from recording import listed, table, versions, write
from torch import Tensor

import blaq
from blaq.grids import Grid
from blaq.optim import update
from blaq.projection import dequantize, in_rows, nearest_levels, solve_scale
from blaq.tasks.data import Dataset
from blaq.train.config import Recipe, load_recipe
from blaq.train.module import Tally, TaskModule
from blaq.train.run import load_data
from blaq.train.statistics import Sample, paired

GRIDS = ["ternary", "ternary2", "linear3", "midrise2", "linear4", "log3"]


class Gaps:
    """An observer: of every quantized parameter, after every step, the error of the scale that is held, over the optimum."""

    def __init__(self, opt: blaq.BLAQ) -> None:
        self.opt = opt
        self.found: list[float] = []

    def before_update(self, first: Mapping[Tensor, Tensor] | None) -> None:
        """Nothing to see yet."""

    @torch.no_grad()
    def after_update(self) -> None:
        """Compare the scales."""
        for group in self.opt.param_groups:
            if group["grid"] is not None:
                self.found += [self._gap(p, group) for p in group["params"]]

    def _gap(self, p: Tensor, group: dict[str, Any]) -> float:
        state, grid = self.opt.state[p], Grid.parse(group["grid"])
        rows = len(state["scale"]), p.numel() // len(state["scale"])
        d = update.curvature(state["exp_avg_sq"], update.Rates.of(group, int(state["step"])))
        w, d = in_rows(state["latent"], rows), in_rows(d, rows)
        held, best = (
            (d.double() * (w - dequantize(nearest_levels(w, scale, grid), scale, grid)).double().square()).sum()
            for scale in (state["scale"], solve_scale(w, d, grid, "exact"))
        )
        return float(held / best - 1)


def trained(recipe: Recipe, dataset: Dataset, *, look: bool) -> tuple[float, float, list[float]]:
    """Training loss of the last epoch, test error after it, and the gaps."""
    module = TaskModule(recipe, dataset)
    schedule = module.configure_optimizers()
    opt, tally = module.optimizer, Tally()
    advance = schedule["lr_scheduler"]["scheduler"].step if isinstance(schedule, dict) else lambda: None
    gaps = Gaps(opt)
    if look:
        opt.observers.append(gaps)
    for epoch in range(recipe.train.epochs):
        module.training_batches.set_epoch(epoch)
        tally.reset()
        for inputs, targets in module.training_batches:
            opt.zero_grad()
            logits = module.model(inputs)
            loss = module.loss(logits, targets)
            loss.backward()
            opt.step()
            advance()
            tally.add(loss, logits, targets)
    loss = tally.loss
    tally.reset()
    module.model.eval()
    with torch.no_grad():
        for inputs, targets in module.evaluation_batches(dataset.test):
            logits = module.model(inputs)
            tally.add(module.loss(logits, targets), logits, targets)
    return loss, tally.error, gaps.found


def row_of(recipe: Recipe, dataset: Dataset, grid: str, seeds: int) -> dict[str, Any]:
    """One grid."""
    losses: dict[str, dict[int, float]] = {"exact": {}, "alternating": {}}
    errors: dict[str, dict[int, float]] = {"exact": {}, "alternating": {}}
    gaps: list[float] = []
    for seed in range(seeds):
        for solver in losses:
            one = replace(
                recipe,
                optim=replace(recipe.optim, method="laq", bits=grid, solver=solver),
                train=replace(recipe.train, seed=seed),
            )
            losses[solver][seed], errors[solver][seed], found = trained(one, dataset, look=solver == "alternating")
            gaps += found
    differences = {
        name: paired(values["alternating"], values["exact"]) for name, values in (("loss", losses), ("error", errors))
    }
    assert differences["loss"] is not None and differences["error"] is not None
    return {
        "grid": grid,
        "gap_median": float(numpy.median(gaps)),
        "gap_95": float(numpy.quantile(gaps, 0.95)),
        "gap_largest": max(gaps),
        "gaps": len(gaps),
        "exact_error": Sample(tuple(errors["exact"].values())).show(2),
        "error": Sample(tuple(errors["alternating"].values())).show(2),
        "error_minus_exact": differences["error"].show(2),
        "exact_loss": Sample(tuple(losses["exact"].values())).show(4),
        "loss": Sample(tuple(losses["alternating"].values())).show(4),
        "loss_minus_exact": differences["loss"].show(4),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, print, and write solvers.json and solvers.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--grids", nargs="*", default=GRIDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="solvers", help="of the files below --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.set)
    torch.set_num_threads(recipe.train.threads or 1)
    dataset = load_data(recipe.data)
    rows = []
    for grid in options.grids:
        rows.append(row_of(recipe, dataset, grid, options.seeds))
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        settings = [options.recipe, *(f"--set {text}" for text in options.set), f"--seeds {options.seeds}"]
        settings += ["--grids", *options.grids] if options.grids != GRIDS else []
        settings += ["--name", options.name] if options.name != "solvers" else []
        found = versions("python", "torch", "blaq")
        report = {"settings": " ".join(settings), "title": recipe.title, "versions": found, "rows": rows}
        write(options.out, options.name, report, page(report))


def page(report: dict[str, Any]) -> list[str]:
    """The table to read."""
    columns = ["grid", ">gap: median", ">95 % below", ">largest"]
    columns += [">test error %, exact", ">followed", ">difference", ">training loss, exact", ">followed", ">difference"]
    keys = ("exact_error", "error", "error_minus_exact", "exact_loss", "loss", "loss_minus_exact")
    rows = [
        [
            row["grid"],
            *(f"{100 * row[key]:.2g} %" for key in ("gap_median", "gap_95", "gap_largest")),
            *(row[key] for key in keys),
        ]
        for row in report["rows"]
    ]
    return [
        "# Following the scale, and solving exactly",
        "",
        f"{report['title']}; LAQ. `python benchmarks/solvers.py {report['settings']} --out docs/results`;",
        listed(report["versions"]) + ".",
        "",
        "Gap: the projection's error with the scale that was followed, over that of the optimum, minus 1, of every layer after",
        "every step. Differences are paired by seed, ± half of their 95 % interval (t).",
        "",
        *table(columns, rows),
    ]


if __name__ == "__main__":
    main()
