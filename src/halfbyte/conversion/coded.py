"""One quantised weight between two formats: its codes, scales, zero points and groups, whatever they were stored as.

Codes travel as they are packed along rows (:mod:`halfbyte.conversion.bits`), because most formats differ from that by a
transposition alone; who wants numbers asks for :meth:`CodedWeight.codes`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from halfbyte.conversion.bits import pack_rows, unpack_rows, words_in
from halfbyte.schemes import ActivationFormat, WeightFormat

FLOATS = ("F16", "BF16", "F32")  # safetensors dtypes that scales and dense weights come in


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What a format has to be able to express to hold a weight's codes.

    Attributes:
        weights: bits, symmetry, groups or blocks.
        scale_dtype: safetensors dtype name of the scales.
        ordered: whether input features are dealt to groups by an index (AutoGPTQ's ``g_idx`` of ``desc_act``) rather
            than in runs of ``group_size``.
        activations: how an engine rounds the Linear's input, ``None`` where it does not.
    """

    weights: WeightFormat
    scale_dtype: str
    ordered: bool = False
    activations: ActivationFormat | None = None

    def words(self) -> str:
        """For messages: ``int4, symmetric, groups of 128, F16 scales``."""
        w = self.weights
        unit = f"groups of {w.group_size}" if w.group_size else "blocks" if w.block else "one scale a row"
        kind = "float8" if w.kind == "float" else f"int{w.num_bits}, {'symmetric' if w.symmetric else 'asymmetric'}"
        return f"{kind}, {unit}{', act-order' if self.ordered else ''}, {self.scale_dtype} scales"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What codes are multiplied by: the small part of a weight.

    Attributes:
        scales: ``[out, groups]`` in the stored dtype (blocks: one row for each row of the weight).
        zero_points: ``[out, groups]`` int8, signed as codes are; ``None`` for symmetric weights.
        group_index: ``[in]`` int32, which group an input feature belongs to; ``None`` where groups are runs.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor | None = None
    group_index: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight:
    """One weight ``[out, in]``: ``w = (q - z) * s`` with ``q`` in ``-2**(b-1) .. 2**(b-1) - 1``.

    Attributes:
        grid: its number format.
        in_features: columns of the weight.
        words: int32 ``[out, ceil(in * b / 32)]``, ``q + 2**(b-1)`` packed along rows; for float formats the float8
            codes themselves, ``[out, in]``.
        steps: scales, zero points, groups.
    """

    grid: Grid
    in_features: int
    words: torch.Tensor
    steps: Steps

    @staticmethod
    def of_codes(grid: Grid, codes: torch.Tensor, steps: Steps) -> CodedWeight:
        """From codes ``[out, in]``: int8, signed; float8 for float formats."""
        if grid.weights.kind == "float":
            return CodedWeight(grid=grid, in_features=codes.shape[1], words=codes, steps=steps)
        unsigned = (codes.to(torch.int16) - grid.weights.q_min).to(torch.uint8)
        words = pack_rows(unsigned, grid.weights.num_bits)
        return CodedWeight(grid=grid, in_features=codes.shape[1], words=words, steps=steps)

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    def unsigned(self) -> torch.Tensor:
        """Codes as ``q + 2**(b-1)``, uint8 ``[out, in]``; integer formats alone."""
        return unpack_rows(self.words, self.grid.weights.num_bits, self.in_features)

    def codes(self) -> torch.Tensor:
        """Codes as signed int8 ``[out, in]``; float8 for float formats."""
        if self.grid.weights.kind == "float":
            return self.words
        return (self.unsigned().to(torch.int16) + self.grid.weights.q_min).to(torch.int8)

    def dense(self, rows: slice = slice(None)) -> torch.Tensor:
        """The weight in float32, ``[rows, in]``: exact where the product of code and scale has at most 24 bits."""
        part = replace(
            self,
            words=self.words[rows],
            steps=Steps(
                scales=self.steps.scales[rows],
                zero_points=None if self.steps.zero_points is None else self.steps.zero_points[rows],
                group_index=self.steps.group_index,
            ),
        )
        return part._dense()

    def _dense(self) -> torch.Tensor:
        values = self.codes().to(torch.float32)
        scales, zeros = self.steps.scales.to(torch.float32), self.steps.zero_points
        index = self.steps.group_index
        if index is not None:
            chosen = index.long()
            if zeros is not None:
                values -= zeros.to(torch.float32)[:, chosen]
            return values * scales[:, chosen]
        grouped = values.reshape(values.shape[0], scales.shape[1], -1)
        if zeros is not None:
            grouped -= zeros.to(torch.float32).unsqueeze(-1)
        return (grouped * scales.unsqueeze(-1)).reshape(values.shape)


def words_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int]:
    """Shape of :attr:`CodedWeight.words` of an integer format."""
    return out_features, words_in(in_features, bits)
