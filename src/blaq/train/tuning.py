"""Each method's own best learning rate, chosen from a stated grid on validation data alone."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from blaq.train.config import Recipe
from blaq.train.sweep import Job, Run, Sweeper

# Seeds of tuning runs begin here above the recipe's, so that none of them is counted afterwards.
FIRST_SEED = 10_000


@dataclass(frozen=True, slots=True)
class Tuning:
    """The choice.

    Attributes:
        rows: of every method and grid, and rate: the means over its seeds of the lowest validation error and loss (none
            where a run failed), and whether it was chosen.
        chosen: name of the variant to rate; a variant without a rate that all its runs bear is missing.
        failures: run name to message.
    """

    rows: Sequence[Mapping[str, Any]]
    chosen: Mapping[str, float]
    failures: Mapping[str, str]

    def at_the_edge(self) -> list[str]:
        """Variants whose choice is the lowest or highest of several rates: a better one may lie outside."""
        rates = [row["lr"] for row in self.rows]
        edges = {min(rates), max(rates)} if len(set(rates)) > 1 else set()
        return [name for name, rate in self.chosen.items() if rate in edges]

    def table(self) -> Table:
        """The choice, for a terminal."""
        table = Table(title="Learning rates, on validation data", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(("setting", "lr", "validation error %", "validation loss", "chosen")):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            error, loss = row["validation_error"], row["validation_loss"]
            numbers = ("failed", "") if error is None else (f"{error:.2f}", f"{loss:.4f}")
            table.add_row(row["setting"], f"{row['lr']:g}", *numbers, "yes" if row["chosen"] else "")
        return table


def tuning_jobs(variants: Mapping[str, Recipe], rates: Sequence[float], seeds: int) -> list[Job]:
    """The runs of the choice: each variant with each rate and seed."""
    return [
        Job(
            name=f"{name}-lr{rate:g}-s{seed}",
            recipe=replace(variant, optim=replace(variant.optim, lr=rate), train=replace(variant.train, seed=seed)),
            settings={"setting": name, "lr": repr(rate)},
        )
        for name, variant in variants.items()
        for rate in rates
        for seed in (variant.train.seed + FIRST_SEED + number for number in range(seeds))
    ]


def tune(variants: Mapping[str, Recipe], rates: Sequence[float], seeds: int, folder: Path, sweeper: Sweeper) -> Tuning:
    """Run each variant with each rate, in ``folder/<name>``, and choose.

    The rate chosen has the lowest mean over the seeds of a run's lowest validation error; of equal ones the lower mean of
    the lowest validation loss, then the earlier in the grid. For text it is the lowest validation loss alone. Test data
    play no part: only metrics.jsonl is read, which has none.
    """
    jobs = tuning_jobs(variants, rates, seeds)
    sweeper.console.print(f"Tuning: {len(jobs)} runs", highlight=False)
    outcome = sweeper.run(jobs, folder)
    text = any(variant.data.sequence is not None for variant in variants.values())
    tuning = choose(variants, rates, seeds, outcome.runs, outcome.failures, by_loss=text)
    sweeper.console.print(tuning.table())
    if edge := tuning.at_the_edge():
        text_ = f"At the edge of the grid, so a better rate may lie outside: {', '.join(edge)}."
        sweeper.console.print(text_, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return tuning


def choose(
    names: Sequence[str] | Mapping[str, Any],
    rates: Sequence[float],
    seeds: int,
    runs: Sequence[Run],
    failures: Mapping[str, str],
    *,
    by_loss: bool,
) -> Tuning:
    """The choice that finished runs lead to; see `tune`."""
    rows: list[dict[str, Any]] = []
    chosen: dict[str, float] = {}
    for name in names:
        candidates = []
        for order, rate in enumerate(rates):
            own = [run.metrics for run in runs if run.settings == {"setting": name, "lr": repr(rate)}]
            metrics = [lines for lines in own if lines]  # a run may have lost its file
            row: dict[str, Any] = {"setting": name, "lr": rate, "seeds": seeds}
            row |= {"validation_error": None, "validation_loss": None, "chosen": False}
            rows.append(row)
            if len(metrics) < seeds:
                continue
            for field in ("validation_error", "validation_loss"):
                row[field] = statistics.fmean(min(line[field] for line in lines) for lines in metrics)
            key = () if by_loss else (row["validation_error"],)
            candidates.append(((*key, row["validation_loss"], order), row))
        if candidates:
            _, best = min(candidates, key=lambda candidate: candidate[0])
            best["chosen"] = True
            chosen[name] = best["lr"]
    return Tuning(rows, chosen, dict(failures))
