"""How quantized weights lie in an ONNX file: digits packed into bytes, and the tables that take them apart again.

A byte holds as many whole codes as fit: 8 of ``binary``, 5 of ``ternary``, 4 of four levels, 2 of up to sixteen, else 1. A
table with a row for every byte says what these codes stand for, so ``Gather(table, bytes)`` unpacks every grid with
operators of the oldest opsets. Bit shifts and the 2-bit types are left alone: runtimes get both wrong in places.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blaq.export.layers import QuantizedWeight
from blaq.export.packing import TRITS, pack, unpack
from blaq.grids import Grid

__all__ = ["PRESETS", "Blocks", "Container", "blocks", "choose", "compute_bits", "packed", "storage", "table"]

FORMAT_VERSION = 1  # of the description that a file holds
Preset = Literal["exact", "fast"]
PRESETS: tuple[Preset, ...] = ("exact", "fast")
# Of a container: how many codes there are, and how many a byte holds.
CODES_IN_A_BYTE = {"bits1": (2, 8), "trits": (3, TRITS), "bits2": (4, 4), "bits4": (16, 2), "bits8": (256, 1)}
BLOCKS = (32, 64, 128)  # columns that share a scale in MatMulNBits, of the sizes that are fast
SMALLEST_GROUP = 16


def storage(levels: int, *, whole_bits: bool = False) -> str:
    """The densest container of `blaq.export.packing` whose codes do not cross bytes, for codes below ``levels``.

    With ``whole_bits`` the densest that gives each code a whole number of bits.

    Example:
        >>> storage(3), storage(7)
        ('trits', 'bits4')
    """
    if levels == 3 and not whole_bits:
        return "trits"
    return next(f"bits{bits}" for bits in (1, 2, 4, 8) if levels <= 2**bits)


def packed(codes: NDArray[np.uint8], container: str) -> NDArray[np.uint8]:
    """Codes of any shape as bytes, in the order of the elements."""
    stored: NDArray[np.uint8] = pack(torch.from_numpy(np.ascontiguousarray(codes)), container).numpy()
    return stored


def table(values: NDArray[Any], container: str) -> NDArray[Any]:
    """What the codes of every possible byte stand for: ``values[code]``, shape (bytes, codes a byte).

    Example:
        >>> table(np.array([-1.0, 0.0, 1.0]), "trits")[1 + 2 * 3]
        array([ 0.,  1., -1., -1., -1.])
    """
    base, count = CODES_IN_A_BYTE[container]
    size = base**count
    digits = unpack(torch.arange(size, dtype=torch.uint8), container, size * count).view(size, count).numpy()
    padded = np.concatenate([values, np.zeros(base - len(values), values.dtype)])  # for codes that the grid lacks
    rows: NDArray[Any] = padded[digits]
    return rows


def compute_bits(grid: Grid, preset: Preset) -> int | None:
    """The bits a weight of this grid has inside MatMulNBits, or None where it cannot be held, or only slowly.

    The operator takes ``scale * (q - 2^(bits - 1))`` with q of 2, 4 or 8 bits. In float32 arithmetic only 4 bits are fast
    (8 bits are ten times slower than float32), with 8-bit activations all three are.
    """
    if grid.two_scales:
        return None
    levels = grid.levels
    for bits in (2, 4, 8) if preset == "fast" else (4,):
        if levels.min() >= -(2 ** (bits - 1)) and levels.max() < 2 ** (bits - 1):
            return bits
    return None


class Blocks(NamedTuple):
    """Scales as MatMulNBits has them: ``size`` consecutive columns share one; (1, 1), (N, 1) or (N, blocks) float32."""

    size: int
    scale: NDArray[np.float32]


def blocks(weight: QuantizedWeight, *, transposed: bool) -> Blocks | None:
    """The scales of a matrix (N, K), transposed (K, N), in blocks of columns; None where they do not come in such blocks."""
    scale = weight.scale.numpy()
    N, K = reversed(weight.shape) if transposed else weight.shape
    size = next((size for size in BLOCKS if size >= K), BLOCKS[-1])
    if len(scale) == 1 or (len(scale) == N and not transposed):
        return Blocks(size, scale)
    group = N * K // len(scale)
    if transposed or group < SMALLEST_GROUP or group & (group - 1):
        return None
    size = min(group, BLOCKS[-1])
    return Blocks(size, np.repeat(scale.reshape(N, -1), group // size, axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How a quantized weight is held in a file.

    Attributes:
        weight: codes and scales.
        value: its name in the graph, one of its names in the model.
        kind: ``matmulnbits2``, ``matmulnbits4``, ``matmulnbits8``: stays packed in memory; ``unpacked``: float32 at load.
        note: why it is unpacked.
        bits: what a weight takes on disk, scales included.
        transposed: the operator multiplies with the transpose of the parameter.
        output: the value of the graph that equals what the layer's module returns; None where there is no single one.
    """

    weight: QuantizedWeight
    value: str
    kind: str
    note: str
    bits: float
    transposed: bool = False
    output: str | None = None

    def description(self) -> dict[str, Any]:
        """What the file says of it."""
        return {
            "grid": self.weight.grid.name,
            "granularity": self.weight.granularity,
            "shape": list(self.weight.shape),
            "container": self.kind,
            "value": self.value,
            "transposed": self.transposed,
            "output": self.output,
            "bits": round(self.bits, 3),
            "note": self.note,
        }


def choose(weight: QuantizedWeight, preset: Preset, orientations: set[bool] | None) -> tuple[int | None, str]:
    """The bits inside MatMulNBits, or None and why the weight is unpacked at load.

    Args:
        weight: codes and scales.
        preset: decides which bits are fast.
        orientations: for every matrix product that takes the weight whether it takes it transposed; None where others
            than matrix products take it.
    """
    if orientations is None or len(weight.shape) != 2:  # a product of many matrices takes them all at once
        return None, "no linear layer"
    bits = compute_bits(weight.grid, preset)
    if bits is None:
        if weight.grid.two_scales:
            return None, "two scales"
        wide = "float32 products hold 4 bits" if preset == "exact" else "no 8-bit integers"
        return None, f"levels up to {weight.grid.largest:g}: {wide}"
    if any(blocks(weight, transposed=transposed) is None for transposed in orientations):
        return None, f"scales not in blocks of {SMALLEST_GROUP}, 32, .. columns"
    return bits, ""
