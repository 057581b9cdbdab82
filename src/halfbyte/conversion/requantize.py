"""Fitting a coded weight to the grid of a target: exactly where it can be, else by rounding again.

Where only the dtype of scales differs, codes stay and scales are rounded; else the weight is rounded to nearest on a
min-max grid (:mod:`halfbyte.methods.rtn`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.checkpoint.reader import DTYPES
from halfbyte.conversion.coded import CodedWeight, Grid, Steps
from halfbyte.methods.rtn import quantize_rtn

STRIP_ELEMENTS = 1 << 22


def with_scales(weight: CodedWeight, grid: Grid) -> CodedWeight:
    """The same codes with scales in the grid's dtype."""
    scales = weight.steps.scales
    if scales.dtype == DTYPES[grid.scale_dtype]:
        return weight if weight.grid == grid else replace(weight, grid=grid)
    return replace(weight, grid=grid, steps=replace(weight.steps, scales=scales.to(DTYPES[grid.scale_dtype])))


def requantized(weight: CodedWeight, grid: Grid) -> tuple[CodedWeight, float]:
    """The nearest weight on another grid, and ``||W' - W|| / ||W||`` (Frobenius; 0 for a weight of zeros)."""
    if replace(weight.grid, scale_dtype=grid.scale_dtype) == grid:
        fitted = with_scales(weight, grid)
    else:
        rounded = quantize_rtn(weight.dense(), grid.weights, DTYPES[grid.scale_dtype])
        steps = Steps(scales=rounded.scales, zero_points=rounded.zero_points)
        fitted = CodedWeight.of_codes(grid, rounded.codes, steps)
    return fitted, relative_error(weight, fitted)


def relative_error(weight: CodedWeight, fitted: CodedWeight) -> float:
    """``||fitted - weight|| / ||weight||`` in float64, some rows at a time."""
    error = energy = 0.0
    step = max(1, STRIP_ELEMENTS // weight.in_features)
    for first in range(0, weight.out_features, step):
        rows = slice(first, first + step)
        before = weight.dense(rows)
        energy += float(before.square().sum(dtype=torch.float64))
        error += float((fitted.dense(rows) - before).square_().sum(dtype=torch.float64))
    return (error / energy) ** 0.5 if energy else 0.0
