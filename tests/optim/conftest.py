"""What tests of the optimizer share: all that a step may change, and comparison bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import blaq


@pytest.fixture
def everything() -> Callable[[blaq.BLAQ], dict[str, Any]]:
    """A copy of parameters, optimizer state, options, the module's buffers (None too) and the random state."""

    def take(opt: blaq.BLAQ) -> dict[str, Any]:
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

    return take


@pytest.fixture
def assert_identical() -> Callable[..., None]:
    """Assert that two nested values are equal in every bit; dict entries named in ``ignore`` are left out."""

    def check(one: Any, other: Any, ignore: tuple[str, ...] = (), where: str = "") -> None:
        if isinstance(one, dict):
            keys = [key for key in one if key not in ignore]
            assert keys == [key for key in other if key not in ignore], f"{where}: other keys"
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
