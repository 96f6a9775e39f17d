"""What may enter a step: gradients and latent weights that are finite, and whose squares are."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_LARGE = 2**14  # entries from which a call for a tensor of its own pays back


class Brought(NamedTuple):
    """What a parameter brings into a step: itself, its gradient, and its latent weight where it has one, or what is finite
    if that is.
    """

    p: Tensor
    grad: Tensor
    latent: Tensor | None


def refuse_sparse(owner: str, entries: list[Brought], name: Callable[[Tensor], str]) -> None:
    """Refuse sparse gradients, by name."""
    for entry in entries:
        if entry.grad.is_sparse:
            raise ValueError(f"{owner}: '{name(entry.p)}' has a sparse gradient; use sparse=False in its layer.")


def refuse_float16(owner: str, entries: list[Brought], name: Callable[[Tensor], str]) -> None:
    """Refuse to unscale gradients in float16, by name: those that scaling has saved would be lost."""
    for entry in entries:
        if entry.grad.dtype == torch.float16:
            raise ValueError(
                f"{owner}: a GradScaler cannot unscale the float16 gradient of '{name(entry.p)}' without losing small entries; "
                "keep parameters in float32 and compute under torch.autocast."
            )


def all_usable(owner: str, entries: list[Brought], name: Callable[[Tensor], str], *, scaled: bool) -> bool:
    """Whether a step may be made of them.

    Args:
        owner: for messages.
        entries: all that take part.
        name: finds the name of a parameter, for messages.
        scaled: a loss scaler is at work: it expects NaN and Inf, lowers its scale, and the step is skipped (False).
            A finite gradient that is too large to square it does not see; that is an error all the same.

    Raises:
        ValueError: a gradient or latent weight that is NaN, Inf or too large to square, by name.
    """
    if _all_small([t for entry in entries for t in entry[1:] if t is not None]):
        return True
    gradients = [(entry.p, entry.grad) for entry in entries]
    latents = [(entry.p, entry.latent) for entry in entries if entry.latent is not None]
    bad, latent = ([p for p, t in of if not _all_small([t])] for of in (gradients, latents))
    if bad and scaled and not all(entry.grad.isfinite().all() for entry in entries):
        return False
    for what, parameters in (("the gradient", bad), ("the latent weight", latent)):
        if parameters:
            names = ", ".join(repr(name(p)) for p in parameters)
            raise ValueError(
                f"{owner}: {what} of {names} is NaN, Inf or too large to square; nothing was changed. "
                "Lower the learning rate, clip the gradient in the closure, or look at the batch."
            )
    return True


def _all_small(tensors: list[Tensor]) -> bool:
    """Whether the squared norms of tensors are finite: the moment adds up squares. One synchronisation a device and dtype."""
    alike: dict[tuple[bool | torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.is_cpu or t.device, t.dtype), []).append(t)  # to ask for a device makes one
    return all(_all_small_alike(some, dtype) for (_, dtype), some in alike.items())


def _all_small_alike(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    wide = torch.promote_types(dtype, torch.float32)
    few, flat, others = [], [], []
    for t in tensors:
        if t.numel() <= _LARGE:
            few.append(t if t.ndim == 1 else t.reshape(-1))
        elif dtype == wide and t.is_contiguous():
            flat.append(t.view(-1))
        else:
            others.append(t)
    if few:  # many as one
        joined = torch.cat(few) if len(few) > 1 else few[0]
        flat.append(joined if dtype == wide else joined.to(wide))
    squares = [torch.dot(t, t) for t in flat]  # on several threads
    if others:
        squares += torch._foreach_pow(torch._foreach_norm(others, 2, wide if dtype != wide else None), 2)
    # Their sum tells in one number; should it overflow by itself, the caller looks at one tensor after the other.
    on_cpu = squares[0].device.type == "cpu"  # which has nothing to wait for
    return math.isfinite(sum(map(float, squares)) if on_cpu else float(torch.stack(squares).sum()))
