"""Packed files: what comes back is what was there, bit for bit, at the promised size."""

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blaq
from blaq.export import packed
from blaq.export.layers import QuantizedWeight
from blaq.export.packed import export_run, load_packed, read_packed, save_packed
from blaq.grids import GRIDS, Grid
from blaq.tasks.models import build_model
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import train

DOCS = Path(__file__).parents[2] / "docs" / "packed-file.md"
RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=200, validation=50, test=50, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [12]}),
    optim=OptimConfig(bits=3, lr=0.01, granularity="channel", rules={"fc2": "ternary2"}),
    train=TrainConfig(epochs=2, threads=1),
)


class Zoo(nn.Module):
    """Modules of every kind with weights, a tied weight, buffers of other dtypes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(12, 5)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.norm = nn.BatchNorm2d(6)
        self.lstm = nn.LSTM(8, 4, num_layers=2, bidirectional=True)
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.gain = nn.Parameter(torch.randn(()))
        self.register_buffer("mask", torch.rand(3, 3) < 0.5)
        self.register_buffer("table", torch.randint(100, (4,), dtype=torch.int16))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("odd", torch.tensor([0.0, -0.0, torch.nan, torch.inf]))
        self.alias = self.norm.bias  # float and tied; its first name


def zoo(grid: str | int = "ternary", granularity: str | int = "channel", seed: int = 0) -> tuple[Zoo, blaq.LAQ]:
    model = Zoo(seed)
    return model, blaq.LAQ(blaq.param_groups(model, grid, granularity, rules={"embedding": grid}))


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names and tensors, in every bit and in dtype."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].contiguous().numpy().tobytes() == other[name].contiguous().numpy().tobytes()
        for name in one
    )


# --- round trips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_plain_model_gets_back_every_bit(grid: str, granularity: str | int, tmp_path: Path) -> None:
    model, opt = zoo(grid, granularity)
    save_packed(model, opt, tmp_path / "zoo.safetensors")
    other = Zoo(seed=1)
    assert load_packed(tmp_path / "zoo.safetensors", other) is other
    assert identical(dict(other.state_dict()), dict(model.state_dict()))
    assert other.head.weight is other.embedding.weight
    assert other.training
    found = {weight.name: weight for weight in read_packed(tmp_path / "zoo.safetensors").weights}
    assert len(found) == 13  # linear, three convolutions, eight of the LSTM, the embedding
    for name, p in model.named_parameters():
        if name in found:
            assert torch.equal(found[name].codes, opt.codes(p))
            assert torch.equal(found[name].scale, opt.scale(p))
            assert (found[name].grid.name, found[name].granularity) == (grid, granularity)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_reader_of_the_specification_reads_it(grid: str, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0], names)
    model, opt = zoo(grid, 4)
    save_packed(model, opt, tmp_path / "zoo")
    read = names["read"](tmp_path / "zoo")
    assert len(read) == 13
    for name, values in read.items():
        assert values.tobytes() == model.get_parameter(name).detach().numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7)).to(dtype)

    model = build(0)
    opt = blaq.LAQ(blaq.param_groups(model, "linear8", "channel"), eps=1e-6)
    save_packed(model, opt, tmp_path / "file")
    state, loaded = model.state_dict(), load_packed(tmp_path / "file", build(1)).state_dict()
    assert all(torch.equal(state[name], loaded[name]) and loaded[name].dtype == dtype for name in state)
    assert all(tensor.dtype == dtype for tensor in read_packed(tmp_path / "file").state_dict().values())
    # A model of another dtype is given scale * level, rounded to its own dtype once and not twice.
    in_float32 = load_packed(tmp_path / "file", build(1).float())
    assert in_float32[0].weight.dtype == torch.float32
    levels = Grid.parse("linear8").levels[opt.codes(model[0].weight).int()]
    assert torch.equal(in_float32[0].weight, opt.scale(model[0].weight) * levels)


@pytest.mark.parametrize("evaluating", [False, True])
def test_past_ships_its_evaluation_weights_and_trains_on(evaluating: bool, tmp_path: Path) -> None:
    model = Zoo()
    opt = blaq.BLAQ(blaq.param_groups(model, "ternary"), lr=0.1, trial="past")
    for _ in range(3):
        opt.zero_grad()
        sum(p.square().sum() + p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        opt.step()
    if evaluating:
        opt.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_packed(model, opt, tmp_path / "file")
    assert identical(dict(model.state_dict()), before)
    loaded = dict(load_packed(tmp_path / "file", Zoo(1)).state_dict())
    assert evaluating or not identical(loaded, before)  # quantized weights and float ones were at a trial point
    opt.eval()
    assert identical(loaded, dict(model.state_dict()))


def test_tied_tensors_are_stored_once_and_loaded_under_all_names(tmp_path: Path) -> None:
    model, opt = zoo()
    save_packed(model, opt, tmp_path / "file")
    file = read_packed(tmp_path / "file")
    assert file.ties == {"head.weight": "embedding.weight", "norm.bias": "alias"}
    assert [weight.aliases for weight in file.weights if weight.name == "embedding.weight"] == [("head.weight",)]
    assert b"head.weight_packed" not in (tmp_path / "file").read_bytes()
    untied = Zoo(1)
    untied.head = nn.Linear(4, 10, bias=False)
    load_packed(tmp_path / "file", untied)
    assert torch.equal(untied.head.weight, model.embedding.weight)
    assert untied.head.weight is not untied.embedding.weight


def test_a_compiled_model_has_the_names_of_the_model_itself(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    compiled: Any = torch.compile(model, backend="eager")
    opt = blaq.LAQ(blaq.param_groups(compiled, 2))
    save_packed(compiled, opt, tmp_path / "model.safetensors")
    other: Any = torch.compile(nn.Sequential(nn.Linear(8, 4)), backend="eager")
    assert load_packed(tmp_path / "model.safetensors", other) is other
    plain = load_packed(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(8, 4)))
    for loaded in (plain, other._orig_mod):
        assert torch.equal(loaded[0].weight, model[0].weight)


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        save_packed(*zoo(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("grid", ["binary", "ternary", "ternary2", "midrise2", "linear3", "linear4", "linear8"])
def test_resnet18_takes_the_bits_it_should(grid: str, tmp_path: Path) -> None:
    levels = {"binary": 2, "ternary": 3, "ternary2": 3, "midrise2": 4, "linear3": 7, "linear4": 15, "linear8": 255}[
        grid
    ]
    bits = {2: 1, 3: 1.6, 4: 2, 7: 3, 15: 4, 255: 8}[levels]
    model, weights, theory = build_model("resnet18"), [], 0.0
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            scale = torch.rand(len(tensor), 2 if grid == "ternary2" else 1)
            codes = torch.randint(levels, tensor.shape, dtype=torch.uint8)
            weights.append(QuantizedWeight(name, (), Grid.parse(grid), "channel", codes, scale))
            theory += tensor.numel() * bits / 8 + 4 * scale.numel()
        else:
            theory += tensor.numel() * tensor.element_size()
    packed._write(tmp_path / "resnet18", model, weights, None)
    found = (tmp_path / "resnet18").stat().st_size
    assert theory < found < 1.02 * theory
    if grid == "binary":
        assert found < 1.65e6  # of 46.8 MB


# --- models of runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_loaded_without_a_model(tmp_path: Path) -> None:
    train(RECIPE, tmp_path / "run", progress=False)
    assert export_run(tmp_path / "run", tmp_path / "file", "best") == tmp_path / "file"
    random = torch.get_rng_state()
    model = load_packed(tmp_path / "file")
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert identical({f"model.{name}": value for name, value in model.state_dict().items()}, dict(saved))
    recipe = read_packed(tmp_path / "file").recipe
    assert recipe is not None
    assert recipe["model"]["options"] == {"inputs": 64, "hidden": [12]}
    assert recipe["optim"]["rules"]["fc2"] is not None


def rewritten(tmp_path: Path, model: nn.Module, recipe: dict[str, Any] | None) -> Path:
    packed._write(tmp_path / "file", model, [], recipe)
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, r"the file names no network; pass the model, as in load_packed\(path, model\)"),
        ({"model": ["mlp"]}, "the file names no network"),
        ({"model": {"name": "hf:gpt2", "options": {}}}, "pass the model, as in .*build_model.'hf:gpt2'"),
        ({"model": {"name": "mpl", "options": {}}}, "cannot build 'mpl' with {}: .*did you mean 'mlp'"),
        ({"model": {"name": "mlp", "options": {"name": "mlp"}}}, "cannot build 'mlp' with {'name': 'mlp'}"),
        ({"model": {"name": "mlp", "options": {"hidden": [2**62]}}}, "cannot build 'mlp'"),
        ({"model": {"name": "mlp", "options": {"hidden": [10**30]}}}, "cannot build 'mlp'"),
        ({"model": {"name": "mlp", "options": {"hidden": [10**6, 10**6]}}}, "'fc1.weight' has shape|the file lacks"),
        ({"model": {"name": "mlp", "options": {"hidden": [1] * 10**6}}}, "more layers than tensors"),
        ({"model": {"name": "lenet5", "options": {}}}, "the file lacks 'conv1.weight'"),
    ],
)
def test_no_model_of_another_size_is_built(recipe: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path, build_model("mlp", inputs=6, hidden=[5]), recipe)
    with pytest.raises(ValueError, match=f"^load_packed.*file'.: .*{message}"):
        load_packed(path)


# --- models that do not fit ------------------------------------------------------------------------------------------------


def smaller() -> nn.Module:
    model = Zoo(1)
    del model.conv1
    return model


def larger() -> nn.Module:
    model = Zoo(1)
    model.more = nn.Linear(1, 1)
    return model


def wider() -> nn.Module:
    model = Zoo(1)
    model.linear = nn.Linear(12, 6)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (smaller, "the file has, but the model does not have, 'conv1.bias', 'conv1.weight'"),
        (larger, "the file lacks 'more.weight', 'more.bias'"),
        (wider, r"'linear.(weight|bias)' has shape \(5.*in the file, \(6.*in the model"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    save_packed(*zoo(), tmp_path / "file")
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^load_packed\(.*file'\): {message}"):
        load_packed(tmp_path / "file", model)
    assert identical(dict(model.state_dict()), before)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"more": 1}

    def set_extra_state(self, state: Any) -> None: ...


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "extra", Extra(2, 2)), "'extra._extra_state' of the state is dict"),
        (lambda model: model.register_buffer("s", torch.eye(2).to_sparse()), "'s' of the state is a torch.sparse_coo"),
        (lambda model: model.register_buffer("s", torch.eye(2, device="meta")), "'s' of the state is .* on meta"),
        (lambda model: model.register_buffer("s", torch.eye(2, dtype=torch.complex128)), "'s' .* is torch.complex128"),
        (
            lambda model: model.linear.register_buffer("weight_scale", torch.eye(2)),
            "needs the name 'linear.weight_scale'",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(change: Callable[[nn.Module], None], message: str, tmp_path: Path) -> None:
    model, opt = zoo()
    change(model)
    with pytest.raises(ValueError, match=message):
        save_packed(model, opt, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# --- the file as such --------------------------------------------------------------------------------------------------------


def test_the_mode_of_a_new_file_is_as_usual(tmp_path: Path) -> None:
    save_packed(*zoo(), tmp_path / "file")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("step", ["write_bytes", "read", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_packed(*zoo(1), tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def interrupted(*arguments: Any) -> None:
        if step == "write_bytes":
            with Path(arguments[0]).open("wb") as file:
                file.write(arguments[1][:100])
        raise error

    owner = {"write_bytes": Path, "read": packed, "fsync": os, "replace": os}[step]
    monkeypatch.setattr(owner, {"read": "read_packed"}.get(step, step), interrupted)
    with pytest.raises(type(error)):
        save_packed(*zoo(2), tmp_path / "file")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before
    save_packed(*zoo(2), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() != before


def test_a_file_that_reads_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes
    other, model = tmp_path / "other", zoo(2)
    save_packed(*zoo(2, seed=3), other)
    bad = other.read_bytes()
    other.unlink()
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: write(path, bad))
    with pytest.raises(ValueError, match="the file read back is not what was written; check the disk"):
        save_packed(*model, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    save_packed(*zoo(1), tmp_path / "link")
    save_packed(*zoo(2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == (tmp_path / "real" / "file").read_bytes()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file"]
    load_packed(tmp_path / "link", Zoo())


@pytest.mark.parametrize("path", ["", ".", "folder", "missing/file", "file/file"])
def test_a_path_that_is_no_file_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^export\(out=.*(expected the name of a file|there is no folder)"):
        save_packed(*zoo(), path)
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file"}
    with pytest.raises(ValueError, match=r"^packed file .*(is no regular file|there is no such file)"):
        load_packed(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        read_packed(tmp_path / "pipe")


@pytest.mark.parametrize("module", ["safetensors", "safetensors.torch"])
def test_without_safetensors_it_says_what_to_install(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_packed(*zoo(), tmp_path / "file")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"need safetensors; pip install 'blaq\[export\]'"):
        load_packed(tmp_path / "file", Zoo())
    with pytest.raises(ImportError, match=r"need safetensors; pip install 'blaq\[export\]'"):
        save_packed(*zoo(), tmp_path / "file")


def test_a_file_of_untied_weights_does_not_fit_a_model_that_ties_them(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, *, tied: bool) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

    model = Model(tied=False)
    save_packed(model, blaq.LAQ(blaq.param_groups(model, 2)), tmp_path / "untied.safetensors")
    tied = Model(tied=True)
    before = tied.head.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"embedding\.weight and head\.weight are one tensor of the model, and the file holds"
    ):
        load_packed(tmp_path / "untied.safetensors", tied)
    assert torch.equal(tied.head.weight, before)
    opt = blaq.LAQ(blaq.param_groups(model, 2))
    with torch.no_grad():
        model.embedding.weight.copy_(model.head.weight)  # which is in float
    save_packed(model, opt, tmp_path / "equal.safetensors")
    load_packed(tmp_path / "equal.safetensors", tied)
    assert torch.equal(tied.head.weight, model.embedding.weight)
