"""What torch and its tools do with any optimizer, they can do with this one: schedulers, copies, hooks, compilation."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

import blaq

INPUTS = torch.randn(20, 8, 5, generator=torch.Generator().manual_seed(2))
MODES: dict[str, dict[str, Any]] = {
    "none": {"trial": "none"},
    "fresh": {"trial": "fresh"},
    "past": {"trial": "past"},
    "delayed": {"trial": "delayed"},
}
Check = Callable[..., None]
Everything = Callable[[blaq.BLAQ], dict[str, Any]]


def build(mode: str = "fresh", seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, blaq.BLAQ]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5)).to(dtype)
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary", "channel"), lr=0.05, module=model, **MODES[mode])
    return model, opt


def train(model: nn.Module, opt: blaq.BLAQ, steps: int, *, call: Callable[[Tensor], Tensor] | None = None) -> None:
    """Steps with data and dropout masks that depend on the number of the step alone."""
    for _ in range(steps):
        step = opt.param_groups[0]["steps"]
        torch.manual_seed(step)
        x = INPUTS[step].to(next(model.parameters()).dtype)

        def closure(x: Tensor = x) -> Tensor:
            opt.zero_grad()
            loss = ((call or model)(x) - x).square().mean()
            loss.backward()
            return loss

        opt.step(closure)


# --- schedulers ---------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.8),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 5),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(opt, 0.5)], [3]
    ),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 7),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    assert set(lr_scheduler.__all__) - set(SCHEDULERS) == {"LRScheduler"}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch 2.6's SequentialLR
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("method", ["BLAQ", "LAQ", "past"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_adam(name: str, method: str, tensor_lr: bool) -> None:
    def trace(make: Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]) -> list[Any]:
        weight, bias = nn.Parameter(torch.tensor([[0.5, -1.0, 0.2]])), nn.Parameter(torch.zeros(1))
        opt = make([{"params": [weight]}, {"params": [bias]}], torch.tensor(0.02) if tensor_lr else 0.02)

        def closure() -> Tensor:
            opt.zero_grad()
            loss = ((weight @ INPUTS[0, :3, :3]).sum() - bias).square().mean()
            loss.backward()
            return loss

        schedule, seen = SCHEDULERS[name](opt), []
        for _ in range(10):
            opt.step(closure)
            schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
            seen.append([(float(group["lr"]), tuple(group["betas"])) for group in opt.param_groups])
        return seen

    def ours(groups: list[dict[str, Any]], lr: Any) -> blaq.BLAQ:
        groups[0]["grid"] = "binary"
        return (
            blaq.LAQ(groups, lr)
            if method == "LAQ"
            else blaq.BLAQ(groups, lr, trial={"BLAQ": "fresh"}.get(method, method))
        )

    expected = trace(lambda groups, lr: torch.optim.Adam(groups, lr, foreach=False))
    assert trace(ours) == expected
    assert len({lr for step in expected for lr, _ in step}) > 1
    assert (len({betas for step in expected for _, betas in step}) > 1) == (name in ("CyclicLR", "OneCycleLR"))


def test_the_scheduled_betas_and_lr_are_those_of_the_step() -> None:
    """Not those of the constructor: a schedule must reach the arithmetic."""

    def final(lr: float, betas: tuple[float, float]) -> Tensor:
        model, opt = build("none")
        train(model, opt, 2)
        for group in opt.param_groups:
            group.update(lr=lr, betas=betas)
        train(model, opt, 1)
        return opt.latent(model[0].weight).clone()

    same = final(0.05, (0.9, 0.999))
    assert not torch.equal(same, final(0.01, (0.9, 0.999)))
    assert not torch.equal(same, final(0.05, (0.85, 0.999)))


# --- copies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_as_the_original_would(
    how: Callable[[Any], Any], mode: str, everything: Everything, assert_identical: Check
) -> None:
    model, opt = build(mode)
    train(model, opt, 3)
    before = everything(opt)
    model2, opt2 = how((model, opt))
    train(model2, opt2, 3)
    after = everything(opt2)
    assert_identical(everything(opt), before, ignore=("random",))
    train(model, opt, 3)
    assert_identical(everything(opt), after)
    assert {id(p) for p in model2.parameters()} == {id(p) for group in opt2.param_groups for p in group["params"]}
    assert opt2.module is model2


def test_the_optimizer_copied_alone_brings_its_own_parameters(everything: Everything, assert_identical: Check) -> None:
    model, opt = build()
    train(model, opt, 2)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.9)  # patches opt.step
    twin = copy.deepcopy(opt)
    assert_identical(everything(twin), everything(opt))
    assert isinstance(twin.module, nn.Module)
    before = everything(opt)
    train(twin.module, twin, 2)
    assert_identical(everything(opt), before, ignore=("random",))
    twin.add_param_group({"params": [nn.Parameter(torch.randn(2, 3))], "param_names": ["new"], "grid": "binary"})
    assert twin.param_groups[-1]["steps"] == 4
    train(model, opt, 1)
    scheduler.step()


def test_it_is_an_optimizer_and_prints_as_one() -> None:
    _, opt = build()
    assert isinstance(opt, torch.optim.Optimizer)
    text = repr(opt)
    assert text.startswith("BLAQ (\nParameter Group 0\n")
    assert "    grid: ternary\n" in text
    assert "    lr: 0.05\n" in text
    assert text == torch.optim.Optimizer.__repr__(opt)


def test_named_parameters_are_taken_as_torch_takes_them() -> None:
    model = nn.Linear(3, 2)
    weight, bias = model.named_parameters()
    opt = blaq.BLAQ([{"params": [weight], "grid": "ternary"}, {"params": [bias]}])
    assert [group["param_names"] for group in opt.param_groups] == [["weight"], ["bias"]]
    assert opt.param_groups[0]["params"][0] is model.weight
    assert model.weight.unique().numel() <= 3
    twin = blaq.BLAQ([{"params": [weight], "grid": "ternary"}, {"params": [bias]}])
    twin.load_state_dict(opt.state_dict())
    assert [group["param_names"] for group in twin.param_groups] == [["weight"], ["bias"]]
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(ValueError, match="'weight' was changed outside the optimizer"):
        opt.codes(model.weight)
    with pytest.warns(UserWarning, match="nothing is quantized"):
        plain = blaq.BLAQ(model.named_parameters())
    assert plain.param_groups[0]["param_names"] == ["weight", "bias"]


def test_zero_grad_clears_in_both_ways() -> None:
    model, opt = build()
    train(model, opt, 1)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# --- hooks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_step_hooks_and_the_profiler_see_one_step(mode: str) -> None:
    model, opt = build(mode)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:
        with torch.profiler.profile() as profile:
            train(model, opt, 3)
    finally:
        everywhere.remove()
    assert seen == ["pre", "post", "everywhere"] * 3
    steps = [event.count for event in profile.key_averages() if event.key == "Optimizer.step#BLAQ.step"]
    assert steps == [3]


def test_state_dict_hooks_see_what_is_saved_and_what_was_loaded() -> None:
    _, opt = build(dtype=torch.bfloat16)
    model2, opt2 = build(seed=1, dtype=torch.bfloat16)
    seen: list[Any] = []

    def rename(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Old checkpoints called it otherwise: the user's hook comes before our check."""
        seen.append("load pre")
        groups = [{key.removeprefix("my_"): value for key, value in g.items()} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    def mark(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("post")
        groups = [
            {("my_grid" if key == "grid" else key): value for key, value in g.items()} for g in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_post_hook(mark)
    opt2.register_load_state_dict_pre_hook(rename)
    opt2.register_load_state_dict_post_hook(lambda o: seen.append(o.latent(model2[0].weight).dtype))
    opt2.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model2[0].weight]["exp_avg"].dtype))
    for _ in range(2):  # our own hooks do not pile up
        opt2.load_state_dict(opt.state_dict())
        assert seen == ["pre", "post", "load pre", torch.float32, torch.float32]
        seen.clear()
    assert len(opt2._optimizer_load_state_dict_pre_hooks) == 1
    assert len(opt2._optimizer_load_state_dict_post_hooks) == 2


# --- averaging and compilation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_averaging_the_weights_does_not_disturb_training(
    mode: str, everything: Everything, assert_identical: Check
) -> None:
    alone, opt = build(mode), build(mode)
    averaged = AveragedModel(opt[0])
    for _ in range(4):
        train(*opt, 1)
        averaged.update_parameters(opt[0])
    train(*alone, 4)
    assert_identical(everything(opt[1]), everything(alone[1]))
    assert averaged.module[0].weight.unique().numel() > opt[0][0].weight.unique().numel()  # an average is off the grid


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch 2.15 with Python 3.13.0
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_is_compiled_once(
    mode: str, backend: str, everything: Everything, assert_identical: Check
) -> None:
    torch._dynamo.reset()
    plain, (model, opt) = build(mode), build(mode)
    counter = CompileCounterWithBackend(backend)
    storage = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, opt, 5, call=torch.compile(model, backend=counter))
        opt.eval()
        opt.train()
        train(model, opt, 1, call=torch.compile(model, backend=counter))
    assert counter.frame_count == 1
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == storage  # written in place, never replaced
    train(*plain, 6)
    assert_identical(everything(opt), everything(plain[1]))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about what it leaves out
@pytest.mark.parametrize("what", ["step", "loop"])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_loop_trains_as_a_plain_one(
    mode: str, what: str, everything: Everything, assert_identical: Check
) -> None:
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model, opt = build(mode)
        inputs = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(3))

        def closure(x: Tensor, model: nn.Module = model, opt: blaq.BLAQ = opt) -> Tensor:
            opt.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        def loop(x: Tensor, opt: blaq.BLAQ = opt, closure: Callable[[Tensor], Tensor] = closure) -> None:
            if opt.trial != "fresh":
                closure(x)
                opt.step()
                return
            with opt.evaluation():
                closure(x)
            opt.forward_step()
            with opt.evaluation():
                closure(x)
            opt.backtrack_step()

        def step(x: Tensor, opt: blaq.BLAQ = opt, closure: Callable[[Tensor], Tensor] = closure) -> None:
            opt.step(lambda: closure(x))

        call = {"loop": loop, "step": step}[what]
        call = torch.compile(call, backend="eager") if compiled else call
        torch.manual_seed(0)
        for x in inputs:
            call(x)
        ends.append(everything(opt))
    assert_identical(*ends)
