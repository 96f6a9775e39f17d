"""The losses the networks are trained with.

Classes lie in the last dimension of the logits, so (N, C) and (N, T, C) need no case of their own.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "cross_entropy", "squared_hinge"]


def squared_hinge(logits: Tensor, targets: Tensor) -> Tensor:
    """L2-SVM loss, one against all.

        mean over samples and classes of max(0, 1 - t y)^2,   t = +1 for the target class, -1 for the others

    The gradient is -2 t max(0, 1 - t y) / (number of logits). Half-precision logits are evaluated in float32.

    Args:
        logits: (..., C), floating point.
        targets: (...), int64 in 0..C-1.

    Returns:
        A scalar.

    Raises:
        ValueError: targets do not have the shape of logits without its last dimension.

    >>> import torch
    >>> squared_hinge(torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([0]))  # (0 + 0 + 1) / 3
    tensor(0.3333)

    Source: Tang, "Deep Learning using Linear Support Vector Machines", 2013, equation 7. Mean over classes and
    samples as in the published code of BinaryConnect (Courbariaux et al., 2015) and LAB (Hou et al., 2017).
    """
    _check_shapes("squared_hinge", logits, targets)
    signs = 2.0 * F.one_hot(targets, logits.shape[-1]) - 1.0
    return (1.0 - signs * logits).clamp_min(0.0).square().mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy in nats.

        mean over samples (and positions) of log(sum_c exp y_c) - y_t

    Args:
        logits: (..., C), floating point: (N, C) for images, (N, T, C) for text.
        targets: (...), int64 in 0..C-1.

    Returns:
        A scalar.

    Raises:
        ValueError: targets do not have the shape of logits without its last dimension.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64))  # log 8
    tensor(2.0794)
    """
    _check_shapes("cross_entropy", logits, targets)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _check_shapes(owner: str, logits: Tensor, targets: Tensor) -> None:
    # Broadcasting would accept (N, T, C) logits with (T,) targets and return a number that means nothing.
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"{owner}(targets of shape {tuple(targets.shape)}): expected {tuple(logits.shape[:-1])}, "
            f"the shape of the logits {tuple(logits.shape)} without the classes in the last dimension."
        )


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared_hinge": squared_hinge,
    "cross_entropy": cross_entropy,
}
"""Loss by the name a recipe uses; each takes logits (..., C) and targets (...) and returns a scalar."""
