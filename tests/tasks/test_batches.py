"""Splits and batches against plain loops over single images."""

import math

import numpy as np
import pytest
import torch

from blaq.tasks.batches import Batches, Dataset, Split, pad_crop_flip, to_unit


def images_dataset(count: int, shape: tuple[int, ...] = (3, 5, 6), dtype: torch.dtype = torch.uint8) -> Dataset:
    """Random images whose target is their number."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    if dtype != torch.uint8:
        pixels = pixels.to(dtype) / 255
    split = Split(pixels, torch.arange(count))
    mean, std = torch.linspace(0.3, 0.6, shape[0]), torch.linspace(0.1, 0.4, shape[0])
    return Dataset("random", split, split, split, count, shape, mean, std)


def batches(dataset: Dataset, batch_size: int = 4, *, epoch: int = 0, seed: int = 0, **options: bool) -> Batches:
    result = Batches(dataset.train, dataset, batch_size, seed=seed, **{"shuffle": True, **options})
    result.set_epoch(epoch)
    return result


def numbers(one_pass: Batches) -> list[int]:
    return [number for _, targets in one_pass for number in targets.tolist()]


def test_split_is_a_view_of_its_rows():
    inputs, targets = torch.arange(12).view(6, 2), torch.tensor([0, 1, 2, 3, 4, 5])
    odd = Split(inputs, targets, torch.tensor([5, 1, 3]))
    assert odd.targets.tolist() == [5, 1, 3]
    assert odd.inputs.tolist() == [[10, 11], [2, 3], [6, 7]]
    assert odd.select(torch.tensor([2, 0])).targets.tolist() == [3, 5]
    assert odd[torch.tensor([0, 0, 1])][1].tolist() == [5, 5, 1]
    inputs[5] = 0  # nothing was copied before
    assert odd.inputs[0].tolist() == [0, 0]


def test_split_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="expected as many inputs as targets, got 3 and 2"):
        Split(torch.zeros(3, 1), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 6), (1, 8, 8), (2, 1, 9)])
def test_pad_crop_flip_equals_the_loop_over_images(shape, dtype):
    channels, height, width = shape
    count = 9 * 9 * 2  # every offset, with and without the flip
    images = images_dataset(count, shape, dtype).train.inputs
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    flips = torch.arange(count) >= 81
    result = pad_crop_flip(images, offsets, flips)

    for k in range(count):
        padded = np.zeros((channels, height + 8, width + 8), dtype=images.numpy().dtype)
        padded[:, 4:-4, 4:-4] = images[k].numpy()
        top, left = offsets[k].tolist()
        expected = padded[:, top : top + height, left : left + width]
        if flips[k]:
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(result[k].numpy(), expected)
    assert result.dtype == dtype


def test_augmentation_draws_every_offset_and_flip_and_stays_with_its_target():
    image = torch.arange(1, 82, dtype=torch.float32).view(
        1, 1, 9, 9
    )  # the pixel in the middle tells where it came from
    count = 2000
    split = Split(image.repeat(count, 1, 1, 1) + 100 * torch.arange(count).view(-1, 1, 1, 1), torch.arange(count))
    dataset = Dataset("ramps", split, split, split, count, (1, 9, 9), torch.zeros(1), torch.ones(1))
    seen = set()
    for inputs, targets in batches(dataset, 100, augment=True):
        middle = inputs[:, 0, 4, 4].long() - 100 * targets  # 1 .. 81 if the image is its target's
        rightward = inputs[:, 0, 4, 5] - inputs[:, 0, 4, 4]
        assert bool(((middle >= 1) & (middle <= 81)).all())
        seen |= {(m, r > 0) for m, r in zip(middle.tolist(), rightward.tolist(), strict=True) if abs(r) == 1}
    assert {m for m, _ in seen} == set(range(1, 82))
    assert {direction for _, direction in seen} == {True, False}


def test_batches_depend_on_seed_and_epoch_alone():
    dataset = images_dataset(37)
    first = list(batches(dataset, augment=True, epoch=3, seed=5))
    torch.manual_seed(99)
    again = batches(dataset, augment=True, epoch=0, seed=5)
    list(again)
    again.set_epoch(3)
    iterator = iter(again)
    next(iterator)  # a pass that is given up leaves no trace
    second = []
    for batch in again:
        torch.rand(3)
        second.append(batch)
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def test_other_epochs_and_seeds_have_other_orders_and_crops():
    dataset = images_dataset(40)
    orders = {tuple(numbers(batches(dataset, epoch=epoch, seed=seed))) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25  # seed + epoch would give 9
    one, two = (torch.cat([x for x, _ in batches(dataset, shuffle=False, augment=True, epoch=e)]) for e in (0, 1))
    assert not torch.equal(one, two)


def test_order_does_not_depend_on_augmentation():
    dataset = images_dataset(21)
    assert numbers(batches(dataset, augment=True)) == numbers(batches(dataset, augment=False))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 15])
def test_every_example_once_but_for_a_lone_last_one(count, batch_size, shuffle):
    one_pass = batches(images_dataset(count), batch_size, shuffle=shuffle)
    sizes = [len(targets) for _, targets in one_pass]
    seen = numbers(one_pass)
    lone = shuffle and count > 1 and batch_size > 1 and count % batch_size == 1
    assert len(seen) == len(set(seen)) == count - lone == one_pass.examples
    assert len(one_pass) == len(sizes) == math.ceil((count - lone) / batch_size)
    assert all(size == batch_size for size in sizes[:-1])
    if not shuffle:
        assert seen == list(range(count))


def test_the_example_left_out_changes():
    dataset = images_dataset(9)
    left_out = {frozenset(range(9)) - frozenset(numbers(batches(dataset, epoch=epoch))) for epoch in range(10)}
    assert len(left_out) > 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_are_normalised_per_channel_and_their_source_is_not_touched(dtype):
    dataset = images_dataset(6, dtype=dtype)
    before = dataset.train.inputs
    ((inputs, targets),) = batches(dataset, 6, shuffle=False)
    unit = before.numpy().astype(np.float64) / (255 if dtype == torch.uint8 else 1)
    mean, std = (values.numpy().astype(np.float64)[:, None, None] for values in (dataset.mean, dataset.std))
    np.testing.assert_allclose(inputs.numpy(), (unit - mean) / std, rtol=0, atol=2e-6)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert torch.equal(dataset.train.inputs, before)


def test_to_unit_copies():
    pixels = torch.tensor([0.0, 0.25])
    to_unit(pixels).add_(1)
    assert pixels.tolist() == [0.0, 0.25]


def test_text_windows_pass_unchanged():
    windows = torch.arange(20).view(4, 5)
    split = Split(windows, windows + 1)
    dataset = Dataset("text", split, split, split, 21, (5,), torch.empty(0), torch.empty(0))
    ((inputs, targets),) = batches(dataset, 4, shuffle=False)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs, windows)
    assert torch.equal(targets, windows + 1)
    with pytest.raises(
        ValueError, match=r"augment=True\): expected images \(C, H, W\), text has inputs of shape \(5,\)"
    ):
        batches(dataset, augment=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"Batches\(batch_size=0\): expected at least 1"),
        ({"batch_size": 2, "seed": -1}, r"Batches\(seed=-1\): expected at least 0"),
    ],
)
def test_ranges(options, message):
    with pytest.raises(ValueError, match=message):
        batches(images_dataset(3), **options)
