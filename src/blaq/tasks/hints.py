"""The second half of an error message: the names that there are, or the one that was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The clause that proposes the known name nearest to `name`, or nothing when none is near.

    >>> did_you_mean("lenet", ["mlp", "lenet5", "vgg"])
    "; did you mean 'lenet5'?"
    >>> did_you_mean("quux", ["mlp", "lenet5", "vgg"])
    ''
    """
    nearest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def listed(names: Iterable[str]) -> str:
    """Names in quotes, one after the other.

    >>> listed(["mlp", "vgg"])
    "'mlp', 'vgg'"
    """
    return ", ".join(repr(name) for name in names)
