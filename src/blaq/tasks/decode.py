"""Compressed images to one uint8 array: decoded once, kept in a cache file, memory-mapped from there ever after."""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

__all__ = ["Part", "cache_folder", "decode_images"]

_FORMAT = 2  # part of the cache key: raise it whenever the same files come to decode to other pixels
_GREY = {"1", "L", "LA"}  # Pillow's names
_COLOUR = {"P", "RGB", "RGBA", "CMYK", "YCbCr"}
_TURNS = {  # EXIF orientation to what makes an image upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_BLOCK = 1024  # images decoded and written at a time
_PATIENCE = 5.0  # seconds between two looks whether another process is done

_log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Part:
    """One split before decoding.

    Attributes:
        name: what errors call it, "train of mnist".
        table: its rows, read lazily.
        files: the files behind them; their content identifies the part.
    """

    name: str
    table: pyarrow.dataset.Dataset
    files: tuple[Path, ...]

    def read(self, *column: str) -> Iterator[pa.Array]:
        """A column, or the field of a struct column, in order and some rows at a time."""
        wanted = {"values": pc.field(*column)}
        try:
            # Little readahead: by default whole files of images would wait in memory.
            for batch in self.table.to_batches(wanted, batch_size=_BLOCK, batch_readahead=1, fragment_readahead=1):
                if batch.num_rows:
                    yield batch.column(0)
        except (OSError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.name}: cannot read column {column[0]!r} ({reason}); fetch the files again."
            ) from error


class _ColourError(Exception):
    """A colour image among images taken for grey."""


def decode_images(part: Part, column: str, image_size: int | None, *, grey: bool | None = None) -> Tensor:
    """All images of a part, uint8 (N, C, H, W) with C = 1 or 3, from the cache where they were decoded before.

    Args:
        part: the split, at least one row.
        column: its image column, a struct whose field ``bytes`` holds a PNG, JPEG or other file of an 8-bit image.
        image_size: resize the short side to 8/7 of this and cut out the centre square of this size (224 of 256, the
            usual ImageNet evaluation); None takes images as they are.
        grey: one channel or three; None decides by the images: grey if all of them are.

    Returns:
        A tensor over a read-only memory map: index it, which copies, before you write.

    Raises:
        ValueError: an image is missing, damaged, not 8-bit, of another shape than the first, or in colour where `grey`;
            or the cache cannot be written.
    """
    path = cache_folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', part.name)}-{_key(part, column, image_size, grey)}.npy"
    rows = part.table.count_rows()
    before = _stamp(path)
    if (cached := _open(path, rows)) is None:
        with _alone(path, before):
            cached = _open(path, rows) if _stamp(path) != before else None  # another process has made it meanwhile
            if cached is None:
                _decode_into(path, part, rows, column, image_size, grey)
                cached = _open(path, rows)
    assert cached is not None, path
    with warnings.catch_warnings():
        # Of a map that could be written to, Linux may refuse one that is larger than memory (ImageNet: 193 GB).
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(cached)


def _decode_into(path: Path, part: Part, rows: int, column: str, image_size: int | None, grey: bool | None) -> None:
    try:
        _write(path, _blocks(part, rows, column, image_size, grey=grey is not False), rows)
    except _ColourError as found:
        if grey:
            raise ValueError(f"{found} is in colour, but the training images are grey.") from None
        # Most often the first image; then nothing is lost by starting again.
        _write(path, _blocks(part, rows, column, image_size, grey=False), rows)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Which file it is; None if there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


@contextlib.contextmanager
def _alone(path: Path, before: tuple[int, int] | None) -> Iterator[None]:
    """Keep other processes from making the same file meanwhile: it may be large."""
    lock = FileLock(cache_folder() / "locks" / f"{path.name}.lock")
    try:
        with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks: twice, if need be
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.warning("another process is decoding into %s: waiting for it", path)
                while not lock.is_locked and _stamp(path) == before:
                    with contextlib.suppress(Timeout):
                        lock.acquire(timeout=_PATIENCE)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"BLAQ_CACHE={str(cache_folder())!r}: cannot write the decoded images there ({error}); set BLAQ_CACHE to a "
            "folder with room for them."
        ) from error


def cache_folder() -> Path:
    """Where decoded images are kept: the folder named by the environment's BLAQ_CACHE, else ~/.cache/blaq."""
    return Path(os.environ.get("BLAQ_CACHE") or "~/.cache/blaq").expanduser()


def _key(part: Part, column: str, image_size: int | None, grey: bool | None) -> str:
    """Digest of all that decides the pixels: every byte of the files, and how they are decoded."""
    digest = hashlib.sha256(repr((_FORMAT, PIL.__version__, column, image_size, grey)).encode())
    for path in part.files:
        digest.update(_content(path))
    return digest.hexdigest()[:20]


def _content(path: Path) -> bytes:
    """Digest of a file: read once, then remembered for as long as the file keeps place, size and time of change."""
    now = path.stat()
    place = repr((str(path.resolve()), now.st_size, now.st_mtime_ns, now.st_ino))
    known = cache_folder() / "contents" / hashlib.sha256(place.encode()).hexdigest()
    with contextlib.suppress(OSError):
        if len(remembered := known.read_bytes()) == hashlib.sha256().digest_size:
            return remembered
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").digest()
    with _in_place_of(known) as file:
        file.write(content)
    return content


def _open(path: Path, rows: int) -> Pixels | None:
    """The cached array, or None where there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        array: Pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        problem = str(error)
    else:
        if array.dtype == np.uint8 and array.ndim == 4 and len(array) == rows:
            return array
        problem = f"it holds {array.dtype} {array.shape}"
    _log.warning("cache file %s is damaged (%s): decoding again", path, problem)
    return None


def _write(path: Path, blocks: Iterator[Pixels], rows: int) -> None:
    """Write the blocks as one .npy file of `rows` rows."""
    with _in_place_of(path) as file:
        first = next(blocks)
        header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *first.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for block in chain([first], blocks):
            file.write(block.tobytes())


@contextlib.contextmanager
def _in_place_of(path: Path) -> Iterator[IO[bytes]]:
    """A new file of the cache: a temporary one is renamed, so nobody sees half of it."""
    temporary: Path | None = None
    try:
        with _cache_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                yield file
                file.flush()
                os.fsync(file.fileno())  # else a power failure could leave zeros under the final name
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _blocks(part: Part, rows: int, column: str, image_size: int | None, *, grey: bool) -> Iterator[Pixels]:
    """The decoded images in order, (n, C, H, W), all of the first one's shape."""
    decode = partial(_decode_rows, name=part.name, image_size=image_size, grey=grey)
    workers = os.cpu_count() or 1  # Pillow lets go of the interpreter lock while it works: pays for large images
    start, shape = 0, None
    with ThreadPoolExecutor(workers) as pool, tqdm(total=rows, desc=f"decoding {part.name}", disable=None) as bar:
        for batch in part.read(column, "bytes"):
            files = batch.to_pylist()
            share = -(-len(files) // workers)
            offsets = range(0, len(files), share)
            pieces = pool.map(decode, [files[k : k + share] for k in offsets], [start + k for k in offsets])
            images = list(chain.from_iterable(pieces))
            shape = shape or images[0].shape
            for row, image in enumerate(images, start):
                if image.shape != shape:
                    raise ValueError(
                        f"row {row} of {part.name}: image of shape {image.shape}, row 0 has {shape}; set "
                        "data.image_size to resize all images to one size."
                    )
            start += len(images)
            bar.update(len(images))
            yield np.stack(images)


def _decode_rows(
    files: Sequence[bytes | None], first_row: int, *, name: str, image_size: int | None, grey: bool
) -> list[Pixels]:
    images = []
    for row, file in enumerate(files, first_row):
        where = f"row {row} of {name}"
        if file is None:
            raise ValueError(f"{where}: no image; expected the image files inside the Parquet file, not paths to them.")
        try:
            images.append(_decode(file, where, image_size, grey))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for whatever it cannot read
            raise ValueError(f"{where}: cannot decode the image ({error}).") from error
    return images


def _decode(file: bytes, where: str, image_size: int | None, grey: bool) -> Pixels:
    """One image as (1, H, W) or (3, H, W), turned as its metadata say: as `datasets` does."""
    with Image.open(BytesIO(file)) as image:
        if image.mode not in _GREY | _COLOUR:
            raise ValueError(f"{where}: expected an 8-bit image, got Pillow mode {image.mode!r}.")
        if grey and image.mode in _COLOUR:
            raise _ColourError(where)
        pixels = image.convert("L" if grey else "RGB")
        turn = _turn(image)
    if turn is not None:
        pixels = pixels.transpose(turn)
    if image_size is not None:
        scale = round(image_size * 8 / 7) / min(pixels.size)
        width, height = (round(side * scale) for side in pixels.size)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        pixels = pixels.crop((left, top, left + image_size, top + image_size))
    array = np.asarray(pixels)
    return array[None] if grey else array.transpose(2, 0, 1)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a loaded image upright, if it is not; damaged metadata do not tell."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many kinds
        return None
