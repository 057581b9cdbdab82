"""Quantised checkpoints made number by number, without halfbyte: what ``convert`` is tested on.

Codes are packed by the compressed-tensors library (:func:`packed`), or bit by bit after the formats' descriptions
(:func:`awq`, :func:`gptq`); nothing here is imported from ``halfbyte.conversion``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import save_file

LAYER = "model.layers.0"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Codes ``[out, in]`` and zero points ``[out, groups]``, both unsigned, and scales."""

    bits: int
    codes: np.ndarray[Any, Any]
    scales: torch.Tensor
    zeros: np.ndarray[Any, Any] | None
    group_size: int | None
    g_idx: np.ndarray[Any, Any] | None = None

    def dense(self) -> np.ndarray[Any, Any]:
        """``(q - z) s`` in float64."""
        columns = self.codes.shape[1]
        width = self.group_size or columns
        index = np.arange(columns) // width if self.g_idx is None else self.g_idx
        middle = np.full(self.scales.shape, 1 << (self.bits - 1))
        zeros = middle if self.zeros is None else self.zeros
        scales = self.scales.to(torch.float64).numpy()
        return (self.codes.astype(np.float64) - zeros[:, index]) * scales[:, index]


def random_coded(
    seed: int,
    *,
    bits: int = 4,
    out: int = 16,
    columns: int = 64,
    group_size: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    least_zero: int = 0,
) -> Coded:
    draw = np.random.default_rng(seed)
    groups = columns // (group_size or columns)
    zeros = None if symmetric else draw.integers(least_zero, 1 << bits, (out, groups))
    if zeros is not None:
        zeros[0, 0] = (1 << (bits - 1)) + 1  # never all in the middle, which would be symmetric
    scales = torch.from_numpy(np.exp2(draw.uniform(-9, -5, (out, groups)))).to(torch.bfloat16).to(dtype)
    codes = draw.integers(0, 1 << bits, (out, columns))
    return Coded(bits=bits, codes=codes, scales=scales, zeros=zeros, group_size=group_size)


def packed(weight: Coded) -> dict[str, torch.Tensor]:
    """compressed-tensors' ``pack-quantized``, by the library."""
    middle = 1 << (weight.bits - 1)
    tensors = {
        "weight_packed": pack_to_int32(torch.from_numpy(weight.codes - middle).to(torch.int8), weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zeros is not None:
        zeros = torch.from_numpy(weight.zeros - middle).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zeros, weight.bits, packed_dim=0).contiguous()
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = torch.from_numpy(weight.g_idx).to(torch.int32)
    return tensors


def bits_along_rows(values: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """Rows of numbers as int32 words, by Python's integers: the first number in the lowest bits."""
    rows = []
    for row in values:
        whole = sum(int(v) << (bits * i) for i, v in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * w)) & 0xFFFFFFFF for w in range(words)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def awq(weight: Coded) -> dict[str, torch.Tensor]:
    """AutoAWQ's gemm layout, after its description."""

    def ordered(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(values.shape)

    zeros = np.full(weight.scales.shape, 8) if weight.zeros is None else weight.zeros
    return {
        "qweight": bits_along_rows(ordered(weight.codes.T), 4),
        "qzeros": bits_along_rows(ordered(zeros.T), 4),
        "scales": weight.scales.T.contiguous().to(torch.float16),
    }


def gptq(weight: Coded, version: int = 1) -> dict[str, torch.Tensor]:
    """AutoGPTQ's layout, after its description."""
    columns = weight.codes.shape[1]
    zeros = np.full(weight.scales.shape, 1 << (weight.bits - 1)) if weight.zeros is None else weight.zeros
    index = np.arange(columns) // (weight.group_size or columns) if weight.g_idx is None else weight.g_idx
    return {
        "qweight": bits_along_rows(weight.codes, weight.bits).T.contiguous(),
        "qzeros": bits_along_rows(zeros.T - (1 if version == 1 else 0), weight.bits),
        "scales": weight.scales.T.contiguous().to(torch.float16),
        "g_idx": torch.from_numpy(index).to(torch.int32),
    }


def ct_config(weight: Coded, **more: Any) -> dict[str, Any]:
    group = {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.zeros is None,
        "group_size": weight.group_size,
        "strategy": "channel" if weight.group_size is None else "group",
        "dynamic": False,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": group, "format": "pack-quantized"}}
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    return base | {"config_groups": groups} | more


def awq_config(weight: Coded, **more: Any) -> dict[str, Any]:
    size = -1 if weight.group_size is None else weight.group_size
    base = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return base | {"modules_to_not_convert": None} | more


def gptq_config(weight: Coded, version: int = 1, **more: Any) -> dict[str, Any]:
    size = -1 if weight.group_size is None else weight.group_size
    base = {"quant_method": "gptq", "bits": weight.bits, "group_size": size, "sym": weight.zeros is None}
    return base | {"desc_act": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"} | more


def publish(
    folder: Path,
    modules: dict[str, dict[str, torch.Tensor]],
    quantization: dict[str, Any] | None,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 1,
) -> Path:
    """A checkpoint folder with these modules, an embedding, a norm and a head."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(3)
    tensors = {f"{m}.{leaf}": t for m, leaves in modules.items() for leaf, t in leaves.items()}
    for name, shape in (("model.embed_tokens", (8, 16)), ("model.norm", (16,)), ("lm_head", (8, 16))):
        tensors[f"{name}.weight"] = torch.randn(shape, generator=draw).to(dtype)
    for layer in range(layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(16, generator=draw).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("terms\n")
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder
