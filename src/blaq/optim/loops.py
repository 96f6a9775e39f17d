"""The loops of the exact solver over all entries of a row, compiled: see `blaq.bins`."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from blaq.bins import PLAIN, Loops, Row, add_into_bins, added, mark
from blaq.optim import compiled

# Entries from which a thread of its own pays back: those of OpenMP keep their cores busy for some milliseconds after a loop.
_PART = 2**22
# One addition after the other: faster than atomic ones, and the same in every run. Without Python's lock, so that other threads
# can do as much beside it.
_IN_ORDER = (("cpp.threads", 1), ("cpp_wrapper", True))


@functools.cache
def _with_digits(digits: int) -> Callable[..., Any]:
    def with_digits(*tensors: Tensor) -> None:
        add_into_bins(digits, *tensors)

    return compiled.own_code(with_digits)


def _add_into_bins(row: Row, starts: Tensor, size: int) -> Tensor:
    """On the threads of torch, on a CPU: each adds up a part of the row, in bins of its own."""
    on_cpu = row.w.device.type == "cpu"
    function, options = _with_digits(row.digits), _IN_ORDER if on_cpu else ()
    count = max(min(torch.get_num_threads(), len(row.w) // _PART), 1) if on_cpu else 1
    pieces = zip(*(torch.split(t, len(row.w) // count) for t in (row.w, row.d)), strict=True)
    parts = [row._replace(w=w, d=d, loops=PLAIN) for w, d in pieces]
    bins = torch.zeros(count, 2, size, dtype=torch.float64, device=row.w.device)

    def add(part: Row, of: Tensor, codes: compiled.Codes | None = None) -> None:
        arguments = (part.w, part.d, starts, *of)
        compiled.call(function, arguments, lambda: of.copy_(added(part, starts, size)), options, codes)

    # The first time compiles, which is no work for threads; the sums are the same.
    codes = compiled.Codes.of(function, (parts[0].w, parts[0].d, starts, *bins[0]))
    if count > 1 and codes:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(functools.partial(add, codes=codes), parts[:count], bins))
    else:
        for part, of in zip(parts, bins, strict=False):
            add(part, of)
    for rest in parts[count:]:  # fewer than there are threads
        bins[0] += added(rest, starts, size)
    return bins.sum(0)


def _mark(*tensors: Tensor) -> None:
    compiled.call(mark, tensors, lambda: mark(*tensors))


# Chunks, since a flag an entry takes memory.
COMPILED = Loops(_add_into_bins, _mark, chunk=2**20, intervals=(2, 8, 16), fill=True)
