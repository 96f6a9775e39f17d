"""Nothing made on the CPU meets a tensor on another device: projection and optimizer, on every device there is.

Where there is no accelerator a pretended one stands in: its tensors say that they are elsewhere, keep their values on the
CPU, and refuse to meet a CPU tensor wherever CUDA would. So results must be the CPU's bit for bit.
"""

import contextlib
import importlib.util
import io
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import blaq
from blaq import projection
from blaq.grids import GRIDS

aten = torch.ops.aten
reads: list[Any] = []  # operations that brought something from the pretended device to the host, which waits for it
REFUSES_FLOAT64 = False  # whether the pretended device does, as Apple's do
ELSEWHERE = torch.device("lazy", 0)  # a type that torch can guard, but for which a CPU test need not have a backend
MODES: dict[str, dict[str, Any]] = {
    "none": {"trial": "none"},
    "fresh": {"trial": "fresh"},
    "past": {"trial": "past"},
}


class Remote(Tensor):
    """A tensor of the pretended device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Remote":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Makes what is created with ``device=ELSEWHERE`` a `Remote`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """`Pretend`, also for ``torch.tensor(..., device=ELSEWHERE)``, which would move its data before a mode sees them."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Pretend():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """As `tree_map` of torch, in a tenth of its time: an operation takes and returns no other containers."""
    if isinstance(tree, list | tuple):
        return type(tree)([mapped(function, part) for part in tree])
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    return function(tree)


def tensors_in(tree: Any) -> list[Tensor]:
    found: list[Any] = []
    mapped(found.append, tree)
    return [t for t in found if isinstance(t, Tensor)]


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, by CUDA's rule: a CPU tensor takes part as a number (no dimensions, entry by entry), or is copied."""
    tensors = tensors_in((args, kwargs))
    remote = [t for t in tensors if isinstance(t, Remote)]
    goes = bool(remote)
    if func is aten.copy_.default:
        goes = isinstance(args[0], Remote)
    elif remote and any(
        not isinstance(t, Remote) and (t.dim() > 0 or torch.Tag.pointwise not in func.tags) for t in tensors
    ):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {ELSEWHERE} and cpu.")
    inner_args, inner_kwargs = mapped(lambda t: t.inner if isinstance(t, Remote) else t, (args, kwargs))
    if kwargs.get("device") is not None:
        goes = torch.device(kwargs["device"]).type == ELSEWHERE.type
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if not goes:
        reads.extend([func] if remote else [])
        return out.clone() if remote and isinstance(out, Tensor) else out
    results = tensors_in(out)
    if REFUSES_FLOAT64 and any(t.dtype == torch.float64 for t in results):
        raise TypeError(f"{func}: {ELSEWHERE} does not support float64.")
    reads.extend([] if results or out is None else [func])
    same = {id(t.inner): t for t in remote}  # what an operation in place returns

    def outer(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return same[id(t)] if id(t) in same else Remote(t)

    return mapped(outer, out)


@pytest.fixture(params=["pretended", "cuda", "xla"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield torch.device("cuda", 0)
    elif request.param == "xla":
        if importlib.util.find_spec("torch_xla") is None:
            pytest.skip("torch_xla is not installed")
        monkeypatch.setenv("PJRT_DEVICE", "CPU")
        torch_xla = pytest.importorskip("torch_xla")
        importlib.import_module("torch_xla.experimental").eager_mode(True)
        model = importlib.import_module("torch_xla.core.xla_model")
        states = SimpleNamespace(
            get_rng_state=lambda device: model.get_rng_state(str(device)),
            set_rng_state=lambda state, device: model.set_rng_state(state, str(device)),
        )
        monkeypatch.setattr(torch, "xla", states, raising=False)
        yield torch_xla.device()
    else:
        states = SimpleNamespace(
            get_rng_state=lambda device: torch.get_rng_state(), set_rng_state=lambda state, device: None
        )
        monkeypatch.setattr(torch, ELSEWHERE.type, states, raising=False)
        with pretending():
            yield ELSEWHERE


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit on the pretended device, to rounding on a real one."""
    exact = {"rtol": 0.0, "atol": 0.0} if found.device == ELSEWHERE else {}
    torch.testing.assert_close(found.detach().cpu(), expected.detach().cpu(), **exact)


def test_the_pretended_device_refuses_what_cuda_refuses() -> None:
    with pretending():
        x = torch.ones(3, device=ELSEWHERE)
        assert isinstance(torch.tensor([1.0], device=ELSEWHERE), Remote)
        assert_same(x * torch.tensor(2.0) + 1, torch.full((3,), 3.0))
        for mix in (lambda: x + torch.ones(3), lambda: torch.stack([x[0], torch.tensor(1.0)])):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                mix()


@pytest.mark.parametrize("grid", GRIDS)
def test_projection(device: torch.device, grid: str) -> None:
    generator = torch.Generator().manual_seed(3)
    w, d = torch.randn(4, 12, generator=generator), torch.rand(4, 12, generator=generator) + 0.1
    cases = itertools.product(("tensor", "channel", 6), ("exact", "alternating"), (None, d))
    for granularity, solver, curvature in cases:
        expected = blaq.project(w, curvature, grid, granularity, solver)
        there = None if curvature is None else curvature.to(device)
        found = blaq.project(w.to(device), there, grid, granularity, solver)
        for key in ("codes", "scale", "values"):
            assert getattr(found, key).device == device
            assert_same(getattr(found, key), getattr(expected, key))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_projection_in_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(4)).to(dtype)
    for grid in ("binary", "ternary", "ternary2", "linear4", "midrise3"):
        assert_same(blaq.project(w.to(device), None, grid).values, blaq.project(w, None, grid).values)


@pytest.mark.parametrize("solver", ["exact", "alternating"])
def test_projection_of_long_rows(device: torch.device, solver: str) -> None:
    w = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(5))
    for grid in ("ternary", "linear4", "log3"):
        found = blaq.project(w.to(device), w.abs().to(device) + 0.1, grid, "channel", solver)
        assert_same(found.scale, blaq.project(w, w.abs() + 0.1, grid, "channel", solver).scale)


def test_a_start_from_another_device(device: torch.device) -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(6))
    start = blaq.project(w, None, "linear4", "channel").scale * 1.1
    expected = blaq.project(w, None, "linear4", "channel", "alternating", start=start)
    for there in (start, start.to(device)):
        assert_same(
            blaq.project(w.to(device), None, "linear4", "channel", "alternating", start=there).scale, expected.scale
        )


class Net(nn.Module):
    """A quantized layer, BatchNorm's like of a buffer, and a layer in float; its parameters are made on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.hidden = nn.Parameter(torch.randn(8, 6, generator=generator).to(device))
        self.out = nn.Parameter(torch.randn(8, generator=generator).to(device))
        self.register_buffer("mean", torch.zeros(8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.hidden.T)
        self.get_buffer("mean").lerp_(h.detach().mean(0), 0.1)
        return (h - self.get_buffer("mean")) @ self.out


def train(device: torch.device, grid: str, granularity: str | int, solver: str, mode: str) -> list[Tensor]:
    """Steps, both checkpoints, evaluation, new weights; all that there is at the end."""
    net = Net(device)
    groups = [
        {"params": [net.hidden], "grid": grid, "granularity": granularity, "solver": solver},
        {"params": [net.out], "grid": None},
    ]
    opt = blaq.BLAQ(groups, lr=0.05, weight_decay=0.01, clip=2.0, module=net, **MODES[mode])

    def steps(numbers: range) -> None:
        for number in numbers:
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number)).to(device)

            def closure(x: Tensor = x) -> Tensor:
                opt.zero_grad()
                loss = (net(x) - 1).square().mean()
                loss.backward()
                return loss.detach()

            opt.step(closure)

    steps(range(3))
    saved = tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, opt.state_dict())
    file = io.BytesIO()
    torch.save(saved, file)
    opt.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    steps(range(3, 5))
    with torch.no_grad():
        net.hidden.add_(0.5)
    opt.adopt_weights()
    steps(range(5, 6))
    opt.eval()
    state = [value for p in net.parameters() for key, value in sorted(opt.state[p].items()) if "step" not in key]
    assert all(value.device == device for value in state)
    return [
        *net.parameters(),
        *net.buffers(),
        *state,
        opt.codes(net.hidden),
        opt.scale(net.hidden),
        opt.latent(net.hidden),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("grid", "granularity", "solver"),
    [
        ("binary", "tensor", "exact"),
        ("ternary2", "channel", "exact"),
        ("linear4", 2, "alternating"),
        ("midrise2", "channel", "exact"),
    ],
)
def test_optimizer(device: torch.device, grid: str, granularity: str | int, solver: str, mode: str) -> None:
    found = train(device, grid, granularity, solver, mode)
    for one, other in zip(found, train(torch.device("cpu"), grid, granularity, solver, mode), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("device", ["pretended"], indirect=True)  # where reads can be counted
@pytest.mark.parametrize("mode", [*MODES, "delayed"])
def test_a_step_waits_for_the_device_once_a_gradient(device: torch.device, mode: str) -> None:
    """To see that it is finite, before anything changes; with the followed scale, the default."""
    net = Net(device)
    groups = [
        {"params": [net.hidden], "grid": "linear3", "granularity": "channel"},
        {"params": [net.out], "grid": None},
    ]
    opt = blaq.BLAQ(groups, lr=0.05, module=net, trial=mode)
    x = torch.randn(16, 6).to(device)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        return loss.detach()

    opt.step(closure)  # solved exactly
    for _ in range(3):
        reads.clear()
        opt.step(closure)
        assert reads == [aten._local_scalar_dense.default] * (2 if mode == "fresh" else 1)


@pytest.fixture
def without_float64(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(projection, "WITHOUT_FLOAT64", (ELSEWHERE.type,))
    monkeypatch.setitem(globals(), "REFUSES_FLOAT64", True)
    with pytest.raises(TypeError, match="does not support float64"):
        torch.ones(2, device=device).double()
    return device


@pytest.mark.parametrize("device", ["pretended"], indirect=True)
@pytest.mark.parametrize("grid", GRIDS)
def test_projection_without_float64(without_float64: torch.device, grid: str) -> None:
    test_projection(without_float64, grid)


@pytest.mark.parametrize("device", ["pretended"], indirect=True)
def test_optimizer_without_float64(without_float64: torch.device) -> None:
    net = Net(without_float64)
    before = net.hidden.detach().clone()
    with pytest.raises(
        ValueError, match=r"'group 0 \[0\]' is on lazy:0, which has no float64.*move the model to the CPU"
    ):
        blaq.BLAQ([{"params": [net.hidden], "grid": "ternary"}])
    assert_same(net.hidden, before)
    blaq.BLAQ([{"params": [net.out], "grid": None}, {"params": [nn.Parameter(torch.ones(3))], "grid": "ternary"}])


def test_a_device_without_readable_random_state() -> None:
    """No closure then: its evaluation could be neither repeated nor undone. Gradients of one's own do."""
    with pretending():
        net = Net(ELSEWHERE)
        opt = blaq.LAQ([{"params": [net.hidden], "grid": "ternary"}, {"params": [net.out]}])
        before = net.hidden.detach().clone()
        with pytest.raises(ValueError, match=r"on lazy:0: .*random state.*step\(\) without a closure"):
            opt.step(lambda: net(torch.ones(4, 6, device=ELSEWHERE)).square().mean())
        assert_same(net.hidden, before)
        net(torch.ones(4, 6, device=ELSEWHERE)).square().mean().backward()
        opt.step()
        assert int(opt.state[net.hidden]["step"]) == 1
