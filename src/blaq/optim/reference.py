"""The algorithm as plain loops over Python floats (float64): the specification of the production code.

Slow and obvious on purpose; the tests hold `blaq.project` and `blaq.BLAQ` against it. w latent weight, w^ quantized
weight, g gradient at w^, m and v Adam's moments, d curvature; a star marks the trial point. Formulas are per weight.

Projection, for every row of weights that shares a scale (LAB, Hou et al. 2017; LAQ, Hou and Kwok 2018):

    (1)  P_d(w) = alpha * b    minimises    sum d (w - alpha b)^2    over alpha > 0 and b = level / largest level
    (2)  for a fixed b         alpha = S1 / S2,    S1 = sum d b w,    S2 = sum d b^2
    (3)  where the minimum is  sum d w^2 - S1^2 / S2
    (4)  stored as             scale = float32(alpha / largest level),    value = float32(scale * level)

Adam with decoupled weight decay, t counting the steps from 1; quantized weights are clipped to [-c, c] if asked:

    (5)  m_t = beta1 m + (1 - beta1) g             v_t = beta2 v + (1 - beta2) g^2
    (6)  d_t = sqrt(v_t) / sqrt(1 - beta2^t) + eps
    (7)  w  <- clip( w (1 - lr weight_decay) - lr / (1 - beta1^t) * m / d )

LAQ, one gradient a step:

    (8)  w_{t+1} = (7) with m_t, d_t               w^_{t+1} = P_{d_t}(w_{t+1})

BLAQ, one step forward, then backtrack (Ma et al., AAAI 2024); g* is the gradient at the trial point:

    (9)  w* = (7) from w_t with m_t, d_t           w^* = P_{d_t}(w*)           nothing else is kept
    (10) v* = beta2 v + (1 - beta2) g*^2           d* = sqrt(v*) / sqrt(1 - beta2^t) + eps
    (11) d' = a d_t + (1 - a) d*                   v <- a v_t + (1 - a) v*
    (12) m <- beta1 m + (1 - beta1) (a g + (1 - a) g*)
    (13) w_{t+1} = (7) from w_t with m, d'         w^_{t+1} = P_{d'}(w_{t+1})

From the past, one gradient a step (Popov; Gidel et al., ICLR 2019): the previous trial gradient stands in for g.

    (14) (10) to (13) with g = the previous g*; the first step, which has none, is (8) with its own gradient
    (15) the parameter then holds the next trial point: (5), (6) and (9) with the newest g* and step t + 1

Delayed, one gradient a step: a control without a trial, which averages gradients over time only.

    (16) (10) to (13) with g* = the gradient of the step before; the first step, which has none, is (8)

The alternating solver in training goes on from the last alpha, a round a step, after an exact solve at the first step:

    (17) of alpha and alpha (1 + e), with e = 1/8, -1/32, 1/32, -1/128, 1/128, -1/8 in turn from the first step on, take the
         one with the better (3), then (2); ternary grids, where (2) alone is quick, take alpha

With unit curvature the projections of (8), (9), (13) and (15) have d = 1: the nearest level (BWN, TWN).
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

TIE = 1e-12  # relative difference below which two minima are equal

Floats = Sequence[float]
Levels = Sequence[int]
Rows = list[list[float]]
Gradient = Callable[[Rows], Rows]  # the values of all parameters -> the gradient of each


def float32(x: float) -> float:
    """The float32 number nearest to x."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def nearest(size: float, alpha: float, magnitudes: Levels) -> int:
    """The magnitude nearest to ``size / alpha * largest``; a tie goes outward, alpha = 0 gives the smallest."""
    chosen = magnitudes[0]
    for inner, outer in pairwise(magnitudes):
        if alpha <= 0 or size < alpha * ((inner + outer) / 2 / magnitudes[-1]):
            break
        chosen = outer
    return chosen


def exact_alpha(sizes: Floats, curvature: Floats, magnitudes: Levels) -> float:
    """The alpha of the global minimum of (1): alpha falls from infinity to 0, (3) is looked at after every step.

    Every assignment that nearest-level rounding can make at some alpha is a prefix of the steps taken on the way down.
    Of equal minima (weights of one magnitude fit at every level) the first counts, not the one that rounding favours.
    """
    b = [magnitude / magnitudes[-1] for magnitude in magnitudes]
    steps = [  # the alpha at which a weight goes one level outward, what that adds to S1, what that adds to S2
        (size / ((inner + outer) / 2), d * size * (outer - inner), d * (outer**2 - inner**2))
        for size, d in zip(sizes, curvature, strict=True)
        for inner, outer in pairwise(b)
    ]
    s1 = sum(d * b[0] * size for size, d in zip(sizes, curvature, strict=True))
    s2 = sum(d * b[0] ** 2 for d in curvature)
    best = (s1 * s1 / s2, s1 / s2) if b[0] > 0 else (-1.0, 0.0)  # with a zero level, "no step yet" is no candidate
    for _, more_s1, more_s2 in sorted(steps, reverse=True):
        s1, s2 = s1 + more_s1, s2 + more_s2
        if s1 * s1 / s2 > best[0] * (1 + TIE):  # (3)
            best = (s1 * s1 / s2, s1 / s2)  # (2)
    return best[1]


def alternating_alpha(sizes: Floats, curvature: Floats, magnitudes: Levels, start: float) -> float:
    """A local minimum of (1): nearest levels at alpha, then the best alpha for these levels, and again."""
    if all(nearest(size, start, magnitudes) == 0 for size in sizes):
        start = max(sizes)  # the start was far too large; now at least one weight is at the largest level
    alpha = start
    for _ in range(10):
        b = [nearest(size, alpha, magnitudes) / magnitudes[-1] for size in sizes]
        s1 = sum(d * level * size for size, d, level in zip(sizes, curvature, b, strict=True))
        s2 = sum(d * level**2 for d, level in zip(curvature, b, strict=True))
        before, alpha = alpha, s1 / s2  # (2)
        if abs(alpha - before) <= 1e-6 * before:
            break
    return alpha


def followed_alpha(sizes: Floats, curvature: Floats, magnitudes: Levels, last: float, t: int) -> float:
    """The alpha of step t of a training, from that of the step before: (2) at the better of two alphas tried, (17)."""
    aside = (1 / 8, -1 / 32, 1 / 32, -1 / 128, 1 / 128, -1 / 8)[(t - 1) % 6]
    best = (0.0, max(sizes))  # no weight leaves zero at any of them: let the largest reach the largest level
    tried = (last,) if magnitudes == [0, 1] else (last, last * (1 + aside))
    for alpha in tried:
        b = [nearest(size, alpha, magnitudes) / magnitudes[-1] for size in sizes]
        s1 = sum(d * level * size for size, d, level in zip(sizes, curvature, b, strict=True))
        s2 = sum(d * level**2 for d, level in zip(curvature, b, strict=True))
        if s2 > 0 and s1 * (s1 / s2) > best[0] * (1 + TIE):
            best = (s1 * (s1 / s2), s1 / s2)
    return best[1]


def first_guess(sizes: Floats, curvature: Floats, levels: Levels) -> float:
    """Where the alternating solver starts without a previous alpha: the weighted mean size is the mean level."""
    mean_size = sum(d * size for size, d in zip(sizes, curvature, strict=True)) / sum(curvature)
    mean_b = sum(abs(level) for level in levels) / len(levels) / max(levels)
    return mean_size / mean_b


def project_row(
    weights: Floats,
    curvature: Floats,
    levels: Levels,
    *,
    two_scales: bool,
    solver: str,
    start: Floats | None = None,
    t: int = 0,
) -> tuple[list[float], list[int]]:
    """Equation (1) for one row: its alphas (one; two for ``two_scales``: negative, positive) and each weight's level.

    With two scales the entries of either sign are solved for themselves; those of the other sign do not take part.
    ``start`` holds the previous alphas, for the alternating solver; 0 means there was none. sign(0) is +1.

    Example:
        >>> project_row([0.9, -0.2, 0.1, -1.1], [1.0, 1.0, 1.0, 1.0], [-1, 0, 1], two_scales=False, solver="exact")
        ([1.0], [1, 0, 0, -1])
    """
    magnitudes = sorted({abs(level) for level in levels})
    signs = [1 if w >= 0 else -1 for w in weights]
    sides = [(-1,), (1,)] if two_scales else [(-1, 1)]
    alphas = []
    chosen = [0] * len(weights)
    for side, allowed in enumerate(sides):
        members = [i for i, sign in enumerate(signs) if sign in allowed]
        sizes = [abs(weights[i]) for i in members]
        d = [curvature[i] for i in members]
        if not any(sizes):
            alpha = 0.0
        elif solver == "exact":
            alpha = exact_alpha(sizes, d, magnitudes)
        elif solver == "follow" and start is not None:
            alpha = followed_alpha(sizes, d, magnitudes, start[side], t)
        else:
            previous = start[side] if start else 0.0
            alpha = alternating_alpha(sizes, d, magnitudes, previous or first_guess(sizes, d, levels))
        alphas.append(alpha)
        for i in members:
            chosen[i] = signs[i] * nearest(abs(weights[i]), alpha, magnitudes)
    return alphas, chosen


def row_scales(alphas: Floats, levels: Levels) -> list[float]:
    """What is stored of the alphas, (4)."""
    return [float32(alpha / max(levels)) for alpha in alphas]


def row_values(scales: Floats, chosen: Levels) -> list[float]:
    """The quantized weights of a row, (4): the first scale is for negative levels, the last for the others."""
    return [float32((scales[0] if level < 0 else scales[-1]) * level) for level in chosen]


@dataclass
class Parameter:
    """A parameter, flat: what the network computes with, and what the optimizer remembers about it."""

    values: list[float]  # given as float weights; quantized from the construction of the optimizer on
    levels: Levels | None = None  # None: the parameter stays float
    row_size: int | None = None  # weights that share a scale, consecutive; None: all of them
    two_scales: bool = False
    solver: str = "alternating"

    latent: list[float] = field(init=False)
    exp_avg: list[float] = field(init=False)
    exp_avg_sq: list[float] = field(init=False)
    step: int = field(init=False, default=0)
    scale: Rows = field(init=False, default_factory=list)  # of each row, what `values` are made with
    trial_grad: list[float] | None = field(init=False, default=None)
    trial_point: tuple[list[float], Rows] | None = field(init=False, default=None)  # put by by eval()

    def __post_init__(self) -> None:
        self.latent = list(self.values)
        self.exp_avg = [0.0] * len(self.values)
        self.exp_avg_sq = [0.0] * len(self.values)
        self.values, self.scale = self.project(self.latent, [1.0] * len(self.latent))

    def project(self, weights: list[float], curvature: list[float], t: int | None = None) -> tuple[list[float], Rows]:
        """P_d(weights) row by row, in step t or None outside steps: values and scales. A float parameter is its own.

        ``solver="alternating"`` is for steps; the first, and what is not a step, are solved exactly.
        """
        if self.levels is None:
            return list(weights), []
        values, scales = [], []
        size = self.row_size or len(weights)
        for row, first in enumerate(range(0, len(weights), size)):
            following = self.solver == "alternating" and t is not None and t > 1
            alphas, chosen = project_row(
                weights[first : first + size],
                curvature[first : first + size],
                self.levels,
                two_scales=self.two_scales,
                solver="follow" if following else "exact",
                start=[scale * max(self.levels) for scale in self.scale[row]] if following else None,
                t=t or 0,
            )
            scales.append(row_scales(alphas, self.levels))
            values += row_values(scales[-1], chosen)
        return values, scales


@dataclass
class ReferenceOptimizer:
    """LAQ (``trial="none"``), BLAQ (``"fresh"``), extrapolation from the past (``"past"``), the control ``"delayed"``.

    ``step(gradient)`` calls ``gradient`` with the values of all parameters and expects the gradient of each: twice a
    step for ``"fresh"``, once otherwise. ``"fresh"`` makes a trial at steps k, 2k, 3k, .. for ``trial_every=k``.
    """

    parameters: list[Parameter]
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    a: float = 0.7
    trial: str = "fresh"
    trial_every: int = 1
    curvature: str = "adam"
    clip: float | None = None
    steps: int = field(init=False, default=0)

    def step(self, gradient: Gradient) -> None:
        """One step of all parameters."""
        self.steps += 1
        first = gradient([p.values for p in self.parameters])
        if self.trial == "fresh" and self.steps % self.trial_every == 0:
            for p, g in zip(self.parameters, first, strict=True):
                p.values, _ = self._ahead(p, g)  # (9)
            second = gradient([p.values for p in self.parameters])
            for p, g, g_star in zip(self.parameters, first, second, strict=True):
                d = self._backtrack(p, g, g_star)
                p.values, p.scale = p.project(p.latent, self._metric(d), p.step)  # (13)
        elif self.trial == "past":
            for p, g_star in zip(self.parameters, first, strict=True):
                if p.trial_grad is None:
                    self._update(p, g_star)  # (14), first step
                else:
                    self._backtrack(p, p.trial_grad, g_star)  # (14)
                p.trial_grad = list(g_star)
                p.values, p.scale = self._ahead(p, g_star)  # (15)
        elif self.trial == "delayed":
            for p, g in zip(self.parameters, first, strict=True):
                d = self._update(p, g) if p.trial_grad is None else self._backtrack(p, g, p.trial_grad)  # (16)
                p.trial_grad = list(g)
                p.values, p.scale = p.project(p.latent, self._metric(d), p.step)
        else:
            for p, g in zip(self.parameters, first, strict=True):
                d = self._update(p, g)
                p.values, p.scale = p.project(p.latent, self._metric(d), p.step)  # (8)

    def eval(self) -> None:
        """``"past"``: the parameters hold the quantized latent weights instead of the trial point."""
        for p in self.parameters:
            if self.trial == "past" and p.trial_point is None:
                p.trial_point = (p.values, p.scale)
                d = self._curvature(p.exp_avg_sq, p.step) if p.step else [1.0] * len(p.latent)
                p.values, p.scale = p.project(p.latent, self._metric(d))

    def train(self) -> None:
        """``"past"``: the parameters hold the trial point again."""
        for p in self.parameters:
            if p.trial_point is not None:
                p.values, p.scale = p.trial_point
                p.trial_point = None

    def _update(self, p: Parameter, g: list[float]) -> list[float]:
        """Moments and latent weights after a step along g, (5) to (7); returns d."""
        p.step += 1
        p.exp_avg = self._first_moment(p, g)
        p.exp_avg_sq = self._second_moment(p, g)
        d = self._curvature(p.exp_avg_sq, p.step)
        p.latent = self._moved(p, p.exp_avg, d, p.step)
        return d

    def _ahead(self, p: Parameter, g: list[float]) -> tuple[list[float], Rows]:
        """The trial point, values and scales: where a step along g would lead, (9); p is left as it is."""
        d = self._curvature(self._second_moment(p, g), p.step + 1)
        return p.project(self._moved(p, self._first_moment(p, g), d, p.step + 1), self._metric(d), p.step + 1)

    def _metric(self, d: list[float]) -> list[float]:
        """The curvature of a projection."""
        return d if self.curvature == "adam" else [1.0] * len(d)

    def _backtrack(self, p: Parameter, g: list[float], g_star: list[float]) -> list[float]:
        """Moments and latent weights after the step that both gradients make, (10) to (13); returns d'."""
        p.step += 1
        v, v_star = self._second_moment(p, g), self._second_moment(p, g_star)  # (5), (10)
        d = self._mix(self._curvature(v, p.step), self._curvature(v_star, p.step))  # (11)
        p.exp_avg = self._first_moment(p, self._mix(g, g_star))  # (12)
        p.exp_avg_sq = self._mix(v, v_star)  # (11)
        p.latent = self._moved(p, p.exp_avg, d, p.step)  # (13)
        return d

    def _mix(self, here: list[float], there: list[float]) -> list[float]:
        return [self.a * x + (1 - self.a) * y for x, y in zip(here, there, strict=True)]

    def _first_moment(self, p: Parameter, g: list[float]) -> list[float]:  # (5)
        beta1 = self.betas[0]
        return [beta1 * m + (1 - beta1) * x for m, x in zip(p.exp_avg, g, strict=True)]

    def _second_moment(self, p: Parameter, g: list[float]) -> list[float]:  # (5)
        beta2 = self.betas[1]
        return [beta2 * v + (1 - beta2) * x * x for v, x in zip(p.exp_avg_sq, g, strict=True)]

    def _curvature(self, v: list[float], t: int) -> list[float]:  # (6)
        correction = math.sqrt(1 - self.betas[1] ** t)
        return [math.sqrt(x) / correction + self.eps for x in v]

    def _moved(self, p: Parameter, m: list[float], d: list[float], t: int) -> list[float]:  # (7)
        rate = self.lr / (1 - self.betas[0] ** t)
        moved = []
        for w, direction, curvature in zip(p.latent, m, d, strict=True):
            w = w * (1 - self.lr * self.weight_decay) - rate * direction / curvature
            if self.clip is not None and p.levels is not None:
                w = min(max(w, -self.clip), self.clip)
            moved.append(w)
        return moved
