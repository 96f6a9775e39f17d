"""Checkpoints: bit-exact resume from every moment, dtypes, and refusal of what does not fit."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq

STEPS = 8
INPUTS, TARGETS = torch.randn(2, STEPS, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).unbind()
MODES: dict[str, dict[str, Any]] = {
    "none": {"trial": "none"},
    "fresh": {"trial": "fresh"},
    "fresh every 3rd": {"trial": "fresh", "trial_every": 3},
    "past": {"trial": "past"},
    "delayed": {"trial": "delayed"},
    "past in eval": {"trial": "past"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCHEMES: tuple[tuple[str, str | int, str], ...] = (
    ("ternary2", "channel", "exact"),
    ("linear3", 2, "alternating"),
    ("binary", "tensor", "exact"),
    ("ternary2", 3, "alternating"),
    ("midrise2", "channel", "alternating"),
)
State = dict[str, Any]
Check = Callable[..., None]


class Run:
    """A model with BatchNorm and dropout, an optimizer, a schedule: a training loop as users write it."""

    def __init__(
        self, mode: str = "fresh", dtype: torch.dtype = torch.float32, scheme: Any = SCHEMES[0], *, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        layers = (nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 6))
        self.model = nn.Sequential(*layers).to(dtype)
        grid, granularity, solver = scheme
        groups = blaq.param_groups(self.model, grid, granularity, solver, rules={"4": {"granularity": "channel"}})
        eps = 1e-4 if dtype is torch.float16 else 1e-8  # 1e-8 is 0 in float16
        self.opt = blaq.BLAQ(groups, 0.05, eps=eps, weight_decay=0.01, clip=1.0, module=self.model, **MODES[mode])
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.9)

    def closure(self) -> Tensor:
        step = self.opt.param_groups[0]["steps"]
        self.opt.zero_grad()
        dtype = self.model[0].weight.dtype
        loss = (self.model(INPUTS[step].to(dtype)) - TARGETS[step].to(dtype)).square().mean()
        loss.backward()
        return loss

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.opt.step(self.closure)
            self.schedule.step()
        return self

    def state(self) -> State:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load(self, state: State, *parts: str) -> "Run":
        owners = {"model": self.model, "optimizer": self.opt, "schedule": self.schedule}
        for part in parts:
            owners[part].load_state_dict(state[part])
        torch.set_rng_state(state["random"])
        return self


def through_file(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


# --- resuming -----------------------------------------------------------------------------------------------------------

CASES = [(mode, dtype, scheme) for (mode, dtype), scheme in zip(product(MODES, DTYPES), cycle(SCHEMES), strict=False)]


@pytest.mark.parametrize("saved_at", [0, 4])  # 4: in the middle of a round of trial_every=3
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("model_first", [True, False])
def test_resuming_is_bit_exact(case: Any, saved_at: int, model_first: bool, assert_identical: Check) -> None:
    whole = Run(*case).train(STEPS).state()
    first = Run(*case).train(saved_at)
    if case[0] == "past in eval":
        first.opt.eval()
    saved = through_file(first.state())

    second = Run(*case, seed=1)
    if model_first:
        second.load(saved, "model", "optimizer", "schedule")
    else:  # and into a run that is already on its way
        second.train(2).load(saved, "optimizer", "schedule", "model")
    assert_identical(through_file(second.state()), saved)
    second.opt.train()
    second.train(STEPS - saved_at)
    assert_identical(second.state(), whole)


@pytest.mark.parametrize("mode", MODES)
def test_saving_changes_nothing(mode: str, assert_identical: Check) -> None:
    silent, saving = Run(mode).train(4).state(), Run(mode)
    for _ in range(4):
        through_file(saving.state())
        saving.train(1)
        saving.opt.load_state_dict(saving.opt.state_dict())
    torch.set_rng_state(silent["random"])
    assert_identical(saving.state(), silent)


def test_own_state_before_step_one_is_harmless(assert_identical: Check) -> None:
    """Accelerate moves an optimizer to its device in this way."""
    expected = Run().train(3).state()
    run = Run()
    run.opt.load_state_dict(run.opt.state_dict())
    assert_identical(run.train(3).state(), expected)


@pytest.mark.parametrize("mode", ["none", "fresh", "fresh every 3rd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved_at", [0, 3])
def test_optimizer_alone_restores_quantized_weights(mode: str, dtype: torch.dtype, saved_at: int) -> None:
    first = Run(mode, dtype).train(saved_at)
    second = Run(mode, dtype, seed=1).load(through_file(first.state()), "optimizer")
    for layer in (0, 4):
        p, q = first.model[layer].weight, second.model[layer].weight
        assert torch.equal(p, q)
        assert torch.equal(first.opt.codes(p), second.opt.codes(q))
        assert not torch.equal(first.model[layer].bias, second.model[layer].bias)  # a float parameter is the model's


def test_past_alone_restores_all_from_eval() -> None:
    first = Run("past").train(3)
    training = copy.deepcopy(first.model.state_dict())
    first.opt.eval()
    second = Run("past", seed=1).load(through_file(first.state()), "optimizer")
    assert torch.equal(second.model[0].weight, first.model[0].weight)
    second.opt.train()
    for name, p in second.model.named_parameters():
        assert torch.equal(p, training[name]), name


def test_past_without_the_model_is_noticed() -> None:
    second = Run("past", seed=1).load(through_file(Run("past").train(3).state()), "optimizer", "schedule")
    with pytest.raises(ValueError, match=r"'0\.weight' was changed outside the optimizer"):
        second.train(1)


# --- what is loaded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["fresh", "past in eval"])
def test_dtypes_after_loading(mode: str, dtype: torch.dtype) -> None:
    first = Run(mode, dtype).train(3)
    if mode == "past in eval":
        first.opt.eval()
    second = Run(mode, dtype, seed=1).load(through_file(first.state()), "model", "optimizer")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    quantized, plain = (second.opt.state[p] for p in (second.model[0].weight, second.model[0].bias))
    expected = {"step": torch.float32, "exp_avg": wide, "exp_avg_sq": wide, "latent": wide, "scale": torch.float32}
    if mode == "past in eval":
        expected |= {"trial_grad": wide, "trial_step": torch.float32, "trial": dtype, "trial_scale": torch.float32}
    assert {key: quantized[key].dtype for key in expected} == expected
    assert {plain[key].dtype for key in ("exp_avg", "exp_avg_sq", "latent", "trial") if key in plain} == {dtype}


@pytest.mark.parametrize("mode", ["fresh", "past in eval"])
def test_loaded_state_is_a_copy(mode: str, assert_identical: Check) -> None:
    first = Run(mode).train(3)
    if mode == "past in eval":
        first.opt.eval()
    checkpoint = through_file(first.state())
    second = Run(mode, seed=1).load(checkpoint, "model", "optimizer", "schedule")
    before = copy.deepcopy(second.state())
    for state in checkpoint["optimizer"]["state"].values():
        for value in state.values():
            value.fill_(77)
    for group in checkpoint["optimizer"]["param_groups"]:
        group["param_names"][0] = "changed"
    assert_identical(second.state(), before)


def test_saved_state_is_live_as_in_torch() -> None:
    """state_dict() does not copy; to keep it in memory while training goes on, deepcopy it."""
    run = Run().train(1)
    live = run.opt.state_dict()["state"][0]["latent"]
    kept = copy.deepcopy(live)
    run.train(1)
    assert live is run.opt.state[run.model[0].weight]["latent"]
    assert not torch.equal(live, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_across_dtypes_keeps_what_the_new_model_can_hold(dtype: torch.dtype) -> None:
    first = Run(dtype=torch.float32).train(3)
    second = Run(dtype=dtype, seed=1).load(through_file(first.state()), "model", "optimizer")
    p, q = first.model[0].weight, second.model[0].weight
    assert torch.equal(second.opt.latent(q), first.opt.latent(p).to(second.opt.latent(q).dtype))
    assert torch.equal(second.opt.scale(q), first.opt.scale(p))
    assert torch.equal(q, p.to(dtype))
    second.train(1)


# --- what is refused ------------------------------------------------------------------------------------------------------


def edited(edit: Callable[[State], None]) -> Callable[[], State]:
    def make() -> State:
        state = copy.deepcopy(Run().train(2).opt.state_dict())
        edit(state)
        return state

    return make


def adam() -> State:
    model = Run().model
    groups = [{"params": group["params"]} for group in blaq.param_groups(model, "ternary2", "channel")]
    return torch.optim.Adam(groups).state_dict()


def other_shape() -> State:
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 6))
    return blaq.BLAQ(blaq.param_groups(model, "ternary2", "channel")).state_dict()


def more_groups() -> State:
    return blaq.BLAQ(blaq.param_groups(Run().model, "ternary2", "channel", rules={"4": 1})).state_dict()


REFUSED: dict[str, tuple[Callable[[], State], tuple[str, ...]]] = {
    "grid": (
        lambda: blaq.BLAQ(blaq.param_groups(Run().model, "binary", "channel")).state_dict(),
        ("grid='binary'", "'0.weight'", "'4.weight'", "grid='ternary2'"),
    ),
    "granularity": (
        lambda: blaq.BLAQ(blaq.param_groups(Run().model, "ternary2", "tensor")).state_dict(),
        ("granularity='tensor'", "'0.weight'", "'4.weight'", "granularity='channel'"),
    ),
    "shape": (other_shape, ("'0.weight'", "(7, 6)", "(9, 6)", "'4.weight'", "'1.bias'")),
    "groups": (more_groups, ("[1, 1, 4]", "[2, 4]")),
    "Adam": (adam, ("grid", "not a state of BLAQ")),
    "format": (edited(lambda s: s["param_groups"][0].update(format=99)), ("format 99", "update blaq")),
    "no format": (edited(lambda s: s["param_groups"][0].pop("format")), ("group 0", "format")),
    "no option": (edited(lambda s: s["param_groups"][1].pop("weight_decay")), ("group 1", "weight_decay")),
    "no state": (edited(lambda s: s["state"].pop(0)), ("'0.weight'",)),
    "no latent": (edited(lambda s: s["state"][1].pop("latent")), ("'4.weight'", "latent")),
    "no moment": (edited(lambda s: s["state"][2].pop("exp_avg")), ("'0.bias'", "exp_avg")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_loaded(what: str, assert_identical: Check) -> None:
    make, words = REFUSED[what]
    state = make()
    run = Run().train(2)
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=r"BLAQ\.load_state_dict\(\)") as error:
        run.opt.load_state_dict(state)
    for word in words:
        assert word in str(error.value)
    torch.set_rng_state(before["random"])
    assert_identical(run.state(), before)
    untouched = Run().train(4).state()
    torch.set_rng_state(before["random"])
    assert_identical(run.train(2).state(), untouched)


@pytest.mark.parametrize("method", [blaq.BLAQ, blaq.LAQ])
@pytest.mark.parametrize(
    ("state", "found"), [({}, "nothing"), ({"model": {}, "optimizer": {}}, r"\['model', 'optimizer'\]")]
)
def test_what_is_no_state_of_an_optimizer_is_refused(method: type[blaq.BLAQ], state: State, found: str) -> None:
    """A whole checkpoint, say, in place of the optimizer's part of it."""
    opt = method([{"params": [nn.Parameter(torch.ones(2))], "grid": 1}])
    with pytest.raises(ValueError, match=rf"load_state_dict\(\): expected what state_dict\(\) returns.*found {found};"):
        opt.load_state_dict(state)


def test_the_same_shapes_in_another_order_are_refused() -> None:
    """Groups of the same sizes, grids and shapes, but each weight would get the state of the other."""

    def optimizer(in_float: str) -> blaq.BLAQ:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        return blaq.BLAQ(blaq.param_groups(model, 1, rules={in_float: None}))

    with pytest.raises(ValueError, match=r"'0\.weight'.*'1\.weight'"):
        optimizer("0").load_state_dict(optimizer("1").state_dict())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("trial", ["past", "none"])
def test_steps_are_counted_in_float32_whatever_the_default(trial: str, default: torch.dtype) -> None:
    """bfloat16 would stop at 256."""
    try:
        torch.set_default_dtype(default)
        p = nn.Parameter(torch.ones(4, dtype=torch.float32))
        opt = blaq.BLAQ([{"params": [p], "grid": "binary"}], trial=trial)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {key: float(opt.state[p][key]) for key in ("step", "trial_step") if key in opt.state[p]} == dict.fromkeys(
        ("step", "trial_step") if trial == "past" else ("step",), 300.0
    )
    assert opt.state[p]["step"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["none", "fresh", "past", "delayed"])
def test_a_model_that_was_cast_resumes_bit_exactly(mode: str, dtype: torch.dtype, assert_identical: Check) -> None:
    """The state stays as it was."""
    run = Run(mode)
    run.model.to(dtype)
    for _ in range(2):
        run.opt.step(run.closure)
    before = copy.deepcopy(run.opt.state_dict())
    run.opt.load_state_dict(run.opt.state_dict())
    assert_identical(before, run.opt.state_dict())


def test_a_state_that_was_shrunk_is_widened() -> None:
    """Quantized weights are trained in float32 at least, as the others in the dtype of the parameter."""
    saved, run = Run().train(2).opt.state_dict(), Run()
    for state in saved["state"].values():
        for key in state.keys() & {"latent", "exp_avg", "exp_avg_sq"}:
            state[key] = state[key].bfloat16()
    run.opt.load_state_dict(saved)
    assert {t.dtype for state in run.opt.state.values() for t in state.values()} == {torch.float32}


def test_names_stay_those_of_this_model() -> None:
    """A checkpoint of the same network inside another has other names."""
    saved, run = Run(), Run()
    for group in saved.opt.param_groups:
        group["param_names"] = [f"_orig_mod.{name}" for name in group["param_names"]]
    names = [group["param_names"] for group in run.opt.param_groups]
    run.opt.load_state_dict(saved.opt.state_dict())
    assert [group["param_names"] for group in run.opt.param_groups] == names


def test_nothing_is_saved_or_loaded_at_the_trial_point() -> None:
    run = Run()
    saved = run.opt.state_dict()
    run.closure()
    run.opt.forward_step()
    attempts: list[Callable[[], Any]] = [
        run.opt.state_dict,
        lambda: run.opt.load_state_dict(saved),
        lambda: copy.deepcopy(run.opt),
        lambda: pickle.dumps(run.opt),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="a step is under way at its trial point"):
            attempt()


@pytest.mark.parametrize("mode", MODES)
def test_every_entry_of_a_state_is_asked_for(mode: str) -> None:
    """Of every parameter: whichever is missing or of another shape is told by name."""
    run = Run(mode).train(2)
    if mode == "past in eval":
        run.opt.eval()
    names = [name for group in run.opt.param_groups for name in group["param_names"]]
    for index, name in enumerate(names):
        for key, value in run.opt.state_dict()["state"][index].items():
            saved = copy.deepcopy(run.opt.state_dict())
            saved["state"][index][key] = torch.cat([value.reshape(-1), value.reshape(-1)])
            with pytest.raises(
                ValueError, match=rf": checkpoint has {key} of shape .* for '{re.escape(name)}', expected"
            ):
                run.opt.load_state_dict(saved)
            del saved["state"][index][key]
            with pytest.raises(ValueError, match=rf": checkpoint has no {key} for '{re.escape(name)}'\. "):
                run.opt.load_state_dict(saved)


@pytest.mark.parametrize("key", ["latent", "exp_avg", "exp_avg_sq", "scale"])
def test_a_state_that_is_not_finite_is_refused(key: str, new_task: Any, assert_identical: Any) -> None:
    task = new_task().train(range(2))
    state = copy.deepcopy(task.opt.state_dict())
    state["state"][0][key].view(-1)[0] = float("nan")
    before = task.everything()
    with pytest.raises(ValueError, match=rf"NaN or Inf in {key} of '0\.weight'"):
        task.opt.load_state_dict(state)
    assert_identical(before, task.everything())


@pytest.mark.parametrize("turned", ["all", "one"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_a_state_laid_out_otherwise_in_memory_is_the_same_state(granularity: str | int, turned: str) -> None:
    """As converters and `torch.channels_last` leave it: steps go over the memory row by row."""
    ends = []
    for which in ("none", turned):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 4, 3, 3))
        opt = blaq.LAQ([{"params": [p], "grid": "ternary", "granularity": granularity}], lr=0.01)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            opt.step()
            saved = opt.state_dict()
            if which != "none":
                state = saved["state"][0]
                for key in ("latent", "exp_avg", "exp_avg_sq") if which == "all" else ("exp_avg",):
                    state[key] = state[key].transpose(0, 1).contiguous().transpose(0, 1)
            opt.load_state_dict(saved)
        ends.append(p.detach().clone())
    if granularity == "tensor" and turned == "all":  # then any order is as good, and sums round in theirs
        torch.testing.assert_close(*ends)
    else:
        assert torch.equal(*ends)
