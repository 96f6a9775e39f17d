"""The tutorial on deployment does what it says: its commands and programs run, the last one without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from blaq.cli import app
from blaq.export.layers import weights_of_run
from blaq.tasks.batches import to_unit
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, load_recipe
from blaq.train.directory import open_run
from blaq.train.run import load_data, train

TEXT = (Path(__file__).parents[2] / "docs" / "tutorial-deploy.md").read_text(encoding="utf-8")
PICTURE, PROGRAM = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^blaq .*$", TEXT, re.MULTILINE)
PACKAGES = re.findall(r"pip install (.*)$", TEXT, re.MULTILINE)[0].split()
IMAGES = 5

# In place of the tutorial's recipe, which trains for minutes on data that not everybody has.
SMALL = Recipe(
    name="digits",
    title="a small perceptron for digits of 8 x 8",
    data=DataConfig(source="digits", train=1000, validation=200, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [64]}),
    optim=OptimConfig(method="laq", bits=2, lr=0.01),
    train=TrainConfig(epochs=3, seed=0, threads=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tutorial is followed: the run, the exported file, and pictures."""
    path = tmp_path_factory.mktemp("tutorial")
    before = Path.cwd()
    os.chdir(path)
    try:
        train(SMALL, Path("runs/digits"), progress=False)
        for command in COMMANDS[1:]:
            words = command.split()[1:]
            result = CliRunner().invoke(app, [*words, "--rounds", "1"] if words[0] == "bench" else words)
            assert result.exit_code == 0, result.output
        exec(PICTURE, {})
    finally:
        os.chdir(before)
    return path


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new virtual environment with the tutorial's packages and nothing else."""
    path = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", path], check=True, env=environment())
    python = path / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *PACKAGES]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False, env=environment())
    if installed.returncode:
        pytest.skip(f"pip cannot install {', '.join(PACKAGES)}: {installed.stderr.strip().splitlines()[-1]}")
    return python


def environment() -> dict[str, str]:
    """Without what would let the new environment see this one's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def test_the_commands_exist() -> None:
    words = COMMANDS[0].split()
    assert words[:2] == ["blaq", "train"]
    load_recipe(words[2], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert [command.split()[1] for command in COMMANDS[1:]] == ["export", "verify", "bench"]


def test_the_program_has_fifteen_lines() -> None:
    assert len([line for line in PROGRAM.splitlines() if line.strip()]) <= 15
    assert "torch" not in PROGRAM and "blaq" not in re.sub(r'\["blaq"\]', "", PROGRAM)


def test_the_picture_is_the_first_of_the_test_data(folder: Path) -> None:
    images, _ = load_data(open_run(folder / "runs" / "digits")[1].data).test[:1]
    picture = np.asarray(Image.open(folder / "digit.png"))
    assert picture.shape == (8, 8)
    assert np.abs(picture / 255 - to_unit(images)[0, 0].numpy()).max() <= 0.5 / 255 + 1e-7


def test_the_program_computes_what_torch_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with the scores, which show a mistake in the normalisation before it changes a class."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["classify.py", "digit.png"])
    names: dict[str, Any] = {}
    exec(PROGRAM, names)
    model, _, recipe = weights_of_run(Path("runs/digits"))
    dataset = load_data(recipe.data)
    pixels = torch.from_numpy(np.asarray(Image.open("digit.png"), np.float32))[None, None] / 255
    with torch.no_grad():
        expected = model((pixels - dataset.mean.view(-1, 1, 1)) / dataset.std.view(-1, 1, 1)).numpy()
    assert np.abs(names["scores"] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_program_classifies_without_torch(folder: Path, device: Path) -> None:
    missing = "import importlib.util as u; print([n for n in ('torch', 'blaq', 'onnx') if u.find_spec(n)])"
    seen = subprocess.run([device, "-c", missing], capture_output=True, text=True, check=True, env=environment())
    assert seen.stdout == "[]\n"

    model, _, recipe = weights_of_run(folder / "runs" / "digits")
    dataset = load_data(recipe.data)
    images, labels = dataset.test[:IMAGES]
    pictures = (255 * to_unit(images)).round() / 255
    with torch.no_grad():
        expected = model((pictures - dataset.mean.view(-1, 1, 1)) / dataset.std.view(-1, 1, 1)).argmax(-1)
    assert (expected == labels).sum() >= IMAGES - 1
    assert len(set(expected.tolist())) > 2
    (folder / "classify.py").write_text(PROGRAM)
    for k in range(IMAGES):
        picture = folder / f"digit-{k}.png"
        Image.fromarray((255 * pictures[k, 0]).byte().numpy()).save(picture)
        run = [device, "classify.py", "digit.png" if k == 0 else picture.name]
        printed = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True, env=environment())
        assert printed.stdout == f"{expected[k]}\n"
