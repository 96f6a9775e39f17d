"""Files that runs and sweeps are made of: JSON, lines of JSON, and text that is written whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def refuse_below_a_file(path: Path, owner: str, option: str = "--out") -> None:
    """Whether folders can be made down to a path that is to be written.

    Raises:
        ValueError: a parent is no folder, but a file or a link that leads nowhere.
    """
    there = next((parent for parent in path.parents if os.path.lexists(parent)), None)
    if there is not None and not there.is_dir():
        raise ValueError(
            f"{owner}: {str(there)!r} is no folder, so nothing can be made below it; choose another with {option}."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ValueError: it is damaged.
    """
    return _objects(path, [_text(path)])[0]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, none if there is no file; a last line cut short by a kill is left out.

    Raises:
        ValueError: a line is damaged.
    """
    if not path.exists():
        return []
    text = _text(path)
    return _objects(path, text[: text.rfind("\n") + 1].splitlines())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, error) from None


def _objects(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    try:
        found = json.loads(f"[{','.join(texts)}]")  # at once: trajectories have many lines
    except json.JSONDecodeError as error:
        raise damaged(path, error) from None
    if len(found) != len(texts) or not all(isinstance(each, dict) for each in found):
        raise damaged(path, "expected JSON objects")
    return found  # type: ignore[no-any-return]


def damaged(path: Path, why: object) -> ValueError:
    """What to raise where a file is not what a run writes."""
    return ValueError(f"{str(path)!r} is damaged ({why}); delete the run or the comparison, and make it again.")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())  # else a power failure could leave a checkpoint that is ahead of them


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is at every moment either as before or complete; a link is followed.

    A device or a pipe, in whose place nothing may come, is written to directly.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power failure could leave an empty file under the final name
    os.replace(partial, path)
