"""Mixed precision: which Linears share a choice, how a budget of bits is spent on them, and how a config says so.

A *unit* is what engines need alike: q/k/v, gate/up, all experts of a block; any other Linear is one of its own. The
recipe's scheme is what every unit has at least; the choice is which get W8A16 instead (:func:`halfbyte.recipe.wider`).
Bits are counted as they are stored: codes, scales and ``weight_shape``, over all quantised weights.

Does not cover: measuring what a unit is worth (``sensitivity``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.architectures import FUSED, BlockMap
from halfbyte.checkpoint.layout import TensorSpec
from halfbyte.checkpoint.reader import TensorInfo
from halfbyte.errors import UsageError
from halfbyte.packing import stored_tensors
from halfbyte.recipe import SchemeGroup, wider
from halfbyte.schemes import Scheme

# vLLM gives all projections of all experts of a block one scheme.
EXPERTS = re.compile(r"^(?P<mixture>.+\.experts)\.\d+\.")
# Sensitivities are measured on 2 to 4 sequences of at most so many tokens: as many hidden states travel through the
# blocks as there are units, so the more units, the fewer sequences.
MEASURED_SEQ_LEN = 256
MEASURED_SEQUENCES = (2, 4)
MEASURED_STATES = 512
# Most places that the budget is cut into; beyond, costs are rounded up.
PLACES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Linears that get one scheme.

    Attributes:
        block: index of their decoder block; linears: module names.
        weights: how many they hold.
        size_bytes: stored in the recipe's scheme; wider_bytes: stored in W8A16.
    """

    block: int
    linears: tuple[str, ...]
    weights: int
    size_bytes: int
    wider_bytes: int

    @property
    def extra_bytes(self) -> int:
        return self.wider_bytes - self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all quantised Linears may take together.

    Attributes:
        units: what there is to choose among.
        weights: of all quantised Linears; size_bytes: of them, stored in the recipe's schemes.
        target_bits: stored bits a weight, at most.
    """

    units: tuple[Unit, ...]
    weights: int
    size_bytes: int
    target_bits: float

    @property
    def lowest_bits(self) -> float:
        return 8 * self.size_bytes / self.weights

    @property
    def highest_bits(self) -> float:
        return 8 * (self.size_bytes + sum(u.extra_bytes for u in self.units)) / self.weights

    @property
    def extra_bytes(self) -> int:
        """What can be spent besides :attr:`size_bytes`: at most the target; nothing where that is out of reach."""
        if self.problem() is not None:
            return 0
        whole = math.floor(self.target_bits * self.weights / 8)
        # What counts is the quotient as it is reported, to the last bit of a double.
        most = next(n for n in (whole + 1, whole, whole - 1) if 8 * n / self.weights <= self.target_bits)
        return max(0, min(most - self.size_bytes, sum(u.extra_bytes for u in self.units)))

    def problem(self) -> UsageError | None:
        """The target out of reach."""
        if self.lowest_bits <= self.target_bits <= self.highest_bits:
            return None
        low, high = math.ceil(1000 * self.lowest_bits) / 1000, math.floor(1000 * self.highest_bits) / 1000
        return UsageError(
            f"{self.target_bits:g} bits a weight, scales included, cannot be reached",
            where=f"--target-bits {self.target_bits:g}",
            why=f"the recipe's schemes take {low:.3f}, and 8 bits everywhere {high:.3f}",
            remedy=f"Choose between {low:.3f} and {high:.3f}.",
        )

    def reached_bits(self, chosen: set[int]) -> float:
        """Stored bits a weight when these units are wider."""
        return 8 * (self.size_bytes + sum(self.units[i].extra_bytes for i in chosen)) / self.weights


def stored_bytes(scheme: Scheme, info: TensorInfo) -> int:
    """What a Linear's weight takes on disk in a scheme."""
    out_features, in_features = info.shape
    stored = stored_tensors(scheme, (out_features, in_features), info.dtype)
    return sum(TensorSpec(name=leaf, dtype=d, shape=s).size_bytes for leaf, (d, s) in stored.items())


def budget_of(
    blocks: BlockMap, schemes: Mapping[str, Scheme], tensors: Mapping[str, TensorInfo], target_bits: float
) -> Budget:
    """The units of a checkpoint and what they take.

    Args:
        blocks: where the Linears are.
        schemes: of each Linear that is quantised, by the recipe.
        tensors: headers, by tensor name.
        target_bits: stored bits a weight, at most.
    """
    units = []
    for index, names in enumerate(blocks.linears):
        together: dict[str, list[str]] = {}
        for name in names:
            if name in schemes and wider(schemes[name]) is not None:
                together.setdefault(unit_key(name), []).append(name)
        for members in together.values():
            infos = {n: tensors[f"{n}.weight"] for n in members}
            unit = Unit(
                block=index,
                linears=tuple(members),
                weights=sum(i.numel for i in infos.values()),
                size_bytes=sum(stored_bytes(schemes[n], i) for n, i in infos.items()),
                wider_bytes=sum(stored_bytes(wider(schemes[n]) or schemes[n], i) for n, i in infos.items()),
            )
            units.append(unit)
    everything = {n: tensors[f"{n}.weight"] for n in schemes}
    return Budget(
        units=tuple(units),
        weights=sum(i.numel for i in everything.values()),
        size_bytes=sum(stored_bytes(schemes[n], i) for n, i in everything.items()),
        target_bits=target_bits,
    )


def unit_key(name: str) -> str:
    """Equal for Linears that engines need alike."""
    mixture = EXPERTS.match(name)
    if mixture is not None:
        return mixture["mixture"]
    parent, _, leaf = name.rpartition(".")
    kin = next((members for members in FUSED if leaf in members), None)
    return name if kin is None else f"{parent}.{'/'.join(sorted(kin))}"


def measured_sequences(units: int) -> int:
    """How many sequences sensitivities are measured on."""
    least, most = MEASURED_SEQUENCES
    return max(least, min(most, MEASURED_STATES // max(1, units)))


def choose(gains: Sequence[float], costs: Sequence[int], room: int) -> set[int]:
    """The set with the largest sum of gains whose costs do not exceed ``room`` (the 0/1 knapsack).

    ``argmax_S sum_{i in S} g_i`` with ``sum_{i in S} c_i <= room``, by dynamic programming over the room in steps of
    the costs' greatest common divisor, so exactly: a model's units come in few sizes. Where that takes more than
    :data:`PLACES` steps, costs are rounded up to coarser ones, and what is left is filled by gain a byte. What gains
    nothing is never chosen. Equal inputs give equal sets.

    Args:
        gains: not negative.
        costs: whole numbers, positive.
        room: what can be spent.
    """
    step = max(math.gcd(*costs), 1)
    if room // step > PLACES:
        step = -(-room // PLACES)
    places = max(room, 0) // step
    best = np.zeros(places + 1)
    taken = np.zeros((len(gains), places + 1), dtype=bool)
    sizes = [-(-cost // step) for cost in costs]
    for i, (gain, size) in enumerate(zip(gains, sizes, strict=True)):
        if size <= places:
            with_it = best[: places + 1 - size] + gain
            taken[i, size:] = with_it > best[size:]
            best[size:] = np.maximum(with_it, best[size:])
    chosen: set[int] = set()
    place = places
    for i in reversed(range(len(gains))):
        if taken[i, place]:
            chosen.add(i)
            place -= sizes[i]
    left = room - sum(costs[i] for i in chosen)
    for i in sorted(range(len(gains)), key=lambda i: (-gains[i] / costs[i], i)):
        if i not in chosen and gains[i] > 0 and costs[i] <= left:
            chosen.add(i)
            left -= costs[i]
    return chosen


def groups_of(blocks: BlockMap, schemes: Mapping[str, Scheme]) -> tuple[SchemeGroup, ...]:
    """Recipe groups that give each Linear its scheme, by patterns of which no two cover the same name.

    One pattern a set of blocks: ``re:.*\\blayers\\.(?:0|3)\\.(?:mlp\\.down_proj|self_attn\\.o_proj)$``. It starts after
    the prefixes, in which files, transformers and vLLM differ, and leaves numbers of experts open. ``Linear`` is no
    target, because vLLM prefers it to patterns where it has fused Linears into one.

    Args:
        blocks: where the Linears are.
        schemes: of each Linear that is quantised.
    """
    tails: dict[Scheme, dict[str, set[int]]] = {}
    # gpt-oss, whose attention vLLM calls attn.
    sinks = any(name.endswith(".self_attn.sinks") for names in blocks.others for name in names)
    for index, names in enumerate(blocks.linears):
        for name in names:
            if name in schemes:
                tail = name.removeprefix(f"{blocks.prefix}.{index}.")
                pattern = tail_pattern(tail)
                if sinks:
                    pattern = re.sub(r"^self_attn\b", "(?:self_)?attn", pattern)
                tails.setdefault(schemes[name], {}).setdefault(pattern, set()).add(index)
    ordered = sorted(tails, key=lambda s: (s.weights.num_bits, s.name, s.weights.group_size or 0))
    return tuple(SchemeGroup(scheme=s, targets=tuple(_patterns(blocks, tails[s]))) for s in ordered)


def tail_pattern(tail: str) -> str:
    """A module's name in its block as a regular expression, with any number for an expert's."""
    parts = tail.split(".")
    return r"\.".join(
        r"\d+" if part.isdigit() and i and parts[i - 1] == "experts" else re.escape(part)
        for i, part in enumerate(parts)
    )


def _patterns(blocks: BlockMap, tails: Mapping[str, set[int]]) -> list[str]:
    by_blocks: dict[tuple[int, ...], list[str]] = {}
    for tail, indices in sorted(tails.items()):
        by_blocks.setdefault(tuple(sorted(indices)), []).append(tail)
    layers = re.escape(blocks.prefix.rpartition(".")[2])
    found = []
    for where, together in sorted(by_blocks.items()):
        which = r"\d+" if len(where) == blocks.num_blocks else _either([str(i) for i in where])
        found.append(rf"re:.*\b{layers}\.{which}\.{_either(together)}$")
    return found


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
