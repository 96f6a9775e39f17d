"""The sections of a recipe that stand by themselves: data, model, training, probes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MOST_THREADS = 1024  # far more end the process inside of OpenMP, where the system makes no more of them


def expect(config: object, name: str, condition: bool, expected: str) -> None:
    """Raise the ValueError of a setting out of range; conditions are written so that NaN fails them."""
    if not condition:
        raise ValueError(f"{type(config).__name__}({name}={getattr(config, name)!r}): expected {expected}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which examples a run sees, and in what portions."""

    source: str
    """``digits``, a hub name, a folder of Parquet files, a text file or its folder. Hub names and ``war_and_peace`` are
    first looked up, by their last part, in the folder that the environment's BLAQ_DATA names."""

    train: int | None = None
    """Training examples (text: characters), at least 1; none takes all that validation leaves."""

    validation: int | None = None
    """Validation examples (text: characters), at least 1; none takes a tenth, or all of a validation file."""

    test: int | None = None
    """Test examples (text: characters), at least 1; none takes all of the test data (digits: a tenth)."""

    split_seed: int = 0
    """Seed of the split, 0 to 2^32 - 1; apart from `train.seed`, so that runs with other seeds share the split."""

    batch_size: int = 100
    """Examples (text: windows) a mini-batch, at least 1."""

    augment: bool = False
    """Whether training images are padded by 4 pixels, cropped at random and flipped at random."""

    sequence: int | None = None
    """Characters in a window of text, at least 1; none for images."""

    image_size: int | None = None
    """Height and width in pixels that images are resized to, at least 1; none keeps their size."""

    def __post_init__(self) -> None:
        expect(self, "source", bool(self.source), "a name or a path")
        for name in ("train", "validation", "test", "sequence", "image_size"):
            value = getattr(self, name)
            expect(self, name, value is None or value >= 1, "at least 1, or none")
        expect(self, "split_seed", 0 <= self.split_seed < 2**32, "0 to 2^32 - 1")
        expect(self, "batch_size", self.batch_size >= 1, "at least 1")
        if self.sequence is not None:
            text = f"sequence={self.sequence} reads text, and this is for images"
            expect(self, "augment", not self.augment, f"false: {text}")
            expect(self, "image_size", self.image_size is None, f"none: {text}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The network and its loss."""

    name: str
    """A name in `blaq.tasks.models.MODELS`, or ``hf:`` and a model type of transformers."""

    loss: Literal["squared_hinge", "cross_entropy"] = "cross_entropy"
    """What is minimised: the papers' L2-SVM (squared hinge), or the cross-entropy."""

    options: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments for `blaq.tasks.models.build_model`, which checks their names and values."""

    def __post_init__(self) -> None:
        expect(self, "name", bool(self.name), "the name of a model")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long, and with which seed."""

    epochs: int
    """Passes over the training data, at least 1."""

    seed: int = 0
    """Seed of initial weights, order of examples, augmentation and dropout, 0 to 2^32 - 1."""

    threads: int | None = None
    """CPU threads of torch, 1 to 1024; none leaves torch's choice. More than there are cores are allowed, so that a recipe
    gives the same numbers on smaller machines."""

    gradient_clip: float | None = None
    """Bound above 0 of the Euclidean norm of the whole gradient, for either gradient of a step; none leaves it free."""

    def __post_init__(self) -> None:
        expect(self, "epochs", self.epochs >= 1, "at least 1")
        expect(self, "seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1")
        allowed = self.threads is None or 1 <= self.threads <= MOST_THREADS
        expect(self, "threads", allowed, f"1 to {MOST_THREADS}, or none")
        bound = self.gradient_clip
        expect(self, "gradient_clip", bound is None or 0 < bound < math.inf, "a finite number > 0, or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """What is measured of the zig-zagging, see `blaq.zigzag`; measuring never changes the training."""

    every: int | None = None
    """Steps between probes, at least 1; none measures nothing."""

    trajectories: int = 8
    """Weights followed in every layer, at least 0."""

    gradient_error: bool = False
    """Whether a probe also measures the gradient error: two more gradients."""

    def __post_init__(self) -> None:
        expect(self, "every", self.every is None or self.every >= 1, "at least 1 (steps), or none")
        expect(self, "trajectories", self.trajectories >= 0, "at least 0")
        if self.every is None:
            nothing = "every=none measures nothing; set probes.every to a number of steps"
            expect(self, "gradient_error", not self.gradient_error, f"false: {nothing}")
            expect(self, "trajectories", self.trajectories == 8, f"8, the default: {nothing}")
