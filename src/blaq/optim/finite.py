"""What may enter a step: gradients and latent weights that are finite, and whose squares are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
    bad = _too_large([(entry.p, entry.grad) for entry in entries])
    if bad and scaled and not all(entry.grad.isfinite().all() for entry in entries):
        return False
    latent = _too_large([(entry.p, entry.latent) for entry in entries if entry.latent is not None])
    for what, parameters in (("the gradient", bad), ("the latent weight", latent)):
        if parameters:
            names = ", ".join(repr(name(p)) for p in parameters)
            raise ValueError(
                f"{owner}: {what} of {names} is NaN, Inf or too large to square; nothing was changed. "
                "Lower the learning rate, clip the gradient in the closure, or look at the batch."
            )
    return True


def _too_large(tensors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The parameters of tensors whose norm, squared, is not finite: the moment adds up squares. One synchronisation."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for _, t in tensors]
    finite = [square.isfinite() for square in torch._foreach_mul(norms, norms)] if norms else []
    if not finite or bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
        return []
    return [p for (p, _), good in zip(tensors, finite, strict=True) if not good]
