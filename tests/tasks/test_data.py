"""Loading data sets: from Parquet folders made here, text, digits; and, where there are any, from real files."""

import json
import logging
import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image

from blaq.tasks import columns, decode, images
from blaq.tasks.data import find_dataset, load_dataset

REAL = Path(os.environ.get("BLAQ_DATA") or Path(__file__).parents[3] / "shared" / "data")


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"needs the real data: BLAQ_DATA with a folder {name!r}, or ../shared/data beside the repository")
    return REAL / name


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """No test sees another's cache, or real data that it did not ask for."""
    monkeypatch.setenv("BLAQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BLAQ_DATA", raising=False)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.name not in ("contents", "locks"))


# --- Parquet folders made here


def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    file = BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def numbered(start: int, stop: int, shape: tuple[int, ...] = (4, 5)) -> list[np.ndarray]:
    """Random images whose first pixel is their number: two of them are equal only if they are the same."""
    result = []
    for number in range(start, stop):
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        pixels[0, 0] = number
        result.append(pixels)
    return result


def write(
    path: Path,
    pictures: list[np.ndarray | bytes | None],
    labels: list[int | None] | pa.Array | None = None,
    *,
    image: str = "image",
    label: str = "label",
    features: dict[str, object] | None = None,
    more: dict[str, list[object]] | None = None,
    plain: bool = False,
) -> None:
    """A Parquet file in the Hugging Face datasets layout; row k has label k % 3 unless labels are given."""
    files = [encode(picture) if isinstance(picture, np.ndarray) else picture for picture in pictures]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    if not isinstance(labels, pa.Array):
        labels = pa.array([k % 3 for k in range(len(files))] if labels is None else labels, pa.int64())
    table = pa.table(
        {
            image: pa.array([{"bytes": file, "path": None} for file in files], struct),
            label: labels,
            **(more or {}),
        }
    )
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(
        table, path, row_group_size=7, compression="none" if plain else "snappy", use_dictionary=not plain
    )


@pytest.fixture
def folder(tmp_path):
    """40 training and 20 test images."""
    write(tmp_path / "small" / "train.parquet", numbered(0, 40))
    write(tmp_path / "small" / "test.parquet", numbered(100, 120))
    return tmp_path / "small"


def which(split) -> list[int]:
    """The numbers of the images of a split."""
    return split.inputs[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("names", "image", "label"),
    [
        (["train.parquet", "test.parquet"], "image", "label"),
        (
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
            "img",
            "labels",
        ),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "picture", "digit"),
        (
            ["plain_text/train/0000.parquet", "plain_text/train/0001.parquet", "plain_text/test/0000.parquet"],
            "img",
            "y",
        ),
    ],
)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_png_round_trip_in_every_layout(tmp_path, names, image, label, shape):
    pictures = numbered(0, 12 * len(names), shape)
    labels = [k % 5 for k in range(len(pictures))]
    for k, name in enumerate(names):
        rows = slice(12 * k, 12 * k + 12)
        write(tmp_path / "data set" / name, pictures[rows], labels[rows], image=image, label=label)
    dataset = load_dataset(str(tmp_path / "data set"), validation=1)

    channels_first = [picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1) for picture in pictures]
    training = 12 * (len(names) - 1)
    found = {}
    for split in (dataset.train, dataset.validation, dataset.test):
        found.update({pixels.numpy().tobytes(): int(y) for pixels, y in zip(split.inputs, split.targets, strict=True)})
    assert found == {pixels.tobytes(): y for pixels, y in zip(channels_first, labels, strict=True)}
    np.testing.assert_array_equal(dataset.test.inputs.numpy(), np.stack(channels_first[training:]))
    assert len(dataset.train) == training - 1
    assert dataset.input_shape == channels_first[0].shape
    assert dataset.classes == 5
    assert dataset.class_names == ("0", "1", "2", "3", "4")
    assert dataset.train.inputs.dtype == torch.uint8
    assert dataset.train.targets.dtype == torch.int64
    assert dataset.name == "data set"


def test_jpeg_decodes_as_pillow_does(tmp_path):
    smooth = [np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * (k % 8 + 1) for k in range(10)]
    files = [encode(picture, "JPEG") for picture in smooth]
    write(tmp_path / "jpeg" / "train.parquet", files)
    write(tmp_path / "jpeg" / "test.parquet", files)
    expected = np.stack([np.asarray(Image.open(BytesIO(file))) for file in files])
    np.testing.assert_array_equal(load_dataset(str(tmp_path / "jpeg")).test.inputs[:, 0].numpy(), expected)


def test_more_than_one_block_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK", 5)  # row groups have 7: batches of 5, 2, 5, 2, ...
    write(tmp_path / "set" / "train.parquet", numbered(0, 33))
    write(tmp_path / "set" / "test.parquet", numbered(50, 67))
    assert which(load_dataset(str(tmp_path / "set")).test) == list(range(50, 67))


def test_grey_and_colour_together_become_colour(tmp_path):
    grey, colour = numbered(0, 6), numbered(6, 8, (4, 5, 3))
    write(tmp_path / "mixed" / "train.parquet", grey + colour)
    write(tmp_path / "mixed" / "test.parquet", grey)
    dataset = load_dataset(str(tmp_path / "mixed"))
    assert dataset.input_shape == (3, 4, 5)
    assert dataset.mean.shape == (3,)
    np.testing.assert_array_equal(dataset.test.inputs[2].numpy(), np.stack([grey[2]] * 3))


def test_other_8_bit_modes(tmp_path):
    picture = numbered(1, 2, (4, 5, 3))[0]
    write(
        tmp_path / "rgba" / "train.parquet", [encode(picture, mode="RGBA"), encode(picture), encode(picture, mode="P")]
    )
    write(tmp_path / "rgba" / "test.parquet", [encode(picture, mode="RGBA")])
    np.testing.assert_array_equal(
        load_dataset(str(tmp_path / "rgba")).test.inputs[0].numpy(), picture.transpose(2, 0, 1)
    )


def test_columns_by_metadata(tmp_path):
    features = {
        "coarse_label": {"names": ["a", "b"], "_type": "ClassLabel"},
        "fine_label": {"names": ["cat", "dog", "sea", "sky"], "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
        "picture": {"_type": "Image"},
    }
    more = {"id": list(range(9)), "coarse_label": [0] * 9, "thumb": [{"bytes": b"", "path": ""}] * 9}
    for name in ("train", "test"):
        write(
            tmp_path / "cifar100" / f"{name}.parquet",
            numbered(0, 9),
            image="picture",
            label="fine_label",
            features=features,
            more=more,
        )
    dataset = load_dataset(str(tmp_path / "cifar100"))
    assert dataset.class_names == ("cat", "dog", "sea", "sky")
    assert dataset.classes == 4
    assert dataset.test.targets.tolist() == [0, 1, 2] * 3


def test_labels_of_text(folder):
    for name, order in (
        ("train", "bca"),
        ("validation", "cab"),
        ("test", "a"),
    ):  # each file has a dictionary of its own
        texts = [order[k % len(order)] for k in range(12)]
        more = {"__index_level_0__": list(range(12))}
        write(folder / f"{name}.parquet", numbered(0, 12), pa.array(texts).dictionary_encode(), more=more)
    dataset = load_dataset(str(folder))
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.train.targets.tolist() == [1, 2, 0] * 4
    assert dataset.validation.targets.tolist() == [2, 0, 1] * 4
    assert dataset.test.targets.tolist() == [0] * 12


# --- splits


def test_splits_are_disjoint_complete_and_seeded(folder):
    def numbers(**sizes):
        dataset = load_dataset(str(folder), **sizes)
        return which(dataset.train), which(dataset.validation), which(dataset.test)

    train, validation, test = numbers(validation=10, seed=1)
    assert len(train) == 30
    assert len(validation) == 10
    assert sorted(train + validation) == list(range(40))
    assert test == list(range(100, 120))
    assert numbers(validation=10, seed=1) == (train, validation, test)
    assert numbers(validation=10, seed=2)[1] != validation

    fewer, same, some = numbers(train=12, validation=10, test=6, seed=1)
    assert len(fewer) == 12
    assert set(fewer) < set(train)
    assert same == validation  # quick runs validate on the same examples
    assert len(some) == 6
    assert set(some) < set(test)
    assert some != test[:6]


def test_a_tenth_validates_by_default(folder):
    dataset = load_dataset(str(folder))
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [36, 4, 20]


def test_a_validation_file_validates(folder):
    write(folder / "validation.parquet", numbered(200, 208))
    dataset = load_dataset(str(folder), train=39, validation=5)
    assert len(dataset.train) == 39
    assert len(dataset.validation) == 5
    assert set(which(dataset.validation)) < set(range(200, 208))
    assert which(load_dataset(str(folder)).validation) == list(range(200, 208))
    assert which(load_dataset(str(folder)).train) == list(range(40))


@pytest.mark.parametrize("test_file", ["without labels", "absent"])
def test_a_validation_file_tests_where_no_test_file_can(folder, test_file):
    write(folder / "validation.parquet", numbered(200, 208))
    (folder / "test.parquet").unlink()
    if test_file == "without labels":
        write(folder / "test.parquet", numbered(100, 120), [-1] * 20)
    dataset = load_dataset(str(folder), validation=10)
    assert which(dataset.test) == list(range(200, 208))
    assert sorted(which(dataset.train) + which(dataset.validation)) == list(range(40))


def test_an_extra_file_trains_too(folder):
    write(folder / "extra.parquet", numbered(50, 60))
    dataset = load_dataset(str(folder), validation=7)
    assert sorted(which(dataset.train) + which(dataset.validation)) == [*range(40), *range(50, 60)]


def test_mean_and_std_are_those_of_the_training_split(folder, tmp_path):
    write(tmp_path / "rgb" / "train.parquet", numbered(0, 30, (6, 5, 3)))
    write(tmp_path / "rgb" / "test.parquet", numbered(30, 40, (6, 5, 3)))
    for source, channels in ((folder, 1), (tmp_path / "rgb", 3)):
        dataset = load_dataset(str(source), validation=12)
        unit = dataset.train.inputs.numpy().astype(np.float64) / 255
        assert dataset.mean.shape == dataset.std.shape == (channels,)
        np.testing.assert_allclose(dataset.mean.numpy(), unit.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(dataset.std.numpy(), unit.std((0, 2, 3)), rtol=1e-6)


def test_a_constant_channel_is_not_divided_by_zero(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "flat" / f"{name}.parquet", [np.full((4, 4), 51, dtype=np.uint8)] * 9)
    dataset = load_dataset(str(tmp_path / "flat"))
    assert dataset.mean.tolist() == pytest.approx([0.2])
    assert dataset.std.tolist() == [1.0]


def test_statistics_of_a_large_set_come_from_evenly_spaced_images(folder, monkeypatch):
    monkeypatch.setattr("blaq.tasks.data._STATISTICS", 10)
    dataset = load_dataset(str(folder), validation=4)  # 36 images: every fourth
    unit = dataset.train.inputs[::4].numpy().astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean.numpy(), unit.mean((0, 2, 3)), rtol=1e-6)


# --- size of images


@pytest.mark.parametrize("shape", [(40, 60, 3), (70, 33, 3), (32, 32), (15, 21)])
def test_image_size_resizes_the_short_side_and_cuts_out_the_centre(tmp_path, shape):
    size, short = 28, 32
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for name in ("train", "test"):
        write(tmp_path / "sized" / f"{name}.parquet", [picture] * 3)
    result = load_dataset(str(tmp_path / "sized"), image_size=size).test.inputs[0].float()

    source = torch.from_numpy(picture if picture.ndim == 3 else picture[..., None]).permute(2, 0, 1)[None].float()
    height, width = (round(side * short / min(shape[:2])) for side in shape[:2])
    resized = F.interpolate(source, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (height - size) // 2, (width - size) // 2
    expected = resized[:, top : top + size, left : left + size]
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= 1.5  # Pillow rounds to bytes between its two passes


def test_images_of_different_sizes_need_image_size(tmp_path):
    write(tmp_path / "odd" / "train.parquet", numbered(0, 5) + numbered(5, 8, (9, 7)))
    write(tmp_path / "odd" / "test.parquet", numbered(0, 5))
    with pytest.raises(
        ValueError, match=r"row 5 of train of odd: .*\(1, 9, 7\), row 0 has \(1, 4, 5\); set data.image_si"
    ):
        load_dataset(str(tmp_path / "odd"))
    assert cache_files(tmp_path) == []
    assert load_dataset(str(tmp_path / "odd"), image_size=4).input_shape == (1, 4, 4)


def test_metadata_of_columns_renamed_since_are_passed_over(tmp_path):
    features = {"img": {"_type": "Image"}, "lbl": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    for name, count in (("train", 30), ("test", 3)):
        write(tmp_path / "small" / f"{name}.parquet", numbered(0, count), features=features)
    dataset = load_dataset(str(tmp_path / "small"))
    assert (dataset.classes, dataset.class_names) == (3, ("0", "1", "2"))


def test_folders_called_like_files_are_looked_into(folder):
    for name in ("train", "test"):
        file = (folder / f"{name}.parquet").rename(folder / "moved")
        (folder / f"{name}.parquet").mkdir()
        file.rename(folder / f"{name}.parquet" / "part-00000-0c1f.snappy.parquet")
    dataset = load_dataset(str(folder))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (36, 4, 20)


def test_a_link_that_leads_nowhere_is_not_passed_over(folder):
    """As a cache of the hub has them where a file was not fetched."""
    (folder / "train-1.parquet").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"train-1\.parquet: expected a Parquet file \(.*No such file"):
        load_dataset(str(folder))


def test_the_data_say_where_they_come_from(folder, monkeypatch):
    (folder / "input.txt").write_text("to be or not to be " * 20)
    assert load_dataset(str(folder), sequence=5).place == str(folder / "input.txt")
    (folder / "input.txt").unlink()
    monkeypatch.setenv("BLAQ_DATA", str(folder.parent))
    assert str(load_dataset("someone/small")) == (
        f"data small from {folder}: 36 examples to train on, 4 to validate, 20 to test; 3 classes"
    )
    assert load_dataset("digits").place == "scikit-learn"


def test_where_data_are_is_known_without_reading_them(folder, monkeypatch):
    monkeypatch.setenv("BLAQ_DATA", str(folder.parent))
    monkeypatch.chdir(folder)
    assert find_dataset("digits") == ("digits", "scikit-learn")
    assert find_dataset("someone/else") == ("else", "the Hugging Face hub")
    for source in ("someone/small", ".", str(folder)):
        dataset = load_dataset(source)
        assert find_dataset(source) == (dataset.name, dataset.place)
    (folder / "input.txt").write_text("to be or not to be " * 20)
    for source in ("small", "input.txt"):
        dataset = load_dataset(source, sequence=5)
        assert find_dataset(source, text=True) == (dataset.name, dataset.place)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_orientation_says(tmp_path, orientation):
    """Against `datasets`, which decides what an image of its layout is."""
    import datasets

    exif = Image.Exif()
    exif[0x0112] = orientation
    pictures = []
    for pixels in numbered(0, 30):
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG", exif=exif)
        pictures.append(file.getvalue())
    for role in ("train", "test"):
        write(tmp_path / "turned" / f"{role}.parquet", pictures)
    feature = datasets.Image()
    expected = [np.asarray(feature.decode_example({"bytes": picture, "path": None})) for picture in pictures]
    found = load_dataset(str(tmp_path / "turned")).test
    assert np.array_equal(found.inputs[:, 0].numpy(), np.stack(expected))


def test_an_image_whose_metadata_are_damaged_is_taken_as_it_is(tmp_path):
    pixels = np.full((4, 5, 3), 200, dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=b"Exif\0\0no TIFF at all")
    for role in ("train", "test"):
        write(tmp_path / "odd" / f"{role}.parquet", [file.getvalue()] * 30)
    assert bool((load_dataset(str(tmp_path / "odd")).test.inputs == 200).all())


# --- cache


def test_the_second_load_decodes_nothing(folder, monkeypatch):
    first = load_dataset(str(folder), validation=10)
    monkeypatch.setattr(decode, "_decode", None)
    second = load_dataset(str(folder), validation=10)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(second, split).inputs)


def test_what_another_process_decodes_is_waited_for(folder, tmp_path, monkeypatch):
    first = load_dataset(str(folder), validation=10)
    for path in cache_files(tmp_path):
        path.rename(path.with_suffix(".made"))  # as if it were not there yet
    held = {path.name: FileLock(path) for path in (tmp_path / "cache" / "locks").iterdir()}
    for lock in held.values():
        lock.acquire()

    def the_other_ends(text, path):
        assert text.startswith("another process is decoding into")
        path.with_suffix(".made").rename(path)
        held.pop(f"{path.name}.lock").release()

    monkeypatch.setattr(decode._log, "warning", the_other_ends)
    monkeypatch.setattr(decode, "_decode", None)
    second = load_dataset(str(folder), validation=10)
    assert not held  # all have been waited for
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(second, split).inputs)


def test_images_are_decoded_where_a_file_system_has_no_locks(folder, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert len(load_dataset(str(folder), validation=10).train) > 0


def test_the_cache_is_for_the_content_not_for_the_place(folder, tmp_path, monkeypatch):
    before = which(load_dataset(str(folder)).test)
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "small")
    monkeypatch.setattr(decode, "_decode", None)
    assert which(load_dataset(str(moved)).test) == before


def test_what_another_version_decoded_is_not_taken(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_FORMAT", 1)  # before images were turned
        load_dataset(str(folder))
    load_dataset(str(folder))
    assert len(cache_files(tmp_path)) == 4


def test_other_content_or_image_size_is_decoded_anew(folder, tmp_path):
    load_dataset(str(folder))
    assert len(cache_files(tmp_path)) == 2
    write(folder / "test.parquet", numbered(120, 140))
    assert which(load_dataset(str(folder)).test) == list(range(120, 140))
    assert len(cache_files(tmp_path)) == 3
    assert load_dataset(str(folder), image_size=3).input_shape == (1, 3, 3)
    assert load_dataset(str(folder)).input_shape == (1, 4, 5)


def test_other_content_of_the_same_length_is_decoded_anew(folder):
    def overwrite(start: int) -> int:
        write(folder / "test.parquet", [encode(picture, "BMP") for picture in numbered(start, start + 20)], plain=True)
        return (folder / "test.parquet").stat().st_size

    lengths = set()
    for start in (100, 150):
        lengths.add(overwrite(start))
        assert which(load_dataset(str(folder)).test) == list(range(start, start + 20))
    assert len(lengths) == 1


def test_one_byte_in_the_middle_of_a_large_file_is_other_content(folder, monkeypatch):
    """The time of change stays, as copies keep it; the file's place in its file system does not."""
    path, images = folder / "test.parquet", [encode(picture, "BMP") for picture in numbered(0, 20, (80, 128))]
    for name in ("train", "test"):
        write(folder / f"{name}.parquet", images, plain=True)
    assert which(load_dataset(str(folder)).test) == list(range(20))
    content, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    first_pixel = len(images[10]) - 128  # a BMP begins with its last row
    content[content.index(images[10]) + first_pixel] = 255
    path.rename(folder.parent / "before")
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    assert which(load_dataset(str(folder)).test) == [*range(10), 255, *range(11, 20)]


def test_a_file_is_read_whole_once_only(folder, monkeypatch):
    before = which(load_dataset(str(folder)).test)
    monkeypatch.setattr(decode.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert which(load_dataset(str(folder)).test) == before


def test_one_file_is_cached_in_grey_and_in_colour(folder, tmp_path):
    load_dataset(str(folder))
    other = tmp_path / "colour" / "small"
    write(other / "train.parquet", numbered(0, 5, (4, 5, 3)))
    (other / "test.parquet").write_bytes((folder / "test.parquet").read_bytes())
    assert load_dataset(str(other)).test.inputs.shape == (20, 3, 4, 5)


def other_array(path: Path) -> None:
    np.save(path, np.zeros((3, 1, 4, 5), dtype=np.uint8))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an array" * 100),
        other_array,
    ],
    ids=["truncated", "half a header", "empty", "garbage", "other rows"],
)
def test_a_damaged_cache_is_built_again(folder, tmp_path, damage, caplog):
    first = [split.inputs for split in (load_dataset(str(folder)).train, load_dataset(str(folder)).test)]
    whole = [path.read_bytes() for path in cache_files(tmp_path)]
    for path in cache_files(tmp_path):
        damage(path)
    with caplog.at_level(logging.WARNING):
        second = load_dataset(str(folder))
    assert torch.equal(first[0], second.train.inputs)
    assert torch.equal(first[1], second.test.inputs)
    assert [path.read_bytes() for path in cache_files(tmp_path)] == whole
    assert caplog.text.count("is damaged") == 2


def test_what_is_done_to_the_images_does_not_reach_the_cache(folder):
    dataset = load_dataset(str(folder))
    dataset.test.inputs.zero_()
    dataset.test[:10][0].zero_()
    assert which(dataset.test) == which(load_dataset(str(folder)).test) == list(range(100, 120))


def test_a_failed_decoding_leaves_nothing_behind(folder, tmp_path):
    write(folder / "test.parquet", [*numbered(0, 30), b"no image"])
    with pytest.raises(ValueError, match="row 30 of test of small: cannot decode the image"):
        load_dataset(str(folder))
    assert [path.name.split("-")[0] for path in cache_files(tmp_path)] == ["train"]


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLAQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"BLAQ_CACHE='.*file': cannot write .*; set BLAQ_CACHE to a folder with room"):
        load_dataset(str(folder))


def test_the_cache_is_below_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("BLAQ_CACHE")
    assert decode.cache_folder() == Path.home() / ".cache" / "blaq"


# --- names


def test_hub_names_and_bare_names_are_looked_up_below_blaq_data(folder, monkeypatch):
    monkeypatch.setenv("BLAQ_DATA", str(folder.parent))
    assert load_dataset("some-owner/small").name == "small"
    assert load_dataset("small").name == "small"


def test_a_misspelt_path_is_not_taken_for_a_name(folder, tmp_path, monkeypatch):
    """A hub name of that form would find $BLAQ_DATA/small, or ask the hub."""
    monkeypatch.setenv("BLAQ_DATA", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    missing = r"no such file or folder \(relative paths are taken from the current folder, '.*'\)"
    with pytest.raises(
        ValueError, match=rf"{missing}; with a folder 'mine' here, it is not taken for a name of the hub"
    ):
        load_dataset("mine/small")
    with pytest.raises(ValueError, match=rf"{missing}\."):
        load_dataset("texts/small.txt")
    with pytest.raises(ValueError, match=rf"{missing}, and there is no .*book; the hub is asked for images only"):
        load_dataset("texts/book", sequence=10)
    with pytest.raises(ValueError, match=r"'.*/small' holds images"):  # says where it was found
        load_dataset("owner/small", sequence=10)


def test_a_path_comes_before_blaq_data(folder, tmp_path, monkeypatch):
    write(tmp_path / "here" / "small" / "train.parquet", numbered(0, 10))
    write(tmp_path / "here" / "small" / "test.parquet", numbered(10, 20))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("BLAQ_DATA", str(folder.parent))
    assert len(load_dataset("small").test) == 10


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The hub, as `datasets` delivers it: a folder takes the place of the download."""
    import datasets

    asked = []
    deliver = datasets.load_dataset

    def load(name, config, **options):
        asked.append((name, config))
        return deliver(str(folder), cache_dir=str(tmp_path / "hub"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("BLAQ_DATA", str(tmp_path / "small"))  # exists, and has no such folder
    return asked


def test_a_hub_name_gives_what_the_folder_gives(hub, folder):
    for name in ("owner/small", "ufldl-stanford/svhn"):
        dataset = load_dataset(name, validation=10, seed=3)
        local = load_dataset(str(folder), validation=10, seed=3)
        for split in ("train", "validation", "test"):
            assert torch.equal(getattr(dataset, split).inputs, getattr(local, split).inputs)
            assert torch.equal(getattr(dataset, split).targets, getattr(local, split).targets)
        assert dataset.name == name.split("/")[1]
    assert hub == [("owner/small", None), ("ufldl-stanford/svhn", "cropped_digits")]


def test_an_extra_split_of_the_hub_trains_too(hub, folder):
    for name in ("train", "test"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / f"{name}.parquet").rename(folder / "data" / f"{name}-00000-of-00001.parquet")
    write(folder / "data" / "extra-00000-of-00001.parquet", numbered(50, 60))
    dataset = load_dataset("ufldl-stanford/svhn", validation=7)
    assert sorted(which(dataset.train) + which(dataset.validation)) == [*range(40), *range(50, 60)]


def test_a_hub_that_does_not_answer(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/small' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = (
        r"load_dataset\(source='owner/small'\): expected an existing path, or .* Couldn't reach 'owner/small' on the "
        r"Hub\. Without the hub: .* folder called 'small' and set BLAQ_DATA"
    )
    with pytest.raises(ValueError, match=message):
        load_dataset("owner/small")


def test_a_hub_name_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="expected the `datasets` package for names of the hub; pip install 'blaq"):
        load_dataset("owner/small")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"load_dataset\(source='./nowhere'\): no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("war_and_peas", r"expected 'digits', an existing file .* \(owner/name\), .*BLAQ_DATA is not set"),
    ],
)
def test_sources_that_do_not_exist(source, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(source)


def test_blaq_data_that_is_of_no_use(tmp_path, monkeypatch):
    monkeypatch.setenv("BLAQ_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"a folder below .BLAQ_DATA; there is no .*war_and_peas"):
        load_dataset("war_and_peas")
    monkeypatch.setenv("BLAQ_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"BLAQ_DATA='.*gone': expected the folder that holds the data folders"):
        load_dataset("ylecun/mnist")


# --- errors of image folders


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": 0},
            r"load_dataset\(train=0\): expected 1 <= train <= 36: training .* left by validation: 36; change",
        ),
        ({"train": 31, "validation": 10}, r"train=31\): expected 1 <= train <= 30: .* of small left by validation: 30"),
        ({"validation": 40}, r"validation=40\): expected 1 <= validation <= 39: training examples of small: 40"),
        ({"validation": 0}, r"validation=0\): expected 1 <= validation <= 39"),
        (
            {"test": 21},
            r"load_dataset\(test=21\): expected 1 <= test <= 20: test examples of small: 20; change data.test",
        ),
        ({"seed": -1}, r"load_dataset\(seed=-1\): expected at least 0"),
        ({"image_size": 0}, r"load_dataset\(image_size=0\): expected at least 1"),
        ({"sequence": 0}, r"load_dataset\(sequence=0\): expected at least 1"),
        ({"sequence": 10}, r"load_dataset\(sequence=10\): '.*small' holds images; leave out data.sequence"),
    ],
)
def test_options_that_do_not_fit_the_images(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(str(folder), **options)


def in_colour(folder: Path) -> None:
    write(folder / "test.parquet", [*numbered(0, 3), *numbered(3, 4, (4, 5, 3))])


def of_16_bits(folder: Path) -> None:
    write(folder / "test.parquet", [encode(np.full((4, 5), 1000, dtype=np.uint16))])


def of_another_set(folder: Path) -> None:
    write(folder / "other" / "test.parquet", numbered(0, 3), image="img")


def with_two_label_columns(folder: Path) -> None:
    for name in ("train", "test"):
        write(folder / f"{name}.parquet", numbered(0, 3), label="a", more={"b": [0, 1, 2]})


def with_a_label_too_many(folder: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    write(folder / "train.parquet", numbered(0, 2), features=features)
    write(folder / "test.parquet", numbered(0, 3), features=features)


def with_classes_in_another_order(folder: Path) -> None:
    """In the second shard of the training file, whose columns are all that a reader of the first one sees."""
    (folder / "train.parquet").unlink()
    for shard, names in enumerate((["cat", "dog", "sea"], ["cat", "sea", "dog"])):
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        write(folder / f"train-{shard:05}-of-00002.parquet", numbered(0, 6), features=features)


def without_images(folder: Path) -> None:
    for name in ("train", "test"):
        pa.parquet.write_table(pa.table({"text": ["a"], "label": [0]}), folder / f"{name}.parquet")


def damaged_later(folder: Path) -> None:
    data = bytearray((folder / "train.parquet").read_bytes())
    data[200:2000] = bytes(1800)
    (folder / "train.parquet").write_bytes(data)


def with_metadata(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "train.parquet"
        pa.parquet.write_table(pa.parquet.read_table(path).replace_schema_metadata({"huggingface": text}), path)

    return spoil


def with_a_name_twice(folder: Path) -> None:
    for path in (folder / "train.parquet", folder / "test.parquet"):
        table = pa.parquet.read_table(path)
        pa.parquet.write_table(table.append_column("label", table["label"]), path)


def with_texts_for_images(folder: Path) -> None:
    for path in (folder / "train.parquet", folder / "test.parquet"):
        pa.parquet.write_table(pa.table({"image": [{"bytes": "iVBORw0K"}] * 2, "label": [0, 1]}), path)


def with_paths_for_images(folder: Path) -> None:
    for path in (folder / "train.parquet", folder / "test.parquet"):
        table = pa.table({"image": ["a.png", "b.png"], "label": [0, 1]})
        features = {"info": {"features": {"image": {"_type": "Image"}}}}
        pa.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            with_metadata("{"),
            r"train of small: expected the schema's \"huggingface\" metadata as .*, found b'\{'; write",
        ),
        (
            with_metadata("[]"),
            r"train of small: expected the schema's \"huggingface\" metadata .*, found b'\[\]'; write",
        ),
        (
            with_a_name_twice,
            r"test.parquet: expected every column to have a name of its own, found image.*; rename one",
        ),
        (
            with_texts_for_images,
            r"train of small: expected one image column \{bytes, path\}, found image: struct<bytes: s",
        ),
        (
            with_paths_for_images,
            r"train of small: expected one image column \{bytes, path\}, found image: string, label",
        ),
        (
            lambda f: write(f / "train.parquet", numbered(0, 2), [0, 10**12]),
            r"small: expected labels .* fewer than 1048576, column 'label' has 1000000000000; number them anew",
        ),
        (lambda f: (f / "test.parquet").unlink(), r"small: expected train and test files, found 'train'"),
        (
            lambda f: (f / "train.parquet").rename(f / "all.parquet"),
            "all.parquet: expected a name that starts with 'train'",
        ),
        (
            lambda f: (f / "train.parquet").rename(f / "train-00001-of-00003.parquet"),
            "expected 3 shards .* found 1; fetch",
        ),
        (
            lambda f: (f / "test.parquet").write_bytes(b"x" * 500),
            r"test.parquet: expected a Parquet file \(.*; fetch it",
        ),
        (
            lambda f: write(f / "test.parquet", [None]),
            "row 0 of test of small: no image; expected the image files inside",
        ),
        (lambda f: write(f / "test.parquet", []), "test of small: expected at least one row and a label in every row"),
        (lambda f: write(f / "test.parquet", numbered(0, 2), [0, None]), "'label' has 2 rows, 1 without"),
        (with_a_label_too_many, "test of small: expected labels from 0 to 1, column 'label' has 0 to 2"),
        (lambda f: write(f / "test.parquet", numbered(0, 2), [0, -1]), "expected labels from 0 to 2, .* has -1 to 0"),
        (
            lambda f: write(f / "test.parquet", numbered(0, 2, (6, 6))),
            r"\(1, 6, 6\), the training images have \(1, 4, 5\); set",
        ),
        (in_colour, "row 3 of test of small is in colour, but the training images are grey"),
        (of_16_bits, "row 0 of test of small: expected an 8-bit image, got Pillow mode 'I;16'"),
        (of_another_set, "expected the columns of .*, found image: .*; is this more than one data set"),
        (
            with_two_label_columns,
            "expected one label column of integers or one called 'label', .*found image: .*, b: int64",
        ),
        (
            with_classes_in_another_order,
            "train-00001-of-00002.parquet: expected the class names of .*/train-00000-of-00002.parquet, but class 1 of "
            "column 'label' is 'sea' here and 'dog' there; write both",
        ),
        (without_images, r"expected one image column \{bytes, path\}, found text: string, label: int64"),
        (damaged_later, r"train of small: cannot read column '\w+' \(.*; fetch the files again"),
    ],
)
def test_folders_that_cannot_be_used(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_dataset(str(folder))


def test_a_folder_without_data_and_a_file_for_a_folder(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty'\): expected Parquet files in the Hugging Face .* text named input.txt"
    ):
        load_dataset(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="expected the folder of the Parquet files, not one of them"):
        load_dataset(str(folder / "train.parquet"))


# --- digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = load_dataset("digits", seed=4)
    found = {}
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.inputs.dtype == torch.float32
        found.update({(x * 16).numpy().tobytes(): int(y) for x, y in zip(split.inputs, split.targets, strict=True)})
    expected = {x.astype(np.float32).tobytes(): int(y) for x, y in zip(bunch.images, bunch.target, strict=True)}
    assert found == expected
    assert len(found) == 1797
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [1439, 179, 179]
    assert (dataset.classes, dataset.input_shape) == (10, (1, 8, 8))


def test_digits_are_split_by_seed():
    sizes = {"train": 100, "validation": 50, "test": 400}
    one, same, other = (load_dataset("digits", **sizes, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.test.inputs, same.test.inputs)
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert not torch.equal(one.test.inputs, other.test.inputs)
    assert [len(s) for s in (one.train, one.validation, one.test)] == [100, 50, 400]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": 1796}, r"test=1796\): expected 1 <= test <= 1795: examples of digits: 1797"),
        ({"test": 797, "validation": 1000}, "expected 1 <= validation <= 999: examples of digits left by test: 1000"),
        ({"train": 1440}, "expected 1 <= train <= 1439: examples of digits left by test and validation: 1439"),
        ({"image_size": 16}, r"load_dataset\(image_size=16\): only images from files can be resized, not 'digits'"),
        ({"sequence": 16}, r"load_dataset\(sequence=16\): 'digits' holds images"),
    ],
)
def test_options_that_do_not_fit_the_digits(options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", **options)


# --- text

TEXT = "".join("abcdé zœ\n€"[k * k % 10] + chr(97 + k % 26) for k in range(250))  # 500 characters


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "input.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "book"


def test_text_windows_and_their_targets(book):
    dataset = load_dataset(str(book), sequence=16)
    vocabulary = sorted(set(TEXT))
    parts = {"train": TEXT[:400], "validation": TEXT[400:450], "test": TEXT[450:]}
    for name, part in parts.items():
        split = getattr(dataset, name)
        inputs = ["".join(vocabulary[code] for code in window) for window in split.inputs.tolist()]
        targets = ["".join(vocabulary[code] for code in window) for window in split.targets.tolist()]
        starts = range(0, len(part) - 16, 16)  # the last window needs one character beyond
        assert inputs == [part[k : k + 16] for k in starts]
        assert targets == [part[k + 1 : k + 17] for k in starts]
        assert split.inputs.dtype == split.targets.dtype == torch.int64
    assert dataset.class_names == tuple(vocabulary)
    assert dataset.classes == len(vocabulary)
    assert (dataset.name, dataset.input_shape) == ("book", (16,))


def test_a_text_can_be_a_file_and_shortened(book, tmp_path):
    (book / "input.txt").rename(tmp_path / "short story.txt")
    dataset = load_dataset(str(tmp_path / "short story.txt"), train=81, validation=33, test=17, sequence=16)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [5, 2, 1]
    whole = load_dataset(str(tmp_path / "short story.txt"), sequence=16)
    assert torch.equal(dataset.train.inputs, whole.train.inputs[:5])
    assert dataset.classes == whole.classes
    assert dataset.name == "short story"


def test_text_is_read_byte_by_byte(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n" * 20)
    assert "\r" in load_dataset(str(tmp_path / "dos.txt"), sequence=4).class_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"load_dataset\(sequence=None\): expected the characters a window .*; set data.sequence"),
        ({"sequence": 50}, r"sequence=50\): the validation part of book has 50 characters, .* take 51; lower"),
        ({"sequence": 5, "train": 401}, "expected 1 <= train <= 400: characters of the train part of book: 400"),
        ({"sequence": 5, "image_size": 8}, "image_size=8.*: only images from files can be resized"),
    ],
)
def test_options_that_do_not_fit_the_text(book, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(str(book), **options)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"latin.txt: expected UTF-8 text"):
        load_dataset(str(tmp_path / "latin.txt"), sequence=5)


# --- real files


def test_the_mnist_test_file():
    part = images.folder_parts(real("mnist"))["test"]
    pixels = decode.decode_images(part, "image", None)
    assert pixels.shape == (10000, 1, 28, 28)
    assert float(pixels.double().mean()) / 255 == pytest.approx(0.13251, abs=1e-5)  # known of the original files
    labels, names = columns.read_labels({"train": part}, columns.find_columns(part))
    assert labels["train"].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert names == tuple("0123456789")


def test_some_of_the_cifar_test_file(tmp_path):
    source = pa.parquet.ParquetFile(real("cifar10") / "test.parquet")
    rows = next(source.iter_batches(batch_size=200))
    for name in ("train", "test"):
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        pa.parquet.write_table(pa.Table.from_batches([rows]), tmp_path / "cifar10" / f"{name}.parquet")
    dataset = load_dataset(str(tmp_path / "cifar10"))
    files = rows.column("img").to_pylist()
    expected = np.stack([np.asarray(Image.open(BytesIO(file["bytes"]))) for file in files]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.test.inputs.numpy(), expected)
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")
    assert dataset.classes == 10


def test_war_and_peace(monkeypatch):
    monkeypatch.setenv("BLAQ_DATA", str(real("war_and_peace").parent))
    dataset = load_dataset("war_and_peace", sequence=100)
    assert dataset.classes == 84
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [26065, 3258, 3258]
    opening = "".join(dataset.class_names[code] for code in dataset.train.inputs[:30].flatten().tolist())
    assert "Well, Prince" in opening
