"""Special cases of BLAQ that are other, known methods; each written here once more, from its own definition."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.optim import compiled

Check = Callable[..., None]

# d = sqrt(v_hat) + eps: with an eps this large the root does not change the sum by a bit, so d is the constant EPS, a
# power of two, and division by it is exact. With lr = RATE * EPS and beta1 = 0 a step is w - RATE * g: no Adam is left.
EPS, RATE = 2.0**80, 2.0**-3
PLAIN = {"lr": RATE * EPS, "eps": EPS, "betas": (0.0, 0.99)}


class Problem:
    """Two layers and ten mini-batches; one gradient is a function of the weights and the number of the step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
        self.inputs = torch.randn(10, 8, 6, dtype=dtype)
        self.targets = torch.randn(10, 8, 4, dtype=dtype)

    def closure(self, opt: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = (self.model(self.inputs[step % 10]) - self.targets[step % 10]).square().mean()
            loss.backward()
            return loss

        return closure


def quadratic(w: nn.Parameter, opt: torch.optim.Optimizer, slope: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """The loss sum slope (w - target)^2 / 2: its gradient is slope (w - target)."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (slope * (w - target).square()).sum() / 2
        loss.backward()
        return loss

    return closure


def projected(w: Tensor, d: Tensor, levels: list[int]) -> Tensor:
    """One row's projection by trial: every assignment that rounding can make, each with its best scale."""
    b_all = torch.tensor(levels, dtype=w.dtype)
    mids = [(a + b) / 2 for a, b in itertools.pairwise(sorted({abs(k) for k in levels}))]
    turns = sorted({float(x) / mid for x in w.abs() for mid in mids} | {1e-9, 1e9})
    best, values = math.inf, torch.zeros_like(w)
    for low, high in itertools.pairwise(turns):
        b = b_all[(w[:, None] / ((low + high) / 2) - b_all).abs().argmin(1)]
        if b.any():
            scale = (d * b * w).sum() / (d * b * b).sum()
            error = float((d * (w - scale * b).square()).sum())
            if error < best * (1 - 1e-9):
                best, values = error, (scale.float() * b.float()).double()
    return values


# --- a = 1: LAQ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1, "clip": 0.3}, {"betas": (0.0, 0.9)}, {"lr": 0.2, "eps": 1e-3}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", ["binary", "ternary", "ternary2", "linear3", "log4", "midrise2"])
def test_a_1_is_laq_bit_for_bit(
    grid: str, dtype: torch.dtype, options: dict[str, Any], everything: Any, assert_identical: Check
) -> None:
    solver, granularity = ("alternating", "channel") if "lr" in options else ("exact", "tensor")
    ends = {}
    for a in (None, 1.0, 0.5):
        problem = Problem(dtype)
        groups = blaq.param_groups(problem.model, grid, granularity, solver)
        arguments = {"lr": 0.03, **options}
        opt = blaq.LAQ(groups, **arguments) if a is None else blaq.BLAQ(groups, a=a, **arguments)
        for step in range(8):
            opt.step(problem.closure(opt, step))
        ends[a] = everything(opt)
    assert_identical(ends[None], ends[1.0], ignore=("a", "trial", "gradient_evaluations"))
    assert not torch.equal(ends[1.0]["parameters"][0], ends[0.5]["parameters"][0])  # the trial gradient is another one


# --- a = 0: extragradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "levels", [[-1, 1], [-1, 0, 1], [-3, -2, -1, 0, 1, 2, 3]], ids=["binary", "ternary", "linear3"]
)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_0_is_the_extragradient_step(levels: list[int], beta1: float) -> None:
    """Extragradient: look along the gradient, then take the gradient found there instead; Adam scales both."""
    generator = torch.Generator().manual_seed(5)
    start, slope, target = (torch.randn(7, dtype=torch.float64, generator=generator) for _ in range(3))
    slope = slope.abs() + 0.5
    lr, beta2, eps = 0.1, 0.95, 1e-6

    def adam(w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        d = (v / (1 - beta2**t)).sqrt() + eps
        return w - lr * m / (1 - beta1**t) / d, m, v, d

    p = nn.Parameter(start.clone())
    grid = {2: "binary", 3: "ternary", 7: "linear3"}[len(levels)]
    opt = blaq.BLAQ([{"params": [p], "grid": grid, "solver": "exact"}], lr=lr, betas=(beta1, beta2), eps=eps, a=0.0)
    w, m, v, d = start.clone(), torch.zeros_like(start), torch.zeros_like(start), torch.ones_like(start)
    for t in range(1, 16):
        held = projected(w, d, levels)
        look, _, _, d = adam(w, m, v, slope * (held - target), t)
        w, m, v, d = adam(w, m, v, slope * (projected(look, d, levels) - target), t)
        opt.step(quadratic(p, opt, slope, target))
        torch.testing.assert_close(opt.latent(p), w, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(p.detach(), projected(w, d, levels), rtol=1e-6, atol=1e-7)


# --- without curvature and momentum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("levels", [[-1, 1], [-1, 0, 1]], ids=["BWN", "TWN"])
def test_constant_curvature_is_nearest_level_training(levels: list[int], granularity: str) -> None:
    """BWN: sign(w) mean|w|. TWN: the threshold and scale of least squared error. Gradients at these, steps on w."""
    generator = torch.Generator().manual_seed(1)
    start, slope, target = (torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    p = nn.Parameter(start.clone())
    group = {"params": [p], "grid": len(levels) - 1, "granularity": granularity, "solver": "exact"}
    opt = blaq.LAQ([group], **PLAIN)

    def nearest(w: Tensor) -> Tensor:
        size = w.abs()
        if len(levels) == 2:
            return w.sign() * size.mean()
        kept = [size >= threshold for threshold in size]  # all thresholds that make a difference
        means = [size[k].mean() for k in kept]
        errors = torch.stack([(w - w.sign() * k * s).square().sum() for k, s in zip(kept, means, strict=True)])
        best = int(errors.argmin())
        return w.sign() * kept[best] * means[best]

    w, rows = start.clone(), (1, -1) if granularity == "tensor" else (4, -1)
    for _ in range(30):
        held = torch.stack([nearest(row) for row in w.reshape(rows)]).view_as(w)
        assert torch.equal(p.detach(), held.float().double())
        w = w - RATE * slope * (p.detach() - target)  # plain gradient descent
        opt.step(quadratic(p, opt, slope, target))
        assert torch.equal(opt.latent(p), w)


@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("x", [0.125, 0.5, 1.0, 2.0, 3.0])
def test_error_factor_on_a_quadratic(a: float, x: float) -> None:
    """On l = lambda w^2 / 2 without momentum one step multiplies w by 1 - x + (1-a) x^2, x = rate * lambda."""
    w = nn.Parameter(torch.tensor([1.5, -0.25], dtype=torch.float64))
    with pytest.warns(UserWarning, match="no parameter group has a grid"):
        opt = blaq.BLAQ([w], a=a, **PLAIN)
    closure = quadratic(w, opt, torch.tensor(x / RATE, dtype=torch.float64), torch.tensor(0.0))
    factor = 1 - x + (1 - a) * x * x
    for step in range(1, 5):
        opt.step(closure)
        expected = torch.tensor([1.5, -0.25], dtype=torch.float64) * factor**step
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-15)


# --- without a grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["LAQ", "fresh, a=1", "beside a quantized weight"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_without_a_grid_it_is_adam_bit_for_bit(
    compile: bool, dtype: torch.dtype, weight_decay: float, mode: str
) -> None:
    """But for compiled steps in float32, where the last digit is the compiler's."""
    rtol = 1e-5 if compile and dtype == torch.float32 else 0.0
    generator = torch.Generator().manual_seed(2)
    shapes = [(5, 3), (7,), ()]
    ours, theirs = (
        [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(9)).to(dtype)) for s in shapes]
        for _ in range(2)
    )
    adam = torch.optim.AdamW if weight_decay else torch.optim.Adam
    twin = adam(theirs, lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, foreach=False)
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay, "compile": compile}
    if mode == "beside a quantized weight":
        groups = [{"params": [nn.Parameter(torch.randn(4))], "grid": "binary"}, {"params": ours}]
        opt = blaq.LAQ(groups, **options, clip=0.1)  # type: ignore[arg-type]  # clips quantized weights only
    else:
        with pytest.warns(UserWarning, match="no parameter group has a grid"):
            opt = blaq.LAQ(ours, **options) if mode == "LAQ" else blaq.BLAQ(ours, a=1.0, **options)  # type: ignore[arg-type]
    for step in range(20):
        gradients = [torch.randn(s, generator=generator).to(dtype) for s in shapes]

        def closure(step: int = step, gradients: list[Tensor] = gradients) -> None:
            for i, g in enumerate(gradients):
                absent = (step + i) % 4 == 0  # a layer that this batch does not use
                ours[i].grad, theirs[i].grad = (None, None) if absent else (g.clone(), g.clone())

        opt.step(closure)
        twin.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * 0.1)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in twin.state[q]:
                    torch.testing.assert_close(opt.state[p][key], twin.state[q][key], rtol=rtol, atol=rtol * 0.1)
    if compile and dtype == torch.float32:
        assert not compiled._Compiler.broken
        assert any(function.__name__ == "float_with_numbers" for function, _ in compiled._Compiler.codes)


def test_a_learning_rate_in_a_tensor_is_read_at_every_step() -> None:
    ends = []
    for lr in (2.0**-4, torch.tensor(2.0**-4)):
        problem = Problem()
        opt = blaq.LAQ(blaq.param_groups(problem.model, "linear3"), lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
        for step in range(8):
            opt.step(problem.closure(opt, step))
            scheduler.step()
        ends.append([p.detach() for p in problem.model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
    problem = Problem()
    opt = blaq.LAQ(blaq.param_groups(problem.model, "linear3"), lr=2.0**-4)
    for step in range(8):
        opt.step(problem.closure(opt, step))
    assert not torch.equal(next(problem.model.parameters()), ends[0][0])  # without the scheduler it ends elsewhere


class Subclass(blaq.LAQ):
    """Of a user; it has no ``__init__`` of its own."""


@pytest.mark.parametrize("method", [blaq.BLAQ, blaq.LAQ, Subclass])
def test_one_warning_where_nothing_is_quantized(method: type[blaq.BLAQ]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = method([nn.Parameter(torch.randn(3))])
        opt.add_param_group({"params": [nn.Parameter(torch.randn(3))]})
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{method.__name__}: no parameter group has a grid")
    assert caught[0].filename == __file__  # it points at the line to change


@pytest.mark.parametrize("grid", ["binary", "ternary2", "linear4"])
def test_a_of_one_is_laq_compiled_too(grid: str) -> None:
    """Other code then, with a second gradient that has no weight: equal but for the last digits of sums. A closed form, two
    scales, and a scale that is looked for beside the last one; grids differ in nothing else that a gradient goes through.
    """
    held = []
    for trial in ("fresh", "none"):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(64, 256, generator=generator))
        opt = blaq.BLAQ([{"params": [p], "grid": grid}], lr=0.01, a=1.0, trial=trial, compile=True)
        for _ in range(5):
            gradient = torch.randn(64, 256, generator=generator)
            for half in (opt.forward_step, opt.backtrack_step) if trial == "fresh" else (opt.step,):
                p.grad = gradient.clone() if half != opt.backtrack_step else torch.ones_like(p)
                half()
        held.append((opt.latent(p).clone(), opt.scale(p), p.detach().clone()))
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
