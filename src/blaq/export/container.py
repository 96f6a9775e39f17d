"""The bytes of a packed file: safetensors, with a description in the metadata and a checksum over all of it.

`docs/packed-file.md` is the specification. Reading trusts nothing: whatever the bytes, the result is tensors no larger
than the file, or a ValueError.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from reprlib import repr as short
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

KEY = "blaq"  # of the description in the metadata
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""What a tensor in the file may be, by the names of safetensors."""

_BLANK = "0" * 64  # stands for the checksum while it is computed
_LENGTH = 8  # bytes that say how long the header is


def dense_state(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """The state of a model: its parameters and buffers themselves, so that ties are told by identity.

    Raises:
        ValueError: something in it is no dense tensor of one of `DTYPES`, with values, or has a name that a file cannot hold.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if "__metadata__" in state:
        raise ValueError(f"{owner}: safetensors keeps the name '__metadata__' for itself; rename that tensor.")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            what = f"a {value.layout} tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{owner}: {name!r} of the state is {what}; expected dense tensors with values.")
        if value.dtype not in DTYPES.values():
            listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise ValueError(f"{owner}: {name!r} of the state is {value.dtype}; expected one of {listed}.")
    return state


def dtype_name(dtype: torch.dtype) -> str:
    """The name of one of `DTYPES`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def encode(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> bytes:
    """The file that holds tensors and a description; ``sha256`` is added to the latter.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a tensor that is not dense.
    """
    text = json.dumps({**description, "sha256": _BLANK}, separators=(",", ":"), allow_nan=False)
    # One entry of metadata: several come out in another order every time.
    data = safetensors_torch().save(dict(tensors), metadata={KEY: text})
    start = _checksum_position(data, _BLANK)
    digest = hashlib.sha256(data).hexdigest().encode()
    return b"".join((memoryview(data)[:start], digest, memoryview(data)[start + len(digest) :]))


def decode(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file, after its checksum was compared.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: anything but a whole packed file; the message says what is wrong.
    """
    header = _header(data)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError("is a safetensors file that save_packed did not write: it has no description.")
    description = _parse(text, "the description")
    _check_checksum(data, description.pop("sha256", None))
    for name, entry in header.items():
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"tensor {short(name)} has dtype {short(dtype)}, expected one of {', '.join(DTYPES)}.")
        check_shape(shape, f"tensor {short(name)}")
    torch_io = safetensors_torch()
    from safetensors import SafetensorError

    try:
        tensors: dict[str, Tensor] = torch_io.load(data)
    except SafetensorError as error:
        raise ValueError(f"the tensors cannot be read: {str(error)[:200]}.") from error
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise ValueError(f"tensor {short(name)} holds booleans that are neither 0 nor 1.")
    return tensors, description


def check_shape(shape: object, owner: str) -> tuple[int, ...]:
    """A shape that a tensor may have.

    Raises:
        ValueError: no list of integers >= 0, or too many, or too large for torch.
    """
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{owner} has shape {short(shape)}, expected a list of integers >= 0.")
    entries = 1
    for size in shape:
        entries = min(entries * max(size, 1), 2**62)  # strides count empty dimensions as 1
    if len(shape) > 64 or entries * 8 >= 2**62:
        raise ValueError(f"{owner} has shape {short(shape)}, more than a tensor can have.")
    return tuple(shape)


def safetensors_torch() -> ModuleType:
    """The module `safetensors.torch`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("packed files need safetensors; pip install 'blaq[export]'.") from error
    return safetensors.torch


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or length > len(data) - _LENGTH:
        raise ValueError(
            f"is cut short, or no safetensors file: {len(data)} bytes, a header of {length} bytes announced."
        )
    try:
        text = data[_LENGTH : _LENGTH + length].decode()
    except UnicodeDecodeError as error:
        raise ValueError("is no safetensors file: its header is no text.") from error
    return _parse(text, "the header")


def _check_checksum(data: bytes, expected: object) -> None:
    if not isinstance(expected, str) or len(expected) != len(_BLANK):
        raise ValueError(f"the description has sha256={short(expected)}, expected {len(_BLANK)} hexadecimal digits.")
    start = _checksum_position(data, expected)
    found = hashlib.sha256(memoryview(data)[:start])
    found.update(_BLANK.encode())
    found.update(memoryview(data)[start + len(expected) :])
    if found.hexdigest() != expected:
        raise ValueError("is damaged: its checksum is not that of its contents; copy or export it again.")


def _checksum_position(data: bytes, digits: str) -> int:
    """Where the digits of the checksum stand: once, after their key, inside the description's JSON string."""
    key = rb"\"sha256\":\""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    found = data.rfind(key + digits.encode("ascii", "replace"), _LENGTH, end)
    if found < 0:
        raise ValueError("is damaged: its checksum is not written as save_packed writes it.")
    return found + len(key)


def _parse(text: str, what: str) -> dict[str, Any]:
    """A JSON object, strictly: no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"has the key {short(twice)} twice.")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"has the number {constant}.")

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{what} is no JSON as it should be: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} is {type(parsed).__name__}, expected a JSON object.")
    return parsed
