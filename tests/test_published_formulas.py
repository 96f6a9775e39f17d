"""blaq.project against the formulas that the papers print, each written here a second time, in their own terms.

LAB: Hou, Yao, Kwok, "Loss-aware Binarization of Deep Networks", ICLR 2017. LAT, LAQ: Hou, Kwok, "Loss-aware Weight
Quantization of Deep Networks", ICLR 2018. BWN: Rastegari et al., "XNOR-Net", ECCV 2016. TWN: Li and Liu, "Ternary
Weight Networks", 2016. Their alpha is the value of the largest level, and their levels b lie in [-1, 1].
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import blaq

SEEDS = range(10)


def weights_and_curvature(seed: int, n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator, dtype=torch.float64) * 0.05
    v_hat = torch.randn(n, generator=generator, dtype=torch.float64).mul(3).exp() * 1e-6
    return w, v_hat.sqrt() + 1e-8


def assert_is(q: blaq.Quantized, alpha: list[float], b: Tensor, grid: str) -> None:
    """The projection has these alphas and levels."""
    levels = blaq.Grid.parse(grid).levels.double()
    torch.testing.assert_close(q.scale.double() * levels[-1], torch.tensor([alpha]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(levels[q.codes.long()] / levels[-1], b.double(), rtol=1e-15, atol=0)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("solver", ["exact", "alternating"])
def test_lab_closed_form(seed: int, solver: str) -> None:
    """LAB, proposition 3.1: alpha = |d w|_1 / |d|_1, b = sign(w)."""
    w, d = weights_and_curvature(seed)
    alpha = float((d * w).abs().sum() / d.sum())
    assert_is(blaq.project(w, d, "binary", solver=solver), [alpha], w.sign(), "binary")


@pytest.mark.parametrize("seed", SEEDS)
def test_bwn_is_binary_with_unit_curvature(seed: int) -> None:
    """BWN: alpha = |w|_1 / n, b = sign(w)."""
    w, _ = weights_and_curvature(seed)
    for d in (None, torch.full_like(w, 0.37)):
        assert_is(blaq.project(w, d, "binary"), [float(w.abs().mean())], w.sign(), "binary")


def lat_e(w: Tensor, d: Tensor) -> tuple[float, Tensor]:
    """LAT, algorithm for the exact solution: sort |w|, half the running weighted mean is the candidate threshold.

    Entry j is a candidate when its threshold parts it from the next one. The authors' code leaves the last entry out
    because it has no next one; it is the candidate "every weight is kept".
    """
    order = w.abs().argsort(descending=True)
    size = w.abs()[order]
    mass = d[order].cumsum(0)
    threshold = (d * w.abs())[order].cumsum(0) / mass / 2
    following = torch.cat([size[1:], torch.zeros(1, dtype=size.dtype)])
    parts = (size - threshold) * (following - threshold) < 0
    best = torch.where(parts, threshold**2 * mass, -1).argmax()
    return float(2 * threshold[best]), w.sign() * (w.abs() > threshold[best])


@pytest.mark.parametrize("seed", SEEDS)
def test_lat_e_threshold_rule(seed: int) -> None:
    for n in (1, 2, 3, 10, 200):
        w, d = weights_and_curvature(seed, n)
        alpha, b = lat_e(w, d)
        assert_is(blaq.project(w, d, "ternary"), [alpha], b, "ternary")


@pytest.mark.parametrize("seed", SEEDS)
def test_lat2_e_solves_either_sign_for_itself(seed: int) -> None:
    w, d = weights_and_curvature(seed)
    (alpha, positive), (beta, negative) = lat_e(w[w > 0], d[w > 0]), lat_e(w[w < 0], d[w < 0])
    b = torch.zeros_like(w)
    b[w > 0], b[w < 0] = positive, negative
    assert_is(blaq.project(w, d, "ternary2"), [beta, alpha], b, "ternary2")


@pytest.mark.parametrize("seed", SEEDS)
def test_twn_is_ternary_with_unit_curvature(seed: int) -> None:
    """TWN: the threshold of the largest (sum |w|)^2 / count, of which 0.7 mean |w| is their quick estimate."""
    w, _ = weights_and_curvature(seed)
    size = w.abs()

    def score(threshold: float) -> float:
        kept = size[size > threshold]
        return float(kept.sum() ** 2 / len(kept))

    best = max([0.0, *size.sort().values[:-1].tolist()], key=score)
    kept = size > best
    q = blaq.project(w, None, "ternary")
    assert_is(q, [float(size[kept].mean())], w.sign() * kept, "ternary")

    guess = size > 0.7 * size.mean()
    guessed = w.sign() * guess * size[guess].mean()
    assert ((w - q.values) ** 2).sum() <= ((w - guessed) ** 2).sum() * (1 + 1e-12)


# -------------------------------------------------------------------------------------------------------- alternation


def ternary_levels(x: Tensor) -> Tensor:
    """LAT: I_{1/2}(x)."""
    return x.sign() * (x.abs() > 0.5)


def linear_levels(bits: int) -> Callable[[Tensor], Tensor]:
    """LAQ (linear): {0, +-1/n, .., +-1}."""
    n = 2 ** (bits - 1) - 1
    return lambda x: (x.clamp(-1, 1) * n).round() / n


def log_levels(bits: int) -> Callable[[Tensor], Tensor]:
    """LAQ (log): {0, +-2^-(n-1), .., +-1}; log2(3/2) - 1/2 moves the rounding of the exponent to the middle."""
    n = 2 ** (bits - 1) - 1

    def levels(x: Tensor) -> Tensor:
        exponent = (x.abs().log2() - (math.log2(1.5) - 0.5)).round().clamp(-(n - 1), 0)
        return x.sign() * torch.exp2(exponent) * (x.abs() >= 2.0**-n)

    return levels


PUBLISHED_LEVELS = {
    "ternary": ternary_levels,
    **{f"linear{bits}": linear_levels(bits) for bits in range(3, 9)},
    **{f"log{bits}": log_levels(bits) for bits in range(3, 8)},
}


def alternate(w: Tensor, d: Tensor, alpha: float, levels: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """LAT-a and LAQ: b = levels(w / alpha), alpha = |b d w|_1 / |b b d|_1, until alpha rests, at most 10 times."""
    b = levels(w / alpha)
    for _ in range(10):
        before, alpha = alpha, float((b * d * w).abs().sum() / (b * b * d).sum())
        b = levels(w / alpha)
        if abs(alpha - before) <= 1e-6 * before:
            break
    return alpha, b


@pytest.mark.parametrize("grid", PUBLISHED_LEVELS)
def test_alternation_from_a_start(grid: str) -> None:
    largest = blaq.Grid.parse(grid).largest
    for seed in SEEDS:
        w, d = weights_and_curvature(seed)
        start = torch.tensor([[float(w.abs().max()) * (0.4 + seed / 10) / largest]])
        alpha, b = alternate(w, d, float(start) * largest, PUBLISHED_LEVELS[grid])
        assert_is(blaq.project(w, d, grid, solver="alternating", start=start), [alpha], b, grid)


@pytest.mark.parametrize("grid", PUBLISHED_LEVELS)
def test_alternation_follows_weights_that_move(grid: str) -> None:
    """As in training: every solve starts from the alpha of the one before."""
    w, d = weights_and_curvature(0)
    q = blaq.project(w, d, grid)
    alpha = float(q.scale) * blaq.Grid.parse(grid).largest
    for seed in SEEDS:
        step, d = weights_and_curvature(seed + 1)
        w = w + 0.2 * step
        alpha, b = alternate(w, d, alpha, PUBLISHED_LEVELS[grid])
        q = blaq.project(w, d, grid, solver="alternating", start=q.scale)
        assert_is(q, [alpha], b, grid)


@pytest.mark.parametrize("seed", SEEDS)
def test_lat2_a_alternates_either_sign_for_itself(seed: int) -> None:
    w, d = weights_and_curvature(seed)
    start = torch.tensor([[0.03, 0.09]])
    b = torch.zeros_like(w)
    alphas = []
    for side, mask in enumerate((w < 0, w > 0)):
        alpha, b[mask] = alternate(w[mask], d[mask], float(start[0, side]), ternary_levels)
        alphas.append(alpha)
    assert_is(blaq.project(w, d, "ternary2", solver="alternating", start=start), alphas, b, "ternary2")
