"""What exports to a runtime are given to call the model with: it is proved on, and left as it is."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blaq
from blaq.export.exporting import given_axes
from blaq.export.layers import in_float32, quantized_weights
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


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (Tensor.bfloat16, r"the model returns torch.bfloat16.*return it as float32"),
        (
            lambda y: None,
            r"the model returns NoneType without tensors in it that torch finds; return a tensor, or tuples",
        ),
        (lambda y: SimpleNamespace(y=y), "the model returns SimpleNamespace without tensors in it that torch finds"),
        (
            lambda y: y[:0],
            r"returns no value for inputs of shape \(3, 8\), .*pass an example for which it returns something",
        ),
    ],
)
def test_outputs_that_arrays_do_not_hold_are_refused(
    after: Callable[[Tensor], Any], message: str, export: Export
) -> None:
    with pytest.raises(ValueError, match=message):
        export(Layer(lambda x: x, after), X)


def test_inputs_that_the_model_writes_into_are_left_as_they_are(export: Export) -> None:
    x = X.clone()
    model = Layer(lambda x: x.log_().mul_(3))
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


def test_what_the_model_has_kept_of_a_pass_is_no_obstacle_nor_autocast_around(export: Export) -> None:
    model = Keeps()
    loss = model(X).sum()
    last = model.last
    with torch.autocast("cpu", dtype=torch.bfloat16):
        path = export(model, X)
    assert model.last is last and model.seen[0].requires_grad
    loss.backward()
    (y,) = open_session(path).outputs(X.numpy())
    assert torch.allclose(torch.from_numpy(y), model(X), rtol=1e-5, atol=1e-6)


def test_a_copy_has_memory_of_its_own_for_what_is_kept_of_a_pass() -> None:
    model = Layer(lambda x: x)
    model.register_buffer("h", 2 * model.fc.bias)
    assert model.h.grad_fn is not None
    before = model.h.detach().clone()
    copied = in_float32(model, [])
    assert torch.equal(copied.get_buffer("h").mul_(0.5), before / 2)
    assert torch.equal(model.h, before)


def test_what_an_object_has_kept_of_a_pass_is_told() -> None:
    model = Layer(lambda x: x)
    model.cache = SimpleNamespace(last=model(X))
    with pytest.raises(
        ValueError, match=r"^export: the model cannot be copied \(.*\); drop what it has kept of a pass"
    ):
        in_float32(model, [])


class Mixed(nn.Module):
    """Parts in other dtypes than the quantized one, a buffer of the state and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 4).bfloat16()
        self.register_buffer("shift", torch.full((6,), 0.1, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x).to(self.shift.dtype) + self.shift
        return self.head(h.to(self.head.weight.dtype)).float()


def test_parts_in_another_dtype_become_float32(export: Export) -> None:
    model = Mixed()
    path = export(model, X, {"head*": None})
    assert (model.head.weight.dtype, model.shift.dtype) == (torch.bfloat16, torch.float64)
    (y,) = open_session(path).outputs(X.numpy())
    expected = model.float()(X)
    assert torch.allclose(torch.from_numpy(y), expected, rtol=1e-5, atol=1e-6)


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
    assert names_of(path) == [["batch", "sequence"], ["batch", "sequence", 4]]


class Column(nn.Module):
    """One category, of one column."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(self.embedding(x).flatten(1))
        return y if mask is None else y * mask


def names_of(path: Path) -> list[list[str | int]]:
    graph = onnx.load(path).graph
    axes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    return [[axis.dim_param or axis.dim_value for axis in each] for each in axes]


def test_the_axis_of_a_column_is_fixed(export: Export) -> None:
    model, tokens = Column(), torch.zeros(1, 1, dtype=torch.int64)
    path = export(model, tokens)
    more = tokens.expand(3, 1)
    assert torch.allclose(torch.from_numpy(open_session(path).run(more.numpy())), model(more), atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 2\)|Got: 2 Expected: 1"):
        open_session(path).run(tokens.expand(3, 2).numpy())
    if path.suffix == ".onnx":
        assert names_of(path) == [["batch", 1], ["batch", 4]]
    else:  # an axis that the user names is no such one
        with pytest.raises(ValueError, match="the model itself fails with another sequence size"):
            export(model, tokens, dynamic_shapes=({1: Dim.DYNAMIC},))


def test_an_axis_that_the_model_drops_where_it_is_one(tmp_path: Path) -> None:
    model = Layer(lambda x: x, Tensor.squeeze)
    path = blaq.export_onnx(model, blaq.LAQ(blaq.param_groups(model, 2)), X, tmp_path / "model.onnx")
    assert open_session(path).run(X[:1].numpy()).shape == (4,)


def test_none_for_an_argument_that_is_not_given(export: Export) -> None:
    model, tokens = Column(), torch.zeros(2, 1, dtype=torch.int64)
    path = export(model, tokens, dynamic_shapes={"x": {0: Dim.DYNAMIC}, "mask": None})
    assert open_session(path).run(tokens.expand(2, 1).numpy()).shape == (2, 4)
    with pytest.raises(ValueError, match=r"'mask' is no argument that example_inputs give; expected 'x'"):
        export(model, tokens, dynamic_shapes={"x": {0: Dim.DYNAMIC}, "mask": {0: Dim.DYNAMIC}})


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


def test_of_an_input_without_axes_none_can_change() -> None:
    with pytest.raises(ValueError, match=r"axis 0 of an input of 0 axes; expected None\.$"):
        given_axes(nn.Identity(), (torch.tensor(1.0),), ({0: Dim.DYNAMIC},))


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
