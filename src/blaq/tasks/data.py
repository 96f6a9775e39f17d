"""Data sets by name: scikit-learn's digits, image folders, names of the Hugging Face hub, text for character models."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blaq.tasks.batches import Batches, Dataset, Split, to_unit

__all__ = ["Batches", "Dataset", "Split", "find_dataset", "load_dataset"]

_STATISTICS = 1 << 16  # images that mean and std are taken over at most: all of MNIST and CIFAR-10, 5 % of ImageNet


def load_dataset(
    source: str,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
    sequence: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Load a data set and split it.

    ==================================  ===========================================================================
    source                              data
    ==================================  ===========================================================================
    ``digits``                          scikit-learn's 1797 digits of 8 x 8 pixels, no download; float32 in 0..1
    a folder of Parquet files           images in the Hugging Face datasets layout; uint8
    a text file, a folder + input.txt   windows of characters and, as targets, the characters one further on; int64
    a hub name, ``ylecun/mnist``        the folder ``$BLAQ_DATA/mnist`` if there is one, else a download
    another name, ``war_and_peace``     the folder ``$BLAQ_DATA/war_and_peace``
    ==================================  ===========================================================================

    Images: the test examples are the test file (ImageNet: its validation file); the validation examples come out of the
    training file by a random permutation, unless there are both a validation and a test file; digits have one file for
    all three. Labels are integers or text, whose classes are the sorted texts of the training file. Decoded images stay
    in a cache file, see `blaq.tasks.decode`.

    Text: the first 80 % of the characters train, the next 10 % validate, the last 10 % test. The vocabulary is the
    sorted characters of the whole text. Windows do not overlap; characters that fill no window are left out.

    Args:
        source: see above.
        train: number of training examples (text: characters, from the start of the part), at least 1; None takes all
            that validation leaves.
        validation: number of validation examples (text: characters), at least 1; None takes a tenth of the training
            file, or all of a validation file (text: of the part). Which examples it takes does not depend on `train`.
        test: number of test examples (text: characters), at least 1; None takes all, of the digits a tenth.
        seed: of the permutations that choose the examples, at least 0; text is split in order.
        sequence: characters a window; text needs it, images refuse it.
        image_size: height and width that images are resized and cropped to; only for images from files.

    Raises:
        ValueError: there is no such source, it does not have that many examples, or its files cannot be used.

    >>> dataset = load_dataset("digits", train=1000, validation=300, test=400)
    >>> dataset.train, len(dataset.validation), len(dataset.test), dataset.classes
    (Split(1000 x (1, 8, 8) float32), 300, 400, 10)
    """
    wanted = _Wanted(train, validation, test, seed)
    for option, size, lowest in (("seed", seed, 0), ("sequence", sequence, 1), ("image_size", image_size, 1)):
        if size is not None and size < lowest:
            raise ValueError(f"load_dataset({option}={size}): expected at least {lowest}.")
    path = None if source == "digits" else _find(source, text=sequence is not None)
    text = _text_file(path)
    if text is None and sequence is not None:
        found = source if path is None else str(path)
        raise ValueError(f"load_dataset(sequence={sequence}): {found!r} holds images; leave out data.sequence.")
    if (text is not None or source == "digits") and image_size is not None:
        raise ValueError(
            f"load_dataset(image_size={image_size}): only images from files can be resized, not {source!r}; leave out "
            "data.image_size."
        )
    name, place = find_dataset(source, text=sequence is not None)
    if source == "digits":
        return replace(_digits(wanted), place=place)
    if text is not None:
        return replace(_text(text, name, wanted, sequence), place=place)
    return replace(_images(source, path, name, wanted, image_size), place=place)


def find_dataset(source: str, *, text: bool = False) -> tuple[str, str]:
    """Name and place of the data that `load_dataset` would load, as `Dataset` has them; nothing is read.

    Args:
        source: as `load_dataset` takes it.
        text: whether text is wanted, which is what `sequence` says there.

    Raises:
        ValueError: there is no such source.

    Example:
        >>> find_dataset("digits")
        ('digits', 'scikit-learn')
    """
    if source == "digits":
        return source, "scikit-learn"
    path = _find(source, text=text)
    if path is None:
        return Path(source).name, "the Hugging Face hub"
    file = _text_file(path)
    if file is None:
        return path.resolve().name, str(path)
    return file.resolve().parent.name if file.name == "input.txt" else file.stem, str(file)


@dataclass(frozen=True)
class _Wanted:
    """How many examples of each split, None: the default; and the seed that chooses them."""

    train: int | None
    validation: int | None
    test: int | None
    seed: int

    def size(self, split: str, default: int, most: int, available: str) -> int:
        """The size of a split, checked against what there is."""
        wanted: int | None = getattr(self, split)
        size = default if wanted is None else wanted
        if not 1 <= size <= most:
            raise ValueError(
                f"load_dataset({split}={wanted}): expected 1 <= {split} <= {most}: {available}; change data.{split}."
            )
        return size

    def take(self, split: str, pool: Split, default: int, available: str, *, leave: int = 0) -> tuple[Split, Split]:
        """A random choice from the pool, and the rest of the pool: at least `leave`; both in the pool's order."""
        size = self.size(split, default, len(pool) - leave, f"{available} {len(pool)}")
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed))
        return pool.select(order[:size].sort().values), pool.select(order[size:].sort().values)


def _find(source: str, *, text: bool) -> Path | None:
    """The file or folder a source means; None if only the hub can know it, which it does of images alone."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    owner, _, name = source.rpartition("/")
    missing = f"load_dataset(source={source!r}): no such file or folder"
    if not path.is_absolute():
        missing += f" (relative paths are taken from the current folder, {str(Path.cwd())!r})"
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", source):
        raise ValueError(f"{missing}.")
    # A misspelt path may look like a name of the hub, and find other data below BLAQ_DATA.
    if owner and Path(owner).is_dir():
        raise ValueError(f"{missing}; with a folder {owner!r} here, it is not taken for a name of the hub.")
    if owner and Path(name).suffix in (".txt", ".parquet"):
        raise ValueError(f"{missing}.")
    looked = "the environment's BLAQ_DATA is not set"
    if data := os.environ.get("BLAQ_DATA"):
        if not Path(data).is_dir():
            raise ValueError(
                f"BLAQ_DATA={data!r}: expected the folder that holds the data folders; correct or unset it."
            )
        if (path := Path(data) / Path(source).name).exists():
            return path
        looked = f"there is no {path}"
    if owner and text:
        raise ValueError(f"{missing}, and {looked}; the hub is asked for images only, without data.sequence.")
    if owner:
        return None
    raise ValueError(
        f"load_dataset(source={source!r}): expected 'digits', an existing file or folder, a name of the Hugging Face "
        f"hub (owner/name), or a folder below $BLAQ_DATA; {looked}."
    )


def _text_file(path: Path | None) -> Path | None:
    if path is None:
        return None
    if path.is_dir():
        return path / "input.txt" if (path / "input.txt").is_file() else None
    if path.suffix == ".parquet":
        raise ValueError(
            f"load_dataset(source={str(path)!r}): expected the folder of the Parquet files, not one of them."
        )
    return path


def _digits(wanted: _Wanted) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16)[:, None]
    everything = Split(images, torch.from_numpy(bunch.target).to(torch.int64))
    tenth = len(everything) // 10
    test, rest = wanted.take("test", everything, tenth, "examples of digits:", leave=2)
    validation, rest = wanted.take("validation", rest, tenth, "examples of digits left by test:", leave=1)
    train, _ = wanted.take("train", rest, len(rest), "examples of digits left by test and validation:")
    return _image_dataset("digits", train, validation, test, tuple(str(digit) for digit in range(10)))


def _images(source: str, path: Path | None, name: str, wanted: _Wanted, image_size: int | None) -> Dataset:
    from blaq.tasks.images import folder_parts, hub_parts, read_images  # pyarrow: not needed for digits and text

    files = read_images(hub_parts(source) if path is None else folder_parts(path), name, image_size)
    if files.validation is None:
        tenth = max(1, len(files.train) // 10)
        validation, rest = wanted.take("validation", files.train, tenth, f"training examples of {name}:", leave=1)
        train, _ = wanted.take("train", rest, len(rest), f"training examples of {name} left by validation:")
    else:
        validation, _ = wanted.take(
            "validation", files.validation, len(files.validation), f"validation examples of {name}:"
        )
        train, _ = wanted.take("train", files.train, len(files.train), f"training examples of {name}:")
    test, _ = wanted.take("test", files.test, len(files.test), f"test examples of {name}:")
    return _image_dataset(name, train, validation, test, files.class_names)


def _image_dataset(name: str, train: Split, validation: Split, test: Split, class_names: tuple[str, ...]) -> Dataset:
    mean, std = _statistics(train)
    shape = tuple(train[:1][0].shape[1:])
    return Dataset(name, train, validation, test, len(class_names), shape, mean, std, class_names)


def _statistics(split: Split) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the images in 0..1; a constant channel gets 1, to be left as it is."""
    positions = torch.arange(0, len(split), math.ceil(len(split) / _STATISTICS))
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, len(positions), 256):
        pixels = to_unit(split[positions[start : start + 256]][0]).double()
        count += pixels[:, 0].numel()
        total = total + pixels.sum((0, 2, 3))
        squares = squares + pixels.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _text(path: Path, name: str, wanted: _Wanted, sequence: int | None) -> Dataset:
    if sequence is None:
        raise ValueError(
            f"load_dataset(sequence=None): expected the characters a window of {str(path)!r} has; set data.sequence, "
            "100 in the papers."
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}).") from None
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    vocabulary, codes = np.unique(characters, return_inverse=True)
    bounds = [0, len(codes) * 8 // 10, len(codes) * 9 // 10, len(codes)]
    splits: list[Split] = []
    for k, role in enumerate(("train", "validation", "test")):
        part = torch.from_numpy(codes[bounds[k] : bounds[k + 1]].astype(np.int64))
        size = wanted.size(role, len(part), len(part), f"characters of the {role} part of {name}: {len(part)}")
        splits.append(_windows(part[:size], sequence, f"{role} part of {name}"))
    names = tuple(chr(code) for code in vocabulary)
    train, validation, test = splits
    return Dataset(name, train, validation, test, len(names), (sequence,), torch.empty(0), torch.empty(0), names)


def _windows(codes: Tensor, length: int, name: str) -> Split:
    """Windows (N, length) that do not overlap, and the same windows one character further on as targets."""
    count = (len(codes) - 1) // length
    if count < 1:
        raise ValueError(
            f"load_dataset(sequence={length}): the {name} has {len(codes)} characters, a window and its targets take "
            f"{length + 1}; lower data.sequence or take more text."
        )
    used = count * length
    return Split(codes[:used].view(count, length), codes[1 : used + 1].view(count, length))
