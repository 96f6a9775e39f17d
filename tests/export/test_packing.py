"""Packing: against plain integers, whose bits are the stream."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blaq.export import packing
from blaq.export.packing import CONTAINERS, container_of, pack, packed_size, unpack
from blaq.grids import GRIDS, Grid


def limit(container: str) -> int:
    return 3 if container == "trits" else 2 ** int(container[-1])


def plain_pack(codes: list[int], container: str) -> bytes:
    """One large integer: its bits are the stream. Trits: five digits of base 3 at a time."""
    if container == "trits":
        groups = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return bytes(sum(digit * 3**i for i, digit in enumerate(group)) for group in groups)
    m = int(container[-1])
    return sum(code << (i * m) for i, code in enumerate(codes)).to_bytes(-(-len(codes) * m // 8), "little")


@st.composite
def some_codes(draw: st.DrawFn) -> tuple[str, list[int]]:
    container = draw(st.sampled_from(CONTAINERS))
    return container, draw(st.lists(st.integers(0, limit(container) - 1), max_size=70))


@given(some_codes())
def test_packing_is_that_of_plain_integers(case: tuple[str, list[int]]) -> None:
    container, codes = case
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, container)
    assert bytes(packed.tolist()) == plain_pack(codes, container)
    assert len(packed) == packed_size(len(codes), container)
    assert unpack(packed, container, len(codes)).tolist() == codes


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("count", [0, 79, 80, 81, 333])
def test_in_chunks_it_is_the_same(container: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_CHUNK", 80)
    codes = torch.randint(limit(container), (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    before = codes.clone()
    packed = pack(codes, container)
    assert torch.equal(codes, before)
    assert bytes(packed.tolist()) == plain_pack(codes.tolist(), container)
    before = packed.clone()
    assert torch.equal(unpack(packed, container, count), codes)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("container", CONTAINERS)
def test_millions_of_codes_come_back(container: str) -> None:
    codes = torch.randint(limit(container), (2_000_003,), dtype=torch.uint8)
    packed = pack(codes, container)
    assert torch.equal(unpack(packed, container, len(codes)), codes)
    assert bytes(packed[:250].tolist()) == plain_pack(codes[:2000].tolist(), container)[:250]
    assert len(codes) > packing._CHUNK
    assert all(packing._CHUNK % packing._group(name)[0] == 0 for name in CONTAINERS)


@pytest.mark.parametrize("container", CONTAINERS)
def test_codes_are_packed_in_the_order_of_their_memory(container: str) -> None:
    codes = torch.randint(limit(container), (7, 10, 3), dtype=torch.uint8)
    assert torch.equal(pack(codes, container), pack(codes.flatten(), container))
    turned = codes.transpose(0, 2)
    assert torch.equal(pack(turned, container), pack(turned.contiguous(), container))
    assert torch.equal(pack(codes.flatten()[3:], container), pack(codes.flatten()[3:].clone(), container))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("inner", [1, 3, 13])
def test_an_unaligned_slice_is_unpacked(container: str, inner: int) -> None:
    codes = torch.randint(limit(container), (99,), dtype=torch.uint8)
    packed = torch.cat([torch.zeros(inner, dtype=torch.uint8), pack(codes, container)])[inner:]
    assert torch.equal(unpack(packed, container, 99), codes)


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_has_a_container_that_holds_its_codes_in_its_bits(name: str) -> None:
    grid = Grid.parse(name)
    container, levels = container_of(grid), len(grid.levels)
    assert levels <= limit(container)
    assert torch.equal(
        unpack(pack(torch.arange(levels).byte(), container), container, levels), torch.arange(levels).byte()
    )
    expected = 1.6 if name in ("ternary", "ternary2") else grid.bits
    assert packed_size(4000, container) * 8 / 4000 == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.zeros(3), "bits1"), r"pack\(codes=torch.float32\): expected uint8"),
        (lambda: pack(torch.tensor([0, 2]).byte(), "bits1"), "found 2, expected codes below 2 for 'bits1'"),
        (lambda: pack(torch.tensor([0, 3]).byte(), "trits"), "found 3, expected codes below 3 for 'trits'"),
        (lambda: pack(torch.tensor([0]).byte(), "bits9"), "'bits9'.*expected one of bits1, .*, trits"),
        (lambda: unpack(torch.tensor([0]).byte(), "int4", 1), "'int4'.*expected one of bits1, .*, trits"),
        (lambda: unpack(torch.zeros(2).byte(), "bits2", 4), r"expected uint8 \(1,\), 4 codes in 'bits2'"),
        (lambda: unpack(torch.zeros(1, 1).byte(), "bits2", 4), r"uint8 \(1, 1\).*expected uint8 \(1,\)"),
        (lambda: unpack(torch.zeros(1), "bits2", 4), r"float32 \(1,\).*expected uint8"),
        (lambda: unpack(torch.tensor([243]).byte(), "trits", 5), "found byte 243, five trits are at most 242"),
        (lambda: unpack(torch.tensor([0b1000]).byte(), "bits1", 3), "found bits after the last of 3 codes"),
        (lambda: unpack(torch.tensor([27]).byte(), "trits", 3), "found bits after the last of 3 codes"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_big_endian_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(ValueError, match="little-endian machines only"):
        pack(torch.zeros(9, dtype=torch.uint8), "bits1")
