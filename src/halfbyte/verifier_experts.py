"""Mixtures of experts in a checkpoint: which Linears are experts, whether a layer has all of them, and all alike.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side. Engines read
quantised experts one by one, under names such as ``model.layers.3.mlp.experts.17.gate_proj``; the path up to
``experts`` is the *layer* here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

EXPERT = re.compile(r"(?P<layer>(?:.+\.)?experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
# What the Linears of an expert are called; Mixtral and Phi have w1, w3 and w2.
GATES, UPS, DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert's Linear stands."""

    layer: str
    number: int
    leaf: str


def place_of(module: str) -> Place | None:
    """The place of a module among experts; ``None`` where it is no expert's Linear."""
    match = EXPERT.fullmatch(module)
    return Place(match["layer"], int(match["number"]), match["leaf"]) if match else None


def numbers_in(path: str) -> tuple[str, ...]:
    """The indices in a module's path, by which a layer of experts is found again under another spelling."""
    return tuple(re.findall(r"(?<=\.)\d+(?=\.|$)", path))


@dataclass(frozen=True, slots=True)
class Fused:
    """Experts that a model holds in two stacks, ``gate_up_proj`` and ``down_proj``.

    Attributes:
        path: of the module.
        count: how many experts there are.
        hidden, intermediate: widths; an expert's gate and up are ``[intermediate, hidden]``.
        transposed: whether the stacks hold ``[in, out]``.
    """

    path: str
    count: int
    hidden: int
    intermediate: int
    transposed: bool

    def shape_of(self, leaf: str) -> tuple[int, int] | None:
        if leaf in DOWNS:
            return self.hidden, self.intermediate
        return (self.intermediate, self.hidden) if leaf in GATES + UPS else None


def transposed_pair(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Whether one expert's matrices ``gate_up`` and ``down`` are ``[in, out]``; ``None`` where they fit neither way.

    Either may be square, but never both: ``[2 I, H]`` is if H = 2 I, ``[H, I]`` if H = I.
    """
    if gate_up == (2 * down[1], down[0]):
        return False
    return True if gate_up == (down[1], 2 * down[0]) else None


def fused_of(path: str, gate_up: tuple[int, ...], down: tuple[int, ...]) -> Fused | None:
    """What a module with stacks of these shapes holds; ``None`` where they do not belong together."""
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    transposed = transposed_pair(gate_up[1:], down[1:])
    if transposed is None:
        return None
    intermediate, hidden = down[1:] if transposed else (down[2], down[1])
    return Fused(path, gate_up[0], hidden, intermediate, transposed)


@dataclass(slots=True)
class _Layer:
    """What of a layer's experts is on disk: leaves by number, and Linears by how they are stored."""

    leaves: dict[int, set[str]] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)


def _layers(kinds: Mapping[str, str]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for module, kind in kinds.items():
        place = place_of(module)
        if place is not None:
            layer = layers.setdefault(place.layer, _Layer())
            layer.leaves.setdefault(place.number, set()).add(place.leaf)
            layer.kinds.setdefault(kind, []).append(f"{place.number}.{place.leaf}")
    return layers


def scheme_problems(kinds: Mapping[str, str]) -> list[str]:
    """Layers whose experts are not all stored alike.

    vLLM asks for the scheme of expert 0's three Linears and takes it for all.

    Args:
        kinds: by module, its config group, or "dense".
    """
    problems = []
    for name, layer in _layers(kinds).items():
        if len(layer.kinds) > 1:
            listed = "; ".join(f"{k or 'no group'}: {_some(v)}" for k, v in layer.kinds.items())
            problems.append(f"{name}: engines read all experts of a layer by one scheme, which must agree ({listed})")
    return problems


def missing_experts(
    quantized: Iterable[str], dense: Iterable[str], fused: Mapping[tuple[str, ...], Fused]
) -> list[str]:
    """Experts that a layer lacks, wholly or in part.

    Args:
        quantized: modules that are quantised; layers without any are not looked at.
        dense: modules that have a dense weight.
        fused: what the model has, by the indices in its path.
    """
    problems = []
    concerned = {p.layer for m in quantized if (p := place_of(m)) is not None}
    layers = _layers({**dict.fromkeys(dense, "dense"), **dict.fromkeys(quantized, "quantised")})
    for name in sorted(concerned):
        leaves = layers[name].leaves
        model = fused.get(numbers_in(name))
        count = model.count if model else max(leaves) + 1
        absent = [e for e in range(count) if e not in leaves]
        beyond = [e for e in sorted(leaves) if e >= count]
        whole = set.union(*leaves.values())
        parts = [f"{e}.{leaf}" for e in sorted(leaves) for leaf in sorted(whole - leaves[e])]
        if absent:
            problems.append(f"{name}: {len(absent)} of {count} experts are missing: {_some(map(str, absent))}")
        if beyond:
            problems.append(f"{name}: the model has {count} experts, and there are more: {_some(map(str, beyond))}")
        if parts:
            problems.append(f"{name}: experts lack Linears that others have: {_some(parts)}")
    return problems


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")
