"""What a packed file means: quantized weights, all other tensors, ties; to tensors with a description, and back.

`docs/packed-file.md` is the specification.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from blaq.export.container import DTYPES, check_shape, dtype_name
from blaq.export.layers import QuantizedWeight
from blaq.export.packing import container_of, pack, packed_size, unpack
from blaq.grids import GRIDS, Grid
from blaq.projection import row_shape

FORMAT = "packed"
FORMAT_VERSION = 1
PARTS = ("packed", "scale", "shape")  # the tensors of a quantized weight, each under its name and an ending


@dataclass(frozen=True, eq=False, slots=True)
class PackedFile:
    """What a packed file holds.

    Attributes:
        weights: the quantized weights.
        tensors: all other tensors of the model: name to tensor.
        ties: further names of any of them: name to canonical name.
        recipe: of the run that trained it, as plain values; None where there was none.
    """

    weights: tuple[QuantizedWeight, ...]
    tensors: dict[str, Tensor]
    ties: dict[str, str]
    recipe: dict[str, Any] | None = None

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of what `state_dict` returns."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        shapes |= {weight.name: weight.shape for weight in self.weights}
        return shapes | {name: shapes[canonical] for name, canonical in self.ties.items()}

    def state_dict(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors under all their names, as the model had them; quantized weights in the floating dtypes of `like`, if
        given.
        """
        state = dict(self.tensors)
        for weight in self.weights:
            other = (like or {}).get(weight.name)
            dtype = weight.dtype if other is None or not other.is_floating_point() else other.dtype
            state[weight.name] = weight.values.to(dtype)
        return state | {name: state[canonical] for name, canonical in self.ties.items()}


def tensors_of(file: PackedFile) -> dict[str, Tensor]:
    """All tensors to write, the codes packed."""
    tensors = dict(file.tensors)
    for weight in file.weights:
        tensors[f"{weight.name}_packed"] = pack(weight.codes, container_of(weight.grid))
        tensors[f"{weight.name}_scale"] = weight.scale.contiguous()
        tensors[f"{weight.name}_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    return tensors


def describe(file: PackedFile) -> dict[str, Any]:
    """What the tensors mean, as JSON can hold it."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights": {
            weight.name: {
                "grid": weight.grid.name,
                "granularity": weight.granularity,
                "shape": list(weight.shape),
                "dtype": dtype_name(weight.dtype),
                "container": container_of(weight.grid),
            }
            for weight in file.weights
        },
        "levels": {weight.grid.name: weight.grid.levels.tolist() for weight in file.weights},
        "ties": file.ties,
        "recipe": file.recipe,
    }


def same(one: PackedFile, other: PackedFile) -> bool:
    """Whether two files hold the same, bit for bit."""
    return (
        describe(one) == describe(other)
        and one.tensors.keys() == other.tensors.keys()
        and all(_same_bits(one.tensors[name], tensor) for name, tensor in other.tensors.items())
        and all(
            torch.equal(a.codes, b.codes) and _same_bits(a.scale, b.scale)
            for a, b in zip(one.weights, other.weights, strict=True)
        )
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def interpret(tensors: dict[str, Tensor], description: dict[str, Any]) -> PackedFile:
    """Undo `tensors_of` and `describe`, trusting neither: sizes are compared before anything is allocated.

    Raises:
        ValueError: whatever `describe` does not write.
    """
    kind, version = description.pop("format", None), description.pop("format_version", None)
    if kind != FORMAT or type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"has format {short(kind)}, version {short(version)}; this blaq reads {FORMAT!r}, version {FORMAT_VERSION}."
        )
    _expect_keys(description, {"weights", "levels", "ties", "recipe"}, "the description")
    for key in ("weights", "levels", "ties", *(["recipe"] if description["recipe"] is not None else [])):
        if not isinstance(description[key], dict):
            raise ValueError(f"the description has {key}={short(description[key])}, expected an object.")
    weights, rest = [], dict(sorted(tensors.items()))
    for name, entry in description["weights"].items():
        parts = []
        for part in (f"{name}_{part}" for part in PARTS):
            if part not in rest:
                raise ValueError(f"tensor {short(part)} is missing.")
            parts.append(rest.pop(part))
        if name in tensors:
            raise ValueError(f"{short(name)} is there twice, packed and as a tensor.")
        weights.append(_weight(name, entry, description["levels"], *parts))
    _expect_keys(description["levels"], {weight.grid.name for weight in weights}, "levels")
    known = {weight.name for weight in weights} | rest.keys()
    for name, canonical in description["ties"].items():
        if not isinstance(canonical, str) or canonical not in known or name in known:
            raise ValueError(
                f"ties has {short(name)}: {short(canonical)}, expected a new name for a tensor of the file."
            )
    aliases: dict[str, list[str]] = {}
    for name, canonical in description["ties"].items():
        aliases.setdefault(canonical, []).append(name)
    tied = [replace(weight, aliases=tuple(aliases.get(weight.name, ()))) for weight in weights]
    return PackedFile(tuple(tied), rest, description["ties"], description["recipe"])


def _weight(
    name: str, entry: object, levels: dict[str, Any], packed: Tensor, scale: Tensor, shape: Tensor
) -> QuantizedWeight:
    owner = f"weight {short(name)}"
    if not isinstance(entry, dict):
        raise ValueError(f"{owner} is {short(entry)}, expected an object.")
    _expect_keys(entry, {"grid", "granularity", "shape", "dtype", "container"}, owner)
    if not isinstance(entry["grid"], str) or entry["grid"] not in GRIDS:
        raise ValueError(f"{owner} has grid {short(entry['grid'])}, expected one of {', '.join(GRIDS)}.")
    grid = Grid.parse(entry["grid"])
    if levels.get(grid.name) != grid.levels.tolist():
        raise ValueError(
            f"{owner}: the file's levels of {grid.name} are {short(levels.get(grid.name))}, not the grid's."
        )
    if entry["container"] != container_of(grid):
        raise ValueError(f"{owner} is in {short(entry['container'])}, expected {container_of(grid)!r} for {grid.name}.")
    if not isinstance(entry["dtype"], str) or not DTYPES.get(entry["dtype"], torch.uint8).is_floating_point:
        raise ValueError(f"{owner} has dtype {short(entry['dtype'])}, expected a floating dtype.")
    sizes = check_shape(entry["shape"], owner)
    if shape.dtype != torch.int64 or shape.shape != (len(sizes),) or shape.tolist() != list(sizes):
        raise ValueError(f"{owner}: its tensors of shape and its description differ.")
    granularity = entry["granularity"]
    if type(granularity) is not int and granularity not in ("tensor", "channel"):
        raise ValueError(f"{owner} has granularity {short(granularity)}, expected 'tensor', 'channel' or a group size.")
    rows, _ = row_shape(torch.Size(sizes), granularity, owner)
    if scale.dtype != torch.float32 or scale.shape != (rows, grid.scales):
        raise ValueError(
            f"{owner} has scales {scale.dtype} {tuple(scale.shape)}, expected float32 {(rows, grid.scales)}."
        )
    if not bool(((scale >= 0) & (scale * grid.largest).isfinite()).all()):
        raise ValueError(f"{owner} has scales that are negative, NaN or too large.")
    count = math.prod(sizes)
    expected = packed_size(count, container_of(grid))
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(f"{owner} has codes {packed.dtype} {tuple(packed.shape)}, expected uint8 {(expected,)}.")
    try:
        codes = unpack(packed, container_of(grid), count)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    if count and int(codes.max()) >= len(grid.levels):
        raise ValueError(f"{owner} has code {int(codes.max())}, but {grid.name} has {len(grid.levels)} levels.")
    return QuantizedWeight(name, (), grid, granularity, codes.view(sizes), scale, DTYPES[entry["dtype"]])


def _expect_keys(found: dict[str, Any], expected: set[str], owner: str) -> None:
    for key in found.keys() ^ expected:
        raise ValueError(f"{owner} {'lacks' if key in expected else 'has an unknown'} key {short(key)}.")
