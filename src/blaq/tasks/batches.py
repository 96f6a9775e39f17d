"""Data sets in memory and the mini-batches drawn from them, without a Python loop over examples."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Batches", "Dataset", "Split", "pad_crop_flip", "to_unit"]

PADDING = 4  # pixels, as in the CIFAR experiments of He et al., CVPR 2016, section 4.2
_DIGESTED = 1000  # examples of a split that its digest is of: a data set may be larger than memory


class Split:
    """The examples of one split: chosen rows of inputs and targets, copied only when they are asked for.

    The arrays behind it may be memory-mapped files, and several splits may share them.

    Args:
        inputs: images (N, C, H, W), uint8 in 0..255 or float32 in 0..1; or text windows (N, T), int64.
        targets: classes (N,) int64; for text the next characters (N, T) int64.
        rows: which of the N rows belong to the split, int64; None takes all of them.

    >>> split = Split(torch.arange(8).reshape(4, 2), torch.tensor([0, 1, 1, 0]), rows=torch.tensor([2, 3]))
    >>> len(split), split.inputs.tolist(), split[:1]
    (2, [[4, 5], [6, 7]], (tensor([[4, 5]]), tensor([1])))
    """

    def __init__(self, inputs: Tensor, targets: Tensor, rows: Tensor | None = None) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"Split: expected as many inputs as targets, got {len(inputs)} and {len(targets)}.")
        self._inputs = inputs
        self._targets = targets
        self.rows = torch.arange(len(targets)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """A copy of the inputs and targets at these positions of the split."""
        rows = self.rows[index]
        return self._inputs[rows], self._targets[rows]

    def __repr__(self) -> str:
        shape, kind = tuple(self._inputs.shape[1:]), str(self._inputs.dtype).removeprefix("torch.")
        return f"Split({len(self)} x {shape} {kind})"

    def select(self, rows: Tensor) -> "Split":
        """The split that consists of these positions of this one; nothing is copied."""
        return Split(self._inputs, self._targets, self.rows[rows])

    @property
    def inputs(self) -> Tensor:
        """A copy of all inputs of the split; for a data set larger than memory index the split instead."""
        return self._inputs[self.rows]

    @property
    def targets(self) -> Tensor:
        """A copy of all targets of the split."""
        return self._targets[self.rows]


@dataclass(frozen=True)
class Dataset:
    """A task's data: three splits, and what a network and a batch have to know about them.

    Attributes:
        name: short name, "mnist".
        train, validation, test: the splits; no example is in two of them.
        classes: number of classes; for text the size of the vocabulary.
        input_shape: shape of one input: (C, H, W), or (T,) for text.
        mean, std: float32 (C,), of the training images scaled to 0..1; empty for text, which is not normalised.
        class_names: name of each class; for text the vocabulary, one character each.
        place: where the data were found, a path in most cases.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    class_names: tuple[str, ...] = ()
    place: str = ""

    def __str__(self) -> str:
        """One line that says which data these are.

        >>> split = Split(torch.zeros(1200, 1), torch.zeros(1200))
        >>> print(Dataset("mnist", split, split, split, 10, (1,), torch.zeros(1), torch.ones(1), place="data/mnist"))
        data mnist from data/mnist: 1,200 examples to train on, 1,200 to validate, 1,200 to test; 10 classes
        """
        found = f" from {self.place}" if self.place else ""
        return (
            f"data {self.name}{found}: {len(self.train):,} examples to train on, {len(self.validation):,} to validate, "
            f"{len(self.test):,} to test; {self.classes} classes"
        )

    def description(self) -> dict[str, int | str]:
        """What tells other data: the sizes of the splits, the number of classes, and a digest of their names and of up to
        1000 evenly spaced examples of every split.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        digest = hashlib.blake2b("\0".join(self.class_names).encode(), digest_size=16)
        for split in splits.values():
            for tensor in split[:: -(-len(split) // _DIGESTED) or 1]:
                digest.update(tensor.contiguous().numpy().tobytes())
        sizes = {name: len(split) for name, split in splits.items()}
        return {**sizes, "classes": self.classes, "digest": digest.hexdigest()}


class Batches:
    """The mini-batches of a split, iterable again and again: what a DataLoader would be, vectorised.

    Yields ``(inputs, targets)``: images as float32 ``(x / 255 - mean) / std`` per channel of the training split (float
    images: without the 255), text windows as they are. Order and augmentation depend on ``(seed, epoch)`` alone, never
    on torch's global generator, so a resumed run sees the batches that the uninterrupted one would have seen.

    The incomplete last batch is kept, with one exception: where batches are shuffled (for training), a last batch of a
    single example is left out, because BatchNorm cannot train on it; which example that is changes from epoch to epoch.

    Args:
        split: where the examples come from.
        dataset: the data set it belongs to: its mean and std.
        batch_size: examples a batch, at least 1.
        shuffle: draw a new order every epoch; False keeps the split's own.
        augment: `pad_crop_flip` with new random offsets and flips every epoch; images only.
        seed: at least 0.

    Raises:
        ValueError: `batch_size` or `seed` out of range; `augment` for data that are not images.

    >>> split = Split(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
    >>> dataset = Dataset("white", split, split, split, 5, (1, 2, 2), torch.tensor([0.5]), torch.tensor([0.25]))
    >>> batches = Batches(split, dataset, 2, shuffle=False, seed=0)
    >>> len(batches), [targets.tolist() for inputs, targets in batches], next(iter(batches))[0].unique()
    (3, [[0, 1], [2, 3], [4]], tensor([2.]))
    """

    def __init__(
        self, split: Split, dataset: Dataset, batch_size: int, *, shuffle: bool, augment: bool = False, seed: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches(batch_size={batch_size}): expected at least 1 example a batch.")
        if seed < 0:
            raise ValueError(f"Batches(seed={seed}): expected at least 0.")
        if augment and len(dataset.input_shape) != 3:
            raise ValueError(
                f"Batches(augment=True): expected images (C, H, W), {dataset.name} has inputs of shape "
                f"{dataset.input_shape}; set data.augment = false."
            )
        self.split = split
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order and augmentation the next pass has."""
        self.epoch = epoch

    @property
    def examples(self) -> int:
        """Examples in one pass."""
        lone = self.shuffle and self.batch_size > 1 and len(self.split) > 1 and len(self.split) % self.batch_size == 1
        return len(self.split) - lone

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Everything random in the epoch is drawn here, so that a batch does not depend on the batches taken before it.
        generator = _generator(self.seed, self.epoch)
        total = len(self.split)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        offsets = torch.randint(2 * PADDING + 1, (total, 2), generator=generator) if self.augment else None
        flips = torch.rand(total, generator=generator) < 0.5 if self.augment else None
        for start in range(0, self.examples, self.batch_size):
            chosen = slice(start, min(start + self.batch_size, self.examples))
            inputs, targets = self.split[order[chosen]]
            if offsets is not None and flips is not None:
                inputs = pad_crop_flip(inputs, offsets[chosen], flips[chosen])
            yield self._normalise(inputs), targets

    def _normalise(self, inputs: Tensor) -> Tensor:
        if len(self.dataset.input_shape) != 3:
            return inputs
        mean, std = (values.view(-1, 1, 1) for values in (self.dataset.mean, self.dataset.std))
        return to_unit(inputs).sub_(mean).div_(std)


def to_unit(images: Tensor) -> Tensor:
    """A float32 copy of images in 0..1: uint8 values are divided by 255, float values taken as they are.

    >>> to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    unit = images.to(torch.float32, copy=True)
    return unit.div_(255) if images.dtype == torch.uint8 else unit


def pad_crop_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad with 4 black pixels, crop to the old size at the given offsets, flip left to right where asked.

    Args:
        images: (N, C, H, W), any dtype.
        offsets: top and left of each crop in the padded image, (N, 2) int64 in 0..8; (4, 4) leaves an image in place.
        flips: which images are mirrored, (N,) bool.

    Returns:
        A new tensor of the images' shape and dtype.

    Source: He et al., CVPR 2016, section 4.2.

    >>> image = torch.arange(1, 5).reshape(1, 1, 2, 2)
    >>> pad_crop_flip(image, torch.tensor([[4, 5]]), torch.tensor([False]))
    tensor([[[[2, 0],
              [4, 0]]]])
    """
    count, channels, height, width = images.shape
    padded = pad(images, (PADDING,) * 4)
    rows = offsets[:, :1] + torch.arange(height)  # (N, H)
    columns = offsets[:, 1:] + torch.arange(width)  # (N, W)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (N, H, W), into the flattened padded image
    index = pixels.reshape(count, 1, height * width).expand(count, channels, height * width)
    return padded.flatten(2).gather(2, index).view_as(images)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # SeedSequence mixes the two well; seed + epoch would give run 1 in epoch 0 the order of run 0 in epoch 1.
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
