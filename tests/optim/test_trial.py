"""The second evaluation disturbs nothing: buffers and random numbers are those of one pass."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.optim.trial import BufferState

Check = Callable[..., None]
NewTask = Callable[..., Any]


class Custom(nn.Module):
    """A weight, and buffers in every way that a forward pass can treat them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.kind = kind
        with torch.inference_mode():
            inference = torch.full((3,), 2.0)
        start = {
            "written": torch.zeros(3),
            "replaced": torch.zeros(3),
            "resized": torch.zeros(0),
            "dropped": torch.ones(2),
            "made": None,
            "counted": torch.zeros((), dtype=torch.int64),
            "expanded": torch.ones(1).expand(3),  # one place in memory: torch refuses to write into it
            "inference": inference,  # as it does here
            "not a number": torch.full((2,), float("nan")),
        }
        if kind != "registered":
            self.register_buffer("buffer", start[kind], persistent=kind != "replaced")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        mean = y.detach().mean(0)
        if self.kind == "written":
            self.buffer.mul_(0.9).add_(mean)
        elif self.kind == "replaced":
            self.buffer = 0.9 * self.buffer + mean
        elif self.kind == "resized":
            self.buffer = torch.cat([self.buffer, mean])
        elif self.kind == "dropped":
            self.buffer = None
        elif self.kind == "made":
            self.buffer = mean if self.buffer is None else self.buffer + mean
        elif self.kind == "counted":
            self.buffer += 1
        elif self.kind == "registered":
            self.register_buffer(f"after_{len(self._buffers)}", mean)
        return y


KINDS = [
    "written",
    "replaced",
    "resized",
    "dropped",
    "made",
    "registered",
    "counted",
    "expanded",
    "inference",
    "not a number",
]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "cumulative BatchNorm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)),
    "dropout, BatchNorm": lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)),
    **{kind: lambda kind=kind: Custom(kind) for kind in KINDS},  # type: ignore[misc]
}
in_every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def buffers(model: nn.Module) -> dict[str, Tensor | None]:
    modules = model.named_modules()
    return {f"{name}.{key}": b if b is None else b.clone() for name, m in modules for key, b in m._buffers.items()}


def quadratic(model: nn.Module, opt: blaq.BLAQ, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss.detach()

    return closure


# --- what one pass leaves ----------------------------------------------------------------------------------------------------


@in_every_model
def test_buffers_and_random_numbers_are_those_of_one_pass(
    make: Callable[[], nn.Module], assert_identical: Check
) -> None:
    """The reference is a copy of the model that sees every batch once, at the weights of the first evaluation."""
    torch.manual_seed(0)
    model = make()
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary"), lr=0.1, module=model)
    for step in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        witness = copy.deepcopy(model)
        random = torch.get_rng_state()
        witness(x)
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        opt.step(quadratic(model, opt, x))
        assert_identical(buffers(witness), buffers(model))
        assert torch.equal(after, torch.get_rng_state())


def test_dropout_masks_are_those_of_the_first_pass(new_task: NewTask) -> None:
    task = new_task()
    masks: list[Tensor] = []
    task.model[2].register_forward_hook(lambda _, args, out: masks.append(out.detach() == 0))
    task.train(range(3))
    assert len(masks) == 6
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert first.any()
        assert torch.equal(first, second)
    assert not torch.equal(masks[0], masks[2])  # the next step draws others


def test_buffers_are_the_same_tensors_afterwards() -> None:
    """Others may hold them too: an average of the model, a compiled graph."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    opt = blaq.BLAQ(blaq.param_groups(model, "binary"), module=model)
    held = dict(model.named_buffers())
    opt.step(quadratic(model, opt, torch.randn(8, 4)))
    assert all(model.get_buffer(name) is buffer for name, buffer in held.items())


def test_a_buffer_with_an_axis_of_one_entry_is_brought_back() -> None:
    """Whose stride may be 0 as in an expanded one, and torch writes into it."""
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(4, 4).as_strided((1, 4, 2), (0, 4, 1)))
    state = BufferState(module)
    module.kept.fill_(1.0)  # type: ignore[operator,union-attr]
    state.restore()
    assert not module.kept.any()  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("when", ["first", "second"])
@in_every_model
def test_an_exception_brings_every_buffer_back(
    make: Callable[[], nn.Module], when: str, assert_identical: Check
) -> None:
    torch.manual_seed(0)
    model = make()
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary"), module=model)
    before, objects = buffers(model), dict(model.named_buffers())

    def closure() -> None:
        quadratic(model, opt, torch.ones(8, 4))()
        if opt.in_trial == (when == "second"):
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        opt.step(closure)
    assert_identical(before, buffers(model))
    assert all(model.get_buffer(name) is buffer for name, buffer in objects.items())


@pytest.mark.parametrize("bits", ["ternary", "ternary2", "linear4"])
def test_codes_and_scale_tell_what_is_held_in_either_pass(bits: str, new_task: NewTask) -> None:
    task, levels = new_task(bits, "tensor"), blaq.Grid.parse(bits).levels
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            p = task.model[0].weight
            scale, held = task.opt.scale(p), levels[task.opt.codes(p).long()]
            assert torch.equal(torch.where(held < 0, scale[0, 0], scale[0, -1]) * held, p)
            return task.closure(step)()  # type: ignore[no-any-return]

        task.opt.step(closure)


def test_the_second_evaluation_holds_two_sets_of_gradients_at_most(new_task: Any) -> None:
    """Those of the last step go where the closure clears them."""
    task = new_task().train([0])
    last = [weakref.ref(p.grad) for p in task.model.parameters()]
    alive = []

    def closure() -> Tensor:
        task.opt.zero_grad()
        alive.append(sum(grad() is not None for grad in last))
        return task.closure(1)()

    task.opt.step(closure)
    assert alive == [0, 0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", ["csr", "coo"])
def test_sparse_buffers_are_left_as_the_first_evaluation_left_them(layout: str) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            matrix = torch.eye(4)
            self.register_buffer("matrix", matrix.to_sparse_csr() if layout == "csr" else matrix.to_sparse())
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(self.matrix @ x)
            self.passes += 1
            self.matrix.mul_(0.5)
            return y

    model = Graph()
    opt = blaq.BLAQ(blaq.param_groups(model, 2), lr=0.1, module=model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(torch.ones(4, 4)).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert model.passes == 2
    assert torch.equal(model.matrix.to_dense(), 0.5 * torch.eye(4))
