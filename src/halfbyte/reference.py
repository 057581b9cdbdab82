"""A slow second opinion on what the bytes of a quantised checkpoint mean: files -> float32 weights.

Written from the description of the formats alone, with numpy and nothing of the code that packs, quantises or reads
checkpoints elsewhere in halfbyte (import-linter keeps it so), so that a slip there cannot hide here. It has its own
safetensors header parser, its own bfloat16 and float8 decoding and its own unpacking.

Covers compressed-tensors ``pack-quantized`` (2, 3, 4 and 8 bits, symmetric and asymmetric, groups or channels),
``int-quantized`` and ``float-quantized`` (e4m3) with one scale a row, a group, a block or for the whole tensor. Does
not cover 5, 6 and 7 bits, 3 bits as library versions before 0.19 packed them (ten to a word), NVFP4 and MXFP4.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from halfbyte.errors import CheckpointError
from halfbyte.schemes import WeightFormat

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

MAX_HEADER_BYTES = 100_000_000
PACKED_BITS = (2, 3, 4, 8)

# safetensors dtype -> numpy dtype of the stored bits; bfloat16 and float8 have none of their own
STORED: dict[str, str] = {
    "BOOL": "|u1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: ``size_bytes`` bytes at ``offset`` of ``path``, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of the tensor; :class:`CheckpointError` where the file ends before."""
        with open(self.path, "rb") as f:
            f.seek(self.offset + start)
            data = f.read(stop - start)
        if len(data) != stop - start:
            raise CheckpointError(f"ends inside tensor {self.name}", where=self.path.name)
        return data

    def rows(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Stored bits of rows ``[start, stop)`` along the first dimension (all of a scalar)."""
        if not self.shape:
            return np.frombuffer(self.read_bytes(0, self.size_bytes), STORED[self.dtype]).reshape(())
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        row_bytes = self.size_bytes // max(self.shape[0], 1)
        bits = np.frombuffer(self.read_bytes(start * row_bytes, stop * row_bytes), STORED[self.dtype])
        return bits.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class Header:
    """The readable tensors of one file in the order of their offsets, and what is wrong with the others."""

    tensors: list[StoredTensor]
    problems: list[str]


def read_header(path: Path) -> Header:
    """Parse a safetensors header without trusting it.

    A file is an unsigned 64-bit little-endian length N, N bytes of JSON mapping names to ``dtype``, ``shape`` and
    ``data_offsets`` (relative to the data), then the data. The tensors must tile the data: no gap, no overlap, nothing
    missing or left over at the end. Tensors that lie within the file and have a consistent entry are returned even
    when others do not.

    Raises:
        CheckpointError: the header itself cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        prefix = f.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"is too short for a safetensors file ({size} bytes)", where=path.name)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"announces a header of {length} bytes in a file of {size}", where=path.name)
        text = f.read(length)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        repeated.extend(sorted({k for k in keys if keys.count(k) > 1}) if len(set(keys)) < len(keys) else [])
        return dict(pairs)

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"has a header that is not JSON: {e}", where=path.name) from None
    if not isinstance(entries, dict):
        raise CheckpointError("has a header that is not a JSON object", where=path.name)
    problems = [f"{path.name}: the header names {name} twice" for name in repeated]
    tensors, data_start = [], 8 + length
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            tensors.append(_stored(name, entry, path, data_start))
        except (KeyError, TypeError, ValueError) as e:
            problems.append(f"{path.name}: tensor {name} has a malformed entry ({type(e).__name__}: {e})")
    tensors.sort(key=lambda t: (t.offset, t.size_bytes))
    end, whole = data_start, []
    for t in tensors:
        if t.offset != end:
            kind = "leaves a gap before" if t.offset > end else "overlaps the tensor before"
            problems.append(f"{path.name}: tensor {t.name} starts at byte {t.offset}, which {kind} byte {end}")
        if t.offset + t.size_bytes > size:
            problems.append(f"{path.name}: truncated, the file ends inside tensor {t.name}")
        else:
            whole.append(t)
        end = max(end, t.offset + t.size_bytes)
    if end < size:
        problems.append(f"{path.name}: {size - end} bytes after the last tensor belong to none")
    return Header(whole, problems)


def _stored(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r} is not known")
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError("shape and offsets must be whole numbers")
    if math.prod(shape) * np.dtype(STORED[dtype]).itemsize != stop - start:
        raise ValueError(f"{stop - start} bytes cannot hold {dtype} {list(shape)}")
    return StoredTensor(
        name=name, dtype=dtype, shape=shape, path=path, offset=data_start + start, size_bytes=stop - start
    )


def _e4m3_values() -> Float32:
    """The 256 values of float8_e4m3fn: sign, 4 exponent bits (bias 7), 3 mantissa bits, 0x7f and 0xff are NaN."""
    values = []
    for byte in range(256):
        sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
        if exponent == 15 and mantissa == 7:
            values.append(math.nan)
        elif exponent == 0:
            values.append(sign * mantissa * 2.0**-9)
        else:
            values.append(sign * (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.array(values, dtype=np.float32)


E4M3 = _e4m3_values()


def to_float32(bits: npt.NDArray[Any], dtype: str) -> Float32:
    """Values of stored float bits; every format but F64 converts exactly."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F8_E4M3":
        values: Float32 = E4M3[bits]
        return values
    if dtype in ("F16", "F32", "F64"):
        return bits.astype(np.float32)
    raise CheckpointError(f"dtype {dtype} does not hold weights")


def unpack(words: npt.NDArray[Any], num_bits: int, count: int) -> Int32:
    """Signed codes of packed int32 words.

    The words of a row are one string of bits, the lowest bit of the first word first; element ``i`` is its bits
    ``b i .. b i + b - 1``, stored as ``q + 2**(b-1)``. Codes of 3 bits may lie across two words.

    Args:
        words: int32 ``[rows, words]``.
        num_bits: 2, 3, 4 or 8.
        count: codes in a row; the rest of the last word is padding.

    Returns:
        int32 ``[rows, count]``.
    """
    if num_bits not in PACKED_BITS:
        raise CheckpointError(f"packed codes of {num_bits} bits are not known here")
    unsigned = words.astype("<i4").view("<u4")
    if 32 % num_bits:
        octets = np.ascontiguousarray(unsigned).view(np.uint8)
        bits = np.unpackbits(octets, axis=1, count=count * num_bits, bitorder="little")
        weights = np.int32(1) << np.arange(num_bits, dtype=np.int32)
        return bits.reshape(bits.shape[0], count, num_bits) @ weights - np.int32(1 << (num_bits - 1))
    per_word = 32 // num_bits
    codes = np.empty((*unsigned.shape, per_word), dtype=np.int32)
    for j in range(per_word):
        codes[..., j] = (unsigned >> np.uint32(j * num_bits)) & np.uint32((1 << num_bits) - 1)
    return codes.reshape(unsigned.shape[0], -1)[:, :count] - np.int32(1 << (num_bits - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Some rows of one Linear, taken apart.

    Attributes:
        codes: ``[rows, in]``; int32, or float32 for float formats.
        scales: float32 ``[rows, groups]``.
        zero_points: int32 ``[rows, groups]``, ``None`` when symmetric.
        weight: float32 ``[rows, in]``, ``(codes - zero_points) * scales``.
    """

    codes: npt.NDArray[Any]
    scales: Float32
    zero_points: Int32 | None
    weight: Float32


def decode_rows(parts: Mapping[str, StoredTensor], fmt: WeightFormat, start: int, stop: int) -> Decoded:
    """Decode rows ``[start, stop)`` of one Linear; ``start`` must be a multiple of 8 (zero points share words).

    Args:
        parts: the Linear's tensors by their last name: ``weight_packed``, ``weight_scale``, ``weight_shape`` and
            ``weight_zero_point``, or ``weight`` and ``weight_scale``; ``weight_g_idx`` where groups are dealt by one.
        fmt: the weight format announced in the config.

    Raises:
        CheckpointError: a tensor is missing, truncated or does not fit the others.
    """
    if start % 8:
        raise ValueError(f"rows are decoded from a multiple of 8, not from {start}")
    try:
        return _decode_rows(parts, fmt, start, stop)
    except KeyError as e:
        raise CheckpointError(f"tensor {e.args[0]} is missing") from None
    except (ValueError, IndexError) as e:
        raise CheckpointError(f"the tensors of one Linear do not fit together: {e}") from None


def _decode_rows(parts: Mapping[str, StoredTensor], fmt: WeightFormat, start: int, stop: int) -> Decoded:
    packed = "weight_packed" in parts
    codes: npt.NDArray[Any]
    if packed:
        out_features, in_features = (int(n) for n in parts["weight_shape"].rows())
        codes = unpack(parts["weight_packed"].rows(start, stop), fmt.num_bits, in_features)
    else:
        out_features, in_features = parts["weight"].shape
        bits = parts["weight"].rows(start, stop)
        codes = to_float32(bits, parts["weight"].dtype) if fmt.kind == "float" else bits.astype(np.int32)
    stop = min(stop, out_features)
    scale = parts["weight_scale"]
    width = None
    if scale.numel == 1:
        scales = np.broadcast_to(to_float32(scale.rows(), scale.dtype).reshape(1, 1), (stop - start, 1))
    elif fmt.block is not None:
        height, width = fmt.block
        first = start // height
        of_blocks = to_float32(scale.rows(first, -(-stop // height)), scale.dtype)
        scales = of_blocks[np.arange(start, stop) // height - first]
    else:
        scales = to_float32(scale.rows(start, stop), scale.dtype).reshape(stop - start, -1)
    group = _group_index(parts, scales.shape[1])
    zeros: Int32 | None = None
    if not fmt.symmetric:
        stored = parts["weight_zero_point"]
        if packed:
            before = start - start % 32  # 32 codes fill whole words, whatever their bits
            words = stored.rows(before * fmt.num_bits // 32, -(-stop * fmt.num_bits // 32))
            zeros = unpack(np.ascontiguousarray(words.T), fmt.num_bits, stop - before).T[start - before :]
        else:
            zeros = stored.rows(start, stop).astype(np.int32).reshape(stop - start, -1)
    spread_scales = _spread(scales, in_features, width) if group is None else scales[:, group]
    spread_zeros = None if zeros is None else _spread(zeros, in_features) if group is None else zeros[:, group]
    shifted = codes if spread_zeros is None else codes - spread_zeros
    weight = shifted.astype(np.float32) * spread_scales
    return Decoded(codes=codes, scales=scales, zero_points=zeros, weight=weight)


def _group_index(parts: Mapping[str, StoredTensor], groups: int) -> npt.NDArray[np.int64] | None:
    """The group of each input where ``weight_g_idx`` deals them; ``None`` for runs, which an index of -1 stands for."""
    if "weight_g_idx" not in parts:
        return None
    index: npt.NDArray[np.int64] = parts["weight_g_idx"].rows().astype(np.int64)
    if (index == -1).all():
        return None
    if index.min() < 0 or index.max() >= groups:
        raise ValueError(f"weight_g_idx names groups {index.min()} to {index.max()}, and there are {groups}")
    return index


def _spread(per_group: npt.NDArray[Any], in_features: int, width: int | None = None) -> npt.NDArray[Any]:
    """``[rows, groups]`` -> ``[rows, in]``, each value repeated over the ``width`` features of its group."""
    return np.repeat(per_group, width or in_features // per_group.shape[1], axis=1)[:, :in_features]


def decode(parts: Mapping[str, StoredTensor], fmt: WeightFormat) -> Float32:
    """The whole weight ``[out, in]`` of one Linear as float32; arguments and errors as for :func:`decode_rows`."""
    name = "weight_packed" if "weight_packed" in parts else "weight"
    if name not in parts:
        raise CheckpointError("tensor weight is missing")
    return decode_rows(parts, fmt, 0, parts[name].shape[0]).weight
