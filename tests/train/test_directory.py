"""What is written where: never below a file, never in the place of a device or a link."""

import os
import stat
from pathlib import Path

import pytest

from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.directory import RunDirectory
from blaq.train.files import write_atomically

RECIPE = Recipe(
    name="tiny",
    title="never run",
    data=DataConfig(source="digits"),
    model=ModelConfig(name="mlp"),
    optim=OptimConfig(bits=1),
    train=TrainConfig(epochs=1),
)


@pytest.mark.parametrize(
    ("parent", "below"),
    [("file", "run"), ("file", "deep/er/run"), ("nowhere", "run"), ("nowhere", "deep/er/run"), ("nowhere", "")],
)
def test_no_run_is_begun_below_what_is_no_folder(parent: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"train\(out='.*{below}'\): '.*{parent}' is no folder.* another with --out"):
        RunDirectory(tmp_path / parent / below).check(RECIPE, resume=True)


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(tmp_path / "pipe", "all of it")
        assert os.read(reader, 100) == b"all of it"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    """As /dev/stdout is one."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("before")
    for name, target in (("link", "there/file"), ("new", "there/other")):
        (tmp_path / name).symlink_to(target)
        write_atomically(tmp_path / name, "after")
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == "after"
    assert sorted(os.listdir(tmp_path / "there")) == ["file", "other"]
