"""Files and folders that are at every moment either as before or complete."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, folder: bool = False) -> Iterator[Path]:
    """A name in the same folder to write a file under, or a `folder`; it takes its own name when the block ends.

    If the block raises, what lies at `path` is untouched and the new file is gone. A link is followed.

    Raises:
        ValueError: see `target_of`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "model.bin")) as partial:
        ...         _ = partial.write_bytes(b"all of it")
        ...     [file.name for file in Path(folder).iterdir()]
        ['model.bin']
    """
    target = target_of(path, folder=folder)
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        for file in [partial, *partial.rglob("*")]:
            flush(file)
        os.replace(partial, target)
        flush(target.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def target_of(path: str | Path, *, folder: bool = False) -> Path:
    """Where to write what is to be at `path`: a link is followed.

    Raises:
        ValueError: `path` is empty; something else than a file where a file is to be written, such as a folder or a device, or
            than an empty folder where a folder is; its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if folder and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"export(out={str(path)!r}): is there already; expected the name of a new or empty folder.")
    if not folder and (not str(path) or (target.exists() and not target.is_file())):
        raise ValueError(f"export(out={str(path)!r}): expected the name of a file, new or to be replaced.")
    if not target.parent.is_dir():
        raise ValueError(f"export(out={str(path)!r}): there is no folder {str(target.parent)!r}; make it first.")
    return target


def bin_of(path: Path) -> Path:
    """The weights of an OpenVINO file: beside it, or beside the file that it is a link to."""
    beside = path.with_suffix(".bin")
    return beside if beside.is_file() else Path(os.path.realpath(path)).with_suffix(".bin")


def bytes_of(path: Path) -> int:
    """Bytes of a file, of all files of a folder, or of an .xml and its .bin."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    files = [path, bin_of(path)] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)


def read_whole(path: str | Path) -> bytes:
    """The bytes of a file; links are followed.

    Raises:
        ValueError: nothing there, or no regular file.
    """
    path = Path(path)
    if not path.is_file():  # not a pipe either, which may never end
        raise ValueError("is no regular file." if path.exists() else "there is no such file.")
    return path.read_bytes()


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's entries: a new name must not outlive its contents in a power failure."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
