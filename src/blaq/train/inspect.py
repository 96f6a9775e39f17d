"""What the weights of a run look like: per layer the scheme, the scales, and how often each level is taken."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.plan import plan, size
from blaq.train.directory import Checkpoint
from blaq.train.restore import restore

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 32  # levels beyond that are shown together


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One parameter of a run, or one tensor of a file.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        scheme: name of the grid, or ``float``; of a file's other tensors the dtype.
        scales: smallest and largest scale; None in float.
        levels: the integers of the grid, ascending; empty in float.
        counts: number of weights at each level.
        bytes: stored size, packed, with its scales.
        note: why it is kept in float, what it is tied with.

    Example:
        >>> layer = Layer(name="fc", shape=(4, 5), scheme="ternary", scales=(0.1, 0.2), levels=(-1, 0, 1),
        ...               counts=(5, 10, 5), bytes=20, note="")
        >>> layer.bits_per_weight, layer.sparsity, layer.float_bytes
        (8.0, 0.5, 80)
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    scales: tuple[float, float] | None
    levels: tuple[int, ...]
    counts: tuple[int, ...]
    bytes: int
    note: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def float_bytes(self) -> int:
        """Size in float32."""
        return 4 * self.weights

    @property
    def bits_per_weight(self) -> float:
        """``8 bytes / weights``, scales included."""
        return 8 * self.bytes / max(self.weights, 1)

    @property
    def sparsity(self) -> float | None:
        """The share of weights that are zero; None in float, and on a grid without zero."""
        if 0 not in self.levels or not self.weights:
            return None
        return self.counts[self.levels.index(0)] / self.weights


def layers(run: Path, *, checkpoint: Checkpoint = "best") -> list[Layer]:
    """The parameters of a run's checkpoint, in the order of the optimizer's groups.

    Raises:
        ValueError: no run there, or none whose first epoch has ended.
    """
    _, _, optimizer = restore(run, checkpoint)
    parameters = [(p, group["grid"]) for group in optimizer.param_groups for p in group["params"]]
    found = []
    for row, (parameter, grid) in zip(plan(optimizer.param_groups).rows, parameters, strict=True):
        levels: tuple[int, ...] = ()
        counts: tuple[int, ...] = ()
        scales = None
        if grid is not None:
            levels, counts = occupied(Grid.parse(grid), optimizer.codes(parameter))
            scale = optimizer.scale(parameter)
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


def occupied(grid: Grid, codes: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The levels of a grid, and how many of the codes stand at each.

    Example:
        >>> occupied(Grid.parse("ternary"), torch.tensor([0, 1, 1, 1], dtype=torch.uint8))
        ((-1, 0, 1), (1, 3, 0))
    """
    levels = tuple(int(level) for level in grid.levels)
    return levels, tuple(torch.bincount(codes.flatten(), minlength=len(levels)).tolist())


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
    for name in ("zero", "bits", "size", "float32"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found:
        shape = " x ".join(map(str, layer.shape)) or "scalar"
        low, high = (f"{scale:.4g}" for scale in layer.scales) if layer.scales else ("", "")
        scale = low if low == high else f"{low} .. {high}"
        text = occupancy(layer.levels, layer.counts) if layer.levels else ""
        zero = "" if layer.sparsity is None else f"{100 * layer.sparsity:.1f} %"
        sizes = f"{layer.bits_per_weight:.2f}", size(layer.bytes), size(layer.float_bytes)
        notes = "; ".join(filter(None, (text, layer.note)))
        table.add_row(layer.name, shape, layer.scheme, scale, notes, zero, *sizes)
    return table


def totals(found: Iterable[Layer], stored: int | None = None) -> str:
    """Size against float32, and bits a weight; `stored` bytes, where that is more than the layers'.

    Example:
        >>> layer = Layer(name="fc", shape=(1000,), scheme="binary", scales=(0.1, 0.1), levels=(-1, 1), counts=(500, 500),
        ...               bytes=129, note="")
        >>> totals([layer], stored=500)
        '500 B, 4.0 kB in float32 (8.0x); 4.00 bits a weight'
    """
    found = list(found)
    stored = sum(layer.bytes for layer in found) if stored is None else stored
    weights, in_float = sum(layer.weights for layer in found), sum(layer.float_bytes for layer in found)
    return (
        f"{size(stored)}, {size(in_float)} in float32 ({in_float / max(stored, 1):.1f}x); "
        f"{8 * stored / max(weights, 1):.2f} bits a weight"
    )
