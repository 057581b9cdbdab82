"""From second moments to quantised Linears: which are solved together, by which process, and what is recorded of each.

Linears with one input (q/k/v; gate/up) share a factorisation. Experts of one layer come as a group with a Hessian each;
they have one shape, so their Hessians are factored, and their columns visited, in one batch, see ``methods.gptq``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.estimates import BATCH_BYTES
from halfbyte.gpu import to_host
from halfbyte.methods.batching import largest_batch, worthwhile
from halfbyte.methods.gptq import Factors, factor_hessian, factor_hessians, quantize_gptq, quantize_gptq_batch
from halfbyte.methods.pooled import shrinkage
from halfbyte.methods.result import QuantizedWeight
from halfbyte.ranks import Ranks
from halfbyte.recipe import Recipe
from halfbyte.records import LinearRecord
from halfbyte.schemes import Scheme
from halfbyte.statistics import SecondMoment

Solution = tuple[LinearRecord, QuantizedWeight]


@dataclass(frozen=True, slots=True)
class Solver:
    """What is needed to solve Linears.

    Attributes:
        schemes: of the Linears; dtypes: what the checkpoint's tensors are stored in.
        recipe: its steps and damping.
        device: where it is done, the CPU where no kernel runs elsewhere.
        ranks: who shares the work.
    """

    schemes: Mapping[str, Scheme]
    dtypes: Mapping[str, torch.dtype]
    recipe: Recipe
    device: torch.device
    ranks: Ranks

    def solve(
        self, moments: Sequence[SecondMoment], modules: Mapping[str, nn.Linear], index: int
    ) -> dict[str, Solution]:
        """Solve the Linears that moments belong to, each by one rank. Their weights are replaced; codes are left in
        main memory (on their way there from a GPU, see ``gpu.wait_for_copies``).

        Args:
            moments: one, or several of one width with Linears of the same shapes; each is used up.
            modules: the Linears by name; index: their block.
        """
        if len(moments) == 1:
            owners = self.ranks.owners([modules[n].weight.shape[0] for n in moments[0].names])
            owner_of = dict(zip(moments[0].names, owners, strict=True))
            mine = [n for n, owner in owner_of.items() if owner == self.ranks.rank]
            solved = self._one_input(mine, moments[0], modules, index) if mine else {}
        else:
            owners = self.ranks.owners([1] * len(moments))
            owner_of = {n: owner for m, owner in zip(moments, owners, strict=True) for n in m.names}
            taken = [m for m, owner in zip(moments, owners, strict=True) if owner == self.ranks.rank]
            solved = {}
            for batch in self._batches(taken, modules):
                solved |= self._batch(batch, modules, index)
        results = {}
        for name, owner in owner_of.items():
            record, result = spread(self.ranks, owner, solved.get(name))
            modules[name].weight.data.copy_(result.dense())
            results[name] = (record, result.map(to_host))
        return results

    def _one_input(
        self, names: Sequence[str], moment: SecondMoment, modules: Mapping[str, nn.Linear], index: int
    ) -> dict[str, Solution]:
        """One factorisation, then each Linear in turn."""
        hessian = moment.take().to(self.device)
        steps = self.recipe.gptq
        factors = factor_hessian(
            hessian,
            self.recipe.damp_fraction,
            where=moment.names[0],
            static_order=steps.static_order,
            shrinkage=self._shrinkage(hessian.shape[0], moment),
        )
        solved = {}
        for name in names:
            weight = modules[name].weight.detach().to(self.device, torch.float32)
            dtype = self.dtypes[f"{name}.weight"]
            result = quantize_gptq(weight, hessian, factors, self.schemes[name].weights, dtype, steps)
            solved[name] = (self._record(name, moment, modules[name], result, factors, 0, index), result)
        return solved

    def _shrinkage(self, width: int, moment: SecondMoment) -> float:
        return self.recipe.gptq.shrinkage * shrinkage(width, moment.tokens + moment.pooled)

    def _batches(
        self, moments: Sequence[SecondMoment], modules: Mapping[str, nn.Linear]
    ) -> Iterator[Sequence[SecondMoment]]:
        if not moments:
            return
        names = moments[0].names
        rows, width = sum(modules[n].out_features for n in names), modules[names[0]].in_features
        fmt, damping = self.schemes[names[0]].weights, self.recipe.damp_fraction
        most = min(len(moments), worthwhile(self.device, torch.get_num_threads()))
        most = largest_batch(most, rows, width, fmt, damping, BATCH_BYTES)
        for start in range(0, len(moments), most):
            yield moments[start : start + most]

    def _batch(
        self, moments: Sequence[SecondMoment], modules: Mapping[str, nn.Linear], index: int
    ) -> dict[str, Solution]:
        """All at once."""
        names, steps = moments[0].names, self.recipe.gptq
        hessians = torch.empty((len(moments), *moments[0].hessian.shape), device=self.device)
        for i, moment in enumerate(moments):
            hessians[i].copy_(moment.take())
        factors = factor_hessians(
            hessians,
            self.recipe.damp_fraction,
            where=[m.names[0] for m in moments],
            static_order=steps.static_order,
            shrinkage=[self._shrinkage(hessians.shape[-1], m) for m in moments],
        )
        weights = torch.stack([torch.cat([modules[n].weight.detach() for n in m.names]) for m in moments])
        results = quantize_gptq_batch(
            weights.to(self.device, torch.float32),
            hessians,
            factors,
            self.schemes[names[0]].weights,
            self.dtypes[f"{names[0]}.weight"],
            steps,
            rows=[modules[n].out_features for n in names],
        )
        return {
            name: (self._record(name, moment, modules[name], result, factors, i, index), result)
            for i, (moment, of_one) in enumerate(zip(moments, results, strict=True))
            for name, result in zip(moment.names, of_one, strict=True)
        }

    def _record(
        self,
        name: str,
        moment: SecondMoment,
        module: nn.Linear,
        result: QuantizedWeight,
        factors: Factors,
        number: int,
        index: int,
    ) -> LinearRecord:
        scheme, item = self.schemes[name], self.dtypes[f"{name}.weight"].itemsize
        rows, columns = module.weight.shape
        return LinearRecord(
            name=name,
            block=index,
            scheme=scheme.name,
            group_size=scheme.weights.group_size,
            method="gptq",
            bits_per_weight=scheme.weights.bits_per_weight(columns, rows, scale_bits=8 * item),
            relative_error=result.relative_error,
            damp_fraction=factors.damp_fractions[number],
            damp_raises=factors.raises[number],
            tokens=moment.tokens,
            pooled=moment.pooled,
            rare=moment.rare,
            dead_columns=int(factors.dead[number].sum()),
        )


def spread(ranks: Ranks, owner: int, solved: Solution | None) -> Solution:
    """What one rank has solved, for all."""
    record, result = solved or (None, None)
    if result is not None and ranks.world > 1:
        result = result.map(torch.Tensor.cpu)
    known = ranks.decide(lambda: record, owner)
    codes = ranks.spread(None if result is None else result.codes, owner)
    scales = ranks.spread(None if result is None else result.scales, owner)
    zeros = ranks.spread(None if result is None else result.zero_points, owner)
    assert known is not None
    assert codes is not None
    assert scales is not None
    return known, QuantizedWeight(codes=codes, scales=scales, zero_points=zeros, relative_error=known.relative_error)
