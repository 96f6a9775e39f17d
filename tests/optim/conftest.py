"""What tests of the optimizer share: a small task, all that a step may change, and comparison bit for bit."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq


class Task:
    """A network with BatchNorm and dropout, its optimizer, and a mini-batch for every step. Seeds torch."""

    def __init__(
        self,
        bits: str | int = "ternary",
        granularity: str | int = "channel",
        solver: str = "exact",
        *,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
        self.model.to(dtype)
        self.dtype = dtype
        groups = blaq.param_groups(self.model, bits, granularity, solver)
        self.opt = blaq.BLAQ(groups, **{"lr": 0.05, "module": self.model, **options})

    def loss(self, step: int) -> Tensor:
        batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(self.dtype)
        return (self.model(batch) - 1).square().mean()

    def closure(self, step: int, set_to_none: bool = True) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.opt.zero_grad(set_to_none)
            loss = self.loss(step)
            loss.backward()
            return loss.detach()

        return closure

    def train(self, steps: Iterable[int]) -> "Task":
        for step in steps:
            self.opt.step(self.closure(step))
        return self

    def everything(self) -> dict[str, Any]:
        return _everything(self.opt)


@pytest.fixture
def new_task() -> type[Task]:
    return Task


def _everything(opt: blaq.BLAQ) -> dict[str, Any]:
    parameters = [p for group in opt.param_groups for p in group["params"]]
    modules = opt.module.named_modules() if opt.module else ()
    now = {
        "parameters": [p.detach() for p in parameters],
        "state": [opt.state[p] for p in parameters],
        "options": [{key: group[key] for key in group if key != "params"} for group in opt.param_groups],
        "buffers": {f"{name}.{key}": buffer for name, m in modules for key, buffer in m._buffers.items()},
        "random": torch.get_rng_state(),
    }
    return copy.deepcopy(now)


@pytest.fixture
def everything() -> Callable[[blaq.BLAQ], dict[str, Any]]:
    """A copy of parameters, optimizer state, options, the module's buffers (None too) and the random state."""
    return _everything


@pytest.fixture
def assert_identical() -> Callable[..., None]:
    """Assert that two nested values are equal in every bit; dict entries named in ``ignore`` are left out."""

    def check(one: Any, other: Any, ignore: tuple[str, ...] = (), where: str = "") -> None:
        if isinstance(one, dict):
            keys = {key for key in one if key not in ignore}
            assert keys == {key for key in other if key not in ignore}, f"{where}: other keys"
            for key in keys:
                check(one[key], other[key], ignore, f"{where}.{key}")
        elif isinstance(one, list | tuple):
            assert len(one) == len(other), f"{where}: other length"
            for index, (x, y) in enumerate(zip(one, other, strict=True)):
                check(x, y, ignore, f"{where}[{index}]")
        elif isinstance(one, Tensor):
            assert isinstance(other, Tensor), where
            assert (one.dtype, one.shape) == (other.dtype, other.shape), where
            same = torch.equal(_bytes(one), _bytes(other))
            assert same, f"{where}: {one.detach()} is not {other.detach()}"
        else:
            assert type(one) is type(other), where
            assert one == other, where

    return check


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
