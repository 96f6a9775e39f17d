"""What the weights of a run look like: per layer the scheme, the scales, and how often each level is taken."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from blaq.grids import Grid
from blaq.optim.plan import plan, size
from blaq.tasks.models import build_model
from blaq.train.directory import Checkpoint, open_run
from blaq.train.module import build_optimizer

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 32  # levels beyond that are shown together


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One parameter of a run.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        scheme: name of the grid, or ``float``.
        scales: smallest and largest scale; None in float.
        levels: the integers of the grid, ascending; empty in float.
        counts: number of weights at each level.
        bytes: stored size, packed.
        note: why it is kept in float, what it is tied with.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    scales: tuple[float, float] | None
    levels: tuple[int, ...]
    counts: tuple[int, ...]
    bytes: int
    note: str


def layers(run: Path, *, checkpoint: Checkpoint = "best") -> list[Layer]:
    """The parameters of a run's checkpoint, in the order of the optimizer's groups.

    Raises:
        ValueError: no run there, or none whose first epoch has ended.
    """
    directory, recipe = open_run(run)
    state = torch.load(directory.existing(checkpoint), map_location="cpu", weights_only=True)
    model = build_model(recipe.model.name, **recipe.model.options)
    optimizer = build_optimizer(model, recipe.optim)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state["state_dict"].items()})
    optimizer.load_state_dict(state["optimizer_states"][0])
    parameters = [(p, group["grid"]) for group in optimizer.param_groups for p in group["params"]]
    found = []
    for row, (parameter, grid) in zip(plan(optimizer.param_groups).rows, parameters, strict=True):
        levels: tuple[int, ...] = ()
        counts: tuple[int, ...] = ()
        scales = None
        if grid is not None:
            levels = tuple(int(level) for level in Grid.parse(grid).levels)
            codes, scale = optimizer.codes(parameter), optimizer.scale(parameter)
            counts = tuple(torch.bincount(codes.flatten().long(), minlength=len(levels)).tolist())
            scales = float(scale.min()), float(scale.max())
        found.append(
            Layer(
                name=row.name,
                shape=row.shape,
                scheme=row.scheme,
                scales=scales,
                levels=levels,
                counts=counts,
                bytes=row.bytes_packed,
                note=row.note,
            )
        )
    return found


def occupancy(levels: tuple[int, ...], counts: tuple[int, ...]) -> str:
    """How often each level is taken: percentages for up to four levels, else bars and how many levels are used.

    Example:
        >>> occupancy((-1, 0, 1), (25, 50, 25))
        '-1 25.0 %  0 50.0 %  1 25.0 %'
        >>> occupancy((-2, -1, 0, 1, 2), (0, 4, 8, 4, 1))
        ' ▄█▄▁ 4 of 5 levels'
    """
    total = sum(counts)
    if not total:
        return ""
    if len(levels) <= 4:
        return "  ".join(f"{level} {100 * count / total:.1f} %" for level, count in zip(levels, counts, strict=True))
    together = -(-len(counts) // COLUMNS)
    heights = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
    # The lowest bar is for anything above none, so that a rare level is told from an unused one.
    bars = "".join(BARS[-(-height * len(BARS) // max(heights)) - 1] if height else " " for height in heights)
    return f"{bars} {sum(count > 0 for count in counts)} of {len(levels)} levels"


def rich_table(found: list[Layer]) -> Table:
    """The layers as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "shape", "scheme", "scale", "levels"):
        table.add_column(name, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for layer in found:
        shape = " x ".join(map(str, layer.shape)) or "scalar"
        low, high = (f"{scale:.4g}" for scale in layer.scales) if layer.scales else ("", "")
        scale = low if low == high else f"{low} .. {high}"
        text = occupancy(layer.levels, layer.counts) if layer.levels else layer.note
        table.add_row(layer.name, shape, layer.scheme, scale, text, size(layer.bytes))
    return table
