"""Equal numbers of gradient evaluations for methods that take one a step, or two."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Literal

from blaq.train.config import OptimConfig, Recipe

Budget = Literal["steps", "gradients"]


def gradient_epochs(optim: OptimConfig, epochs: int) -> Fraction:
    """Gradient evaluations of a run, divided by the steps of an epoch.

    Example:
        >>> gradient_epochs(OptimConfig(method="blaq", period=5), 20), gradient_epochs(OptimConfig(method="laq"), 20)
        (Fraction(24, 1), Fraction(20, 1))
    """
    trials = sum(optim.trial_in(epoch) == "fresh" for epoch in range(epochs))
    return epochs + Fraction(trials, optim.trial_every)


def equal_gradients(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Each recipe over as many epochs as take the gradient evaluations of the most expensive one.

    An epoch is not divided: the nearest whole number is taken, of two equally near ones the smaller. The schedule is
    stretched in proportion, so that it ends where it would have: see `stretched`.
    """
    most = max(gradient_epochs(recipe.optim, recipe.train.epochs) for recipe in recipes.values())
    return {name: stretched(recipe, _epochs_for(recipe, most)) for name, recipe in recipes.items()}


def _epochs_for(recipe: Recipe, evaluations: Fraction) -> int:
    epochs = recipe.train.epochs
    while gradient_epochs(recipe.optim, epochs) < evaluations:
        epochs += 1
    fewer = max(epochs - 1, recipe.train.epochs)
    return min((fewer, epochs), key=lambda count: abs(gradient_epochs(recipe.optim, count) - evaluations))


def stretched(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe over other epochs, its schedule in proportion.

    ``cosine`` reaches 0 at the end by itself. ``step`` keeps its factor and falls every `schedule_every` times
    ``epochs / recipe.train.epochs`` epochs, rounded to whole ones, at least 1. ``exponential`` takes the root of its factor
    that leaves the same rate at the end. ``constant`` has nothing to stretch.

    Example:
        >>> from blaq.train.config import load_recipe
        >>> stretched(load_recipe("mnist-lenet5"), 24).optim.schedule_every
        6
    """
    ratio = Fraction(epochs, recipe.train.epochs)
    optim = recipe.optim
    if optim.schedule == "step" and optim.schedule_every is not None:
        optim = replace(optim, schedule_every=max(1, round(optim.schedule_every * ratio)))
    elif optim.schedule == "exponential" and optim.schedule_factor is not None and ratio != 1:
        optim = replace(optim, schedule_factor=optim.schedule_factor ** float(1 / ratio))
    return replace(recipe, optim=optim, train=replace(recipe.train, epochs=epochs))
