"""Batches kept from step to step: whatever happens between two steps, the next is that of batches made anew."""

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.optim import batches, compiled
from blaq.optim.batches import Kept
from blaq.optim.rows import Rows

Check = Callable[..., None]


def parameters(opt: blaq.BLAQ) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def nothing(task: Any, step: int) -> None:
    """Steps follow each other."""


def states_are_replaced(task: Any, step: int) -> None:
    for p in parameters(task.opt):
        task.opt.state[p] = {key: value.clone() for key, value in task.opt.state[p].items()}


def memory_of_states_is_replaced(task: Any, step: int) -> None:
    for p in parameters(task.opt):
        for value in task.opt.state[p].values():
            value.data = value.data.clone()


def memory_of_parameters_is_replaced(task: Any, step: int) -> None:
    for p in parameters(task.opt):
        p.data = p.data.clone()


def moments_are_written(task: Any, step: int) -> None:
    for p in parameters(task.opt):
        task.opt.state[p]["exp_avg"].mul_(0.5)


def a_step_is_counted_anew(task: Any, step: int) -> None:
    task.opt.state[parameters(task.opt)[0]]["step"].fill_(0 if step == 3 else 7)


def a_layer_is_frozen_in_turn(task: Any, step: int) -> None:
    task.model[0].requires_grad_(step % 2 == 0)


def gradients_lie_otherwise(task: Any, step: int) -> None:
    task.model[4].weight.register_hook(lambda grad: grad.t().contiguous().t() if step % 2 else grad)


def options_are_edited(task: Any, step: int) -> None:
    for group in task.opt.param_groups:
        group["lr"] = 0.01 * step
        group["weight_decay"] = 0.1 * (step % 2)
        group["curvature"] = "unit" if step == 3 else "adam"
        if group["grid"] is not None:
            group["solver"] = "exact" if step == 4 else "alternating"


def state_is_loaded(task: Any, step: int) -> None:
    task.opt.load_state_dict(task.opt.state_dict())


def weights_are_evaluated(task: Any, step: int) -> None:
    task.opt.eval()
    task.opt.train()


def the_mode_is_another(task: Any, step: int) -> None:
    task.opt.trial = ("fresh", "none", "past", "delayed")[step % 4]


def threads_are_others(task: Any, step: int) -> None:
    torch.set_num_threads(1 + step % 2)


def weights_are_adopted(task: Any, step: int) -> None:
    if task.opt.trial != "past":
        with torch.no_grad():
            task.model[0].weight.mul_(1.5)
        task.opt.adopt_weights()


def a_group_is_added(task: Any, step: int) -> None:
    if step == 3:
        extra = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        task.opt.add_param_group(
            {"params": [extra], "param_names": ["extra"], "grid": "ternary", "granularity": "tensor"}
        )
        inner = task.loss
        task.loss = lambda step: inner(step) + (extra - 0.3).square().sum()


BETWEEN = [
    nothing,
    states_are_replaced,
    memory_of_states_is_replaced,
    memory_of_parameters_is_replaced,
    moments_are_written,
    a_step_is_counted_anew,
    a_layer_is_frozen_in_turn,
    gradients_lie_otherwise,
    options_are_edited,
    state_is_loaded,
    weights_are_evaluated,
    the_mode_is_another,
    threads_are_others,
    weights_are_adopted,
    a_group_is_added,
]


COMPILE_ANEW = (options_are_edited, threads_are_others, a_group_is_added)  # takes longer, whatever the trial
CASES = [
    *((between, trial, False) for between in BETWEEN for trial in ("none", "fresh", "past", "delayed")),
    *((between, "none", True) for between in BETWEEN),
    *((between, "fresh", True) for between in BETWEEN if between not in COMPILE_ANEW),
]


@pytest.mark.parametrize(("between", "trial", "compile"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_kept_batches_step_as_new_ones(
    between: Callable[[Any, int], None], trial: str, compile: bool, new_task: Any, assert_identical: Check
) -> None:
    threads, ends = torch.get_num_threads(), []
    try:
        for anew in (False, True):
            torch.set_num_threads(threads)
            task = new_task("ternary", "channel", "alternating", trial=trial, compile=compile)
            for step in range(6):
                between(task, step)
                if anew:
                    task.opt._kept = Kept()
                task.train([step])
            ends.append(task.everything())
    finally:
        torch.set_num_threads(threads)
    assert not compiled._Compiler.broken
    assert_identical(*ends)


def test_batches_are_kept(new_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above compare new batches with new ones."""
    sorted_anew = []
    sort = batches.batches
    monkeypatch.setattr(batches, "batches", lambda *args: sorted_anew.append(1) or sort(*args))
    for trial in ("none", "fresh", "past", "delayed"):
        sorted_anew.clear()
        new_task("ternary", "channel", "alternating", trial=trial).train(range(5))
        assert len(sorted_anew) == 1


def test_groups_in_the_place_of_others_are_those_that_count(new_task: Any) -> None:
    """Even with the same parameters, and the same state."""
    task = new_task("ternary", trial="none").train(range(3))
    before = [task.opt.latent(p).clone() for p in parameters(task.opt)]
    task.opt.param_groups[:] = [{**group, "lr": 0.0} for group in task.opt.param_groups]
    task.train([3])
    assert all(map(torch.equal, before, map(task.opt.latent, parameters(task.opt))))


@pytest.mark.parametrize("trial", ["none", "fresh", "past", "delayed"])
def test_no_gradient_outlives_its_step(trial: str, new_task: Any) -> None:
    task = new_task("ternary", "channel", "alternating", trial=trial).train(range(2))
    gradients = [weakref.ref(p.grad) for p in parameters(task.opt)]
    task.opt.zero_grad()
    assert all(gradient() is None for gradient in gradients)


@pytest.mark.parametrize("trial", ["none", "fresh", "past", "delayed"])
def test_small_states_share_a_memory_and_stay_the_same_tensors(trial: str, new_task: Any) -> None:
    task = new_task("ternary", "channel", "alternating", trial=trial)
    before = {p: dict(task.opt.state[p]) for p in parameters(task.opt)}
    task.train(range(4))
    together = [batch for batch in task.opt._kept._batches if len(batch.parameters) > 1]
    assert together
    for batch in together:
        for key in {"latent", "exp_avg", "exp_avg_sq", "trial_grad"} & batch.states[0].keys():
            tensors = batch.state(key)
            (memory,) = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
            assert memory.nbytes() == sum(t.nbytes for t in tensors)
            # Where they lie is where steps go on: in order, and nothing but them.
            assert torch.equal(torch.cat([t.flatten() for t in tensors]), tensors[0].new_empty(0).set_(memory))
    for p, state in before.items():
        assert all(task.opt.state[p][key] is tensor for key, tensor in state.items())


def test_a_saved_state_is_no_larger_for_it(new_task: Any) -> None:
    def saved(state: Any) -> int:
        file = io.BytesIO()
        torch.save(state, file)
        return len(file.getvalue())

    task = new_task("ternary", "channel", "alternating").train(range(4))
    state = task.opt.state_dict()
    apart = copy.deepcopy(state)
    for entry in apart["state"].values():
        entry.update({key: value.clone() for key, value in entry.items()})
    assert saved(state) <= saved(apart)
    for index, p in enumerate(parameters(task.opt)):  # one of them alone: a clone leaves the others behind
        assert saved(task.opt.state[p]["exp_avg"].clone()) < saved(apart["state"][index])


def test_a_layer_that_comes_and_goes_leaves_states_where_they_are(new_task: Any) -> None:
    """Memory that one of them has left would stay for the others."""
    task = new_task("ternary", "channel", "alternating", trial="none")
    at = {p: task.opt.state[p]["latent"].data_ptr() for p in parameters(task.opt) if "latent" in task.opt.state[p]}
    for step in range(6):
        task.model[0].requires_grad_(step % 2 == 0)
        task.train([step])
    assert all(task.opt.state[p]["latent"].data_ptr() == pointer for p, pointer in at.items())


def test_states_of_different_dtypes_are_not_stepped_together() -> None:
    """Memory that is shared has one dtype."""
    a, b = nn.Parameter(torch.ones(8, dtype=torch.bfloat16)), nn.Parameter(torch.ones(8))
    opt = blaq.LAQ([{"params": [nn.Parameter(torch.ones(2, 2))], "grid": "binary"}, {"params": [a, b]}])
    for step in range(5):
        if step == 1:
            a.data = a.data.float()  # as `model.float()` does
        for p in (a, b):
            p.grad = torch.full_like(p, 0.5)
        opt.step()
    assert opt.state[a]["exp_avg"].dtype == torch.bfloat16
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(opt.state[a][key].float(), opt.state[b][key], rtol=0.02, atol=0)


def test_states_in_memory_of_several_processes_stay_there() -> None:
    parameters = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    opt = blaq.LAQ([{"params": parameters, "grid": "binary"}])
    for p in parameters:
        for value in opt.state[p].values():
            value.share_memory_()
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        opt.step()
    assert all(value.is_shared() for p in parameters for value in opt.state[p].values())


def test_states_that_lie_side_by_side_by_chance_are_no_matrix() -> None:
    """Memories of their own, of which no view goes from one to the other."""
    memory = np.arange(24, dtype=np.float32)
    given = [torch.from_numpy(memory[:12]), torch.from_numpy(memory[12:])]
    assert given[0].data_ptr() + 48 == given[1].data_ptr()
    rows = Rows(given, given)
    assert rows.view((2, 12)) is None
    assert rows.take((2, 12)).tolist() == memory.reshape(2, 12).tolist()
    rows.put(torch.ones(2, 12))
    assert memory.tolist() == [1.0] * 24


@pytest.mark.parametrize("grid", ["ternary", None])
@pytest.mark.parametrize("count", [1, 2])
def test_parameters_that_were_cast_hold_what_is_computed_in_the_old_dtype(count: int, grid: str | None) -> None:
    """`model.bfloat16()` of a model in training: the states stay in float32."""
    held = []
    for cast in (False, True):
        given = [nn.Parameter(torch.linspace(-0.5, 1, 6)) for _ in range(count)]
        other = nn.Parameter(torch.ones(2, 2))  # so that something is quantized
        groups: list[dict[str, Any]] = [{"params": given, "grid": grid}, {"params": [other], "grid": "binary"}]
        opt = blaq.BLAQ(groups, lr=0.1, trial="past")
        for step in range(4):
            if step == 1 and cast:
                for p in given:
                    p.data = p.data.bfloat16()
            for p in given:
                p.grad = torch.sin(torch.arange(6.0) + step).bfloat16().to(p.dtype)
            opt.step()
        held.append([*(p.detach().bfloat16() for p in given), *(opt.latent(p) for p in given)])
    assert all(map(torch.equal, *held))
