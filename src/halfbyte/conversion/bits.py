"""Rows of small integers as one string of bits each, in int32 words: what every packed format is made of.

Element ``i`` of a row is its bits ``b i .. b i + b - 1``, the lowest bit of the first word first. Where ``b`` divides
32 no element lies across two words; elsewhere (3, 5, 6, 7 bits) some do. What is left of the last word is zero.

This is compressed-tensors' packing along rows (of version 0.19 and newer) and, turned, AutoGPTQ's; AutoAWQ's differs
from it by an order of eight. Does not cover: 3 bits as compressed-tensors packed them before (ten to a word).
"""

from __future__ import annotations

import numpy as np
import torch


def words_in(count: int, bits: int) -> int:
    """int32 words that hold ``count`` elements: ``ceil(count * bits / 32)``."""
    return -(-count * bits // 32)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """``[rows, count]`` uint8, each below ``2**bits``, to int32 ``[rows, ceil(count * bits / 32)]``."""
    rows, count = values.shape
    words = words_in(count, bits)
    if 32 % bits:
        places = np.arange(bits, dtype=np.uint8)
        stream = ((values.numpy()[:, :, None] >> places) & 1).reshape(rows, count * bits)
        octets = np.packbits(stream, axis=1, bitorder="little")
        padded = np.zeros((rows, 4 * words), dtype=np.uint8)
        padded[:, : octets.shape[1]] = octets
        return torch.from_numpy(padded).view(torch.int32)
    per_word = 32 // bits
    if count != words * per_word:
        values = torch.nn.functional.pad(values, (0, words * per_word - count))
    octets_of = values.contiguous()
    while bits < 8:  # neighbours join: two of b bits are one of 2 b
        octets_of = octets_of[:, 0::2] | (octets_of[:, 1::2] << bits)
        bits *= 2
    return octets_of.reshape(-1).view(torch.int32).reshape(rows, words)


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of :func:`pack_rows`: int32 ``[rows, words]`` to uint8 ``[rows, count]``."""
    # A column of single words counts as contiguous whatever its stride; a view as bytes wants stride 1.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if 32 % bits:
        stream = np.unpackbits(octets.numpy(), axis=1, count=count * bits, bitorder="little")
        weights = (1 << np.arange(bits)).astype(np.uint8)
        return torch.from_numpy(stream.reshape(words.shape[0], count, bits) @ weights)
    mask = (1 << bits) - 1
    parts = [(octets >> shift) & mask for shift in range(0, 8, bits)]
    values = parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1).reshape(words.shape[0], -1)
    return values[:, :count]
