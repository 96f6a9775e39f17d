"""The production optimizer equals the specification, in weights and in all state, after each of 50 steps."""

import itertools
from collections.abc import Sequence

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
KINDS = list(itertools.product(GRANULARITIES.values(), ("exact", "alternating")))
SHAPE = (3, 4)


class Problem:
    """A smooth loss of matrices and a vector, with a gradient that depends on the step: a mini-batch of its own."""

    def __init__(self, matrices: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(STEPS, 5, SHAPE[1], dtype=torch.float64, generator=generator)
        self.targets = torch.randn(STEPS, 5, SHAPE[0], dtype=torch.float64, generator=generator)
        weight = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        self.weights = [weight.clone() for _ in range(matrices)]
        self.bias = torch.randn(SHAPE[0], dtype=torch.float64, generator=generator)

    def loss(self, weights: Sequence[Tensor], bias: Tensor, step: int) -> Tensor:
        outputs = torch.tanh(self.inputs[step] @ torch.stack(tuple(weights)).mT + bias)
        return (outputs - self.targets[step]).square().mean((1, 2)).sum()


def reference_gradient(problem: Problem, step: int, values: list[list[float]]) -> list[list[float]]:
    *weights, bias = (torch.tensor(value, dtype=torch.float64) for value in values)
    leaves = [*(weight.view(SHAPE) for weight in weights), bias]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = torch.autograd.grad(problem.loss(leaves[:-1], leaves[-1], step), leaves)
    return [grad.flatten().tolist() for grad in grads]


def assert_same(found: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    """All of a step at once; if something differs, its name is told."""
    bounds = {"rtol": 1e-9, "atol": 1e-12}
    assert found.keys() == expected.keys()
    flat = {name: tensor.flatten().double() for name, tensor in found.items()}
    wanted = torch.tensor(list(itertools.chain.from_iterable(expected.values())), dtype=torch.float64)
    sizes = [len(values) for values in expected.values()]
    if [len(tensor) for tensor in flat.values()] == sizes and torch.allclose(
        torch.cat(list(flat.values())), wanted, **bounds
    ):
        return
    for name, values in expected.items():
        torch.testing.assert_close(
            flat[name],
            torch.tensor(values, dtype=torch.float64),
            **bounds,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def run(
    grid: str,
    kinds: Sequence[tuple[str | int, str]],
    mode: dict[str, object],
    *,
    compile: bool = False,
    **options: float,
) -> None:
    """Train a matrix for each granularity and solver, all in one optimizer, and a vector without a grid, by both."""
    problem = Problem(len(kinds))
    *weights, bias = (torch.nn.Parameter(t.clone()) for t in (*problem.weights, problem.bias))
    groups = [
        {"params": [weight], "grid": grid, "granularity": granularity, "solver": solver}
        for weight, (granularity, solver) in zip(weights, kinds, strict=True)
    ]
    opt = blaq.BLAQ([*groups, {"params": [bias], "grid": None}], lr=0.03, compile=compile, **mode, **options)  # type: ignore[arg-type]
    grid_ = blaq.Grid.parse(grid)
    theirs = [
        Parameter(
            weight.flatten().tolist(),
            levels=[int(level) for level in grid_.levels.double()],
            row_size={"tensor": None, "channel": SHAPE[1]}.get(granularity, granularity),  # type: ignore[call-overload]
            two_scales=grid_.two_scales,
            solver=solver,
        )
        for weight, (granularity, solver) in zip(problem.weights, kinds, strict=True)
    ]
    theirs.append(Parameter(problem.bias.tolist()))
    reference = ReferenceOptimizer(theirs, lr=0.03, **mode, **options)  # type: ignore[arg-type]
    triples = list(zip([*weights, bias], theirs, [*(f"{g}, {s}" for g, s in kinds), "bias"], strict=True))

    def held(where: str) -> None:
        """Compare what the parameters hold."""
        assert_same(
            {f"{where}, {name}": p.detach() for p, _, name in triples},
            {f"{where}, {name}": q.values for _, q, name in triples},
        )

    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            loss = problem.loss(weights, bias, step)
            loss.backward()
            return loss

        opt.step(closure)
        reference.step(lambda values, step=step: reference_gradient(problem, step, values))
        held(f"step {step}, values")
        found: dict[str, Tensor] = {}
        expected: dict[str, list[float]] = {}
        for p, q, name in triples:
            where = f"step {step}, {name}"
            found[f"{where}, latent"], expected[f"{where}, latent"] = opt.latent(p), q.latent
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{where}, {key}"], expected[f"{where}, {key}"] = opt.state[p][key], getattr(q, key)
            assert int(opt.state[p]["step"]) == q.step
            if p is not bias:
                found[f"{where}, scale"] = opt.scale(p)
                expected[f"{where}, scale"] = list(itertools.chain.from_iterable(q.scale))
            if mode["trial"] in ("past", "delayed"):
                assert q.trial_grad is not None
                found[f"{where}, trial_grad"] = opt.state[p]["trial_grad"]
                expected[f"{where}, trial_grad"] = q.trial_grad
        assert_same(found, expected)

    opt.eval()
    reference.eval()
    held("eval")
    opt.train()
    reference.train()
    held("train")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_reference(grid: str, mode: dict[str, object]) -> None:
    run(grid, KINDS, mode)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("grid", ["binary", "ternary2", "log3"])
def test_large_tensors_equal_the_reference(grid: str, mode: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are gone over some entries at a time."""
    for module in (projection, solvers, running):
        monkeypatch.setattr(module, "_BLOCK", 3)
    run(grid, KINDS, mode)


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
    run("linear3", [("channel", "exact")], mode, **options)


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
    run(grid, [(GRANULARITIES[granularity], solver)], MODES[mode], compile=True, weight_decay=0.02, clip=0.9)
    assert not compiled._Compiler.broken
