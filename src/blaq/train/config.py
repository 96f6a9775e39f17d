"""Recipes: everything that determines a training run, as frozen dataclasses read from TOML.

A recipe is an experiment, made to be run with several methods (``blaq compare`` sets ``optim.method``). So it keeps the
settings of all of them, and a method reads those that concern it: `Method.ignores` lists the others. An override is for
one run and has to have an effect: ``--set optim.a=0.8`` with the method ``laq`` is an error.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Literal

from blaq.grids import Grid
from blaq.train import toml
from blaq.train.methods import METHODS, Method, Trial
from blaq.train.sections import DataConfig, ModelConfig, ProbeConfig, TrainConfig, expect

__all__ = [
    "METHODS",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ProbeConfig",
    "Recipe",
    "RuleConfig",
    "TrainConfig",
    "load_recipe",
    "recipe_paths",
]

Granularity = int | Literal["tensor", "channel"]
Solver = Literal["exact", "alternating"]


def _expect_grid(owner: str, bits: int | str) -> None:
    try:
        Grid.parse(bits)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """A rule written as a table; what it leaves at none is as in `optim`."""

    bits: int | str | None = None
    """Grid of the matched weights, as `optim.bits`, or ``float``."""

    granularity: Granularity | None = None
    """Which weights share a scale, as `optim.granularity`."""

    solver: Solver | None = None
    """How the projection is solved, as `optim.solver`."""

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits != "float":
            _expect_grid(f"RuleConfig(bits={self.bits!r})", self.bits)
        if isinstance(self.granularity, int):
            expect(self, "granularity", self.granularity >= 1, "'tensor', 'channel', or a group size of at least 1")
        if not self.settings():
            raise ValueError("RuleConfig(): expected bits, granularity or solver; a rule without them does nothing.")

    def settings(self) -> dict[str, int | str]:
        """What the rule states."""
        stated = {"bits": self.bits, "granularity": self.granularity, "solver": self.solver}
        return {name: value for name, value in stated.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The method, the grids, and the optimizer."""

    method: Literal["float", "bwn", "laq", "blaq", "past", "delayed"] = "blaq"
    """How the weights are trained: a row of `METHODS`."""

    bits: int | str = 1
    """Grid of the weights, as `blaq.Grid.parse` takes it: 1 to 8 bits, or a name such as ``ternary2``."""

    granularity: Granularity = "tensor"
    """Which weights share a scale: ``tensor``, ``channel`` (dimension 0), or a group size of at least 1."""

    solver: Solver = "alternating"
    """How a step finds the scale: from the last one (``alternating``, begun by one exact solve), or solved anew (``exact``)."""

    rules: Mapping[str, int | str | RuleConfig] = field(default_factory=dict)
    """Exceptions: a glob of parameter or module names = a grid, ``float``, or a table; the first match wins."""

    lr: float = 1e-3
    """Learning rate at the start, above 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates a step of Adam's two moments, each at least 0 and below 1."""

    eps: float = 1e-8
    """Added to the root of the second moment, above 0."""

    weight_decay: float = 0.0
    """Decoupled decay of the latent weights, a step and unit of learning rate; at least 0."""

    a: float = 0.6
    """Weight of the gradient at the current point, 0 to 1; 1 - a weights the trial gradient."""

    period: int = 1
    """The paper's m, in epochs, at least 1: of every so many epochs the last has two stages, the others are LAQ."""

    trial_every: int = 1
    """In an epoch of two stages: steps from one trial to the next, at least 1."""

    clip: float | None = None
    """Bound above 0 of the latent weights of quantized parameters (the papers: 1); none leaves them free."""

    schedule: Literal["constant", "cosine", "step", "exponential"] = "constant"
    """How the learning rate falls: not at all; along a half cosine to 0 at the end; times `schedule_factor` after every
    `schedule_every` epochs; times `schedule_factor` after every epoch."""

    schedule_every: int | None = None
    """Epochs, at least 1, from one fall of the schedule ``step`` to the next; none with the other schedules."""

    schedule_factor: float | None = None
    """Factor of the schedules ``step`` and ``exponential``, above 0 and below 1; none with the other schedules."""

    def __post_init__(self) -> None:
        _expect_grid(f"OptimConfig(bits={self.bits!r})", self.bits)
        if isinstance(self.granularity, int):
            expect(self, "granularity", self.granularity >= 1, "'tensor', 'channel', or a group size of at least 1")
        for pattern, rule in self.rules.items():
            if not isinstance(rule, RuleConfig) and rule != "float":
                _expect_grid(f"OptimConfig(rules.{pattern}={rule!r})", rule)
        expect(self, "lr", 0 < self.lr < math.inf, "a finite number > 0")
        expect(self, "betas", all(0 <= beta < 1 for beta in self.betas), "0 <= beta < 1 for both")
        expect(self, "eps", 0 < self.eps < math.inf, "a finite number > 0")
        expect(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a finite number >= 0")
        expect(self, "a", 0 <= self.a <= 1, "0 <= a <= 1 (weight of the gradient at the current point)")
        expect(self, "period", self.period >= 1, "at least 1 (epochs)")
        expect(self, "trial_every", self.trial_every >= 1, "at least 1 (steps)")
        expect(self, "clip", self.clip is None or 0 < self.clip < math.inf, "a finite number > 0, or none")
        self._check_schedule()

    def _check_schedule(self) -> None:
        every, factor = self.schedule_every, self.schedule_factor
        if self.schedule == "step":
            expect(self, "schedule_every", every is not None and every >= 1, "at least 1, for schedule 'step'")
        else:
            way_out = f"none: schedule {self.schedule!r} does not read it; set optim.schedule_every=none"
            expect(self, "schedule_every", every is None, way_out)
        if self.schedule in ("step", "exponential"):
            expected = f"0 < factor < 1, for schedule {self.schedule!r}"
            expect(self, "schedule_factor", factor is not None and 0 < factor < 1, expected)
        else:
            way_out = f"none: schedule {self.schedule!r} does not read it; set optim.schedule_factor=none"
            expect(self, "schedule_factor", factor is None, way_out)

    @property
    def trains_by(self) -> Method:
        """The row of `METHODS` that `method` names."""
        return METHODS[self.method]

    def trial_in(self, epoch: int) -> Trial:
        """The `trial` of `blaq.BLAQ` in an epoch, counted from 0: of every `period` epochs the last has two stages.

        Example:
            >>> [OptimConfig(method="blaq", period=3).trial_in(epoch) for epoch in range(4)]
            ['none', 'none', 'fresh', 'none']
        """
        trial = self.trains_by.trial
        return "none" if trial == "fresh" and (epoch + 1) % self.period else trial

    def group_rules(self) -> dict[str, int | str | dict[str, int | str]]:
        """The rules as `blaq.param_groups` takes them.

        Example:
            >>> OptimConfig(rules={"conv1": "float", "fc*": RuleConfig(bits=4)}).group_rules()
            {'conv1': 'float', 'fc*': {'bits': 4}}
        """
        return {
            pattern: rule.settings() if isinstance(rule, RuleConfig) else rule for pattern, rule in self.rules.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A complete run: data, model, optimizer, training.

    Example:
        >>> recipe = load_recipe("demo", ["optim.bits=2", "train.seed=3"])
        >>> recipe.optim.bits, recipe.train.seed
        (2, 3)
        >>> recipe.with_(["optim.bits=ternary2"]).optim.bits
        'ternary2'
    """

    name: str
    """Name of the run, in tables and for its folder; a recipe that does not state it is named as its file."""

    title: str
    """One line that says what is trained on what."""

    data: DataConfig
    """Which examples the run sees."""

    model: ModelConfig
    """The network and its loss."""

    optim: OptimConfig
    """The method, the grids, and the optimizer."""

    train: TrainConfig
    """How long, and with which seed."""

    probes: ProbeConfig = field(default_factory=ProbeConfig)
    """What is measured of the zig-zagging."""

    def __post_init__(self) -> None:
        named = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        expect(self, "name", named, "a name that a folder can have")
        if "period" not in self.optim.trains_by.ignores and self.optim.period > self.train.epochs:
            raise ValueError(
                f"Recipe(optim.period={self.optim.period}, train.epochs={self.train.epochs}): expected period <= "
                "epochs, else no epoch has two stages; set optim.period=1 for two stages in every epoch, or "
                "optim.method=laq for none."
            )

    def to_toml(self) -> str:
        """The complete recipe as TOML, every setting stated; reading it gives an equal recipe."""
        return toml.dumps(self)

    def with_(self, overrides: Iterable[str], methods: Collection[str] = ()) -> "Recipe":
        """A copy with settings changed, each written ``key=value`` as for `load_recipe`.

        Args:
            overrides: the changes.
            methods: the methods that it is made for, of which one has to read a setting; by default its own.

        Raises:
            ValueError: an unknown key, a value of the wrong type or range, or a setting that no method reads.
        """
        overrides = list(overrides)
        tree = toml.override(Recipe, toml.to_tree(self), overrides)
        recipe = toml.build(Recipe, tree, f"--set {' '.join(overrides)}")
        for text in overrides:
            _check_read(text, methods or [recipe.optim.method])
        return recipe


def _check_read(text: str, methods: Collection[str]) -> None:
    section, setting, *_ = [*toml.split_override(Recipe, text)[0], ""]
    known = [method for method in methods if method in METHODS]
    if section == "optim" and known and all(setting in METHODS[method].ignores for method in known):
        readers = " or ".join(name for name, method in METHODS.items() if setting not in method.ignores)
        named = ", ".join(map(repr, known))
        raise ValueError(
            f"--set {text}: method {named} does not read optim.{setting}; leave it out, or set optim.method to {readers}."
            if len(known) == 1
            else f"--set {text}: none of the methods {named} reads optim.{setting}; leave it out, or add {readers}."
        )


def recipe_paths() -> list[Path]:
    """The shipped recipes in the order of their names: the installed package's, or in a checkout the repository's."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "recipes", package.parents[1] / "recipes")
    return next((sorted(folder.glob("*.toml")) for folder in folders if folder.is_dir()), [])


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = (), methods: Collection[str] = ()) -> Recipe:
    """Read a recipe: a TOML file, or a shipped one by its name.

    A file may say ``extends = "other.toml"`` (relative to itself, or a shipped name) and then state only what differs:
    tables merge key by key, and its own rules come before those it takes over.

    An override is ``key=value``, the value in TOML or, where it is not TOML, plain text: ``optim.bits=2``,
    ``optim.bits=ternary``, ``optim.rules.fc*=float``, ``optim.rules.fc*={bits=2, solver="alternating"}``,
    ``data.train=none``. Overrides apply in order: a later value wins, and so does a later rule. One has to concern one of the
    `methods` that the recipe is read for, by default its own.

    Raises:
        ValueError: no such recipe; invalid TOML; an unknown key, with the nearest known one; a missing key; a value of
            the wrong type or range; settings that contradict each other; an override that the method does not read.
    """
    shipped = {path.stem: path for path in recipe_paths()}
    path = toml.find(path_or_name, Path(), shipped)
    layers = toml.read_layers(Recipe, path, shipped)
    # A recipe has a name of its own: it does not take over that of the recipe it extends.
    tree = reduce(toml.merge, reversed(layers)) | {"name": layers[0].get("name", path.stem)}
    recipe = toml.build(Recipe, tree, path.name)
    overrides = list(overrides)
    return recipe.with_(overrides, methods) if overrides else recipe
