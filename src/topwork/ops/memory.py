"""How the C library's allocator treats the large temporaries of training on a CPU."""

from __future__ import annotations

import ctypes
import functools
import os

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them
MIB = 2**20
PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def bound_primitive_cache() -> None:
    """Let oneDNN keep 64 compiled products rather than 1024, unless the environment says else.

    It keeps one for every shape that it has met. Packed batches are of ever other lengths, and the
    cache grew by 1.5 GB in 150 steps; 64 hold a step's shapes, at the same speed (measured). It is
    read once, at the first product of a process.
    """
    os.environ.setdefault(PRIMITIVES, "64")


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next temporary; False where there is no glibc.

    By default each large tensor is mapped anew and given back when freed, so that every step
    touches fresh pages, which the kernel zeroes one by one: about 8 GB/s, a seventh of the speed
    of memory in hand.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(TOP_PAD, 64 * MIB)
    # Older releases take no more than 32 MiB.
    mapped = mallopt(MMAP_THRESHOLD, 1024 * MIB) or mallopt(MMAP_THRESHOLD, 32 * MIB)
    return bool(kept and mapped)
