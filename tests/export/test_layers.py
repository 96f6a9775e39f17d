"""Codes and scales for the exporters: what they describe is what the model holds, and nothing is disturbed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.export.layers import QuantizedWeight, quantized_weights, weights_of_run
from blaq.grids import GRIDS
from blaq.projection import project
from blaq.train import restore
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import train

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=200, validation=50, test=50, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [12]}),
    optim=OptimConfig(bits=3, lr=0.01, granularity="channel", rules={"fc2": "ternary2"}),
    train=TrainConfig(epochs=2, threads=1),
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 4))


def steps(model: nn.Module, opt: blaq.BLAQ, count: int) -> None:
    for step in range(count):
        batch = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(step))

        def closure(batch: Tensor = batch) -> Tensor:
            opt.zero_grad()
            loss = (model(batch) - 1).square().mean()
            loss.backward()
            return loss

        opt.step(closure)


def everything(model: nn.Module, opt: blaq.BLAQ) -> tuple[Any, ...]:
    options = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    state = {name: dict(opt.state[p]) for name, p in model.named_parameters()}
    return copy.deepcopy((dict(model.state_dict()), state, options))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_they_are_what_the_projection_found(grid: str, granularity: str | int) -> None:
    model = network()
    expected = {
        name: project(p.detach(), None, grid, granularity) for name, p in model.named_parameters() if p.ndim > 1
    }
    found = quantized_weights(model, blaq.LAQ(blaq.param_groups(model, grid, granularity)))
    assert [weight.name for weight in found] == ["0.weight", "3.weight"] == list(expected)
    for weight, q, p in zip(found, expected.values(), (model[0].weight, model[3].weight), strict=True):
        assert (weight.grid.name, weight.granularity, weight.aliases) == (grid, granularity, ())
        assert weight.codes.dtype == torch.uint8
        assert torch.equal(weight.codes, q.codes)
        assert torch.equal(weight.scale, q.scale)
        assert torch.equal(weight.values, p)
        assert weight.shape == p.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_values_are_float32_and_the_dtype_is_kept(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    for weight in quantized_weights(model, blaq.LAQ(blaq.param_groups(model, "linear8", "channel"), eps=1e-6)):
        assert weight.values.dtype == torch.float32
        assert weight.dtype == dtype
        assert torch.equal(weight.values.to(dtype), model.get_parameter(weight.name))


def test_a_tied_weight_comes_once_with_all_its_names() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "other": nn.Linear(4, 5)})
    model["head"].weight = model["embedding"].weight
    opt = blaq.LAQ(blaq.param_groups(model, 2, rules={"embedding": 4}))
    weights = {weight.name: weight for weight in quantized_weights(model, opt)}
    assert {name: weight.aliases for name, weight in weights.items()} == {
        "embedding.weight": ("head.weight",),
        "other.weight": (),
    }
    assert weights["embedding.weight"].names == ("embedding.weight", "head.weight")
    assert weights["embedding.weight"].grid.name == "linear4"


@pytest.mark.parametrize("trial", ["none", "fresh", "past", "delayed"])
@pytest.mark.parametrize("evaluating", [False, True])
def test_they_are_the_weights_to_ship_and_nothing_is_disturbed(trial: str, evaluating: bool) -> None:
    model = network()
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary"), lr=0.05, trial=trial, module=model)
    steps(model, opt, 5)
    if evaluating:
        opt.eval()
    before = everything(model, opt)
    found = quantized_weights(model, opt)
    assert same(everything(model, opt), before)
    opt.eval()
    for weight in found:
        assert torch.equal(weight.values, model.get_parameter(weight.name))
    if not evaluating:
        differ = not torch.equal(found[0].values, before[0]["0.weight"])
        assert differ == (trial == "past")  # else the test above has no bite


def test_channels_last_weights_have_their_codes_in_place() -> None:
    model = network().to(memory_format=torch.channels_last)
    weight = quantized_weights(model, blaq.LAQ(blaq.param_groups(model, 3)))[0]
    assert torch.equal(weight.values, model[0].weight)
    assert weight.codes.is_contiguous()


def of_another_model(model: nn.Module, opt: blaq.BLAQ) -> None:
    quantized_weights(network(), opt)


def of_a_part(model: nn.Module, opt: blaq.BLAQ) -> None:
    quantized_weights(model[0], opt)


def of_adam(model: nn.Module, opt: blaq.BLAQ) -> None:
    quantized_weights(model, torch.optim.Adam(model.parameters()))  # type: ignore[arg-type]


def changed_outside(model: nn.Module, opt: blaq.BLAQ) -> None:
    with torch.no_grad():
        model[3].weight += 0.01
    quantized_weights(model, opt)


def in_a_step(model: nn.Module, opt: blaq.BLAQ) -> None:
    model(torch.ones(2, 2, 3, 3)).sum().backward()
    opt.forward_step()
    quantized_weights(model, opt)


@pytest.mark.parametrize(
    ("trial", "misuse", "message"),
    [
        ("none", of_another_model, "'0.weight', '3.weight' of the optimizer is no parameter of this model"),
        ("none", of_a_part, "'3.weight' of the optimizer is no parameter of this model"),
        ("none", of_adam, r"export\(opt=Adam\): expected the blaq.BLAQ or blaq.LAQ"),
        ("none", changed_outside, "'3.weight' was changed outside the optimizer"),
        ("past", changed_outside, "'3.weight' was changed outside the optimizer"),
        ("fresh", in_a_step, "a step is under way"),
    ],
)
def test_misuse_is_refused(trial: str, misuse: Callable[[nn.Module, blaq.BLAQ], None], message: str) -> None:
    model = network()
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary"), trial=trial, module=model)
    with pytest.raises(ValueError, match=message):
        misuse(model, opt)


def test_values_of_a_weight_without_entries() -> None:
    for shape, rows in (((0, 3), 0), ((3, 0), 3)):
        codes = torch.zeros(shape, dtype=torch.uint8)
        weight = QuantizedWeight("w", (), blaq.Grid.parse(2), "channel", codes, torch.zeros(rows, 1))
        assert weight.values.shape == shape


@pytest.mark.parametrize("method", ["past", "float"])
@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_weights_of_a_run_are_those_of_its_checkpoint(method: str, checkpoint: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(RECIPE.with_([f"optim.method={method}"]), run, progress=False)
    random = torch.get_rng_state()
    model, weights, recipe = weights_of_run(run, checkpoint)
    assert torch.equal(torch.get_rng_state(), random)
    assert recipe.optim.method == method
    assert not model.training
    saved = torch.load(run / "checkpoints" / f"{checkpoint}.ckpt", weights_only=True)["state_dict"]
    assert same({f"model.{name}": value for name, value in model.state_dict().items()}, dict(saved))
    assert [w.name for w in weights] == (["fc1.weight", "fc2.weight"] if method == "past" else [])
    for weight in weights:
        assert torch.equal(weight.values, saved[f"model.{weight.name}"])


def test_the_model_of_a_run_holds_what_is_shipped_however_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(RECIPE.with_(["optim.method=past", "train.epochs=1"]), tmp_path / "run", progress=False)
    recipe, model, opt = restore.restore(tmp_path / "run")
    opt.train()
    held = model.get_parameter("fc1.weight").clone()
    monkeypatch.setattr(restore, "restore", lambda run, checkpoint: (recipe, model, opt))
    model, weights, _ = weights_of_run(tmp_path / "run")
    assert torch.equal(weights[0].values, model.get_parameter("fc1.weight"))
    assert not torch.equal(weights[0].values, held)
