"""Where files go: nothing but a file is replaced, links are followed, and the two files of OpenVINO stay together."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import blaq
from blaq.cli import app
from blaq.export.bench import inputs_of
from blaq.export.files import bytes_of
from blaq.export.runtimes import open_session

Write = Callable[[Path], object]


def network() -> tuple[nn.Module, blaq.LAQ]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    return model, blaq.LAQ(blaq.param_groups(model, bits=2))


def packed(path: Path) -> None:
    blaq.save_packed(*network(), path)


def onnx(path: Path) -> Path:
    return blaq.export_onnx(*network(), torch.randn(2, 16), path)


def openvino(path: Path) -> Path:
    return blaq.export_openvino(*network(), torch.randn(2, 16), path)


@pytest.mark.parametrize(
    ("write", "name", "pipe"),
    [
        (packed, "pipe", "pipe"),
        (onnx, "pipe.onnx", "pipe.onnx"),
        (openvino, "pipe.xml", "pipe.xml"),
        (openvino, "pipe.xml", "pipe.bin"),
    ],
)
def test_pipes_and_devices_are_not_replaced(write: Write, name: str, pipe: str, tmp_path: Path) -> None:
    (tmp_path / "pipe.xml").touch()
    (tmp_path / pipe).unlink(missing_ok=True)
    os.mkfifo(tmp_path / pipe)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"{pipe}'.*: expected the name of a file, new or to be replaced"):
        write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / pipe).stat().st_mode)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_in_the_place_of_the_weights_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.bin").mkdir()
    (tmp_path / "model.xml").write_text("old")
    with pytest.raises(ValueError, match=r"model.bin'\): expected the name of a file"):
        openvino(tmp_path / "model.xml")
    assert (tmp_path / "model.xml").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["real.xml", "0123abcd"])
def test_a_link_to_a_file_for_openvino_leads_to_its_weights(name: str, tmp_path: Path) -> None:
    folder, link = tmp_path / "store", tmp_path / "model.xml"
    folder.mkdir()
    link.symlink_to(folder / name)
    openvino(link)
    path = openvino(link)
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, folder]
    assert {file.name for file in folder.iterdir()} == {name, Path(name).with_suffix(".bin").name}
    assert list(open_session(path).weights()) == ["0.weight"]
    assert inputs_of(path)[0].shape == (None, 16)
    assert bytes_of(path) == sum(file.stat().st_size for file in folder.iterdir())


def test_the_weights_that_are_written_are_those_that_are_read(tmp_path: Path) -> None:
    store, path, weights = tmp_path / "store", tmp_path / "model.xml", tmp_path / "model.bin"
    store.mkdir()
    for link, name in ((path, "0123"), (weights, "4567")):
        (store / name).write_text("old")
        link.symlink_to(store / name)
    openvino(path)
    assert list(open_session(path).weights()) == ["0.weight"]
    assert {file.name for file in store.iterdir()} == {"0123", "4567"}
    path.unlink()
    path.write_text("old")  # and its weights in another folder, maybe of another file system
    with pytest.raises(
        ValueError, match=r"its weights, '.*4567', lie in another folder than '.*model.xml'; delete that"
    ):
        openvino(path)
    assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [weights, path, store]


@pytest.mark.parametrize(("write", "suffix"), [(onnx, ".onnx"), (openvino, ".xml")])
def test_a_link_to_nowhere_makes_no_folder(write: Write, suffix: str, tmp_path: Path) -> None:
    link = tmp_path / f"link{suffix}"
    link.symlink_to(tmp_path / "none" / f"model{suffix}")
    with pytest.raises(ValueError, match=r"there is no folder '.*none'"):
        write(link)
    assert list(tmp_path.iterdir()) == [link]


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model"])
def test_a_packed_file_of_the_command_has_a_name_that_verify_takes(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--format", "packed", "--out", str(tmp_path / name)])
    assert result.exit_code == 2
    assert f"{name}: expected a name that ends in .safetensors" in result.stderr
    assert list(tmp_path.iterdir()) == []
