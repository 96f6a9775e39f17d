"""Training, resuming and evaluating runs."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from blaq.optim.memory import memory_report
from blaq.optim.plan import Plan, plan
from blaq.tasks.data import Dataset, load_dataset
from blaq.train import probes
from blaq.train.allocator import keep_freed_memory
from blaq.train.config import DataConfig, Recipe
from blaq.train.directory import Checkpoint, RunDirectory, open_run
from blaq.train.display import Display
from blaq.train.files import read_json, write_atomically
from blaq.train.interrupts import Interrupts
from blaq.train.journal import Journal
from blaq.train.module import TaskModule, build_groups

STEPS_BETWEEN_LOGS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The outcome of a finished run. Errors are in percent, of characters for text; losses are means an example."""

    recipe: str
    method: str
    bits: int | str
    """`optim.bits` of the recipe; ``float`` for a method that does not quantize."""
    seed: int
    epochs: int
    steps: int
    gradient_evaluations: int
    seconds: float
    """Time spent training, without validation."""
    train_loss: float
    """Mean over the steps of the last epoch, each at the weights it began with."""
    train_error: float
    validation_loss: float
    """At the best epoch, as `validation_error`."""
    validation_error: float
    best_epoch: int
    """The first epoch, counted from 1, of the lowest validation error."""
    test_loss: float
    """Of the checkpoint of the best epoch, as `test_error`."""
    test_error: float
    test_loss_last: float
    """Of the checkpoint of the last epoch, as `test_error_last`."""
    test_error_last: float
    parameters: int
    bytes: int
    """All parameters, stored packed: codes, scales, and what is kept in float."""
    float_bytes: int
    """All parameters in float32."""
    peak_memory: int | None = None
    """Most bytes of main memory that the process held at once, Python and torch included, since it started or, after an
    interruption, resumed; none where the system does not tell, and in results of versions that did not ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Mean loss an example and error in percent on a split."""

    loss: float
    error: float


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    display: Display | None = None,
    dataset: Dataset | None = None,
) -> Result:
    """Train a recipe into a run directory, and test the best and the last checkpoint.

    Args:
        recipe: the run, complete.
        out: the run directory; see `blaq.train.directory` for its files.
        resume: continue the run that the directory holds, from its last epoch, to the end of an uninterrupted run, bit
            for bit. One without a checkpoint, and an empty directory, start afresh; a finished run is left alone.
        progress: show the plan, the progress and the outcome on standard output.
        display: shows them in place of standard output.
        dataset: the recipe's data, where it is loaded already.

    Raises:
        ValueError: the directory holds a run and `resume` is False, or a run of another recipe, or one that another
            process is training; settings that do not fit together or diverge.
        KeyboardInterrupt: on Ctrl-C, SystemExit with status 143 on SIGTERM; the directory can be resumed.
    """
    directory = RunDirectory(Path(out))
    display = display or Display(Console(quiet=not progress))
    directory.check(recipe, resume=resume)
    if directory.finished:
        display.detail(f"{directory.path} is finished.")
        return read_result(directory)
    with _settings(recipe.train.threads):
        module = TaskModule(recipe, dataset or load_data(recipe.data))
        module.check()
        groups = build_groups(module.model, recipe.optim)
        size = plan(groups)
        display.detail(f"{size}\n{memory_report(groups, recipe.optim.trains_by.trial)}\n{module.dataset}\n")
        data = module.dataset.description()
        with directory.locked():
            directory.check(recipe, resume=resume)  # again: another process may have been here while the data were read
            if directory.finished:
                return read_result(directory)
            directory.create(recipe, data)
            for change in [*directory.version_changes(), *directory.data_changes(data)]:
                display.say(f"Note: {change}; the end may differ from that of an uninterrupted run.")
            journal = _fit(module, directory, display)
            result = _conclude(module, directory, journal, size)
            write_atomically(directory.result_file, json.dumps(asdict(result), indent=2) + "\n")
    return result


def read_result(directory: RunDirectory) -> Result:
    """The outcome of a finished run.

    Raises:
        ValueError: it is damaged, or of another version of blaq.
    """
    found = read_json(directory.result_file)
    try:
        return Result(**found)
    except TypeError as error:  # names the field
        reason = str(error).removeprefix("Result.__init__() ")
        raise ValueError(f"{str(directory.result_file)!r} is of another version of blaq ({reason}).") from None


def evaluate(
    run: Path, *, checkpoint: Checkpoint = "best", split: Literal["validation", "test"] = "test"
) -> Evaluation:
    """Loss and error of a run's checkpoint on its validation or test data; torch's random state is left alone.

    Warns where the data are not those that the run was trained on.

    Raises:
        ValueError: no run there, or none whose first epoch has ended.
        KeyboardInterrupt: on Ctrl-C; SystemExit with status 143 on SIGTERM.
    """
    directory, recipe = open_run(run)
    directory.existing(checkpoint)
    devices = range(torch.cuda.device_count())  # a module seeds them all
    with _settings(recipe.train.threads), torch.random.fork_rng(devices):
        dataset = load_data(recipe.data)
        if changes := directory.data_changes(dataset.description()):
            warnings.warn(f"{str(run)!r} was trained on other data: {'; '.join(changes)}.", stacklevel=2)
        return _evaluate(TaskModule(recipe, dataset), directory, checkpoint, split)


def load_data(data: DataConfig) -> Dataset:
    """The data set that a recipe names."""
    return load_dataset(
        data.source,
        train=data.train,
        validation=data.validation,
        test=data.test,
        seed=data.split_seed,
        sequence=data.sequence,
        image_size=data.image_size,
    )


def _fit(module: TaskModule, directory: RunDirectory, display: Display) -> Journal:
    last = directory.checkpoint("last")
    resumed = last.exists()
    if not resumed and len(directory.metrics()) > 1:  # one: a run may have been killed before its first checkpoint
        directory.existing("last")
    epochs, steps = _progress(directory, module) if resumed else (0, 0)
    directory.truncate_metrics(epochs)
    probes.truncate(directory, epochs, steps)
    if resumed:
        display.detail(f"Resumed after epoch {epochs} of {module.recipe.train.epochs}.")
    journal = Journal(directory, display)
    config = module.recipe.probes
    observers = [] if config.every is None else [probes.Probes(directory, config)]
    interrupts = Interrupts()
    # Resuming adds csv/version_1, and to tensorboard/ a file that takes back the steps after the checkpoint.
    trainer = _trainer(
        max_epochs=module.recipe.train.epochs,
        gradient_clip_val=module.recipe.train.gradient_clip,
        log_every_n_steps=min(STEPS_BETWEEN_LOGS, len(module.training_batches)),
        callbacks=[interrupts, *observers, journal, display],
        logger=[
            CSVLogger(directory.path, name="csv"),
            TensorBoardLogger(directory.path, name="tensorboard", version="", purge_step=steps),
        ],
    )
    with interrupts.handled():
        trainer.fit(module, ckpt_path=last if resumed else None, weights_only=True)
    return journal


def _progress(directory: RunDirectory, module: TaskModule) -> tuple[int, int]:
    """The epochs and steps that the last checkpoint has behind it; that it can be continued is seen before anything is
    written.
    """
    saved = directory.load("last", mmap=True)
    directory.load("best", mmap=True)
    directory.load_weights(module, "last", saved["state_dict"])
    return saved["epoch"] + 1, saved["global_step"]


def _conclude(module: TaskModule, directory: RunDirectory, journal: Journal, size: Plan) -> Result:
    recipe = module.recipe
    rows = directory.metrics()
    last, best = rows[-1], rows[journal.best_epoch - 1]
    test_best = _evaluate(module, directory, "best", "test")
    test_last = _evaluate(module, directory, "last", "test")
    return Result(
        recipe=recipe.name,
        method=recipe.optim.method,
        bits=recipe.optim.bits if recipe.optim.trains_by.quantized else "float",
        seed=recipe.train.seed,
        epochs=recipe.train.epochs,
        steps=last["steps"],
        gradient_evaluations=last["gradient_evaluations"],
        seconds=last["seconds"],
        train_loss=last["train_loss"],
        train_error=last["train_error"],
        validation_loss=best["validation_loss"],
        validation_error=best["validation_error"],
        best_epoch=journal.best_epoch,
        test_loss=test_best.loss,
        test_error=test_best.error,
        test_loss_last=test_last.loss,
        test_error_last=test_last.error,
        parameters=size.quantized_weights + size.float_weights,
        bytes=size.bytes_packed,
        float_bytes=size.bytes_float32,
        peak_memory=_peak_memory(),
    )


def _peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _evaluate(
    module: TaskModule, directory: RunDirectory, checkpoint: Checkpoint, split: Literal["validation", "test"]
) -> Evaluation:
    directory.load_weights(module, checkpoint, directory.load(checkpoint, mmap=True)["state_dict"])
    data = module.dataset.test if split == "test" else module.dataset.validation
    interrupts = Interrupts()
    with interrupts.handled():
        _trainer(logger=False, callbacks=[interrupts]).test(module, module.evaluation_batches(data), verbose=False)
    return Evaluation(loss=module.evaluation_tally.loss, error=module.evaluation_tally.error)


def _trainer(**options: Any) -> Trainer:
    """A Lightning trainer that leaves files and output to us."""
    return Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    """What holds for the process while a run lasts: threads, repeatable convolutions, a quiet Lightning."""
    keep_freed_memory()
    log = logging.getLogger("lightning.pytorch")
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, log.level
    try:
        torch.set_num_threads(threads or before[0])
        torch.backends.cudnn.deterministic = True
        log.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            # Lightning's own call, with torch 2.13.
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]
        log.setLevel(before[2])
