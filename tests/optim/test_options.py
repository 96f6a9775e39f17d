"""Options: per group, added later, refused when they are wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq

Check = Callable[..., None]
NewTask = Callable[..., Any]


def parameter(seed: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (6,), generator=torch.Generator().manual_seed(seed)))


def closure_of(opt: blaq.BLAQ) -> Callable[[], Tensor]:
    """A sum of losses, one for each parameter: what one does, no other notices."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = torch.stack([(p - 0.3).square().sum() for group in opt.param_groups for p in group["params"]]).sum()
        loss.backward()
        return loss.detach()

    return closure


# --- groups -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        {"a": 0.1},
        {"lr": 0.2},
        {"betas": (0.5, 0.8)},
        {"eps": 0.1},
        {"weight_decay": 0.3},
        {"clip": 0.2},
        {"grid": "ternary"},
        {"granularity": 2},
        {"grid": None},
    ],
    ids=str,
)
def test_a_group_may_override(override: dict[str, Any], assert_identical: Check) -> None:
    """Two groups in one optimizer do what two optimizers do, each with its options."""
    common = {"grid": "linear3", "granularity": "tensor"}
    options: dict[str, Any] = {"lr": 0.05, "a": 0.7}
    both = blaq.BLAQ(
        [{"params": [parameter(1)], **common}, {"params": [parameter(2)], **common, **override}], **options
    )
    constructor = {
        key: value for key, value in override.items() if key in ("a", "lr", "betas", "eps", "weight_decay", "clip")
    }
    own = {key: value for key, value in override.items() if key not in constructor}
    first = blaq.BLAQ([{"params": [parameter(1)], **common}], **options)
    if override == {"grid": None}:
        with pytest.warns(UserWarning, match="nothing is quantized"):
            second = blaq.BLAQ([{"params": [parameter(2)]}], **options)
    else:
        second = blaq.BLAQ([{"params": [parameter(2)], **common, **own}], **{**options, **constructor})
    same = blaq.BLAQ([{"params": [parameter(2)], **common}], **options)
    for _ in range(12):
        for opt in (both, first, second, same):
            opt.step(closure_of(opt))
    p, q = (group["params"][0] for group in both.param_groups)
    assert_identical(both.state[p], first.state[first.param_groups[0]["params"][0]])
    assert_identical(both.state[q], second.state[second.param_groups[0]["params"][0]])
    without = same.param_groups[0]["params"][0]
    assert not torch.equal(q, without)  # the option matters


@pytest.mark.parametrize("mode", ["fresh", "past", "delayed", "none"])
def test_a_group_added_later(mode: str, assert_identical: Check) -> None:
    """It starts from scratch: its parameter is quantized at once, its bias correction counts its own steps."""
    opt = blaq.BLAQ([{"params": [parameter(1)], "grid": 2}], lr=0.05, trial=mode)
    alone = blaq.BLAQ([{"params": [parameter(2)], "grid": 1}], lr=0.05, trial=mode)
    for _ in range(4):
        opt.step(closure_of(opt))
    late = parameter(2)
    opt.add_param_group({"params": [late], "grid": 1})
    assert torch.equal(late, blaq.project(parameter(2).detach(), None, 1).values)
    assert opt.param_groups[1]["steps"] == opt.param_groups[0]["steps"] == 4
    for _ in range(4):
        opt.step(closure_of(opt))
        alone.step(closure_of(alone))
    assert_identical(opt.state[late], alone.state[alone.param_groups[0]["params"][0]])
    counters = {(group["steps"], group["gradient_evaluations"]) for group in opt.param_groups}
    assert counters == {(8, 16 if mode == "fresh" else 8)}


@pytest.mark.parametrize("built_as", ["fresh", "past", "delayed", "none"])
@pytest.mark.parametrize("now", ["fresh", "past", "delayed", "none"])
def test_a_group_added_after_the_mode_was_switched(built_as: str, now: str) -> None:
    every = {"trial_every": 3} if built_as == "fresh" else {}
    opt = blaq.BLAQ([{"params": [parameter(1)], "grid": 2}], trial=built_as, **every)  # type: ignore[arg-type]
    opt.trial = now
    opt.add_param_group({"params": [parameter(2)], "grid": 1})
    assert [group["trial"] for group in opt.param_groups] == [now, now]
    assert opt.param_groups[0]["trial_every"] == opt.param_groups[1]["trial_every"]
    opt.step(closure_of(opt))


def test_a_group_is_added_in_training_only() -> None:
    opt = blaq.BLAQ([{"params": [parameter(1)], "grid": 2}], trial="past")
    opt.eval()
    with pytest.raises(ValueError, match=r"BLAQ.add_param_group\(\): call train\(\) first"):
        opt.add_param_group({"params": [parameter(2)]})
    assert len(opt.param_groups) == 1


def test_names_of_grids_are_canonical() -> None:
    opt = blaq.BLAQ(
        [{"params": [parameter(i)], "grid": grid} for i, grid in enumerate((1, "3", blaq.Grid.parse("log4")))]
    )
    assert [group["grid"] for group in opt.param_groups] == ["binary", "linear3", "log4"]


# --- errors -------------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1}, r"BLAQ\(lr=-1\): expected a finite lr >= 0"),
    ({"lr": float("nan")}, r"BLAQ\(lr=nan\): expected a finite lr >= 0"),
    ({"lr": float("inf")}, r"BLAQ\(lr=inf\): expected a finite lr >= 0"),
    ({"lr": torch.ones(2)}, r"BLAQ\(lr=\(2,\) tensor\): expected one number"),
    ({"lr": None}, r"BLAQ\(lr=None\): expected"),
    ({"lr": "fast"}, r"BLAQ\(lr='?fast'?\): expected"),
    ({"betas": (0.9,)}, r"BLAQ\(betas=\(0.9,\)\): expected two numbers, 0 <= beta < 1"),
    ({"betas": (1.0, 0.9)}, r"BLAQ\(betas=\(1.0, 0.9\)\): expected two numbers"),
    ({"betas": (0.9, float("nan"))}, r"BLAQ\(betas=\(0.9, nan\)\): expected two numbers"),
    ({"betas": (-0.1, 0.9)}, r"BLAQ\(betas="),
    ({"betas": 0.9}, r"BLAQ\(betas=0.9\): expected two numbers"),
    ({"eps": 0.0}, r"BLAQ\(eps=0.0\): expected a finite eps > 0"),
    ({"eps": -1e-8}, r"BLAQ\(eps=-1e-08\)"),
    ({"eps": float("inf")}, r"BLAQ\(eps=inf\)"),
    ({"eps": "1e-8"}, r"BLAQ\(eps='?1e-8'?\): expected"),
    ({"weight_decay": -0.1}, r"BLAQ\(weight_decay=-0.1\): expected a finite weight_decay >= 0"),
    ({"weight_decay": float("nan")}, r"BLAQ\(weight_decay=nan\)"),
    ({"weight_decay": None}, r"BLAQ\(weight_decay=None\)"),
    ({"a": 1.3}, r"BLAQ\(a=1.3\): expected 0 <= a <= 1 \(weight of the gradient at the current point\)"),
    ({"a": -0.1}, r"BLAQ\(a=-0.1\)"),
    ({"a": float("nan")}, r"BLAQ\(a=nan\)"),
    ({"a": None}, r"BLAQ\(a=None\)"),
    ({"clip": 0}, r"BLAQ\(clip=0\): expected None or a number > 0"),
    ({"clip": -1.0}, r"BLAQ\(clip=-1.0\)"),
    ({"clip": float("inf")}, r"BLAQ\(clip=inf\)"),
    ({"clip": "1"}, r"BLAQ\(clip='?1'?\)"),
    (
        {"trial": "often"},
        r"BLAQ\(trial='often'\): expected 'fresh' \(two gradients\), 'past', 'delayed' \(one\) or 'none'",
    ),
    ({"trial": None}, r"BLAQ\(trial=None\)"),
    ({"trial_every": 0}, r"BLAQ\(trial_every=0\): expected an int >= 1"),
    ({"trial_every": 2.0}, r"BLAQ\(trial_every=2.0\)"),
    ({"trial_every": True}, r"BLAQ\(trial_every=True\)"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
@pytest.mark.parametrize("place", ["constructor", "first group", "added group"])
def test_wrong_options(place: str, options: dict[str, Any], message: str) -> None:
    """In whichever place: refused, and neither the weights nor an existing optimizer change."""
    p, opt = parameter(1), blaq.BLAQ([{"params": [parameter(2)], "grid": 2}])
    value = p.detach().clone()
    calls: dict[str, Callable[[], Any]] = {
        "constructor": lambda: blaq.BLAQ([{"params": [p], "grid": 2}], **options),
        "first group": lambda: blaq.BLAQ([{"params": [p], "grid": 2, **options}]),
        "added group": lambda: opt.add_param_group({"params": [p], "grid": 2, **options}),
    }
    with pytest.raises(ValueError, match=message):
        calls[place]()
    assert torch.equal(p, value)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("method", [blaq.BLAQ, blaq.LAQ])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": nn.Linear(2, 2)}, r"\(params=Linear\): expected param groups; build them with blaq.param_groups"),
        ({"params": nn.Sequential(nn.Linear(2, 2))}, r"\(params=Sequential\): expected param groups"),
        ({"module": "model"}, r"\(module=str\): expected the model, for its buffers, or None"),
        ({"compile": "no"}, r"\(compile='no'\): expected True, False, or None"),
    ],
    ids=str,
)
def test_wrong_arguments(method: type[blaq.BLAQ], arguments: dict[str, Any], message: str) -> None:
    p = parameter(1)
    value = p.detach().clone()
    with pytest.raises(ValueError, match=rf"^{method.__name__}{message}"):
        method(**{"params": [{"params": [p], "grid": 2}], **arguments})
    assert torch.equal(p, value)


@pytest.mark.parametrize("mode", ["past", "delayed", "none"])
def test_only_fresh_skips_trials(mode: str) -> None:
    message = rf"BLAQ\(trial='{mode}', trial_every=2\): only trial='fresh' skips trials; leave it at 1"
    with pytest.raises(ValueError, match=message):
        blaq.BLAQ([{"params": [parameter(1)], "grid": 2}], trial=mode, trial_every=2)
    with pytest.raises(ValueError, match=message):
        blaq.BLAQ([{"params": [parameter(1)], "grid": 2, "trial": mode, "trial_every": 2}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"learning_rate": 0.1}, r"BLAQ: group 1 has an unknown option 'learning_rate'"),
        ({"gird": 2}, r"BLAQ: group 1 has an unknown option 'gird'; did you mean 'grid'\?"),
        (
            {"bits": 2},
            r"BLAQ: group 1 has an unknown option 'bits'; build groups with blaq.param_groups\(model, bits=...\)",
        ),
        ({"grid": "trinary"}, r"Grid.parse\('trinary'\): .* did you mean 'binary'|'ternary'"),
        ({"grid": 9}, r"Grid.parse\(9\): expected 1 to 8 bits"),
        ({"grid": 2, "granularity": 4}, r"BLAQ: 'group 1 \[0\]' \(granularity=4\): expected a divisor of the 6 inputs"),
        ({"grid": 2, "granularity": "row"}, r"granularity='row'\): expected 'tensor', 'channel' or a group size >= 1"),
        ({"grid": 2, "solver": "greedy"}, r"BLAQ\(solver='greedy'\): expected 'exact' or 'alternating'"),
        ({"trial": "past"}, r"BLAQ: group 1 has trial='past'; all groups share one value of it"),
        ({"trial_every": 2}, r"BLAQ: group 1 has trial_every=2; all groups share one value of it"),
    ],
    ids=str,
)
def test_wrong_groups(group: dict[str, Any], message: str) -> None:
    p, opt = parameter(1), blaq.BLAQ([{"params": [parameter(2)], "grid": 2}])
    value = p.detach().clone()
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [p], **group})
    with pytest.raises(ValueError, match=message):
        blaq.BLAQ([{"params": [parameter(2)], "grid": 2}, {"params": [p], **group}])
    assert torch.equal(p, value)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (nn.Parameter(torch.zeros(3, dtype=torch.complex64)), r"is torch.complex64; expected a real floating dtype"),
        (nn.Parameter(torch.zeros(3, device="meta")), r"is on the meta device and holds no values; materialize"),
        (
            nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False),
            r"is torch.int8; expected a real floating",
        ),
    ],
    ids=["complex", "meta", "integer"],
)
@pytest.mark.parametrize("grid", [2, None])
def test_wrong_parameters(p: nn.Parameter, message: str, grid: int | None) -> None:
    with pytest.raises(ValueError, match=message):
        blaq.BLAQ([{"params": [parameter(1)], "grid": 2}, {"params": [p], "grid": grid}])


def test_a_stranger_is_no_parameter() -> None:
    p, q = parameter(1), parameter(2)
    opt = blaq.LAQ([{"params": [p], "grid": 2}, {"params": [q]}])
    for look in (opt.latent, opt.codes, opt.scale):
        with pytest.raises(ValueError, match=r"LAQ: the tensor of shape \(6,\) is no parameter of this optimizer"):
            look(parameter(3))
    with pytest.raises(ValueError, match=r"LAQ: 'fc.weight' is no parameter of this optimizer"):
        opt.latent("fc.weight")  # type: ignore[arg-type]
    assert torch.equal(opt.latent(q), q)
    for look in (opt.codes, opt.scale):
        with pytest.raises(ValueError, match=r"'group 1 \[0\]' has no grid; its value is the parameter itself"):
            look(q)


def test_eps_that_half_precision_rounds_to_zero_is_refused() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"LAQ\(eps=1e-08\): is 0 in torch.float16, the dtype of 'group 0 \[0\]'"):
        blaq.LAQ([{"params": [p]}])


def test_groups_of_another_optimizer_bring_no_counts_along() -> None:
    p = nn.Parameter(torch.ones(2))
    groups = [{"params": [p], "grid": "binary"}]
    first = blaq.LAQ(groups)
    torch.optim.lr_scheduler.OneCycleLR(first, max_lr=0.1, total_steps=5)
    p.grad = torch.ones(2)
    first.step()
    for again in (groups, first.param_groups):
        second = blaq.LAQ(again)
        assert (second.param_groups[0]["steps"], second.gradient_evaluations) == (0, 0)
        second.step()
    assert first.param_groups[0]["steps"] == 1


def test_laq_refuses_the_state_of_a_trial() -> None:
    p = nn.Parameter(torch.ones(2))
    state = blaq.BLAQ([{"params": [p], "grid": "binary"}]).state_dict()
    with pytest.raises(
        ValueError, match=r"LAQ.load_state_dict\(\): checkpoint has trial='fresh'; load it into blaq.BLAQ"
    ):
        blaq.LAQ([{"params": [p], "grid": "binary"}]).load_state_dict(state)
