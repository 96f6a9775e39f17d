"""OpenVINO files: what the runtime holds and computes, against codes times scale and against torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.export.layers import QuantizedWeight, quantized_weights
from blaq.export.openvino import to_openvino
from blaq.export.openvino_session import OpenVINOSession, settings
from blaq.export.openvino_weights import choose, dequantized
from blaq.export.runtimes import open_session
from blaq.export.verify import VerificationError
from blaq.grids import GRIDS, Grid
from blaq.tasks.models import build_model

CORE = ov.Core()


def random_weight(
    grid: str, shape: tuple[int, ...], granularity: str | int = "channel", name: str = "fc.weight"
) -> QuantizedWeight:
    """Random codes and scales; the name seeds nothing, the shape does."""
    generator = torch.Generator().manual_seed(sum(shape))
    parsed = Grid.parse(grid)
    size = int(np.prod(shape))
    rows = {"tensor": 1, "channel": shape[0]}.get(str(granularity), 0) or size // int(granularity)
    codes = torch.randint(len(parsed.levels), shape, generator=generator).to(torch.uint8)
    scale = torch.rand(rows, parsed.scales, generator=generator) * 0.05 + 0.01
    return QuantizedWeight(name, (), parsed, granularity, codes, scale)


def compiled(outputs: list[Any], parameters: list[Any]) -> ov.CompiledModel:
    return CORE.compile_model(ov.Model(outputs, parameters, "test"), "CPU", settings("exact", 1))


def layer_types(model: ov.CompiledModel, kind: str) -> list[str]:
    """The precisions of the layers of a kind that the runtime really runs."""
    info = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    return [i["runtimePrecision"].astype(str) for i in info if i["layerType"].astype(str) == kind]


def small_mlp(bias: bool = False) -> nn.Sequential:
    """Linear layers of awkward sizes with BatchNorm behind them, whose statistics are not those of a new one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(19, 33, bias=bias), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 10))
    randomize_norms(model)
    return model


def randomize_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)


# --- constants ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_unpacks_to_scale_times_level(grid: str) -> None:
    for granularity in ("tensor", "channel", 9):
        weight = random_weight(grid, (5, 27), granularity)
        values = dequantized(weight, choose(weight, "exact", linear=False))
        assert values.get_node().get_friendly_name() == "fc.weight"
        assert np.array_equal(compiled([op.result(values)], [])([])[0], weight.values.numpy())


PACKED = {
    "binary": "u2", "ternary": "u2", "midrise2": "u2", "linear3": "i4", "log3": "i4", "linear4": "i4", "midrise3": "i4",
    "midrise4": "u4", "log4": "i8", "linear5": "i8", "linear8": "i8", "midrise7": "i8", "midrise8": "u8",
}  # fmt: skip


@pytest.mark.parametrize("grid", PACKED)
def test_the_kernel_computes_with_packed_weights_whatever_the_shape(grid: str) -> None:
    """Without padding OpenVINO reads wrong weights from the first row on that begins inside a byte."""
    for N, K in ((1, 17), (3, 18), (10, 19), (33, 250)):
        weight = random_weight(grid, (N, K))
        container = choose(weight, "exact", linear=True)
        assert (container.element, container.packed) == (PACKED[grid], True)
        columns = K + container.padding(K)
        x = op.parameter([-1, columns], np.float32)
        model = compiled([op.result(op.matmul(x, dequantized(weight, container), False, True))], [x])
        seen = model(np.eye(columns, dtype=np.float32)[:K])[0].T
        assert layer_types(model, "FullyConnected") == [PACKED[grid] if N > 1 else "f32"]  # one row it unpacks
        assert np.array_equal(seen, weight.values.numpy())


def export_group(grid: str, size: int, folder: Path, preset: Any = "exact") -> tuple[nn.Module, Path]:
    torch.manual_seed(size)
    model = nn.Sequential(nn.Linear(4 * size, 16))
    opt = blaq.LAQ(blaq.param_groups(model, bits=grid, granularity=size))
    return model, blaq.export_openvino(model, opt, torch.randn(50, 4 * size), folder / "model.xml", preset=preset)


@pytest.mark.parametrize("size", [2, 16, 32, 49, 64, 96, 144])
@pytest.mark.parametrize("grid", ["ternary", "linear4", "midrise4", "linear8"])
def test_groups_have_their_scales_whatever_the_number_of_rows(grid: str, size: int, tmp_path: Path) -> None:
    """Packed products of up to 4 rows take wrong scales for groups of 48 or 144 (4 bits), 96 or 144 (2 bits)."""
    model, path = export_group(grid, size, tmp_path)
    session = open_session(path)
    assert (session.description["weights"]["0.weight"]["note"] == "") == (size in (2, 16, 32, 64))
    for rows in (1, 2, 3, 4, 5, 50):
        x = torch.randn(rows, 4 * size)
        expected = model(x).detach().numpy()
        assert np.abs(session.run(x.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_a_group_as_long_as_a_row_is_a_channel(preset: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 16))
    opt = blaq.LAQ(blaq.param_groups(model, bits="ternary", granularity=48))
    session = open_session(blaq.export_openvino(model, opt, torch.randn(9, 48), tmp_path / "model.xml", preset=preset))
    assert session.description["weights"]["0.weight"]["note"] == ""
    assert choose(random_weight("linear4", (4, 7), 7), preset, linear=True).note == ""


def test_a_kernel_that_is_wrong_for_few_rows_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import blaq.export.openvino_graph as module

    monkeypatch.setattr(
        module, "choose", lambda weight, preset, linear: replace(choose(weight, preset, linear=linear), note="")
    )
    with pytest.raises(VerificationError, match=r"'0.weight' is not scale times level in the runtime"):
        export_group("ternary", 96, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_as_many_bits_as_its_constants(tmp_path: Path) -> None:
    bits_of = {"binary": 2, "midrise2": 2, "linear4": 4, "midrise4": 4, "linear8": 8, "ternary2": 2, "log8": 8}
    for grid, bits in bits_of.items():
        weight = random_weight(grid, (256, 512))
        values = dequantized(weight, choose(weight, "exact", linear=True))
        ov.serialize(ov.Model([op.result(values)], [], "w"), tmp_path / "w.xml")
        assert 256 * 512 * bits / 8 <= (tmp_path / "w.bin").stat().st_size < 256 * 512 * bits / 8 + 256 * 8 + 2100


@pytest.mark.parametrize(
    ("grid", "granularity", "linear", "note"),
    [
        ("ternary2", "tensor", True, "two scales"),
        ("log8", "tensor", True, "levels up to 8.50706e+37, no 8-bit integers"),
        ("ternary", "tensor", False, "no Linear layer"),
        ("ternary", 9, True, "groups of another size than 1, 2, 4, 8, .."),
        ("ternary", 1, True, "groups, and rows that fill no whole bytes"),
    ],
)
def test_what_cannot_stay_packed_says_why(grid: str, granularity: str | int, linear: bool, note: str) -> None:
    assert choose(random_weight(grid, (4, 27), granularity), "exact", linear=linear).note == note


# --- files ----------------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """An embedding tied to the output, an LSTM, a GRU, and a weight that is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 14)
        self.lstm = nn.LSTM(14, 7, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(14, 14, batch_first=True)
        self.mix = nn.Parameter(torch.randn(14, 14))
        self.out = nn.Linear(14, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.gru(self.lstm(self.embedding(tokens))[0])
        logits: Tensor = self.out(states @ self.mix)
        return logits


class Pictures(nn.Module):
    """Convolutions with BatchNorm that OpenVINO would like to fold into them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.BatchNorm2d(5)
        )
        self.head = nn.Linear(5, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


def cases() -> list[Any]:
    tokens = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    small = [
        pytest.param(small_mlp, images.view(4, -1)[:, :19], id="mlp"),
        pytest.param(lambda: small_mlp(bias=True), images.view(4, -1)[:, :19], id="mlp-bias"),
        pytest.param(Pictures, images, id="pictures"),
        pytest.param(Tokens, tokens, id="tokens"),
        pytest.param(lambda: build_model("char_lstm", hidden=10, classes=20), tokens, id="char_lstm"),
        pytest.param(lambda: build_model("lenet5", image_size=12), torch.randn(4, 1, 12, 12), id="lenet5"),
    ]
    resnet = pytest.param(lambda: build_model("resnet20"), torch.randn(2, 3, 12, 12), "ternary", id="resnet20")
    grids = ("ternary", "ternary2")
    return [pytest.param(*case.values, bits, id=f"{case.id}-{bits}") for case in small for bits in grids] + [resnet]


@pytest.mark.parametrize(("build", "x", "bits"), cases())
def test_the_runtime_has_the_weights_and_the_outputs_of_torch(build: Any, x: Tensor, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    randomize_norms(model)
    rules = {"embedding": bits, "mix": bits} if isinstance(model, Tokens) else None
    opt = blaq.LAQ(blaq.param_groups(model, bits=bits, granularity="channel", rules=rules))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = blaq.export_openvino(model, opt, x, tmp_path / "model.xml")

    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    session = open_session(path, threads=1)
    assert session.preset == session.description["preset"] == "exact"
    seen = session.weights()
    weights = quantized_weights(model, opt)
    assert list(seen) == [weight.name for weight in weights]
    for weight in weights:
        assert np.array_equal(seen[weight.name], weight.values.numpy())
    model.eval()
    for examples in (x, x[:1], torch.cat([x, x])):
        expected = model(examples).detach().numpy()
        assert np.abs(session.run(examples.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()


def test_layers_are_what_the_modules_return(tmp_path: Path) -> None:
    model, x = small_mlp(bias=True), torch.randn(4, 19)
    opt = blaq.LAQ(blaq.param_groups(model, bits=2))
    session = open_session(blaq.export_openvino(model, opt, x, tmp_path / "model.xml"))
    first = model.eval()[0](x)
    seen = session.layers(x.numpy())
    assert list(seen) == ["0.weight", "3.weight"]
    assert np.allclose(seen["0.weight"], first.detach().numpy(), atol=1e-6)
    assert np.allclose(seen["3.weight"], model(x).detach().numpy(), atol=1e-6)


def test_linear_layers_stay_packed_behind_a_batchnorm(tmp_path: Path) -> None:
    """Without a guard the runtime multiplies the BatchNorm into the weights, in float32."""
    for build in (small_mlp, lambda: small_mlp(bias=True)):
        model = build()
        opt = blaq.LAQ(blaq.param_groups(model, bits=2, granularity="channel"))
        path = blaq.export_openvino(model, opt, torch.randn(4, 19), tmp_path / "model.xml")
        loaded = CORE.compile_model(path, "CPU", settings("exact"))
        assert layer_types(loaded, "FullyConnected") == ["u2", "u2"]


@pytest.mark.parametrize("bits", ["binary", "ternary", "midrise2", "linear4", "linear8"])
def test_fast_rounds_activations_and_exact_does_not(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    opt, x = blaq.LAQ(blaq.param_groups(model, bits=bits, granularity="channel")), torch.randn(16, 512)
    expected = model(x).detach().numpy()
    relative = {}
    for preset in ("exact", "fast"):
        path = blaq.export_openvino(model, opt, x, tmp_path / f"{preset}.xml", preset=preset)  # type: ignore[arg-type]
        session = open_session(path)
        relative[preset] = np.abs(session.run(x.numpy()) - expected).max() / np.abs(expected).max()
        for weight in quantized_weights(model, opt):
            assert np.array_equal(session.weights()[weight.name], weight.values.numpy())
    assert relative["exact"] < 2e-6
    if torch.cpu._is_vnni_supported():
        assert 1e-4 < relative["fast"] < 2e-2
    else:  # the runtime multiplies 8 bits only where the processor does
        assert relative["fast"] < 2e-6


def test_the_file_brings_its_group_size_along(tmp_path: Path) -> None:
    """Only the precision has to be said when the file is loaded by OpenVINO itself."""
    model, x = nn.Sequential(nn.Linear(512, 64)), torch.randn(16, 512)
    opt = blaq.LAQ(blaq.param_groups(model, bits=2))
    for preset, size in (("exact", 0), ("fast", 64)):
        path = blaq.export_openvino(model, opt, x, tmp_path / f"{preset}.xml", preset=preset)  # type: ignore[arg-type]
        loaded = CORE.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert loaded.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == size
        assert np.array_equal(loaded(x.numpy())[0], open_session(path).run(x.numpy()))


def test_ternary_is_packed_in_two_bits_on_disk(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 10, bias=False))
    opt = blaq.LAQ(blaq.param_groups(model, bits=2))
    path = blaq.export_openvino(model, opt, torch.randn(2, 512), tmp_path / "model.xml")
    assert path.with_suffix(".bin").stat().st_size < (512 * 512 + 5120) / 4 * 1.01


# --- errors -----------------------------------------------------------------------------------------------------------------


def exported(folder: Path, bits: int = 2) -> tuple[nn.Module, blaq.LAQ, Path]:
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(16, 8))
    opt = blaq.LAQ(blaq.param_groups(model, bits=bits))
    return model, opt, blaq.export_openvino(model, opt, torch.randn(2, 16), folder / "model.xml")


def test_an_export_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt, path = exported(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(OpenVINOSession, "outputs", lambda _, *x: [np.full((len(x[0]), 8), np.nan, np.float32)])
    with pytest.raises(VerificationError, match=r"'0\.weight'|no quantized layer"):
        blaq.export_openvino(model, opt, torch.randn(2, 16), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_constant_that_is_not_the_weight_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import blaq.export.openvino_weights as module

    model, opt, path = exported(tmp_path)
    right = module._constant
    monkeypatch.setattr(module, "_constant", lambda values, element: right(values[:, ::-1], element))
    with pytest.raises(VerificationError, match=r"'0.weight' is not scale times level in the runtime"):
        blaq.export_openvino(model, opt, torch.randn(2, 16), path)


def lose_weights(path: Path) -> None:
    path.with_suffix(".bin").unlink()


def cut_short(path: Path) -> None:
    path.write_text(path.read_text()[:500])


def swap_weights(path: Path) -> None:
    weights = path.with_suffix(".bin")
    weights.write_bytes(b"\x55" * weights.stat().st_size)


def change_version(path: Path) -> None:
    text = path.read_text()
    changed = text.replace("&quot;format_version&quot;: 1", "&quot;format_version&quot;: 2")
    assert changed != text
    path.write_text(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_weights, r"there is no model\.bin beside it"),
        (cut_short, "OpenVINO cannot read it"),
        (swap_weights, "is damaged or of another export"),
        (change_version, "format version 2, expected 1"),
    ],
)
def test_damaged_files_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    _, _, path = exported(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        open_session(path)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    x = op.parameter([2], np.float32)
    ov.save_model(ov.Model([op.result(op.relu(x))], [x], "other"), tmp_path / "other.xml")
    with pytest.raises(ValueError, match="was not written by `blaq export`"):
        open_session(tmp_path / "other.xml")


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    opt, x = blaq.LAQ(blaq.param_groups(model, bits=2)), torch.randn(2, 16)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.xml"):
        blaq.export_openvino(model, opt, x, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="there is no folder"):
        blaq.export_openvino(model, opt, x, tmp_path / "none" / "model.xml")
    with pytest.raises(ValueError, match="expected 'exact' or 'fast'"):
        blaq.export_openvino(model, opt, x, tmp_path / "model.xml", preset="quick")  # type: ignore[arg-type]
    unused = nn.ModuleDict({"used": nn.Linear(16, 8), "unused": nn.Linear(4, 4)})
    unused.forward = unused["used"].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'unused.weight' is not in the converted graph"):
        blaq.export_openvino(unused, blaq.LAQ(blaq.param_groups(unused, bits=2)), x, tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


def test_the_description_is_complete() -> None:
    model = small_mlp()
    opt = blaq.LAQ(blaq.param_groups(model, bits=2, rules={"0": "log8"}))
    graph = to_openvino(
        model.eval(), quantized_weights(model, opt), (torch.randn(2, 19),), "exact", recipe={"name": "r"}
    )
    description = json.loads(graph.get_rt_info(["blaq"]).astype(str))
    assert description["recipe"] == {"name": "r"}
    assert description["weights"]["0.weight"] == {
        "grid": "log8", "granularity": "tensor", "shape": [33, 19], "container": "u8", "holds": "codes",
        "bits": 8, "padding": 0,
        "note": "levels up to 8.50706e+37, no 8-bit integers", "output": "__module.0/aten::linear/MatMul",
    }  # fmt: skip
    assert [value.get_partial_shape().to_string() for value in graph.inputs] == ["[?,19]"]


def test_a_name_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    (tmp_path / "model.xml").mkdir()
    (tmp_path / "other.bin").write_bytes(b"somebody's")
    for name, message in (
        ("model.xml", "is a folder; expected the name of a file"),
        ("other.xml", "is there without 'other.xml'"),
    ):
        with pytest.raises(ValueError, match=message):
            blaq.export_openvino(model, opt, torch.randn(2, 8), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.xml", "other.bin"]
    assert (tmp_path / "other.bin").read_bytes() == b"somebody's"


def test_a_size_that_the_graph_has_fixed_is_an_error_with_its_shape(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    blaq.export_openvino(model, blaq.LAQ(blaq.param_groups(model, 2)), torch.randn(2, 8), tmp_path / "model.xml")
    with pytest.raises(ValueError, match=r"OpenVINO cannot compute the outputs of inputs \(2, 9\)"):
        open_session(tmp_path / "model.xml").run(np.zeros((2, 9), np.float32))


class Truths(nn.Module):
    """Returns truth values beside logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.layer(x)
        return logits, logits > 0


def test_truth_values_are_compared(tmp_path: Path) -> None:
    model = Truths()
    blaq.export_openvino(model, blaq.LAQ(blaq.param_groups(model, 2)), torch.randn(2, 8), tmp_path / "model.xml")
    _, positive = open_session(tmp_path / "model.xml").outputs(np.ones((2, 8), np.float32))
    assert positive.dtype == np.bool_
