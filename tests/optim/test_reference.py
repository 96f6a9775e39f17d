"""The production optimizer equals the specification, in weights and in all state, after each of 50 steps."""

import itertools

import pytest
import torch
from torch import Tensor

import blaq
from blaq import projection, solvers
from blaq.grids import GRIDS
from blaq.optim import compiled, running
from blaq.optim.reference import Parameter, ReferenceOptimizer

STEPS = 50
MODES = {
    "none": {"trial": "none"},
    "fresh": {"trial": "fresh"},
    "fresh every 3rd": {"trial": "fresh", "trial_every": 3},
    "past": {"trial": "past"},
    "delayed": {"trial": "delayed"},
    "unit curvature": {"trial": "fresh", "curvature": "unit"},
}
GRANULARITIES: dict[str, str | int] = {"tensor": "tensor", "channel": "channel", "group": 2}
SHAPE = (3, 4)


class Problem:
    """A smooth loss of a matrix and a vector, with a gradient that depends on the step: a mini-batch of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(STEPS, 5, SHAPE[1], dtype=torch.float64, generator=generator)
        self.targets = torch.randn(STEPS, 5, SHAPE[0], dtype=torch.float64, generator=generator)
        self.weight = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        self.bias = torch.randn(SHAPE[0], dtype=torch.float64, generator=generator)

    def loss(self, weight: Tensor, bias: Tensor, step: int) -> Tensor:
        return (torch.tanh(self.inputs[step] @ weight.T + bias) - self.targets[step]).square().mean()


def reference_gradient(problem: Problem, step: int, values: list[list[float]]) -> list[list[float]]:
    weight = torch.tensor(values[0], dtype=torch.float64).view(SHAPE).requires_grad_()
    bias = torch.tensor(values[1], dtype=torch.float64).requires_grad_()
    grads = torch.autograd.grad(problem.loss(weight, bias, step), [weight, bias])
    return [grad.flatten().tolist() for grad in grads]


def assert_same(production: Tensor, expected: list[float], what: str) -> None:
    found, wanted = production.flatten().double(), torch.tensor(expected, dtype=torch.float64)
    bounds = {"rtol": 1e-9, "atol": 1e-12}
    if found.shape == wanted.shape and torch.allclose(found, wanted, **bounds):
        return  # the same comparison as below, which takes ten times as long to say that all is well
    torch.testing.assert_close(found, wanted, **bounds, msg=lambda text: f"{what}: {text}")


def run(
    grid: str,
    granularity: str | int,
    solver: str,
    mode: dict[str, object],
    *,
    compile: bool = False,
    **options: float,
) -> None:
    problem = Problem()
    weight, bias = (torch.nn.Parameter(t.clone()) for t in (problem.weight, problem.bias))
    groups = [
        {"params": [weight], "grid": grid, "granularity": granularity, "solver": solver},
        {"params": [bias], "grid": None},
    ]
    opt = blaq.BLAQ(groups, lr=0.03, compile=compile, **mode, **options)  # type: ignore[arg-type]
    grid_ = blaq.Grid.parse(grid)
    row_size = {"tensor": None, "channel": SHAPE[1]}.get(granularity, granularity)  # type: ignore[call-overload]
    theirs = [
        Parameter(
            problem.weight.flatten().tolist(),
            levels=[int(level) for level in grid_.levels.double()],
            row_size=row_size,
            two_scales=grid_.two_scales,
            solver=solver,
        ),
        Parameter(problem.bias.tolist()),
    ]
    reference = ReferenceOptimizer(theirs, lr=0.03, **mode, **options)  # type: ignore[arg-type]

    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            loss = problem.loss(weight, bias, step)
            loss.backward()
            return loss

        opt.step(closure)
        reference.step(lambda values, step=step: reference_gradient(problem, step, values))
        for p, q, name in ((weight, theirs[0], "weight"), (bias, theirs[1], "bias")):
            where = f"step {step}, {name}"
            assert_same(p.detach(), q.values, f"{where}, values")
            assert_same(opt.latent(p), q.latent, f"{where}, latent")
            for key in ("exp_avg", "exp_avg_sq"):
                assert_same(opt.state[p][key], getattr(q, key), f"{where}, {key}")
            assert int(opt.state[p]["step"]) == q.step
            if p is weight:
                assert_same(opt.scale(p), list(itertools.chain.from_iterable(q.scale)), f"{where}, scale")
            if mode["trial"] in ("past", "delayed"):
                assert q.trial_grad is not None
                assert_same(opt.state[p]["trial_grad"], q.trial_grad, f"{where}, trial_grad")

    opt.eval()
    reference.eval()
    assert_same(weight.detach(), theirs[0].values, "eval")
    assert_same(bias.detach(), theirs[1].values, "eval")
    opt.train()
    reference.train()
    assert_same(weight.detach(), theirs[0].values, "train")
    assert_same(bias.detach(), theirs[1].values, "train")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_reference(grid: str, granularity: str | int, mode: dict[str, object]) -> None:
    for solver in ("exact", "alternating"):
        run(grid, granularity, solver, mode)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("grid", ["binary", "ternary2", "log3"])
def test_large_tensors_equal_the_reference(
    grid: str, granularity: str | int, mode: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are gone over some entries at a time."""
    for module in (projection, solvers, running):
        monkeypatch.setattr(module, "_BLOCK", 2)
    for solver in ("exact", "alternating"):
        run(grid, granularity, solver, mode)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"a": 0.0},
        {"a": 1.0},
        {"weight_decay": 0.1},
        {"clip": 0.5},
        {"betas": (0.0, 0.99)},
        {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.02, "clip": 0.9, "a": 0.35},
    ],
    ids=str,
)
def test_options_equal_the_reference(options: dict[str, float], mode: dict[str, object]) -> None:
    run("linear3", "channel", "exact", mode, **options)


@pytest.mark.parametrize(
    ("grid", "granularity", "solver", "mode"),
    [
        ("ternary2", "tensor", "alternating", "fresh"),
        ("midrise3", "group", "alternating", "past"),
        ("binary", "channel", "exact", "delayed"),
    ],
)
def test_compiled_steps_equal_the_reference(grid: str, granularity: str, solver: str, mode: str) -> None:
    """As large networks take them."""
    run(grid, GRANULARITIES[granularity], solver, MODES[mode], compile=True, weight_decay=0.02, clip=0.9)
    assert not compiled._Compiler.broken
