"""What a program without blaq has to know of the data, to be written into exported files."""

from typing import Any

from blaq.tasks.batches import Dataset

__all__ = ["preprocessing"]


def preprocessing(dataset: Dataset) -> dict[str, Any]:
    """The shape of an input, the normalisation of images and the names of the classes, ready for JSON.

    The network takes images of pixels in 0..1 less ``mean``, over ``std``, both one number a channel; text it takes as the
    position of each character in ``classes``, and there is no mean.

    Example:
        >>> from blaq.tasks.data import load_dataset
        >>> found = preprocessing(load_dataset("digits"))
        >>> found["shape"], len(found["mean"]), found["classes"][:3]
        ([1, 8, 8], 1, ['0', '1', '2'])
    """
    return {
        "name": dataset.name,
        "shape": list(dataset.input_shape),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "classes": list(dataset.class_names),
    }
