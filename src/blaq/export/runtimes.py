"""Exported files in the runtimes they are made for, behind one interface: verification and benchmark know no other."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["SUFFIXES", "Session", "open_session"]

SUFFIXES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}


class Session(Protocol):
    """An exported file, loaded by its runtime; inputs and outputs are arrays in the order of the model's own.

    Attributes:
        preset: ``"exact"``: float32 arithmetic; ``"fast"``: linear layers with 8-bit activations.
        description: what `blaq export` wrote into the file: format version, preset, recipe, and for every quantized
            weight grid, granularity, shape and container.
        batch: examples a call takes, where the file has fixed it, else None.
    """

    @property
    def preset(self) -> str:
        """See above."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """See above."""
        ...

    @property
    def batch(self) -> int | None:
        """See above."""
        ...

    def run(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """The first output."""
        ...

    def outputs(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """All outputs."""
        ...

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Every quantized weight as the runtime computes it from the file: float32, shape of the parameter, by name."""
        ...

    def layers(self, *inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What every layer with a quantized weight computes on the way, by the weight's name, first layer first.

        Layers whose output the runtime has no equal of (those of an LSTM) are left out.
        """
        ...


def open_session(path: Path, *, threads: int | None = None) -> Session:
    """Load an exported file in the runtime of its suffix: ``.onnx`` ONNX Runtime, ``.xml`` OpenVINO.

    Args:
        path: what `blaq export` wrote.
        threads: of the runtime; None leaves the choice to it.

    Raises:
        ValueError: another suffix, no such file, a file that the runtime refuses or that blaq did not write.
        ImportError: the runtime is not installed.

    Example:
        >>> open_session(Path("model.pt"))
        Traceback (most recent call last):
        ValueError: open_session('model.pt'): expected a file of type .onnx (ONNX Runtime) or .xml (OpenVINO).
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        known = " or ".join(f"{suffix} ({runtime})" for suffix, runtime in SUFFIXES.items())
        raise ValueError(f"open_session({str(path)!r}): expected a file of type {known}.")
    if not path.is_file():
        raise ValueError(f"open_session({str(path)!r}): there is no such file.")
    if path.suffix == ".onnx":
        from blaq.export.onnx_session import OnnxSession

        return OnnxSession(path, threads=threads)
    from blaq.export.openvino_session import OpenVINOSession

    session: Session = OpenVINOSession(path, threads=threads)
    return session
