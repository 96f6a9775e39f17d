"""A folder in the format ``pack-quantized`` of compressed-tensors: what vLLM and transformers read.

The format holds integers times one scale, in 2 to 8 bits, of the weights of `Linear` and `Embedding` modules.
"""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from blaq.export.container import dense_state, safetensors_torch
from blaq.export.files import replacing
from blaq.export.layers import QuantizedWeight, plain, quantized_weights, shipped, weights_of_run
from blaq.export.packing import pack
from blaq.grids import MAX_BITS, Grid
from blaq.optim.base import LatentOptimizer

WORD_BITS = 32
PARTS = ("weight_packed", "weight_scale", "weight_shape")  # what a packed weight of a module becomes
OWNER = "export --format compressed-tensors"


def bits_of(grid: Grid) -> int | None:
    """The fewest bits of two's complement that hold a grid's levels; None where the format cannot hold it.

    Example:
        >>> [bits_of(Grid.parse(name)) for name in ("binary", "ternary", "linear4", "log3", "log4", "midrise2")]
        [2, 2, 4, 4, 8, 3]
        >>> bits_of(Grid.parse("ternary2")), bits_of(Grid.parse("log5")), bits_of(Grid.parse("midrise8"))
        (None, None, None)
    """
    bits = int(grid.largest).bit_length() + 1
    return None if grid.two_scales or bits > MAX_BITS else bits


def save_compressed(model: nn.Module, opt: LatentOptimizer, folder: str | Path) -> None:
    """Write a trained model as a folder of ``model.safetensors`` and ``config.json``, for compressed-tensors.

    The weights are those of ``opt.eval()``, bit for bit: the folder is decompressed by compressed-tensors itself and compared
    before it takes its name. Quantized weights of other modules than `Linear` and `Embedding` are written in full, with a
    warning: the format has no place for them.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: a grid that the format cannot hold, nothing that it can pack, a folder that is there already.
    """
    model = plain(model)
    with shipped(opt):
        _write(Path(folder), model, quantized_weights(model, opt))


def export_run(run: Path, out: Path, checkpoint: Literal["best", "last"] = "best") -> Path:
    """Write a run's checkpoint as such a folder. Returns `out`.

    Raises:
        ImportError, ValueError: as `save_compressed`; no run there, or none whose first epoch has ended.
    """
    model, weights, _ = weights_of_run(run, checkpoint)
    _write(out, model, weights)
    return out


def _write(folder: Path, model: nn.Module, weights: list[QuantizedWeight]) -> None:
    for weight in weights:
        if weight.dtype != torch.float32:  # readers take the dtype of the scales for that of the weights
            raise ValueError(
                f"{OWNER}: {weight.name!r} is {weight.dtype}, expected float32; use --format packed, which holds every dtype."
            )
    packable = _packable(model, weights)
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in dense_state(model, OWNER).items()
    }
    for module, weight in packable.items():
        del tensors[f"{module}.weight"]
        parts = {f"{module}.weight_{part}": tensor for part, tensor in _parts(weight).items()}
        for name in parts.keys() & tensors.keys():
            raise ValueError(f"{OWNER}: the packed '{module}.weight' needs the name {name!r}; rename that tensor.")
        tensors |= parts
    own: Any = getattr(model, "config", None)  # of a transformers model: what builds it again
    config = own.to_dict() if hasattr(own, "to_dict") else {}
    config["quantization_config"] = _configuration(model, packable)
    with replacing(folder, folder=True) as partial:
        partial.mkdir()
        safetensors_torch().save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _verify(partial, packable)


def _packable(model: nn.Module, weights: list[QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The quantized weights that the format has a place for, by the names of their modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    packable: dict[str, QuantizedWeight] = {}
    others = []
    for weight in weights:
        if bits_of(weight.grid) is None:
            raise ValueError(
                f"{OWNER}: {weight.name!r} is {weight.grid.name}, and the format holds integers of 2 to {MAX_BITS} bits with "
                "one scale; use --format packed, which holds every grid."
            )
        for name in weight.names:
            module, _, last = name.rpartition(".")
            if module and last == "weight" and isinstance(modules[module], nn.Linear | nn.Embedding):
                packable[module] = weight
            else:
                others.append(name)
    if not packable:
        raise ValueError(
            f"{OWNER}: the model has no quantized weight of a Linear or Embedding inside another module, and the format packs "
            "no others; use --format packed, which holds any module."
        )
    if others:
        warnings.warn(
            f"{OWNER}: the format packs weights of Linear and Embedding only; written in full: {', '.join(others)}.",
            stacklevel=4,
        )
    return packable


def _parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a weight (N, K): int32 words, each row padded to whole ones; the scales; the shape."""
    bits = _bits(weight)
    levels = weight.grid.levels.to(torch.int16) + 2 ** (bits - 1)
    unsigned = levels.to(torch.uint8)[weight.codes.int()]
    rows, columns = unsigned.shape
    words = -(-columns * bits // WORD_BITS)
    packed = pack(pad(unsigned, (0, -columns % WORD_BITS)), f"bits{bits}").view(torch.int32).view(rows, -1)
    scale = weight.scale.view(1) if weight.granularity == "tensor" else weight.scale.view(rows, -1)
    return {
        "packed": packed[:, :words].contiguous(),
        "scale": scale.clone(),  # safetensors writes no memory twice, and a tied weight has several modules
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _configuration(model: nn.Module, packable: dict[str, QuantizedWeight]) -> dict[str, Any]:
    """The quantization_config: the modules of each scheme, by their full names."""
    schemes: dict[tuple[int, str | int], list[str]] = {}
    for module, weight in packable.items():
        schemes.setdefault((_bits(weight), weight.granularity), []).append(module)
    groups = {}
    for index, ((bits, granularity), modules) in enumerate(schemes.items()):
        scheme = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": granularity if isinstance(granularity, str) else "group",
            "group_size": None if isinstance(granularity, str) else granularity,
        }
        groups[f"group_{index}"] = {"targets": modules, "weights": scheme}
    compressible = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in compressible if name not in packable],
    }


def read_compressed(folder: Path) -> dict[str, Tensor]:
    """Every tensor of such a folder, packed weights decompressed by compressed-tensors.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: no such folder, or one that compressed-tensors does not read.
    """
    try:
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise ImportError(f"{OWNER} needs compressed-tensors; pip install 'blaq[export]'.") from error
    safetensors = safetensors_torch()
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(folder / "model.safetensors")
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        for scheme in QuantizationConfig.model_validate(saved).config_groups.values():
            for module in scheme.targets:
                parts = {key: tensors.pop(f"{module}.{key}") for key in PARTS}
                tensors[f"{module}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    except Exception as error:  # whatever the two libraries raise at what they do not know
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{str(folder)!r}: no folder that compressed-tensors reads: {reason}") from error
    return tensors


def _verify(folder: Path, packable: dict[str, QuantizedWeight]) -> None:
    """Decompress the folder with compressed-tensors, and compare bit for bit."""
    tensors = read_compressed(folder)
    for module, weight in packable.items():
        if not torch.equal(tensors[f"{module}.weight"], weight.values):
            raise ValueError(
                f"{OWNER}: compressed-tensors reads other weights of {module!r} than were trained; "
                "use --format packed, and report this."
            )


def _bits(weight: QuantizedWeight) -> int:
    bits = bits_of(weight.grid)
    assert bits is not None, weight.grid
    return bits
