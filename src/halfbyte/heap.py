"""How the C library hands out tensors: activations from memory that is used again, what lives longer on its own.

Left alone, glibc adapts as it goes. Then either the peak creeps up with the number of blocks, because what is freed
between two live tensors rarely fits the next request, or activations are mapped, zeroed page by page and unmapped once
for every product, which takes half as long again as the products themselves (docs/log.md). So:

- tensors up to 32 MiB come from the heap, which keeps what is freed (:func:`reuse_freed_memory`);
- weights, second moments and what the solver needs are mapped one by one and go back when freed (:func:`mapped`);
- between the stages of a block the heap gives back what it does not use (:func:`release_freed_memory`).

Where the C library is not glibc, or the user has set its thresholds, nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST_IN_HEAP = 32 << 20  # glibc's own upper limit
LEAST_MAPPED = 1 << 20
NEVER = 2**31 - 1


def prefer_huge_pages() -> None:
    """Let torch ask for huge pages (Linux, ``madvise``) for CPU tensors of 2 MiB and more.

    torch reads this once, at its first allocation: call it before torch is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def reuse_freed_memory() -> None:
    """From now on, keep freed memory for the next tensor; in this process, for good."""
    _set(M_TRIM_THRESHOLD, NEVER)
    _set(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Take tensors of 1 MiB and more from the system one by one: for what lives longer than a batch."""
    _set(M_MMAP_THRESHOLD, LEAST_MAPPED)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused: Python's own, torch's on a device, and on the CPU, where torch
    raises a plain ``RuntimeError`` that only its text tells from others."""
    names = {t.__name__ for t in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _set(parameter: int, value: int) -> None:
    library = _glibc()
    if library is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        library.mallopt(parameter, value)


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
