"""AutoAWQ checkpoints, ``version: gemm``.

Per Linear ``[out, in]``, 4 bits, groups of ``G`` inputs::

    qweight  int32 [in, out / 8]      nibble j of column c is output 8c + [0, 2, 4, 6, 1, 3, 5, 7][j]
    qzeros   int32 [in / G, out / 8]  likewise
    scales   float16 [in / G, out]    w = (q - z) s, both unsigned

There is no symmetric variant: such a weight has every zero point 8, and a checkpoint of which all do is read as
symmetric. ``gemv`` and the layouts of llm-awq are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from halfbyte.checkpoint.reader import TensorInfo
from halfbyte.conversion.bits import pack_rows, unpack_rows, words_in
from halfbyte.conversion.coded import FLOATS, CodedWeight, Grid, Steps
from halfbyte.conversion.config import integer_in, plain_modules, unrounded
from halfbyte.conversion.folder_source import Module
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Obstacle
from halfbyte.errors import CheckpointError
from halfbyte.kernels.nibbles_numba import turn_back, turn_rows
from halfbyte.schemes import WeightFormat

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4
MIDDLE = 1 << (BITS - 1)
ALL_MIDDLE = -0x77777778  # 0x88888888 as int32


def pack_columns(words: torch.Tensor, in_features: int) -> torch.Tensor:
    """Codes packed along rows, ``[out, ceil(in / 8)]``, to ``qweight [in, out / 8]``."""
    if in_features % 8:
        codes = unpack_rows(words, BITS, in_features)
        return pack_rows(_ordered(codes.T), BITS)
    turned = torch.empty((in_features, words.shape[0] // 8), dtype=torch.int32)
    turn_rows(words.contiguous().numpy().view(np.uint32), np.array(ORDER), turned.numpy().view(np.uint32))
    return turned


def unpack_columns(qweight: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_columns`."""
    in_features, columns = qweight.shape
    if in_features % 8:
        return pack_rows(_plain(unpack_rows(qweight, BITS, 8 * columns)).T.contiguous(), BITS)
    words = torch.empty((8 * columns, in_features // 8), dtype=torch.int32)
    turn_back(qweight.contiguous().numpy().view(np.uint32), np.array(ORDER), words.numpy().view(np.uint32))
    return words


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Columns in the order of AutoAWQ's nibbles."""
    return values.reshape(values.shape[0], -1, 8)[:, :, list(ORDER)].reshape(values.shape)


def _plain(values: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_ordered`."""
    back = [ORDER.index(i) for i in range(8)]
    return values.reshape(values.shape[0], -1, 8)[:, :, back].reshape(values.shape)


@dataclass(frozen=True, slots=True)
class AwqDecoder:
    """Reads modules of an AutoAWQ checkpoint.

    Attributes:
        group_size: the config's; -1 is one group.
        symmetric: whether all zero points of the checkpoint are 8.
    """

    group_size: int
    symmetric: bool = False
    format: str = "awq"
    scale_leaf: str = "scales"
    leaves: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})

    @staticmethod
    def of(quantization: Mapping[str, Any], where: str) -> AwqDecoder:
        """From the config's ``quantization_config``, in its old spelling too."""
        version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
        if version != "gemm":
            raise CheckpointError(
                f"AutoAWQ's layout {version} is not read",
                where=where,
                remedy="Save it as version gemm with the tool that made it.",
            )
        bits = integer_in(quantization, where, "bits", "w_bit")
        if bits != BITS:
            raise CheckpointError(f"the config says {bits} bits, and AutoAWQ has {BITS}", where=where)
        return AwqDecoder(integer_in(quantization, where, "group_size", "q_group_size"))

    def is_coded(self, leaves: Mapping[str, TensorInfo]) -> bool:
        return "qweight" in leaves

    def grid(self, module: Module) -> tuple[Grid, tuple[int, int]]:
        qweight = module.info("qweight")
        if len(qweight.shape) != 2 or qweight.dtype != "I32" or not all(qweight.shape):
            raise CheckpointError(f"qweight is {qweight.dtype} {list(qweight.shape)}, not int32 [in, out / 8]")
        in_features, columns = qweight.shape
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise CheckpointError(f"{in_features} input features do not divide into groups of {size}")
        module.require("scales", (in_features // size, 8 * columns), *FLOATS)
        module.require("qzeros", (in_features // size, columns), "I32")
        weights = WeightFormat(
            num_bits=BITS,
            symmetric=self.symmetric,
            group_size=None if self.group_size == -1 else size,
        )
        return Grid(weights=weights, scale_dtype=module.info("scales").dtype), (8 * columns, in_features)

    def is_symmetric(self, module: Module) -> bool:
        return bool((module.read("qzeros") == ALL_MIDDLE).all())

    def steps(self, module: Module, entry: Entry) -> Steps:
        scales = module.read("scales").T.contiguous()
        if self.symmetric:
            return Steps(scales=scales)
        unsigned = _plain(unpack_rows(module.read("qzeros"), BITS, entry.shape[0]))
        return Steps(scales=scales, zero_points=(unsigned.T.to(torch.int8) - MIDDLE).contiguous())

    def words(self, module: Module, entry: Entry) -> torch.Tensor:
        return unpack_columns(module.read("qweight"))


@dataclass(frozen=True, slots=True)
class AwqEncoder:
    """Writes modules as AutoAWQ does."""

    format: str = "awq"

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        coded = [e for e in source.entries.values() if e.grid is not None]
        size = _commonest_size(coded)
        return [o for e in coded for o in (_obstacle(e, facts[e.name], size),) if o is not None]

    def scale_dtype(self, source: Source, facts: Mapping[str, Facts]) -> str | None:
        return "F16"

    def stored(self, entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
        assert entry.grid is not None
        out_features, in_features = entry.shape
        groups = entry.grid.weights.groups(in_features)
        columns = words_in(out_features, BITS)
        return {
            "qweight": ("I32", (in_features, columns)),
            "qzeros": ("I32", (groups, columns)),
            "scales": ("F16", (groups, out_features)),
        }

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        scales, zeros = weight.steps.scales, weight.steps.zero_points
        if zeros is None:
            qzeros = torch.full((scales.shape[1], scales.shape[0] // 8), ALL_MIDDLE, dtype=torch.int32)
        else:
            qzeros = pack_rows(_ordered((zeros.T + MIDDLE).to(torch.uint8)), BITS)
        return {
            "qweight": pack_columns(weight.words, weight.in_features),
            "qzeros": qzeros,
            "scales": scales.T.contiguous(),
        }

    def config(self, source: Source, entries: Sequence[Entry]) -> Mapping[str, Any]:
        coded = [e for e in entries if e.grid is not None]
        size = _commonest_size(coded)
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": -1 if size is None else size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain_modules(source),
        }

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        dense = Counter(e.dtype for e in entries if e.grid is None)
        if dense.most_common(1) and dense.most_common(1)[0][0] == "BF16":
            kernels = "AutoAWQ's own kernels compute in float16; this checkpoint's other weights are bfloat16, "
            return [*unrounded(source), kernels + "which vLLM runs and transformers casts"]
        return unrounded(source)


def _commonest_size(coded: Sequence[Entry]) -> int | None:
    """The group size that most weights have; a checkpoint has one."""
    sizes = Counter(e.grid.weights.group_size for e in coded if e.grid is not None)
    return sizes.most_common(1)[0][0]


def _obstacle(entry: Entry, facts: Facts, size: int | None) -> Obstacle | None:
    assert entry.grid is not None
    grid, (out_features, in_features) = entry.grid, entry.shape
    if out_features % 8:
        return Obstacle(
            name=entry.name,
            reason=f"{out_features} outputs do not fill words of eight codes",
            remedy="Convert to compressed-tensors.",
        )
    width = size if size is not None and in_features % size == 0 else None
    symmetric = grid.weights.symmetric
    nearest = Grid(weights=WeightFormat(num_bits=BITS, symmetric=symmetric, group_size=width), scale_dtype="F16")
    if width != size:
        return Obstacle(name=entry.name, reason=f"{in_features} inputs do not divide into groups of {size}")
    exact = replace(grid, scale_dtype="F16", activations=None)
    if exact != nearest:
        return Obstacle(
            name=entry.name, reason=f"AutoAWQ has {nearest.words()}, and this is {grid.words()}", grid=nearest
        )
    if "F16" not in facts.exact_in:
        lost = "" if "F16" in facts.finite_in else ", and some would overflow or vanish"
        return Obstacle(
            name=entry.name,
            reason=f"its {grid.scale_dtype} scales are not all float16 numbers{lost}",
            grid=nearest if "F16" in facts.finite_in else None,
            remedy="" if "F16" in facts.finite_in else "Convert to compressed-tensors, which stores any float.",
        )
    return None
