"""Integer codes <-> the tensors of a compressed-tensors checkpoint.

The bit layout is the compressed-tensors library's own (its ``pack_to_int32`` and ``unpack_from_int32``); this module
says which tensors a scheme stores, with which shapes, and builds them. The independent decoder that checks the result
is ``reference``; it shares nothing with this file. The library takes longer to import than ``plan`` to run, so it is
imported where bits are packed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from halfbyte.schemes import Scheme, WeightFormat, packed_columns

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def stored_tensors(scheme: Scheme, shape: tuple[int, int], scale_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a scheme stores for one Linear: leaf name -> (safetensors dtype, shape).

    Args:
        scheme: the scheme.
        shape: ``(out_features, in_features)``.
        scale_dtype: safetensors dtype name of the scales; the source weight's.
    """
    out_features, in_features = shape
    w = scheme.weights
    scales = (scale_dtype, w.scale_shape(out_features, in_features))
    if scheme.storage == "int-quantized":
        return {"weight": ("I8", shape), "weight_scale": scales}
    if scheme.storage == "float-quantized":
        return {"weight": ("F8_E4M3", shape), "weight_scale": scales}
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (out_features, packed_columns(in_features, w.num_bits))),
        "weight_scale": scales,
        "weight_shape": ("I64", (2,)),
    }
    if not w.symmetric:
        stored["weight_zero_point"] = ("I32", (packed_columns(out_features, w.num_bits), w.groups(in_features)))
    return stored


def pack(
    scheme: Scheme, codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of one Linear.

    Args:
        scheme: the scheme.
        codes: ``[out, in]`` int8 in ``q_min..q_max``, or float8_e4m3fn for float formats.
        scales: ``[out, groups]`` in the dtype to be stored; of a block's rows, which have one scale, the first counts.
        zero_points: ``[out, groups]`` int8 for asymmetric formats, else ``None``.
    """
    from compressed_tensors.compressors import pack_to_int32

    if scheme.weights.block is not None:
        scales = scales[:: scheme.weights.block[0]]
    if scheme.storage in ("int-quantized", "float-quantized"):
        return {"weight": codes.contiguous(), "weight_scale": scales.contiguous()}
    bits = scheme.weights.num_bits
    tensors = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero_points is not None:
        tensors["weight_zero_point"] = pack_to_int32(zero_points, bits, packed_dim=0).contiguous()
    return tensors


def unpack(
    weights: WeightFormat, stored: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inverse of :func:`pack`: codes, scales ``[out, groups]``, zero points. ``weights`` is their format."""
    from compressed_tensors.compressors import unpack_from_int32

    scales = stored["weight_scale"]
    if "weight_packed" not in stored:
        codes = stored["weight"]
        if weights.block is not None:
            scales = scales.repeat_interleave(weights.block[0], dim=0)[: codes.shape[0]]
        return codes, scales, None
    shape = torch.Size(stored["weight_shape"].tolist())
    codes = unpack_from_int32(stored["weight_packed"], weights.num_bits, shape)
    zero_points = None
    if "weight_zero_point" in stored:
        # Along rows, and turned: the library's own packed_dim=0 cannot read eight rows (a single row of words).
        words = stored["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
        turned = torch.Size((scales.shape[1], shape[0]))
        zero_points = unpack_from_int32(words, weights.num_bits, turned).T.contiguous()
    return codes, scales, zero_points


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None) -> torch.Tensor:
    """``w = (q - z) * s`` in float32, shape ``[out, in]``; group width is ``in / scales.shape[1]``."""
    out_features, in_features = codes.shape
    grouped = codes.to(torch.float32).reshape(out_features, scales.shape[1], -1)
    if zero_points is not None:
        grouped = grouped - zero_points.to(torch.float32).unsqueeze(-1)
    return (grouped * scales.to(torch.float32).unsqueeze(-1)).reshape(out_features, in_features)
