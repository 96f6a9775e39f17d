"""`blaq inspect FILE`: what it says of a layer is what the file holds."""

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import blaq
from blaq.cli import app
from blaq.export.inspect import layers_of_file
from blaq.train.inspect import totals


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Layer "0.weight" is ternary, 8 x 5 of which 0.7 are zero; "2.weight" linear3 in groups of 4, tied; biases, buffers."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2, bias=False), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 1, 0, 0]).repeat(4).view(8, 5) * 0.25)
        model[2].weight.copy_(
            torch.tensor([3.0, 2, 1, 0, -3, -3, -3, 2] * 2).view(2, 8) * torch.tensor([[0.5], [0.125]])
        )
        model[3].weight = model[2].weight
    opt = blaq.LAQ(blaq.param_groups(model, 2, rules={"2": {"bits": 3, "granularity": 4}}))
    blaq.save_packed(model, opt, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_layers_are_those_of_the_file(path: Path) -> None:
    found = {layer.name: layer for layer in layers_of_file(path)}
    assert list(found)[:2] == ["0.weight", "2.weight"]
    first, second = found["0.weight"], found["2.weight"]
    assert (first.scheme, first.shape, first.levels, first.counts) == ("ternary", (8, 5), (-1, 0, 1), (4, 28, 8))
    assert first.scales == (0.25, 0.25)
    assert first.sparsity == 0.7
    assert first.bytes == 8 + 4  # five trits to a byte; a scale
    assert first.bits_per_weight == 8 * 12 / 40
    assert first.float_bytes == 160
    assert second.scales == (0.125, 0.5)
    assert second.counts == (6, 0, 0, 2, 2, 4, 2)
    assert second.bytes == 6 + 16
    assert second.note == "tied with 3.weight"
    assert "3.weight" not in found
    assert (found["0.bias"].scheme, found["0.bias"].bytes, found["0.bias"].sparsity) == ("float", 32, None)
    assert (found["1.num_batches_tracked"].scheme, found["1.num_batches_tracked"].bytes) == ("int64", 8)
    tensors = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(layer.bytes for layer in found.values()) == tensors - 2 * 16  # the shapes


def test_the_command_shows_them_and_the_total(path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line for line in shown.stdout.splitlines() if line.strip()}
    for text in ("8 x 5", "ternary", "0.25", "70.0 %", "2.40", "12 B", "160 B"):
        assert text in rows["0.weight"]
    assert "4 of 7 levels" not in rows["2.weight"]
    assert "5 of 7 levels" in rows["2.weight"]
    assert "12.5 %" in rows["2.weight"]
    last = shown.stdout.splitlines()[-1]
    weights = 40 + 16 + 8 + 4 * 8 + 1
    size, kilobytes = path.stat().st_size, path.stat().st_size / 1000
    ratio = 4 * weights / size
    assert last == (
        f"{path}: {kilobytes:.1f} kB, {4 * weights} B in float32 ({ratio:.1f}x); {8 * size / weights:.2f} bits a weight"
    )
    assert totals(layers_of_file(path), size) == last.partition(": ")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.safetensors", "--checkpoint", "last"], "is a file, and holds one; leave it out"),
        (["nothing.safetensors"], "'nothing.safetensors' holds no run and is no packed file"),
        (["other"], "packed file 'other': is cut short, or no safetensors file"),
        (["."], "'.' holds no run"),
    ],
)
def test_what_is_no_packed_file_is_refused(
    arguments: list[str], message: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    Path("other").write_text("a text")
    shown = CliRunner().invoke(app, ["inspect", *arguments])
    assert shown.exit_code == 2
    assert message in shown.stderr
