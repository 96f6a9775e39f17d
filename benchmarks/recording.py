"""What the benchmarks share: where they ran, and how they write their numbers."""

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import blaq


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, of ``python`` and of blaq itself."""
    own = {"python": platform.python_version(), "blaq": blaq.__version__}
    return {package: own.get(package) or version(package) for package in packages}


def processor() -> dict[str, str]:
    """The processor, and which of its vector instructions torch takes."""
    return {"cpu": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}


def listed(found: dict[str, str]) -> str:
    """Versions in a line of text."""
    return ", ".join(f"{package} {number}" for package, number in found.items())


def spread(median: float, low: float, high: float) -> str:
    """A median with its range."""
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown; a column whose name begins with ``>`` is set to the right."""
    names = [column.removeprefix(">") for column in columns]
    return [
        "|" + "".join(f" {name} |" if name else " |" for name in names),
        "|" + "".join("---:|" if column.startswith(">") else "---|" for column in columns),
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def write(folder: Path, name: str, report: dict[str, Any], lines: Sequence[str] | None = None, indent: int = 1) -> None:
    """NAME.json, and with lines NAME.md to read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=indent) + "\n", encoding="utf-8")
    if lines is not None:
        (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
