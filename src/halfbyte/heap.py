"""How the C library hands out large tensors, so that peak memory follows what is in use and not what was freed before.

Left alone, glibc takes tensors up to 32 MiB from a heap whose freed chunks rarely fit the next request: the peak then
creeps up with the number of blocks (docs/log.md). Taken from the system one by one they go back when freed. What that
costs in page faults, huge pages save again. Both are hints; where the platform has neither, nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache

MMAP_THRESHOLD = 1 << 20
M_MMAP_THRESHOLD = -3  # <malloc.h>


def prefer_huge_pages() -> None:
    """Let torch ask for huge pages (Linux, ``madvise``) for CPU tensors of 2 MiB and more.

    torch reads this once, at its first allocation: call it before torch is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def large_tensors_from_the_system() -> None:
    """Map every allocation of 1 MiB and more by itself, in this process and from now on.

    A threshold that the user has set (``MALLOC_MMAP_THRESHOLD_``) stays.
    """
    library = _glibc()
    if library is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def release_freed_memory() -> None:
    """Give what the heap holds but does not use back to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: others lack these functions."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        if library.mallopt and library.malloc_trim:
            return library
    return None
