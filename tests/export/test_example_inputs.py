"""What exports to a runtime are given to call the model with: it is proved on, and left as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blaq
from blaq.export.layers import quantized_weights
from blaq.export.runtimes import open_session
from blaq.export.verify import VerificationError, verify_outputs

EXPORTS = {".onnx": blaq.export_onnx, ".xml": blaq.export_openvino}
Export = Callable[..., Path]  # (model, inputs, rules=, **options)


@pytest.fixture(params=list(EXPORTS))
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Export:
    def write(model: nn.Module, inputs: Any, rules: dict[str, Any] | None = None, **options: Any) -> Path:
        opt = blaq.LAQ(blaq.param_groups(model, 2, rules=rules or {}))
        return EXPORTS[request.param](model, opt, inputs, tmp_path / f"model{request.param}", **options)

    return write


class Layer(nn.Module):
    """A linear layer, and something before and after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)))


X = torch.linspace(1, 2, 24).view(3, 8)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, 3), r"example_inputs\): the second is int; expected tensors"),
        ((X, (X, X)), r"example_inputs\): the second is tuple; expected tensors"),
        ({"x": X}, r"example_inputs\): is dict; expected a tensor or a tuple of tensors"),
        ((), r"example_inputs\): is empty"),
        (torch.zeros(0, 8), r"the model returns no value for inputs of shape \(0, 8\), so nothing would be proved"),
        (X.bfloat16(), r"example_inputs\): the first is torch.bfloat16.*runtimes.* pass it as float32"),
    ],
)
def test_other_inputs_are_refused(inputs: Any, message: str, export: Export) -> None:
    with pytest.raises(ValueError, match=message):
        export(Layer(lambda x: x.float()), inputs)


def test_outputs_that_arrays_do_not_hold_are_refused(export: Export) -> None:
    with pytest.raises(ValueError, match=r"the model returns torch.bfloat16.*return it as float32"):
        export(Layer(lambda x: x, lambda y: y.bfloat16()), X)


@pytest.mark.parametrize("write", [Tensor.log_, lambda x: x.mul_(3)])
def test_inputs_that_the_model_writes_into_are_left_as_they_are(
    write: Callable[[Tensor], Tensor], export: Export
) -> None:
    x = X.clone()
    model = Layer(write)
    path = export(model, x)
    assert torch.equal(x, X)
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    assert verify_outputs(open_session(path), model.eval(), quantized_weights(model, opt), [(x,), (x[:1],)]) < 1e-5
    assert torch.equal(x, X)


class Keeps(nn.Module):
    """Keeps what it has computed, as losses of a layer are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.fc(x)
        self.seen = [self.last.mean()]
        return self.last


def test_what_the_model_has_kept_of_a_pass_is_no_obstacle(export: Export) -> None:
    model = Keeps()
    loss = model(X).sum()
    last = model.last
    export(model, X)
    assert model.last is last and model.seen[0].requires_grad
    loss.backward()


class Mixed(nn.Module):
    """A part in another dtype than the quantized one, a buffer of the state and one that is none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 4).to(dtype)
        self.register_buffer("shift", torch.full((6,), 0.1, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x).to(self.head.weight.dtype) + self.shift).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parts_in_another_dtype_become_float32(dtype: torch.dtype, export: Export) -> None:
    model = Mixed(dtype)
    path = export(model, X, {"head*": None})
    assert model.head.weight.dtype == dtype
    (y,) = open_session(path).outputs(X.numpy())
    expected = model.float()(X)
    assert torch.allclose(torch.from_numpy(y), expected, rtol=1e-5, atol=1e-6)


def test_autocast_around_it_changes_nothing(export: Export) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        path = export(model, X)
    (y,) = open_session(path).outputs(X.numpy())
    assert torch.allclose(torch.from_numpy(y), model(X), rtol=1e-5, atol=1e-6)


# --- axes -------------------------------------------------------------------------------------------------------------------


class Lengths(nn.Module):
    """Computes with the length of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.embedding(x)) / float(x.shape[1])
        return y


def test_a_length_of_one_is_proved_on_another_too(tmp_path: Path) -> None:
    """OpenVINO's converter takes sizes for constants without a word."""
    model, opt = Lengths(), None
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(VerificationError, match="relative difference"):
        blaq.export_openvino(model, opt, tokens, tmp_path / "model.xml")
    free = ({0: Dim.DYNAMIC},)
    blaq.export_openvino(model, opt, tokens, tmp_path / "model.xml", dynamic_shapes=free)
    path = blaq.export_onnx(model, opt, tokens, tmp_path / "model.onnx")
    longer = tokens.expand(2, 3)
    assert torch.allclose(torch.from_numpy(open_session(path).run(longer.numpy())), model(longer), atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input": {0: Dim.DYNAMIC, -1: Dim.DYNAMIC}}, r"axis -1 of an input of 2 axes; expected 0 to 1"),
        (({2: Dim.DYNAMIC},), r"axis 2 of an input of 2 axes; expected 0 to 1"),
        (((Dim.DYNAMIC, None, None),), r"axis 2 of an input of 2 axes; expected 0 to 1"),
        ({"input": {0: Dim.DYNAMIC}, "inputs": {0: Dim.DYNAMIC}}, r"'inputs' is no argument .*expected 'input'"),
    ],
)
def test_axes_and_names_that_there_are_not_are_refused(shapes: Any, message: str, export: Export) -> None:
    with pytest.raises(ValueError, match=message):
        export(nn.Linear(8, 4), X, dynamic_shapes=shapes)


def test_a_wrong_number_of_inputs_is_told_with_axes_too(export: Export) -> None:
    with pytest.raises(ValueError, match="the model fails on the example inputs"):
        export(nn.Linear(8, 4), (X, X), dynamic_shapes={"input": {0: Dim.DYNAMIC}})


class Vector(nn.Module):
    """A linear layer of one output, its weight without an axis for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_weight_of_one_axis(export: Export) -> None:
    path = export(Vector(), X, {"weight": 2})
    assert open_session(path).run(X.numpy()).shape == (3,)
