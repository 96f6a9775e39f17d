"""The plan: what each parameter becomes, and what it weighs, as a table to read before training."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blaq.grids import Grid
from blaq.projection import row_shape

SCALE_BYTES = 4  # a scale is float32


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One parameter.

    Attributes:
        name: canonical name; ``group 0 [3]`` where the group has no names.
        shape: of the parameter.
        scheme: name of the grid, or ``float``.
        granularity: what shares a scale; None in float.
        scales: number of scales stored: rows, twice as many for ``ternary2``, 0 in float.
        bytes_packed: stored size: codes in whole bytes and float32 scales; a float parameter in its own dtype.
        bytes_float32: size of the same parameter in float32.
        note: why it is kept in float, what it is tied with.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    granularity: str | int | None
    rows: int
    scales: int
    bytes_packed: int
    bytes_float32: int
    note: str

    @property
    def weights(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        """Whether the parameter has a grid."""
        return self.scheme != "float"

    @property
    def bits_per_weight(self) -> float:
        """``8 bytes_packed / weights``: codes and scales together."""
        return 8 * self.bytes_packed / max(self.weights, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `plan` found; `str` is the table.

    Attributes:
        rows: one for each parameter, in the order of the groups.

    Example:
        >>> from torch import nn
        >>> from blaq.optim.groups import param_groups
        >>> found = plan(param_groups(nn.Linear(64, 10), bits=1))
        >>> found.rows[0].scheme, found.quantized_weights, found.bytes_packed, round(found.ratio)
        ('binary', 640, 124, 21)
    """

    rows: tuple[PlanRow, ...]

    @property
    def quantized_weights(self) -> int:
        """Number of weights on a grid."""
        return sum(row.weights for row in self.rows if row.quantized)

    @property
    def float_weights(self) -> int:
        """Number of weights kept in float."""
        return sum(row.weights for row in self.rows if not row.quantized)

    @property
    def bytes_packed(self) -> int:
        """Stored size of all parameters."""
        return sum(row.bytes_packed for row in self.rows)

    @property
    def bytes_float32(self) -> int:
        """Size of all parameters in float32."""
        return sum(row.bytes_float32 for row in self.rows)

    @property
    def ratio(self) -> float:
        """``bytes_float32 / bytes_packed``: how many times smaller."""
        return self.bytes_float32 / max(self.bytes_packed, 1)

    @property
    def bits_per_weight(self) -> float:
        """``8 bytes_packed / weights`` over all parameters: codes, scales and what is kept in float."""
        return 8 * self.bytes_packed / max(self.quantized_weights + self.float_weights, 1)

    def __str__(self) -> str:
        """The table, and a last line of totals."""
        table: list[tuple[str, ...]] = [("name", "shape", "scheme", "rows", "bits", "size", "note")]
        table += [_cells(row) for row in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        numbers = (3, 4, 5)
        lines = [
            "  ".join(
                cell.rjust(width) if i in numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        lines.append(
            f"total: {self.quantized_weights:,} quantized, {self.float_weights:,} float; "
            f"{size(self.bytes_packed)} packed, {size(self.bytes_float32)} in float32 ({self.ratio:.1f}x); "
            f"{self.bits_per_weight:.2f} bits a weight"
        )
        return "\n".join(lines)


def plan(groups: Iterable[Mapping[str, Any]]) -> Plan:
    """The plan of param groups, as `param_groups` makes them or as an optimizer holds them.

    A group without ``grid`` is float, one without ``granularity`` has one scale a tensor, one without ``param_names``
    is listed by number. The packed size of n weights of m bits is ``ceil(n m / 8)`` bytes and 4 bytes a scale.

    Raises:
        ValueError: not a list of groups; a bad grid or granularity; a group size that does not divide.

    Example:
        >>> from torch import nn
        >>> from blaq.optim.groups import param_groups
        >>> print(plan(param_groups(nn.Linear(64, 10), bits=2, granularity="channel")))
        name    shape    scheme               rows   bits   size  note
        weight  10 x 64  ternary per channel    10   2.50  200 B
        bias    10       float                   -  32.00   40 B  bias
        total: 640 quantized, 10 float; 240 B packed, 2.6 kB in float32 (10.8x); 2.95 bits a weight
    """
    rows: list[PlanRow] = []
    for index, group in enumerate(listed(groups, "plan")):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(
                f"plan: group {index} is no param group with a list 'params'; "
                "pass what param_groups returns, or optimizer.param_groups."
            )
        params: list[Tensor] = list(group["params"])
        names = group.get("param_names") or [f"group {index} [{i}]" for i in range(len(params))]
        notes = group.get("notes") or [""] * len(params)
        rows += [_row(p, name, note, group) for p, name, note in zip(params, names, notes, strict=True)]
    return Plan(tuple(rows))


def listed(groups: Iterable[Mapping[str, Any]], owner: str) -> list[Mapping[str, Any]]:
    """Param groups as a list; refuses a model, an optimizer, or anything else that is none of them."""
    if not isinstance(groups, Iterable):
        raise ValueError(
            f"{owner}({type(groups).__name__}): expected param groups; pass what param_groups returns, or "
            "optimizer.param_groups."
        )
    return list(groups)


def size(count: int) -> str:
    """Bytes in the largest unit that leaves at least one: B, kB (1000), MB, GB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"


def _row(parameter: Tensor, name: str, note: str, group: Mapping[str, Any]) -> PlanRow:
    count, shape = parameter.numel(), parameter.shape
    spec = group.get("grid")
    if spec is None:
        stored = count * parameter.element_size()
        return PlanRow(name, tuple(shape), "float", None, 0, 0, stored, 4 * count, note)
    grid = Grid.parse(spec)
    granularity = group.get("granularity", "tensor")
    rows, _ = row_shape(shape, granularity, f"plan: {name!r}")
    scales = rows * grid.scales
    stored = -(-count * grid.bits // 8) + SCALE_BYTES * scales
    return PlanRow(name, tuple(shape), grid.name, granularity, rows, scales, stored, 4 * count, note)


def _cells(row: PlanRow) -> tuple[str, ...]:
    per = f" per {row.granularity}" if row.quantized else ""
    return (
        row.name,
        " x ".join(map(str, row.shape)) or "scalar",
        row.scheme + per,
        f"{row.rows:,}" if row.quantized else "-",
        f"{row.bits_per_weight:.2f}",
        size(row.bytes_packed),
        row.note,
    )
