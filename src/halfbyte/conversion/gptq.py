"""AutoGPTQ and GPTQModel checkpoints, ``checkpoint_format`` ``gptq`` (v1) and ``gptq_v2``; AutoRound's of that layout.

Per Linear ``[out, in]`` with ``b`` of 2, 3, 4, 8 bits and ``G`` inputs to a group::

    qweight  int32 [in b / 32, out]           codes plus 2**(b-1), packed along columns, the lowest bits first
    qzeros   int32 [ceil(in / G), out b / 32]  zero points plus 2**(b-1), packed along rows; v1 stores one less
    scales   float16 [ceil(in / G), out]       w = (q - z) s
    g_idx    int32 [in]                        the group of each input: i // G, or anything with desc_act

v1 cannot say that a zero point is 0: what it would store, ``2**b - 1``, is 16 to some kernels and 0 to others (4 bits).
Such a tensor is refused, on either side. A symmetric weight has every zero point ``2**(b-1)``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from halfbyte.architectures import KEPT_MODULES
from halfbyte.blocks import build_on_meta
from halfbyte.checkpoint.reader import Checkpoint, TensorInfo
from halfbyte.conversion.bits import pack_rows, unpack_rows, words_in
from halfbyte.conversion.coded import FLOATS, CodedWeight, Grid, Steps
from halfbyte.conversion.config import dense_blocks, integer_in, plain_modules, unrounded
from halfbyte.conversion.folder_source import Module
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Obstacle
from halfbyte.errors import ArchitectureError, CheckpointError, UsageError
from halfbyte.mixing import groups_of
from halfbyte.schemes import Scheme, WeightFormat

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
# What config.json calls the two layouts of zero points.
VERSIONS = {"gptq": V1, "": V1, "gptq_v2": V2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a config says of a module."""

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True, slots=True)
class GptqDecoder:
    """Reads modules of a GPTQ checkpoint.

    Attributes:
        quantization: the ``quantization_config``; where: what to call the checkpoint in messages.
        offset: what is added to stored zero points: 1 in v1, 0 in v2.
    """

    quantization: Mapping[str, Any]
    where: str
    offset: int
    format: str
    scale_leaf: str = "scales"
    leaves: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    @staticmethod
    def of(quantization: Mapping[str, Any], where: str) -> GptqDecoder:
        """Which version it is, by ``checkpoint_format``."""
        stated = str(quantization.get("checkpoint_format") or quantization.get("format") or "").lower()
        if stated not in VERSIONS:
            raise CheckpointError(
                f"GPTQ's checkpoint_format {stated} is not read",
                where=where,
                remedy=f"Save it as {V1} or {V2} with the tool that made it.",
            )
        version = VERSIONS[stated]
        return GptqDecoder(quantization, where, int(version == V1), version.replace("_", "-"))

    def said(self, module: str) -> Said:
        """Bits, group size and symmetry of a module: the config's, or what ``dynamic`` has instead."""
        stated: dict[str, Any] = dict(self.quantization)
        for pattern, override in self._dynamic().items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                stated |= override
                break
        return Said(
            bits=integer_in(stated, self.where, "bits"),
            group_size=integer_in(stated, self.where, "group_size"),
            symmetric=stated.get("sym") is not False,
        )

    def _dynamic(self) -> dict[str, dict[str, Any]]:
        dynamic = self.quantization.get("dynamic") or self.quantization.get("extra_config") or {}
        return {k: v for k, v in dynamic.items() if isinstance(v, dict)} if isinstance(dynamic, dict) else {}

    def is_coded(self, leaves: Mapping[str, TensorInfo]) -> bool:
        return "qweight" in leaves

    def grid(self, module: Module) -> tuple[Grid, tuple[int, int]]:
        said, qweight = self.said(module.name), module.info("qweight")
        bits = said.bits
        if bits not in BITS:
            raise CheckpointError(f"the config says {bits} bits, and GPTQ has {', '.join(map(str, BITS))}")
        rows = qweight.shape[0] if len(qweight.shape) == 2 else 0
        if qweight.dtype != "I32" or not rows or 32 * rows % bits or not qweight.shape[1]:
            raise CheckpointError(
                f"qweight is {qweight.dtype} {list(qweight.shape)}, not int32 [in * {bits} / 32, out]"
            )
        in_features, out_features = 32 * rows // bits, qweight.shape[1]
        size = in_features if said.group_size == -1 else said.group_size
        groups = -(-in_features // size)
        if out_features * bits % 32:
            raise CheckpointError(f"{out_features} outputs do not fill whole words of zero points")
        module.require("scales", (groups, out_features), *FLOATS)
        module.require("qzeros", (groups, out_features * bits // 32), "I32")
        ordered = in_features % size != 0
        if "g_idx" in module.leaves:
            module.require("g_idx", (in_features,), "I32", "I64")
            index = module.read("g_idx")
            if int(index.min()) < 0 or int(index.max()) >= groups:
                raise CheckpointError(
                    f"g_idx names groups {int(index.min())} to {int(index.max())}, and there are {groups}",
                    remedy="The checkpoint is broken; download it again.",
                )
            ordered = bool((index != torch.arange(in_features, dtype=index.dtype) // size).any()) or ordered
        elif self.quantization.get("desc_act") is True and groups > 1 and not self._is_autoround:
            raise CheckpointError("g_idx is missing, and the config says desc_act", remedy="Download it again.")
        weights = WeightFormat(
            num_bits=bits,
            symmetric=said.symmetric and self._is_middle(module, bits),
            group_size=None if said.group_size == -1 else size,
        )
        grid = Grid(weights=weights, scale_dtype=module.info("scales").dtype, ordered=ordered)
        return grid, (out_features, in_features)

    @property
    def _is_autoround(self) -> bool:
        return "autoround_version" in self.quantization

    def _is_middle(self, module: Module, bits: int) -> bool:
        """Whether every zero point is that of a symmetric weight."""
        middle = torch.full((1, module.info("scales").shape[1]), (1 << (bits - 1)) - self.offset, dtype=torch.uint8)
        return bool((module.read("qzeros") == pack_rows(middle, bits)).all())

    def steps(self, module: Module, entry: Entry) -> Steps:
        assert entry.grid is not None
        weights, (out_features, in_features) = entry.grid.weights, entry.shape
        index = None
        if entry.grid.ordered:
            width = weights.group_size or in_features
            runs = torch.arange(in_features, dtype=torch.int32) // width
            index = module.read("g_idx").to(torch.int32) if "g_idx" in module.leaves else runs
        scales = module.read("scales").T.contiguous()
        if weights.symmetric:
            return Steps(scales=scales, group_index=index)
        stored = unpack_rows(module.read("qzeros"), weights.num_bits, out_features).T.to(torch.int16)
        if self.offset and bool((stored == (1 << weights.num_bits) - 1).any()):
            top = (1 << weights.num_bits) - 1
            raise CheckpointError(
                f"a stored zero point is {top}, which stands for {top + 1} in some kernels and for 0 in others",
                where=module.name,
                why="version 1 of the format stores zero points less one, and cannot say 0",
                remedy="Save it as gptq_v2 with the tool that made it.",
            )
        zeros = (stored + self.offset + weights.q_min).to(torch.int8).contiguous()
        return Steps(scales=scales, zero_points=zeros, group_index=index)

    def words(self, module: Module, entry: Entry) -> torch.Tensor:
        return module.read("qweight").T.contiguous()


def spare_biases(checkpoint: Checkpoint) -> frozenset[str]:
    """Biases of zeros, which AutoGPTQ gave every Linear, where the architecture has none."""
    tensors = checkpoint.tensors
    biases = [n for n in tensors if n.endswith(".bias") and f"{n.removesuffix('bias')}qweight" in tensors]
    zeros = [n for n in biases if not bool(checkpoint.read(n).any())]
    if not zeros:
        return frozenset()
    try:
        known = {n for n, _ in build_on_meta(checkpoint, checkpoint.dtype).named_parameters()}
    except ArchitectureError:
        return frozenset()
    return frozenset(n for n in zeros if n not in known and f"{n.removesuffix('bias')}weight" in known)


@dataclass(frozen=True, slots=True)
class GptqEncoder:
    """Writes modules as AutoGPTQ (``version`` ``gptq``) or GPTQModel (``gptq_v2``) does."""

    version: str = V1

    @property
    def format(self) -> str:
        return self.version.replace("_", "-")

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        coded = [e for e in source.entries.values() if e.grid is not None]
        return [o for e in coded if (o := self._obstacle(e, facts[e.name])) is not None]

    def _obstacle(self, entry: Entry, facts: Facts) -> Obstacle | None:
        assert entry.grid is not None
        grid, w, (out_features, in_features) = entry.grid, entry.grid.weights, entry.shape
        elsewhere = "Convert to compressed-tensors."
        bits = w.num_bits if w.kind == "int" and w.num_bits in BITS else 8
        if in_features * bits % 32 or out_features * bits % 32:
            reason = f"[{out_features}, {in_features}] codes of {bits} bits do not fill whole words"
            return Obstacle(name=entry.name, reason=reason, remedy=elsewhere)
        size = w.block[1] if w.block is not None else w.group_size
        nearest = Grid(
            weights=WeightFormat(num_bits=bits, symmetric=w.symmetric, group_size=size),
            scale_dtype="F16",
            ordered=grid.ordered,
        )
        if replace(grid, scale_dtype="F16", activations=None) != nearest:
            return Obstacle(name=entry.name, reason=f"GPTQ has no {grid.words()}", grid=nearest)
        inexact = f"its {grid.scale_dtype} scales are not all float16 numbers"
        if "F16" not in facts.finite_in:
            return Obstacle(name=entry.name, reason=f"{inexact}, and some overflow or vanish", remedy=elsewhere)
        if self.version == V1 and facts.zero_points is not None and facts.zero_points[0] == w.q_min:
            return Obstacle(
                name=entry.name,
                reason="it has zero points 0, which version 1 of the format cannot say",
                grid=replace(nearest, weights=replace(nearest.weights, symmetric=True)),
                remedy="Use --to gptq-v2.",
            )
        return None if "F16" in facts.exact_in else Obstacle(name=entry.name, reason=inexact, grid=nearest)

    def scale_dtype(self, source: Source, facts: Mapping[str, Facts]) -> str | None:
        return "F16"

    def stored(self, entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
        assert entry.grid is not None
        w, (out_features, in_features) = entry.grid.weights, entry.shape
        groups = -(-in_features // (w.group_size or in_features))
        return {
            "qweight": ("I32", (words_in(in_features, w.num_bits), out_features)),
            "qzeros": ("I32", (groups, words_in(out_features, w.num_bits))),
            "scales": ("F16", (groups, out_features)),
            "g_idx": ("I32", (in_features,)),
        }

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        w, scales, zeros = weight.grid.weights, weight.steps.scales, weight.steps.zero_points
        offset = int(self.version == V1)
        if zeros is None:  # every row of zero points is the same
            unsigned = torch.full((1, weight.out_features), -w.q_min - offset, dtype=torch.uint8)
        else:
            stored = zeros.T.to(torch.int16) - w.q_min - offset
            if bool((stored < 0).any()):
                raise UsageError(
                    "a zero point is 0, which version 1 of the format cannot say",
                    where=entry.name,
                    remedy="Use --to gptq-v2.",
                )
            unsigned = stored.to(torch.uint8)
        qzeros = pack_rows(unsigned.contiguous(), w.num_bits)
        index = weight.steps.group_index
        if index is None:
            index = torch.arange(weight.in_features, dtype=torch.int32) // (w.group_size or weight.in_features)
        return {
            "qweight": weight.words.T.contiguous(),
            "qzeros": qzeros.expand(scales.shape[1], -1).contiguous(),
            "scales": scales.T.contiguous(),
            "g_idx": index,
        }

    def config(self, source: Source, entries: Sequence[Entry]) -> Mapping[str, Any]:
        coded = {e.module: e for e in entries if e.grid is not None}
        said = {m: _said(e) for m, e in coded.items()}
        base = Counter(said.values()).most_common(1)[0][0]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": base.bits,
            "group_size": base.group_size,
            "sym": base.symmetric,
            "desc_act": any(e.grid is not None and e.grid.ordered for e in coded.values()),
            "checkpoint_format": self.version,
            "lm_head": "lm_head" in coded,
            "pack_dtype": "int32",
        }
        dynamic = self._overrides(source, said, base) | _exclusions(source)
        return config | ({"dynamic": dynamic} if dynamic else {})

    def _overrides(self, source: Source, said: Mapping[str, Said], base: Said) -> dict[str, dict[str, Any]]:
        """``+:`` patterns for modules that differ from most, as GPTQModel and vLLM read them."""
        others = {m: s for m, s in said.items() if s != base}
        if not others:
            return {}
        schemes = {
            m: Scheme(
                name="",
                weights=WeightFormat(
                    num_bits=s.bits,
                    symmetric=s.symmetric,
                    group_size=None if s.group_size == -1 else s.group_size,
                ),
                activations=None,
                storage="pack-quantized",
            )
            for m, s in others.items()
        }
        found: dict[str, dict[str, Any]] = {}
        for group in groups_of(dense_blocks(source), schemes):
            w = group.scheme.weights
            override = {"bits": w.num_bits, "group_size": w.group_size or -1, "sym": w.symmetric}
            found |= {f"+:{t.removeprefix('re:')}": override for t in group.targets}
        covered = [re.compile(p.removeprefix("+:")) for p in found]
        for m, s in others.items():
            if not any(c.match(m) for c in covered):
                override = {"bits": s.bits, "group_size": s.group_size, "sym": s.symmetric}
                found[f"+:.*{re.escape(m)}$"] = override
        return found

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        grids = [e.grid.weights for e in entries if e.grid is not None]
        found = unrounded(source)
        if not all(w.symmetric and w.num_bits in (4, 8) for w in grids):
            found.append("vLLM 0.32 reads GPTQ checkpoints of 4 and 8 bits that are symmetric, and no others")
        if self.version == V1 and not all(w.symmetric for w in grids):
            found.append(
                "GPTQModel refuses asymmetric checkpoints of version 1 that it did not write; see --to gptq-v2"
            )
        return found


def _said(entry: Entry) -> Said:
    assert entry.grid is not None
    w = entry.grid.weights
    return Said(bits=w.num_bits, group_size=w.group_size or -1, symmetric=w.symmetric)


def _exclusions(source: Source) -> dict[str, dict[str, Any]]:
    """``-:`` patterns for Linears of decoder blocks that are dense, and for parts besides the language model."""
    found: dict[str, dict[str, Any]] = {}
    for name in plain_modules(source):
        if name == "lm_head" or name.startswith("model.") or KEPT_MODULES.search(name) is not None:
            continue
        found[f"-:.*{re.escape(name)}" + ("$" if "." in name else r"\b.*")] = {}
    return found
