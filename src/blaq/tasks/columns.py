"""The columns of an image data set: which hold the images and the labels, and what the classes are called."""

import json
import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from blaq.tasks.decode import Part
from blaq.tasks.hints import listed

__all__ = ["Columns", "fields", "find_columns", "read_labels"]

_LABELS = ("label", "labels", "fine_label")  # in this order, where a file has several columns that could be the label
_ROW_NUMBERS = re.compile(r"__index_level_\d+__")  # the columns that pandas makes of a table's index


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image: the column of the images, a struct {bytes, path}.
        label: the column of the labels, integers or text.
        by_type: whether the label was taken because no other column has integers: neither its name nor the metadata
            say that it is one.
    """

    image: str
    label: str
    by_type: bool


def find_columns(part: Part) -> Columns:
    """The image and the label column: by the schema's "huggingface" metadata or, lacking that, by name and type.

    Raises:
        ValueError: there is not one of each, the label column holds neither integers nor text, or the metadata are not
            in the datasets layout.
    """
    schema: pa.Schema = part.table.schema
    kinds = {name: feature.get("_type") for name, feature in _features(schema, part.name).items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    if not images:
        images = [field.name for field in schema if pa.types.is_struct(field.type) and "bytes" in _members(field.type)]
    if len(images) != 1 or not _holds_files(schema.field(images[0]).type):
        raise ValueError(f"{part.name}: expected one image column {{bytes, path}}, found {fields(schema)}.")

    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    candidates = classes or [name for name in integers if not _ROW_NUMBERS.fullmatch(name)]
    known = [name for name in _LABELS if name in candidates]
    if not known and not classes:  # a column of such a name is the label, whatever it holds, and no other one is
        known = [name for name in _LABELS if name in schema.names]
    if not known and len(candidates) != 1:
        raise ValueError(
            f"{part.name}: expected one label column of integers or one called {listed(_LABELS)}, found "
            f"{fields(schema)}."
        )
    label = (known or candidates)[0]
    kind = schema.field(label).type
    if not pa.types.is_integer(kind) and not _is_text(kind):
        raise ValueError(
            f"{part.name}: expected integers or text in the label column {label!r}, found {kind}; convert it, or give "
            "it another name if it is not the label."
        )
    return Columns(images[0], label, by_type=not known and not classes)


def read_labels(parts: dict[str, Part], columns: Columns) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The class of every row of each part, and the names of the classes; None where the files do not say them.

    Raises:
        ValueError: a row has no label; the files disagree on the names; a text is not among those of "train"; or a
            column taken by its type numbers the rows.
    """
    values = {role: _values(part, columns.label) for role, part in parts.items()}
    if _is_text(values["train"].type):
        return _encoded(parts, {role: column.to_pylist() for role, column in values.items()}, columns.label)
    labels = {role: torch.from_numpy(column.to_numpy().astype(np.int64)) for role, column in values.items()}
    if columns.by_type and 1 < len(values["train"]) == len(values["train"].unique()):
        raise ValueError(
            f"{parts['train'].name}: expected labels in {columns.label!r}, the only column of integers, but it has "
            f"another number in every row; call the label column {_LABELS[0]!r}."
        )
    return labels, _class_names(parts, columns.label)


def fields(schema: pa.Schema) -> str:
    """The columns with their types, for an error message."""
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _features(schema: pa.Schema, place: str) -> dict[str, dict[str, Any]]:
    """What the "huggingface" metadata say of each column that there is: columns renamed since keep their old entry."""
    written = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(written).get("info", {}).get("features", {}).items()
    except (ValueError, AttributeError):
        raise ValueError(
            f'{place}: expected the schema\'s "huggingface" metadata as the datasets library writes them, found '
            f"{written[:60]!r}; write the files without them."
        ) from None
    return {name: feature for name, feature in features if name in schema.names and isinstance(feature, dict)}


def _members(struct: pa.StructType) -> list[str]:
    return [struct.field(k).name for k in range(struct.num_fields)]


def _holds_files(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or "bytes" not in _members(kind):
        return False
    held = kind.field("bytes").type
    return "binary" in str(held) or bool(pa.types.is_null(held))  # binary, large_binary, binary_view


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _values(part: Part, column: str) -> pa.ChunkedArray:
    batches = list(part.read(column))
    missing = sum(batch.null_count for batch in batches)
    if missing or not batches:
        raise ValueError(
            f"{part.name}: expected at least one row and a label in every row, column {column!r} has "
            f"{sum(map(len, batches))} rows, {missing} without."
        )
    return pa.chunked_array(batches)


def _encoded(
    parts: dict[str, Part], texts: dict[str, list[str]], column: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Texts as classes, which are called as the training examples are, in sorted order; no part may have others."""
    names = sorted(set(texts["train"]))
    codes = {name: code for code, name in enumerate(names)}
    for role, part in parts.items():
        if others := sorted(set(texts[role]) - codes.keys()):
            raise ValueError(
                f"{part.name}: expected the classes of {parts['train'].name}, but column {column!r} has {others[0]!r}."
            )
    return {role: torch.tensor([codes[text] for text in column]) for role, column in texts.items()}, tuple(names)


def _class_names(parts: dict[str, Part], column: str) -> tuple[str, ...] | None:
    """The names by the files' metadata, the same in all that have any: else one number would mean two classes."""
    files = [
        (getattr(fragment, "path", part.name), fragment.physical_schema)
        for part in parts.values()
        for fragment in part.table.get_fragments()  # one for each file
    ]
    found = [(place, _features(schema, place).get(column, {}).get("names")) for place, schema in files]
    named = [(place, names) for place, names in found if names]
    if not named:
        return None
    first, known = named[0]
    for place, names in named[1:]:
        for k, (here, there) in enumerate(zip_longest(names, known)):
            if here != there:
                raise ValueError(
                    f"{place}: expected the class names of {first}, but class {k} of column {column!r} is {here!r} "
                    f"here and {there!r} there; write both files with the same names in the same order."
                )
    return tuple(known)
