"""Zig-zag measures: values known by hand, plain recomputation, and that looking changes nothing."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import blaq
from blaq.grids import GRIDS, Grid
from blaq.optim import compiled
from blaq.zigzag import Measures, ZigZag, cosines, gradient_error
from blaq.zigzag.codes import direction, look_fast, seen
from blaq.zigzag.products import moved, products

TRIALS = ["none", "fresh", "past", "delayed"]
NOTHING = Measures(
    gradient_cosine=None,
    zigzag_rate=None,
    path_efficiency=None,
    flip_rate=None,
    oscillation_frequency=None,
    gradient_error=None,
    trial_agreement=None,
)


class Path:
    """An optimizer led by hand along a given path of its weights, in a ternary grid of scale 1 or in float."""

    def __init__(self, *starts: list[float], grid: str | None = "ternary", every: int = 1) -> None:
        params = [nn.Parameter(torch.tensor([start])) for start in starts]
        names = [f"w{i}" for i in range(len(params))]
        with pytest.warns(UserWarning, match="no parameter group has a grid") if grid is None else _nothing():
            self.opt = blaq.BLAQ([{"params": params, "param_names": names, "grid": grid}], trial="none")
        self.params = params
        self.grid = grid
        self.write([torch.tensor([start]) for start in starts])
        self.zigzag = ZigZag(self.opt, every)

    def write(self, weights: list[Tensor]) -> None:
        for p, w in zip(self.params, weights, strict=True):
            state = self.opt.state[p]
            with torch.no_grad():
                p.copy_(w if self.grid is None else w.round().clamp(-1, 1))
            if self.grid is not None:
                state["latent"].copy_(w)
                state["scale"].fill_(1.0)

    def to(self, *weights: Any, gradients: Any = None) -> "Path":
        """Take a step to the given weights, with the given gradients (None: no gradient)."""
        for i, p in enumerate(self.params):
            g = gradients[i] if gradients is not None else None
            p.grad = None if g is None else torch.as_tensor(g, dtype=torch.float32).view_as(p).clone()
        self.zigzag.before_update(None)
        self.write([torch.as_tensor(w, dtype=torch.float32).view(1, -1) for w in weights])
        for group in self.opt.param_groups:
            group["steps"] += 1
        self.zigzag.after_update()
        return self

    def read(self, layer: str = "total") -> Measures:
        return self.zigzag.read()[layer]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Task:
    """A small real training: convolution in channels last, BatchNorm, dropout, a tied layer, several grids."""

    def __init__(
        self, trial: str = "none", bits: Any = "ternary", granularity: Any = "channel", **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16),
            nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3),
        ).to(memory_format=torch.channels_last)  # fmt: skip
        self.model[7].weight = self.model[5].weight
        with pytest.warns(UserWarning, match="no parameter group has a grid") if bits is None else _nothing():
            groups = blaq.param_groups(self.model, bits, granularity, rules={} if bits is None else {"9": "linear3"})
            self.opt = blaq.BLAQ(groups, **{"lr": 0.05, "trial": trial, "module": self.model, "a": 0.6, **options})
        self.gradients: list[list[Tensor]] = []  # of all parameters at every evaluation

    def loss(self, step: int) -> Tensor:
        batch = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        return (self.model(batch) - 1).square().mean()

    def closure(self, step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.opt.zero_grad(set_to_none=False)
            loss = self.loss(step)
            loss.backward()
            self.gradients.append([p.grad.clone() for p in self.model.parameters()])
            return loss.detach()

        return closure

    def train(self, steps: range) -> "Task":
        for step in steps:
            self.opt.step(self.closure(step))
        return self

    def everything(self) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "state": self.opt.state_dict()["state"],
                "groups": groups,
                "random": torch.get_rng_state(),
                "gradients": [p.grad for p in self.model.parameters()],
            }
        )


def assert_identical(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert_identical(x, y)
    elif isinstance(one, Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.equal(other)
    else:
        assert one == other


# --- known by hand ----------------------------------------------------------------------------------------------------


def test_a_straight_line() -> None:
    path = Path([0.0, 0.0], grid=None)
    for t in range(1, 6):
        path.to([3.0 * t, 4.0 * t], gradients=[[-3.0 * t, -4.0 * t]])
    total = path.read()
    assert total.gradient_cosine == pytest.approx(1.0)
    assert total.zigzag_rate == 0.0
    assert total.path_efficiency == pytest.approx(1.0)
    assert (total.flip_rate, total.oscillation_frequency, total.gradient_error) == (None, None, None)


@pytest.mark.parametrize(("steps", "efficiency"), [(4, 0.0), (5, 1 / 5)])
def test_a_perfect_zigzag(steps: int, efficiency: float) -> None:
    path = Path([0.0, 0.0], grid=None)
    for t in range(1, steps + 1):
        path.to([t % 2, -(t % 2)], gradients=[[(-1.0) ** t, (-1.0) ** (t + 1)]])
    total = path.read()
    assert total.gradient_cosine == pytest.approx(-1.0)
    assert total.zigzag_rate == 1.0
    assert total.path_efficiency == pytest.approx(efficiency)


def test_a_staircase_turns_at_right_angles() -> None:
    path = Path([0.0, 0.0], grid=None)
    for t in range(1, 9):
        path.to([(t + 1) // 2, t // 2], gradients=[[t % 2, 1 - t % 2]])
    total = path.read()
    assert total.gradient_cosine == 0.0
    assert total.zigzag_rate == 0.0
    assert total.path_efficiency == pytest.approx(1 / math.sqrt(2))


def test_a_random_walk_goes_as_far_as_the_root_of_its_length() -> None:
    steps, n = 100, 400
    random = np.random.default_rng(0)
    moves = random.standard_normal((steps, n))
    path = Path([0.0] * n, grid=None)
    for w, step in zip(moves.cumsum(0), moves, strict=True):
        path.to(w, gradients=[step])
    total = path.read()
    assert total.path_efficiency == pytest.approx(1 / math.sqrt(steps), rel=0.1)
    assert total.gradient_cosine == pytest.approx(0.0, abs=3 / math.sqrt(n * steps))
    assert total.zigzag_rate == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(steps))


def test_a_code_that_goes_0_1_0_1_oscillates() -> None:
    path = Path([0.0, 0.2, 0.2, 0.2])
    for t in range(1, 21):
        path.to([t % 2, 0.2, 0.2, 0.2])
        total = path.read()
        assert total.flip_rate == 0.25
        # The first change has none before it to be opposite to.
        assert total.oscillation_frequency == pytest.approx((1 - 0.99 ** (t - 1)) / 4)


def test_a_code_that_goes_one_way_does_not_oscillate() -> None:
    path = Path([-1.0, 0.0])
    for w in (-1.0, 0.0, 0.0, 1.0, 1.0):
        path.to([w, 0.0])
    total = path.read()
    assert total.flip_rate == pytest.approx(2 / 10)
    assert total.oscillation_frequency == 0.0


def test_the_direction_of_a_change_is_remembered() -> None:
    path = Path([0.0])
    for w in (1.0, 1.0, 1.0, 0.0, 0.0):  # back in step 4
        path.to([w])
    assert path.read().oscillation_frequency == pytest.approx(0.01 * 0.99)


def test_a_jump_over_a_level_is_a_change_like_any_other() -> None:
    path = Path([-1.0])
    for w in (1.0, 0.0, -1.0):  # up two, down, down
        path.to([w])
    assert path.read().oscillation_frequency == pytest.approx(0.01 * 0.99)


@pytest.mark.parametrize(
    ("start", "lr", "agreement"),
    [([0.5, 0.5], 0.25, 1.0), ([0.5, 0.5], 1.0, -1.0), ([0.5, 0.25], 0.5, -1 / math.sqrt(5))],
)
def test_the_trial_agrees_as_far_as_it_stays_on_its_side(start: list[float], lr: float, agreement: float) -> None:
    """l = |w|^2 / 2 has the gradient w; Adam's first step is lr in every entry: halfway, across, half of them across."""
    w = nn.Parameter(torch.tensor([start]))
    with pytest.warns(UserWarning, match="no parameter group has a grid"):
        opt = blaq.BLAQ([{"params": [w], "param_names": ["w"]}], lr, (0.0, 0.9))
    zigzag = ZigZag(opt)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        return loss.detach()

    opt.step(closure)
    assert zigzag.read()["w"].trial_agreement == pytest.approx(agreement, abs=1e-6)


def test_layers_and_their_total() -> None:
    path = Path([0.0, 0.0], [0.0])
    path.to([3.0, 0.0], [4.0], gradients=[[1.0, 0.0], [1.0]])
    path.to([6.0, 0.0], [-4.0], gradients=[[1.0, 0.0], [-1.0]])
    measures = path.zigzag.read()
    assert list(measures) == ["w0", "w1", "total"]
    assert [m.gradient_cosine for m in measures.values()] == pytest.approx([1.0, -1.0, 0.0])
    assert [m.zigzag_rate for m in measures.values()] == [0.0, 1.0, 1.0]  # 9 - 32 < 0
    lengths = 5.0 + math.sqrt(9 + 64)
    assert [m.path_efficiency for m in measures.values()] == pytest.approx([1.0, 4 / 12, math.hypot(6, 4) / lengths])
    assert [m.flip_rate for m in measures.values()] == pytest.approx([1 / 4, 1.0, 3 / 6])


def test_nothing_is_measured_where_there_is_nothing() -> None:
    path = Path([0.0, 0.0], [0.0])
    assert path.zigzag.read() == {"w0": NOTHING, "w1": NOTHING, "total": NOTHING}
    path.to([0.0, 0.0], [1.0], gradients=[None, [1.0]])
    path.to([0.0, 0.0], [2.0], gradients=[[1.0, 1.0], [1.0]])
    measures = path.zigzag.read()
    assert measures["w0"].gradient_cosine is None  # no gradient in the first step
    assert measures["w0"].zigzag_rate is None  # it has not moved
    assert measures["w0"].path_efficiency is None
    assert measures["w0"].flip_rate == 0.0
    assert measures["w1"].gradient_cosine == 1.0
    assert measures["total"].gradient_cosine == pytest.approx(1 / math.sqrt(3))
    assert path.read().flip_rate is None  # nothing since
    assert path.read().path_efficiency == 1.0  # since the beginning


def test_every_fourth_step_looks_at_two_steps_and_estimates_the_others() -> None:
    path = Path([0.0], every=4)
    lengths = [8.0, 1.0, 1.0, 2.0, 9.0, 9.0, 1.0, 4.0, 7.0, 7.0]
    signs = [1, 1, 1, -1, 1, 1, 1, 1, 1, 1]
    w = 0.0
    for length, sign in zip(lengths, signs, strict=True):
        w += sign * length
        path.to([w], gradients=[[float(sign)]])
    total = path.read()
    assert total.gradient_cosine == 0.0  # -1 in step 4, 1 in step 8
    assert total.zigzag_rate == 0.5
    # The first step is measured, and the fourth, and the eighth; between them the mean of the neighbours, then the last.
    assert total.path_efficiency == pytest.approx(w / (8 + 2 * (8 + 2) / 2 + 2 + 3 * (2 + 4) / 2 + 4 + 2 * 4))


def test_every_fourth_step_still_sees_an_oscillation() -> None:
    path = Path([0.0], every=4)
    for t in range(1, 13):
        path.to([t % 2])
    assert path.read().flip_rate == 1.0
    assert path.read().oscillation_frequency == pytest.approx(1 - 0.99**12)


def test_reading_without_reset_goes_on() -> None:
    path = Path([0.0]).to([1.0])
    assert path.zigzag.read(reset=False)["total"].flip_rate == 1.0
    path.to([1.0])
    assert path.read().flip_rate == 0.5


def test_cosines_of_tiny_vectors() -> None:
    tiny = torch.tensor([1e-18, 0.0])
    assert cosines([tiny], [tiny]).tolist() == pytest.approx([1.0, 1.0])
    tinier = tiny * 1e-6  # its square is no float32: no direction, rather than a wrong one
    assert cosines([tinier], [tinier]).isnan().all()
    assert cosines([tiny, tiny], [torch.zeros(2), tiny]).isnan().tolist() == [True, False, False]


# --- against a plain computation --------------------------------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm else math.nan


def plain_measures(
    weights: list[np.ndarray],
    gradients: list[np.ndarray],
    trials: list[np.ndarray],
    codes: list[np.ndarray],
    every: int,
) -> dict[str, float | None]:
    """The definitions, step by step; weights and codes have an entry more than gradients."""
    steps = len(gradients)
    moves = [weights[t + 1] - weights[t] for t in range(steps)]
    probed = [t for t in range(steps) if (t + 1) % every == 0]
    paired = [t for t in probed if t > 0]
    exact = sorted({0, *probed})
    lengths = np.interp(range(exact[-1] + 1), exact, [np.linalg.norm(moves[t]) for t in exact])
    for before, after in pairwise(exact):
        ends = np.linalg.norm(moves[before]), np.linalg.norm(moves[after])
        lengths[before + 1 : after] = sum(ends) / 2
    frequency = np.zeros(len(codes[0]))
    last = [0] * len(frequency)
    previous_probe = -1
    for i in range(len(frequency)):
        previous_probe, previous = -1, int(codes[0][i])
        for t in range(steps):
            if not any((t + 1 + ahead) % every == 0 for ahead in (0, 1)):
                continue  # nobody looks
            now = int(codes[t + 1][i])
            event = now != previous and last[i] * (now - previous) < 0
            if now != previous:
                last[i] = 1 if now > previous else -1
            previous = now
            if t in probed:
                keep = 0.99 ** (t - previous_probe)
                frequency[i] = keep * frequency[i] + (1 - keep) * event
                previous_probe = t
    path = lengths.sum() + (steps - len(lengths)) * lengths[-1]
    return {
        "gradient_cosine": np.mean([cosine(gradients[t], gradients[t - 1]) for t in paired]),
        "zigzag_rate": np.mean([cosine(moves[t], moves[t - 1]) < 0 for t in paired]),
        "path_efficiency": np.linalg.norm(weights[-1] - weights[0]) / path,
        "flip_rate": np.mean([np.mean(codes[t + 1] != codes[t]) for t in probed]),
        "oscillation_frequency": frequency.mean(),
        "trial_agreement": np.mean([cosine(gradients[t], trials[t]) for t in probed]) if trials else None,
    }


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("trial", TRIALS)
def test_a_real_training_agrees_with_a_plain_computation(trial: str, every: int) -> None:
    task = Task(trial, betas=(0.0, 0.9), lr=0.1)
    names = dict(task.model.named_parameters())
    zigzag = ZigZag(task.opt, every)
    layers = ["0.weight", "5.weight", "9.weight"]
    weights: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in layers}

    def record() -> None:
        for name in layers:
            weights[name].append(task.opt.latent(names[name]).double().numpy().copy().ravel())
            codes[name].append(task.opt.codes(names[name]).numpy().astype(int).ravel())

    record()
    for step in range(18):
        task.train(range(step, step + 1))
        record()
    evaluations = 2 if trial == "fresh" else 1
    at = {name: i for i, name in enumerate(names)}
    gradients = {name: [g[at[name]].double().numpy().ravel() for g in task.gradients] for name in layers}
    for table in (weights, codes, gradients):
        table["total"] = [np.concatenate(parts) for parts in zip(*(table[name] for name in layers), strict=True)]
    measured = zigzag.read()
    assert list(measured) == [*layers, "total"]
    seen, turned = 0, 0.0
    for name, found in measured.items():
        g = gradients[name]
        plain = plain_measures(weights[name], g[::evaluations], g[1::2] if trial == "fresh" else [], codes[name], every)
        if trial in ("past", "delayed"):
            plain["trial_agreement"] = plain["gradient_cosine"]
        for key, value in plain.items():
            expected = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert getattr(found, key) == expected, f"{name} {key}"
        seen += plain["oscillation_frequency"] > 0
        turned += plain["zigzag_rate"]
    assert seen  # something oscillated
    assert 0 < turned < len(measured)


@settings(max_examples=60)
@given(
    grid=st.sampled_from(GRIDS),
    granularity=st.sampled_from(["tensor", "channel", 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_codes_are_those_of_the_optimizer(grid: str, granularity: Any, dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[1] = 0.0  # a row of scale 0
    weight[2, :2] = -0.0
    p = nn.Parameter(weight)
    opt = blaq.LAQ([{"params": [p], "grid": grid, "granularity": granularity}])
    zigzag = ZigZag(opt)
    codes, expected = zigzag.state_dict()["layers"][0]["seen"], opt.codes(p)
    assert codes.dtype == torch.float16
    assert codes.equal(expected.half())


# --- looking changes nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    ("trial", "bits"), [*((trial, "ternary") for trial in TRIALS), ("none", None), ("fresh", None)]
)
def test_a_probed_training_is_bit_identical(trial: str, bits: Any, every: int) -> None:
    plain, probed = Task(trial, bits), Task(trial, bits)
    torch.manual_seed(1)
    plain.train(range(7))
    expected = plain.everything()
    torch.manual_seed(1)
    zigzag = ZigZag(probed.opt, every)
    for step in range(7):
        if zigzag.due and zigzag.quantized:
            zigzag.probe_gradient_error(probed.closure(step))
        probed.train(range(step, step + 1))
        zigzag.read()
    assert_identical(probed.everything(), expected)


@pytest.mark.parametrize("trial", TRIALS)
def test_nothing_waits_for_the_device_in_a_step(trial: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that reads a value to the host is forbidden while the probe looks."""
    task = Task(trial)
    zigzag = ZigZag(task.opt)
    looks = []

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host reads a value of the device")

    def guarded(look: Callable[..., None]) -> Callable[..., None]:
        def guard(*args: Any) -> None:
            with monkeypatch.context() as patch:
                for name in (
                    "item",
                    "tolist",
                    "cpu",
                    "numpy",
                    "nonzero",
                    "__bool__",
                    "__float__",
                    "__int__",
                    "__index__",
                ):
                    patch.setattr(Tensor, name, forbidden)
                for name in ("equal", "allclose", "nonzero", "masked_select"):
                    patch.setattr(torch, name, forbidden)
                look(*args)
            looks.append(look.__name__)

        return guard

    monkeypatch.setattr(zigzag, "before_update", guarded(zigzag.before_update))
    monkeypatch.setattr(zigzag, "after_update", guarded(zigzag.after_update))
    task.train(range(3))
    assert looks == ["before_update", "after_update"] * 3
    assert zigzag.read()["total"].flip_rate is not None


def test_detached_it_looks_no_more() -> None:
    task = Task()
    zigzag = ZigZag(task.opt)
    task.train(range(2))
    before = zigzag.state_dict()["probes"]
    zigzag.detach()
    task.train(range(2, 4))
    assert task.opt.observers == []
    assert zigzag.state_dict()["probes"] == before == 2


# --- whatever loop ----------------------------------------------------------------------------------------------------


def test_the_two_halves_are_probed_as_one_step() -> None:
    whole, halves = Task("fresh"), Task("fresh")
    probes = [ZigZag(task.opt) for task in (whole, halves)]
    torch.manual_seed(2)
    whole.train(range(4))
    torch.manual_seed(2)
    for step in range(4):
        for half in (halves.opt.forward_step, halves.opt.backtrack_step):
            halves.opt.zero_grad()
            with halves.opt.evaluation():
                halves.loss(step).backward()
            half()
    assert probes[0].read() == probes[1].read()


def test_float_weights_of_a_two_gradient_step_start_where_they_were() -> None:
    """At its trial point a parameter without a grid holds other weights than before the step."""
    task = Task("fresh", None)
    zigzag = ZigZag(task.opt)
    start = task.model[0].weight.detach().double().clone()
    lengths = []
    for step in range(3):
        before = task.model[0].weight.detach().double().clone()
        task.train(range(step, step + 1))
        lengths.append((task.model[0].weight.detach().double() - before).norm())
    expected = (task.model[0].weight.detach().double() - start).norm() / sum(lengths)
    measures = zigzag.read()
    assert list(measures) == ["0.weight", "5.weight", "9.weight", "total"]  # layers' weights, nothing else
    assert measures["0.weight"].path_efficiency == pytest.approx(float(expected), rel=1e-5)
    assert measures["0.weight"].trial_agreement is not None


def test_steps_without_a_trial_have_no_agreement() -> None:
    task = Task("fresh", trial_every=3)
    zigzag = ZigZag(task.opt)
    task.train(range(2))
    assert zigzag.read()["total"].trial_agreement is None
    task.train(range(2, 3))
    g, g_trial = (torch.cat([x[i].double().ravel() for i in (0, 4, 7)]) for x in task.gradients[-2:])
    assert zigzag.read()["total"].trial_agreement == pytest.approx(
        float(g @ g_trial / g.norm() / g_trial.norm()), rel=1e-5
    )


def test_a_skipped_step_is_none() -> None:
    """An overflow under a loss scaler: no step, no probe."""
    w = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    opt = blaq.LAQ([{"params": [w], "grid": "binary"}], lr=0.1)
    zigzag = ZigZag(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        opt.zero_grad()
        scaler.scale((w * torch.tensor([[1.0, 2.0]])).sum() * factor).backward()
        scaler.step(opt)
        scaler.update()
    assert zigzag.state_dict()["probes"] == opt.param_groups[0]["steps"] == 2
    assert zigzag.read()["total"].gradient_cosine == pytest.approx(1.0)


def test_a_step_that_fails_leaves_no_trace() -> None:
    plain, failing = Task("fresh"), Task("fresh")
    probes = [ZigZag(task.opt) for task in (plain, failing)]

    class Failing:
        """Fails after the probe has looked."""

        def before_update(self, first: Any) -> None:
            raise OSError("no more memory")

        def after_update(self) -> None:
            raise AssertionError("the step was undone")

        def after_adoption(self, before: Any) -> None: ...

    torch.manual_seed(3)
    failing.train(range(2))
    failing.opt.observers.append(Failing())
    with pytest.raises(OSError, match="no more memory"):
        failing.train(range(9, 10))
    failing.opt.observers.pop()
    probes[1].read()
    failing.train(range(2, 3))
    retried = probes[1].read()["total"]
    assert retried.gradient_cosine is retried.zigzag_rate is None  # what was kept of the step before is gone
    assert retried.trial_agreement is not None
    failing.train(range(3, 4))
    torch.manual_seed(3)
    plain.train(range(3))
    probes[0].read()
    plain.train(range(3, 4))
    assert_identical(failing.everything(), plain.everything())
    assert probes[1].read() == probes[0].read()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("trial", ["none", "fresh", "past", "past in eval", "delayed"])
def test_adopted_weights_are_no_motion(trial: str, every: int) -> None:
    """Neither the way there nor the codes that change count, and the steps before and after have no angle."""
    task = Task(trial.split()[0])
    zigzag = ZigZag(task.opt, every)
    torch.manual_seed(0)
    task.train(range(5))
    before = zigzag.read(reset=False)["total"]
    path = zigzag._path[0].clone()
    if trial == "past in eval":
        task.opt.eval()
    with torch.no_grad():
        for p in zigzag.parameters().values():
            p.copy_(10 * torch.randn_like(p))
    task.opt.adopt_weights()
    task.opt.train()
    adopted = zigzag.read(reset=False)["total"]
    assert adopted.path_efficiency == pytest.approx(before.path_efficiency, rel=1e-3)
    assert torch.equal(zigzag._path[0], path)
    counts = zigzag._counts[1, -1].item()
    task.train(range(5, 6))
    if (task.opt.param_groups[0]["steps"]) % every == 0:
        assert zigzag._counts[1, -1] == counts
        assert zigzag.read(reset=False)["total"].flip_rate <= before.flip_rate + 0.2
    task.train(range(6, 9))
    assert zigzag._counts[1, -1] > counts
    assert zigzag.read()["total"].path_efficiency < 1.2


def test_observers_stay_when_a_state_is_loaded_and_do_not_travel() -> None:
    task = Task().train(range(2))
    zigzag = ZigZag(task.opt)
    task.opt.load_state_dict(copy.deepcopy(task.opt.state_dict()))
    assert task.opt.observers == [zigzag]
    assert copy.deepcopy(task.opt).observers == []


# --- going on from a state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(1, 7))
@pytest.mark.parametrize(("trial", "every"), [("none", 1), ("fresh", 3), ("past", 4)])
def test_a_resumed_probe_reads_the_same(trial: str, every: int, stop: int) -> None:
    torch.manual_seed(5)
    straight = Task(trial, betas=(0.3, 0.9))
    zigzag = ZigZag(straight.opt, every)
    straight.train(range(9))
    torch.manual_seed(5)
    first = Task(trial, betas=(0.3, 0.9))
    probe = ZigZag(first.opt, every)
    first.train(range(stop))
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.opt.state_dict(), probe.state_dict(), torch.get_rng_state()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Task(trial, betas=(0.3, 0.9))
    second.model.load_state_dict(saved[0])
    second.opt.load_state_dict(saved[1])
    resumed = ZigZag(second.opt, every)
    resumed.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    second.train(range(stop, 9))
    assert resumed.read() == zigzag.read()
    assert_identical(resumed.state_dict(), zigzag.state_dict())


def test_a_loaded_state_is_a_copy() -> None:
    one, other = Path([0.0]).to([1.0]), Path([0.0])
    other.zigzag.load_state_dict(one.zigzag.state_dict())
    other.opt.param_groups[0]["steps"] = 1
    other.write([torch.tensor([[1.0]])])
    before = copy.deepcopy(one.zigzag.state_dict())
    other.to([0.0]).to([1.0])
    assert_identical(one.zigzag.state_dict(), before)


def test_a_state_of_something_else_is_refused() -> None:
    state = Path([0.0, 1.0]).zigzag.state_dict()
    for other in (Path([0.0]), Path([0.0, 1.0], every=2), Path([0.0, 1.0], [1.0])):
        with pytest.raises(ValueError, match=r"expected a state of every=\d and the layers w0.*found every=1 and w0"):
            other.zigzag.load_state_dict(state)


@pytest.mark.parametrize("lost", ["path", "seen"], ids=["of all", "of a layer"])
def test_a_state_of_another_version_is_refused(lost: str) -> None:
    path = Path([0.0, 1.0], [1.0])
    state = path.zigzag.state_dict()
    for part in (state, *state["layers"]):
        part.pop(lost, None)
    with pytest.raises(
        ValueError, match=rf"the state has no {lost}: it is of another version of blaq; make the run anew"
    ):
        path.zigzag.load_state_dict(state)


# --- gradient error ---------------------------------------------------------------------------------------------------


def test_gradient_error_of_a_quadratic() -> None:
    """l = |w|^2 at w = (3, -1), quantized to (2, -2): gradients (6, -2) and (4, -4), and a float bias that changes nothing."""
    w, b = nn.Parameter(torch.tensor([[3.0, -1.0]])), nn.Parameter(torch.ones(1))
    opt = blaq.LAQ([{"params": [w], "param_names": ["w"], "grid": "binary"}, {"params": [b], "param_names": ["b"]}])
    errors = gradient_error(opt, lambda: ((w**2).sum() + b.sum()).backward())
    assert list(errors) == ["w", "total"]
    for error in errors.values():
        assert float(error) == pytest.approx(math.sqrt(8 / 40))
    assert w.grad is None and b.grad is None


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("trial", TRIALS)
def test_gradient_error_against_a_model_of_its_own(trial: str, evaluating: bool) -> None:
    task = Task(trial).train(range(4))
    if evaluating:
        task.opt.eval()
    before = task.everything()
    grads = [p.grad for p in task.model.parameters()]
    versions = [p.detach().clone() for p in task.model.parameters()]
    random = torch.get_rng_state()
    errors = gradient_error(task.opt, task.closure(11))
    assert_identical(task.everything(), before)
    assert all(p.grad is g for p, g in zip(task.model.parameters(), grads, strict=True))
    assert all(p.equal(v) for p, v in zip(task.model.parameters(), versions, strict=True))

    task.opt.eval()
    twins = copy.deepcopy(task.model), copy.deepcopy(task.model)
    for name, p in task.model.named_parameters():
        with torch.no_grad():
            dict(twins[1].named_parameters())[name].copy_(task.opt.latent(p))
    batch = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(11))
    for twin in twins:
        twin.zero_grad()
        torch.set_rng_state(random)
        (twin(batch) - 1).square().mean().backward()
    pairs = {
        name: (
            dict(twins[0].named_parameters())[name].grad.double(),
            dict(twins[1].named_parameters())[name].grad.double(),
        )
        for name in ("0.weight", "5.weight", "9.weight")
    }
    for name, (held, latent) in pairs.items():
        assert float(errors[name]) == pytest.approx(float((held - latent).norm() / latent.norm()), rel=1e-5)
    difference = math.sqrt(sum(float((held - latent).norm()) ** 2 for held, latent in pairs.values()))
    size = math.sqrt(sum(float(latent.norm()) ** 2 for _, latent in pairs.values()))
    assert float(errors["total"]) == pytest.approx(difference / size, rel=1e-5)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("trial", TRIALS)
def test_a_closure_that_raises_leaves_everything(trial: str, call: int) -> None:
    task = Task(trial).train(range(2))
    before = task.everything()
    calls = []

    def closure() -> None:
        calls.append(1)
        task.closure(5)()
        if len(calls) == call:
            raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        gradient_error(task.opt, closure)
    assert len(calls) == call
    assert_identical(task.everything(), before)


def test_gradient_error_in_an_autocast_region_is_that_of_one_in_the_closure() -> None:
    """Inside a region torch keeps the casts of weights, which are others at every evaluation, and afterwards."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 4), torch.randn(8, 6)
    opt = blaq.LAQ(blaq.param_groups(model, bits=1), module=model)

    def closure() -> None:
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(x).square().mean().backward()

    expected = gradient_error(opt, closure)["weight"]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        assert torch.equal(gradient_error(opt, closure)["weight"], expected)
        assert torch.equal(model(x), before)
    assert expected > 0


def test_gradient_error_enters_the_means() -> None:
    task = Task()
    zigzag = ZigZag(task.opt)
    expected = []
    for step in range(3):
        zigzag.probe_gradient_error(task.closure(step))
        expected.append(gradient_error(task.opt, task.closure(step)))
        task.train(range(step, step + 1))
    for name, found in zigzag.read().items():
        assert found.gradient_error == pytest.approx(float(sum(errors[name] for errors in expected)) / 3)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, 1.0, True, None])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(ValueError, match=r"ZigZag\(every=.*\): expected an int >= 1"):
        ZigZag(Task().opt, every)


def test_it_is_attached_between_steps() -> None:
    task = Task("past")
    task.opt.eval()
    with pytest.raises(ValueError, match=r"call train\(\)"):
        ZigZag(task.opt)
    task = Task("fresh")
    task.closure(0)()
    task.opt.forward_step()
    with pytest.raises(ValueError, match="finish the step"):
        ZigZag(task.opt)
    with pytest.raises(ValueError, match="gradient_error: a step is under way"):
        gradient_error(task.opt, task.closure(0))
    assert task.opt.observers == []


def test_something_has_to_be_probed() -> None:
    with pytest.warns(UserWarning, match="no parameter group has a grid"):
        opt = blaq.LAQ([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="no quantized parameter, and none of two or more dimensions"):
        ZigZag(opt)
    with pytest.raises(ValueError, match="gradient_error: no parameter is quantized"):
        gradient_error(opt, lambda: None)


# --- lengths and angles -----------------------------------------------------------------------------------------------

LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t,
    lambda t: t.contiguous(memory_format=torch.channels_last),
    lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 7, 11), (40, 32, 5, 5)], ids=str)
def test_products_are_those_of_float64(shape: tuple[int, ...], fast: bool) -> None:
    """However the tensors lie in memory, and where they do not lie alike."""
    torch.manual_seed(0)
    codes = [compiled.Codes() if fast else None for _ in LAYOUTS]
    for _ in range(2):  # the second time with the code that is known
        for layouts in (LAYOUTS, [LAYOUTS[0]] * 3):
            x, y, z = (lay(torch.randn(shape)) for lay in layouts)
            for of, kept in zip(LAYOUTS, codes, strict=True):
                dots = [(a.double() * b.double()).sum() for a, b in ((x, x), (x, y), (y, y))]
                assert products(of(x), y, kept).tolist() == pytest.approx(
                    [float(dot) for dot in dots], rel=1e-5, abs=1e-3
                )
                now, last = x.double() - z.double(), z.double() - y.double()
                dots = [(a * b).sum() for a, b in ((now, now), (now, last), (last, last))]
                found = moved(of(x), of(z), of(y), kept)
                assert found.tolist() == pytest.approx([float(dot) for dot in dots], rel=1e-5, abs=1e-3)


def test_compiled_products_are_compiled() -> None:
    codes = compiled.Codes()
    for _ in range(2):  # the first call compiles
        products(torch.ones(100), torch.ones(100), codes)
    assert len(codes) == compiled.usable()


# --- looking at codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(5, 30_000), (2, 70_000)], ids=["rows", "parts of rows"])
@pytest.mark.parametrize("name", ["ternary2", "log3"])
def test_a_look_in_blocks_sees_the_same(name: str, rows: int, columns: int) -> None:
    """As a look at every row alone, which is told its own scale."""
    torch.manual_seed(0)
    grid = Grid.parse(name)
    first, then = (blaq.project(torch.randn(rows, columns), None, grid, "channel") for _ in range(2))
    before = torch.randint(-1, 2, (rows, columns)).half()
    rates = torch.tensor([0.9, 0.1])
    remembered, frequency = first.codes + before / 4, torch.zeros(rows, columns)
    changed = look_fast(then.values, then.scale, remembered, [frequency, rates], grid, None)
    assert int(changed) == int((first.codes != then.codes).sum())
    step = torch.sign(then.codes.half() - first.codes.half())
    now = torch.where(step == 0, before, step)
    assert torch.equal(remembered, then.codes + now / 4)
    assert torch.equal(direction(remembered), now / 4)
    assert torch.equal(frequency, torch.where(step * before < 0, 0.1, 0.0))


@pytest.mark.parametrize("last", [0, 1, 127, 254, 255])
def test_every_pair_of_codes_is_told_apart(last: int) -> None:
    """From a code to any, after any direction: as integers tell it."""
    grid = Grid.parse("midrise8")
    codes = torch.arange(len(grid.levels))
    for before in (-1, 0, 1):
        remembered = torch.full((1, len(codes)), last + before / 4, dtype=torch.float16)
        frequency = torch.zeros(1, len(codes))
        values = grid.levels[codes].view(1, -1).float()
        changed = look_fast(values, torch.ones(1, 1), remembered, [frequency, torch.tensor([0.9, 0.1])], grid, None)
        step = torch.sign(codes - last)
        assert int(changed) == len(codes) - 1
        assert torch.equal(remembered[0].double(), codes + torch.where(step == 0, before, step) / 4.0)
        assert torch.equal(frequency[0], torch.where(step * before < 0, 0.1, 0.0))


@pytest.mark.parametrize(("rows", "counts"), [(1, False), (3, True)])
@pytest.mark.parametrize("name", ["binary", "ternary", "ternary2", "linear3", "log3", "midrise2", "linear8"])
def test_a_compiled_look_sees_the_same(name: str, rows: int, counts: bool) -> None:
    """Bit for bit, at a size that fills no register, and with a row of zeros."""
    torch.manual_seed(0)
    grid = Grid.parse(name)
    weights = [torch.randn(rows, 1037) for _ in range(4)]
    weights[2][0] = 0
    rates = torch.tensor([0.9, 0.1])
    looks: list[list[Tensor]] = []
    for fast in (False, True):
        first = blaq.project(weights[0], None, grid, "channel")
        remembered = seen(first.values, first.scale, grid)
        assert torch.equal(remembered, first.codes.half())
        counting = [torch.zeros(rows, 1037), rates] if counts else []
        found = []
        for w in weights[1:]:
            q = blaq.project(w, None, grid, "channel")
            found += [
                look_fast(q.values, q.scale, remembered, counting, grid, compiled.Codes() if fast else None),
                remembered.clone(),
                *(t.clone() for t in counting),
            ]
        looks.append(found)
    plain, fast_ones = looks
    assert_identical(fast_ones, plain)
    codes_then, codes_now = plain[1], plain[1 + len(plain) // 3]
    assert int(plain[len(plain) // 3]) == int(((codes_then + 0.5).floor() != (codes_now + 0.5).floor()).sum()) > 0


def test_weights_without_rows_are_probed() -> None:
    parameters = [nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(2, 4))]
    opt = blaq.LAQ([{"params": parameters, "grid": "ternary", "granularity": "channel"}], lr=0.1)
    zigzag = ZigZag(opt)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        opt.step()
    assert zigzag.read()["total"].path_efficiency == pytest.approx(1.0)


def test_a_straight_line_of_half_precision_is_straight() -> None:
    p = nn.Parameter(torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="no parameter group has a grid"):
        opt = blaq.LAQ([p], lr=0.1)
    zigzag = ZigZag(opt)
    for _ in range(27):
        p.grad = torch.ones_like(p)
        opt.step()
    assert zigzag.read()["total"].path_efficiency == pytest.approx(1.0, abs=1e-6)
