"""Models of transformers through OpenVINO, and what of them its own converter does not know."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.export.layers import quantized_weights
from blaq.export.openvino_convert import convert
from blaq.export.runtimes import open_session
from blaq.tasks.models import build_model

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
SMALL = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}

# model, options, shape of an example, param_groups, how many weights stay packed in memory, how many are unpacked
MODELS: list[tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any], tuple[int, int]]] = [
    ("mobilenet_v2", {"depth_multiplier": 0.35, "classes": 5}, (3, 32, 32), {"bits": 4, "granularity": "channel"}, (1, 25)),
    ("efficientnet", {**SMALL, "classes": 5}, (3, 32, 32), {"bits": "log4"}, (1, 36)),
    ("vit", {**VIT, "classes": 5, "image_size": 16, "patch_size": 8}, (3, 16, 16), {"bits": 2, "granularity": 16}, (13, 1)),
    ("gpt2", {**GPT2, "classes": 11}, (7,), {"bits": 4, "rules": {"transformer.wte": 8}}, (0, 5)),
]  # fmt: skip


def examples(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(count, *shape) if len(shape) == 3 else torch.randint(0, 11, (count, *shape))


@pytest.mark.parametrize(("name", "options", "shape", "scheme", "held"), MODELS, ids=[row[0] for row in MODELS])
def test_models(name: str, options: Any, shape: Any, scheme: Any, held: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(f"hf:{name}", **options)
    repeated = [part for part, module in model.named_modules() if getattr(module, "use_residual", False)][1:]
    for part in repeated:  # blocks that add to what they are given: more of the same takes its time
        model.set_submodule(part, nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: nothing is 0 or 1
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    opt = blaq.LAQ(blaq.param_groups(model, **scheme))
    session = open_session(blaq.export_openvino(model, opt, examples(2, shape), tmp_path / "model.xml"))
    seen = session.weights()
    for weight in quantized_weights(model, opt):
        assert np.array_equal(seen[weight.name], weight.values.numpy())
    model.eval()
    for count, size in [(1, shape), (5, shape)] if len(shape) == 3 else [(1, shape), (3, (4,)), (2, (9,))]:
        x = examples(count, size)
        with torch.no_grad():
            expected = model(x).numpy()
        assert np.abs(session.run(x.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()
    notes = [entry["note"] for entry in session.description["weights"].values()]
    assert (notes.count(""), notes.count("no Linear layer")) == held


def computed(module: nn.Module, x: Tensor) -> np.ndarray:
    graph = convert(module, (x,))
    graph.inputs[0].get_node().set_partial_shape(ov.PartialShape([-1, *x.shape[1:]]))
    graph.validate_nodes_and_infer_types()
    values: np.ndarray = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    return values


class Diff(nn.Module):
    """`torch.diff`, with ends put on."""

    def __init__(self, before: bool, after: bool, dim: int, n: int = 1) -> None:
        super().__init__()
        self.before, self.after, self.dim, self.n = before, after, dim, n

    def forward(self, x: Tensor) -> Tensor:
        prepend = 3 * x if self.before else None
        return torch.diff(x, self.n, self.dim, prepend=prepend, append=x + 1 if self.after else None)


@pytest.mark.parametrize(
    ("before", "after", "dim"), [(False, False, 1), (True, False, -1), (False, True, 2), (True, True, 1)]
)
def test_diff(before: bool, after: bool, dim: int) -> None:
    x = torch.randint(-9, 9, (2, 4, 3))
    module = Diff(before, after, dim)
    assert np.array_equal(computed(module, x), module(x).numpy())


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AvgPool2d(128, ceil_mode=True), (5, 4)),  # larger than the picture: OpenVINO's own refuses it
        (nn.AvgPool2d((3, 2), ceil_mode=True), (7, 9)),
        (nn.AvgPool1d(9, ceil_mode=True), (7,)),
        (nn.AvgPool2d(3, 2, ceil_mode=True), (6, 7)),
        (nn.AvgPool2d(2), (5, 5)),
    ],
)
def test_average_over_windows_beyond_the_picture(pool: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *shape)
    assert np.allclose(computed(pool, x), pool(x).numpy(), atol=1e-6)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.fc(x))


@pytest.mark.parametrize(
    ("model", "operator"),
    [(Unknown(), "aten::special_bessel_j0"), (nn.Sequential(nn.Linear(4, 4), Diff(False, False, 1, 2)), "aten::diff")],
)
def test_an_operator_that_openvino_does_not_know_is_named(model: nn.Module, operator: str, tmp_path: Path) -> None:
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    with pytest.raises(ValueError, match=f"OpenVINO cannot convert this model: .*{operator}"):
        blaq.export_openvino(model, opt, torch.randn(2, 4), tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []
