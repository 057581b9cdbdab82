"""Moves outliers of a stage's input into the weights behind it, out of a norm or of an earlier Linear.

What is computed is in ``methods.smoothing``; here is what becomes of a block: its modules, the second moment, the
tensors and the records that are written.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from halfbyte.gpu import wait_for_copies
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.smoothing import (
    STRENGTHS,
    choose_strength,
    divided_scales,
    expressible,
    factors_of,
    gain_offset,
)
from halfbyte.pairs import Pair
from halfbyte.ranks import Ranks
from halfbyte.records import LinearRecord, PairRecord, SmoothingRecord, TuningRecord, ranges_of
from halfbyte.schemes import Scheme
from halfbyte.sequential import Outliers, Walk
from halfbyte.statistics import SecondMoment


@dataclass(slots=True)
class Solved:
    """What became of a block: its Linears, and small tensors that are no longer the source's."""

    linears: dict[str, tuple[LinearRecord, QuantizedWeight]]
    rewritten: dict[str, torch.Tensor] = field(default_factory=dict)
    smoothing: list[SmoothingRecord] = field(default_factory=list)
    pairs: list[PairRecord] = field(default_factory=list)
    tuning: list[TuningRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Smoother:
    """What is needed to smooth a block's stages.

    Attributes:
        block, modules: its modules, the Linears by name.
        prefix: of the block's names in the checkpoint, with the dot.
        schemes: of the Linears; dtypes: what the checkpoint's tensors are stored in.
        ranks: the first decides.
    """

    block: nn.Module
    modules: Mapping[str, nn.Linear]
    prefix: str
    schemes: Mapping[str, Scheme]
    dtypes: Mapping[str, torch.dtype]
    ranks: Ranks

    def smooth(self, walk: Walk, moment: SecondMoment, solved: Solved) -> None:
        """Smooth the input whose moment was given last, where that lowers its Linears' output error."""
        outliers = walk.outliers()
        activations = self.schemes[moment.names[0]].activations
        if outliers is None or activations is None or activations.kind != "int":
            return
        if isinstance(outliers.origin, Pair):
            self._through_linear(outliers, outliers.origin, walk, moment, solved)
        else:
            self._through_norm(outliers, outliers.origin, moment, solved)

    def _through_norm(self, outliers: Outliers, path: str, moment: SecondMoment, solved: Solved) -> None:
        """The norm's gain is divided."""
        norm = self.block.get_submodule(path)
        offset = gain_offset(norm, moment.hessian.shape[0])
        if offset is None:
            return
        tensor = f"{self.prefix}{path}.weight"
        stored = self.dtypes[tensor]
        gain = norm.get_parameter("weight").detach().float().cpu() + offset
        largest, largest_weight = outliers.largest.cpu(), self._largest_weight(moment.names)
        candidates = [expressible(gain, factors_of(largest, largest_weight, a), offset, stored) for a in STRENGTHS]
        best = self._best(moment.names, outliers, [f for _, f in candidates])
        if STRENGTHS[best] == 0:
            return
        weight, factors = candidates[best]
        norm.get_parameter("weight").data.copy_(weight)
        self._multiply(moment, factors)
        solved.rewritten[tensor] = weight.to(stored)
        solved.smoothing.append(
            SmoothingRecord(norm=tensor, offset=offset, linears=list(moment.names), strength=STRENGTHS[best])
        )

    def _through_linear(self, outliers: Outliers, pair: Pair, walk: Walk, moment: SecondMoment, solved: Solved) -> None:
        """The output channels of a Linear that is quantised already are divided: its scales, and its bias."""
        module, (record, result) = self.modules[pair.source], solved.linears[pair.source]
        wait_for_copies(moment.hessian.device)
        rows = module.out_features
        if result.scales.shape[0] != rows:
            return
        bias, tensor = None, f"{pair.source}.bias"
        if module.bias is not None:
            bias = module.bias.detach().to("cpu", self.dtypes[tensor])
        largest = pair.to_source(outliers.largest.cpu(), rows)
        largest_weight = pair.to_source(self._largest_weight(moment.names), rows)
        candidates = [divided_scales(result.scales, factors_of(largest, largest_weight, a), bias) for a in STRENGTHS]
        best = self._best(moment.names, outliers, [pair.to_columns(f, 1.0) for _, f in candidates])
        if STRENGTHS[best] == 0:
            return
        scales, factors = candidates[best]
        result = replace(result, scales=scales)
        solved.linears[pair.source] = (record, result)
        module.weight.data.copy_(result.dense())
        if bias is not None:
            divided = (bias.float() / factors).to(bias.dtype)
            module.bias.data.copy_(divided)
            solved.rewritten[tensor] = divided
        walk.divided(pair, factors)
        self._multiply(moment, pair.to_columns(factors, 1.0))
        solved.pairs.append(
            PairRecord(
                source=pair.source,
                linears=list(moment.names),
                strength=STRENGTHS[best],
                channels=ranges_of(pair.channels),
                factors=base64.b64encode(factors.numpy().astype("<f4").tobytes()).decode(),
            )
        )

    def _largest_weight(self, names: Sequence[str]) -> torch.Tensor:
        """``max_i |W_ij|`` over all rows of Linears with the same input, ``[in]`` float32."""
        return torch.stack([self.modules[n].weight.detach().float().abs().amax(0) for n in names]).amax(0).cpu()

    def _best(self, names: Sequence[str], outliers: Outliers, factors: Sequence[torch.Tensor]) -> int:
        """Which factors ``[in]`` leave the least output error."""
        activations = self.schemes[names[0]].activations
        assert activations is not None
        weights = [self.modules[n].weight.detach().float().cpu() for n in names]
        formats = [self.schemes[n].weights for n in names]
        scale_dtype, sample = self.dtypes[f"{names[0]}.weight"], torch.cat(outliers.sample)
        return self.ranks.decide(lambda: choose_strength(weights, formats, activations, scale_dtype, sample, factors))

    def _multiply(self, moment: SecondMoment, factors: torch.Tensor) -> None:
        """Multiply the columns of the Linears by factors ``[in]``, their input being divided."""
        factors = factors.to(moment.hessian.device)
        for name in moment.names:
            weight = self.modules[name].weight
            weight.data.mul_(factors.to(weight.dtype))
        moment.hessian.div_(factors).div_(factors[:, None])
