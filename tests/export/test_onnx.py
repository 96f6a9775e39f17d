"""Whole models exported to ONNX: what a plain ONNX Runtime session computes from the file, against torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.export.layers import QuantizedWeight, quantized_weights
from blaq.export.onnx import _claim, export_onnx
from blaq.export.runtimes import open_session
from blaq.tasks.models import build_model

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
SMALL = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}

# model, options, shape of an example, vocabulary, param_groups, preset, how many weights each container holds
MODELS: list[tuple[str, dict[str, Any], tuple[int, ...], int | None, dict[str, Any], str, dict[str, int]]] = [
    ("mlp", {"inputs": 30, "hidden": [33, 20]}, (30,), None, {"bits": 1}, "fast", {"matmulnbits2": 3}),
    ("mlp", {"inputs": 30, "hidden": [33, 20]}, (30,), None, {"bits": "linear8"}, "exact", {"unpacked": 3}),
    ("lenet5", {"image_size": 12}, (1, 12, 12), None, {"bits": 2, "granularity": "channel"}, "fast",
     {"unpacked": 2, "matmulnbits2": 2}),
    ("vgg", {"image_size": 8, "channels": (4, 8), "hidden": 16}, (3, 8, 8), None, {"bits": "midrise2"}, "exact",
     {"unpacked": 4, "matmulnbits4": 3}),
    ("resnet20", {}, (3, 8, 8), None, {"bits": "ternary2"}, "exact", {"unpacked": 20}),
    ("resnet18", {"classes": 10}, (3, 32, 32), None, {"bits": 2, "granularity": "channel"}, "exact",
     {"unpacked": 12, "matmulnbits4": 1}),
    ("char_lstm", {"classes": 9, "hidden": 6}, (3,), 9, {"bits": 3}, "exact", {"unpacked": 2, "matmulnbits4": 1}),
    ("hf:mobilenet_v2", {"depth_multiplier": 0.35, "classes": 5}, (3, 32, 32), None,
     {"bits": 4, "granularity": "channel"}, "exact", {"unpacked": 25, "matmulnbits4": 1}),
    ("hf:efficientnet", {**SMALL, "classes": 5}, (3, 32, 32), None, {"bits": "log4"}, "fast",
     {"unpacked": 36, "matmulnbits8": 1}),
    ("hf:vit", {**VIT, "classes": 5, "image_size": 16, "patch_size": 8}, (3, 16, 16), None,
     {"bits": 2, "granularity": 16}, "exact", {"unpacked": 1, "matmulnbits4": 13}),
    ("hf:gpt2", {**GPT2, "classes": 11}, (7,), 11, {"bits": 4, "rules": {"transformer.wte": 8}}, "exact",
     {"matmulnbits4": 4, "unpacked": 1}),
]  # fmt: skip


def examples(count: int, shape: tuple[int, ...], vocabulary: int | None) -> Tensor:
    if vocabulary is None:
        return torch.randn(count, *shape)
    return torch.randint(0, vocabulary, (count, *shape))


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm as after training: nothing is 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def without_repetitions(model: nn.Module) -> nn.Module:
    """One of the residual blocks that keep the shape, and all that change it: more of the same learn nothing but take time."""
    kept = 0
    for name, module in list(model.named_modules()):
        keeps = isinstance(getattr(module, "downsample", None), nn.Identity) or getattr(module, "use_residual", False)
        kept += keeps
        if keeps and kept > 1:
            model.set_submodule(name, nn.Identity())
    return model


def plain_session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def difference(y: np.ndarray, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float(np.abs(y - expected.numpy()).max() / np.abs(expected.numpy()).max())


@pytest.mark.parametrize(
    ("name", "options", "shape", "vocabulary", "scheme", "preset", "kinds"),
    MODELS,
    ids=[f"{row[0].removeprefix('hf:')}-{row[5]}" for row in MODELS],
)
def test_models(
    name: str, options: Any, shape: Any, vocabulary: Any, scheme: Any, preset: Any, kinds: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_model(name, **options)
    if name != "resnet20":  # one network is exported in its whole depth
        model = without_repetitions(model)
    with_statistics(model)
    opt = blaq.LAQ(blaq.param_groups(model, **scheme))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = export_onnx(model, opt, examples(2, shape, vocabulary), tmp_path / "model.onnx", preset)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]

    session = plain_session(path)
    model.eval()
    sizes = [(1, shape), (5, shape)] if vocabulary is None else [(1, shape), (3, (4,)), (2, (9,))]
    for count, size in sizes:
        x = examples(count, size, vocabulary)
        with torch.no_grad():
            expected = model(x)
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert difference(y, expected) < (1e-5 if preset == "exact" else 2e-2)
    axes = session.get_inputs()[0].shape
    assert axes == (["batch", *shape] if vocabulary is None else ["batch", "sequence"])
    assert session.get_outputs()[0].shape[: 1 if vocabulary is None else 2] == axes[: 1 if vocabulary is None else 2]

    described = open_session(path).description["weights"]
    weights = quantized_weights(model, opt)
    assert list(described) == [weight.name for weight in weights]
    found = [entry["container"] for entry in described.values()]
    assert {kind: found.count(kind) for kind in found} == kinds
    assert_nothing_quantized_is_left_in_float(onnx.load(path), weights)


def assert_nothing_quantized_is_left_in_float(proto: onnx.ModelProto, weights: list[QuantizedWeight]) -> None:
    """No constant of the file has the values of a quantized weight, in whatever order and shape."""
    constants = [
        onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    ]
    ordered = [np.sort(constant, axis=None) for constant in constants]
    for weight in weights:
        values = np.sort(weight.values.numpy(), axis=None)
        assert not any(np.array_equal(values, other) for other in ordered), weight.name


def test_graphs_have_no_operator_that_a_runtime_gets_wrong(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    for bits in (1, "ternary2", 8):
        path = export_onnx(
            model, blaq.LAQ(blaq.param_groups(model, bits)), torch.randn(2, 1, 4, 4), tmp_path / "m.onnx"
        )
        proto = onnx.load(path)
        assert not {"BitShift", "DequantizeLinear"} & {node.op_type for node in proto.graph.node}
        small = {onnx.TensorProto.INT2, onnx.TensorProto.UINT2, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
        assert not small & {tensor.data_type for tensor in proto.graph.initializer}
        assert {entry.domain: entry.version for entry in proto.opset_import}[""] == 20
        text = path.read_bytes()
        assert b"site-packages" not in text  # nothing of the machine it was written on
        assert str(Path(__file__).parent).encode() not in text


class Zoo(nn.Module):
    """Layers of every kind, a weight used twice, a weight tied, one that is multiplied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.norm = nn.BatchNorm1d(6)
        self.gru = nn.GRU(6, 8, batch_first=True, bidirectional=True)
        self.twice = nn.Linear(16, 16)
        self.own_weight = nn.Parameter(torch.randn(8, 16))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, shift: Tensor) -> dict[str, Tensor]:
        h = self.mix(self.embedding(tokens).transpose(1, 2))
        h = torch.relu(self.norm(self.up(h))).transpose(1, 2)
        h, _ = self.gru(h)
        h = self.twice(torch.tanh(self.twice(h)))
        features = (h @ self.own_weight.T) + shift[:, None]
        return {"features": features, "logits": self.head(features)}


def test_every_kind_of_layer_several_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = with_statistics(Zoo())
    opt = blaq.BLAQ(blaq.param_groups(model, "linear4", rules={"embedding": 2, "gru": 1}), trial="none")
    inputs = torch.randint(0, 12, (2, 3)), torch.randn(2, 8)  # few steps: the exporter first unrolls them
    path = export_onnx(model, opt, inputs, tmp_path / "zoo.onnx")
    session = open_session(path)
    assert [entry["container"] for entry in session.description["weights"].values()].count("matmulnbits4") == 2
    for weight in quantized_weights(model, opt):
        assert np.array_equal(session.weights()[weight.name], weight.values.numpy())
    others = torch.randint(0, 12, (3, 4)), torch.randn(3, 8)
    with torch.no_grad():
        expected = model.eval()(*others)
    features, logits = session.outputs(*(x.numpy() for x in others))
    assert difference(features, expected["features"]) < 1e-5
    assert difference(logits, expected["logits"]) < 1e-5
    assert np.array_equal(session.run(*(x.numpy() for x in others)), features)


def test_the_weights_are_those_of_eval(tmp_path: Path) -> None:
    """With ``trial="past"`` the parameters hold another point while training."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    opt = blaq.BLAQ(blaq.param_groups(model, 3), lr=0.1, trial="past")
    x = torch.randn(20, 12)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    held = [p.clone() for p in model.parameters()]
    seen = open_session(export_onnx(model, opt, x, tmp_path / "m.onnx")).weights()
    assert all(torch.equal(p, h) for p, h in zip(model.parameters(), held, strict=True))
    opt.eval()
    assert np.array_equal(seen["0.weight"], model[0].weight.detach().numpy())
    assert not torch.equal(model[0].weight, held[0])


def test_example_of_one_and_own_axes(tmp_path: Path) -> None:
    tokens = torch.randint(0, 11, (1, 6))  # whose masks index rows: of one row the exporter would make a constant
    gpt2 = build_model("hf:gpt2", **GPT2, classes=11)
    path = export_onnx(gpt2, blaq.LAQ(blaq.param_groups(gpt2, 2)), tokens, tmp_path / "gpt2.onnx")
    assert plain_session(path).run(None, {"input_ids": np.zeros((7, 3), np.int64)})[0].shape == (7, 3, 11)

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    axes = ({1: torch.export.Dim.DYNAMIC},)
    path = export_onnx(model, opt, torch.randn(3, 5, 4), tmp_path / "m.onnx", dynamic_shapes=axes)
    assert plain_session(path).run(None, {"input": np.zeros((3, 9, 4), np.float32)})[0].shape == (3, 9, 2)


class Fixed(nn.Module):
    """Takes one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.view(2, 4))
        return y


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


class RecurrentTokens(nn.Module):
    """Torch unrolls a plain recurrence to the length that it is exported with."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(9, 4), nn.RNN(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.rnn(self.embedding(x))[0]
        return states


class Branches(nn.Module):
    """Decides by values: nothing that an option of the export could help."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return 2 * y if y.sum() > 0 else y


class Counts(Unused):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return self.other(self.fc(x)), len(x)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, proj_size=2)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        return states


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Unused(), {}, "'other.weight' is not in the exported graph"),
        (Fixed(), {}, r"the model itself fails with another batch size, inputs \(1, 4\): .* pass dynamic_shapes"),
        (RecurrentTokens(), {}, "torch cannot export this model: .* pass dynamic_shapes"),
        (Branches(), {}, r"torch cannot export this model: .*(?<!pass dynamic_shapes\.)$"),
        (Counts(), {}, r"the model returns a number \(2\); expected tensors alone"),
        (Projected(), {}, "'lstm' is an LSTM with proj_size=2.*--format packed"),
        (nn.Linear(4, 4), {"preset": "quick"}, r"preset='quick'\): expected 'exact' or 'fast'"),
        (nn.Linear(4, 4), {"path": "model.pt"}, "expected a name that ends in .onnx"),
        (nn.Linear(4, 4), {"path": "no/such/model.onnx"}, "there is no folder"),
    ],
)
def test_refused(model: nn.Module, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    x = torch.ones(2, 4, dtype=torch.int64 if isinstance(model, RecurrentTokens) else torch.float32)
    path = tmp_path / arguments.pop("path", "model.onnx")
    with pytest.raises(ValueError, match=message):
        export_onnx(model, opt, x, path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"expected the blaq.BLAQ or blaq.LAQ"):
        export_onnx(model, torch.optim.Adam(model.parameters()), torch.randn(2, 4), tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_a_weight_that_the_exporter_changed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    export = torch.onnx.export

    def folding(*arguments: Any, **options: Any) -> Any:
        program = export(*arguments, **options)
        value = program.model.graph.initializers["weight"]
        value.const_value = onnx_tensor(value.const_value.numpy() * 1.5)
        return program

    def onnx_tensor(array: np.ndarray) -> Any:
        return onnx_ir.tensor(array)

    monkeypatch.setattr(torch.onnx, "export", folding)
    with pytest.raises(ValueError, match="exporter changed 'weight'; expected scale times level, bit for bit"):
        export_onnx(model, opt, torch.randn(2, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_recurrent_layer_twice_in_a_process(tmp_path: Path) -> None:
    """The exporter remembers how it unrolled one, to a fixed length."""
    for _ in range(2):
        model = build_model("char_lstm", classes=5, hidden=3)
        opt = blaq.LAQ(blaq.param_groups(model, 2))
        path = export_onnx(model, opt, torch.randint(0, 5, (2, 3)), tmp_path / "m.onnx")
        assert plain_session(path).run(None, {"tokens": np.zeros((1, 9), np.int64)})[0].shape == (1, 9, 5)


def test_a_weight_under_two_names_is_taken_out_under_both() -> None:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    weight = QuantizedWeight(
        "a", ("b",), blaq.Grid.parse(1), "tensor", torch.ones(2, 2, dtype=torch.uint8), torch.ones(1, 1)
    )
    constants = [onnx.numpy_helper.from_array(weight.values.numpy(), name) for name in ("a", "b")]
    nodes = [onnx.helper.make_node("MatMul", ["x", "b"], ["h"]), onnx.helper.make_node("MatMul", ["h", "a"], ["y"])]
    model = onnx_ir.from_proto(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "tied", values[:1], values[1:], constants))
    )
    assert _claim(model.graph, weight).name == "a"
    assert not model.graph.initializers
    assert [value.name for value in model.graph.inputs] == ["x", "a"]
    assert [node.inputs[1].name for node in model.graph] == ["a", "a"]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    model = nn.Linear(4, 4)
    with pytest.raises(ImportError, match=r"needs onnxscript; pip install 'blaq\[onnx\]'"):
        export_onnx(model, blaq.LAQ(blaq.param_groups(model, 2)), torch.randn(2, 4), tmp_path / "m.onnx")


def test_more_than_a_file_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blaq.export.onnx.LARGEST", 1000)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    opt = blaq.LAQ(blaq.param_groups(model, 2, rules={"1": None}))
    with pytest.raises(ValueError, match="of weights in float, an ONNX file holds 2 GB; quantize more"):
        export_onnx(model, opt, torch.randn(2, 16), tmp_path / "m.onnx")
    monkeypatch.setattr("blaq.export.onnx.LARGEST", 1500)
    export_onnx(model, opt, torch.randn(2, 16), tmp_path / "m.onnx")


class Products(nn.Module):
    """One product of many matrices with a parameter of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)


def test_a_product_of_many_matrices_is_unpacked(tmp_path: Path) -> None:
    model = Products()
    path = blaq.export_onnx(model, blaq.LAQ(blaq.param_groups(model, 2)), torch.randn(2, 3, 8), tmp_path / "model.onnx")
    (entry,) = open_session(path).description["weights"].values()
    assert entry["note"] == "no linear layer"


@pytest.mark.parametrize("description", ["[]", "{}", '{"format_version": 2}'])
def test_a_description_of_another_version_is_refused(description: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    path = blaq.export_onnx(model, blaq.LAQ(blaq.param_groups(model, 2)), torch.randn(2, 8), tmp_path / "model.onnx")
    file = onnx.load(path)
    (entry,) = (entry for entry in file.metadata_props if entry.key == "blaq")
    entry.value = description
    onnx.save(file, path)
    with pytest.raises(ValueError, match=r"format version .*, expected 1; open it with the blaq that wrote it"):
        open_session(path)
