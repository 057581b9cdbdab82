"""What blocks compute in: float32, or bfloat16 where the processor multiplies it fast.

A checkpoint stored in bfloat16 is run in bfloat16 by every engine, and processors with instructions for it
(AVX512-BF16, AMX; all recent GPUs) multiply it several times faster than float32. Without them it is many times slower.

Does not cover: the solver, which works in float32 and float64 whatever blocks compute in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

ComputeDtype = Literal["auto", "float32", "bfloat16"]
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = ("auto", "float32", "bfloat16")


def compute_dtype(wanted: ComputeDtype, stored: torch.dtype, device: str, most_bits: int) -> torch.dtype:
    """What blocks compute in while a model is quantised.

    Args:
        wanted: ``auto``, or what the user asks for.
        stored: the checkpoint's dtype.
        device: ``cpu`` or ``cuda``.
        most_bits: of the weight formats wanted.

    Returns:
        for ``auto`` on a GPU the checkpoint's dtype; on a CPU bfloat16 where checkpoint and processor have it and all
        weights get fewer than 8 bits (the rounding of bfloat16, 2^-9, is as large as that to 8 bits), else float32.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if device != "cpu":
        return stored
    return torch.bfloat16 if stored == torch.bfloat16 and most_bits < 8 and fast_bfloat16() else torch.float32


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, as far as torch can tell."""
    tells = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(tell is not None and tell() for tell in tells)


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Within, float32 matrix products on the CPU may round their factors to bfloat16; sums stay float32.

    Nothing is lost where the factors are bfloat16 numbers, and with AVX512-BF16 or AMX it takes half the time. For the
    main thread only; where torch cannot do it, nothing changes.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
