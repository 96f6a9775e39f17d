"""Grids: the finite sets of levels that a quantized weight may take.

A grid is a set of integers, symmetric around zero. A weight is ``scale * level``; the scale belongs to a row of the
weight (see `blaq.project`), the levels to the grid. The table is that of LAB (Hou et al., ICLR 2017), LAT and LAQ (Hou
and Kwok, ICLR 2018), and the mid-rise grids.
"""

import difflib
import re
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

MAX_BITS = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels of a quantization scheme.

    Write a grid by name or by bits with `Grid.parse`; the constructor takes the parts.

    =====================  ======================================  ====  ======
    name                   levels                                  bits  scales
    =====================  ======================================  ====  ======
    ``binary``             -1, 1                                   1     1
    ``ternary``            -1, 0, 1                                2     1
    ``ternary2``           -1, 0, 1, one scale for either sign     2     2
    ``linear3..linear8``   -n..n, n = 2^(m-1) - 1                  m     1
    ``log3..log8``         0, +-1, +-2, .. +-2^(n-1)               m     1
    ``midrise2..8``        +-1, +-3, .. +-(2^m - 1)                m     1
    =====================  ======================================  ====  ======

    Attributes:
        name: canonical name.
        bits: storage bits a weight.
        magnitudes: the levels >= 0, ascending: a weight starts at the first and steps outward.
        two_scales: negative and positive entries have scales of their own.
        mids: half way between neighbouring magnitudes: where a weight steps outward.
        spacing: how far apart neighbouring magnitudes are, where all are equally far and three or more: else None.

    Example:
        >>> Grid.parse("linear3").levels
        tensor([-3., -2., -1.,  0.,  1.,  2.,  3.])
        >>> Grid.parse(1)
        Grid('binary')
    """

    name: str
    bits: int
    magnitudes: tuple[int, ...]
    two_scales: bool = False
    # Every pass asks for these: they are computed once.
    mids: tuple[float, ...] = field(init=False, compare=False)
    spacing: float | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        pairs = list(pairwise(self.magnitudes))
        steps = {outer - inner for inner, outer in pairs}
        object.__setattr__(self, "mids", tuple((inner + outer) / 2 for inner, outer in pairs))
        object.__setattr__(self, "spacing", float(steps.pop()) if len(steps) == 1 and len(pairs) > 1 else None)

    @staticmethod
    def parse(spec: "str | int | Grid") -> "Grid":
        """The grid of a name (``"ternary"``, ``"log4"``) or of a number of bits (1 binary, 2 ternary, m >= 3 linear m).

        Raises:
            ValueError: an unknown name, or bits outside 1..8.

        Example:
            >>> Grid.parse("midrise2").levels
            tensor([-3., -1.,  1.,  3.])
        """
        if isinstance(spec, Grid):
            return spec
        if isinstance(spec, int) and not isinstance(spec, bool):
            if not 1 <= spec <= MAX_BITS:
                raise ValueError(f"Grid.parse({spec}): expected 1 to {MAX_BITS} bits, or a name such as 'ternary'.")
            return Grid.parse({1: "binary", 2: "ternary"}.get(spec, f"linear{spec}"))
        if isinstance(spec, str):
            if spec in _NAMED:
                return _NAMED[spec]
            if re.fullmatch(r"\d+", spec):
                return Grid.parse(int(spec))
        near = difflib.get_close_matches(str(spec), _NAMED, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(
            f"Grid.parse({spec!r}): expected a number of bits (1 to {MAX_BITS}) or one of 'binary', 'ternary', 'ternary2', "
            f"'linear3'..'linear8', 'log3'..'log8', 'midrise2'..'midrise8'{hint}"
        )

    @property
    def levels(self) -> Tensor:
        """All levels, ascending: float32 integers of shape (levels,)."""
        positive = [float(k) for k in self.magnitudes if k > 0]
        zero = [0.0] if self.has_zero else []
        return torch.tensor([-k for k in reversed(positive)] + zero + positive, dtype=torch.float32)

    @property
    def has_closed_form(self) -> bool:
        """Whether there is one magnitude only, so that no choice of levels hangs on the scale (LAB)."""
        return len(self.magnitudes) == 1

    @property
    def has_zero(self) -> bool:
        """Whether zero is a level."""
        return self.magnitudes[0] == 0

    @property
    def largest(self) -> float:
        """The largest level: scale = alpha / largest."""
        return float(self.magnitudes[-1])

    @property
    def scales(self) -> int:
        """Scales a row: 2 (negative, positive) for ``ternary2``, else 1."""
        return 2 if self.two_scales else 1

    def __repr__(self) -> str:
        return f"Grid({self.name!r})"


def _named_grids() -> dict[str, Grid]:
    grids = [Grid("binary", 1, (1,)), Grid("ternary", 2, (0, 1)), Grid("ternary2", 2, (0, 1), two_scales=True)]
    for m in range(3, MAX_BITS + 1):
        n = 2 ** (m - 1) - 1
        grids.append(Grid(f"linear{m}", m, tuple(range(n + 1))))
        grids.append(Grid(f"log{m}", m, (0, *(2**k for k in range(n)))))
    grids += [Grid(f"midrise{m}", m, tuple(range(1, 2**m, 2))) for m in range(2, MAX_BITS + 1)]
    return {grid.name: grid for grid in grids}


_NAMED = _named_grids()
GRIDS: tuple[str, ...] = tuple(_NAMED)
