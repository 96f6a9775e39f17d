"""Which weights a parameter may hold: writes from outside, memory layouts, and parameters of unusual shape."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.optim import held

Check = Callable[..., None]
NewTask = Callable[..., Any]

in_every_mode = pytest.mark.parametrize("mode", ["fresh", "past", "delayed", "none"])


# --- writes from outside ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint() -> dict[str, Tensor]:
    """Float weights for a Task's network."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (8, 6), "0.bias": (8,), "4.weight": (3, 8), "4.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("mode", "entry"),
    [
        ("fresh", "closure"),
        ("fresh", "forward_step"),
        ("past", "closure"),
        ("past", "without closure"),
        ("none", "closure"),
        ("none", "without closure"),
    ],
)
def test_weights_loaded_too_late_are_noticed(
    mode: str, entry: str, new_task: NewTask, checkpoint: dict[str, Tensor], assert_identical: Check
) -> None:
    task = new_task(trial=mode).train(range(2))
    task.closure(2)()
    task.model.load_state_dict(checkpoint, strict=False)
    before = task.everything()
    call = {
        "closure": lambda: task.opt.step(task.closure(2)),
        "without closure": task.opt.step,
        "forward_step": task.opt.forward_step,
    }[entry]
    message = (
        r"BLAQ: '0.weight' was changed outside the optimizer and is no longer the scale \* level it wrote; .* adopt_w"
    )
    for _ in range(2):  # and not only once
        with pytest.raises(ValueError, match=message):
            call()
        assert_identical(before, task.everything())


def test_codes_of_changed_weights_are_refused(new_task: NewTask) -> None:
    """Also of writes through .data, which torch does not count and step() therefore cannot see."""
    task = new_task()
    p = task.model[0].weight
    p.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"'0.weight' was changed outside the optimizer"):
        task.opt.codes(p)


def test_a_write_that_stays_on_the_grid_is_noticed_too(new_task: NewTask) -> None:
    """Zeroing ternary weights, as pruning does: the next step would bring them back from the latent weights."""
    task = new_task("ternary", trial="none").train(range(2))
    with torch.no_grad():
        task.model[0].weight[:, :3] = 0
    task.closure(2)()
    with pytest.raises(ValueError, match=r"'0.weight' was changed outside the optimizer"):
        task.opt.step()


def test_writing_the_same_values_is_no_change(new_task: NewTask, assert_identical: Check) -> None:
    """Loading a model's own weights, as a resumed run does."""
    for mode in ("fresh", "past", "delayed", "none"):
        expected = new_task(trial=mode).train(range(4)).everything()
        task = new_task(trial=mode).train(range(2))
        task.model.load_state_dict(task.model.state_dict())
        assert_identical(expected, task.train(range(2, 4)).everything())


@pytest.mark.parametrize("moment", ["built", "loaded", "copied", "stepped", "evaluating"])
def test_weights_without_a_grid_are_adopted_too(moment: str, new_task: NewTask, checkpoint: dict[str, Tensor]) -> None:
    """With "past" they have latent weights."""
    task = new_task(trial="past").train(range({"built": 0, "stepped": 1}.get(moment, 2)))
    if moment == "loaded":
        task.opt.load_state_dict(task.opt.state_dict())
    elif moment == "copied":
        task = copy.deepcopy(task)
    elif moment == "evaluating":
        task.opt.eval()
    task.model.load_state_dict(checkpoint, strict=False)
    task.opt.adopt_weights()
    for name, value in checkpoint.items():
        assert torch.equal(task.opt.latent(task.model.get_parameter(name)), value), name
    with torch.no_grad():
        task.model[0].bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"'0.bias': expected finite values"):
        task.opt.adopt_weights()


@pytest.mark.parametrize("write", [lambda p: p.zero_(), lambda p: p.neg_(), lambda p: p[:1].zero_()])
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_a_write_at_a_trial_point_is_noticed(
    write: Callable[[Tensor], Tensor], evaluating: bool, name: str, new_task: NewTask
) -> None:
    """Also one that stays on the grid, as pruning does; and it can be adopted."""
    task = new_task("ternary", trial="past").train(range(3))
    if evaluating:
        task.opt.eval()
    p = task.model.get_parameter(name)
    with torch.no_grad():
        write(p)
    refused = task.opt.train if evaluating else task.opt.step
    with pytest.raises(ValueError, match=rf"'{name}' was changed outside the optimizer"):
        refused()
    written = p.detach().clone()
    task.opt.adopt_weights()
    assert torch.equal(task.opt.latent(p), written)
    task.opt.train()
    task.train(range(3, 5))


@pytest.mark.parametrize("write", [lambda p: p.zero_(), lambda p: p[:1].zero_()])
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_a_write_is_noticed_after_an_evaluation_too(
    name: str, write: Callable[[Tensor], Tensor], new_task: NewTask
) -> None:
    """Back at the trial point it is known what it was."""
    task = new_task("ternary", trial="past").train(range(3))
    task.opt.eval()
    task.opt.train()
    with torch.no_grad():
        write(task.model.get_parameter(name))
    with pytest.raises(ValueError, match=rf"'{name}' was changed outside the optimizer"):
        task.train([3])


@pytest.mark.parametrize("moment", ["built", "copied while evaluating"])
def test_a_write_on_the_grid_is_noticed_where_no_trial_point_is_held(moment: str, new_task: NewTask) -> None:
    """What is held then can be computed from the latent weights, so the grid alone does not decide."""
    task = new_task("ternary", trial="past")
    if moment != "built":
        task.train(range(3)).opt.eval()
        task = copy.deepcopy(task)
    with torch.no_grad():
        task.model[0].weight.zero_()
    for p in task.model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"'0.weight' was changed outside the optimizer"):
        (task.opt.step if moment == "built" else task.opt.train)()


def test_a_trial_point_of_another_learning_rate_is_no_write(new_task: NewTask) -> None:
    """Which a loaded state does not tell: a scheduler that is built after it sets its own."""
    task = new_task(trial="past").train(range(3))
    task.opt.load_state_dict(task.opt.state_dict())
    for group in task.opt.param_groups:
        group["lr"] = 0.01
    task.model.load_state_dict(task.model.state_dict())  # versions do not tell either
    task.train([3])


def test_latent_weights_and_scales_are_for_reading(new_task: NewTask) -> None:
    """No graph hangs on them, and what is done to a scale is not done to the optimizer's."""
    for mode in ("past", "none"):
        task = new_task(trial=mode)
        assert not any(task.opt.latent(p).requires_grad for p in task.model.parameters())
        p = task.model[0].weight
        task.opt.scale(p).zero_()
        assert (task.opt.scale(p) > 0).all()


@pytest.mark.parametrize("value", [123.0, torch.nan])
@pytest.mark.parametrize("compile", [False, True])
def test_a_single_write_into_a_large_tensor_is_noticed(compile: bool, value: float) -> None:
    p = nn.Parameter(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)))
    opt = blaq.BLAQ([{"params": [p], "grid": "binary"}], trial="past", compile=compile)
    for _ in range(3):
        p.grad = torch.sin(100 * p.detach())
        opt.step()
    with torch.no_grad():
        p.copy_(p.clone())  # the same values
    opt.step()
    with torch.no_grad():
        p[3, 4] = value
    with pytest.raises(ValueError, match="was changed outside the optimizer"):
        opt.step()
    if value == value:
        opt.adopt_weights()
        assert opt.latent(p)[3, 4] == value
    else:
        with pytest.raises(ValueError, match="expected finite values"):
            opt.adopt_weights()


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_nothing_is_adopted_where_nothing_was_written(how: str, new_task: NewTask, assert_identical: Check) -> None:
    """Also where it is not known what the optimizer wrote; an observer is not told then."""
    task = new_task(trial="past").train(range(3))
    task.model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    task.opt.add_param_group({"params": [task.model.empty], "grid": None, "param_names": ["empty"]})
    if how == "loaded":
        task.opt.load_state_dict(task.opt.state_dict())
    else:
        task = copy.deepcopy(task)
    told: list[Any] = []
    task.opt.observers.append(SimpleNamespace(after_adoption=told.append))
    before = task.everything()
    task.opt.adopt_weights()
    assert_identical(before, task.everything())
    assert not told


def test_a_frozen_weight_without_a_grid_belongs_to_the_user(new_task: NewTask) -> None:
    """It never had a step that could be lost."""
    task = new_task(trial="past")
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    task.opt.add_param_group({"params": [frozen], "grid": None, "param_names": ["frozen"]})
    for step in range(3):
        task.train([step])
        with torch.no_grad():
            frozen.mul_(0.5)
    task.opt.eval()
    assert frozen.tolist() == [0.125] * 3


@in_every_mode
def test_memory_that_is_replaced_is_noticed(mode: str, new_task: NewTask) -> None:
    """Which versions do not tell: `torch.nn.utils.vector_to_parameters` works so."""
    task = new_task(trial=mode).train(range(2))
    p = task.model[4].weight
    p.data = p.detach().clone()  # the same values
    task.train([2])
    p.data = torch.randn_like(p)
    with pytest.raises(ValueError, match=r"'4.weight' was changed outside the optimizer"):
        task.train([3])


def test_eval_that_fails_goes_back_to_the_trial_point(
    new_task: NewTask, assert_identical: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_task(trial="past").train(range(3))
    before = task.everything()
    for name, at in (("exact_scale", 1), ("hold", 2)):
        calls = iter(range(10))
        real = getattr(held, name)

        def failing(*arguments: Any, calls: Any = calls, real: Any = real, at: int = at) -> Any:
            if next(calls) == at - 1:
                raise torch.OutOfMemoryError
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(held, name, failing)
            with pytest.raises(torch.OutOfMemoryError):
                task.opt.eval()
        assert_identical(before, task.everything())
    task.opt.eval()
    task.opt.train()
    assert_identical(before, task.everything())


@in_every_mode
def test_adopt_weights(mode: str, new_task: NewTask, checkpoint: dict[str, Tensor]) -> None:
    """The loaded values become latent weights, quantized as by a new optimizer; moments stay, training goes on."""
    task = new_task(trial=mode).train(range(3))
    moments = {p: task.opt.state[p]["exp_avg"].clone() for p in task.model.parameters()}
    task.model.load_state_dict(checkpoint, strict=False)
    task.opt.adopt_weights()
    for name, value in checkpoint.items():
        p = task.model.get_parameter(name)
        assert torch.equal(task.opt.latent(p), value)
        if name.endswith("weight"):
            q = blaq.project(value, None, "ternary", "channel")
            assert torch.equal(p, q.values)
            assert torch.equal(task.opt.scale(p), q.scale)
            assert torch.equal(task.opt.codes(p), q.codes)
        else:
            assert torch.equal(p, value)
        assert torch.equal(task.opt.state[p]["exp_avg"], moments[p])
    # The next step starts there: without a trial it is Adam's, from the gradient at the weights adopted.
    adopted = [task.model.get_parameter(name) for name in checkpoint]
    looks = [nn.Parameter(task.opt.latent(p).clone()) for p in adopted]
    adam = torch.optim.Adam(looks, lr=0.05)
    for look, p in zip(looks, adopted, strict=True):
        adam.state[look] = {key: task.opt.state[p][key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
    task.train([3])
    for look, p in zip(looks, adopted, strict=True):
        look.grad = p.grad
    adam.step()
    for look, p in zip(looks, adopted, strict=True):
        # "delayed" knows no write into a float parameter: it blends in the gradient that it remembers.
        blends = mode == "fresh" or (mode == "delayed" and "latent" not in task.opt.state[p])
        assert torch.equal(look, task.opt.latent(p)) != blends


@in_every_mode
@pytest.mark.parametrize("write", ["copy", "replace"])
def test_adopting_sees_what_was_written_past_autograd(mode: str, write: str, new_task: NewTask) -> None:
    task = new_task(trial=mode).train(range(2))
    p, weight = task.model[0].weight, torch.linspace(-1, 1, 48).view(8, 6)
    if write == "copy":
        p.data.copy_(weight)
    else:
        p.data = weight.clone()
    task.opt.adopt_weights()
    assert torch.equal(task.opt.latent(p), weight)
    task.train([2])


def test_writes_around_eval_are_noticed(
    new_task: NewTask, checkpoint: dict[str, Tensor], assert_identical: Check
) -> None:
    """Where "past" puts one set of weights in the place of another, nobody's may be lost."""
    message = r"BLAQ: '0\.weight' was changed outside the optimizer .* call adopt_weights\(\)"
    task = new_task(trial="past").train(range(2))
    task.model.load_state_dict(checkpoint, strict=False)
    before = task.everything()
    with pytest.raises(ValueError, match=message):
        task.opt.eval()
    with pytest.raises(ValueError, match=message):
        task.opt.trial = "none"
    assert_identical(before, task.everything())
    task = new_task(trial="past").train(range(2))
    task.opt.eval()
    task.model.load_state_dict(checkpoint, strict=False)
    before = task.everything()
    with pytest.raises(ValueError, match=message):
        task.opt.train()
    assert_identical(before, task.everything())


def test_a_write_around_eval_is_noticed_before_the_first_step_too(new_task: NewTask) -> None:
    """Of a weight without a grid: in training it belongs to the user until then, in `eval` it would be thrown away."""
    task = new_task(trial="past")
    task.opt.eval()
    with torch.no_grad():
        task.model[0].bias.fill_(7.0)
    with pytest.raises(ValueError, match=r"'0\.bias' was changed outside the optimizer and is no longer what it wrote"):
        task.opt.train()
    task.opt.adopt_weights()
    task.opt.train()
    assert task.model[0].bias.tolist() == task.opt.latent(task.model[0].bias).tolist() == [7.0] * 8


def test_weights_of_an_evaluation_can_be_adopted(new_task: NewTask, checkpoint: dict[str, Tensor]) -> None:
    task = new_task(trial="past").train(range(2))
    task.opt.eval()
    task.model.load_state_dict(checkpoint, strict=False)
    task.opt.adopt_weights()
    held = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    for name, weight in checkpoint.items():
        assert torch.equal(task.opt.latent(task.model.get_parameter(name)), weight)
    assert torch.equal(held["0.bias"], checkpoint["0.bias"])
    task.opt.train()
    for name in checkpoint:
        assert torch.equal(task.model.get_parameter(name), held[name])
    state = task.opt.state[task.model[0].weight]
    assert {"trial", "trial_scale"}.isdisjoint(state)
    task.train([2, 3])


@pytest.mark.parametrize("bits", ["ternary", "ternary2"])
def test_weights_adopted_in_an_evaluation_are_trained_with_their_scale(bits: str, new_task: NewTask) -> None:
    """There is no trial point of theirs yet, so training goes on from the same values."""
    task = new_task(bits, trial="past").train(range(3))
    p, weight = task.model[0].weight, torch.linspace(-1, 1, 48).view(8, 6)
    expected = blaq.project(weight, None, bits, "channel")
    task.opt.eval()
    with torch.no_grad():
        p.copy_(weight)
    task.opt.adopt_weights()
    for call in (task.opt.train, task.opt.eval):
        assert torch.equal(p, expected.values)
        assert torch.equal(task.opt.scale(p), expected.scale)
        assert torch.equal(task.opt.codes(p), expected.codes)
        call()


@in_every_mode
def test_adopting_leaves_alone_what_nobody_wrote(mode: str, new_task: NewTask, assert_identical: Check) -> None:
    task = new_task(trial=mode).train(range(3))
    before = task.everything()
    task.opt.adopt_weights()
    assert_identical(before, task.everything())


def test_adopting_a_bad_weight_changes_nothing(
    new_task: NewTask, checkpoint: dict[str, Tensor], assert_identical: Check
) -> None:
    task = new_task()
    checkpoint["4.weight"][1, 1] = float("nan")
    task.model.load_state_dict(checkpoint, strict=False)
    before = task.everything()
    with pytest.raises(ValueError, match=r"'4.weight': expected finite values, found 1 NaN or Inf of 24"):
        task.opt.adopt_weights()
    assert_identical(before, task.everything())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_is_refused_before_any_is_quantized(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = value
    first = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'1.weight': expected finite values"):
        blaq.LAQ(blaq.param_groups(model, 1))
    assert torch.equal(model[0].weight, first)


def test_latent_weights_that_overflow_are_an_error_by_name() -> None:
    """Training that diverges, here by a decay beyond all bounds, stops before the parameter holds NaN."""
    p = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
    opt = blaq.LAQ([{"params": [p], "grid": "ternary", "param_names": ["p"]}], lr=1.0, weight_decay=1e20)
    p.grad = torch.tensor([1.0, -1.0, 1.0])

    def diverge() -> None:
        for _ in range(4):
            opt.step()

    with pytest.raises(ValueError, match="'p'"):
        diverge()
    assert torch.isfinite(p).all()


# --- layouts and shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", 9])
@pytest.mark.parametrize("grid", ["binary", "linear3", "ternary2"])
@in_every_mode
def test_memory_layout_makes_no_difference(
    mode: str, grid: str, granularity: str | int, assert_identical: Check
) -> None:
    ends: list[Any] = []
    for layout in ("contiguous", "channels last", "transposed"):
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(4, 2, 3, 3, generator=generator)
        if layout == "channels last":
            value = value.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            value = value.transpose(0, 3).contiguous().transpose(0, 3)
        p = nn.Parameter(value)
        assert p.is_contiguous() == (layout == "contiguous")
        # It adds up in float64, so the order of the sums is lost in the rounding to float32; following need not.
        group = {"params": [p], "grid": grid, "granularity": granularity, "solver": "exact"}
        opt = blaq.BLAQ([group], lr=0.05, trial=mode)
        for _ in range(5):

            def closure(p: nn.Parameter = p, opt: blaq.BLAQ = opt) -> None:
                opt.zero_grad()
                (p.square().sum() + p.sin().sum()).backward()

            opt.step(closure)
        assert p.stride() == value.stride()
        ends.append([p.detach(), opt.codes(p), dict(opt.state[p])])
    assert_identical(ends[0], ends[1])
    assert_identical(ends[0], ends[2])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("solver", ["exact", "alternating"])
@pytest.mark.parametrize("grid", ["binary", "ternary2", "linear3", "midrise2", None])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (), (1,), (1, 1)], ids=str)
def test_empty_and_single_weights(shape: tuple[int, ...], grid: str | None, solver: str, granularity: str) -> None:
    p, other = nn.Parameter(torch.full(shape, -0.75)), nn.Parameter(torch.randn(3))
    groups = [
        {"params": [p], "grid": grid, "granularity": granularity, "solver": solver},
        {"params": [other], "grid": 1},
    ]
    for mode in ("fresh", "past", "delayed", "none"):
        opt = blaq.BLAQ(groups, lr=0.125, betas=(0.0, 0.0), eps=1e-12, trial=mode)
        before = p.detach().clone()

        def closure(opt: blaq.BLAQ = opt) -> None:
            opt.zero_grad()
            (p.sum() + other.sum()).backward()

        opt.step(closure)
        opt.eval()
        assert p.shape == shape
        # A constant gradient: every mode takes one step of the learning rate; a weight alone in its row fits exactly.
        torch.testing.assert_close(p.detach(), before - 0.125)
        if grid is not None:
            assert opt.codes(p).shape == shape


@pytest.mark.parametrize("mode", ["fresh", "past", "delayed", "none"])
@pytest.mark.parametrize("grid", ["log4", "linear3"])
def test_no_weights_of_half_precision(grid: str, mode: str) -> None:
    """All that is empty has the same address, whatever its dtype."""
    parameters = [nn.Parameter(torch.empty(0, 4).bfloat16()), nn.Parameter(torch.ones(2, 4).bfloat16())]
    opt = blaq.BLAQ([{"params": parameters, "grid": grid}], trial=mode)

    def closure() -> None:
        opt.zero_grad()
        sum(p.sum() for p in parameters).backward()

    for _ in range(2):
        opt.step(closure)
    assert [float(opt.state[p]["step"]) for p in parameters] == [2, 2]


@pytest.mark.parametrize("compile", [False, True])
def test_rows_of_nothing_are_stepped_together(compile: bool) -> None:
    parameters = [nn.Parameter(torch.empty(0, 5)) for _ in range(2)] + [nn.Parameter(torch.ones(2, 5))]
    opt = blaq.LAQ([{"params": parameters, "grid": "ternary", "granularity": "channel"}], compile=compile)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        opt.step()
    assert [float(opt.state[p]["step"]) for p in parameters] == [3, 3, 3]
