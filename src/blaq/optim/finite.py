"""What may enter a step: gradients and latent weights that are finite, and whose squares are."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGE = 2**14  # entries from which a call for a tensor of its own pays back


@dataclass(slots=True)
class Entry:
    """What a parameter brings into a step: itself, its gradient, and its latent weight where it has one, or what is finite
    if that is.
    """

    p: Tensor
    grad: Tensor
    latent: Tensor | None


def refuse_sparse(owner: str, entries: list[Entry], name: Callable[[Tensor], str]) -> None:
    """Refuse sparse gradients, by name."""
    for entry in entries:
        if entry.grad.is_sparse:
            raise ValueError(f"{owner}: '{name(entry.p)}' has a sparse gradient; use sparse=False in its layer.")


def all_usable(owner: str, entries: list[Entry], name: Callable[[Tensor], str], *, scaled: bool) -> bool:
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
    gradients = [(entry.p, entry.grad) for entry in entries]
    latents = [(entry.p, entry.latent) for entry in entries if entry.latent is not None]
    if _all_small([t for _, t in gradients + latents]):
        return True
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
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.device, t.dtype), []).append(t)
    return all(_all_small_alike(some, dtype) for (_, dtype), some in alike.items())


def _all_small_alike(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    wide = torch.promote_types(dtype, torch.float32)
    large = [t for t in tensors if t.numel() > _LARGE and dtype == wide and t.is_contiguous()]
    small = [t for t in tensors if t.numel() <= _LARGE or dtype != wide or not t.is_contiguous()]
    squares = [torch.dot(t.view(-1), t.view(-1)) for t in large]  # on several threads
    lengths = torch._foreach_norm(small, 2, wide if dtype != wide else None) if small else ()
    found = torch.stack([*squares, *(torch._foreach_mul(lengths, lengths) if small else ())])
    # Their sum tells in one number; should it overflow by itself, the caller looks at one tensor after the other.
    return math.isfinite(float(found.sum()))
