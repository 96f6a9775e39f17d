"""The Lightning module: one task, one network, one `blaq.BLAQ` optimizer, under automatic optimization."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from typing_extensions import override

from blaq.optim.blaq import BLAQ
from blaq.optim.groups import param_groups
from blaq.tasks.data import Batches, Dataset, Split
from blaq.tasks.losses import LOSSES
from blaq.tasks.models import build_model
from blaq.train.config import OptimConfig, Recipe


def build_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The param groups of a recipe's optimizer: everything in float for a method that does not quantize."""
    if not optim.trains_by.quantized:
        return param_groups(model, bits=None)
    return param_groups(model, optim.bits, optim.granularity, optim.solver, optim.group_rules())


def groups_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The param groups of a recipe over a network of its own, for a plan of it."""
    return build_groups(build_model(recipe.model.name, **recipe.model.options), recipe.optim)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> BLAQ:
    """The optimizer of a recipe; from here on the quantized parameters of `model` hold scale times level."""
    method = optim.trains_by
    with warnings.catch_warnings():
        if not method.quantized:
            warnings.filterwarnings("ignore", "BLAQ: no parameter group has a grid", UserWarning)
        return BLAQ(
            build_groups(model, optim),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            a=optim.a,
            trial=method.trial,
            trial_every=1 if "trial_every" in method.ignores else optim.trial_every,
            curvature=method.curvature,
            clip=optim.clip if method.quantized else None,
            module=model,
        )


def build_schedule(optimizer: BLAQ, optim: OptimConfig, epochs: int, epoch_steps: int) -> LRScheduler | None:
    """The learning rate schedule of a recipe, to be advanced after every step; None keeps the rate constant.

    ``step`` and ``exponential`` change at the ends of epochs; counting them in steps as well leaves one clock, which a
    checkpoint at the end of an epoch cannot catch between two ticks.
    """
    match optim.schedule:
        case "constant":
            return None
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=epochs * epoch_steps)
        case "step":
            return StepLR(optimizer, (optim.schedule_every or 1) * epoch_steps, optim.schedule_factor or 1.0)
        case "exponential":
            return StepLR(optimizer, epoch_steps, optim.schedule_factor or 1.0)


class Tally:
    """Mean loss and error of the examples seen since `reset`, kept on the device: reading a mean is what synchronises.

    An example is whatever has a target of its own: an image, or one character of a window.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all examples."""
        self.examples = 0
        self._loss = torch.zeros((), dtype=torch.float64)
        self._wrong = torch.zeros((), dtype=torch.int64)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: its mean loss, logits (..., classes) and targets (...)."""
        wrong = (logits.detach().argmax(-1) != targets).sum()
        self._loss = self._loss.to(loss.device) + loss.detach().double() * targets.numel()
        self._wrong = self._wrong.to(loss.device) + wrong
        self.examples += targets.numel()

    @property
    def loss(self) -> float:
        """Mean loss an example."""
        return float(self._loss) / self.examples if self.examples else float("nan")

    @property
    def error(self) -> float:
        """Wrong predictions in percent."""
        return 100.0 * int(self._wrong) / self.examples if self.examples else float("nan")


class TaskModule(LightningModule):
    """Trains the network of a recipe on a data set.

    Everything random in an epoch follows from (checkpoint, seed, epoch): the generator is seeded at its start, and the
    batches are a function of seed and epoch. So a run that was interrupted and resumed ends as if it had not been.

    Attributes:
        model: the network; it knows nothing of bits.
        optimizer: the one optimizer, there once fitting has started.
        training_tally: loss and error of the running epoch, at the first evaluation of every step.
        evaluation_tally: loss and error of the last pass over validation or test data.
        start_lr: learning rate at the first step of the running epoch.
    """

    optimizer: BLAQ

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        super().__init__()
        torch.manual_seed(recipe.train.seed)
        self.recipe = recipe
        self.dataset = dataset
        # Channels last: pooling and convolution on a CPU take half the time. Values are the same but for rounding.
        self.model = build_model(recipe.model.name, **recipe.model.options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss: Callable[[Tensor, Tensor], Tensor] = LOSSES[recipe.model.loss]
        self.training_batches = Batches(
            dataset.train,
            dataset,
            recipe.data.batch_size,
            shuffle=True,
            augment=recipe.data.augment,
            seed=recipe.train.seed,
        )
        self.training_tally = Tally()
        self.evaluation_tally = Tally()
        self.start_lr = recipe.optim.lr

    def evaluation_batches(self, split: Split) -> Batches:
        """The batches of a validation or test split, in order."""
        return Batches(split, self.dataset, self.recipe.data.batch_size, shuffle=False, seed=0)

    def check(self) -> None:
        """Refuse a network that does not fit the data, before any training.

        Raises:
            ValueError: it takes inputs of another shape, has outputs of another, or fewer than there are classes; it cannot
                train on mini-batches of one example; or no step would have the trial that the method is for.
        """
        owner = f"model.options of {self.recipe.model.name!r}"
        inputs, targets = next(iter(self.evaluation_batches(self.dataset.validation)))
        self.model.eval()
        try:
            with torch.no_grad():
                logits = self.model(inputs)
        # IndexError: of an embedding with too few rows; ValueError: what transformers itself checks.
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{owner}: the network does not take inputs of shape {tuple(inputs.shape[1:])} and {inputs.dtype} ({error}); "
                f"{self.dataset.name} has {self.dataset.classes} classes."
            ) from error
        finally:
            self.model.train()
        if logits.shape[:-1] != targets.shape:
            raise ValueError(
                f"{owner}: outputs of shape {tuple(logits.shape)} for {len(inputs)} examples of {self.dataset.name}, expected "
                f"{(*targets.shape, self.dataset.classes)}; choose another model.name."
            )
        if logits.shape[-1] < self.dataset.classes:
            raise ValueError(
                f"{owner}: {logits.shape[-1]} outputs, but {self.dataset.name} has {self.dataset.classes} classes; "
                f"set model.options.classes={self.dataset.classes}."
            )
        if 1 in (self.training_batches.batch_size, len(self.dataset.train)):
            self._check_single(inputs[:1])
        optim, steps = self.recipe.optim, len(self.training_batches)

        def has_trial(epoch: int) -> bool:
            before, after = (steps * number // optim.trial_every for number in (epoch, epoch + 1))
            return optim.trial_in(epoch) == "fresh" and after > before

        if optim.trains_by.trial == "fresh" and not any(map(has_trial, range(self.recipe.train.epochs))):
            raise ValueError(
                f"optim.trial_every={optim.trial_every}, optim.period={optim.period}: no step of the run would have a trial, "
                f"for an epoch has {steps} steps; set either lower, or optim.method=laq."
            )

    def _check_single(self, example: Tensor) -> None:
        """Refuse mini-batches of one example where BatchNorm finds a single value a channel in them."""
        buffers = {
            name: buffer.clone() for name, buffer in self.model.named_buffers()
        }  # its statistics stay as they are
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                functional_call(self.model, buffers, (example,))
        except ValueError as error:
            raise ValueError(
                f"data.batch_size={self.recipe.data.batch_size}, data.train={len(self.dataset.train)}: the network cannot "
                f"train on mini-batches of a single example ({error}); set both to at least 2."
            ) from error

    @override
    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        self.optimizer = build_optimizer(self.model, recipe.optim)
        schedule = build_schedule(self.optimizer, recipe.optim, recipe.train.epochs, len(self.training_batches))
        if schedule is None:
            return self.optimizer
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def train_dataloader(self) -> Batches:
        return self.training_batches

    @override
    def val_dataloader(self) -> Batches:
        return self.evaluation_batches(self.dataset.validation)

    @override
    def on_train_epoch_start(self) -> None:
        epoch = self.current_epoch
        torch.manual_seed((self.recipe.train.seed << 24) + epoch + 1)  # 32 and 24 bits: each pair has its own seed
        self.training_batches.set_epoch(epoch)
        self.optimizer.train()
        self.optimizer.trial = self.recipe.optim.trial_in(epoch)
        self.start_lr = self.optimizer.param_groups[0]["lr"]
        self.training_tally.reset()

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = self.loss(logits, targets)
        if not self.optimizer.in_trial:  # a step counts once, however often it evaluates
            self.training_tally.add(loss, logits, targets)
            self.log("loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def on_validation_epoch_start(self) -> None:
        self.optimizer.eval()  # until the next epoch: what is measured now is what the checkpoint saves
        self.evaluation_tally.reset()

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        logits = self.model(inputs)
        self.evaluation_tally.add(self.loss(logits, targets), logits, targets)

    @override
    def on_test_epoch_start(self) -> None:
        self.evaluation_tally.reset()

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)
