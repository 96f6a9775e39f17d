"""Tensors, one a parameter, as one matrix: in their own memory where they lie side by side, else copied there and back."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from blaq.optim.running import Shape


class Rows:
    """Tensors, one a parameter, as one matrix: for a single one a view, and in any case views that are kept.

    Args:
        tensors: each of the shape of its parameter.
        likes: how the entries of each parameter lie in memory: densely, and row by row.
    """

    def __init__(self, tensors: Sequence[Tensor], likes: Sequence[Tensor]) -> None:
        self._tensors, self._likes = tensors, likes
        alike = all(t.stride() == like.stride() for t, like in zip(tensors, likes, strict=True))
        self._flat = [_flat(t.detach(), like) for t, like in zip(tensors, likes, strict=True)] if alike else None
        self._whole = _side_by_side(self._flat) if self._flat is not None else None
        self._views: dict[Shape, Tensor] = {}

    def view(self, shape: Shape) -> Tensor | None:
        """The matrix in their own memory, where there is one."""
        view = self._views.get(shape)
        if view is None and self._whole is not None:
            view = self._views[shape] = self._whole.view(shape)
        return view

    def move_together(self) -> None:
        """Move them into one memory, in which they are the matrix: the same tensors, and nothing to copy at every step."""
        if self._flat is None or self._whole is not None or not all(map(_can_move, self._tensors)):
            return
        if len({t.dtype for t in self._tensors}) > 1:  # `set_` does not look what is in the memory
            return
        whole = torch.cat(self._flat)
        parts = torch.split_with_sizes(whole, [t.numel() for t in self._flat])
        for t, part in zip(self._tensors, parts, strict=True):
            t.set_(whole.untyped_storage(), part.storage_offset(), t.shape, t.stride())

    def take(self, shape: Shape) -> Tensor:
        """The matrix."""
        view = self.view(shape)
        return matrix(self._flat or self._tensors, self._likes, shape) if view is None else view

    def put(self, matrix: Tensor) -> None:
        """Write a matrix back to where `take` had it from."""
        if self._whole is not None and matrix.data_ptr() == self._whole.data_ptr():
            return  # it has been changed in place
        if self._flat is None:
            starts = accumulate((like.numel() for like in self._likes), initial=0)
            places = zip(self._likes, starts, strict=False)
            torch._foreach_copy_(
                list(self._tensors), [matrix.as_strided(of.shape, of.stride(), at) for of, at in places]
            )
        else:
            sizes = [t.numel() for t in self._flat]
            torch._foreach_copy_(self._flat, torch.split_with_sizes(matrix.view(-1), sizes))


def _can_move(tensor: Tensor) -> bool:
    """Not a tensor of somebody's own class, nor one in memory that other processes see."""
    return type(tensor) is Tensor and not (tensor.is_cpu and tensor.untyped_storage().is_shared())


class Taken(NamedTuple):
    """Matrices, and where to write back those that are copies."""

    matrices: tuple[Tensor, ...]
    rows: tuple[Rows, ...] = ()

    def put(self) -> None:
        """Write them back."""
        for row, matrix in zip(self.rows, self.matrices, strict=False):  # none where all have been changed in place
            row.put(matrix)


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """The entries in the order in which those of `like` lie in memory: a view, if its own lie so."""
    tensor = _laid_out(tensor, like)
    return tensor if tensor.ndim == 1 else tensor.as_strided((tensor.numel(),), (1,))


def _side_by_side(flat: Sequence[Tensor]) -> Tensor | None:
    """Vectors as one, where each begins in memory where the last one ends."""
    first = flat[0]
    ends = list(accumulate((t.nbytes for t in flat), initial=first.data_ptr()))
    storages = {t.untyped_storage().data_ptr() for t in flat} if len(flat) > 1 else {0}
    if len(storages) > 1 or any(t.data_ptr() != begin for t, begin in zip(flat, ends, strict=False)):
        return None
    return first if len(flat) == 1 else first.as_strided((sum(t.numel() for t in flat),), (1,))


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def matrix(tensors: Sequence[Tensor], likes: Sequence[Tensor], shape: Shape) -> Tensor:
    """Tensors, or their entries in order, as one matrix: of a single one a view, if its entries lie so."""
    if len(tensors) == 1:
        tensor = tensors[0].contiguous() if tensors[0].ndim == 1 else _laid_out(tensors[0], likes[0])
        return tensor.as_strided(shape, (shape[1], 1))
    return torch.cat([t if t.ndim == 1 else _flat(t, like) for t, like in zip(tensors, likes, strict=True)]).view(shape)
