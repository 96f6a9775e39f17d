"""Broken and hostile files: one ValueError that names the file and the reason, whatever the bytes."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import blaq
from blaq.export.packed import load_packed, read_packed, save_packed

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz_packed.py"


def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_packed", FUZZ)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = harness()


@pytest.fixture
def original(tmp_path: Path) -> bytes:
    """A file with two layers: "0.weight" is ternary per channel (4, 6), "2.weight" linear3 in groups of two (3, 4)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    opt = blaq.LAQ(blaq.param_groups(model, "ternary", "channel", rules={"2": {"bits": 3, "granularity": 2}}))
    save_packed(model, opt, tmp_path / "original")
    return (tmp_path / "original").read_bytes()


def refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=f"^packed file '.*file': {message}"):
        read_packed(tmp_path / "file")


Change = Callable[[dict[str, Any], dict[str, Any], bytearray], None]


def at(header: dict[str, Any], name: str) -> int:
    return int(header[name]["data_offsets"][0])


def set_data(name: str, value: bytes, offset: int = 0) -> Change:
    def change(description: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
        start = at(header, name) + offset
        data[start : start + len(value)] = value

    return change


def set_entry(key: str, value: object, name: str = "0.weight") -> Change:
    return lambda description, header, data: description["weights"][name].update({key: value})


def set_description(**values: object) -> Change:
    return lambda description, header, data: description.update(values)


def set_header(name: str, **values: object) -> Change:
    return lambda description, header, data: header[name].update(values)


def drop(name: str) -> Change:
    """Take a tensor out, and its bytes."""

    def change(description: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
        begin, end = header.pop(name)["data_offsets"]
        del data[begin:end]
        for key, entry in header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]

    return change


def rename(old: str, new: str) -> Change:
    return lambda description, header, data: header.update({new: header.pop(old)})


def bool_of_two(description: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
    header["0.weight_packed"]["dtype"] = "BOOL"


def larger_shape(description: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
    """A consistent shape of 2^40 weights, and too few codes."""
    description["weights"]["0.weight"] |= {"shape": [4, 2**38]}
    set_data("0.weight_shape", (2**38).to_bytes(8, "little"), 8)(description, header, data)


def empty_but_huge(description: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
    description["weights"]["0.weight"] |= {"shape": [0, 2**61]}


SEALED: dict[str, tuple[Change, str]] = {
    "version": (
        set_description(format_version=2),
        "has format 'packed', version 2; this blaq reads 'packed', version 1",
    ),
    "version of another type": (set_description(format_version=True), "has format 'packed', version True"),
    "format": (set_description(format="onnx"), "has format 'onnx'"),
    "extra key": (set_description(more=1), "the description has an unknown key 'more'"),
    "lost key": (lambda d, h, b: d.pop("ties"), "the description lacks key 'ties'"),
    "weights of another type": (set_description(weights=[1]), r"the description has weights=\[1\], expected an object"),
    "recipe of another type": (set_description(recipe=3), "the description has recipe=3, expected an object"),
    "no entry": (lambda d, h, b: d["weights"].update({"0.weight": 3}), "weight '0.weight' is 3, expected an object"),
    "extra key of a weight": (set_entry("more", 1), "weight '0.weight' has an unknown key 'more'"),
    "lost key of a weight": (
        lambda d, h, b: d["weights"]["0.weight"].pop("grid"),
        "weight '0.weight' lacks key 'grid'",
    ),
    "grid": (set_entry("grid", "ternary3"), "weight '0.weight' has grid 'ternary3', expected one of binary, "),
    "grid of another type": (set_entry("grid", ["ternary"]), r"weight '0.weight' has grid \['ternary'\]"),
    "another grid": (set_entry("grid", "linear3"), "weight '0.weight' is in 'trits', expected 'bits3' for linear3"),
    "container": (set_entry("container", "bits2"), "weight '0.weight' is in 'bits2', expected 'trits' for ternary"),
    "granularity": (set_entry("granularity", "row"), "weight '0.weight' has granularity 'row'"),
    "granularity of another type": (set_entry("granularity", [2]), r"weight '0.weight' has granularity \[2\]"),
    "granularity True": (set_entry("granularity", True), "weight '0.weight' has granularity True"),
    "group that does not divide": (
        set_entry("granularity", 4),
        "weight '0.weight'.*expected a divisor of the 6 inputs",
    ),
    "another group": (
        set_entry("granularity", 3),
        r"weight '0.weight' has scales .*\(4, 1\), expected float32 \(8, 1\)",
    ),
    "dtype": (set_entry("dtype", "I64"), "weight '0.weight' has dtype 'I64', expected a floating dtype"),
    "dtype of another type": (set_entry("dtype", {}), "weight '0.weight' has dtype {}"),
    "shape of another type": (
        set_entry("shape", "46"),
        "weight '0.weight' has shape '46', expected a list of integers",
    ),
    "negative shape": (set_entry("shape", [-4, -6]), r"weight '0.weight' has shape \[-4, -6\], expected a list of int"),
    "shape of booleans": (set_entry("shape", [True, 6]), r"weight '0.weight' has shape \[True, 6\]"),
    "another shape": (set_entry("shape", [6, 4]), "weight '0.weight': its tensors of shape and its description differ"),
    "too many dimensions": (set_entry("shape", [1] * 65), "weight '0.weight' has shape .*more than a tensor can have"),
    "a shape beyond memory": (set_entry("shape", [2**40, 2**40]), "weight '0.weight' has shape .*more than a tensor"),
    "empty and too large": (empty_but_huge, r"weight '0.weight' has shape \[0, 2305.*more than a tensor can have"),
    "terabytes": (larger_shape, "weight '0.weight' has codes .*expected uint8"),
    "levels": (
        lambda d, h, b: d["levels"]["ternary"].append(2.0),
        "weight '0.weight': the file's levels of ternary are",
    ),
    "levels of another type": (set_description(levels={"ternary": 3, "linear3": 1}), ".*levels of ternary are 3, not"),
    "levels of no grid": (lambda d, h, b: d["levels"].update(log3=[]), "levels has an unknown key 'log3'"),
    "tie to nothing": (
        set_description(ties={"a": "b"}),
        "ties has 'a': 'b', expected a new name for a tensor of the file",
    ),
    "tie of a tensor": (set_description(ties={"0.bias": "1.bias"}), "ties has '0.bias': '1.bias', expected a new name"),
    "tie of another type": (set_description(ties={"a": ["1.bias"]}), r"ties has 'a': \['1.bias'\]"),
    "chain of ties": (set_description(ties={"a": "1.bias", "b": "a"}), "ties has 'b': 'a'"),
    "lost codes": (drop("0.weight_packed"), "tensor '0.weight_packed' is missing"),
    "lost scales": (drop("0.weight_scale"), "tensor '0.weight_scale' is missing"),
    "lost shape": (drop("2.weight_shape"), "tensor '2.weight_shape' is missing"),
    "twice": (rename("0.bias", "0.weight"), "'0.weight' is there twice, packed and as a tensor"),
    "trits": (set_data("0.weight_packed", b"\xf3"), "weight .0.weight.: .*found byte 243, five trits are at most 242"),
    "a code too high": (set_data("2.weight_packed", b"\xff"), "weight '2.weight' has code 7, but linear3 has 7 levels"),
    "trits after the last": (
        set_data("0.weight_packed", b"\xf2", 4),
        "weight .0.weight.: .*bits after the last of 24 codes",
    ),
    "bits after the last": (
        set_data("2.weight_packed", b"\x80", 4),
        "weight .2.weight.: .*bits after the last of 12 codes",
    ),
    "NaN scale": (
        set_data("0.weight_scale", b"\x00\x00\xc0\x7f"),
        "weight '0.weight' has scales that are negative, NaN",
    ),
    "infinite scale": (set_data("0.weight_scale", b"\x00\x00\x80\x7f"), "weight '0.weight' has scales that are neg"),
    "negative scale": (set_data("0.weight_scale", b"\x00\x00\x80\xbf"), "weight '0.weight' has scales that are neg"),
    "too large a scale": (set_data("2.weight_scale", b"\xff\xff\x7f\x7f"), "weight '2.weight' has scales .*too large"),
    "scales of another dtype": (set_header("0.weight_scale", dtype="I32"), "weight '0.weight' has scales torch.int32"),
    "codes of another dtype": (set_header("0.weight_packed", dtype="I8"), "weight '0.weight' has codes torch.int8"),
    "shape of another dtype": (set_header("0.weight_shape", dtype="F64"), "weight '0.weight': its tensors of shape"),
    "unknown dtype": (set_header("0.bias", dtype="F4"), "tensor '0.bias' has dtype 'F4', expected one of F64, F32"),
    "dtype of the header of another type": (set_header("0.bias", dtype=[]), r"tensor '0.bias' has dtype \[\]"),
    "header entry of another type": (lambda d, h, b: h.update({"0.bias": 3}), "tensor '0.bias' has dtype None"),
    "shape of the header": (set_header("0.bias", shape=[2**63]), "tensor '0.bias' has shape .*more than a tensor can"),
    "bytes and shape": (set_header("0.bias", shape=[2]), "the tensors cannot be read: "),
    "overlap": (set_header("0.bias", data_offsets=[0, 16]), "the tensors cannot be read: "),
    "beyond the end": (set_header("0.bias", data_offsets=[2**40, 2**40 + 16]), "the tensors cannot be read: "),
    "bytes of nobody": (lambda d, h, b: b.extend(b"abc"), "the tensors cannot be read: "),
    "booleans": (bool_of_two, "tensor '0.weight_packed' holds booleans that are neither 0 nor 1"),
    "a description of another type": (lambda d, h, b: h["__metadata__"].update(blaq=None), ".*it has no description"),
    "no metadata": (lambda d, h, b: h.pop("__metadata__"), "is a safetensors file that save_packed did not write"),
    "no checksum": (lambda d, h, b: d.pop("sha256"), "the description has sha256=None, expected 64 hexadecimal digits"),
}


@pytest.mark.parametrize("case", SEALED)
def test_what_save_packed_does_not_write_is_refused(case: str, original: bytes, tmp_path: Path) -> None:
    change, message = SEALED[case]
    header, tensors = fuzz.split(original)
    data = bytearray(tensors)
    change(header["__metadata__"]["blaq"], header, data)
    refused(tmp_path, fuzz.join(header, bytes(data)), message)


def test_a_sealed_copy_is_read(original: bytes, tmp_path: Path) -> None:
    """So what is refused above is refused for its change, not for how it was sealed."""
    (tmp_path / "file").write_bytes(fuzz.join(*fuzz.split(original)))
    assert [weight.name for weight in read_packed(tmp_path / "file").weights] == ["0.weight", "2.weight"]


@pytest.mark.parametrize("key", ["sha256", "grid", "0.bias", "format_version"])
def test_a_key_that_comes_twice_is_refused(key: str, original: bytes, tmp_path: Path) -> None:
    header, tensors = fuzz.split(original)
    data = fuzz.join(header, tensors, twice=key)
    refused(tmp_path, data, f"the (header|description) is no JSON as it should be: has the key '{key}' twice")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "the header is no JSON"),
        (b"[]", "the header is list, expected a JSON object"),
        (b"3", "the header is int, expected a JSON object"),
        (b'{"a": NaN}', "the header is no JSON as it should be: has the number NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the header is no JSON as it should be: .*digits"),
        (b"[" * 100_000, "the header is nested too deeply"),
        (b'{"a":' * 100_000, "the header is nested too deeply"),
        (b"\xff\xfe", "is no safetensors file: its header is no text"),
        (b"{}", "is a safetensors file that save_packed did not write"),
        (b'{"__metadata__": {"blaq": "{}"}}', "the description has sha256=None"),
        (b'{"__metadata__": {"blaq": "[]"}}', "the description is list, expected a JSON object"),
        (
            b'{"__metadata__": {"blaq": "{\\"sha256\\": \\"' + b"0" * 64 + b'\\"}"}}',
            "is damaged: its checksum is not written",
        ),
    ],
)
def test_other_headers_are_refused(header: bytes, message: str, tmp_path: Path) -> None:
    refused(tmp_path, len(header).to_bytes(8, "little") + header, message)


@pytest.mark.parametrize("announced", [9, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(announced: int, tmp_path: Path) -> None:
    data = announced.to_bytes(8, "little") + b"{}      "
    refused(tmp_path, data, f"is cut short, or no safetensors file: 16 bytes, a header of {announced} bytes announced")


def test_every_cut_is_refused(original: bytes, tmp_path: Path) -> None:
    for length in [*range(0, 20), *range(20, len(original), 97), len(original) - 1]:
        refused(tmp_path, original[:length], "")


def test_every_flipped_bit_is_seen(original: bytes, tmp_path: Path) -> None:
    for position in range(0, len(original), 3):
        data = bytearray(original)
        data[position] ^= 1 << position % 8
        refused(tmp_path, bytes(data), "")


def test_damage_in_the_tensors_is_told_by_the_checksum(original: bytes, tmp_path: Path) -> None:
    refused(tmp_path, original[:-1] + bytes([original[-1] ^ 1]), "is damaged: its checksum is not that of its contents")


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    refused(tmp_path, save({"a": torch.zeros(3)}), "is a safetensors file that save_packed did not write")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle")
    refused(tmp_path, (tmp_path / "pickle").read_bytes(), "is cut short, or no safetensors file")


def test_a_pickle_inside_is_not_run(original: bytes, tmp_path: Path) -> None:
    """The format has no place for code; a name that is a program stays a name."""
    header, tensors = fuzz.split(original)
    header["__metadata__"]["blaq"]["recipe"] = {"model": {"name": "__import__('os').abort()", "options": {}}}
    (tmp_path / "file").write_bytes(fuzz.join(header, tensors))
    with pytest.raises(ValueError, match='cannot build "__import__'):
        load_packed(tmp_path / "file")


def test_some_hundreds_of_mutated_files(tmp_path: Path) -> None:
    """The small form of what docs/results/packing.md records."""
    report = fuzz.fuzz(first=10**9, count=500, folder=tmp_path)
    assert report["failures"] == []
    assert {kind for kind, found in report["kinds"].items() if found.get("refused", 0) > 20} == set(report["kinds"])
    assert len(report["reasons"]) > 20  # the mutations reach many checks
