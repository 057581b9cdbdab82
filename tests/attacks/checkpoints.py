"""Small checkpoints to verify and to spoil, made without halfbyte's own writer.

``build`` makes a tiny random Llama with transformers, rounds every Linear of its blocks to nearest and packs it with
the compressed-tensors library. ``Shard`` opens a safetensors file for surgery: change tensors, header or raw bytes.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte import schemes

IGNORE = ["re:.*lm_head.*"]


@dataclass
class Pair:
    """A source checkpoint and a quantised one made from it."""

    source: Path
    quantized: Path


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], *, shards: int = 1) -> None:
    """Write config, weights and (for several shards) the index, readable by everybody."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n].contiguous() for n in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.iterdir():
        os.chmod(path, 0o644)


def round_to_nearest(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points ``[out, groups]`` by absolute maximum (symmetric) or by range (asymmetric); for blocks
    ``[ceil(out / rows), ceil(in / columns)]``."""
    if args.block_structure:
        rows, columns = args.block_structure
        bands = [[b.abs().amax() for b in band.split(columns, dim=1)] for band in weight.float().split(rows)]
        scale = torch.tensor(bands) / 448
        return scale.to(weight.dtype), torch.zeros_like(scale)
    groups = weight.float().reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
    if args.type == "float":
        scale = groups.abs().amax(-1) / 448
        return scale.to(weight.dtype), torch.zeros_like(scale)
    q_min, q_max = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    if args.symmetric:
        scale = groups.abs().amax(-1) / q_max
        return scale.to(weight.dtype), torch.zeros_like(scale, dtype=torch.int8)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (q_max - q_min)).to(weight.dtype)
    zero = (q_min - low / scale.float()).round().clamp(q_min, q_max).to(torch.int8)
    return scale, zero


def quantized_tensors(
    dense: dict[str, torch.Tensor], config: dict[str, Any], *, skip: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Compress every block Linear with the library's compressor for the first config group."""
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    out = {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or module in skip:
            out[name] = tensor
            continue
        scale, zero = round_to_nearest(tensor, scheme.weights)
        state = {"weight": tensor.float(), "weight_scale": scale.float(), "weight_zero_point": zero}
        for key, value in compressor.compress(state, scheme).items():
            out[f"{module}.{key}"] = scale if key == "weight_scale" else value
    return out


def build(
    root: Path,
    scheme: str = "W4A16",
    *,
    group_size: int | str | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
) -> Pair:
    """A random Llama of 2 layers and the same quantised, in ``root/source`` and ``root/quantized``."""
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    plain = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    dense = {n: t.detach().clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    save(root / "source", dense, plain, shards=shards)
    preset = schemes.preset(scheme).with_group_size(group_size)  # type: ignore[arg-type]
    quantization = schemes.quantization_config([(preset, ["Linear"])], IGNORE)
    tensors = quantized_tensors(dense, quantization)
    save(root / "quantized", tensors, {**plain, "quantization_config": quantization}, shards=shards)
    return Pair(root / "source", root / "quantized")


class Shard:
    """One safetensors file, for changes that a careful writer would not make."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path)

    def replace(self, **changes: torch.Tensor | None) -> None:
        """Set (or with ``None`` drop) tensors; a name is given with ``__`` for each dot."""
        tensors = self.tensors()
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value.contiguous()
        save_file(tensors, self.path, metadata={"format": "pt"})
        os.chmod(self.path, 0o644)

    def header(self) -> tuple[dict[str, Any], int]:
        """The parsed header and the offset at which the data start."""
        data = self.path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + length]), 8 + length

    def rewrite_header(self, header: dict[str, Any] | bytes) -> None:
        """Put another header in front of the same data."""
        data = self.path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    def flip(self, name: str, *, at: int = 0) -> None:
        """Flip the lowest bit of byte ``at`` of a tensor."""
        header, start = self.header()
        offset = start + header[name]["data_offsets"][0] + at
        data = bytearray(self.path.read_bytes())
        data[offset] ^= 1
        self.path.write_bytes(bytes(data))

    def dtype(self, name: str) -> str:
        with safe_open(self.path, framework="pt") as f:
            return str(f.get_slice(name).get_dtype())


def edit_config(folder: Path, change: Any) -> None:
    """Apply ``change(config)`` to config.json in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
