"""What `load_packed` refuses to load into, before anything is changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blaq
from blaq.export.compressed import save_compressed


def network(first: Callable[..., nn.Module] = nn.Linear, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(first(8, 4), nn.BatchNorm1d(4))
    model.register_buffer("table", torch.full((2,), 2.5 + seed))
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return network()


def with_integers() -> nn.Module:
    model = network()
    model[0].weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int32), requires_grad=False)
    return model


def with_an_integer_buffer() -> nn.Module:
    model = network()
    model.table = torch.zeros(2, dtype=torch.uint8)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = network(seed=1)
    blaq.save_packed(model, blaq.LAQ(blaq.param_groups(model, bits=2)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (on_meta, r"'table' of the model is on meta, without values; .*to_empty"),
        (
            lambda: network(lambda _, n: nn.LazyLinear(n)),
            r"'0.weight' of the model has no shape yet; call the model once",
        ),
        (with_integers, r"'0.weight' is torch.float32 in the file, and torch.int32 in the model does not hold it"),
        (
            with_an_integer_buffer,
            r"'table' is torch.float32 in the file, and torch.uint8 in the model does not hold it",
        ),
    ],
)
def test_a_model_that_cannot_hold_the_values_is_refused(
    build: Callable[[], nn.Module], message: str, path: Path
) -> None:
    model = build()
    before = {name: value for name, value in model.state_dict().items() if not nn.parameter.is_lazy(value)}
    before = {name: value.clone() for name, value in before.items()}
    with pytest.raises(ValueError, match=message):
        blaq.load_packed(path, model)
    after = model.state_dict()
    assert all(value.is_meta or torch.equal(after[name], value) for name, value in before.items())


def test_values_that_fit_are_taken_whatever_their_dtype(tmp_path: Path) -> None:
    def masked(mask: torch.Tensor) -> nn.Module:
        model = network()
        model.register_buffer("mask", mask)
        return model

    model = masked(torch.tensor([0, 1, 1], dtype=torch.uint8))
    blaq.save_packed(model, blaq.LAQ(blaq.param_groups(model, bits=2)), tmp_path / "file")
    loaded = blaq.load_packed(tmp_path / "file", masked(torch.zeros(3, dtype=torch.bool)))
    assert loaded.mask.tolist() == [False, True, True]


def test_another_floating_dtype_is_taken(path: Path) -> None:
    model = blaq.load_packed(path, network().double())
    assert model.table.tolist() == [3.5, 3.5]
    assert model[0].weight.dtype == torch.float64


@pytest.mark.parametrize("model", ["model.pt", {"0.weight": torch.zeros(4, 8)}])
def test_something_else_than_a_model_is_refused(model: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=rf"the model is {type(model).__name__}; expected a torch.nn.Module"):
        blaq.load_packed(path, model)
    with pytest.raises(ValueError, match=rf"the model is {type(model).__name__}; expected a torch.nn.Module"):
        blaq.save_packed(model, blaq.LAQ(blaq.param_groups(network(), bits=2)), path)


@pytest.mark.parametrize(
    ("save", "owner"), [(blaq.save_packed, "save_packed"), (save_compressed, "export --format compressed-tensors")]
)
def test_the_name_that_safetensors_keeps_for_itself(save: Callable[..., None], owner: str, tmp_path: Path) -> None:
    model = network()
    model.register_buffer("__metadata__", torch.zeros(2))
    opt = blaq.LAQ(blaq.param_groups(model, bits=2))
    with pytest.raises(ValueError, match=rf"^{owner}: .*'__metadata__'.*rename that tensor"):
        save(model, opt, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
