"""Options edited in ``opt.param_groups`` between steps, as schedulers do: heard at the next step, or refused there."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import blaq

Check = Callable[..., None]
NewTask = Callable[..., Any]
Everything = Callable[[blaq.BLAQ], dict[str, Any]]

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1}, r"BLAQ\(lr=-1\): expected a finite lr >= 0"),
    ({"lr": torch.tensor(float("nan"))}, r"BLAQ\(lr=nan\): expected a finite lr >= 0"),
    ({"lr": torch.ones(2)}, r"BLAQ\(lr=\(2,\) tensor\): expected one number"),
    ({"betas": (0.9, 1.0)}, r"BLAQ\(betas=\(0.9, 1.0\)\): expected two numbers, 0 <= beta < 1"),
    ({"betas": [0.9]}, r"BLAQ\(betas=\[0.9\]\): expected two numbers"),
    ({"eps": 0.0}, r"BLAQ\(eps=0.0\): expected a finite eps > 0"),
    ({"weight_decay": float("nan")}, r"BLAQ\(weight_decay=nan\): expected a finite weight_decay >= 0"),
    ({"a": 1.5}, r"BLAQ\(a=1.5\): expected 0 <= a <= 1"),
    ({"a": torch.ones(2)}, r"BLAQ\(a=tensor\(\[1., 1.\]\)\): expected 0 <= a <= 1"),
    ({"a": np.ones(2)}, r"BLAQ\(a=array\(\[1., 1.\]\)\): expected 0 <= a <= 1"),
    ({"clip": -1.0}, r"BLAQ\(clip=-1.0\): expected None or a number > 0"),
    ({"curvature": "flat"}, r"BLAQ\(curvature='flat'\): expected"),
    ({"solver": "greedy"}, r"BLAQ\(solver='greedy'\): expected 'exact' or 'alternating'"),
    ({"trial_every": 0}, r"BLAQ\(trial_every=0\): expected an int >= 1"),
    ({"trial_every": 2}, r"BLAQ: group 1 has trial_every=\d; all groups share one value of it"),
    (
        {"trial": "past"},
        r"BLAQ: group \d was built with trial='fresh' and now has 'past'; set optimizer.trial = 'past'",
    ),
    ({"grid": "binary"}, r"BLAQ: group \d was built with grid=.* and now has 'binary'; build a new optimizer"),
    ({"granularity": 3}, r"BLAQ: group \d was built with granularity='channel' and now has 3; build a new optimizer"),
]


@pytest.mark.parametrize("call", ["step", "forward_step", "backtrack_step"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("edit", "message"), WRONG, ids=[str(edit) for edit, _ in WRONG])
def test_a_wrong_edit_is_refused_and_nothing_moves(
    edit: dict[str, Any],
    message: str,
    index: int,
    call: str,
    new_task: NewTask,
    everything: Everything,
    assert_identical: Check,
) -> None:
    """In either group, before or within a step; set back, training goes on as if it had not been."""
    task, peer = new_task().train(range(3)), new_task().train(range(3))
    group = task.opt.param_groups[index]
    kept = {key: group[key] for key in edit}
    before = everything(task.opt)
    if call == "backtrack_step":
        task.closure(3)()
        task.opt.forward_step()
    group.update(edit)
    if call == "backtrack_step":
        task.closure(3)()
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: task.opt.step(task.closure(3)),
        "forward_step": task.opt.forward_step,
        "backtrack_step": task.opt.backtrack_step,
    }
    if (edit, call, index) == ({"trial": "past"}, "forward_step", 0):
        message = r"forward_step\(\): trial='past' takes one gradient"
    with pytest.raises(ValueError, match=message):
        calls[call]()
    group.update(kept)
    if call == "backtrack_step":
        task.opt.module.load_state_dict(peer.opt.module.state_dict())  # BatchNorm saw the batch outside of our step
    else:
        assert_identical(everything(task.opt), before)
    torch.set_rng_state(before["random"])
    peer.train(range(3, 6))
    torch.set_rng_state(before["random"])
    task.train(range(3, 6))
    assert_identical(task.everything(), peer.everything())


RIGHT: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": torch.tensor(0.01)},
    {"betas": (0.5, 0.9)},
    {"betas": [0.5, 0.9]},
    {"eps": 0.1},
    {"weight_decay": 0.3},
    {"a": 0.2},
    {"clip": 0.01},
    {"curvature": "unit"},
    {"solver": "alternating"},
    {"trial_every": 2},
]


@pytest.mark.parametrize("edit", RIGHT, ids=str)
def test_an_edit_is_what_the_next_step_does(edit: dict[str, Any], new_task: NewTask, assert_identical: Check) -> None:
    """As an optimizer that was built with it and given the same state; and it makes a difference."""
    task, without = new_task().train(range(4)), new_task().train(range(4))
    solver = edit.get("solver", "exact")
    built = new_task(solver=solver, **{key: value for key, value in edit.items() if key != "solver"})
    state = copy.deepcopy(task.opt.state_dict())
    for group, own in zip(state["param_groups"], built.opt.param_groups, strict=True):
        group.update({key: own[key] for key in edit})
    built.model.load_state_dict(task.model.state_dict())
    built.opt.load_state_dict(state)
    for group in task.opt.param_groups:
        group.update(edit)
    random = torch.get_rng_state()
    for one in (task, built, without):
        torch.set_rng_state(random)
        one.train(range(4, 9))
    assert_identical(task.everything(), built.everything(), ignore=("betas",))
    moved = task.model[0].weight
    assert edit == {"solver": "alternating"} or not torch.equal(moved, without.model[0].weight)


def test_a_list_of_betas_cannot_be_edited_unseen(new_task: NewTask) -> None:
    task = new_task()
    betas = [0.9, 0.99]
    task.opt.param_groups[0]["betas"] = betas
    task.train([0])
    betas[0] = 2.0
    task.train([1])  # not the optimizer's any more
    assert task.opt.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load_state_dict", "trial"])
def test_copies_and_other_modes_are_watched_too(how: str, new_task: NewTask) -> None:
    task = new_task().train(range(2))
    opt = task.opt
    if how == "deepcopy":
        opt = copy.deepcopy(opt)
    elif how == "pickle":
        opt = pickle.loads(pickle.dumps(opt))
    elif how == "load_state_dict":
        opt = new_task().opt
        opt.load_state_dict(task.opt.state_dict())
    opt.trial = "past"
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    opt.step()
    opt.param_groups[0]["a"] = 2
    with pytest.raises(ValueError, match=r"BLAQ\(a=2\): expected 0 <= a <= 1"):
        opt.step()
    opt.param_groups[0].update(a=0.5, trial="fresh")
    with pytest.raises(ValueError, match=r"was built with trial='past' and now has 'fresh'; set optimizer.trial"):
        opt.step()


@pytest.mark.parametrize("how", ["trial", "add_param_group", "deepcopy", "pickle"])
def test_no_way_around_the_check(how: str, new_task: NewTask) -> None:
    """What takes the groups as they are looks for edits first, and does nothing where it finds a wrong one."""
    task = new_task().train(range(2))
    opt = task.opt
    opt.param_groups[0]["grid"] = "binary"
    calls: dict[str, Callable[[], Any]] = {
        "trial": lambda: setattr(opt, "trial", "past"),
        "add_param_group": lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
        "deepcopy": lambda: copy.deepcopy(opt),
        "pickle": lambda: pickle.dumps(opt),
    }
    with pytest.raises(ValueError, match=r"was built with grid='ternary' and now has 'binary'"):
        calls[how]()
    assert (opt.trial, len(opt.param_groups)) == ("fresh", 2)
    opt.param_groups[0]["grid"] = "ternary"
    task.train([2])


def test_the_way_out_of_an_edited_trial_works(new_task: NewTask, assert_identical: Check) -> None:
    """Setting it on the optimizer, as the message says, with the edit still in the groups."""
    task, peer = new_task().train(range(2)), new_task().train(range(2))
    for group in task.opt.param_groups:
        group["trial"] = "past"
    with pytest.raises(ValueError, match=r"set optimizer.trial = 'past'"):
        task.opt.step(task.closure(2))
    random = torch.get_rng_state()
    for one in (peer, task):
        torch.set_rng_state(random)
        one.opt.trial = "past"
        one.train(range(2, 5))
    assert_identical(task.everything(), peer.everything())


@pytest.mark.parametrize("change", ["added", "removed"])
def test_groups_come_by_add_param_group_and_stay(change: str, new_task: NewTask) -> None:
    task = new_task().train(range(2))
    groups = task.opt.param_groups
    if change == "added":
        groups.append({**groups[1], "params": [nn.Parameter(torch.ones(3))], "param_names": ["extra"]})
    else:
        groups.pop()
    message = (
        rf"BLAQ: param_groups has {len(groups)} groups, and the optimizer was told of 2; add groups by add_param_group"
    )
    with pytest.raises(ValueError, match=message):
        task.opt.step(task.closure(2))


def test_eps_that_half_precision_rounds_to_zero_is_refused_when_edited(new_task: NewTask) -> None:
    task = new_task(dtype=torch.float16, eps=1e-4)
    task.opt.param_groups[1]["eps"] = 1e-8
    with pytest.raises(ValueError, match=r"BLAQ\(eps=1e-08\): is 0 in torch.float16, the dtype of '0.bias'"):
        task.opt.step(task.closure(0))
