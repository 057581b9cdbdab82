"""Second moments of experts' inputs: a layer of experts walked through group by group.

What enters a layer of experts is known before any of them is quantised: tokens, and the experts that the router sends
each to. So this takes the layer's inputs once, and then, for a few experts at a time, observes what enters gate and up,
has them quantised, observes what enters down, has it quantised, and adds the group's part to the layer's output. Only
one group's Hessians exist at a time, and, where the layer is larger than memory, only one group's weights.

An expert that fewer tokens reach than its inputs are wide has a Hessian of low rank, which says more about the
calibration text than about the expert. For such a rare expert the layer's tokens count too, wherever the router sends
them, see ``methods.pooled``: for gate and up through the second moment of all that enters the layer, for down through
that of the expert's own hidden units for a sample of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.activations import fake_quantize_activations
from halfbyte.estimates import group_size
from halfbyte.experts import Expert, Experts
from halfbyte.methods.pooled import add_layer, is_rare, layer_worth
from halfbyte.ranks import Ranks
from halfbyte.schemes import ActivationFormat
from halfbyte.statistics import SecondMoment

# Tokens that rare experts' hidden units are computed for.
SAMPLE = 4096

Entering = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """A layer of experts that are to be quantised.

    Attributes:
        module: the experts.
        names: for each expert, the caller's names of its Linears by what they are called in it.
    """

    module: Experts
    names: Sequence[Mapping[str, str]]

    def linears(self, number: int) -> dict[str, nn.Linear]:
        """One expert's, by the caller's names."""
        return {name: self.module[number].get_submodule(leaf) for leaf, name in self.names[number].items()}  # type: ignore[misc]

    @property
    def widths(self) -> tuple[int, int]:
        """The model's and an expert's."""
        first = self.module[0]
        assert isinstance(first, Expert)
        return first.gate_proj.in_features, first.down_proj.in_features


def complete(moment: SecondMoment, everybody: SecondMoment) -> None:
    """Add what the layer's tokens are worth."""
    add_layer(moment.hessian, everybody.hessian, everybody.tokens)
    moment.pooled = layer_worth(moment.hessian.shape[0], everybody.tokens)


def linear(module: nn.Linear, x: torch.Tensor, fmt: ActivationFormat | None) -> torch.Tensor:
    """A Linear's output, its input rounded as an engine would where it does."""
    seen = x if fmt is None else fake_quantize_activations(x, fmt)
    return nn.functional.linear(seen, module.weight, module.bias)


@dataclass(slots=True)
class RoutedWalk:
    """A way through one layer of experts.

    Attributes:
        layer: what is walked.
        entering: gives batch ``i``'s tokens ``[tokens, hidden]``, experts ``[tokens, k]`` and weights ``[tokens, k]``.
        rows: which positions are tokens and not padding, ``None`` for all.
        add: adds to batch ``i``'s output ``[tokens, hidden]``.
        rare: experts with fewer tokens are rare; ``None``: with fewer than a Linear has inputs.
        everything: let every expert's statistic see all tokens, wherever they are sent (Llama 4 weighs inputs by where
            they are sent, so its experts see their own in any case).
    """

    layer: ExpertLayer
    entering: Callable[[int], Entering]
    rows: Sequence[torch.Tensor | None]
    add: Callable[[int, torch.Tensor], None]
    device: torch.device
    formats: Mapping[str, ActivationFormat]
    ranks: Ranks
    rare: int | None
    everything: bool = False
    tokens: list[int] = field(default_factory=list)

    def moments(self) -> Iterator[list[SecondMoment]]:
        """Group by group: of gates and ups, then of downs; the caller quantises before taking the next."""
        hidden, intermediate = self.layer.widths
        counts, pool = self._survey(hidden)
        self.tokens = counts.tolist()
        for group in self._groups(max(hidden, intermediate)):
            with contextlib.ExitStack() as held:
                experts = [held.enter_context(self.layer.module.present(number)) for number in group]
                if self._sees_everything:
                    yield [self._shared(experts, pool)]
                else:
                    first = self._observed(experts, hidden, ("gate_proj", "up_proj"), self._entered)
                    for expert, moment in zip(experts, first, strict=True):
                        moment.rare = self._is_rare(expert, hidden)
                        if moment.rare:
                            complete(moment, pool)
                    yield first
                second = self._observed(experts, intermediate, ("down_proj",), self._activated)
                for expert, moment in zip(experts, second, strict=True):
                    moment.rare = self._is_rare(expert, intermediate)
                    if moment.rare:
                        complete(moment, self._of_everybody(expert, intermediate))
                yield second
                for batch in range(len(self.rows)):
                    self.add(batch, self._part(experts, batch))

    @property
    def _sees_everything(self) -> bool:
        """Whether all experts' gates and ups have one input: not where the router weighs it for each."""
        return self.everything and not self.layer.module.weighs_inputs

    def _shared(self, experts: Sequence[Expert], pool: SecondMoment) -> SecondMoment:
        """What enters a layer, for all gates and ups of a group."""
        moment = SecondMoment(names=[], hessian=pool.hessian.clone(), tokens=pool.tokens)
        moment.names.extend(self.layer.names[e.number][leaf] for e in experts for leaf in ("gate_proj", "up_proj"))
        return moment

    def _survey(self, hidden: int) -> tuple[torch.Tensor, SecondMoment]:
        """Tokens of each expert over all ranks, and the moment of all that enters the layer, ``sum_e H_e``."""
        counts = torch.zeros(len(self.layer.module), dtype=torch.float64, device=self.device)
        pool = SecondMoment.empty(hidden, self.device)
        for batch in range(len(self.rows)):
            x, index, weights = self._tokens(batch)
            used = index[index < len(counts)]
            counts += torch.bincount(used, minlength=len(counts))[: len(counts)].to(counts)
            if self.layer.module.weighs_inputs:
                for place in range(index.shape[1]):
                    rows = torch.arange(len(x), device=x.device)
                    pool.add(self.layer.module.entering(x, weights, rows, torch.full_like(rows, place)))
            else:
                pool.add(x)
        if not self.layer.module.weighs_inputs and not self.everything and self.rows:
            top = self._tokens(0)[1].shape[1]
            pool.hessian *= top
            pool.tokens *= top
        self.ranks.add_(counts)
        pool.unite(self.ranks)
        return counts.to(torch.int64), pool

    def _tokens(self, batch: int) -> Entering:
        x, index, weights = self.entering(batch)
        rows = self.rows[batch]
        if rows is None:
            return x, index, weights
        real = rows.to(x.device)
        return x[real], index[real], weights[real]

    def _groups(self, width: int) -> Iterator[list[int]]:
        """As many experts at a time as there is room for."""
        most = group_size(width)
        for start in range(0, len(self.tokens), most):
            yield list(range(start, min(start + most, len(self.tokens))))

    def _observed(
        self,
        experts: Sequence[Expert],
        width: int,
        leaves: Sequence[str],
        seen: Callable[[Expert, torch.Tensor], torch.Tensor],
    ) -> list[SecondMoment]:
        moments = []
        for expert in experts:
            moment = SecondMoment.empty(width, self.device)
            moment.names.extend(self.layer.names[expert.number][leaf] for leaf in leaves)
            moments.append(moment)
        for batch in range(len(self.rows)):
            x, index, weights = self._tokens(batch)
            for expert, moment in zip(experts, moments, strict=True):
                if self._sees_everything:
                    moment.add(seen(expert, x))
                    continue
                rows, place = torch.where(index == expert.number)
                if len(rows):
                    moment.add(seen(expert, self.layer.module.entering(x, weights, rows, place)))
        for moment in moments:
            moment.unite(self.ranks)
        return moments

    def _entered(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        return x

    def _activated(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        names = self.layer.names[expert.number]
        gate, up = (
            linear(module, x, self.formats.get(names[leaf]))
            for leaf, module in (("gate_proj", expert.gate_proj), ("up_proj", expert.up_proj))
        )
        return expert.act(gate, up)

    def _is_rare(self, expert: Expert, width: int) -> bool:
        tokens = self.tokens[expert.number]
        if self._sees_everything:
            return False
        return is_rare(tokens, width) if self.rare is None else tokens < self.rare

    def _of_everybody(self, expert: Expert, width: int) -> SecondMoment:
        """An expert's hidden units for a sample of all that enters the layer, spread over the batches."""
        moment = SecondMoment.empty(width, self.device)
        batches = sum(self.ranks.gather(len(self.rows)))
        for batch in range(len(self.rows)):
            x, _, weights = self._tokens(batch)
            wanted = max(1, -(-SAMPLE // batches))
            sample = x[:: max(1, len(x) // wanted)][:wanted]
            if self.layer.module.weighs_inputs:
                sample = sample * weights.mean().to(sample.dtype)
            moment.add(self._activated(expert, sample))
        moment.unite(self.ranks)
        return moment

    def _part(self, experts: Sequence[Expert], batch: int) -> torch.Tensor:
        """What quantised experts add to a batch's output."""
        x, index, weights = self.entering(batch)
        result = torch.zeros_like(x)
        for expert in experts:
            fmt = self.formats.get(self.layer.names[expert.number]["down_proj"])

            def function(
                given: torch.Tensor, expert: Expert = expert, fmt: ActivationFormat | None = fmt
            ) -> torch.Tensor:
                return linear(expert.down_proj, self._activated(expert, given), fmt)

            self.layer.module.run(expert, function, x, index, weights, result)
        return result
