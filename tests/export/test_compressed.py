"""The compressed-tensors export: read back by compressed-tensors itself, bit for bit."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import blaq
from blaq.export import compressed
from blaq.export.compressed import bits_of, export_run, save_compressed
from blaq.grids import GRIDS, Grid
from blaq.tasks.models import build_model
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import train

BITS = {"binary": 2, "ternary": 2, "log3": 4, "log4": 8}
BITS |= {f"linear{m}": m for m in range(3, 9)} | {f"midrise{m}": m + 1 for m in range(2, 8)}
RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=200, validation=50, test=50, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [12]}),
    optim=OptimConfig(bits=3, lr=0.01, method="past", granularity="channel"),
    train=TrainConfig(epochs=1, threads=1),
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # 35 and 67 codes a row leave the last word of 32 bits part empty, in some widths 67 need several.
    return nn.Sequential(nn.Embedding(9, 35), nn.Linear(35, 67), nn.LayerNorm(67), nn.Linear(67, 3))


def decompressed(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a plain model that compressed-tensors loads the folder into."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(saved)
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    with torch.no_grad():
        for name, tensor in load_file(folder / "model.safetensors").items():
            module, _, last = name.rpartition(".")
            present = getattr(model.get_submodule(module), last)
            assert present.shape == tensor.shape
            present.data = tensor
    compressor.decompress_model(model)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(("_scale", "_shape"))}


@pytest.mark.parametrize("granularity", ["tensor", "channel", 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_compressed_tensors_reads_every_bit(grid: str, granularity: str | int, tmp_path: Path) -> None:
    assert bits_of(Grid.parse(grid)) == BITS.get(grid)
    model = network()
    opt = blaq.LAQ(blaq.param_groups(model, grid, granularity, rules={"0": grid}))
    if grid not in BITS:
        with pytest.raises(ValueError, match=f"'0.weight' is {grid}.*use --format packed, which holds every grid"):
            save_compressed(model, opt, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    save_compressed(model, opt, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    state, expected = decompressed(tmp_path / "out", network(1)), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_the_packed_words_are_those_of_the_library() -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    for grid, bits in BITS.items():
        levels = Grid.parse(grid).levels
        codes = torch.randint(len(levels), (5, 77), dtype=torch.uint8)
        weight = compressed.QuantizedWeight("w", (), Grid.parse(grid), "tensor", codes, torch.ones(1, 1))
        expected = pack_to_int32(levels[codes.int()].to(torch.int8), bits)
        assert torch.equal(compressed._parts(weight)["packed"], expected)


def test_groups_of_several_inputs_and_mixed_grids(tmp_path: Path) -> None:
    model = network()
    rules = {"1": {"bits": 4, "granularity": 7}, "3": None, "0": {"bits": "ternary", "granularity": 5}}
    save_compressed(model, blaq.LAQ(blaq.param_groups(model, 1, rules=rules)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["3"]
    assert {tuple(group["targets"]): group["weights"]["num_bits"] for group in config["config_groups"].values()} == {
        ("0",): 2,
        ("1",): 4,
    }
    state = decompressed(tmp_path / "out", network(1))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_transformers_loads_it(tmp_path: Path) -> None:
    options = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model("hf:vit", **options, intermediate_size=20, classes=4)
    rules = {"*projection": None}  # a convolution
    save_compressed(model, blaq.LAQ(blaq.param_groups(model, 4, "channel", rules=rules)), tmp_path / "out")
    from transformers import AutoModelForImageClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(image).logits, model.eval()(image))


def test_a_run_and_a_past_optimizer_ship_their_evaluation_weights(tmp_path: Path) -> None:
    train(RECIPE, tmp_path / "run", progress=False)
    assert export_run(tmp_path / "run", tmp_path / "out", "last") == tmp_path / "out"
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    state = decompressed(tmp_path / "out", build_model("mlp", inputs=64, hidden=[12]))
    assert all(torch.equal(state[name.removeprefix("model.")], tensor) for name, tensor in saved.items())


def test_a_tied_weight_is_there_for_each_of_its_modules(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
        model["head"].weight = model["embedding"].weight
        return model

    model = build()
    save_compressed(model, blaq.LAQ(blaq.param_groups(model, None, rules={"*": 3})), tmp_path / "out")
    untied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    state = decompressed(tmp_path / "out", untied)
    assert torch.equal(state["head.weight"], model["head"].weight)
    assert torch.equal(state["embedding.weight"], model["head"].weight)


def test_convolutions_are_written_in_full_and_it_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    with pytest.warns(UserWarning, match=r"packs weights of Linear and Embedding only; written in full: 0\.weight\.$"):
        save_compressed(model, opt, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["0.weight"], model[0].weight)
    assert "2.weight_packed" in saved
    assert "2.weight" not in saved


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    with pytest.raises(ValueError, match=r"no quantized weight of a Linear or Embedding.*use --format packed"):
        save_compressed(model, blaq.LAQ(blaq.param_groups(model, 2)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_shape"])
def test_no_tensor_of_the_model_is_written_over(name: str, tmp_path: Path) -> None:
    model = network()
    model[1].register_buffer(name, torch.ones(3))
    opt = blaq.LAQ(blaq.param_groups(model, 4, rules={"0": 4}))
    with pytest.raises(ValueError, match=rf"the packed '1.weight' needs the name '1.{name}'; rename that tensor"):
        save_compressed(model, opt, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    model = network()
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=rf"^export\(out=.*{name}'\): is there already"):
            save_compressed(model, opt, tmp_path / name)
    (tmp_path / "empty").mkdir()
    save_compressed(model, opt, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"mine"}


@pytest.mark.parametrize("part", ["packed", "scale"])
def test_what_the_library_reads_otherwise_is_not_kept(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    opt = blaq.LAQ(blaq.param_groups(model, 3))
    parts = compressed._parts
    monkeypatch.setattr(compressed, "_parts", lambda weight: {**parts(weight), part: parts(weight)[part] + 1})
    with pytest.raises(ValueError, match=r"compressed-tensors reads other weights of '1' than were trained"):
        save_compressed(model, opt, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Readers take the dtype of the scales for that of the weights."""
    model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    opt = blaq.LAQ(blaq.param_groups(model, 3), eps=1e-6)
    with pytest.raises(
        ValueError, match=rf"'0\.weight' is {dtype}, expected float32; use --format packed, which holds"
    ):
        save_compressed(model, opt, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_the_whole_model_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="no quantized weight of a Linear or Embedding inside another module"):
        save_compressed(model, blaq.LAQ(blaq.param_groups(model, 2)), tmp_path / "out")
