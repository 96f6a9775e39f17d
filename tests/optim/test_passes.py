"""Batches, compiled passes and memory layouts change nothing but the time."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.bins import PLAIN
from blaq.exact import exact
from blaq.grids import Grid
from blaq.optim import batches, compiled, loops, running, update
from blaq.optim.update import Rates
from blaq.solvers import looks


@pytest.fixture(autouse=True)
def working_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test finds out about the compiler is forgotten after it."""
    monkeypatch.setattr(compiled._Compiler, "broken", False)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has compiled nothing."""
    monkeypatch.setattr(compiled._Compiler, "codes", {})
    monkeypatch.setattr(compiled._Compiler, "of", staticmethod(compiled._Compiler.of.__wrapped__))


class Net(nn.Module):
    """Layers of equal and of different shapes, a convolution, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean(dim=3)  # (batch, 4, 4)
        return self.out(torch.tanh(self.layers(y.flatten(1))))  # type: ignore[no-any-return]


def trained(
    steps: int,
    *,
    grid: str = "ternary",
    granularity: str | int = "tensor",
    solver: str = "alternating",
    change: Callable[[Net], Any] = lambda net: None,
    **options: Any,
) -> blaq.BLAQ:
    torch.manual_seed(0)
    net = Net()
    change(net)
    opt = blaq.BLAQ(blaq.param_groups(net, grid, granularity, solver), lr=0.02, module=net, **options)
    for step in range(steps):
        batch = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(step))

        def closure(batch: Tensor = batch) -> Tensor:
            opt.zero_grad()
            loss = (net(batch) - 1).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
    opt.eval()
    return opt


def entries(opt: blaq.BLAQ) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            yield name, p.detach(), opt.latent(p), opt.state[p]


def assert_close(one: blaq.BLAQ, other: blaq.BLAQ, rtol: float) -> None:
    for (name, p, w, state), (_, p2, w2, state2) in zip(entries(one), entries(other), strict=True):
        for a, b in (
            (w, w2),
            (state["exp_avg"], state2["exp_avg"]),
            (state["exp_avg_sq"], state2["exp_avg_sq"]),
            (p, p2),
        ):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 0.01, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": "binary", "trial": "none", "weight_decay": 0.01, "clip": 0.5},
        {"grid": "ternary2", "trial": "past", "granularity": "channel"},
        {"grid": "linear4", "trial": "fresh", "granularity": 4},
        {"grid": "midrise3", "trial": "delayed", "solver": "exact"},
        {"grid": "log3", "trial": "none", "curvature": "unit"},
    ],
    ids=lambda settings: settings["grid"],
)
def test_compiled_equals_uncompiled(settings: dict[str, Any]) -> None:
    plain, fast = (trained(4, compile=compile, **settings) for compile in (False, True))
    assert not compiled._Compiler.broken
    # The last digit may differ, as compilers add up in another order: levels at a threshold then are the exception.
    assert_close(plain, fast, rtol=2e-4)


@pytest.mark.parametrize("grid", ["ternary2", "linear4"])
def test_where_to_look_is_compiled_for_many_rows(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = trained(4, grid=grid, granularity=4, compile=True)
    monkeypatch.setattr(running, "_FEW", 3)
    many = trained(4, grid=grid, granularity=4, compile=True)
    assert not compiled._Compiler.broken
    where_to_look = running._with_grid(looks, Grid.parse(grid), 1)
    assert any(function is where_to_look for function, _ in compiled._Compiler.codes)
    assert_close(few, many, rtol=2e-4)


@pytest.mark.parametrize(
    ("grid", "granularity", "trial"), [("ternary", 64, "none"), ("linear4", "tensor", "fresh")], ids=str
)
def test_compiled_passes_make_nothing_of_the_size_of_the_weights(grid: str, granularity: str | int, trial: str) -> None:
    p = nn.Parameter(torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)))
    groups = [{"params": [p], "grid": grid, "granularity": granularity}]
    opt = blaq.BLAQ(groups, trial=trial, compile=True)
    gradients = [torch.randn_like(p) for _ in range(2)]

    def step() -> None:
        for gradient, half in zip(gradients, (opt.forward_step, opt.backtrack_step), strict=True):
            p.grad = gradient
            half() if trial == "fresh" else opt.step()

    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes
    assert max(sizes) < p.nbytes / 4  # sums of pieces, and scales
    assert not compiled._Compiler.broken


@pytest.mark.usefixtures("working_compiler")
@pytest.mark.parametrize(("grid", "intervals"), [("ternary", 2), ("ternary2", 2), ("linear4", 8), ("linear5", 16)])
def test_the_exact_solver_is_the_same_with_compiled_loops(grid: str, intervals: int) -> None:
    """Also where a row is seen in chunks that do not divide it, and whatever number of intervals they are compiled for."""
    marked = set()

    def mark(w: Tensor, limits: Tensor, *rest: Tensor) -> None:
        marked.add(len(limits))
        loops.COMPILED.mark(w, limits, *rest)

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 100_003, generator=generator)
    d = torch.rand(1, 100_003, generator=generator) + 0.01
    for chunk in (2**20, 2**14):
        ours = loops.COMPILED._replace(mark=mark, chunk=chunk)
        found, expected = (exact(w, d, blaq.Grid.parse(grid), of) for of in (ours, PLAIN))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert marked == {intervals}
    assert not compiled._Compiler.broken


@pytest.mark.parametrize("grid", ["ternary2", "linear4"])
def test_threads_add_up_the_same_as_none(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread a part of a row; the first time, which compiles, in the same order."""
    forget(monkeypatch)
    threads = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            threads.append(count)
            super().__init__(count)

    monkeypatch.setattr(loops, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(loops, "_PART", 2**14)
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 100_003, generator=generator)
    d = torch.rand(1, 100_003, generator=generator) + 0.01
    torch.set_num_threads(3)
    try:
        first, second = (exact(w, d, blaq.Grid.parse(grid), loops.COMPILED) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert threads == [3]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, exact(w, d, blaq.Grid.parse(grid)), rtol=1e-12, atol=0)
    assert not compiled._Compiler.broken


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("trial", ["none", "fresh"])
def test_a_step_that_is_broken_off_while_it_solves_leaves_values_of_the_grid(
    trial: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric is kept where the parameter is, which is written anew once there is a scale."""
    p = nn.Parameter(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))  # a matrix of its own
    opt = blaq.BLAQ([{"params": [p], "grid": "linear3", "solver": "exact"}], trial=trial, compile=compile)
    p.grad = torch.ones_like(p)
    if trial == "fresh":
        opt.forward_step()
        p.grad = torch.ones_like(p)

    def interrupted(w: Tensor, found: Tensor, *_: Any, **__: Any) -> Tensor:
        assert found.data_ptr() == p.data_ptr()
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (opt.backtrack_step if trial == "fresh" else opt.step)()
    assert len(torch.unique(p)) <= 7
    opt.codes(p)  # which refuses what is not on the grid


def test_without_a_compiler_steps_run_uncompiled_with_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand details")

    monkeypatch.setattr(torch, "compile", fails)
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING, "blaq"):
        ended = trained(3, compile=True)
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here, steps run uncompiled (slower): no compiler here and details"
    ]
    assert_close(trained(3, compile=False), ended, rtol=0)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
def test_a_moment_told_by_a_tensor_moves_as_by_a_number(beta1: float) -> None:
    """As compiled code is told, against torch's own `lerp`; from either end, for each of which there is code of its own."""
    group = {"lr": 0.1, "betas": (beta1, 0.9), "eps": 1e-8, "a": 0.7, "weight_decay": 0.0, "clip": None, "grid": None}
    rates = Rates.of(group, 3)
    m, v, g = torch.randn(3, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    told, expected = m.clone(), m.clone().lerp_(g, 1 - beta1)
    update.advance(told, v.square(), g, rates._replace(follow1=torch.tensor(rates.follow1, dtype=torch.float64)))
    assert rates.near == (beta1 > 0.5)
    torch.testing.assert_close(told, expected, rtol=1e-14, atol=1e-15)
    plain, fast = (trained(4, betas=(beta1, 0.9), compile=compile) for compile in (False, True))
    assert_close(plain, fast, rtol=2e-4)
    assert not compiled._Compiler.broken


@pytest.mark.parametrize("trial", ["none", "past"])
def test_autograd_sees_what_compiled_steps_have_written(trial: str) -> None:
    """As uncompiled ones: a tensor that a graph has saved before is refused after, and not one that was only read."""
    seen = []
    for compile in (False, True):
        p, b = nn.Parameter(torch.randn(300, 300)), nn.Parameter(torch.ones(300))  # a matrix, and a row of its own
        opt = blaq.BLAQ([{"params": [p], "grid": "binary"}, {"params": [b]}], trial=trial, compile=compile)
        moved = set()
        for _ in range(4):
            p.grad, b.grad = torch.ones_like(p), torch.ones_like(b)
            states = {key: opt.state[p][key] for key in ("latent", "exp_avg", "exp_avg_sq", "scale")}
            watched = {**states, "p": p, "b": b, "gradient": p.grad}
            before = {name: t._version for name, t in watched.items()}
            opt.step()
            moved = {name for name, t in watched.items() if t._version > before[name]}
        seen.append(moved)
    assert not compiled._Compiler.broken
    assert seen == [{"latent", "exp_avg", "exp_avg_sq", "scale", "p", "b"}] * 2


def test_small_networks_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "call", lambda *_: pytest.fail("compiled"))
    trained(2)
    large = nn.Linear(1024, 1024, bias=False)
    opt = blaq.LAQ(blaq.param_groups(large, 1))
    assert opt.compiles
    assert not blaq.LAQ(blaq.param_groups(large, 1), compile=False).compiles


def test_weights_of_a_group_added_later_count_too() -> None:
    opt = blaq.LAQ([{"params": [nn.Parameter(torch.ones(2, 3))], "grid": 1}])
    assert not opt.compiles
    opt.add_param_group({"params": [nn.Parameter(torch.ones(512, 512))]})  # it has no grid
    assert not opt.compiles
    opt.add_param_group({"params": [nn.Parameter(torch.ones(512, 511))], "grid": 1})
    assert not opt.compiles
    opt.add_param_group({"params": [nn.Parameter(torch.ones(506))], "grid": 1})  # 2^18 by now
    assert opt.compiles


@pytest.mark.parametrize("trial", ["none", "fresh", "past", "delayed"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_equal_parameters_step_together_as_they_would_alone(
    granularity: str | int, trial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(4, granularity=granularity, trial=trial)
    found = batches.batches(together._with_gradients(), fast=False)
    assert (
        max(len(batch.parameters) for batch in found if batch.group["grid"] is not None) == 3
    )  # the three equal layers
    assert [len(batch.parameters) for batch in found if batch.group["grid"] is None] == [6]  # all that has no grid
    monkeypatch.setattr(batches, "TOGETHER_UP_TO", 0)
    alone = trained(4, granularity=granularity, trial=trial)
    assert all(len(batch.parameters) == 1 for batch in batches.batches(alone._with_gradients(), fast=False))
    assert_close(together, alone, rtol=2e-5 if granularity == "tensor" else 1e-6)


@pytest.mark.parametrize("trial", ["none", "fresh", "past"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 9])
def test_the_layout_of_a_convolution_changes_nothing(granularity: str | int, trial: str) -> None:
    rules: dict[str, Any] = {"granularity": granularity, "trial": trial}
    if granularity == 9:
        rules["change"] = lambda net: net.layers.requires_grad_(False) and net.out.requires_grad_(False)
    change = rules.pop("change", lambda net: None)

    def channels_last(net: Net) -> None:
        change(net)
        net.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    assert_close(trained(3, change=change, **rules), trained(3, change=channels_last, **rules), rtol=1e-4)


def test_a_gradient_in_shared_memory_is_copied() -> None:
    """DDP hands out views of its buckets, and the second backward pass writes into them."""
    bucket, second = torch.randn(2, 12).unbind()
    ends = []
    for shared in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        opt = blaq.BLAQ([{"params": [p], "grid": "ternary"}], lr=0.1)
        p.grad = (bucket if shared else bucket.clone()).view(3, 4)
        opt.forward_step()
        bucket_now = bucket if shared else bucket.clone()
        kept = bucket.clone()
        bucket_now.copy_(second)
        p.grad = bucket_now.view(3, 4)
        opt.backtrack_step()
        bucket.copy_(kept)
        ends.append(opt.latent(p).clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("of", ["all of a bucket", "a place of one"])
def test_a_gradient_in_memory_of_others_is_copied(of: str) -> None:
    """One that only its being a view tells, and one that only the size of its memory tells."""
    ends = []
    for shared in (False, True):
        bucket = torch.linspace(1, -1, 12 if of == "all of a bucket" else 15)
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        opt = blaq.BLAQ([{"params": [p], "grid": "ternary"}], lr=0.1)
        if of == "all of a bucket":
            p.grad = bucket.view(3, 4)
        else:
            p.grad = torch.empty(0).set_(bucket.untyped_storage(), 3, (3, 4), (4, 1))  # type: ignore[call-overload]
        opt.forward_step()
        if shared:
            p.grad = torch.empty(0).set_(bucket.untyped_storage(), len(bucket) - 12, (3, 4), (4, 1))  # type: ignore[call-overload]
            p.grad.fill_(0.5)
        else:
            p.grad = torch.full((3, 4), 0.5)
        opt.backtrack_step()
        ends.append(opt.latent(p).clone())
    assert torch.equal(*ends)


GRADIENTS = {
    "one place in memory": torch.tensor([0.5]).expand(6),
    "every second place": torch.linspace(-1, 1, 12)[::2],
}


@pytest.mark.parametrize("grid", ["ternary", None])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_vectors_whose_gradients_lie_otherwise(gradient: Tensor, count: int, grid: str | None) -> None:
    """A vector has one stride, and that need not be 1."""
    found = []
    for grad in (gradient, gradient.clone(memory_format=torch.contiguous_format)):
        given = [torch.nn.Parameter(torch.linspace(-0.5, 1, 6)) for _ in range(count)]
        quantized = torch.nn.Parameter(torch.ones(2, 2))  # so that there is one
        opt = blaq.LAQ([{"params": given, "grid": grid}, {"params": [quantized], "grid": "binary"}])
        for _ in range(2):
            for p in given:
                p.grad = grad
            opt.step()
        found.append([p.detach() for p in given])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], torch.linspace(-0.5, 1, 6))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("grid", ["log5", "log7", "log8", "linear8", "midrise8"])
def test_the_finest_grids_follow_in_float32_as_in_float64(grid: str, compile: bool) -> None:
    """Scales of log8 are 2^126 times smaller than the weights: 1 over them is not finite in float32."""
    errors = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter((torch.rand(64, 256, generator=generator) - 0.5).to(dtype) / 8)
        opt = blaq.LAQ([{"params": [p], "grid": grid}], lr=1e-5, compile=compile)
        for _ in range(4):
            p.grad = torch.randn(64, 256, generator=generator).to(dtype)
            opt.step()
        latent = opt.latent(p)
        errors.append(float((p.detach() - latent).norm() / latent.norm()))
    assert not compiled._Compiler.broken
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert errors[0] < 0.2


def test_many_shapes_and_dtypes_do_not_end_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives up on code that it has compiled for eight of them."""
    graphs = []

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    shapes = [(1, 64), (64, 1), (1, 1), (2, 2), (8, 8), (2, 64), (10, 4096), (1000, 9), (8192, 2), (5, 5, 3, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
        patch.setattr(compiled._Compiler, "codes", {})
        compiled._Compiler.of.cache_clear()
        try:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
                opt = blaq.LAQ([{"params": parameters, "grid": "linear5", "granularity": "channel"}], compile=True)
                for _ in range(2):
                    for p in parameters:
                        p.grad = torch.randn_like(p)
                    opt.step()
        finally:
            compiled._Compiler.of.cache_clear()
    assert len(graphs) > 16
    assert not compiled._Compiler.broken
