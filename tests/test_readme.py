"""What the README shows runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from blaq.cli import app
from blaq.train.config import load_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert "203,264 quantized" in capsys.readouterr().out
    assert names["opt"].gradient_evaluations == 2
    assert names["model"][0].weight.abs().unique().numel() == 1
    assert [group["grid"] for group in names["groups"]] == ["linear4", None]
    assert torch.is_tensor(names["loss"])


def test_commands_and_recipes_exist() -> None:
    lines = [line.partition("#")[0].split() for line in re.findall(r"^blaq .*$", README, re.MULTILINE)]
    assert {line[1] for line in lines} == {
        command.name or command.callback.__name__ for command in app.registered_commands
    }
    for line in lines:
        if line[1] in ("train", "compare"):
            load_recipe(line[2], [line[i + 1] for i, word in enumerate(line) if word == "--set"])
