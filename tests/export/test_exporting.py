"""What both exports to a runtime accept: other dtypes, compiled models, axes that change or do not, outputs of every kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blaq
from blaq.export.exporting import given_axes
from blaq.export.layers import quantized_weights
from blaq.export.runtimes import open_session
from blaq.export.verify import VerificationError

Export = Callable[..., Path]  # (model, inputs, bits=, **options)
EXPORTS = {".onnx": blaq.export_onnx, ".xml": blaq.export_openvino}


@pytest.fixture(params=list(EXPORTS))
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Export:
    def write(model: Any, inputs: Any, bits: int | str = 2, **options: Any) -> Path:
        opt = blaq.LAQ(blaq.param_groups(model, bits))
        return EXPORTS[request.param](model, opt, inputs, tmp_path / f"model{request.param}", **options)

    return write


def check(path: Path, model: nn.Module, *inputs: Tensor) -> None:
    expected = model.eval()(*inputs).detach().numpy()
    y = open_session(path).run(*(x.numpy() for x in inputs))
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


# --- dtypes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_becomes_float32_with_the_very_scales_and_levels(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    opt = blaq.LAQ(blaq.param_groups(model, "linear4", "channel"), eps=1e-6)
    x, before = torch.randn(4, 16, dtype=dtype), [p.clone() for p in model.parameters()]
    for suffix, export in EXPORTS.items():
        path = export(model, opt, x, tmp_path / f"model{suffix}")
        assert model.training and all(map(torch.equal, model.parameters(), before))  # and of its dtype
        seen = open_session(path).weights()
        for weight in quantized_weights(model, opt):
            assert np.array_equal(seen[weight.name], weight.values.numpy())
        blaq.save_packed(model, opt, tmp_path / "model.safetensors")
        check(path, blaq.load_packed(tmp_path / "model.safetensors", model_in_float32()), x.float())


def model_in_float32() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


# --- axes -------------------------------------------------------------------------------------------------------------------


class Columns(nn.Module):
    """A table of categories: integers of two axes, the second of which is no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 8), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.embedding(x).flatten(1))
        return y


def test_an_axis_that_cannot_change_is_named_and_can_be_fixed(export: Export) -> None:
    torch.manual_seed(0)
    model, x = Columns(), torch.randint(10, (4, 8))
    with pytest.raises(ValueError, match=r"fails with another sequence size, inputs \(4, 7\): .* pass dynamic_shapes"):
        export(model, x)
    for shapes in (({0: Dim.DYNAMIC},), {"x": {0: Dim.DYNAMIC}}, ([Dim.DYNAMIC, None],)):
        path = export(model, x, dynamic_shapes=shapes)
        check(path, model, x[:3])
    path = export(model, x, dynamic_shapes=(None,))
    check(path, model, x)
    with pytest.raises(ValueError, match=r"inputs.* \(3, 8\)"):
        open_session(path).run(x[:3].numpy())


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        y: Tensor = self.fc(first + sum(others))
        return y


def test_a_model_of_any_number_of_inputs(export: Export) -> None:
    torch.manual_seed(0)
    for count in (1, 3):
        inputs = tuple(torch.randn(4, 8) for _ in range(count))
        model = Several()
        check(export(model, inputs), model, *inputs)


def test_axes_are_read_as_torch_reads_them() -> None:
    x, several = torch.zeros(4, 8), Several()
    assert given_axes(several, (x, x.long()), None) == [[0], [0, 1]]
    changes = {0: Dim("batch"), 1: Dim.STATIC}
    assert given_axes(several, (x, x, x), (changes, ({0: 4}, (None, Dim.AUTO)))) == [[0], [], [1]]
    assert given_axes(several, (x, x), {"others": ({},), "first": changes}) == [[0], []]
    for wrong in ((changes,), {"first": changes, "other": None}, (changes, "batch")):
        with pytest.raises(ValueError, match=r"expected one entry for each input, 2 in all"):
            given_axes(several, (x, x), wrong)


# --- models and outputs -----------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_exported_as_the_model_itself(export: Export) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8)
    path = export(torch.compile(model, backend="eager"), x)
    assert list(open_session(path).weights()) == ["0.weight"]
    check(path, model, x)


class Masked(nn.Module):
    """Logits with a class that never comes, and the weight beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x).masked_fill(torch.tensor([True, False, False, False]), -torch.inf), self.fc.weight


def test_infinities_and_a_weight_among_the_outputs(export: Export) -> None:
    model, x = Masked(), torch.randn(4, 8)
    logits, weight = open_session(export(model, x)).outputs(x.numpy())
    assert np.isneginf(logits[:, 0]).all() and np.isfinite(logits[:, 1:]).all()
    assert np.array_equal(weight, model.fc.weight.detach().numpy())


class Recurrent(nn.Module):
    """No layer has one output that a runtime could be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        return states


def test_what_differs_is_said_where_no_layer_can_be_named(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(Recurrent(), torch.randn(2, 2, 8))
    session = open_session(path)
    assert session.layers(np.zeros((2, 2, 8), np.float32)).keys() <= {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    outputs = type(session).outputs
    monkeypatch.setattr(type(session), "outputs", lambda self, *x: [y + 1 for y in outputs(self, *x)])
    with pytest.raises(VerificationError, match="the runtime's outputs are not torch's"):
        export(Recurrent(), torch.randn(2, 2, 8))


class Averaged(nn.Module):
    """Computes with a size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) / float(x.shape[0])


def test_axes_that_the_user_names_are_proved_for_openvino(tmp_path: Path) -> None:
    """Its converter takes sizes for constants without a word."""
    pytest.importorskip("openvino")
    model = Averaged()
    opt = blaq.LAQ(blaq.param_groups(model, bits=2, rules={}))
    free = ({0: torch.export.Dim.DYNAMIC},)
    with pytest.raises(blaq.export.verify.VerificationError, match="relative difference"):
        blaq.export_openvino(model, opt, torch.randn(4, 8), tmp_path / "m.xml", dynamic_shapes=free)
    assert not list(tmp_path.iterdir())
    blaq.export_openvino(model, opt, torch.randn(4, 8), tmp_path / "m.xml", dynamic_shapes=(None,))


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ((None, None), [[], []]),
        ([None, None], [[], []]),
        ({"x": None, "y": None}, [[], []]),
        ({"x": {0: torch.export.Dim.DYNAMIC}, "y": None}, [[0], []]),
        (((None, {1: torch.export.Dim.AUTO}),), [[], [1]]),
        (((torch.export.Dim.AUTO, None), (None, torch.export.Dim.AUTO)), [[0], [1]]),
    ],
    ids=str,
)
def test_axes_of_two_inputs_are_read_as_torch_reads_them(shapes: Any, axes: list[list[int]]) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    assert given_axes(Two(), (torch.zeros(2, 3), torch.zeros(2, 3)), shapes) == axes


@pytest.mark.parametrize("export", [blaq.export_onnx, blaq.export_openvino])
def test_a_dtype_written_in_forward_is_told(export: Any, tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.to(torch.bfloat16))

    model = Cast().bfloat16()
    opt = blaq.LAQ(blaq.param_groups(model, bits=2, rules={}))
    suffix = ".onnx" if export is blaq.export_onnx else ".xml"
    pytest.importorskip("onnxruntime" if suffix == ".onnx" else "openvino")
    with pytest.raises(
        ValueError, match=r"converted to float32 as exports compute, fails .*; name no dtype in forward"
    ):
        export(model, opt, torch.randn(4, 8).bfloat16(), tmp_path / f"m{suffix}")
