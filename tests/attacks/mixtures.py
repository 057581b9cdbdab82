"""Mixtures of experts to verify and to spoil, made without halfbyte's own writer.

``build`` makes a tiny checkpoint of a family of :mod:`zoo`, takes stacked experts apart with its own hands, rounds
every Linear of the decoder blocks to nearest and packs it with the compressed-tensors library.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

import tiny
from attacks.checkpoints import Pair, round_to_nearest, save
from halfbyte import schemes

# Routers under both names that they may have, heads and vision towers.
IGNORE = ["lm_head", r"re:.*(gate|router|router\.layer)$", "re:.*lm_head.*", "re:.*visual.*", "re:.*vision.*"]
IGNORE += ["re:.*multi_modal_projector.*", r"re:.*layers\.3\..*"]
LINEAR = re.compile(
    r"(?!.*(visual|vision|layers\.3\.)).*layers\.\d+\..*\.(\w+_proj(_with_mqa)?|w[123]|(in|out)put_linear)\.weight"
)
HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "input_linear": ("gate_proj", "up_proj")}
STACK = re.compile(r"(.+?)(\.experts)?\.(gate_up_proj|input_linear|down_proj|output_linear)(\.weight)?")


def unstacked(tensors: dict[str, torch.Tensor], *, transposed: bool) -> dict[str, torch.Tensor]:
    """Every three-dimensional tensor of experts as matrices ``[out, in]`` of their own."""
    out = {}
    for name, tensor in tensors.items():
        match = STACK.fullmatch(name)
        if match is None or tensor.dim() != 3:
            out[name] = tensor
            continue
        leaves = HALVES.get(match[3], ("down_proj",))
        for expert, piece in enumerate(tensor):
            matrices = (piece.T if transposed else piece).chunk(len(leaves))
            out |= {f"{match[1]}.experts.{expert}.{leaf}.weight": m for leaf, m in zip(leaves, matrices, strict=True)}
    return out


def packed(module: str, weight: torch.Tensor, quantization: dict[str, Any], group: str = "group_0") -> Any:
    """A module's tensors by full name, as the library compresses them."""
    scheme = QuantizationConfig.model_validate(quantization).config_groups[group]
    scale, zero = round_to_nearest(weight, scheme.weights)
    state = {"weight": weight.float(), "weight_scale": scale.float(), "weight_zero_point": zero}
    compressed = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    return {f"{module}.{k}": scale if k == "weight_scale" else v for k, v in compressed.items()}


def build(
    root: Path,
    family: str,
    scheme: str = "W4A16",
    *,
    wider: str = "",
    stays: str = "",
    ignore: tuple[str, ...] = (),
    **extra: Any,
) -> Pair:
    """A family's checkpoint and the same quantised, in ``root/source`` and ``root/quantized``.

    Args:
        root: where to.
        family: of :mod:`zoo`.
        scheme: a preset; groups of 32 where it has groups.
        wider: pattern of modules that get W8A16 instead, in a group of their own.
        stays: pattern of modules that stay as they are.
        ignore: of the config, instead of :data:`IGNORE`.
        extra: options of the language model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, where transformers casts complex buffers
        source = tiny.build(root / "source", family, **extra)
    tensors, config = tiny.stored(source), tiny.config_of(source)
    preset = schemes.preset(scheme)
    preset = preset.with_group_size(32) if scheme.startswith("W4") else preset
    groups = [(preset, [f"re:(?!{wider}).*layers.*"] if wider else ["Linear"])]
    if wider:
        groups.append((schemes.preset("W8A16").with_group_size("channel"), [f"re:{wider}"]))
    stay = [f"re:{stays}"] if stays else []
    quantization = schemes.quantization_config(groups, (list(ignore) or IGNORE) + stay)
    out: dict[str, torch.Tensor] = {}
    for name, tensor in unstacked(tensors, transposed=family.startswith(("llama4", "qwen3-vl"))).items():
        module = name.removesuffix(".weight")
        if not LINEAR.fullmatch(name) or (stays and re.match(stays, module)):
            out[name] = tensor
        else:
            own = "group_1" if wider and re.match(wider, module) else "group_0"
            out |= packed(module, tensor, quantization, own)
    save(root / "quantized", out, {**config, "quantization_config": quantization})
    return Pair(source, root / "quantized")
