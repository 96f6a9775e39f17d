"""The update of LAQ and BLAQ, on plain tensors. The notation is that of the papers.

Adam's arithmetic, operation by operation as in torch, so that a parameter without a grid follows `torch.optim.Adam`
bit for bit, where it is not compiled. Tensors have one shape, any; ``r`` holds what the formulas need of a group's options in
step t.

    w       latent (full-precision) weight      g       gradient at the current point
    m, v    first and second moment             g_trial gradient at the trial point
    d       curvature, sqrt(v_hat) + eps        a       weight of g; 1 - a is that of g_trial
"""

import functools
from typing import Any, NamedTuple

from torch import Tensor

Group = dict[str, Any]
Number = float | Tensor  # a tensor of no dimension in compiled code, which would be compiled anew for every other float


class Rates(NamedTuple):
    """The numbers of one step."""

    follow1: Number
    """1 - beta1."""
    beta2: Number
    follow2: Number
    """1 - beta2."""
    correction: Number
    """sqrt(1 - beta2^t): v_hat is v over its square."""
    inverse: Number
    """1 / correction: compiled code multiplies by it, where torch's Adam divides, which takes longer."""
    eps: Number
    move: Number
    """-lr / (1 - beta1^t)."""
    a: Number
    decay: Number | None
    """1 - lr weight_decay; None without weight decay."""
    clip: Number | None
    """Bound of the latent weights; None without, and for parameters without a grid."""
    near: bool
    """Whether beta1 > 1/2: torch's `lerp` counts from the end that is nearer."""

    @staticmethod
    def of(group: Group, t: int) -> "Rates":
        """Those of step t, counted from 1, of the parameters of a group."""
        clip = group["clip"] if group["grid"] is not None else None
        return _rates(float(group["lr"]), *group["betas"], group["eps"], group["a"], group["weight_decay"], clip, t)


@functools.lru_cache(maxsize=16)
def _rates(
    lr: float, beta1: float, beta2: float, eps: float, a: float, weight_decay: float, clip: float | None, t: int
) -> Rates:
    correction = (1 - beta2**t) ** 0.5
    return Rates(
        follow1=1 - beta1,
        beta2=beta2,
        follow2=1 - beta2,
        correction=correction,
        inverse=1 / correction,
        eps=eps,
        move=-(lr / (1 - beta1**t)),
        a=a,
        decay=1 - lr * weight_decay if weight_decay != 0 else None,
        clip=clip,
        near=1 - beta1 < 0.5,
    )


def advance(m: Tensor, v: Tensor, g: Tensor, r: Rates) -> None:
    """Advance both moments with a gradient, of any dtype, in place."""
    g = g.to(m.dtype)
    _follow(m, g, r)
    _add_product(v.mul_(r.beta2), g, g, r.follow2)


def curvature(v: Tensor, r: Rates) -> Tensor:
    """d = sqrt(v_hat) + eps with Adam's bias correction."""
    return _metric(v.sqrt(), r)


def descend(w: Tensor, m: Tensor, d: Tensor, r: Rates) -> None:
    """w <- w - lr m_hat / d with decoupled weight decay, and a clip of quantized weights to [-c, c], in place."""
    if r.decay is not None:
        w.mul_(r.decay)
    if isinstance(r.move, Tensor):
        w.addcdiv_(m * r.move, d)
    else:
        w.addcdiv_(m, d, value=r.move)
    if r.clip is not None:
        w.clamp_(-r.clip, r.clip)  # type: ignore[arg-type]  # two numbers, or two tensors


def laq(w: Tensor, m: Tensor, v: Tensor, g: Tensor, r: Rates) -> Tensor:
    """One gradient: the step of LAQ, in place. Returns d, the metric of the projection that follows."""
    advance(m, v, g, r)
    d = curvature(v, r)
    descend(w, m, d, r)
    return d


def forward(w: Tensor, m: Tensor, v: Tensor, g: Tensor, r: Rates) -> tuple[Tensor, Tensor]:
    """One step forward, nothing kept: the trial point w* and the curvature d_t to project it with."""
    w_trial = w.clone()
    d = laq(w_trial, m.clone(), v.clone(), g, r)
    return w_trial, d


def backtrack(w: Tensor, m: Tensor, v: Tensor, g: Tensor, g_trial: Tensor, r: Rates) -> Tensor:
    """Back at w, move with the blend of both gradients, in place. Returns d', the metric of the projection.

    With a = 1 this is `laq` bit for bit. Both roots are blended before the bias correction, which is the same for both:
    d' = a d + (1 - a) d* with one division.
    """
    g, g_trial = g.to(m.dtype), g_trial.to(m.dtype)
    v_trial = _add_product(v * r.beta2, g_trial, g_trial, r.follow2)
    _add_product(v.mul_(r.beta2), g, g, r.follow2)
    d = _metric(_blend(v_trial.sqrt(), v.sqrt(), r.a), r)
    _follow(m, _blend(g_trial.clone(), g, r.a), r)
    v.copy_(_blend(v_trial, v, r.a))
    descend(w, m, d, r)
    return d


def _follow(m: Tensor, g: Tensor, r: Rates) -> None:
    """m <- m + (1 - beta1) (g - m), in place; told a tensor, torch's own would choose the nearer end for every entry anew."""
    if not isinstance(r.follow1, Tensor):
        m.lerp_(g, r.follow1)
    elif r.near:
        m.add_((g - m) * r.follow1)
    else:
        m.copy_(g - (g - m) * (1 - r.follow1))


def _metric(root: Tensor, r: Rates) -> Tensor:
    """d from sqrt(v), in place."""
    root = root.mul_(r.inverse) if isinstance(r.inverse, Tensor) else root.div_(r.correction)
    return root.add_(r.eps)


def _blend(to: Tensor, x: Tensor, a: Number) -> Tensor:
    """to <- a x + (1 - a) to, in place; x itself where a = 1."""
    to.mul_(1 - a)
    return to.add_(x * a) if isinstance(a, Tensor) else to.add_(x, alpha=a)


def _add_product(to: Tensor, x: Tensor, y: Tensor, factor: Number) -> Tensor:
    """to <- to + factor x y, in place; as torch's Adam where the factor is a number, which a tensor cannot stand in for."""
    return to.addcmul_(x * factor, y) if isinstance(factor, Tensor) else to.addcmul_(x, y, value=factor)
