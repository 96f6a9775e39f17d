"""A packed file in the place of an exported one: torch is its runtime."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blaq.export.packed import load_packed, read_packed

__all__ = ["PackedSession", "layer_outputs", "tensors"]


class PackedSession:
    """A packed file in the place of a runtime: torch computes, from what is read back. See `Session`.

    Args:
        path: of the file.
        model: of the names and shapes in the file; it is not changed.
    """

    preset = "exact"

    def __init__(self, path: Path, model: nn.Module) -> None:
        self._weights = {weight.name: weight for weight in read_packed(path).weights}
        self._model = load_packed(path, copy.deepcopy(model)).eval()
        self.description = {
            "format": "packed",
            "preset": self.preset,
            "weights": {
                name: {"grid": weight.grid.name, "granularity": weight.granularity, "shape": list(weight.shape)}
                for name, weight in self._weights.items()
            },
        }

    def run(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """The first output."""
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """All outputs."""
        with torch.no_grad():
            return [y.numpy() for y in tensors(self._model(*map(torch.from_numpy, inputs)))]

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The quantized weights, from the codes and scales in the file."""
        return {name: weight.values.numpy() for name, weight in self._weights.items()}

    def layers(self, *inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What the quantized layers compute, in the order of the model."""
        found = layer_outputs(self._model, list(self._weights), tuple(map(torch.from_numpy, inputs)))
        return {name: value.numpy() for name, value in found.items()}


def layer_outputs(model: nn.Module, names: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the modules of these parameters return, each that is called once and returns a tensor, by parameter."""
    returned: dict[str, list[Any]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(
            lambda _module, _inputs, output, name=name: returned[name].append(output)
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: each[0] for name, each in returned.items() if len(each) == 1 and isinstance(each[0], Tensor)}


def tensors(output: Any) -> list[Tensor]:
    """The tensors of what a module returns, in the order an exported file has them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
