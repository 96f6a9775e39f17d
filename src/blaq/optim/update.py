"""The update of LAQ and BLAQ, on plain tensors. The notation is that of the papers.

Adam's arithmetic, operation by operation as in torch, so that a parameter without a grid follows `torch.optim.Adam`
bit for bit. Shapes are those of the parameter; ``t`` counts steps from 1; ``group`` holds the options.

    w       latent (full-precision) weight      g       gradient at the current point
    m, v    first and second moment             g_trial gradient at the trial point
    d       curvature, sqrt(v_hat) + eps        a       weight of g; 1 - a is that of g_trial
"""

from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


def advance(m: Tensor, v: Tensor, g: Tensor, group: Group) -> None:
    """Advance both moments with a gradient, in place."""
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)


def curvature(v: Tensor, t: int, group: Group) -> Tensor:
    """d = sqrt(v_hat) + eps with Adam's bias correction; 1 before the first gradient."""
    if t == 0:
        return torch.ones_like(v)
    correction: float = (1 - group["betas"][1] ** t) ** 0.5
    return v.sqrt().div_(correction).add_(group["eps"])


def descend(w: Tensor, m: Tensor, d: Tensor, t: int, group: Group) -> None:
    """w <- w - lr m_hat / d with decoupled weight decay, and a clip of quantized weights to [-c, c], in place."""
    lr = float(group["lr"])
    if group["weight_decay"] != 0:
        w.mul_(1 - lr * group["weight_decay"])
    w.addcdiv_(m, d, value=-(lr / (1 - group["betas"][0] ** t)))
    if group["clip"] is not None and group["grid"] is not None:
        w.clamp_(-group["clip"], group["clip"])


def laq(w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, group: Group) -> Tensor:
    """One gradient: the step of LAQ, in place. Returns d, the metric of the projection that follows."""
    advance(m, v, g, group)
    d = curvature(v, t, group)
    descend(w, m, d, t, group)
    return d


def forward(w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, group: Group) -> tuple[Tensor, Tensor]:
    """One step forward, nothing kept: the trial point w* and the curvature d_t to project it with."""
    w_trial = w.clone()
    d = laq(w_trial, m.clone(), v.clone(), g, t, group)
    return w_trial, d


def backtrack(w: Tensor, m: Tensor, v: Tensor, g: Tensor, g_trial: Tensor, t: int, group: Group) -> Tensor:
    """Back at w, move with the blend of both gradients, in place. Returns d', the metric of the projection.

    With a = 1 this is `laq` bit for bit: ``lerp`` of weight 1 is its end.
    """
    a, (beta1, beta2) = group["a"], group["betas"]
    v_trial = (v * beta2).addcmul_(g_trial, g_trial, value=1 - beta2)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    d = torch.lerp(curvature(v_trial, t, group), curvature(v, t, group), a)
    m.lerp_(torch.lerp(g_trial, g, a), 1 - beta1)
    v.copy_(torch.lerp(v_trial, v, a))
    descend(w, m, d, t, group)
    return d
