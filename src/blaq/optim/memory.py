"""What training takes in memory beyond parameters and gradients, to be read before training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blaq.optim.base import LatentOptimizer
from blaq.optim.batches import TOGETHER_UP_TO, portions
from blaq.optim.options import REMEMBERING, TRIALS
from blaq.optim.plan import SCALE_BYTES, listed, plan, size
from blaq.projection import widen

_COPIES = 7  # of what is stepped together: latent weight, both moments, two gradients, trial point, values


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One parameter, or all of them. In bytes, but for `weights`.

    Attributes:
        name: as in `plan`; ``total``.
        weights: number of entries.
        moments: both of Adam's.
        latent: the latent weight.
        scale: the scales, float32.
        remembered: the gradient that ``"past"`` and ``"delayed"`` keep from step to step.
        counters: the step, and that of the remembered gradient.
        aside: what is put aside for a while. ``"fresh"``, between the two passes: the first gradient, the scales of the trial
            point, and parameters without a grid as they were. ``"past"``, in `eval`: the trial point and its scales.
    """

    name: str
    weights: int
    moments: int
    latent: int
    scale: int
    remembered: int
    counters: int
    aside: int

    @property
    def state(self) -> int:
        """What the optimizer's state holds from step to step."""
        return self.moments + self.latent + self.scale + self.remembered + self.counters

    @property
    def bytes(self) -> int:
        """``state + aside``: what is held at once, without temporaries."""
        return self.state + self.aside

    @property
    def bytes_per_weight(self) -> float:
        """``bytes / weights``."""
        return self.bytes / max(self.weights, 1)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What `memory_report` found; `str` tells the totals.

    Attributes:
        trial: the mode it holds for.
        rows: one for each parameter, in the order of the groups.
        temporaries: what building the optimizer, a step and `eval` use for a moment at most: as much as the largest parameter
            in the dtype of its moments, or the copies of small parameters that are stepped together. Beside it come pieces
            of a few MB that are looked at together, and what the exact solver picks to sort, some percent of the tensor.

    Example:
        >>> from torch import nn
        >>> from blaq.optim.groups import param_groups
        >>> report = memory_report(param_groups(nn.Linear(1000, 10, bias=False), bits=1), trial="past")
        >>> report.rows[0].remembered, report.total.aside, report.temporaries
        (40000, 40004, 40000)
    """

    trial: str
    rows: tuple[MemoryRow, ...]
    temporaries: int

    @property
    def total(self) -> MemoryRow:
        """The sum of the rows."""
        columns = MemoryRow.__slots__[1:]
        return MemoryRow("total", *(sum(getattr(row, column) for row in self.rows) for column in columns))

    def __str__(self) -> str:
        """Two lines: the sum, and its parts."""
        total = self.total
        aside = "put aside during a trial" if self.trial == "fresh" else "put aside while evaluating"
        parts = {
            "moments": total.moments,
            "latent weights": total.latent,
            "scales": total.scale,
            "remembered gradients": total.remembered,
            aside: total.aside,
        }
        return (
            f"training takes {size(total.bytes)} beyond parameters and gradients ({total.bytes_per_weight:.2f} bytes a "
            f"weight); temporaries {size(self.temporaries)}\n"
            f"  trial {self.trial}: {', '.join(f'{name} {size(count)}' for name, count in parts.items() if count)}"
        )


def memory_report(
    groups_or_optimizer: Iterable[Mapping[str, Any]] | LatentOptimizer, trial: str | None = None
) -> MemoryReport:
    """The bytes that training takes beyond parameters and gradients, parameter by parameter: computed, nothing is allocated.

    A float32 weight with a grid takes 12 bytes with ``"none"`` (two moments, latent weight), 16 with ``"delayed"`` (and a
    remembered gradient) and with ``"fresh"`` (and the first gradient, between the two passes), 20 with ``"past"`` (a remembered
    gradient; and in `eval` the trial point). Without a grid: 8, 12 with ``"delayed"``, 16 with ``"fresh"``, 20 with ``"past"``.
    Copies of a module's buffers during a step, and what the forward and backward passes take, are not counted.

    Args:
        groups_or_optimizer: what `param_groups` returns, or an optimizer of blaq.
        trial: where the gradients are taken, see `BLAQ`; None: as the optimizer has it, ``"fresh"`` for groups that do not say.

    Raises:
        ValueError: an unknown trial; another optimizer; what `plan` refuses.

    Example:
        >>> from torch import nn
        >>> from blaq.optim.groups import param_groups
        >>> report = memory_report(param_groups(nn.Linear(1000, 10), bits=2), trial="none")
        >>> report.rows[0].latent, report.total.state
        (40000, 120092)
        >>> print(report)
        training takes 120.1 kB beyond parameters and gradients (12.00 bytes a weight); temporaries 40.0 kB
          trial none: moments 80.1 kB, latent weights 40.0 kB, scales 4 B
    """
    if isinstance(groups_or_optimizer, Optimizer) and not isinstance(groups_or_optimizer, LatentOptimizer):
        raise ValueError(
            f"memory_report({type(groups_or_optimizer).__name__}): expected an optimizer of blaq; to learn what BLAQ would "
            "take in its place, pass its param_groups."
        )
    given = (
        groups_or_optimizer.param_groups if isinstance(groups_or_optimizer, LatentOptimizer) else groups_or_optimizer
    )
    groups = listed(given, "memory_report")
    planned = plan(groups).rows
    if trial is None:
        trial = next((group["trial"] for group in groups if "trial" in group), "fresh")
    if trial not in TRIALS:
        raise ValueError(f"memory_report(trial={trial!r}): expected 'fresh', 'past', 'delayed' or 'none'.")
    parameters: list[Tensor] = [p for group in groups for p in group["params"]]
    rows = tuple(
        _row(row.name, p, row.quantized, row.scales, trial) for row, p in zip(planned, parameters, strict=True)
    )
    return MemoryReport(trial, rows, _temporaries(groups, rows))


def _temporaries(groups: Iterable[Mapping[str, Any]], rows: Sequence[MemoryRow]) -> int:
    """As much as the largest parameter, or as the copies of those that are stepped together."""
    most, rest = max((row.moments // 2 for row in rows), default=0), iter(rows)
    for group in groups:
        together: dict[tuple[object, ...], list[MemoryRow]] = {}
        for p, row in zip(group["params"], rest, strict=False):
            if row.weights <= TOGETHER_UP_TO:
                alike = None if group.get("grid") is None else p.shape
                together.setdefault((p.dtype, p.device, alike), []).append(row)
        for some in together.values():
            sized = iter(some)
            for count in portions([row.weights for row in some]):
                copied = sum(row.moments // 2 for row in islice(sized, count))
                most = max(most, _COPIES * copied if count > 1 else 0)
    return most


def _row(name: str, p: Tensor, quantized: bool, scales: int, trial: str) -> MemoryRow:
    own = p.numel() * p.element_size()
    work = p.numel() * (widen(p.new_empty(0)).element_size() if quantized else p.element_size())
    scale = scales * SCALE_BYTES
    remembers = trial in REMEMBERING
    return MemoryRow(
        name,
        p.numel(),
        moments=2 * work,
        latent=work if quantized or trial == "past" else 0,
        scale=scale,
        remembered=work if remembers else 0,
        counters=(1 + remembers) * torch.float32.itemsize,
        # Without a grid the copy of the parameter stands where the scales of a trial point stand with one.
        aside={"fresh": own + (scale if quantized else own), "past": own + scale}.get(trial, 0),
    )
