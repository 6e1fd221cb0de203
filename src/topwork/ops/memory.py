"""How the C library's allocator treats the large temporaries of training on a CPU."""

from __future__ import annotations

import ctypes
import functools

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them
MIB = 2**20


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next temporary; False where there is no glibc.

    By default each large tensor is mapped anew and given back when freed, so that every step
    touches fresh pages, which the kernel zeroes one by one: about 8 GB/s, a seventh of the speed
    of memory in hand. The peak of a training process does not grow (its steps repeat); what it
    holds between steps does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(TOP_PAD, 64 * MIB)
    # Older releases take no more than 32 MiB.
    mapped = mallopt(MMAP_THRESHOLD, 1024 * MIB) or mallopt(MMAP_THRESHOLD, 32 * MIB)
    return bool(kept and mapped)
