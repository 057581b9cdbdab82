"""Moves outliers of a stage's input into the weights behind it, out of a norm or of an earlier Linear.

What is computed is in ``methods.smoothing``; here is what becomes of a block: its modules, the second moment, the
tensors and the records that are written.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from halfbyte.gpu import wait_for_copies
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.smoothing import (
    STRENGTHS,
    choose_strength,
    column_energies,
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

# What the source of a stage's input will have stored, and the exact factors of its channels.
Candidate = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class Solved:
    """What became of a block.

    Attributes:
        linears: by name; rewritten: small tensors that are no longer the source's, as they are stored.
        weights: where codes will be tuned, what Linears' codes stand for, ``[out, in]`` in the dtype of blocks: the
            source's, smoothed.
    """

    linears: dict[str, tuple[LinearRecord, QuantizedWeight]]
    rewritten: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    smoothing: list[SmoothingRecord] = field(default_factory=list)
    pairs: list[PairRecord] = field(default_factory=list)
    tuning: list[TuningRecord] = field(default_factory=list)
    solver_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Smoother:
    """What is needed to smooth a block's stages.

    Attributes:
        block, modules: its modules, the Linears by name.
        on_disk: how the checkpoint spells a parameter of the block.
        schemes: of the Linears; dtypes: what the checkpoint's tensors are stored in.
        ranks: the first decides.
    """

    block: nn.Module
    modules: Mapping[str, nn.Linear]
    on_disk: Callable[[str], str]
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
        tensor = self.on_disk(f"{path}.weight")
        stored = self.dtypes[tensor]
        gain = norm.get_parameter("weight").detach().float().cpu() + offset

        def candidates(x: torch.Tensor, w: torch.Tensor) -> list[Candidate]:
            return [expressible(gain, factors_of(x, w, a), offset, stored) for a in STRENGTHS]

        chosen = self._chosen(moment.names, outliers, candidates, lambda of_columns: of_columns, lambda f: f)
        if chosen is None:
            return
        strength, weight, factors = chosen
        norm.get_parameter("weight").data.copy_(weight)
        self._multiply(moment, factors)
        solved.rewritten[tensor] = weight.to(stored)
        solved.smoothing.append(
            SmoothingRecord(norm=tensor, offset=offset, linears=list(moment.names), strength=strength)
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

        def candidates(x: torch.Tensor, w: torch.Tensor) -> list[Candidate]:
            return [divided_scales(result.scales, factors_of(x, w, a), bias) for a in STRENGTHS]

        chosen = self._chosen(
            moment.names,
            outliers,
            candidates,
            lambda of_columns: pair.to_source(of_columns, rows),
            lambda f: pair.to_columns(f, 1.0),
        )
        if chosen is None:
            return
        strength, scales, factors = chosen
        result = replace(result, scales=scales)
        solved.linears[pair.source] = (record, result)
        module.weight.data.copy_(result.dense())
        if pair.source in solved.weights:
            solved.weights[pair.source].div_(factors.to(module.weight.device)[:, None])
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
                strength=strength,
                channels=ranges_of(pair.channels),
                factors=base64.b64encode(factors.numpy().astype("<f4").tobytes()).decode(),
            )
        )

    def _chosen(
        self,
        names: Sequence[str],
        outliers: Outliers,
        candidates: Callable[[torch.Tensor, torch.Tensor], list[Candidate]],
        to_source: Callable[[torch.Tensor], torch.Tensor],
        to_columns: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[float, torch.Tensor, torch.Tensor] | None:
        """The first rank's choice: a strength with its candidate, ``None`` where no smoothing is best.

        Args:
            names: the Linears with this input.
            candidates: for each strength, from how large inputs and weights are for each channel of the source: what
                the source will have stored, and the factors.
            to_source: sums over columns, for the source's channels; to_columns: its factors, for columns.
        """
        activations = self.schemes[names[0]].activations
        assert activations is not None

        def choose() -> tuple[float, torch.Tensor, torch.Tensor] | None:
            weights = [self.modules[n].weight.detach().float().cpu() for n in names]
            formats = [self.schemes[n].weights for n in names]
            sample = torch.cat(outliers.sample)
            x = to_source(outliers.fourth.cpu()) ** 0.25
            found = candidates(x, to_source(column_energies(weights, sample)).sqrt())
            factors = [to_columns(f) for _, f in found]
            best = choose_strength(weights, formats, activations, self.dtypes[f"{names[0]}.weight"], sample, factors)
            return None if STRENGTHS[best] == 0 else (STRENGTHS[best], *found[best])

        return self.ranks.decide(choose)

    def _multiply(self, moment: SecondMoment, factors: torch.Tensor) -> None:
        """Multiply the columns of the Linears by factors ``[in]``, their input being divided."""
        factors = factors.to(moment.hessian.device)
        for name in moment.names:
            self.modules[name].weight.data.mul_(factors)  # in float32, rounded once
        moment.hessian.div_(factors).div_(factors[:, None])
