"""Quantized weights as constants of an OpenVINO graph: 2, 4 and 8 bits, dequantized by the graph itself, exactly.

A constant of integers q, a zero point z and a scale s say ``s (q - z)``. OpenVINO's CPU plugin keeps such a constant
packed where a Linear layer multiplies with it, and unpacks it to float32 when it loads the file everywhere else. Three
of its faults are worked around (seen in version 2026.4.1): its kernels read every row from a whole byte on, though rows
of 2- and 4-bit integers follow each other without a gap, so rows are padded to whole bytes; with weights that are not
transposed it divides by zero, and of up to 4 rows of inputs it takes wrong scales for many groups whose size is no power
of two, so both are unpacked.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import openvino as ov
import openvino.opset13 as op
import torch
from numpy.typing import NDArray

from blaq.export.layers import QuantizedWeight
from blaq.export.packing import pack

__all__ = ["Container", "Preset", "choose", "dequantized"]

Preset = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True)
class Container:
    """How a weight is held.

    Attributes:
        element: OpenVINO's type of the constant: ``u2``, ``u4``, ``u8``, ``i4`` or ``i8``.
        holds: what the integers are: ``levels`` of the grid, less the zero point, or ``codes`` into a table of them.
        zero_point: z, in units of the constant.
        step: levels that one unit of the constant is worth: 2 for the odd levels of a mid-rise grid.
        note: why it is unpacked to float32 at load; empty where it stays packed in memory.
    """

    element: str
    holds: Literal["levels", "codes"]
    zero_point: float
    step: int
    note: str

    @property
    def bits(self) -> int:
        """Bits a weight in the file."""
        return int(self.element[1:])

    @property
    def packed(self) -> bool:
        """Whether it stays packed in memory."""
        return not self.note

    def padding(self, columns: int) -> int:
        """Columns to add to a packed matrix so that every row fills whole bytes.

        Example:
            >>> Container("u2", "levels", 1, 1, "").padding(1250)
            2
        """
        return -columns % (8 // self.bits) if self.packed else 0


def choose(weight: QuantizedWeight, preset: Preset, *, linear: bool) -> Container:
    """The smallest constant that holds a weight exactly, and that the preset's kernel takes.

    Args:
        weight: on any grid.
        preset: the kernel of ``"fast"`` wants zero points that are integers; without it computes in float32.
        linear: whether it is the second factor of MatMuls alone.
    """
    grid, levels = weight.grid, len(weight.grid.levels)
    if grid.two_scales:
        return Container("u2", "codes", 1, 1, "two scales")
    if levels <= 3:
        found = Container("u2", "levels", 1, 1, "")  # {-1, 0, 1} + 1
    elif not grid.has_zero and (grid.bits == 8 or (grid.bits in (2, 4) and preset == "exact")):
        found = Container(f"u{grid.bits}", "levels", (levels - 1) / 2, 2, "")  # odd levels, as 2 (q - z)
    elif grid.largest <= 127:
        found = Container("i4" if grid.largest <= 7 else "i8", "levels", 0, 1, "")
    else:
        note = f"levels up to {grid.largest:g}, no 8-bit integers"
        return Container("u4" if levels <= 16 else "u8", "codes", 0, 1, note)
    if not linear:
        return replace(found, note="no Linear layer")
    size = _group(weight)
    if size is not None:
        if size & (size - 1):
            return replace(found, note="groups of another size than 1, 2, 4, 8, ..")
        if found.padding(weight.shape[1]):
            return replace(found, note="groups, and rows that fill no whole bytes")
    return found


def dequantized(weight: QuantizedWeight, container: Container) -> ov.Output:
    """The weight as a graph: float32, exactly ``scale * level``, with columns to fill whole bytes where it is packed. Its
    last node carries the weight's name.
    """
    levels = weight.grid.levels.numpy()
    shape, scale = _rows(weight)
    codes = weight.codes.numpy().reshape(shape)
    if container.holds == "levels":
        units = levels[codes] / container.step + container.zero_point
        if container.packed:
            units = np.pad(units, [(0, 0), (0, container.padding(weight.shape[1]))] + [(0, 0)] * (len(shape) - 2))
        values = op.convert(_constant(units, container.element), "f32")
        if container.zero_point:
            values = op.subtract(values, _zero_point(container, len(shape)))
        values = op.multiply(values, op.constant(scale[0] * np.float32(container.step)))
    elif weight.grid.two_scales:
        negative, positive = scale
        sign = op.subtract(op.convert(_constant(codes, container.element), "f32"), _zero_point(container, len(shape)))
        upper, lower = op.relu(sign), op.relu(op.negative(sign))
        values = op.subtract(op.multiply(upper, op.constant(positive)), op.multiply(lower, op.constant(negative)))
    else:
        indices = op.convert(_constant(codes, container.element), "i32")
        values = op.gather(op.constant(levels), indices, op.constant(np.int32(0)))
        values = op.multiply(values, op.constant(scale[0]))
    if shape != tuple(weight.shape):
        values = op.reshape(values, op.constant(np.array(weight.shape, np.int64)), special_zero=False)
    values.set_friendly_name(weight.name)
    return values.output(0)


def _rows(weight: QuantizedWeight) -> tuple[tuple[int, ...], list[NDArray[np.float32]]]:
    """The shape in which rows that share a scale lie along whole axes, and the scales, to broadcast against it."""
    shape = tuple(weight.shape)
    scales = weight.scale.numpy().astype(np.float32).T
    size = _group(weight)
    if weight.granularity == "tensor":
        lead: tuple[int, ...] = (1,) * len(shape)
    elif size is None:
        lead = (*shape[:1], *(1,) * (len(shape) - 1))
    else:
        groups = weight.codes.numel() // (size * (shape[0] if len(shape) > 1 else 1))
        shape = (*shape[: len(shape) > 1], groups, size)
        lead = (*shape[:-1], 1)
    return shape, [row.reshape(lead) for row in scales]


def _group(weight: QuantizedWeight) -> int | None:
    """Entries that share a scale, where they are less than a channel."""
    size = weight.granularity
    return size if isinstance(size, int) and len(weight.scale) != weight.shape[0] else None


def _zero_point(container: Container, dimensions: int) -> Any:
    """An integer one has the constant's type: what the kernel with 8-bit activations asks for."""
    value = np.full((1,) * dimensions, container.zero_point, np.float32)
    if container.zero_point % 1:
        return op.constant(value)
    return op.convert(_constant(value, container.element), "f32")


def _constant(values: NDArray[Any], element: str) -> Any:
    """Integers as a constant of 2, 4 or 8 bits, the first in the lowest bits of a byte."""
    units = torch.from_numpy(values.astype(np.int16).astype(np.uint8) & np.uint8(2 ** int(element[1:]) - 1))
    tensor = ov.Tensor(getattr(ov.Type, element), ov.Shape(list(values.shape)))
    tensor.data.reshape(-1).view(np.uint8)[:] = pack(units, f"bits{element[1:]}").numpy()
    return ov.op.Constant(tensor)
