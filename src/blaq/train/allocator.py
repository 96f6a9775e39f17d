"""Memory that a training step frees stays with the process: the next step needs as much."""

import ctypes
import os
import sys

# Of mallopt, in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_KEPT = 2**30  # bytes: what is free at the end of the heap is given back from here on
_OWN_MAPPING = 2**28  # bytes: blocks from here on are given back at once

OF_THE_USER = (
    "GLIBC_TUNABLES",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
)


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, up to 1 GiB; returns whether it does. It holds for the life of the process.

    glibc gives large blocks back to the system as soon as they are free. In training the next step asks for them again, and
    the system hands them out page by page, each filled with zeros first. Settings of the user in the environment are left
    as they are, and so are other systems and C libraries.

    Example:
        >>> kept = keep_freed_memory()

    Source: the manual page of mallopt(3).
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in OF_THE_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
