"""forward_step() and backtrack_step(): a step by hand, for loops that own their passes."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import blaq

Check = Callable[..., None]
NewTask = Callable[..., Any]


def by_halves(task: Any, step: int) -> None:
    opt = task.opt
    for half in (opt.forward_step, opt.backtrack_step):
        opt.zero_grad()
        with opt.evaluation():
            task.loss(step).backward()
        half()


def test_halves_equal_a_step(new_task: NewTask, assert_identical: Check) -> None:
    expected = new_task().train(range(5)).everything()
    task = new_task()
    for step in range(5):
        by_halves(task, step)
    assert_identical(expected, task.everything())


def test_halves_under_no_grad(new_task: NewTask, assert_identical: Check) -> None:
    expected = new_task().train(range(2)).everything()
    task = new_task()
    with torch.no_grad():
        for step in range(2):
            by_halves(task, step)
    assert_identical(expected, task.everything())


def test_halves_count_as_a_step_for_a_scheduler(new_task: NewTask) -> None:
    task = new_task()
    scheduler = torch.optim.lr_scheduler.StepLR(task.opt, 1, gamma=0.5)
    by_halves(task, 0)
    scheduler.step()  # no warning that the optimizer has not stepped
    assert task.opt.param_groups[0]["lr"] == 0.025


def test_without_evaluation_buffers_are_protected_all_the_same(new_task: NewTask, assert_identical: Check) -> None:
    """Random numbers cannot be: nobody was asked before the first pass."""
    expected = new_task().train(range(3)).everything()
    task = new_task()
    for step in range(3):
        random = torch.get_rng_state()
        task.closure(step)()
        task.opt.forward_step()
        torch.set_rng_state(random)
        task.closure(step)()
        task.opt.backtrack_step()
    assert_identical(expected, task.everything())


@pytest.mark.parametrize("with_evaluation", [True, False])
def test_abandoned_step(with_evaluation: bool, new_task: NewTask, assert_identical: Check) -> None:
    """Undone altogether; where the first pass ran outside evaluation(), as far as forward_step() knows."""
    task = new_task().train(range(2))
    expected = new_task().train(range(2))
    before = expected.everything()
    if not with_evaluation:
        expected.loss(2)
        before["buffers"] = expected.everything()["buffers"]
    task = new_task().train(range(2))
    opt = task.opt
    opt.zero_grad()
    if with_evaluation:
        with opt.evaluation():
            task.loss(2).backward()
    else:
        task.loss(2).backward()
        before["random"] = torch.get_rng_state()
    opt.forward_step()
    assert opt.in_trial
    with opt.evaluation():
        task.loss(2)
    opt.abandon_step()
    assert not opt.in_trial
    assert_identical(before, task.everything())
    opt.abandon_step()  # harmless
    assert_identical(before, task.everything())


def test_halves_may_follow_a_step_without_a_trial(new_task: NewTask, assert_identical: Check) -> None:
    """Its one evaluation is none of theirs."""
    expected = new_task(trial_every=2).train(range(2))
    task = new_task(trial_every=2).train([0])
    by_halves(task, 1)
    assert_identical(expected.everything(), task.everything())


def test_an_abandoned_step_leaves_alone_what_had_no_gradient(new_task: NewTask) -> None:
    """Also a write from outside, which is for the next step with a gradient to find."""
    task = new_task().train(range(2))
    first, last = task.model[0], task.model[4]
    last.requires_grad_(False)
    task.closure(2)()
    task.opt.forward_step()
    with torch.no_grad():
        last.weight.fill_(3.0)
        last.bias.fill_(5.0)
    task.opt.abandon_step()
    assert last.weight.unique().tolist() == [3.0]
    assert last.bias.unique().tolist() == [5.0]
    assert torch.equal(task.opt.codes(first.weight), blaq.project(first.weight, None, "ternary", "channel").codes)


def test_a_skipped_mini_batch_is_none_of_the_next_step(new_task: NewTask, assert_identical: Check) -> None:
    """Whether its pass was told of or not."""
    ends = []
    for told in (False, True):
        task = new_task().train(range(2))
        with task.opt.evaluation() if told else nullcontext():
            task.loss(2)
        ends.append(task.train([3]).everything())
    assert_identical(*ends)


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, "gradient"])
def test_a_half_that_fails_undoes_the_step(half: str, failure: Any, new_task: NewTask, assert_identical: Check) -> None:
    expected = new_task().train([0, 1, 3]).everything()
    task = new_task().train([0, 1])
    before = task.everything()

    def evaluate(bad: bool) -> None:
        task.opt.zero_grad()
        with task.opt.evaluation():
            task.loss(2).backward()
            if bad and failure != "gradient":
                raise failure("is NaN")
        if bad:
            task.model[0].bias.grad[0] = float("nan")

    def both() -> None:
        evaluate(bad=half == "first")
        task.opt.forward_step()
        evaluate(bad=half == "second")
        task.opt.backtrack_step()

    with pytest.raises((ValueError, KeyboardInterrupt), match="is NaN"):
        both()
    assert_identical(before, task.everything())
    assert_identical(expected, task.train([3]).everything())


def test_halves_out_of_order(new_task: NewTask, assert_identical: Check) -> None:
    task = new_task()
    task.closure(0)()
    before = task.everything()
    with pytest.raises(ValueError, match=r"BLAQ.backtrack_step\(\): no step begun; call forward_step\(\) first"):
        task.opt.backtrack_step()
    assert_identical(before, task.everything())
    task.opt.forward_step()
    at_trial = task.everything()
    with pytest.raises(
        ValueError, match=r"forward_step\(\): already at the trial point; call backtrack_step\(\) first"
    ):
        task.opt.forward_step()
    assert_identical(at_trial, task.everything())


@pytest.mark.parametrize("mode", ["past", "delayed", "none"])
def test_halves_need_fresh(mode: str, new_task: NewTask) -> None:
    task = new_task(trial=mode)
    task.closure(0)()
    with pytest.raises(ValueError, match=rf"forward_step\(\): trial='{mode}' takes one gradient; use trial='fresh'"):
        task.opt.forward_step()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("step", lambda opt: opt.step(lambda: None)),
        ("eval", lambda opt: opt.eval()),
        ("train", lambda opt: opt.train()),
        ("trial", lambda opt: setattr(opt, "trial", "none")),
        ("adopt_weights", lambda opt: opt.adopt_weights()),
        ("state_dict", lambda opt: opt.state_dict()),
        ("load_state_dict", lambda opt: opt.load_state_dict({})),
        ("pickle", pickle.dumps),
        ("pickle", copy.deepcopy),
    ],
)
def test_between_the_halves_nothing_else_is_done(
    name: str, call: Callable[[blaq.BLAQ], Any], new_task: NewTask, assert_identical: Check
) -> None:
    task = new_task().train([0])
    task.closure(1)()
    task.opt.forward_step()
    at_trial = task.everything()
    with pytest.raises(ValueError, match=rf"BLAQ.{name}: a step is under way at its trial point; call backtrack_step"):
        call(task.opt)
    assert task.opt.in_trial
    assert_identical(at_trial, task.everything())


def test_inside_the_closure_too(new_task: NewTask, assert_identical: Check) -> None:
    """What is refused between the halves is refused in the second evaluation; the step is then undone."""
    task = new_task().train([0])
    before = task.everything()

    def closure() -> None:
        task.closure(1)()
        task.opt.state_dict()

    with pytest.raises(ValueError, match=r"BLAQ.state_dict: a step is under way"):
        task.opt.step(closure)
    assert_identical(before, task.everything())


def accumulated(task: Any, steps: range) -> None:
    """Gradients over two mini-batches, each in an evaluation of its own."""
    for step in steps:
        for half in (task.opt.forward_step, task.opt.backtrack_step):
            task.opt.zero_grad()
            for part in range(2):
                with task.opt.evaluation():
                    (task.loss(2 * step + part) / 2).backward()
            half()


def test_every_mini_batch_has_its_own_masks_again_at_the_trial_point(
    new_task: NewTask, assert_identical: Check
) -> None:
    def closure_over_both(task: Any, step: int) -> Any:
        def closure() -> None:
            task.opt.zero_grad()
            for part in range(2):
                (task.loss(2 * step + part) / 2).backward()

        return closure

    expected = new_task()
    for step in range(3):
        expected.opt.step(closure_over_both(expected, step))
    task = new_task()
    accumulated(task, range(3))
    assert_identical(expected.everything(), task.everything())


def test_a_failure_in_a_later_mini_batch_undoes_all_of_them(new_task: NewTask, assert_identical: Check) -> None:
    task = new_task().train(range(2))
    before = task.everything()
    with task.opt.evaluation():
        task.loss(2).backward()
    with pytest.raises(RuntimeError, match="does not require grad"), task.opt.evaluation():
        task.loss(3).detach().backward()
    assert_identical(before, task.everything())
    task.opt.zero_grad()
    by_halves(task, 2)
    assert_identical(new_task().train(range(3)).everything(), task.everything())


def test_halves_of_different_evaluations_are_refused(new_task: NewTask, assert_identical: Check) -> None:
    task = new_task().train(range(2))
    with task.opt.evaluation():  # a batch that is skipped, which nobody is told
        task.loss(2).backward()
    before = task.everything()
    with pytest.raises(ValueError, match=r"2 evaluation\(\) before forward_step\(\) and 1 before backtrack_step\(\)"):
        by_halves(task, 3)
    assert_identical(before, task.everything(), ignore=("buffers", "random"))
    task.opt.zero_grad()
    with task.opt.evaluation():
        task.loss(2).backward()
    task.opt.abandon_step()
    by_halves(task, 3)


def test_a_first_gradient_that_is_overwritten_is_an_error(new_task: NewTask, assert_identical: Check) -> None:
    """Else both would be the second one, and a would do nothing."""
    task = new_task().train(range(2))
    buffers = {p: torch.zeros_like(p) for p in task.model.parameters()}

    def closure() -> None:
        for p, buffer in buffers.items():
            p.grad = buffer.zero_()
        task.loss(2).backward()

    before = task.everything()
    with pytest.raises(
        ValueError, match=r"the first gradient of '0\.weight' was written to during the second evaluation"
    ):
        task.opt.step(closure)
    assert_identical(before, task.everything())


def test_an_evaluation_around_the_second_pass_alone_is_no_error(new_task: NewTask) -> None:
    task = new_task()
    task.closure(0)()
    task.opt.forward_step()
    task.opt.zero_grad()
    with task.opt.evaluation():
        task.loss(0).backward()
    task.opt.backtrack_step()
    assert task.opt.gradient_evaluations == 2
