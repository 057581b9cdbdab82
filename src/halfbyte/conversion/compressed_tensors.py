"""compressed-tensors checkpoints: ``pack-quantized``, ``int-quantized`` and ``float-quantized``.

Per Linear ``[out, in]`` (after the library's own packers)::

    weight_packed      int32 [out, ceil(in b / 32)]       codes plus 2**(b-1), packed along rows
    weight_scale       float [out, groups]                 w = (q - z) s
    weight_shape       int64 [2]                           out, in
    weight_zero_point  int32 [ceil(out b / 32), groups]    z plus 2**(b-1), packed along columns; asymmetric alone

or ``weight`` int8 or float8_e4m3 with ``weight_scale`` (and ``weight_zero_point`` int8). A ``weight_g_idx`` int32
``[in]`` of old versions says which group a feature is in. Sparse, NVFP4 and MXFP4 formats are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from halfbyte.checkpoint.reader import TensorInfo
from halfbyte.conversion.bits import pack_rows, unpack_rows, words_in
from halfbyte.conversion.coded import FLOATS, CodedWeight, Grid, Steps
from halfbyte.conversion.config import dense_blocks
from halfbyte.conversion.folder_source import Module
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Obstacle
from halfbyte.errors import CheckpointError
from halfbyte.inspection_formats import config_group
from halfbyte.mixing import groups_of
from halfbyte.planner import ignore_patterns
from halfbyte.recipe import Recipe, SchemeGroup, matches
from halfbyte.schemes import ActivationFormat, Scheme, StorageFormat, WeightFormat, quantization_config

CODES = ("I8", "F8_E4M3", "F8_E5M2", "U8")
READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
PACKED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class CompressedTensorsDecoder:
    """Reads modules by what ``quantization_config`` says of them."""

    quantization: Mapping[str, Any]
    format: str = "compressed-tensors"
    scale_leaf: str = "weight_scale"
    leaves: frozenset[str] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
    )

    def is_coded(self, leaves: Mapping[str, TensorInfo]) -> bool:
        return "weight_packed" in leaves or ("weight" in leaves and leaves["weight"].dtype in CODES)

    def grid(self, module: Module) -> tuple[Grid, tuple[int, int]]:
        group = config_group(module.name, self.quantization)
        stated = group.get("weights")
        if not isinstance(stated, dict):
            raise CheckpointError("holds codes, but no entry of config_groups targets it", remedy="Repair config.json.")
        layout = str(group.get("format") or self.quantization.get("format"))
        if layout not in READ:
            raise CheckpointError(f"is stored as {layout}", remedy=f"Convert reads {', '.join(READ[:3])}.")
        fmt = _weight_format(stated)
        packed = "weight_packed" in module.leaves
        out_features, in_features = _packed_shape(module, fmt) if packed else _plain_shape(module, fmt)
        if not fmt.fits(in_features):
            raise CheckpointError(f"{in_features} input features do not divide into groups of {fmt.group_size}")
        scale, expected = module.info("weight_scale"), fmt.scale_shape(out_features, in_features)
        module.require("weight_scale", scale.shape if scale.numel == 1 else expected, *FLOATS)
        if not fmt.symmetric and packed:
            module.require("weight_zero_point", (words_in(out_features, fmt.num_bits), expected[1]), "I32")
        elif not fmt.symmetric:
            module.require("weight_zero_point", expected, "I8")
        ordered = False
        if "weight_g_idx" in module.leaves:
            module.require("weight_g_idx", (in_features,), "I32", "I64")
            ordered = not is_run(module.read("weight_g_idx"), fmt, in_features)
        grid = Grid(weights=fmt, scale_dtype=scale.dtype, ordered=ordered, activations=_activations(group))
        return grid, (out_features, in_features)

    def steps(self, module: Module, entry: Entry) -> Steps:
        assert entry.grid is not None
        fmt, scales = entry.grid.weights, module.read("weight_scale")
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).repeat(entry.shape[0], 1)
        elif fmt.block is not None:
            scales = scales.repeat_interleave(fmt.block[0], dim=0)[: entry.shape[0]]
        zeros = None
        if not fmt.symmetric:
            zeros = module.read("weight_zero_point")
            if zeros.dtype == torch.int32:
                unsigned = unpack_rows(zeros.T.contiguous(), fmt.num_bits, entry.shape[0]).T
                zeros = (unsigned.to(torch.int16) + fmt.q_min).to(torch.int8).contiguous()
        index = module.read("weight_g_idx").to(torch.int32) if entry.grid.ordered else None
        return Steps(scales=scales, zero_points=zeros, group_index=index)

    def words(self, module: Module, entry: Entry) -> torch.Tensor:
        assert entry.grid is not None
        if "weight_packed" in module.leaves:
            return module.read("weight_packed")
        codes = module.read("weight")
        if entry.grid.weights.kind == "float":
            return codes
        return pack_rows(codes.view(torch.uint8) ^ 0x80, 8)


def is_run(index: torch.Tensor, fmt: WeightFormat, in_features: int) -> bool:
    """Whether a group index says what is so without it: feature ``i`` in group ``i // group_size``."""
    width = fmt.group_size or in_features
    return bool((index == torch.arange(in_features, dtype=index.dtype) // width).all())


def _weight_format(stated: Mapping[str, Any]) -> WeightFormat:
    strategy, bits, kind = stated.get("strategy"), stated.get("num_bits"), stated.get("type")
    if strategy not in ("group", "channel", "tensor", "block") or kind not in ("int", "float"):
        raise CheckpointError(f"weights of type {kind!r} with strategy {strategy!r} cannot be converted")
    block = stated.get("block_structure") if strategy == "block" else None
    size = stated.get("group_size") if strategy == "group" else None
    if not isinstance(bits, int) or (strategy == "group" and (not isinstance(size, int) or size < 1)):
        raise CheckpointError(f"config_groups says {bits!r} bits in groups of {size!r}", remedy="Repair config.json.")
    return WeightFormat(
        num_bits=bits,
        kind="float" if kind == "float" else "int",
        symmetric=bool(stated.get("symmetric", True)),
        group_size=size,
        block=None if block is None else (int(block[0]), int(block[1])),
    )


def _activations(group: Mapping[str, Any]) -> ActivationFormat | None:
    stated = group.get("input_activations")
    if not isinstance(stated, dict) or stated.get("dynamic") is False:  # static ones are left behind
        return None
    size = stated.get("group_size") if stated.get("strategy") == "group" else None
    return ActivationFormat(
        num_bits=stated["num_bits"], kind="float" if stated.get("type") == "float" else "int", group_size=size
    )


def _packed_shape(module: Module, fmt: WeightFormat) -> tuple[int, int]:
    if fmt.kind != "int" or fmt.num_bits not in PACKED_BITS:
        raise CheckpointError(
            f"packed {fmt.kind}{fmt.num_bits} codes cannot be converted",
            remedy=f"Packed codes of {', '.join(map(str, PACKED_BITS))} bits can.",
        )
    module.require("weight_shape", (2,), "I64", "I32")
    out_features, in_features = (int(n) for n in module.read("weight_shape"))
    module.require("weight_packed", (out_features, words_in(in_features, fmt.num_bits)), "I32")
    return out_features, in_features


def _plain_shape(module: Module, fmt: WeightFormat) -> tuple[int, int]:
    info = module.info("weight")
    wanted = "F8_E4M3" if fmt.kind == "float" else "I8"
    if len(info.shape) != 2 or info.dtype != wanted or fmt.num_bits != 8:
        raise CheckpointError(
            f"weight is {info.dtype} {list(info.shape)}, and the config says {fmt.kind}{fmt.num_bits}",
            remedy="Unpacked codes of 8 bits can be converted.",
        )
    return info.shape[0], info.shape[1]


@dataclass(frozen=True, slots=True)
class CompressedTensorsEncoder:
    """Writes modules as ``quantize`` does."""

    format: str = "compressed-tensors"

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        found = []
        for entry in source.entries.values():
            grid = entry.grid
            if grid is None:
                continue
            w = grid.weights
            dtype = grid.scale_dtype if source.format == self.format else entry.dtype
            if grid.ordered:
                runs = Grid(weights=w, scale_dtype=dtype, activations=grid.activations)
                reason = "its groups are dealt by an index (act-order), which engines no longer read"
                found.append(Obstacle(name=entry.name, reason=reason, grid=runs))
            elif w.kind == "int" and w.num_bits not in PACKED_BITS:
                found.append(Obstacle(name=entry.name, reason=f"codes of {w.num_bits} bits have no packing"))
            elif dtype not in facts[entry.name].exact_in:
                found.append(_inexact_scales(entry, replace(grid, scale_dtype=dtype), facts[entry.name]))
        return found

    def scale_dtype(self, source: Source, facts: Mapping[str, Facts]) -> str | None:
        """The model's dtype; scales that were in this format already and that it does not hold stay as they are."""
        dtype = next((e.dtype for e in source.entries.values() if e.grid is not None), None)
        exact = all(dtype in f.exact_in for f in facts.values())
        return dtype if exact or source.format != self.format else None

    def stored(self, entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
        assert entry.grid is not None
        w, (out_features, in_features) = entry.grid.weights, entry.shape
        scale = (entry.grid.scale_dtype, w.scale_shape(out_features, in_features))
        if storage_of(entry.grid) != "pack-quantized":
            plain: dict[str, tuple[str, tuple[int, ...]]] = {
                "weight": ("F8_E4M3" if w.kind == "float" else "I8", (out_features, in_features))
            }
            zeros = {} if w.symmetric else {"weight_zero_point": ("I8", scale[1])}
            return plain | {"weight_scale": scale} | zeros
        stored: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (out_features, words_in(in_features, w.num_bits))),
            "weight_scale": scale,
            "weight_shape": ("I64", (2,)),
        }
        if not w.symmetric:
            stored["weight_zero_point"] = ("I32", (words_in(out_features, w.num_bits), w.groups(in_features)))
        return stored

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        assert entry.grid is not None
        w, scales, zeros = entry.grid.weights, weight.steps.scales, weight.steps.zero_points
        if w.block is not None:
            scales = scales[:: w.block[0]]
        scales = scales.contiguous()
        if storage_of(entry.grid) != "pack-quantized":
            plain = {"weight": weight.codes(), "weight_scale": scales}
            return plain if zeros is None else plain | {"weight_zero_point": zeros}
        stored = {
            "weight_packed": weight.words,
            "weight_scale": scales,
            "weight_shape": torch.tensor(entry.shape, dtype=torch.int64),
        }
        if zeros is not None:
            unsigned = (zeros.to(torch.int16) - w.q_min).to(torch.uint8)
            stored["weight_zero_point"] = pack_rows(unsigned.T.contiguous(), w.num_bits).T.contiguous()
        return stored

    def config(self, source: Source, entries: Sequence[Entry]) -> Mapping[str, Any]:
        schemes = {e.module: scheme_of(e.grid) for e in entries if e.grid is not None}
        blocks = dense_blocks(source)
        distinct = list(dict.fromkeys(schemes.values()))
        groups: Sequence[SchemeGroup] = [SchemeGroup(scheme=distinct[0], targets=("Linear",))]
        if len(distinct) > 1:
            groups = groups_of(blocks, schemes)
        recipe = Recipe(groups=tuple(groups), ignore=())
        ignore = ignore_patterns(blocks, recipe, schemes)
        known = source.quantization.get("ignore") if source.format == self.format else None
        listed = list(dict.fromkeys([*known, *ignore])) if isinstance(known, list) else ignore
        listed = [p for p in listed if not any(matches(p, m) for m in schemes)]
        return quantization_config([(g.scheme, list(g.targets)) for g in groups], listed)

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        return []


def _inexact_scales(entry: Entry, nearest: Grid, facts: Facts) -> Obstacle:
    """The model's dtype, in which transformers and vLLM load scales whatever the file has, does not hold them."""
    assert entry.grid is not None
    reason = (
        f"engines load scales in the model's dtype, {entry.dtype} by its config, and its {entry.grid.scale_dtype} "
        "scales are not all such numbers"
    )
    if entry.dtype not in facts.finite_in:
        return Obstacle(name=entry.name, reason=f"{reason}, and some overflow or vanish", remedy="Convert to dense.")
    return Obstacle(name=entry.name, reason=reason, grid=nearest, remedy="Convert to dense, gptq-v2 or gguf.")


def storage_of(grid: Grid) -> StorageFormat:
    """Which of the layouts holds a weight: float8, int8 with int8 inputs, else packed."""
    if grid.weights.kind == "float":
        return "float-quantized"
    eight = grid.weights.num_bits == 8 and grid.activations is not None
    return "int-quantized" if eight else "pack-quantized"


def scheme_of(grid: Grid) -> Scheme:
    """The grid as a scheme without a name of its own."""
    return Scheme(
        name=f"W{grid.weights.num_bits}", weights=grid.weights, activations=grid.activations, storage=storage_of(grid)
    )
