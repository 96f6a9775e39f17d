"""What step() promises its caller: how often the closure runs, at which weights, with which gradients left behind."""

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq

Check = Callable[..., None]
NewTask = Callable[..., Any]

in_every_mode = pytest.mark.parametrize("mode", ["fresh", "past", "delayed", "none"])


# --- how often, and with what result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({}, [2, 2, 2, 2]),
        ({"trial_every": 3}, [1, 1, 2, 1, 1, 2, 1]),
        ({"trial": "none"}, [1, 1, 1]),
        ({"trial": "past"}, [1, 1, 1]),
        ({"trial": "delayed"}, [1, 1, 1]),
    ],
    ids=str,
)
def test_evaluations_of_the_closure(options: dict[str, Any], pattern: list[int], new_task: NewTask) -> None:
    task = new_task(**options)
    calls: list[tuple[bool, bool, float]] = []
    for step, expected in enumerate(pattern):
        calls.clear()

        def closure(step: int = step) -> Tensor:
            enabled = torch.is_grad_enabled()
            loss = task.closure(step)()
            calls.append((task.opt.in_trial, enabled, float(loss)))
            return loss

        with torch.no_grad():
            result = task.opt.step(closure)
        assert [trial for trial, _, _ in calls] == [False, True][:expected]
        assert all(enabled for _, enabled, _ in calls)
        assert float(result) == calls[0][2]  # of the first evaluation
        assert len({loss for _, _, loss in calls}) == expected  # the second one is somewhere else
        assert task.opt.gradient_evaluations == sum(pattern[: step + 1])
        assert not task.opt.in_trial


@pytest.mark.parametrize("bits", ["binary", "ternary", "ternary2", "linear3", "log3", "midrise2"])
def test_closure_sees_levels_only_and_the_second_time_those_of_the_trial_point(bits: str, new_task: NewTask) -> None:
    task, grid = new_task(bits), blaq.Grid.parse(bits)
    opt, quantized = task.opt, [task.model[0].weight, task.model[4].weight]
    for step in range(5):
        looks = [nn.Parameter(opt.latent(p).clone()) for p in quantized]
        adam = torch.optim.Adam(looks, lr=0.05)  # the trial point is where Adam would go from the latent weight
        for look, p in zip(looks, quantized, strict=True):
            adam.state[look] = {key: opt.state[p][key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        seen, gradients = [], []

        def closure(step: int = step, seen: list[Any] = seen, gradients: list[Any] = gradients) -> None:
            seen.append([p.detach().clone() for p in quantized])
            task.closure(step)()
            gradients.append([p.grad.clone() for p in quantized])

        scales = [opt.scale(p) for p in quantized]
        opt.step(closure)
        for p, scale in zip(seen[0], scales, strict=True):
            for row in range(len(p)):
                levels = {float(scale[row, 0 if k < 0 else -1] * k) for k in grid.levels}
                assert set(p[row].tolist()) <= levels
        for look, gradient in zip(looks, gradients[0], strict=True):
            look.grad = gradient
        adam.step()
        for look, p in zip(looks, seen[1], strict=True):
            d = adam.state[look]["exp_avg_sq"].sqrt() / (1 - 0.999 ** (step + 1)) ** 0.5 + 1e-8
            assert torch.equal(p, blaq.project(look.detach(), d, grid, "channel").values)


@pytest.mark.parametrize("mode", ["past", "delayed", "none"])
def test_step_without_closure_equals_step_with_it(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    with_closure = new_task(trial=mode).train(range(6)).everything()
    task = new_task(trial=mode)
    for step in range(6):
        task.closure(step)()
        assert task.opt.step() is None
    assert_identical(with_closure, task.everything())


def test_fresh_without_closure_says_how_to_write_one(new_task: NewTask, assert_identical: Check) -> None:
    task = new_task()
    task.closure(0)()
    before = task.everything()
    with pytest.raises(ValueError, match=r"BLAQ.step\(\): trial='fresh' .* needs a closure") as error:
        task.opt.step()
    assert_identical(before, task.everything())
    # The snippet runs as it stands.
    lines = str(error.value).splitlines()
    snippet = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    names = {"optimizer": task.opt, "model": task.model, "loss_function": nn.functional.mse_loss}
    exec(snippet, {**names, "inputs": torch.ones(4, 6), "targets": torch.zeros(4, 3)})
    assert task.opt.gradient_evaluations == 2


def test_a_step_between_trials_needs_no_closure(new_task: NewTask) -> None:
    task = new_task(trial_every=2)
    task.closure(0)()
    task.opt.step()
    with pytest.raises(ValueError, match="needs a closure"):
        task.opt.step()
    assert task.opt.gradient_evaluations == 1


def test_hooks_run_once_a_step(new_task: NewTask) -> None:
    task, calls = new_task(), []
    task.opt.register_step_pre_hook(lambda *_: calls.append("before"))
    task.opt.register_step_post_hook(lambda *_: calls.append("after"))
    task.train([0])
    assert calls == ["before", "after"]


def test_a_batch_without_any_gradient_changes_no_weight(new_task: NewTask, assert_identical: Check) -> None:
    task = new_task().train(range(2))
    before = task.everything()
    task.opt.step(task.opt.zero_grad)
    assert_identical(before, task.everything(), ignore=("steps", "gradient_evaluations"))


# --- p.grad ------------------------------------------------------------------------------------------------------------------


@in_every_mode
def test_grad_after_a_step_is_the_last_gradient_untouched(mode: str, new_task: NewTask) -> None:
    task = new_task(trial=mode)
    for step in range(4):
        last: dict[Tensor, tuple[Tensor, Tensor]] = {}

        def closure(step: int = step, last: dict[Tensor, Any] = last) -> None:
            task.closure(step)()
            last.update({p: (p.grad, p.grad.clone()) for p in task.model.parameters()})

        task.opt.step(closure)
        for p, (tensor, value) in last.items():
            assert p.grad is tensor
            assert torch.equal(p.grad, value)


@in_every_mode
def test_gradients_accumulated_in_place_give_the_same(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    expected = new_task(trial=mode).train(range(5)).everything()
    task = new_task(trial=mode)
    for step in range(5):
        task.opt.step(task.closure(step, set_to_none=False))
    assert_identical(expected, task.everything())


@in_every_mode
def test_frozen_parameters_rest_and_thaw(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    """While a layer is frozen it keeps weights and state; its own step count goes on where it stopped."""
    task = new_task(trial=mode).train(range(2))
    layer, opt = task.model[0].weight, task.opt
    opt.zero_grad()
    layer.requires_grad_(False)
    before, kept = task.everything(), layer.detach().clone()
    task.train(range(2, 5))
    first = 0  # the quantized group comes first, and the layer in it
    assert_identical(before["parameters"][first], task.everything()["parameters"][first])
    assert_identical(before["state"][first], task.everything()["state"][first])
    layer.requires_grad_(True)
    task.train(range(5, 7))
    assert not torch.equal(layer, kept)
    assert int(opt.state[layer]["step"]) == 4
    assert int(opt.state[task.model[4].weight]["step"]) == 7


def test_tied_weights_are_one_parameter() -> None:
    """Two layers that share a weight: one state, the sum of both gradients; the same as a function that uses it twice."""
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[0].weight
    lone = nn.Linear(4, 4, bias=False)
    lone.load_state_dict(tied[0].state_dict())
    ends = []
    for module, forward in ((tied, tied), (lone, lambda x: lone(torch.tanh(lone(x))))):
        opt = blaq.BLAQ(blaq.param_groups(module, 2), lr=0.05, module=module)

        def closure(opt: blaq.BLAQ = opt, forward: Any = forward) -> None:
            opt.zero_grad()
            (forward(torch.eye(4)) - 1).square().mean().backward()

        for _ in range(5):
            opt.step(closure)
        assert len(opt.state) == 1
        ends.append(next(module.parameters()).detach())
    assert torch.equal(*ends)
    assert tied[2].weight is tied[0].weight


def test_a_closure_that_adds_to_earlier_gradients_is_refused(new_task: Any, assert_identical: Any) -> None:
    task = new_task().train(range(2))
    task.closure(2)()  # gradients of another mini-batch, to which the next are added

    def adding() -> None:
        task.loss(3).backward()

    state = task.everything()["state"]
    with pytest.raises(
        ValueError, match=r"leaves '0\.weight' the gradient it had before.*zero_grad\(\) in the closure"
    ):
        task.opt.step(adding)
    assert_identical(state, task.everything()["state"])
    task.opt.zero_grad()
    task.opt.step(adding)  # nothing to add to: the same as with zero_grad() inside
    task.opt.step(task.closure(4, set_to_none=False))


@pytest.mark.parametrize(
    ("grid", "compile"),
    [
        *((grid, False) for grid in ("binary", "ternary", "linear3", "linear4", "midrise2", "log3")),
        *((grid, True) for grid in ("binary", "linear4", "log3")),  # no threshold, rounding, thresholds one by one
    ],
)
def test_a_trained_layer_takes_every_level(grid: str, compile: bool) -> None:
    """As many distinct values as there are levels, exactly: no two of them are one, none is missing."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    opt = blaq.LAQ([{"params": [p], "grid": grid}], lr=0.01, compile=compile)
    for _ in range(4):
        p.grad = torch.randn(64, 64, generator=generator)
        opt.step()
    assert p.unique().numel() == len(blaq.Grid.parse(grid).levels)


@pytest.mark.parametrize("trial", ["none", "fresh", "past"])
def test_the_closed_form_is_exact_to_the_last_digit(trial: str) -> None:
    """With the exact solver and curvature 1: the mean of magnitudes, rounded once."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(32, 3001, generator=generator))
    group = {"params": [p], "grid": "binary", "granularity": "channel", "solver": "exact"}
    opt = blaq.BLAQ([group], lr=0.1, trial=trial, curvature="unit", compile=False)
    for _ in range(2):
        for half in (opt.forward_step, opt.backtrack_step) if trial == "fresh" else (opt.step,):
            p.grad = torch.randn(p.shape, generator=generator)
            half()
        at_trial = opt.scale(p)
        opt.eval()
        expected = opt.latent(p).double().abs().mean(1, keepdim=True).float()
        assert torch.equal(opt.scale(p), expected)
        opt.train()
        assert torch.equal(at_trial, expected) == (trial != "past")


@pytest.mark.parametrize("solver", ["exact", "alternating"])
@pytest.mark.parametrize("trial", ["none", "fresh", "past", "delayed"])
def test_a_parameter_in_bfloat16_is_stepped_as_one_in_float32(trial: str, solver: str) -> None:
    """Only what it holds is rounded: not the trial point, nor the metric, which are computed in its place."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 40_000, generator=generator).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    opts = [
        blaq.BLAQ([{"params": [p], "grid": "linear3", "solver": solver}], lr=0.01, trial=trial, compile=False)
        for p in (narrow, wide)
    ]
    for _ in range(3):
        for half in ("forward_step", "backtrack_step") if trial == "fresh" else ("step",):
            grad = torch.randn(start.shape, generator=generator).bfloat16()
            for p, opt in zip((narrow, wide), opts, strict=True):
                p.grad = grad.to(p.dtype)
                getattr(opt, half)()
            assert torch.equal(narrow, wide.bfloat16())
            assert torch.equal(opts[0].scale(narrow), opts[1].scale(wide))
        assert torch.equal(opts[0].latent(narrow), opts[1].latent(wide))
