"""Bit packing: codes, one to a byte, to as few bytes as they need, and back. Plain torch, on the CPU.

``bits1`` .. ``bits8``  a stream of m-bit numbers: code i takes bits ``i m`` to ``i m + m - 1``, and bit k of the stream is
                        bit ``k % 8`` of byte ``k // 8``, the lowest first
``trits``               five base-3 digits to a byte, ``t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4``: 1.6 bits a weight

What is left of the last byte is zero.
"""

import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from blaq.grids import MAX_BITS, Grid

CONTAINERS = (*(f"bits{m}" for m in range(1, MAX_BITS + 1)), "trits")
TRITS = 5  # in a byte
TRIT_VALUES = 3**TRITS

_CHUNK = 5 * 2**16  # codes at a time, so that what is worked on stays in the cache; divisible by every group of codes


def container_of(grid: Grid) -> str:
    """The container of a grid's codes.

    Example:
        >>> container_of(Grid.parse("ternary")), container_of(Grid.parse("linear3"))
        ('trits', 'bits3')
    """
    return "trits" if len(grid.levels) == 3 else f"bits{grid.bits}"


def packed_size(count: int, container: str) -> int:
    """Bytes that this many codes take.

    Example:
        >>> packed_size(100, "bits3"), packed_size(100, "trits")
        (38, 20)
    """
    return -(-count // TRITS) if container == "trits" else -(-count * _bits(container) // 8)


def pack(codes: Tensor, container: str) -> Tensor:
    """Pack codes in the order of their memory.

    Args:
        codes: uint8 of any shape, each below ``2^m``, or below 3 for ``trits``.
        container: a name of `CONTAINERS`.

    Returns:
        uint8 of shape ``(packed_size(codes.numel(), container),)``.

    Raises:
        ValueError: another dtype, a code that does not fit, an unknown container.

    Example:
        >>> pack(torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8), "bits1").item() == 0b11001
        True
    """
    bits = _bits(container)
    if codes.dtype != torch.uint8:
        raise ValueError(f"pack(codes={codes.dtype}): expected uint8, indices into the levels of a grid.")
    limit = 3 if container == "trits" else 2**bits
    if codes.numel() and limit < 256 and int(codes.max()) >= limit:
        raise ValueError(f"pack(codes): found {int(codes.max())}, expected codes below {limit} for {container!r}.")
    flat = codes.reshape(-1)
    if bits == MAX_BITS:
        return flat.clone()
    group, size = _group(container)
    packed = torch.empty(-(-len(flat) // group), size, dtype=torch.uint8)
    for rows, chunk in _chunks(packed, _CHUNK // group, flat, _CHUNK):
        whole = pad(chunk, (0, -len(chunk) % group)).view(-1, group)
        if container == "trits":
            _pack_trits(whole, out=rows)
        else:
            rows.copy_(_gathered(whole.contiguous(), bits)[:, :size])
    return packed.view(-1)[: packed_size(len(flat), container)]


def unpack(packed: Tensor, container: str, count: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8, one-dimensional.
        container: a name of `CONTAINERS`.
        count: the number of codes.

    Returns:
        uint8 of shape ``(count,)``.

    Raises:
        ValueError: another dtype or length than those of `count` codes, a byte that holds no five trits, bits after the last
            code, an unknown container.

    Example:
        >>> unpack(torch.tensor([0b11001], dtype=torch.uint8), "bits1", 5)
        tensor([1, 0, 0, 1, 1], dtype=torch.uint8)
    """
    bits, expected = _bits(container), packed_size(count, container)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"unpack(packed={packed.dtype} {tuple(packed.shape)}): expected uint8 ({expected},), {count} codes in "
            f"{container!r}."
        )
    if bits == MAX_BITS:
        return packed.clone()
    if container == "trits" and len(packed) and int(packed.max()) >= TRIT_VALUES:
        raise ValueError(f"unpack(packed): found byte {int(packed.max())}, five trits are at most {TRIT_VALUES - 1}.")
    group, size = _group(container)
    codes = torch.empty(-(-count // group), group, dtype=torch.uint8)
    for rows, chunk in _chunks(codes, _CHUNK // group, packed, _CHUNK // group * size):
        whole = pad(chunk, (0, -len(chunk) % size)).view(-1, size)
        if container == "trits":
            torch.index_select(_digits(), 0, whole.view(-1).int(), out=rows)
        else:
            rows.copy_(_scattered(pad(whole, (0, group - size)), bits))
    codes = codes.view(-1)
    if codes[count:].any():
        raise ValueError(f"unpack(packed): found bits after the last of {count} codes, expected zeros.")
    return codes[:count]


def _bits(container: str) -> int:
    if container not in CONTAINERS:
        raise ValueError(f"packing(container={container!r}): expected one of {', '.join(CONTAINERS)}.")
    return 2 if container == "trits" else int(container.removeprefix("bits"))


def _group(container: str) -> tuple[int, int]:
    """The fewest codes, a power of two of them, that fill whole bytes; and the bytes."""
    if container == "trits":
        return TRITS, 1
    bits = _bits(container)
    codes = {1: 8, 2: 4, 4: 2}.get(bits & -bits, 8)
    return codes, codes * bits // 8


def _chunks(rows: Tensor, count: int, flat: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Side by side, `count` rows and the `length` entries that belong to them."""
    for index in range(-(-len(rows) // count)):
        yield rows[index * count : (index + 1) * count], flat[index * length : (index + 1) * length]


def _pack_trits(digits: Tensor, out: Tensor) -> None:
    """Horner's rule, in place: (n, 5) to (n, 1)."""
    value = out[:, 0]
    value.copy_(digits[:, TRITS - 1])
    for i in reversed(range(TRITS - 1)):
        value.mul_(3).add_(digits[:, i])


@functools.cache
def _digits() -> Tensor:
    """The trits of every byte: (243, 5)."""
    values = torch.arange(TRIT_VALUES).unsqueeze(1)
    return (values // 3 ** torch.arange(TRITS) % 3).to(torch.uint8)


def _gathered(codes: Tensor, bits: int) -> Tensor:
    """Move m-bit codes of one byte each together at the low end of their group: (n, group), in place.

    A group is one machine word. Each round halves the number of lanes: the upper of two moves down to the lower.
    """
    group = codes.shape[1]
    words = codes.view(_word(group))
    for lane, width, even in _rounds(group, bits):
        upper = (words >> (lane - width)).bitwise_and_(even << width)
        words.bitwise_and_(even).bitwise_or_(upper)
    return codes


def _scattered(packed: Tensor, bits: int) -> Tensor:
    """Undo `_gathered`: (n, group), in place."""
    group = packed.shape[1]
    words = packed.view(_word(group))
    for lane, width, even in reversed(_rounds(group, bits)):
        upper = (words << (lane - width)).bitwise_and_(even << lane)
        words.bitwise_and_(even).bitwise_or_(upper)
    return packed


@functools.cache
def _rounds(group: int, bits: int) -> list[tuple[int, int, int]]:
    """Of each round: bits a lane, bits of it in use, and the mask of those in the even lanes."""
    rounds = []
    lane, width = 8, bits
    while lane < 8 * group:
        even = sum(((1 << width) - 1) << start for start in range(0, 8 * group, 2 * lane))
        rounds.append((lane, width, even))
        lane, width = 2 * lane, 2 * width
    return rounds


def _word(group: int) -> torch.dtype:
    """The integer of as many bytes as a group has codes, whose first byte is its lowest."""
    if sys.byteorder != "little":
        raise ValueError("packing: works on little-endian machines only; pack and unpack on another.")
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[group]
