"""Files of weights alone in the place of exported ones: torch is their runtime."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blaq.export.compressed import read_compressed
from blaq.export.packed import check_fits, load_packed, read_packed

__all__ = ["CompressedSession", "PackedSession", "computed", "copies", "layer_outputs", "tensors"]


class TorchSession:
    """A file of weights in the place of a runtime: torch computes, from what is read back. See `Session`.

    Args:
        model: with everything that the file holds.
        weights: the quantized weights in it, as they are in the file.
        description: of the file.
    """

    preset = "exact"
    batch = None

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], description: dict[str, Any]) -> None:
        self._model, self._weights = model.eval(), weights
        self.description = {"preset": self.preset, **description}

    def run(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """The first output."""
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """All outputs."""
        return [y.numpy() for y in tensors(computed(self._model, tuple(map(torch.from_numpy, inputs))))]

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The quantized weights, from what is in the file."""
        return {name: values.numpy() for name, values in self._weights.items()}

    def layers(self, *inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What the quantized layers compute, in the order of the model."""
        found = layer_outputs(self._model, list(self._weights), tuple(map(torch.from_numpy, inputs)))
        return {name: value.numpy() for name, value in found.items()}


class PackedSession(TorchSession):
    """A packed file.

    Args:
        path: of the file.
        model: of the names and shapes in the file; it is not changed.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        weights = read_packed(path).weights
        entries = {
            weight.name: {"grid": weight.grid.name, "granularity": weight.granularity, "shape": list(weight.shape)}
            for weight in weights
        }
        super().__init__(
            load_packed(path, copy.deepcopy(model)),
            {weight.name: weight.values for weight in weights},
            {"format": "packed", "weights": entries},
        )


class CompressedSession(TorchSession):
    """A folder for compressed-tensors, which decompresses it.

    Args:
        folder: that `blaq export` wrote.
        model: of the names and shapes in the folder; it is not changed.
        names: of the quantized weights; the folder holds some of them in full.
    """

    def __init__(self, folder: Path, model: nn.Module, names: Sequence[str]) -> None:
        tensors = read_compressed(folder)
        model = copy.deepcopy(model)
        check_fits(model.state_dict(), {name: tensor.shape for name, tensor in tensors.items()}, repr(str(folder)))
        model.load_state_dict(tensors)
        weights = {name: tensors[name] for name in names}
        entries = {name: {"shape": list(values.shape)} for name, values in weights.items()}
        super().__init__(model, weights, {"format": "compressed-tensors", "weights": entries})


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
        computed(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: each[0] for name, each in returned.items() if len(each) == 1 and isinstance(each[0], Tensor)}


def computed(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """What a model returns, without gradients; the inputs are left alone, also where it writes into them."""
    with torch.no_grad():
        return model(*copies(inputs))


def copies(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors in memory of their own."""
    return tuple(x.clone() for x in inputs)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of what a module returns, in the order an exported file has them."""
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
