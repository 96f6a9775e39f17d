"""Which column is the label, and what its classes are; tables in memory, whose images nobody decodes."""

import json

import pyarrow as pa
import pyarrow.dataset
import pytest

from blaq.tasks.columns import find_columns, read_labels
from blaq.tasks.decode import Part

TEXTS = ["dog", "cat", "dog", "sea"]


def part(role: str, columns: dict[str, object], names: dict[str, list[str]] | None = None) -> Part:
    """Four rows of images and the columns; `names`: what the metadata call the classes of a column."""
    pictures = pa.array([{"bytes": b"", "path": None}] * 4, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": pictures, **columns})
    if names is not None:
        features = {column: {"_type": "ClassLabel", "names": values} for column, values in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return Part(f"{role} of zoo", pyarrow.dataset.dataset(table), ())


def read(**parts: Part) -> tuple[dict[str, list[int]], tuple[str, ...] | None]:
    labels, names = read_labels(parts, find_columns(parts["train"]))
    return {role: values.tolist() for role, values in labels.items()}, names


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"y": [0, 1, 0, 1]}, "y"),
        ({"y": [0, 1, 0, 1], "__index_level_0__": [3, 1, 0, 2]}, "y"),  # row numbers of pandas
        ({"y": [0, 1, 0, 1], "__index_level_0__": [0] * 4, "__index_level_1__": [3, 1, 0, 2]}, "y"),
        ({"label": TEXTS, "id": [0, 1, 2, 3]}, "label"),
        ({"label": TEXTS, "__index_level_0__": [3, 1, 0, 2]}, "label"),
        ({"label": TEXTS, "labels": [0, 1, 0, 1]}, "labels"),
        ({"id": [0, 1, 2, 3], "fine_label": [0, 1, 0, 1], "labels": [1, 1, 0, 0]}, "labels"),
        ({"text": TEXTS, "y": [0, 1, 0, 1]}, "y"),
    ],
)
def test_the_label_column_by_name_and_type(columns, label):
    found = find_columns(part("train", columns))
    assert (found.image, found.label) == ("image", label)


def test_the_label_column_by_the_metadata():
    columns = {"label": TEXTS, "kind": [0, 1, 0, 1], "id": [0, 1, 2, 3]}
    assert find_columns(part("train", columns, {"kind": ["a", "b"]})).label == "kind"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_texts_are_classes_in_sorted_order_the_same_in_all_parts(kind):
    train, test = (
        part(role, {"label": pa.array(texts, kind)}) for role, texts in (("train", TEXTS), ("test", ["sea"] * 4))
    )
    assert read(train=train, test=test) == ({"train": [1, 0, 1, 2], "test": [2] * 4}, ("cat", "dog", "sea"))


def test_a_text_that_only_the_test_part_has():
    train, test = part("train", {"label": TEXTS}), part("test", {"label": ["cat", "emu", "dog", "yak"]})
    with pytest.raises(
        ValueError, match=r"test of zoo: expected the classes of train of zoo, but column 'label' has 'emu'\."
    ):
        read(train=train, test=test)


def test_class_names_are_those_of_any_part_that_has_them():
    codes = {"label": [0, 1, 0, 1]}
    assert read(train=part("train", codes), test=part("test", codes))[1] is None
    for named in ("train", "test"):
        parts = {
            role: part(role, codes, {"label": ["cat", "dog"]} if role == named else None) for role in ("train", "test")
        }
        assert read(**parts)[1] == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "sea", "dog"], "class 1 of column 'label' is 'sea' here and 'dog' there"),
        (["cat", "dog"], "class 2 of column 'label' is None here and 'sea' there"),
        (["cat", "dog", "sea", "emu"], "class 3 of column 'label' is 'emu' here and None there"),
    ],
)
def test_parts_that_name_their_classes_differently(names, message):
    codes = {"label": [0, 1, 0, 1], "other": [0, 1, 0, 1]}
    train = part("train", codes, {"label": ["cat", "dog", "sea"], "other": ["a", "b"]})
    test = part("test", codes, {"label": names, "other": ["b", "a"]})
    with pytest.raises(
        ValueError, match=f"test of zoo: expected the class names of train of zoo, but {message}; write both files with"
    ):
        read(train=train, test=test)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0.0, 1.0] * 2, "id": [0, 1, 2, 3]},
            "in the label column 'label', found double; convert it, or give",
        ),
        ({"label": [[0], [1]] * 2, "id": [0, 1, 2, 3]}, "in the label column 'label', found list<"),
        ({"__index_level_0__": [0, 1, 2, 3]}, "expected one label column of integers or one called 'label', 'labels'"),
        ({"name": TEXTS}, "expected one label column of integers or one called .* found image: .*, name: string"),
        (
            {"name": TEXTS, "id": [5, 6, 7, 8]},
            "'id', the only column of integers, but it has another number in every row",
        ),
    ],
)
def test_tables_without_a_label_column(columns, message):
    with pytest.raises(ValueError, match=rf"train of zoo: .*{message}"):
        read(train=part("train", columns))
