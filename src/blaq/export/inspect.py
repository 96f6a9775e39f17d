"""What the layers of a packed file look like."""

from pathlib import Path

from torch import Tensor

from blaq.export.layers import QuantizedWeight
from blaq.export.packed import read_packed
from blaq.export.packing import container_of, packed_size
from blaq.train.inspect import Layer, occupied


def layers_of_file(path: Path) -> list[Layer]:
    """The tensors of a packed file, the quantized ones first; tied ones once.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no packed file, or a damaged one.
    """
    file = read_packed(path)
    aliases: dict[str, list[str]] = {}
    for name, canonical in file.ties.items():
        aliases.setdefault(canonical, []).append(name)
    notes = {canonical: f"tied with {', '.join(names)}" for canonical, names in aliases.items()}
    quantized = [_quantized(weight, notes.get(weight.name, "")) for weight in file.weights]
    return quantized + [_other(name, tensor, notes.get(name, "")) for name, tensor in file.tensors.items()]


def _quantized(weight: QuantizedWeight, note: str) -> Layer:
    levels, counts = occupied(weight.grid, weight.codes)
    scale = weight.scale
    return Layer(
        name=weight.name,
        shape=tuple(weight.shape),
        scheme=weight.grid.name,
        scales=(float(scale.min()), float(scale.max())) if scale.numel() else None,
        levels=levels,
        counts=counts,
        bytes=packed_size(weight.codes.numel(), container_of(weight.grid)) + scale.numel() * scale.element_size(),
        note=note,
    )


def _other(name: str, tensor: Tensor, note: str) -> Layer:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Layer(
        name=name,
        shape=tuple(tensor.shape),
        scheme="float" if dtype == "float32" else dtype,
        scales=None,
        levels=(),
        counts=(),
        bytes=tensor.numel() * tensor.element_size(),
        note=note,
    )
