"""The progress bar of a terminal."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from blaq.train import display
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.run import train

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=2, threads=1),
)


def test_a_terminal_shows_loss_error_and_gradients_of_the_running_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(display.Progress, "update", lambda bar, task, **fields: updates.append(fields))
    updates: list[dict[str, object]] = []
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    train(RECIPE, tmp_path / "run", display=display.Display(console, label="blaq-s0"))
    assert [fields["completed"] for fields in updates] == list(range(1, 13))
    assert [fields["description"] for fields in updates] == ["blaq-s0 epoch 1/2"] * 6 + ["blaq-s0 epoch 2/2"] * 6
    assert re.fullmatch(r"loss \d\.\d{4}  error \d+\.\d\d %  gradients 14", str(updates[6]["numbers"]))


def test_text_is_printed_as_it_is() -> None:
    console = Console(file=io.StringIO())
    display.Display(console).say("runs/:100:/[bold]a[/bold] is finished.")
    assert console.file.getvalue() == "runs/:100:/[bold]a[/bold] is finished.\n"  # type: ignore[attr-defined]


def test_a_file_gets_a_line_an_epoch_and_no_control_characters(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    train(RECIPE, tmp_path / "run", display=display.Display(console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.replace("\n", "").isprintable()
    assert sum(line.startswith("epoch") for line in text.splitlines()) == 2
