"""trial= may change between steps, and eval() and train() come and go: neither disturbs training."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.optim.reference import Parameter, ReferenceOptimizer

Check = Callable[..., None]
NewTask = Callable[..., Any]

SOLVERS = ["exact", "alternating"]
in_every_mode = pytest.mark.parametrize("mode", ["fresh", "past", "delayed", "none"])


def weight_to_evaluate(opt: blaq.BLAQ, p: Tensor) -> Tensor:
    """The projection of the latent weight in Adam's curvature, which is exact whatever the solver of the steps."""
    group, state = opt.param_groups[0], opt.state[p]
    d = None
    if state["step"] > 0:
        d = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
    return blaq.project(opt.latent(p), d, group["grid"], group["granularity"]).values


# --- eval and train -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@in_every_mode
def test_eval_and_train_leave_no_trace_in_training(
    mode: str, solver: str, new_task: NewTask, assert_identical: Check
) -> None:
    """Bit for bit, under a schedule of the learning rate, and however often either is called."""
    ends = []
    for toggled in (False, True):
        task = new_task("linear3", solver=solver, trial=mode)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(task.opt, 8)
        for step in range(8):
            for call in ["eval", "eval", "train", "train"] * toggled:
                getattr(task.opt, call)()
            task.train([step])
            for call in ["train", "eval"] * toggled:
                getattr(task.opt, call)()
            scheduler.step()
            if toggled:
                task.opt.train()
        ends.append(task.everything())
    assert_identical(*ends)


@pytest.mark.parametrize("solver", SOLVERS)
def test_past_evaluates_the_projection_of_the_latent_weight(solver: str, new_task: NewTask) -> None:
    task = new_task("ternary", solver=solver, trial="past", lr=0.02)
    opt, p, bias = task.opt, task.model[0].weight, task.model[0].bias
    for step in range(6):
        at_trial = (p.detach().clone(), bias.detach().clone(), opt.scale(p))
        opt.eval()
        expected = weight_to_evaluate(opt, p)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(bias, opt.latent(bias))
        assert torch.equal(opt.scale(p)[:, :1] * (opt.codes(p).float() - 1), p)
        if step:
            assert not torch.equal(bias, at_trial[1])  # training goes on elsewhere
        opt.train()
        assert torch.equal(p, at_trial[0])
        assert torch.equal(bias, at_trial[1])
        assert torch.equal(opt.scale(p), at_trial[2])
        task.train([step])


@pytest.mark.parametrize("solver", SOLVERS)
def test_past_evaluates_in_the_metric_of_its_group(solver: str, new_task: NewTask) -> None:
    task = new_task("linear3", solver=solver, trial="past", curvature="unit").train(range(4))
    p = task.model[0].weight
    expected = blaq.project(task.opt.latent(p), None, "linear3", "channel")
    task.opt.eval()
    assert torch.equal(p, expected.values)
    assert torch.equal(task.opt.scale(p), expected.scale)


@pytest.mark.parametrize("mode", ["fresh", "none"])
def test_elsewhere_eval_changes_nothing(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    task = new_task(trial=mode).train(range(3))
    before = task.everything()
    task.opt.eval()
    assert_identical(before, task.everything())
    task.train([3])  # and no train() is needed
    assert task.opt.gradient_evaluations == (8 if mode == "fresh" else 4)


@pytest.mark.parametrize("with_closure", [True, False])
def test_no_step_while_evaluating(with_closure: bool, new_task: NewTask, assert_identical: Check) -> None:
    task = new_task(trial="past").train(range(2))
    task.closure(2)()
    task.opt.eval()
    before = task.everything()
    with pytest.raises(
        ValueError, match=r"BLAQ.step\(\): the parameters hold weights to evaluate; call train\(\) first"
    ):
        task.opt.step(task.closure(2) if with_closure else None)
    assert_identical(before, task.everything())


# --- the mode -----------------------------------------------------------------------------------------------------------------


def test_a_switched_mode_is_that_mode(new_task: NewTask, assert_identical: Check) -> None:
    """Before the first step it makes no difference whether the mode was chosen then or in the constructor."""
    modes = ("fresh", "past", "delayed", "none")
    for built_as, mode in itertools.product(modes, modes):
        expected = new_task(trial=mode).train(range(4)).everything()
        task = new_task(trial=built_as)
        task.opt.trial = mode
        assert task.opt.trial == mode
        assert_identical(expected, task.train(range(4)).everything())


def test_setting_the_mode_it_has_changes_nothing(new_task: NewTask, assert_identical: Check) -> None:
    for mode in ("fresh", "past", "delayed", "none"):
        task = new_task(trial=mode).train(range(3))
        before = task.everything()
        task.opt.trial = mode
        assert_identical(before, task.everything())


@pytest.mark.parametrize("mode", ["past", "fresh", "none"])
def test_setting_the_mode_it_has_while_evaluating_changes_nothing(
    mode: str, new_task: NewTask, assert_identical: Check
) -> None:
    expected = new_task(trial=mode).train(range(4)).everything()
    task = new_task(trial=mode).train(range(3))
    task.opt.eval()
    task.opt.trial = mode
    task.opt.train()
    assert_identical(expected, task.train([3]).everything())


def test_an_unknown_mode_is_refused(new_task: NewTask, assert_identical: Check) -> None:
    task = new_task()
    before = task.everything()
    with pytest.raises(ValueError, match=r"BLAQ\(trial='often'\): expected 'fresh', 'past', 'delayed' or 'none'"):
        task.opt.trial = "often"
    assert_identical(before, task.everything())


@pytest.mark.parametrize("evaluating", [True, False])
@pytest.mark.parametrize("to", ["fresh", "none"])
def test_leaving_past_lands_on_the_latent_weights(to: str, evaluating: bool, new_task: NewTask) -> None:
    task = new_task("linear3", trial="past").train(range(4))
    opt = task.opt
    latent = [opt.latent(p).clone() for p in task.model.parameters()]
    if evaluating:
        opt.eval()
    opt.trial = to
    for p, w in zip(task.model.parameters(), latent, strict=True):
        assert torch.equal(opt.latent(p), w)
        if opt._group(p)["grid"] is None:
            assert torch.equal(p, w)
            assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        else:
            torch.testing.assert_close(p.detach(), weight_to_evaluate(opt, p), rtol=1e-5, atol=1e-7)
            assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq", "latent", "scale"}
    task.train(range(4, 6))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", ["binary", "ternary2", "linear3", "midrise2"])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_modes_equals_the_reference(seed: int, grid: str, solver: str) -> None:
    """The reference, told to change its mode: leaving "past" means its eval(), and a new mode remembers no gradient."""
    generator = torch.Generator().manual_seed(seed)
    start, slope, target = (torch.randn(2, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    weight, bias = nn.Parameter(start.clone()), nn.Parameter(start[0].clone())
    groups = [
        {"params": [weight], "grid": grid, "granularity": "channel", "solver": solver},
        {"params": [bias]},
    ]
    opt = blaq.BLAQ(groups, lr=0.05, trial="none")
    parsed = blaq.Grid.parse(grid)
    levels = [int(level) for level in parsed.levels]
    theirs = [
        Parameter(start.flatten().tolist(), levels, row_size=6, two_scales=parsed.two_scales, solver=solver),
        Parameter(start[0].tolist()),
    ]
    reference = ReferenceOptimizer(theirs, lr=0.05, trial="none")

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return (slope.abs() * (w - target).square()).sum() + (w @ b).square().sum() + (b - 1).square().sum()

    def closure() -> None:
        opt.zero_grad()
        loss(weight, bias).backward()

    def gradient(values: list[list[float]]) -> list[list[float]]:
        w = torch.tensor(values[0], dtype=torch.float64).view(2, 6).requires_grad_()
        b = torch.tensor(values[1], dtype=torch.float64).requires_grad_()
        return [g.flatten().tolist() for g in torch.autograd.grad(loss(w, b), [w, b])]

    choose = random.Random(seed)
    for step in range(12):
        mode = choose.choice(["fresh", "past", "delayed", "none"])
        opt.trial = mode
        if reference.trial != mode:
            reference.eval()
            for q in theirs:
                q.trial_point = q.trial_grad = None
        reference.trial = mode
        for _ in range(choose.randint(1, 3)):
            opt.step(closure)
            reference.step(gradient)
        for p, q in ((weight, theirs[0]), (bias, theirs[1])):
            for ours, expected in (
                (p, q.values),
                (opt.latent(p), q.latent),
                (opt.state[p]["exp_avg_sq"], q.exp_avg_sq),
            ):
                expected = torch.tensor(expected, dtype=torch.float64).view_as(ours)
                torch.testing.assert_close(ours.detach(), expected, rtol=1e-9, atol=1e-12, msg=f"step {step}, {mode}")
