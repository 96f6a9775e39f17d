"""Inspection: what it says of a layer is what the checkpoint holds."""

from pathlib import Path

import pytest
import torch

from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.inspect import layers, occupancy
from blaq.train.run import train

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=3, lr=0.01, granularity="channel", rules={"fc2": "ternary2"}),
    train=TrainConfig(epochs=1, threads=1),
)


@pytest.mark.parametrize("method", ["laq", "past"])
def test_layers_are_those_of_the_weights_in_the_checkpoint(method: str, tmp_path: Path) -> None:
    result = train(RECIPE.with_([f"optim.method={method}"]), tmp_path / "run", progress=False)
    found = {layer.name: layer for layer in layers(tmp_path / "run")}
    weights = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]

    first, weight = found["fc1.weight"], weights["model.fc1.weight"]
    assert (first.scheme, first.levels) == ("linear3", (-3, -2, -1, 0, 1, 2, 3))
    # Every row is its scale times integers: the largest of which tells the scale.
    unit = torch.stack([row.abs().unique()[row.abs().unique() > 0].min() for row in weight])
    assert first.scales is not None
    assert first.scales[0] <= unit.min() * (1 + 1e-6)
    integers = torch.cat([(row / scale).round() for row, scale in zip(weight, _scales(weight), strict=True)])
    assert first.counts == tuple(int((integers == level).sum()) for level in first.levels)
    assert first.scales == pytest.approx((_scales(weight).min().item(), _scales(weight).max().item()), rel=1e-6)

    second, weight = found["fc2.weight"], weights["model.fc2.weight"]
    assert second.scheme == "ternary2"
    assert second.counts == tuple(int((weight.sign() == sign).sum()) for sign in (-1, 0, 1))
    assert found["bn1.weight"].scheme == "float"
    assert found["bn1.weight"].note == "normalisation"
    assert sum(layer.bytes for layer in found.values()) == result.bytes


def _scales(weight: torch.Tensor) -> torch.Tensor:
    """The scale of every row: the largest number of which all entries are multiples by -3 to 3."""
    scales = []
    for row in weight:
        candidates = [row.abs().max() / largest for largest in (1, 2, 3)]
        fits = [c for c in candidates if torch.allclose(row / c, (row / c).round(), atol=1e-4)]
        scales.append(fits[0])
    return torch.stack(scales)


def test_occupancy_of_many_levels_is_drawn_in_columns() -> None:
    drawn = occupancy(tuple(range(-127, 128)), tuple([0] * 127 + [1000] + [1] * 127))
    bars, rest = drawn[:32], drawn[32:]
    assert bars == " " * 15 + "█" + "▁" * 16
    assert rest == " 128 of 255 levels"


def test_an_empty_layer_has_no_occupancy() -> None:
    assert occupancy((-1, 1), (0, 0)) == ""
