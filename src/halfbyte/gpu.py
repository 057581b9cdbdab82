"""What is done differently on a GPU: reading and writing beside the work, copies that do not wait, full float32.

A tensor on the CPU passes through unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def works_ahead(device: torch.device) -> bool:
    """Whether the next block is read, and the last one written, while a block is worked on.

    Either takes one block more in memory, and processor time that a CPU needs for the block itself.
    """
    return device.type != "cpu"


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying a tensor into pinned memory; whoever reads it calls :func:`wait_for_copies` first."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Wait until what :func:`to_host` started in this thread is there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """On a GPU, keep float32 products from being rounded to TF32 or bfloat16, whatever the process has set."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
