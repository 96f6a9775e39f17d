"""Lengths and angles of vectors, layer by layer: one pass over a pair of tensors, compiled where steps are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blaq.optim import compiled
from blaq.optim.held import is_dense
from blaq.optim.running import in_pieces
from blaq.projection import widen


class Products(NamedTuple):
    """Of pairs of vectors x and y, layer by layer, and last of all entries together: float64."""

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @staticmethod
    def of(layers: Sequence[Tensor]) -> "Products":
        """From those of every layer, (3,), on the device of the first."""
        return Products(*with_total(layers).unbind(1))

    @property
    def cosines(self) -> Tensor:
        """NaN for a zero vector."""
        return self.xy / (self.xx.sqrt() * self.yy.sqrt())

    @property
    def lengths(self) -> Tensor:
        """The Euclidean norms of x."""
        return self.xx.sqrt()


def products(x: Tensor, y: Tensor, codes: compiled.Codes | None = None) -> Tensor:
    """The dot products xx, xy and yy of two tensors of one shape: (3,). With `codes` compiled, where it can be.

    Squared in float32: a vector too short for that is zero.
    """

    def plain() -> Tensor:
        u, v = widen(x).flatten(), widen(y).flatten()
        return torch.stack(
            [torch.linalg.vector_norm(u).square(), torch.dot(u, v), torch.linalg.vector_norm(v).square()]
        )

    return _fast(_products, (x, y), plain, codes)


def moved(now: Tensor, start: Tensor, before: Tensor, codes: compiled.Codes | None = None) -> Tensor:
    """The `products` of a move, ``now - start``, and of the one before it, ``start - before``: (3,)."""

    def plain() -> Tensor:
        return products(widen(now) - widen(start), widen(start) - widen(before))

    return _fast(_moved, (now, start, before), plain, codes)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norms of tensors, and last that of all together: float64."""
    return with_total([torch.linalg.vector_norm(widen(x)).square() for x in tensors]).sqrt()


def with_total(values: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as the rows of one, and last their sum: float64, on the device of the first."""
    rows = torch.stack([value.to(values[0].device) for value in values]).double()
    return torch.cat([rows, rows.sum(0, keepdim=True)])


def _fast(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    plain: Callable[[], Tensor],
    codes: compiled.Codes | None,
) -> Tensor:
    first = tensors[0]
    alike = is_dense(first) and all(t.stride() == first.stride() for t in tensors)
    if codes is None or not compiled.usable() or not first.numel() or not alike:
        return plain()
    rows, columns = in_pieces((1, first.numel()))
    found: Tensor = compiled.call(
        function, [t.as_strided((rows, columns), (columns, 1)) for t in tensors], plain, known=codes
    )
    return found


def _products(x_PN: Tensor, y_PN: Tensor) -> Tensor:
    """Of pieces, whose sums are taken as they are; those of the whole in float64."""
    x, y = widen(x_PN), widen(y_PN)
    return torch.stack([(a * b).sum(1).sum(dtype=torch.float64) for a, b in ((x, x), (x, y), (y, y))])


def _moved(now_PN: Tensor, start_PN: Tensor, before_PN: Tensor) -> Tensor:
    now, start, before = widen(now_PN), widen(start_PN), widen(before_PN)
    return _products(now - start, start - before)
