"""The quantized weights of a model as codes and scales: the one source that every exporter reads."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blaq.grids import Grid
from blaq.optim.base import LatentOptimizer
from blaq.projection import dequantize

if TYPE_CHECKING:
    from blaq.train.config import Recipe


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedWeight:
    """A parameter on its grid, without the parameter.

    Attributes:
        name: the first of the parameter's names in the model.
        aliases: its other names, where it is tied.
        grid: its levels.
        granularity: what shares a scale: ``"tensor"``, ``"channel"`` or a group size.
        codes: uint8, shape of the parameter: index into ``grid.levels``.
        scale: float32 (rows, 1); ``ternary2``: (rows, 2), the negative and the positive scale.
        dtype: of the parameter.
    """

    name: str
    aliases: tuple[str, ...]
    grid: Grid
    granularity: str | int
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return self.codes.shape

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the parameter, the canonical one first."""
        return (self.name, *self.aliases)

    @property
    def values(self) -> Tensor:
        """``scale * level``, rounded once: float32, shape of the parameter.

        Example:
            >>> codes, scale = torch.tensor([[0, 1, 2]], dtype=torch.uint8), torch.tensor([[0.5]])
            >>> QuantizedWeight("fc.weight", (), Grid.parse("ternary"), "tensor", codes, scale).values
            tensor([[-0.5000,  0.0000,  0.5000]])
        """
        rows = len(self.scale)
        levels_RN = self.grid.levels.to(self.codes.device)[self.codes.reshape(rows, -1 if rows else 0).int()]
        return dequantize(levels_RN, self.scale, self.grid).view(self.shape)


@torch.no_grad()
def quantized_weights(model: nn.Module, opt: LatentOptimizer) -> list[QuantizedWeight]:
    """The quantized parameters of a model, in the model's order, each once whatever its number of names; on the CPU.

    They are the weights to ship: with ``trial="past"`` those of ``opt.eval()``. Model and optimizer are left as they were.

    Args:
        model: the model that the optimizer trains; not a part of it.
        opt: its `blaq.BLAQ` or `blaq.LAQ`.

    Raises:
        ValueError: another optimizer, or one with quantized parameters that the model does not have; weights that were
            changed outside the optimizer; a step under way.

    Example:
        >>> from blaq import LAQ, param_groups
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> weight, = quantized_weights(model, LAQ(param_groups(model, bits=2)))
        >>> weight.name, weight.grid, weight.codes.dtype, torch.equal(weight.values, model[0].weight)
        ('0.weight', Grid('ternary'), torch.uint8, True)
    """
    with shipped(opt):
        groups = {p: group for group in opt.param_groups for p in group["params"] if group["grid"] is not None}
        weights = []
        for names, p in named(model.named_parameters(remove_duplicate=False)):
            if p not in groups:
                continue
            group = groups.pop(p)
            grid, codes, scale = Grid.parse(group["grid"]), opt.codes(p).cpu(), opt.scale(p).cpu()
            weights.append(QuantizedWeight(names[0], names[1:], grid, group["granularity"], codes, scale, p.dtype))
        if groups:
            lost = ", ".join(repr(opt._name(p)) for p in groups)
            raise ValueError(
                f"export: {lost} of the optimizer is no parameter of this model; pass the model it trains."
            )
        return weights


@contextmanager
def shipped(opt: LatentOptimizer) -> Iterator[None]:
    """Let the parameters hold what `LatentOptimizer.eval` makes them hold, and then again what they held.

    Raises:
        ValueError: not an optimizer of blaq; weights that were changed outside of it.
    """
    if not isinstance(opt, LatentOptimizer):
        raise ValueError(f"export(opt={type(opt).__name__}): expected the blaq.BLAQ or blaq.LAQ that trains the model.")
    opt._check_idle("export")
    opt._check_untouched()  # eval() would write over what was changed
    if opt.trial != "past" or opt.param_groups[0]["evaluating"]:
        yield
        return
    opt.eval()
    try:
        yield
    finally:
        opt.train()


def named(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Each tensor once, with all its names in their order: ``remove_duplicate=False`` lists it under each of them."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in pairs:
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    for names, tensor in found.values():
        yield tuple(names), tensor


def plain(model: nn.Module, owner: str = "export") -> nn.Module:
    """The model itself, of one that `torch.compile` has made: its parameters have their own names.

    Raises:
        ValueError: no model.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ValueError(f"{owner}: the model is {type(inner).__name__}; expected a torch.nn.Module.")
    return inner


def in_float32(model: nn.Module, weights: Sequence[QuantizedWeight]) -> nn.Module:
    """A copy on the CPU, in evaluation mode. Quantized weights of another dtype are ``scale * level`` in float32, as runtimes
    compute it, where the model holds it rounded.

    Raises:
        ValueError: torch cannot copy the model.
    """
    held = (leaf for module in model.modules() for leaf in tree_leaves(vars(module)))
    kept = {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf}  # torch copies none
    try:
        model = copy.deepcopy(model, kept)
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(
            f"export: the model cannot be copied ({reason}); drop what it has kept of a pass first."
        ) from error
    model = model.cpu().eval().float()
    for weight in weights:
        model.get_parameter(weight.name).data.copy_(weight.values)
    return model


def weights_of_run(
    run: Path, checkpoint: Literal["best", "last"] = "best"
) -> tuple[nn.Module, list[QuantizedWeight], "Recipe"]:
    """A run's network, which holds the quantized values and is in evaluation mode; its quantized weights; its recipe.

    Raises:
        ValueError: no run there, or none whose first epoch has ended.
    """
    from blaq.train.restore import restore

    recipe, model, optimizer = restore(run, checkpoint)
    optimizer.eval()
    return model.eval(), quantized_weights(model, optimizer), recipe
