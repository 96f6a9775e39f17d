"""The native packed file: codes bit-packed, scales, and everything else a model holds, exactly.

`docs/packed-file.md` is the specification of the format.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blaq.export.container import decode, dense_state, encode
from blaq.export.contents import PARTS, PackedFile, describe, interpret, same, tensors_of
from blaq.export.files import read_whole, replacing
from blaq.export.layers import QuantizedWeight, named, plain, quantized_weights, shipped, weights_of_run
from blaq.optim.base import LatentOptimizer


def save_packed(model: nn.Module, opt: LatentOptimizer, path: str | Path) -> None:
    """Write a trained model as a packed file: 1, 1.6, 2, 3 .. 8 bits a quantized weight, everything else as it is.

    The file holds the weights to ship: with ``trial="past"`` those of ``opt.eval()``. It is read back and compared before it
    takes its name, so an interrupted save leaves what was there. Model and optimizer are left as they were.

    Args:
        model: any module; its whole ``state_dict`` is saved, tied tensors once.
        opt: the `blaq.BLAQ` or `blaq.LAQ` that trains it.
        path: of the file; by convention it ends in ``.safetensors``.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: weights that were changed outside the optimizer, an optimizer of another model, a state that holds
            something else than tensors, names that collide, a path that is no file.

    Example:
        >>> import tempfile
        >>> from blaq import LAQ, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 10))
        >>> opt = LAQ(param_groups(model, bits="ternary"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_packed(model, opt, f"{folder}/model.safetensors")
        ...     copy = load_packed(f"{folder}/model.safetensors", nn.Sequential(nn.Linear(64, 10)))
        >>> torch.equal(copy[0].weight, model[0].weight)
        True
    """
    model = plain(model, "save_packed")
    with shipped(opt):
        _write(path, model, quantized_weights(model, opt), None)


def load_packed(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a packed file into a plain model: every quantized weight is ``scale * level``, rounded once to the model's dtype.

    Args:
        path: of a file that `save_packed` or ``blaq export`` wrote.
        model: a model of the same names and shapes, which is changed and returned; its training mode stays. None builds
            the network of the recipe that ``blaq export`` stored, in evaluation mode.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no packed file, a damaged one, one of another version; a model with other names or shapes, or with tensors
            that cannot hold the values, which then is not changed; no model, and no recipe to build one.

    Example: see `save_packed`.
        >>> load_packed("no-such-file.safetensors")
        Traceback (most recent call last):
        ValueError: packed file 'no-such-file.safetensors': there is no such file.
    """
    file = read_packed(path)
    owner = f"load_packed({str(path)!r})"
    if model is not None:
        _load(file, plain(model, owner), owner)
        return model
    model = _rebuilt(file, owner)
    _load(file, model, owner)
    return model.eval()


def read_packed(path: str | Path) -> PackedFile:
    """Read a packed file without a model.

    Nothing in the file is trusted: memory stays in proportion to its size, and no code in it runs.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no packed file, a damaged one, one of another version; the message names the file and the reason.
    """
    try:
        tensors, description = decode(read_whole(path))
        return interpret(tensors, description)
    except ValueError as error:
        raise ValueError(f"packed file {str(path)!r}: {error}") from error


def export_run(run: Path, out: Path, checkpoint: Literal["best", "last"] = "best") -> Path:
    """Write a run's checkpoint as a packed file, with its recipe: `load_packed` then needs no model. Returns `out`.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no run there, or none whose first epoch has ended; a path that is no file.
    """
    model, weights, recipe = weights_of_run(run, checkpoint)
    plain = json.loads(json.dumps(asdict(recipe)))  # tuples as the lists that are read back
    _write(out, model, weights, plain)
    return out


# --- writing ----------------------------------------------------------------------------------------------------------------


def _write(path: str | Path, model: nn.Module, weights: list[QuantizedWeight], recipe: dict[str, Any] | None) -> None:
    """Write, read back, compare. The model holds the values of the weights."""
    file = _collect(model, weights, recipe)
    data = encode(tensors_of(file), describe(file))
    with replacing(path) as partial:
        partial.write_bytes(data)
        if not same(read_packed(partial), file):
            raise ValueError(f"save_packed({str(path)!r}): the file read back is not what was written; check the disk.")


def _collect(model: nn.Module, weights: list[QuantizedWeight], recipe: dict[str, Any] | None) -> PackedFile:
    state = dense_state(model, "save_packed")
    quantized = {weight.name: weight for weight in weights}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for names, tensor in named(state.items()):
        canonical = next((name for name in names if name in quantized), names[0])
        ties.update((name, canonical) for name in names if name != canonical)
        if canonical not in quantized:
            tensors[canonical] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    for name in quantized:
        if name not in state:
            raise ValueError(f"save_packed: {name!r} is quantized, but the model's state_dict leaves it out.")
        for part in (f"{name}_{part}" for part in PARTS):
            if part in state:
                raise ValueError(f"save_packed: the packed {name!r} needs the name {part!r}; rename that tensor.")
    return PackedFile(tuple(weights), tensors, ties, recipe)


# --- loading ----------------------------------------------------------------------------------------------------------------


def _load(file: PackedFile, model: nn.Module, owner: str) -> None:
    present = model.state_dict(keep_vars=True)
    for name, value in present.items():
        if is_lazy(value):
            raise ValueError(f"{owner}: {short(name)} of the model has no shape yet; call the model once, then load.")
        if getattr(value, "is_meta", False):  # torch would only warn that it copies nothing
            raise ValueError(
                f"{owner}: {short(name)} of the model is on meta, without values; take memory for them first, as "
                "model.to_empty(device='cpu') does."
            )
    check_fits(present, file.shapes(), owner)
    values = file.state_dict(like=present)
    for name, value in values.items():
        dtype = present[name].dtype
        if not torch.can_cast(value.dtype, dtype) and not torch.equal(value.to(dtype).to(value.dtype), value):
            raise ValueError(
                f"{owner}: {short(name)} is {value.dtype} in the file, and {dtype} in the model does not hold "
                "it; pass the model it was saved from."
            )
    for names, _ in named(present.items()):
        if any(not torch.equal(values[names[0]], values[name]) for name in names[1:]):
            raise ValueError(
                f"{owner}: {' and '.join(names)} are one tensor of the model, and the file holds different ones for them; "
                "pass the model it was saved from."
            )
    model.load_state_dict(values)


def check_fits(present: Mapping[str, Any], shapes: Mapping[str, torch.Size], owner: str) -> None:
    """Refuse other names and shapes before anything of the model is changed."""
    for found, expected, what in ((shapes, present, "lacks"), (present, shapes, "has, but the model does not have,")):
        names = [short(name) for name in expected if name not in found]
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(
                f"{owner}: the file {what} {', '.join(names[:4])}{more}; pass the model it was saved from."
            )
    for name, shape in shapes.items():
        if present[name].shape != shape:
            raise ValueError(
                f"{owner}: {short(name)} has shape {tuple(shape)} in the file, {tuple(present[name].shape)} in the model."
            )


def _rebuilt(file: PackedFile, owner: str) -> nn.Module:
    """The network of the recipe in the file; first without memory, to see that it is one of the file's size."""
    recipe = (file.recipe or {}).get("model")
    name, options = (recipe.get("name"), recipe.get("options")) if isinstance(recipe, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(options, dict):
        raise ValueError(f"{owner}: the file names no network; pass the model, as in load_packed(path, model).")
    if name.startswith("hf:"):
        raise ValueError(
            f"{owner}: builds no network of another library from what a file says; pass the model, as in "
            f"load_packed(path, blaq.tasks.models.build_model({short(name)}, ...)), options={short(options)}."
        )
    from blaq.tasks.models import build_model

    tensors = len(file.tensors) + len(file.weights)
    try:
        if any(isinstance(value, list) and len(value) > tensors for value in options.values()):
            raise ValueError("more layers than tensors")
        with torch.device("meta"):
            skeleton = build_model(name, **options)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise ValueError(f"{owner}: cannot build {short(name)} with {short(options)}: {reason}") from error
    check_fits(skeleton.state_dict(), file.shapes(), owner)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, only to overwrite them
        return build_model(name, **options)
