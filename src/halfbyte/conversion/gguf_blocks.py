"""Integer codes <-> the blocks of a GGUF tensor.

GGUF cuts each row into blocks of 32 elements. A block is a float16 scale ``d``, in Q4_1 a float16 minimum ``m``, and 32
codes ``c``:

    type   bytes  value          codes
    Q4_0   18     d (c - 8)      0..15
    Q4_1   20     d c + m        0..15
    Q5_0   22     d (c - 16)     0..31
    Q8_0   34     d c            -128..127

so a symmetric group of 32 k weights with scale s is k blocks with d = s, exact wherever float16 holds s. An asymmetric
group, ``w = s (q - z)``, is exact in Q4_1 where float16 also holds ``-s z``; where it does not, in Q5_0, since
``q - z`` lies in -15..15.

Four-bit codes: byte i of a block holds element i in its low half and element i + 16 in its high half. The fifth bits of
a Q5_0 block are 32 bits, element i in bit i. Source: ggml's ``block_q4_0`` and its neighbours in ``ggml-common.h``.

:func:`from_words` and :func:`to_words` do what :func:`encode` and :func:`decode` do for codes that are packed along
rows, as compressed-tensors has them, without unpacking: there, byte k holds elements 2 k and 2 k + 1.

Covers what integer checkpoints convert to and from; every other type is decoded to floats by the gguf package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from halfbyte.kernels.blocks_numba import blocks_to_rows, rows_to_blocks

BLOCK = 32
BlockType = Literal["Q4_0", "Q4_1", "Q5_0", "Q8_0"]
BLOCK_BYTES: dict[BlockType, int] = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}
CODE_RANGE: dict[BlockType, tuple[int, int]] = {
    "Q4_0": (-8, 7),
    "Q4_1": (0, 15),
    "Q5_0": (-16, 15),
    "Q8_0": (-128, 127),
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor of blocks in numbers: ``w = d * codes``, or ``d * codes + m`` in Q4_1.

    Attributes:
        codes: ``[out, in]`` int8, signed (Q4_0: -8..7) but in Q4_1, where they are 0..15.
        d: ``[out, in / 32]`` float16.
        m: the same for Q4_1, else ``None``.
    """

    codes: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None = None


def in_float16(values: torch.Tensor) -> torch.Tensor:
    """Which of ``values`` float16 holds exactly, as booleans of the same shape; NaN and infinities it does not."""
    wide = values.to(torch.float64)
    return torch.isfinite(wide) & (wide.to(torch.float16).to(torch.float64) == wide)


def repeated(per_group: torch.Tensor, in_features: int) -> torch.Tensor:
    """``[out, groups]`` -> ``[out, in / 32]``: what a group has, each of its blocks has."""
    return per_group.repeat_interleave(in_features // BLOCK // per_group.shape[1], dim=1)


def block_type(num_bits: int, scales: torch.Tensor, zero_points: torch.Tensor | None) -> BlockType | None:
    """The smallest type that holds a weight's codes and scales exactly, ``None`` where there is none.

    Args:
        num_bits: bits of one code, up to 8.
        scales: ``[out, groups]``.
        zero_points: ``[out, groups]``, on the same footing as the codes (both signed or both unsigned), or ``None``.
    """
    if not bool(in_float16(scales).all()):
        return None
    if zero_points is None:
        return "Q4_0" if num_bits <= 4 else "Q8_0"
    if num_bits > 4:
        return None
    lowest = -(1 << (num_bits - 1))
    minimum = scales.to(torch.float64) * (lowest - zero_points.to(torch.float64))
    return "Q4_1" if bool(in_float16(minimum).all()) else "Q5_0"


def encode(
    kind: BlockType, codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None = None
) -> torch.Tensor:
    """The bytes of a weight, uint8 ``[out, in / 32 * BLOCK_BYTES[kind]]``.

    Args:
        kind: what :func:`block_type` said, or a type whose range holds ``codes - zero_points``. Scales (and Q4_1's
            minima) that float16 does not hold are rounded.
        codes: ``[out, in]`` int8, signed.
        scales: ``[out, groups]``, of any float dtype; groups of 32 or multiples of it.
        zero_points: ``[out, groups]`` signed, or ``None``.

    Raises:
        ValueError: a code is out of the type's range.
    """
    out_features, in_features = codes.shape
    d = repeated(scales.to(torch.float64), in_features)
    head = [d.to(torch.float16)]
    low, high = CODE_RANGE[kind]
    if kind == "Q4_1":
        zero = 0 if zero_points is None else repeated(zero_points.to(torch.float64), in_features)
        head.append((d * (-8 - zero)).to(torch.float16))
        shifted, low, high = codes, -8, 7
    elif zero_points is None:
        shifted = codes
    else:
        expanded = repeated(zero_points.to(torch.int16), in_features).repeat_interleave(BLOCK, dim=1)
        shifted = codes.to(torch.int16) - expanded
    if shifted.numel() and not (low <= int(shifted.min()) and int(shifted.max()) <= high):
        raise ValueError(f"codes {int(shifted.min())}..{int(shifted.max())} do not fit {kind} ({low}..{high})")
    blocks = [h.unsqueeze(-1).contiguous().view(torch.uint8) for h in head]
    if kind == "Q8_0":
        blocks.append(shifted.to(torch.int8).contiguous().view(torch.uint8).reshape(out_features, -1, BLOCK))
    else:
        unsigned = (shifted - low).to(torch.uint8).reshape(out_features, -1, BLOCK)
        if kind == "Q5_0":
            fifth = (unsigned >> 4).reshape(out_features, -1, 4, 8) << torch.arange(8, dtype=torch.uint8)
            blocks.append(fifth.sum(-1, dtype=torch.uint8))
            unsigned = unsigned & 15
        blocks.append(unsigned[..., :16] | (unsigned[..., 16:] << 4))
    return torch.cat(blocks, dim=-1).reshape(out_features, -1)


def has_words(kind: BlockType, num_bits: int) -> bool:
    """Whether codes of ``num_bits`` packed along rows can be copied to and from blocks as they are."""
    return num_bits == 4 if kind in ("Q4_0", "Q4_1") else kind == "Q8_0" and num_bits == 8


def from_words(
    kind: BlockType, words: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`encode` for packed codes, where :func:`has_words`: int32 ``[out, words]`` of ``q + 2**(b-1)``."""
    out_features = words.shape[0]
    octets = words.contiguous().view(torch.uint8).reshape(out_features, -1, BLOCK if kind == "Q8_0" else BLOCK // 2)
    in_features = octets.shape[1] * BLOCK
    head = [repeated(scales.to(torch.float16), in_features)]
    if kind == "Q4_1":
        zero = 0 if zero_points is None else zero_points.to(torch.float64)
        head.append(repeated((scales.to(torch.float64) * (-8 - zero)).to(torch.float16), in_features))
    data = torch.empty((out_features, octets.shape[1], BLOCK_BYTES[kind]), dtype=torch.uint8)
    halves = data.view(torch.float16)  # blocks have even sizes
    for i, values in enumerate(head):
        halves[..., i] = values
    if kind == "Q8_0":
        torch.bitwise_xor(octets, 0x80, out=data[..., 2:])
    else:
        rows_to_blocks(octets.numpy(), 2 * len(head), data.numpy())
    return data.reshape(out_features, -1)


def to_words(kind: BlockType, data: torch.Tensor) -> torch.Tensor:
    """The codes of :func:`decode` packed along rows, where :func:`has_words`: uint8 ``[out, bytes]`` -> int32."""
    out_features = data.shape[0]
    blocks = data.reshape(out_features, -1, BLOCK_BYTES[kind])
    if kind == "Q8_0":
        return (blocks[..., 2:] ^ 0x80).reshape(out_features, -1).view(torch.int32)
    octets = torch.empty((out_features, blocks.shape[1], BLOCK // 2), dtype=torch.uint8)
    blocks_to_rows(blocks.contiguous().numpy(), BLOCK_BYTES[kind] - BLOCK // 2, octets.numpy())
    return octets.reshape(out_features, -1).view(torch.int32)


def decode(kind: BlockType, data: torch.Tensor) -> Blocks:
    """Inverse of :func:`encode`: uint8 ``[out, bytes]`` -> codes and float16 scales, one a block."""
    out_features = data.shape[0]
    blocks = data.reshape(out_features, -1, BLOCK_BYTES[kind])
    d, m = heads(kind, data)
    if kind == "Q8_0":
        codes = blocks[..., 2:].clone().view(torch.int8)
    else:
        packed = blocks[..., -16:]
        codes = torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8)
        if kind == "Q5_0":
            bits = blocks[..., 2:6].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
            codes |= ((bits & 1).to(torch.int8) << 4).reshape(codes.shape)
        codes += CODE_RANGE[kind][0]
    return Blocks(codes=codes.reshape(out_features, -1), d=d, m=m)


def heads(kind: BlockType, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and minima of Q4_1, ``[out, in / 32]`` float16, of a weight's bytes."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES[kind])
    d = blocks[..., :2].clone().view(torch.float16).squeeze(-1)
    return d, blocks[..., 2:4].clone().view(torch.float16).squeeze(-1) if kind == "Q4_1" else None


def grouped(per_block: torch.Tensor, group_size: int | None, in_features: int) -> torch.Tensor | None:
    """``[out, in / 32]`` -> ``[out, groups]``, or ``None`` where the blocks of some group differ."""
    width = (group_size or in_features) // BLOCK
    parts = per_block.reshape(per_block.shape[0], -1, width)
    bits = parts.view(torch.int16) if parts.dtype == torch.float16 else parts
    return parts[..., 0].contiguous() if torch.equal(bits, bits[..., :1].expand(bits.shape)) else None


def zero_points_of(d: torch.Tensor, m: torch.Tensor) -> torch.Tensor | None:
    """Q4_1's minima as zero points of unsigned codes: int8 z in 0..15 with ``m = -d z``, ``None`` without such z."""
    wide, minimum = d.to(torch.float64), m.to(torch.float64)
    zero = torch.where(wide == 0, 0.0, -minimum / torch.where(wide == 0, 1.0, wide)).round()
    exact = (zero * wide == -minimum) & (zero >= 0) & (zero <= 15)
    return zero.to(torch.int8) if bool(exact.all()) else None
