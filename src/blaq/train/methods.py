"""The training methods a recipe can be run with, one row each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Trial = Literal["none", "fresh", "past", "delayed"]
Curvature = Literal["adam", "unit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train the network of a recipe.

    Example:
        >>> METHODS["laq"].trial
        'none'
        >>> sorted(METHODS["laq"].ignores)
        ['a', 'period', 'trial_every']
    """

    description: str
    """One line for tables and help texts."""

    quantized: bool
    """Whether the weights take the grid that `optim.bits` and `optim.rules` name; if not, they stay in float32."""

    trial: Trial
    """The `trial` argument of `blaq.BLAQ`: where the second gradient of a step comes from."""

    curvature: Curvature = "adam"
    """The `curvature` argument of `blaq.BLAQ`: the metric of the projection."""

    ignores: frozenset[str] = frozenset()
    """Names of the `optim` settings that this method does not read."""


_TRIAL_SETTINGS = frozenset({"a", "period", "trial_every"})
_GRID_SETTINGS = frozenset({"bits", "granularity", "solver", "rules", "clip"})

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "float": Method(
            description="float32 weights, Adam",
            quantized=False,
            trial="none",
            ignores=_GRID_SETTINGS | _TRIAL_SETTINGS,
        ),
        "bwn": Method(
            description="nearest level at the best scale, curvature 1, one gradient a step (BWN, TWN)",
            quantized=True,
            trial="none",
            curvature="unit",
            ignores=_TRIAL_SETTINGS,
        ),
        "laq": Method(
            description="loss-aware quantization, one gradient a step (Hou and Kwok, 2018)",
            quantized=True,
            trial="none",
            ignores=_TRIAL_SETTINGS,
        ),
        "blaq": Method(
            description="one step forward and backtrack, a second gradient in the trial steps (Ma et al., 2024)",
            quantized=True,
            trial="fresh",
        ),
        "past": Method(
            description="one step forward and backtrack, the previous trial gradient reused: one gradient a step",
            quantized=True,
            trial="past",
            ignores=frozenset({"period", "trial_every"}),
        ),
        "delayed": Method(
            description="a control: blends in the gradient of the step before, no trial, one gradient a step",
            quantized=True,
            trial="delayed",
            ignores=frozenset({"period", "trial_every"}),
        ),
    }
)
