"""blaq: train neural networks whose weights take 1 to 8 bits, by loss-aware quantization.

The names below need torch alone; training, tasks and the command need the extras ``blaq[train]`` and ``blaq[hf]``. What
writes and reads files to ship is imported when it is first used, and needs ``blaq[export]``,
`export_onnx` ``blaq[onnx]``, `export_openvino` ``blaq[openvino]``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blaq.grids import Grid
from blaq.optim.blaq import BLAQ
from blaq.optim.groups import param_groups
from blaq.optim.laq import LAQ
from blaq.optim.memory import MemoryReport, memory_report
from blaq.optim.plan import Plan, plan
from blaq.projection import Quantized, project

if TYPE_CHECKING:
    from blaq.export.onnx import export_onnx
    from blaq.export.openvino import export_openvino
    from blaq.export.packed import load_packed, save_packed

__all__ = [
    "BLAQ",
    "LAQ",
    "Grid",
    "MemoryReport",
    "Plan",
    "Quantized",
    "export_onnx",
    "export_openvino",
    "load_packed",
    "memory_report",
    "param_groups",
    "plan",
    "project",
    "save_packed",
]
__version__ = "0.1.0"

_ON_FIRST_USE = {
    "export_onnx": "blaq.export.onnx",
    "export_openvino": "blaq.export.openvino",
    "load_packed": "blaq.export.packed",
    "save_packed": "blaq.export.packed",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'blaq' has no attribute {name!r}")
    return getattr(import_module(_ON_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
