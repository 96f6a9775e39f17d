"""torch.distributed.checkpoint, in one process: asking for the state changes nothing, and loading it resumes exactly."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

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


def build(mode: str = "fresh", seed: int = 0) -> tuple[nn.Module, blaq.BLAQ]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5))
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary", "channel"), lr=0.05, module=model, **MODES[mode])
    return model, opt


def train(model: nn.Module, opt: blaq.BLAQ, steps: int) -> None:
    """Steps with data and dropout masks that depend on the number of the step alone."""
    for _ in range(steps):
        step = opt.param_groups[0]["steps"]
        torch.manual_seed(step)
        x = INPUTS[step]

        def closure(x: Tensor = x) -> Tensor:
            opt.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            return loss

        opt.step(closure)


OPTIONS = pytest.mark.parametrize(  # not flattened and full at once: torch itself fails then, with Adam too
    "options",
    [
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True),
    ],
    ids=["nested", "flat", "full"],
)
STARTS = pytest.mark.parametrize("steps", [0, 3])


@OPTIONS
@STARTS
@pytest.mark.parametrize("mode", MODES)
def test_asking_changes_nothing(
    mode: str, steps: int, options: StateDictOptions, everything: Everything, assert_identical: Check
) -> None:
    """torch calls step() with zero gradients where an optimizer has no state yet; this one has."""
    model, opt = build(mode)
    train(model, opt, steps)
    opt.zero_grad()
    before = everything(opt)
    get_optimizer_state_dict(model, opt, options=options)
    get_state_dict(model, opt)
    assert_identical(everything(opt), before)
    assert all(p.grad is None for p in model.parameters())


@OPTIONS
@STARTS
@pytest.mark.parametrize("mode", MODES)
def test_resuming_is_bit_exact(
    mode: str, steps: int, options: StateDictOptions, everything: Everything, assert_identical: Check
) -> None:
    whole = build(mode)
    train(*whole, 6)
    model, opt = build(mode)
    train(model, opt, steps)
    weights, state = copy.deepcopy(get_state_dict(model, opt, options=options))
    model2, opt2 = build(mode, seed=1)
    set_state_dict(model2, opt2, model_state_dict=weights, optim_state_dict=state, options=options)
    assert_identical(everything(opt2), everything(opt))
    train(model2, opt2, 6 - steps)
    assert_identical(everything(opt2), everything(whole[1]))


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.6's own call
@pytest.mark.parametrize("mode", MODES)
def test_through_files(mode: str, tmp_path: Path, everything: Everything, assert_identical: Check) -> None:
    """DCP fills the state that the new optimizer already has: a key that it lacks would stay behind in the file."""
    model, opt = build(mode)
    train(model, opt, 3)
    dcp.save({"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    model2, opt2 = build(mode, seed=1)
    state = {"model": model2.state_dict(), "opt": get_optimizer_state_dict(model2, opt2)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model2, opt2, state["opt"])
    model2.load_state_dict(state["model"])
    assert_identical(everything(opt2), everything(opt), ignore=("random",))


@pytest.mark.parametrize("options", [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)])
def test_a_frozen_parameter_is_thawed_for_loading(
    options: StateDictOptions, everything: Everything, assert_identical: Check
) -> None:
    """torch leaves the state of frozen parameters out of what it loads; going on without it would lose latent weights."""
    model, opt = build()
    train(model, opt, 2)
    model[0].requires_grad_(False)
    opt.zero_grad()
    weights, state = copy.deepcopy(get_state_dict(model, opt, options=options))
    model2, opt2 = build(seed=1)
    model2[0].requires_grad_(False)
    before = everything(opt2)
    with pytest.raises(ValueError, match=r"no state for '0\.weight'.*requires_grad"):
        set_optimizer_state_dict(model2, opt2, state, options=options)
    assert_identical(everything(opt2), before)
    model2[0].requires_grad_(True)
    set_state_dict(model2, opt2, model_state_dict=weights, optim_state_dict=state, options=options)
    model2[0].requires_grad_(False)
    train(model, opt, 2)
    after = everything(opt)
    train(model2, opt2, 2)
    assert_identical(everything(opt2), after)


@pytest.mark.parametrize("flip", ["past to fresh", "none to past", "eval to train", "train to eval"])
def test_flattened_state_of_another_mode_is_refused(flip: str, everything: Everything, assert_identical: Check) -> None:
    """Flattened, torch loads the keys that the new optimizer has, no more; and {} where the checkpoint lacks one."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    old, new = flip.split(" to ")
    model, opt = build(old if old in MODES else "past")
    model2, opt2 = build(new if new in MODES else "past", seed=1)
    train(model, opt, 2)
    for optimizer, phase in ((opt, old), (opt2, new)):
        if phase == "eval":
            optimizer.eval()
    state = get_optimizer_state_dict(model, opt, options=options)
    before = everything(opt2)
    # torch 2.6 refuses a missing key itself.
    with pytest.raises(
        (ValueError, KeyError), match=r"BLAQ\.load_state_dict\(\): .*'0\.weight'|'state\.0\.weight\.trial"
    ):
        set_optimizer_state_dict(model2, opt2, state, options=options)
    assert_identical(everything(opt2), before)
