"""Mixed precision: GradScaler scales, overflow skips, autocast computes; and parameters in bfloat16, float16, float64."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import blaq

Check = Callable[..., None]
NewTask = Callable[..., Any]

in_every_mode = pytest.mark.parametrize("mode", ["fresh", "past", "delayed", "none"])


def new_scaler(scale: float = 2.0**10, **options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **options)


def scaled(task: Any, scaler: GradScaler, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        task.opt.zero_grad()
        loss: Tensor = task.loss(step)
        scaler.scale(loss).backward()
        return loss.detach()

    return closure


# --- GradScaler ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_scaler_goes_on_after_a_closure_that_raised(
    evaluation: int, new_task: NewTask, assert_identical: Check
) -> None:
    task, scaler = new_task().train(range(2)), new_scaler()
    before = task.everything()
    calls = iter(range(1, 3))

    def closure() -> Tensor:
        loss = scaled(task, scaler, 2)()
        if next(calls) == evaluation:
            raise RuntimeError("out of luck")
        return loss

    with pytest.raises(RuntimeError, match="out of luck"):
        task.opt.step(closure, scaler=scaler)
    assert_identical(before, task.everything())
    task.opt.step(scaled(task, scaler, 2), scaler=scaler)
    scaler.update()
    assert_identical(new_task().train(range(3)).everything(), task.everything())


def test_a_scaler_goes_on_after_gradients_that_do_not_match(new_task: NewTask) -> None:
    """Which is found when those of both evaluations have been unscaled."""
    task, scaler = new_task(), GradScaler("cpu", init_scale=8.0)

    def closure(missing: bool) -> Tensor:
        task.opt.zero_grad()
        loss = task.loss(0)
        scaler.scale(loss).backward()
        if missing and task.opt.in_trial:
            task.model[4].bias.grad = None
        return loss.detach()

    with pytest.raises(ValueError, match=r"only one of the two evaluations gave a gradient to '4\.bias'"):
        task.opt.step(lambda: closure(missing=True), scaler=scaler)
    task.opt.step(lambda: closure(missing=False), scaler=scaler)
    scaler.update()
    assert task.opt.gradient_evaluations == 2


def test_float16_is_not_unscaled(new_task: NewTask, assert_identical: Check) -> None:
    """What scaling has saved from vanishing would vanish then; torch refuses it too."""
    task, scaler = new_task(trial="none", dtype=torch.float16, eps=1e-4), new_scaler()
    scaled(task, scaler, 0)()
    before = task.everything()
    with pytest.raises(ValueError, match=r"cannot unscale the float16 gradient of '0.weight' .* torch.autocast"):
        scaler.step(task.opt)
    assert_identical(before, task.everything())


@pytest.mark.parametrize("options", [{}, {"trial_every": 2}, {"trial": "past"}, {"trial": "none"}], ids=str)
def test_scaled_training_equals_unscaled(options: dict[str, Any], new_task: NewTask, assert_identical: Check) -> None:
    """Bit for bit: the scale is a power of two, also when it grows."""
    expected = new_task(**options).train(range(6)).everything()
    task, scaler = new_task(**options), new_scaler(growth_interval=2)
    for step in range(6):
        task.opt.step(scaled(task, scaler, step), scaler=scaler)
        scaler.update()
    assert scaler.get_scale() == 2.0**13
    assert_identical(expected, task.everything())


@pytest.mark.parametrize("when", ["first", "second", "past", "delayed", "none"])
def test_an_overflow_skips_the_step(when: str, new_task: NewTask, assert_identical: Check) -> None:
    """Nothing moves but what any forward pass moves: BatchNorm's statistics and the random numbers, once."""
    options = {"trial": when if when in ("past", "delayed", "none") else "fresh"}
    expected = new_task(**options).train(range(3))
    expected.loss(3)
    task, scaler, calls = new_task(**options).train(range(3)), new_scaler(), []

    def closure() -> Tensor:
        calls.append(task.opt.in_trial)
        loss = scaled(task, scaler, 3)()
        if task.opt.in_trial == (when == "second"):
            task.model[4].weight.grad[0, 0] = float("inf")
        return loss

    loss = task.opt.step(closure, scaler=scaler)
    assert loss is not None
    assert calls == ([False, True] if when == "second" else [False])
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_identical(expected.everything(), task.everything())
    # The scale is right from here on, and nothing of the skipped step is left.
    random = torch.get_rng_state()
    after = expected.train([4, 5]).everything()
    torch.set_rng_state(random)
    for step in (4, 5):
        task.opt.step(scaled(task, scaler, step), scaler=scaler)
        scaler.update()
    assert_identical(after, task.everything())


def test_a_scale_too_high_comes_down(new_task: NewTask) -> None:
    """From a scale far too high training skips its way down, in either pass, and goes on from there."""
    task, scaler = new_task(), new_scaler(2.0**127)
    skipped = 0
    for step in range(40):
        evaluations = task.opt.gradient_evaluations

        def closure(step: int = step) -> None:
            task.opt.zero_grad()
            scaler.scale(1000 * task.loss(step)).backward()

        task.opt.step(closure, scaler=scaler)
        scaler.update()
        skipped += task.opt.gradient_evaluations == evaluations
    assert 3 < skipped < 20
    assert scaler.get_scale() == 2.0 ** (127 - skipped)
    assert int(task.opt.state[task.model[0].weight]["step"]) == 40 - skipped


def test_scaler_step_for_one_gradient(new_task: NewTask, assert_identical: Check) -> None:
    expected = new_task(trial="none").train(range(4)).everything()
    task, scaler = new_task(trial="none"), new_scaler()
    for step in range(4):
        scaled(task, scaler, step)()
        scaler.step(task.opt)
        scaler.update()
    assert_identical(expected, task.everything())
    scaled(task, scaler, 4)()
    task.model[0].weight.grad[0, 0] = float("inf")
    before = task.everything()
    scaler.step(task.opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_identical(before, task.everything())


def test_scaler_step_after_unscale_and_clipping(new_task: NewTask, assert_identical: Check) -> None:
    ends = []
    for scaler in (new_scaler(enabled=False), new_scaler()):
        task = new_task(trial="none")
        for step in range(4):
            scaled(task, scaler, step)()
            scaler.unscale_(task.opt)
            nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)
            scaler.step(task.opt)
            scaler.update()
        ends.append(task.everything())
    assert_identical(*ends)


@pytest.mark.parametrize("mode", ["past", "delayed", "none"])
def test_an_overflow_that_has_been_clipped_away_skips_the_step_all_the_same(
    mode: str, new_task: NewTask, assert_identical: Check
) -> None:
    """As torch's own optimizers do: what is left of an overflow is no gradient."""
    task, scaler = new_task(trial=mode).train(range(2)), new_scaler()
    scaled(task, scaler, 2)()
    task.model[0].weight.grad[0, 0] = float("inf")
    scaler.unscale_(task.opt)
    torch.nn.utils.clip_grad_value_(task.model.parameters(), 1.0)
    assert all(p.grad.isfinite().all() for p in task.model.parameters())
    before = task.everything()
    scaler.step(task.opt)
    scaler.update()
    assert_identical(before, task.everything())
    assert scaler.get_scale() == 2.0**9


def test_an_overflow_of_unscaling_itself_is_an_error(new_task: NewTask) -> None:
    """With a scale below 1. The scaler does not see it, and would neither lower its scale nor say anything."""
    task, scaler = new_task(trial="none").train(range(2)), new_scaler(2.0**-10)
    scaled(task, scaler, 2)()
    weight = task.model[0].weight
    weight.grad[0, 0] = torch.finfo(weight.dtype).max
    before = [p.detach().clone() for p in task.model.parameters()]
    with pytest.raises(ValueError, match=r"the gradient of '0\.weight' is NaN, Inf or too large to square"):
        scaler.step(task.opt)
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))


def test_a_refused_edit_leaves_no_scale_behind(new_task: NewTask) -> None:
    """The next step would divide by it."""
    task, scaler = new_task(trial="none").train(range(2)), new_scaler()
    scaled(task, scaler, 2)()
    group = task.opt.param_groups[0]
    eps, group["eps"] = group["eps"], -1.0
    with pytest.raises(ValueError, match="eps=-1"):
        scaler.step(task.opt)
    group["eps"] = eps
    assert {"grad_scale", "found_inf"}.isdisjoint(vars(task.opt))
    task.opt.step(task.closure(2))


@pytest.mark.parametrize("with_closure", [True, False])
def test_scaler_step_for_two_gradients_is_refused(
    with_closure: bool, new_task: NewTask, assert_identical: Check
) -> None:
    """And the refusal leaves no trace: the next step, called as it should be, works."""
    expected = new_task().train([0]).everything()
    task, scaler = new_task(), new_scaler()
    before, closure = task.everything(), scaled(task, scaler, 0)
    scaler.scale(torch.zeros(()))
    for p in task.model.parameters():
        p.grad = torch.ones_like(p)
    message = r"optimizer.step\(closure, scaler=scaler\)" if with_closure else "needs a closure"
    with pytest.raises(ValueError, match=message):
        scaler.step(task.opt, *([closure] if with_closure else []))
    scaler.update()
    assert_identical(before, task.everything())
    task.opt.step(closure, scaler=scaler)
    scaler.update()
    assert_identical(expected, task.everything())


def test_a_scaler_needs_the_closure(new_task: NewTask) -> None:
    task, scaler = new_task(trial="none"), new_scaler()
    scaled(task, scaler, 0)()
    with pytest.raises(
        ValueError, match=r"step\(scaler=...\): needs a closure; without one call scaler.step\(optimizer\)"
    ):
        task.opt.step(scaler=scaler)


def test_a_forgotten_update_is_an_error(new_task: NewTask, assert_identical: Check) -> None:
    task, scaler = new_task(), new_scaler()
    task.opt.step(scaled(task, scaler, 0), scaler=scaler)
    before = task.everything()
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called on this optimizer"):
        task.opt.step(scaled(task, scaler, 1), scaler=scaler)
    assert_identical(before, task.everything())


@in_every_mode
def test_a_disabled_scaler_is_none(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    expected = new_task(trial=mode).train(range(3)).everything()
    task, scaler = new_task(trial=mode), new_scaler(enabled=False)
    for step in range(3):
        task.opt.step(scaled(task, scaler, step), scaler=scaler)
        scaler.update()
    assert_identical(expected, task.everything())

    def bad() -> None:
        scaled(task, scaler, 3)()
        task.model[0].bias.grad[0] = float("nan")

    with pytest.raises(ValueError, match=r"the gradient of '0.bias' is NaN"):
        task.opt.step(bad, scaler=scaler)  # nobody would lower a scale and try again


@pytest.mark.parametrize("entry", ["step", "scaler.step"])
def test_too_large_to_square_is_no_overflow(entry: str, new_task: NewTask) -> None:
    """No scale can help against a true gradient of 1e25; skipping would go on for ever, in silence."""
    task, scaler = new_task(trial="none"), new_scaler()

    def closure() -> None:
        scaled(task, scaler, 0)()
        task.model[0].bias.grad[0] = 1e25

    def call() -> None:
        if entry == "step":
            task.opt.step(closure, scaler=scaler)
        else:
            closure()
            scaler.step(task.opt)

    with pytest.raises(ValueError, match=r"the gradient of '0.bias' is NaN, Inf or too large"):
        call()


# --- autocast -----------------------------------------------------------------------------------------------------------------


@in_every_mode
def test_autocast(mode: str, new_task: NewTask) -> None:
    task = new_task("linear3", trial=mode)
    losses = []
    for _ in range(25):

        def closure() -> Tensor:
            task.opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss: Tensor = task.loss(0)
            loss.backward()
            return loss.detach()

        losses.append(float(task.opt.step(closure)))
    assert losses[-1] < 0.5 * losses[0]
    for p in (task.model[0].weight, task.model[4].weight):
        assert p.dtype == task.opt.latent(p).dtype == torch.float32
        assert all(len(row.unique()) <= 7 for row in p)


@in_every_mode
def test_autocast_around_the_step_sees_the_weights_move(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    """Inside one autocast region torch keeps the bfloat16 copies of weights, which the step then changes."""
    ends = []
    for inside in (True, False):
        task = new_task("linear3", trial=mode)
        for step in range(4):

            def closure(task: Any = task, step: int = step, inside: bool = inside) -> None:
                task.opt.zero_grad()
                with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
                    task.loss(step).backward()

            with nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
                task.opt.step(closure)
        ends.append(task.everything())
    assert_identical(*ends)


# --- dtypes of parameters -----------------------------------------------------------------------------------------------------


def expanded(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of every entry, for one scale a row."""
    return scale.repeat_interleave(shape.numel() // len(scale), dim=0).view(shape)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 2])
@pytest.mark.parametrize(
    "bits", ["binary", "ternary", "ternary2", "linear4", "linear8", "log3", "midrise2", "midrise8"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_parameters_hold_scale_times_level(
    dtype: torch.dtype, bits: str, granularity: str | int, new_task: NewTask
) -> None:
    task, grid = new_task(bits, granularity, dtype=dtype, lr=0.02, eps=1e-3), blaq.Grid.parse(bits)
    for steps in (range(0), range(3)):
        task.train(steps)
        for p in (task.model[0].weight, task.model[4].weight):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert {task.opt.state[p][key].dtype for key in ("latent", "exp_avg", "exp_avg_sq")} == {wide}
            levels, scale = grid.levels[task.opt.codes(p).long()], task.opt.scale(p)
            assert scale.dtype == torch.float32
            of_entry = torch.where(levels < 0, expanded(scale[:, 0], p.shape), expanded(scale[:, -1], p.shape))
            assert torch.equal(p, (of_entry * levels).to(dtype))
            assert all(len(row.unique()) <= len(grid.levels) for row in p.reshape(len(scale), -1))


def test_latent_weights_collect_what_bfloat16_would_lose() -> None:
    """2^-12 added to 1 is lost in bfloat16; a thousand such steps move the latent weight all the same."""
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    opt = blaq.LAQ([{"params": [p], "grid": "binary"}], lr=2.0**-12, betas=(0.0, 0.9))
    for _ in range(1024):
        p.grad = torch.ones_like(p)
        opt.step()
    torch.testing.assert_close(opt.latent(p), torch.full((2,), 0.75), rtol=1e-4, atol=0.0)
    assert p.tolist() == [0.75, 0.75]


@in_every_mode
@pytest.mark.parametrize("way", ["step", "load_state_dict", "adopt_weights"])
def test_autocast_forgets_the_weights_that_were(way: str, mode: str, new_task: NewTask) -> None:
    """In one region around all of it, as a notebook has it: what follows computes with the new weights."""
    task = new_task("linear3", trial=mode).train(range(2))
    x = torch.randn(4, 6)
    if way == "load_state_dict":
        task.opt.eval()  # outside of it the weights come with the model
    saved = copy.deepcopy(task.opt.state_dict())
    if way == "load_state_dict":
        task.opt.train()
        task.train(range(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        task.model.eval()
        before = task.model(x)
        task.model.train()
        if way == "step":
            task.train([2])
        elif way == "load_state_dict":
            task.opt.load_state_dict(saved)
        else:
            for p in task.model.parameters():
                p.data.neg_()
            task.opt.adopt_weights()
        task.model.eval()
        after = task.model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, task.model(x))
    assert not torch.equal(after, before)


def test_autocast_forgets_the_trial_point_of_a_step_that_is_undone(new_task: NewTask) -> None:
    task = new_task().train(range(2))
    task.model.eval()
    x = torch.randn(4, 6)

    def closure() -> Tensor:
        loss: Tensor = task.closure(2)()
        if task.opt.in_trial:
            raise RuntimeError("on purpose")
        return loss

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = task.model(x)
        torch.clear_autocast_cache()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="on purpose"):
            task.opt.step(closure)
        with torch.enable_grad():  # the cache is of weights that need a gradient
            assert torch.equal(task.model(x), expected)


def test_autocast_forgets_the_trial_point_where_nothing_is_quantized() -> None:
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="nothing is quantized"):
        opt = blaq.BLAQ(model.parameters(), lr=0.5, module=model)
    x = torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        expected.sum().backward()
        opt.forward_step()
        assert not torch.equal(model(x), expected)
        opt.abandon_step()
        assert torch.equal(model(x), expected)


def test_autocast_forgets_the_trial_point_in_eval(new_task: NewTask) -> None:
    task = new_task(trial="past").train(range(2))
    task.model.eval()
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        at_the_trial_point = task.model(x)
        task.opt.eval()
        evaluated = task.model(x)
        task.opt.train()
        assert torch.equal(task.model(x), at_the_trial_point)
    task.opt.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task.model(x), evaluated)
    assert not torch.equal(evaluated, at_the_trial_point)
