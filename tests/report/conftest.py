"""Run directories made of chosen numbers, as training writes them."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig

RECIPE = Recipe(
    name="tiny",
    title="Digits: a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=1, lr=0.01),
    train=TrainConfig(epochs=10),
)
STEPS = 6  # an epoch
LAYERS = ("fc1.weight", "fc2.weight")

WriteRun = Callable[..., Path]


def write_run(
    path: Path,
    *,
    method: str = "laq",
    seed: int = 0,
    epochs: int = 10,
    loss: Sequence[float] | None = None,
    test_error: float = 2.0,
    finished: bool = True,
    zigzag_rate: float | None = None,
    gradient_error: Sequence[float] | None = None,
    gradient_cosine: float = 0.1,
    recipe: Recipe = RECIPE,
    **optim: Any,
) -> Path:
    """A run directory; `loss` gives the training losses of its epochs, all other numbers follow from them."""
    loss = loss or [math.exp(-0.3 * epoch) for epoch in range(1, epochs + 1)]
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, method=method, **optim),
        train=replace(recipe.train, epochs=epochs, seed=seed),
    )
    each = 2 if method == "blaq" else 1
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(recipe.to_toml())
    (path / "versions.json").write_text(json.dumps({"python": "3.11.2", "torch": "2.13.0", "device": "cpu"}))
    rows = [
        {
            "epoch": epoch, "steps": STEPS * epoch, "gradient_evaluations": each * STEPS * epoch, "seconds": 0.5 * each * epoch,
            "train_loss": value, "train_error": 10 * value, "validation_loss": 2 * value, "validation_error": 20 * value,
            "lr": 0.01,
        }
        for epoch, value in enumerate(loss, start=1)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        result = {
            "recipe": "tiny", "method": method, "bits": "float" if method == "float" else recipe.optim.bits, "seed": seed,
            "epochs": epochs, "steps": STEPS * epochs, "gradient_evaluations": each * STEPS * epochs,
            "seconds": 0.5 * each * epochs, "train_loss": loss[-1], "train_error": 10 * loss[-1],
            "validation_loss": 2 * loss[-1], "validation_error": 20 * loss[-1], "best_epoch": epochs,
            "test_loss": test_error / 10, "test_error": test_error, "test_loss_last": test_error / 10,
            "test_error_last": test_error, "parameters": 1200, "bytes": 4800 if method == "float" else 300,
            "float_bytes": 4800,
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(result))
    if zigzag_rate is not None:
        _write_probes(path, method, seed, rows, zigzag_rate, gradient_cosine, gradient_error)
    return path


def _write_probes(
    path: Path,
    method: str,
    seed: int,
    rows: list[dict[str, Any]],
    rate: float,
    cosine: float,
    gradient_error: Sequence[float] | None,
) -> None:
    lines = [
        {
            "epoch": row["epoch"], "steps": row["steps"], "gradient_evaluations": row["gradient_evaluations"],
            "layer": layer, "gradient_cosine": cosine, "zigzag_rate": rate + 0.01 * index, "path_efficiency": 0.3,
            "flip_rate": 0.004, "oscillation_frequency": 0.001,
            "gradient_error": None if gradient_error is None else gradient_error[number],
            "trial_agreement": 0.8 if method == "blaq" else None,
        }
        for number, row in enumerate(rows)
        for index, layer in enumerate(("total", *LAYERS))
    ]  # fmt: skip
    (path / "zigzag.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    noise = random.Random(seed)
    paths = {layer: [noise.gauss(0, 0.05) for _ in range(8)] for layer in LAYERS}
    lines = []
    for step in range(0, rows[-1]["steps"] + 1):
        for layer, latent in paths.items():
            scale = 0.1 + 0.0005 * step
            value = [scale if weight >= 0 else -scale for weight in latent]
            lines.append({
                "step": step, "layer": layer, "index": list(range(8)), "latent": list(latent), "value": value,
                "scale": [scale] * 8, "trial": method == "blaq",
            })  # fmt: skip
            paths[layer] = [weight + noise.gauss(0, 0.02) for weight in latent]
    (path / "trajectories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(name="write_run", scope="session")
def write_run_fixture() -> WriteRun:
    return write_run


@pytest.fixture(name="recipe")
def recipe_fixture() -> Recipe:
    return RECIPE
