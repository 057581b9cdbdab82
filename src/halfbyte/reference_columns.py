"""A slow second opinion on AutoAWQ's and AutoGPTQ's bytes, as :mod:`halfbyte.reference` is on compressed-tensors'.

Both pack along columns: ``qweight`` of AutoAWQ is ``[in, out b / 32]`` with its eight nibbles in an order of their own,
of AutoGPTQ ``[in b / 32, out]``. Written from the description of the formats with numpy, sharing nothing with
:mod:`halfbyte.conversion`: codes are taken out of words by shifting and masking, one position at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from halfbyte.errors import CheckpointError
from halfbyte.reference import FLOATS, Decoded, Float32, Int32, StoredTensor, to_float32

# Which output of eight a nibble of AutoAWQ's holds.
HELD_BY_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnLayout:
    """What the config says of a module.

    Attributes:
        kind: whose layout; bits: of a code; group_size: inputs to a scale, -1 for all.
        plus: what is added to a stored zero point (AutoGPTQ's version 1 stores them less one).
    """

    kind: Literal["awq", "gptq"]
    bits: int
    group_size: int
    plus: int = 0


@dataclass(frozen=True, slots=True)
class ColumnWeight:
    """One Linear, read whole; decoded some rows at a time.

    Attributes:
        shape: ``(out, in)``; codes: unsigned ``[in, out]``; zeros: unsigned, ``plus`` added, ``[groups, out]``.
        scales: ``[groups, out]``; group: of each input.
    """

    shape: tuple[int, int]
    codes: npt.NDArray[np.uint8]
    zeros: Int32
    scales: Float32
    group: npt.NDArray[np.int64]

    @staticmethod
    def of(parts: Mapping[str, StoredTensor], layout: ColumnLayout) -> ColumnWeight:
        """Take a module's tensors apart; :class:`CheckpointError` where they do not fit together."""
        problem = next(iter(column_problems(parts, layout)), None)
        if problem is not None:
            raise CheckpointError(problem)
        qweight, qzeros = parts["qweight"].rows(), parts["qzeros"].rows()
        if layout.kind == "awq":
            codes, zeros = _awq_columns(qweight), _awq_columns(qzeros)
        else:
            codes = _along_rows(np.ascontiguousarray(qweight.T), layout.bits).T
            zeros = _along_rows(qzeros, layout.bits)
        in_features, out_features = codes.shape
        width = in_features if layout.group_size == -1 else layout.group_size
        group = np.arange(in_features, dtype=np.int64) // width
        if "g_idx" in parts:
            group = parts["g_idx"].rows().astype(np.int64)
        return ColumnWeight(
            shape=(out_features, in_features),
            codes=codes,
            zeros=zeros.astype(np.int32) + layout.plus,
            scales=to_float32(parts["scales"].rows(), parts["scales"].dtype),
            group=group,
        )

    def decode(self, start: int, stop: int) -> Decoded:
        """Rows ``[start, stop)``: ``w = (q - z) s``, codes and zero points unsigned."""
        codes = self.codes[:, start:stop].T.astype(np.int32)
        zeros = self.zeros[:, start:stop].T
        scales = self.scales[:, start:stop].T
        weight = (codes - zeros[:, self.group]).astype(np.float32) * scales[:, self.group]
        return Decoded(codes=codes, scales=scales, zero_points=zeros, weight=weight)


def column_problems(parts: Mapping[str, StoredTensor], layout: ColumnLayout) -> list[str]:
    """Missing, mistyped or misshapen tensors of one module, by their last names."""
    missing = [n for n in ("qweight", "qzeros", "scales") if n not in parts]
    if missing:
        return [f"{n} is missing" for n in missing]
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    problems = [f"{t.name} has dtype {t.dtype}, not I32" for t in (qweight, qzeros) if t.dtype != "I32"]
    if scales.dtype not in FLOATS:
        problems.append(f"{scales.name} has dtype {scales.dtype}, which holds no scales")
    if len(qweight.shape) != 2 or not all(qweight.shape):
        return [*problems, f"{qweight.name} has shape {list(qweight.shape)}, not two dimensions"]
    bits = layout.bits
    if layout.kind == "awq":
        in_features, out_features = qweight.shape[0], 32 * qweight.shape[1] // bits
    else:
        in_features, out_features = 32 * qweight.shape[0] // bits, qweight.shape[1]
    width = in_features if layout.group_size == -1 else layout.group_size
    groups = -(-in_features // width)
    for tensor, shape in ((scales, (groups, out_features)), (qzeros, (groups, out_features * bits // 32))):
        if tensor.shape != shape:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, not {list(shape)}")
    index = parts.get("g_idx")
    if index is not None and (index.shape != (in_features,) or index.dtype not in ("I32", "I64")):
        problems.append(f"{index.name} is {index.dtype} {list(index.shape)}, not I32 {[in_features]}")
    elif index is not None:
        values = index.rows()
        if values.min() < 0 or values.max() >= groups:
            problems.append(f"{index.name} names groups {values.min()} to {values.max()}, and there are {groups}")
    return problems


def _awq_columns(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """``[rows, columns]`` int32 to ``[rows, 8 columns]``."""
    unsigned = words.astype("<i4").view("<u4")
    values = np.empty((*unsigned.shape, 8), dtype=np.uint8)
    for nibble, held in enumerate(HELD_BY_NIBBLE):
        values[:, :, held] = (unsigned >> np.uint32(4 * nibble)) & np.uint32(15)
    return values.reshape(unsigned.shape[0], -1)


def _along_rows(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """``[rows, words]`` int32 to ``[rows, 32 words / bits]``: bit ``k`` of element ``i`` is bit ``bits i + k``."""
    octets = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")
    count = stream.shape[1] // bits
    values = np.zeros((len(words), count), dtype=np.uint8)
    for k in range(bits):
        values |= stream[:, k : bits * count : bits] << np.uint8(k)
    return values
