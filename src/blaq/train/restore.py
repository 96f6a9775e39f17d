"""A run's checkpoint as what it was saved from: the network and its optimizer."""

from pathlib import Path

import torch
from torch import nn

from blaq.optim.blaq import BLAQ
from blaq.tasks.models import build_model
from blaq.train.config import Recipe
from blaq.train.directory import Checkpoint, open_run
from blaq.train.module import build_optimizer


def restore(run: Path, checkpoint: Checkpoint = "best") -> tuple[Recipe, nn.Module, BLAQ]:
    """Recipe, network and optimizer of a run's checkpoint, on the CPU; random state is left alone.

    Raises:
        ValueError: no run there, or none whose first epoch has ended; a damaged checkpoint.
    """
    directory, recipe = open_run(run)
    state = directory.load(checkpoint)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, only to overwrite them
        model = build_model(recipe.model.name, **recipe.model.options)
    optimizer = build_optimizer(model, recipe.optim)
    weights = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
    directory.load_weights(model, checkpoint, weights)
    optimizer.load_state_dict(state["optimizer_states"][0])
    return recipe, model, optimizer
