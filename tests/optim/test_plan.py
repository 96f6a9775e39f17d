"""plan: sizes against numbers worked out by hand, and against what the projection really returns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blaq.grids import GRIDS, Grid
from blaq.optim.groups import param_groups
from blaq.optim.plan import plan, size
from blaq.projection import project


def lenet() -> nn.Module:
    model = nn.Module()
    model.conv = nn.Conv2d(1, 20, 5)
    model.norm = nn.BatchNorm2d(20)
    model.fc = nn.Linear(101, 10)
    return model


def test_numbers_by_hand() -> None:
    groups = param_groups(lenet(), 1, rules={"fc": {"bits": "ternary2", "granularity": "channel"}})
    result = plan(groups)
    conv, fc, *kept = result.rows
    # 20*1*5*5 = 500 weights of 1 bit: 62.5, so 63 bytes, and one scale of 4.
    assert (conv.name, conv.shape, conv.scheme, conv.granularity) == ("conv.weight", (20, 1, 5, 5), "binary", "tensor")
    assert (conv.rows, conv.scales, conv.bytes_packed, conv.bytes_float32) == (1, 1, 67, 2000)
    assert conv.bits_per_weight == 8 * 67 / 500
    # 1010 weights of 2 bits: 252.5, so 253 bytes, and 10 rows of two scales.
    assert (fc.scheme, fc.granularity) == ("ternary2", "channel")
    assert (fc.rows, fc.scales, fc.bytes_packed, fc.bytes_float32) == (10, 20, 253 + 80, 4040)
    assert [(r.name, r.scheme, r.scales, r.bytes_packed, r.note) for r in kept] == [
        ("conv.bias", "float", 0, 80, "bias"),
        ("norm.weight", "float", 0, 80, "normalisation"),
        ("norm.bias", "float", 0, 80, "normalisation"),
        ("fc.bias", "float", 0, 40, "bias"),
    ]
    assert (result.quantized_weights, result.float_weights) == (1510, 70)
    assert (result.bytes_packed, result.bytes_float32) == (67 + 333 + 280, 6320)
    assert result.ratio == pytest.approx(6320 / 680)
    assert result.bits_per_weight == pytest.approx(8 * 680 / 1580)


def test_table() -> None:
    groups = param_groups(lenet(), 1, rules={"fc": {"bits": "ternary2", "granularity": "channel"}})
    assert str(plan(groups)).splitlines() == [
        "name         shape           scheme                rows   bits   size  note",
        "conv.weight  20 x 1 x 5 x 5  binary per tensor        1   1.07   67 B",
        "fc.weight    10 x 101        ternary2 per channel    10   2.64  333 B",
        "conv.bias    20              float                    -  32.00   80 B  bias",
        "norm.weight  20              float                    -  32.00   80 B  normalisation",
        "norm.bias    20              float                    -  32.00   80 B  normalisation",
        "fc.bias      10              float                    -  32.00   40 B  bias",
        "total: 1,510 quantized, 70 float; 680 B packed, 6.3 kB in float32 (9.3x); 3.44 bits a weight",
    ]


@given(
    grid=st.sampled_from(GRIDS),
    granularity=st.sampled_from(["tensor", "channel", 6, 12]),
    shape=st.sampled_from([(5, 12), (3, 4, 3), (7, 2, 3, 2), (12,), (2, 12)]),
)
def test_sizes_are_those_of_the_projection(grid: str, granularity: str | int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    group = {"params": [weight], "param_names": ["w"], "grid": grid, "granularity": granularity}
    (row,) = plan([group]).rows
    q = project(weight, None, grid, granularity)
    assert (row.rows, row.scales) == (q.scale.shape[0], q.scale.numel())
    room, spare = divmod(row.bytes_packed * 8 - 32 * q.scale.numel(), weight.numel())
    assert 2**room > int(q.codes.max())
    assert 2 ** (room - 1) < len(Grid.parse(grid).levels)
    assert spare < 8


def test_float_parameters_keep_their_own_dtype() -> None:
    (row,) = plan([{"params": [torch.zeros(3, 4, dtype=torch.bfloat16)]}]).rows
    assert (row.bytes_packed, row.bytes_float32, row.bits_per_weight) == (24, 48, 16)


def test_optimizer_groups_with_and_without_names() -> None:
    model = lenet()
    groups = param_groups(model, 4)
    expected = plan(groups)
    assert plan(torch.optim.Adam(groups).param_groups) == expected
    plain = plan(torch.optim.Adam([{"params": [model.fc.bias]}, {"params": model.conv.parameters()}]).param_groups)
    assert [row.name for row in plain.rows] == ["group 0 [0]", "group 1 [0]", "group 1 [1]"]
    assert {row.scheme for row in plain.rows} == {"float"}
    named = torch.optim.Adam(model.fc.named_parameters())
    assert [row.name for row in plan(named.param_groups).rows] == ["weight", "bias"]


def test_plan_is_frozen_and_in_the_order_of_the_groups() -> None:
    groups = param_groups(lenet(), 1, rules={"conv": None})
    result = plan(groups)
    assert [row.name for row in result.rows] == [name for group in groups for name in group["param_names"]]
    with pytest.raises(AttributeError):
        result.rows = ()  # type: ignore[misc]


def test_empty_and_scalar_parameters() -> None:
    result = plan([{"params": [torch.zeros(0, 3), torch.zeros(())], "grid": "binary"}])
    assert [(row.bytes_packed, row.weights) for row in result.rows] == [(4, 0), (5, 1)]
    assert "scalar" in str(result)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"^plan: group 0 is no param group with a list 'params'; pass what param_groups"
    ):
        plan([{"params": (p for p in [torch.zeros(2)])}])
    with pytest.raises(ValueError, match=r"^plan: group 0 is no param group"):
        plan(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]
    for what, name in ((nn.Linear(2, 2), "Linear"), (torch.optim.SGD([torch.zeros(1)]), "SGD"), (None, "NoneType")):
        with pytest.raises(
            ValueError, match=rf"^plan\({name}\): expected param groups; pass what param_groups returns"
        ):
            plan(what)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^plan: 'w'\(granularity=5\): expected a divisor of the 3 inputs"):
        plan([{"params": [torch.zeros(2, 3)], "param_names": ["w"], "grid": 2, "granularity": 5}])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (44_600_000, "44.6 MB"), (2_500_000_000, "2.5 GB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text
