"""What a step that fails leaves behind: everything as before it, whoever failed, and a message that names the parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.optim import finite, running, update

Check = Callable[..., None]
NewTask = Callable[..., Any]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("when", ["first", "second", "past", "delayed", "none"])
def test_a_gradient_that_is_not_finite(when: str, value: float, new_task: NewTask, assert_identical: Check) -> None:
    """1e30 is finite in float32, its square is not: the second moment would be lost."""
    options = {"trial": when if when in ("past", "delayed", "none") else "fresh"}
    expected = new_task(**options).train([0, 1, 2, 4, 5]).everything()
    task = new_task(**options).train([0, 1, 2])
    before = task.everything()
    left: dict[Tensor, Tensor] = {}

    def closure() -> Tensor:
        loss: Tensor = task.closure(3)()
        if task.opt.in_trial == (when == "second"):
            task.model[4].weight.grad[1, 2] = value
        left.update({p: p.grad.clone() for p in task.model.parameters()})
        return loss

    with pytest.raises(ValueError, match=r"BLAQ: the gradient of '4.weight' is NaN, Inf or too large"):
        task.opt.step(closure)
    assert_identical(before, task.everything())
    assert_identical(left, {p: p.grad for p in task.model.parameters()})
    assert_identical(expected, task.train([4, 5]).everything())  # as if the bad batch had not been


@pytest.mark.parametrize("place", [0, 41])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("layout", ["float32", "bfloat16", "channels last", "transposed"])
def test_a_bad_gradient_of_every_size_and_layout(
    layout: str, large: bool, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones are looked at together, large ones one by one."""
    if large:
        monkeypatch.setattr(finite, "_LARGE", 2)
    dtype = torch.bfloat16 if layout == "bfloat16" else torch.float32
    p, q = (nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((2, 3, 7, 1), (6, 7)))
    opt = blaq.LAQ([{"params": [p], "grid": "binary"}, {"params": [q]}])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    for bad in (p, q):
        gradient = torch.ones_like(bad).flatten()
        gradient[place] = torch.inf
        if layout == "transposed":
            gradient = gradient.view(bad.shape[::-1]).permute(*range(bad.ndim)[::-1])
        gradient = gradient.view(bad.shape) if gradient.ndim == 1 else gradient
        last = layout == "channels last" and bad.ndim == 4
        good, bad.grad = bad.grad, gradient.contiguous(memory_format=torch.channels_last) if last else gradient
        with pytest.raises(ValueError, match=r"the gradient of '.*' is NaN"):
            opt.step()
        bad.grad = good
    opt.step()


@pytest.mark.parametrize("mode", ["none", "past", "delayed"])
def test_a_bad_gradient_without_closure(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    task = new_task(trial=mode).train(range(2))
    task.closure(2)()
    task.model[0].weight.grad[0, 0] = float("nan")
    task.model[4].bias.grad[0] = float("inf")
    before = task.everything()
    with pytest.raises(ValueError, match=r"the gradient of '0.weight', '4.bias' is NaN"):
        task.opt.step()
    assert_identical(before, task.everything())


def test_a_parameter_without_a_name_is_told_by_its_place() -> None:
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    opt = blaq.LAQ([{"params": [p], "grid": "binary"}, {"params": [p.detach().clone().requires_grad_(), q]}])
    p.grad, q.grad = torch.zeros(3), torch.full((3,), float("nan"))
    with pytest.raises(ValueError, match=r"LAQ: the gradient of 'group 1 \[1\]'"):
        opt.step()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["start", "forward", "end"])
@pytest.mark.parametrize("when", ["first", "second", "past", "delayed", "none"])
def test_a_closure_that_raises(
    when: str, place: str, error: type[BaseException], new_task: NewTask, assert_identical: Check
) -> None:
    options = {"trial": when if when in ("past", "delayed", "none") else "fresh"}
    expected = new_task(**options).train([0, 1, 2, 4, 5]).everything()
    task = new_task(**options).train([0, 1, 2])
    before = task.everything()
    left: dict[Tensor, Tensor | None] = {}

    def closure() -> None:
        bad = task.opt.in_trial == (when == "second")
        if bad and place == "start":
            left.update({p: p.grad for p in task.model.parameters()})
            raise error("stop")
        task.opt.zero_grad()
        loss = task.loss(3)  # BatchNorm and dropout have run
        if bad and place == "forward":
            left.update({p: p.grad for p in task.model.parameters()})
            raise error("stop")
        loss.backward()
        if bad:
            left.update({p: p.grad for p in task.model.parameters()})
            raise error("stop")

    with pytest.raises(error, match="stop"):
        task.opt.step(closure)
    assert not task.opt.in_trial
    assert_identical(before, task.everything())
    assert all(p.grad is gradient for p, gradient in left.items())
    assert_identical(expected, task.train([4, 5]).everything())


@pytest.mark.parametrize("entry", ["closure", "forward_step"])
def test_an_interruption_on_the_way_to_the_trial_point(
    entry: str, new_task: NewTask, assert_identical: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while some parameters are there already."""
    task = new_task().train(range(2))
    task.closure(2)()
    before, calls = task.everything(), []
    forward = update.forward

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(update, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        task.opt.step(task.closure(2)) if entry == "closure" else task.opt.forward_step()
    assert_identical(before, task.everything())
    assert not task.opt.in_trial


@pytest.mark.parametrize("missing_in", ["first", "second"])
def test_a_gradient_in_one_evaluation_only(missing_in: str, new_task: NewTask, assert_identical: Check) -> None:
    task = new_task().train(range(2))
    before = task.everything()

    def closure() -> None:
        task.closure(2)()
        if task.opt.in_trial == (missing_in == "second"):
            task.model[4].weight.grad = None

    with pytest.raises(ValueError, match=r"only one of the two evaluations gave a gradient to '4.weight'; both must"):
        task.opt.step(closure)
    assert_identical(before, task.everything())


@pytest.mark.parametrize("entry", ["closure", "without closure", "halves"])
def test_a_sparse_gradient_is_refused_by_name(entry: str, everything: Any, assert_identical: Check) -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    groups = [{"params": [layer.weight], "param_names": ["words"], "grid": "binary"}]
    opt = blaq.BLAQ(groups, trial="none" if entry == "without closure" else "fresh", module=layer)

    def closure() -> None:
        opt.zero_grad()
        layer(torch.tensor([1, 2])).sum().backward()

    if entry != "closure":
        closure()
    before = everything(opt)
    call = {"closure": lambda: opt.step(closure), "without closure": opt.step, "halves": opt.forward_step}[entry]
    with pytest.raises(ValueError, match=r"'words' has a sparse gradient; use sparse=False"):
        call()
    assert_identical(before, everything(opt))


@pytest.mark.parametrize("retain", [False, True])
def test_a_forward_pass_outside_the_closure_gives_a_hint(
    retain: bool, new_task: NewTask, assert_identical: Check
) -> None:
    """The second backward meets a freed graph, or one whose weights have moved on."""
    task = new_task()
    loss = task.loss(0)
    before = task.everything()

    def closure() -> Tensor:
        task.opt.zero_grad()
        loss.backward(retain_graph=retain)
        return loss

    with pytest.raises(RuntimeError) as error:
        task.opt.step(closure)
    assert_identical(before, task.everything())
    assert any("must compute the forward pass each time" in note for note in getattr(error.value, "__notes__", []))


def test_a_single_gradient_that_is_too_large_to_square_is_an_error() -> None:
    """A norm of one entry is that entry: finite, where its square is not."""
    p = nn.Parameter(torch.ones(1))
    opt = blaq.LAQ([{"params": [p], "grid": "binary", "param_names": ["p"]}])
    p.grad = torch.full((1,), 1e30)
    with pytest.raises(ValueError, match="the gradient of 'p' is NaN, Inf or too large"):
        opt.step()
    assert float(opt.state[p]["step"]) == 0


@pytest.mark.parametrize("solver", ["exact", "alternating"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latent_weights_spoiled_between_steps_are_an_error(solver: str, bad: float) -> None:
    """They are not read at every step, but where someone wrote to them since the last."""
    p = nn.Parameter(torch.linspace(-1, 1, 12))
    opt = blaq.LAQ([{"params": [p], "grid": "ternary2", "solver": solver, "param_names": ["p"]}])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    before = p.detach().clone()
    opt.state[p]["latent"][3] = bad
    with pytest.raises(ValueError, match="the latent weight of 'p' is NaN, Inf"):
        opt.step()
    assert torch.equal(p, before)


def test_a_spoiled_latent_weight_in_the_place_of_the_last_one_is_an_error() -> None:
    """Even if it has been written to as often."""
    p = nn.Parameter(torch.linspace(-1, 1, 12))
    opt = blaq.LAQ([{"params": [p], "grid": "ternary", "param_names": ["p"]}])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    spoiled = torch.full_like(p, torch.nan, requires_grad=False)
    while spoiled._version < opt.state[p]["latent"]._version:
        spoiled.mul_(1)
    opt.state[p]["latent"] = spoiled
    with pytest.raises(ValueError, match="the latent weight of 'p' is NaN, Inf"):
        opt.step()


@pytest.mark.parametrize("steps", [0, 1, 4], ids=lambda steps: f"after {steps}")
@pytest.mark.parametrize("mode", ["fresh", "none", "past", "delayed"])
@pytest.mark.parametrize("many", [False, True], ids=["alone", "together"])
def test_an_interruption_inside_the_solver_leaves_weights_on_their_grid(
    mode: str, many: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is half taken then, but no parameter holds what is not quantized, and nobody is told to adopt it."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(1 + many)]
    parameters.append(nn.Parameter(torch.randn(5, 3, generator=generator)))  # stepped after the others
    groups = [{"params": parameters, "grid": "ternary", "solver": "exact"}]
    opt = blaq.BLAQ(groups, lr=0.5, trial=mode)

    def step() -> None:
        for half in (opt.forward_step, opt.backtrack_step) if mode == "fresh" else (opt.step,):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            half()

    for _ in range(steps):
        step()
    latent = opt.latent(parameters[-1]).clone()

    def interrupted(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        solve = running.solve
        calls = iter([solve, solve, interrupted] if mode == "fresh" else [interrupted])  # on the way back
        patch.setattr(running, "solve", lambda *args, **kwargs: next(calls)(*args, **kwargs))
        with pytest.raises(KeyboardInterrupt):
            step()
    if steps or mode != "past":
        assert torch.equal(opt.latent(parameters[-1]), latent)
    for p in parameters:
        assert opt.codes(p) is not None  # refuses what is not on the grid
    step()
