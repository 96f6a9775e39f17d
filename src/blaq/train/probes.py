"""The probes of a run: what `blaq.zigzag` measures, and the trajectories of a few weights, into the run directory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from blaq.optim.blaq import BLAQ
from blaq.train.config import ProbeConfig
from blaq.train.directory import RunDirectory
from blaq.train.files import append_rows, read_rows, write_rows
from blaq.train.module import TaskModule
from blaq.zigzag import ZigZag

LARGEST = 2000  # probes whose trajectories are kept; a multiple of 4, so that the pair which doubles the stride is kept
SEED = 0  # of the choice of weights: the same in every run, so that runs can be laid side by side


class Probes(Callback):
    """Writes zigzag.jsonl at the end of every epoch, and to trajectories.jsonl what the probes saw in it.

    It has to come before the callback that saves the checkpoint, which holds its state.
    """

    def __init__(self, directory: RunDirectory, config: ProbeConfig) -> None:
        if config.every is None:
            raise ValueError("Probes(every=None): expected a number of steps; without one leave the callback out.")
        self.directory = directory
        self.config = config
        self.every: int = config.every
        self.zigzag: ZigZag | None = None
        self.trajectories: Trajectories | None = None
        self._saved: dict[str, Any] = {}
        self._evaluations = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._saved if self.zigzag is None else {"zigzag": self.zigzag.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module = _task(pl_module)
        # Not before: on resuming the state of the optimizer comes late, and in evaluation mode.
        zigzag = self.zigzag or self._attach(module.optimizer)
        self._evaluations = module.optimizer.gradient_evaluations
        if self.config.gradient_error and zigzag.due and zigzag.quantized:

            def closure() -> None:
                inputs, targets = batch
                torch.autograd.backward(module.loss(module.model(inputs), targets))

            zigzag.probe_gradient_error(closure)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        opt = _task(pl_module).optimizer
        steps = opt.param_groups[0]["steps"]
        if self.trajectories is not None and steps % self.every == 0:
            two = opt.gradient_evaluations - self._evaluations > 1
            self.trajectories.record(steps, trial=two or opt.trial == "past")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.zigzag is not None  # an epoch has batches
        at = {
            "epoch": trainer.current_epoch + 1,
            "steps": trainer.global_step,
            "gradient_evaluations": _task(pl_module).optimizer.gradient_evaluations,
        }
        rows = [{**at, "layer": layer, **asdict(measures)} for layer, measures in self.zigzag.read().items()]
        append_rows(self.directory.zigzag_file, rows)
        if self.trajectories is not None:
            self.trajectories.flush()

    def _attach(self, opt: BLAQ) -> ZigZag:
        zigzag = self.zigzag = ZigZag(opt, self.every)
        if self._saved:
            zigzag.load_state_dict(self._saved["zigzag"])
        if self.config.trajectories:
            layers = zigzag.parameters()
            self.trajectories = Trajectories(
                self.directory.trajectories_file, opt, layers, self.config.trajectories, self.every
            )
        return zigzag


class Trajectories:
    """Follows a few weights of every layer: what they are after a probed step, latent and held.

    Kept are the pairs 0, s, 2s, ... of successive probes, with the smallest power of two s that leaves at most `LARGEST`
    probes: a weight that goes to and fro at every probe is seen to do so. The file follows from the probes that were,
    whatever interrupted the run. Recording leaves the values on the device; `flush` fetches them all at once.

    Args:
        path: the file.
        opt: the optimizer.
        layers: parameters by name.
        weights: how many are followed in a layer; all of a smaller one.
        every: steps between probes.
    """

    def __init__(self, path: Path, opt: BLAQ, layers: dict[str, Tensor], weights: int, every: int) -> None:
        self.path, self.opt, self.layers, self.every = path, opt, layers, every
        self._index = {name: _choice(p.numel(), weights) for name, p in layers.items()}
        self._places = {
            name: tuple(axis.to(p.device) for axis in torch.unravel_index(self._index[name], p.shape))
            for name, p in layers.items()
        }
        self._pending: list[tuple[int, bool, Tensor]] = []
        self._stride = 1

    @torch.no_grad()
    def record(self, step: int, *, trial: bool) -> None:
        """Take up the weights after a step: latent, held and scale, layer by layer in one tensor."""
        if self._pair(step) % self._stride_at(step):
            return
        seen: list[Tensor] = []
        for name, p in self.layers.items():
            place, group_scale = self._places[name], self.opt.state[p].get("scale")
            latent, value = self.opt.latent(p)[place].double(), p[place].double()
            scale = torch.full_like(value, torch.nan)
            if group_scale is not None:
                rows = (self._index[name] // (p.numel() // len(group_scale))).to(p.device)
                of_row = group_scale[rows].double()
                scale = torch.where(latent < 0, of_row[:, 0], of_row[:, -1])  # ternary2: that of its sign
            seen += [latent, value, scale]
        self._pending.append((step, trial, torch.cat([part.to(seen[0].device) for part in seen])))

    def flush(self) -> None:
        """Write what was recorded, and drop what is too much."""
        if not self._pending:
            return
        table = torch.stack([seen for _, _, seen in self._pending]).tolist()
        rows = []
        for (step, trial, _), values in zip(self._pending, table, strict=True):
            parts = iter(values)
            for name, index in self._index.items():
                latent, value, scale = ([next(parts) for _ in index] for _ in range(3))
                row = {"step": step, "layer": name, "index": index.tolist(), "latent": _digits(latent)}
                held = {"value": _digits(value), "scale": None if scale[0] != scale[0] else _digits(scale)}
                rows.append({**row, **held, "trial": trial})
        stride = self._stride_at(self._pending[-1][0])
        self._pending = []
        if stride == self._stride:
            append_rows(self.path, rows)
        else:
            self._stride = stride
            kept = [row for row in [*read_rows(self.path), *rows] if self._pair(row["step"]) % stride == 0]
            write_rows(self.path, kept)

    def _stride_at(self, step: int) -> int:
        stride = 1
        while 2 * (self._pair(step) // stride + 1) > LARGEST:
            stride *= 2
        return stride

    def _pair(self, step: int) -> int:
        """The pair that the probe of a step is in."""
        return (step // self.every - 1) // 2


def truncate(directory: RunDirectory, epochs: int, steps: int) -> None:
    """Keep what the probes wrote in the first epochs and steps: what a checkpoint does not know did not happen."""
    for path, key, last in ((directory.zigzag_file, "epoch", epochs), (directory.trajectories_file, "step", steps)):
        if path.exists():
            write_rows(path, [row for row in read_rows(path) if row[key] <= last])


def _task(module: LightningModule) -> TaskModule:
    if not isinstance(module, TaskModule):
        raise TypeError(f"Probes: expected a TaskModule, not {type(module).__name__}.")
    return module


def _choice(entries: int, weights: int) -> Tensor:
    """Flat indices of some of the entries, ascending."""
    return torch.randperm(entries, generator=torch.Generator().manual_seed(SEED))[:weights].sort().values


def _digits(values: list[float]) -> list[float]:
    """In as many digits as tell float32 numbers apart."""
    return [float(f"{value:.9g}") for value in values]
