"""Image data sets: Parquet files in the Hugging Face datasets layout, from a folder or from the hub.

Folders are read by pyarrow and not by `datasets`, which would copy them into a cache of its own first, leave out a file
called extra.parquet and not miss a missing shard. The hub's names and downloads are the business of `datasets`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import torch

from blaq.tasks.batches import Split
from blaq.tasks.columns import fields, find_columns, read_labels
from blaq.tasks.decode import Part, decode_images
from blaq.tasks.hints import listed

__all__ = ["ImageFiles", "folder_parts", "hub_parts", "read_images"]

_ROLES = {
    "train": "train",
    "extra": "extra",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_ROLE = re.compile(rf"({'|'.join(_ROLES)})(?![a-z])")
_MOST_CLASSES = 1 << 20  # what are more are numbers of something else, such as persons
_SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
_HUB_CONFIGS = {"ufldl-stanford/svhn": "cropped_digits"}  # where the hub has several data sets under one name


@dataclass(frozen=True)
class ImageFiles:
    """The images and labels of each file; `validation` is None where there is no such file."""

    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]


def read_images(parts: dict[str, Part], name: str, image_size: int | None) -> ImageFiles:
    """Decode a data set's parts, train (and extra, which SVHN's papers add to it), validation and test.

    The test images are those of "test"; where they carry no labels (ImageNet) or do not exist, those of "validation".

    Raises:
        ValueError: a part is missing, a label is out of range, or see `find_columns`, `read_labels`, `decode_images`.
    """
    if "train" not in parts or not {"test", "validation"} & set(parts):
        raise ValueError(f"{name}: expected train and test files, found {listed(parts)}.")
    parts = {role: parts[role] for role in ("train", "validation", "test") if role in parts}
    columns = find_columns(parts["train"])
    labels, class_names = read_labels(parts, columns)
    if "validation" in parts and ("test" not in parts or bool((labels["test"] < 0).all())):
        parts["test"], labels["test"] = parts.pop("validation"), labels.pop("validation")
    highest = max(int(values.max()) for values in labels.values())
    if highest >= _MOST_CLASSES:
        raise ValueError(
            f"{name}: expected labels that number the classes from 0, fewer than {_MOST_CLASSES}, column {columns.label!r} "
            f"has {highest}; number them anew, or write them as text."
        )
    class_names = class_names or tuple(str(k) for k in range(highest + 1))
    for role, part in parts.items():
        low, high = int(labels[role].min()), int(labels[role].max())
        if low < 0 or high >= len(class_names):
            raise ValueError(
                f"{part.name}: expected labels from 0 to {len(class_names) - 1}, column {columns.label!r} has {low} "
                f"to {high}."
            )
    splits: dict[str, Split] = {}
    shape: torch.Size | None = None
    for role, part in parts.items():  # train comes first and decides on colour and shape
        images = decode_images(part, columns.image, image_size, grey=None if shape is None else shape[0] == 1)
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise ValueError(
                f"{part.name}: images of shape {tuple(images.shape[1:])}, the training images have {tuple(shape)}; set "
                "data.image_size to resize all images to one size."
            )
        splits[role] = Split(images, labels[role])
    return ImageFiles(splits["train"], splits.get("validation"), splits["test"], class_names)


def folder_parts(folder: Path) -> dict[str, Part]:
    """The Parquet files below a folder by split: train.parquet, data/train-00000-of-00002.parquet, train/0000.parquet.

    Raises:
        ValueError: there are none, a file belongs to no split, a shard is missing, or files disagree on their columns.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*.parquet") if not path.is_dir()):  # Spark has folders called so
        steps = path.relative_to(folder).with_suffix("").parts
        roles = [_ROLES[match[1]] for step in reversed(steps) if (match := _ROLE.match(step))]
        if not roles:
            raise ValueError(f"{path}: expected a name that starts with {listed(_ROLES)}.")
        files.setdefault(roles[0], []).append(path)
    if not files:
        raise ValueError(
            f"load_dataset(source={str(folder)!r}): expected Parquet files in the Hugging Face datasets layout "
            "(train.parquet and test.parquet, or data/train-00000-of-00001.parquet, ...) or a text named input.txt."
        )
    for paths in files.values():
        _check_shards(paths)
    if {"train", "extra"} <= set(files):
        files["train"] += files.pop("extra")
    _check_columns([path for paths in files.values() for path in paths])
    parts = {}
    for role, paths in files.items():
        table = pyarrow.dataset.dataset([str(path) for path in paths], format="parquet")
        parts[role] = Part(f"{role} of {folder.resolve().name}", table, tuple(paths))
    return parts


def hub_parts(name: str) -> dict[str, Part]:
    """The splits of a data set of the Hugging Face hub, downloaded by `datasets` to its own cache at the first call.

    Later calls ask the hub for a newer version and, after half a minute without an answer, take the cache; with
    HF_HUB_OFFLINE=1 in the environment they take it at once.

    Raises:
        ValueError: `datasets` is not installed, or cannot deliver this name: no network, no such name, no permission, a
            damaged file.
    """
    folder = name.rpartition("/")[2]
    way_out = (
        f"Without the hub: put its Parquet files into a folder called {folder!r} and set BLAQ_DATA to the folder "
        "above, or give the folder itself as data.source."
    )
    try:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        raise ValueError(
            f"load_dataset(source={name!r}): expected the `datasets` package for names of the hub; "
            f"pip install 'blaq[train]'. {way_out}"
        ) from None
    try:
        splits = datasets.load_dataset(name, _HUB_CONFIGS.get(name), keep_in_memory=False)
    except Exception as error:  # the hub, the network and the builders each raise their own kinds
        cause: BaseException = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError):  # hides what it was: a full disk, a bad file
            cause = error.__cause__ or error
            download = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
            way_out = f"If a file was damaged on its way, delete {str(download)!r} to fetch it again. {way_out}"
        raise ValueError(
            f"load_dataset(source={name!r}): expected an existing path, or a name that the Hugging Face hub delivers, "
            f"but: {' '.join(str(cause).split()).rstrip('.')}. {way_out}"
        ) from error
    if {"train", "extra"} <= set(splits):
        splits["train"] = datasets.concatenate_datasets([splits["train"], splits.pop("extra")])
    parts = {}
    for role, split in splits.items():
        files = tuple(Path(file["filename"]) for file in split.cache_files)
        parts[role] = Part(f"{role} of {folder}", pyarrow.dataset.dataset(split.data.table), files)
    return parts


def _check_shards(paths: list[Path]) -> None:
    """Refuse train-00000-of-00002.parquet without its sister: training on half the data would go unnoticed."""
    counts = {int(match[1]) for path in paths if (match := _SHARD.search(path.stem))}
    shards = [path for path in paths if _SHARD.search(path.stem)]
    if counts and sum(counts) != len(shards):
        raise ValueError(
            f"{shards[0]}: expected {sum(counts)} shards as the name says, found {len(shards)}; fetch the missing ones."
        )


def _check_columns(paths: list[Path]) -> None:
    schemas = {}
    for path in paths:
        try:
            schemas[path] = pyarrow.parquet.read_schema(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path}: expected a Parquet file ({error}); fetch it again.") from error
        if len(set(schemas[path].names)) < len(schemas[path].names):
            raise ValueError(
                f"{path}: expected every column to have a name of its own, found {fields(schemas[path])}; rename one."
            )
        if not schemas[path].equals(schemas[paths[0]]):
            raise ValueError(
                f"{path}: expected the columns of {paths[0]}, {fields(schemas[paths[0]])}, found "
                f"{fields(schemas[path])}; is this more than one data set? Then set data.source to the folder of one."
            )
