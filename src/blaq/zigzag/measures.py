"""The measures on plain tensors, and the gradient error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blaq.optim.blaq import BLAQ
from blaq.optim.options import parameter_name
from blaq.optim.trial import Snapshot
from blaq.zigzag.products import Products, norms, products

TOTAL = "total"  # the layer that stands for all


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What was measured of a layer; None where there was nothing to measure.

    Attributes:
        gradient_cosine: mean over the probes since the last reading, as all but the next two.
        path_efficiency: of the whole path since the probe was attached.
        oscillation_frequency: mean over the weights, at the last probe.
    """

    gradient_cosine: float | None
    zigzag_rate: float | None
    path_efficiency: float | None
    flip_rate: float | None
    oscillation_frequency: float | None
    gradient_error: float | None
    trial_agreement: float | None


def cosines(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """cos(a_i, b_i) of pairs of tensors, and last that of all entries together: float64 (pairs + 1,), NaN for a zero vector.

    Args:
        a: tensors of any shape.
        b: as many, of the same shapes.

    Example:
        >>> east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> cosines([east, east], [east, north])
        tensor([1.0000, 0.0000, 0.5000], dtype=torch.float64)
    """
    return Products.of([products(x, y) for x, y in zip(a, b, strict=True)]).cosines


@torch.no_grad()
def gradient_error(opt: BLAQ, closure: Callable[[], Any]) -> dict[str, Tensor]:
    """norm(G - g) / norm(g) of every quantized parameter by name, and of all together as "total".

    G is the gradient at the quantized weights, those of `BLAQ.eval`, and g that at the latent weights. Two evaluations, with
    the same random state; afterwards parameters, gradients, buffers, random state and optimizer are as before, bit for bit.

    Args:
        opt: the optimizer, outside a step.
        closure: as for `BLAQ.step`: clears the gradients, runs forward and backward on a mini-batch.

    Returns:
        0-d tensors, float64; NaN where a layer has no gradient.

    Raises:
        ValueError: nothing is quantized; a step is under way.

    Example:
        >>> import blaq
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, -1.0]]))
        >>> opt = blaq.LAQ([{"params": [w], "param_names": ["w"], "grid": "binary"}])
        >>> gradient_error(opt, lambda: (w**2).sum().backward())["w"]  # G = 2 (2, -2), g = 2 (3, -1)
        tensor(0.4472, dtype=torch.float64)
    """
    quantized = {
        parameter_name(group, index, position): p
        for index, group in enumerate(opt.param_groups)
        for position, p in enumerate(group["params"])
        if group["grid"] is not None
    }
    if not quantized:
        raise ValueError("gradient_error: no parameter is quantized, so there is no error.")
    if opt.in_trial:
        raise ValueError("gradient_error: a step is under way at its trial point; call it between steps.")
    everything = [p for group in opt.param_groups for p in group["params"]]
    everything += [p for p in opt.module.parameters() if p.requires_grad] if opt.module is not None else []
    gradients = [(p, p.grad) for p in everything]
    before = Snapshot.take(opt.module, {p.device for p in everything})
    evaluating = opt.param_groups[0]["evaluating"]
    opt.eval()
    held = {p: p.clone() for p in quantized.values()}

    def evaluate() -> list[Tensor]:
        for p in everything:
            p.grad = None
        torch.clear_autocast_cache()  # it holds casts of other weights
        before.restore()
        with torch.enable_grad():
            closure()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in quantized.values()]

    try:
        at_held = evaluate()
        for p in held:
            p.copy_(opt.latent(p))
        at_latent = evaluate()
    finally:
        for p, values in held.items():
            p.copy_(values)
        if not evaluating:
            opt.train()
        torch.clear_autocast_cache()
        before.restore()
        for p, grad in gradients:
            p.grad = grad
    errors = norms([a.double() - b.double() for a, b in zip(at_held, at_latent, strict=True)]) / norms(at_latent)
    return dict(zip([*quantized, TOTAL], errors.where(errors.isfinite(), torch.nan).unbind(), strict=True))
