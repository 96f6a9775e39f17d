"""The run directory: what a training run leaves behind, and the rules by which one is begun or continued.

    recipe.toml        the complete recipe, every setting stated
    versions.json      what the run was computed with
    data.json          what it was computed on: sizes of the splits, and a digest
    metrics.jsonl      one line of JSON an epoch
    zigzag.jsonl       with probes: the measures of `blaq.zigzag`, a line for every layer an epoch and one for "total"
    trajectories.jsonl with probes: a few weights of every layer at every probe, a line a layer
    checkpoints/       last.ckpt after every epoch, best.ckpt of the lowest validation error (the earliest, if tied)
    csv/ tensorboard/  the same numbers and the loss of single steps, as other tools read them
    result.json        the outcome

A run is finished when its result is there.
"""

import json
import platform
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import blaq
from blaq.train.config import Recipe, load_recipe
from blaq.train.files import (
    append_rows,
    damaged,
    read_json,
    read_rows,
    refuse_below_a_file,
    write_atomically,
    write_rows,
)

Checkpoint = Literal["best", "last"]

_LOCK = ".lock"

# What a checkpoint must hold to be trained on from.
_KEYS = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks")
_IN_ORDER = "optim.rules"  # the table of a recipe whose order matters: the first match wins


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The files of a run, by name."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The complete recipe."""
        return self.path / "recipe.toml"

    @property
    def result_file(self) -> Path:
        """The outcome."""
        return self.path / "result.json"

    @property
    def metrics_file(self) -> Path:
        """One line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def zigzag_file(self) -> Path:
        """One line a layer and epoch, with probes."""
        return self.path / "zigzag.jsonl"

    @property
    def trajectories_file(self) -> Path:
        """One line a layer and probe, with probes."""
        return self.path / "trajectories.jsonl"

    @property
    def _versions_file(self) -> Path:
        return self.path / "versions.json"

    @property
    def _data_file(self) -> Path:
        return self.path / "data.json"

    def checkpoint(self, name: Checkpoint) -> Path:
        """Where the best or the last checkpoint lies, or will lie."""
        return self.path / "checkpoints" / f"{name}.ckpt"

    def existing(self, name: Checkpoint) -> Path:
        """The best or the last checkpoint.

        Raises:
            ValueError: there is none yet, or none any more.
        """
        path = self.checkpoint(name)
        if not path.exists():
            if self.checkpoint("last").exists() or len(self.metrics()) > 1:
                raise ValueError(
                    f"{str(path)!r} is lost, though an epoch has ended; put it back, or make the run again."
                )
            raise ValueError(f"{str(self.path)!r} has no {name} checkpoint yet: its first epoch has not ended.")
        return path

    def load(self, name: Checkpoint, *, mmap: bool = False) -> dict[str, Any]:
        """What the best or the last checkpoint holds, on the CPU; with `mmap` read when it is looked at.

        Raises:
            ValueError: there is none yet, it cannot be read, or it is not what a run writes.
        """
        path = self.existing(name)
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # there is hardly one that torch does not raise at damaged bytes
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"{str(path)!r} cannot be read ({reason}); if it is damaged, take the other checkpoint, or make the run again."
            ) from error
        missing = [key for key in _KEYS if key not in saved] if isinstance(saved, dict) else _KEYS
        if missing or not saved["optimizer_states"]:
            lacks = ", ".join(map(repr, missing or ["optimizer_states"]))
            raise ValueError(f"{str(path)!r} is not a run's checkpoint: it lacks {lacks}; make the run again.")
        return saved

    def load_weights(self, module: nn.Module, name: Checkpoint, weights: Mapping[str, Tensor]) -> None:
        """Put the weights of the best or the last checkpoint into the network they are of.

        Raises:
            ValueError: their names or shapes are other ones.
        """
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error).partition(":")[2], 300, placeholder=" ...")  # a line for every layer
            raise ValueError(
                f"{str(self.checkpoint(name))!r} does not fit the network of the recipe beside it ({reason}); if another "
                "version of a library or another config.json builds it otherwise now, go back to the former one."
            ) from error

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return self.result_file.exists()

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Whether a run of `recipe` may be begun here, or with `resume` continued.

        Raises:
            ValueError: it holds a run and `resume` is False, a run of another recipe, a comparison, or other files.
        """
        owner = f"train(out={str(self.path)!r})"
        if comparison_file(self.path).exists():
            raise ValueError(f"{owner}: the directory holds a comparison; choose another with --out.")
        if not self.recipe_file.exists():
            if self.path.exists() and (not self.path.is_dir() or names_in(self.path)):
                raise ValueError(f"{owner}: expected a new or empty directory; choose another with --out.")
            refuse_below_a_file(self.recipe_file, owner)
            return
        if not resume:
            state = "a finished run" if self.finished else "a run"
            raise ValueError(
                f"{owner}: the directory holds {state}; continue it with --resume, or choose another with --out."
            )
        changed = differences(load_recipe(self.recipe_file), recipe)
        if changed:
            raise ValueError(
                f"{owner}: cannot resume, the run there has {'; '.join(changed)}; "
                "keep its settings, or choose another directory with --out."
            )

    def create(self, recipe: Recipe, data: Mapping[str, int | str]) -> None:
        """Write what a run begins with, unless it is there."""
        if not self.recipe_file.exists():
            write_atomically(self.recipe_file, recipe.to_toml())
        if not self._versions_file.exists():
            write_atomically(self._data_file, json.dumps(data, indent=2) + "\n")
            write_atomically(self._versions_file, json.dumps(versions(), indent=2) + "\n")
        self.checkpoint("last").parent.mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here: two would write each other's epochs.

        Raises:
            ValueError: one does already.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / _LOCK, timeout=0):
                yield
        except Timeout:
            raise ValueError(
                f"train(out={str(self.path)!r}): another process is training there; wait for it, or choose another directory "
                "with --out."
            ) from None

    def version_changes(self) -> list[str]:
        """What differs between the versions the run was begun with and the present ones, as "torch was 2.6.0, is 2.7.0"."""
        before = read_json(self._versions_file)
        return [
            f"{name} was {before.get(name)}, is {now}" for name, now in versions().items() if before.get(name) != now
        ]

    def data_changes(self, data: Mapping[str, int | str]) -> list[str]:
        """What differs between the data of the run and those described, as "train was 50, is 60"; older runs do not know."""
        before = read_json(self._data_file) if self._data_file.exists() else data
        return [f"{name} was {before.get(name)}, is {now}" for name, now in data.items() if before.get(name) != now]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first; a last line cut short by a kill is left out."""
        return read_rows(self.metrics_file)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add the line of an epoch."""
        append_rows(self.metrics_file, [row])

    def truncate_metrics(self, epochs: int) -> None:
        """Keep the lines of the first `epochs` epochs: what a checkpoint does not know did not happen.

        Raises:
            ValueError: one of them is missing.
        """
        rows = self.metrics()[:epochs]
        if [row.get("epoch") for row in rows] != [*range(1, epochs + 1)]:
            raise damaged(self.metrics_file, f"expected the lines of epochs 1 to {epochs}")
        write_rows(self.metrics_file, rows)


def open_run(path: Path) -> tuple[RunDirectory, Recipe]:
    """The directory and the recipe of a run that exists.

    Raises:
        ValueError: there is no run.
    """
    directory = RunDirectory(Path(path))
    if comparison_file(directory.path).exists():
        raise ValueError(
            f"{str(path)!r} holds a comparison; its runs are the directories in {str(directory.path / 'runs')!r}."
        )
    if not directory.recipe_file.exists():
        raise ValueError(
            f"{str(path)!r} holds no run: expected a directory that `blaq train` wrote, with a recipe.toml."
        )
    return directory, load_recipe(directory.recipe_file)


def comparison_file(folder: Path) -> Path:
    """What tells the directory of a comparison or an ablation from that of a run: its design."""
    return folder / "comparison.json"


def names_in(folder: Path) -> set[str]:
    """What lies in a folder, without what a kill has left of a file, and without the lock."""
    return {path.name for path in folder.iterdir() if path.suffix != ".partial" and path.name != _LOCK}


def versions() -> dict[str, Any]:
    """What a run is computed with."""
    packages = (blaq, torch, lightning, numpy)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{package.__name__: str(package.__version__) for package in packages},
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def differences(before: Recipe, now: Recipe) -> list[str]:
    """Where two recipes differ, as "train.epochs=3, not 4"."""
    return _differences(_as_read(asdict(before)), _as_read(asdict(now)))


def _as_read(value: Any) -> Any:
    """A tree of settings as it comes back from TOML, which has no tuples."""
    if isinstance(value, Mapping):
        return {key: _as_read(member) for key, member in value.items()}
    return [_as_read(member) for member in value] if isinstance(value, list | tuple) else value


def _differences(before: object, now: object, key: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        prefix = f"{key}." if key else ""
        names = [*before, *(name for name in now if name not in before)]
        found = [line for name in names for line in _differences(before.get(name), now.get(name), f"{prefix}{name}")]
        if key == _IN_ORDER and not found and list(before) != list(now):
            found = [f"{key} in the order {', '.join(map(repr, before))}, not {', '.join(map(repr, now))}"]
        return found
    return [] if before == now else [f"{key}={before!r}, not {now!r}"]
