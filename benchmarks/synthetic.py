"""Synthetic checkpoints of any depth, written tensor by tensor so that making them needs little memory and disk.

    python benchmarks/synthetic.py llama OUT --width 1024 --layers 32
    python benchmarks/synthetic.py gemma3-27b OUT --layers 62 --real-layers 2

``llama``: a LlamaForCausalLM with a vocabulary of 512, every weight random. ``gemma3-27b``: a
Gemma3ForConditionalGeneration with the tensor names and shapes of the 27B model (vision tower and projector included);
the embedding and the first ``--real-layers`` blocks hold random data, everything else is a hole in a sparse file,
which reads as zeros and takes no disk. One shard for each decoder block. There is no tokenizer: calibrate with
``random-tokens``, which needs only the config.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy

Shapes = dict[str, tuple[int, ...]]
CHUNK_ELEMENTS = 1 << 22
TILE_ELEMENTS = (1 << 22) + 7919  # odd, so that repeats do not line up with rows
STANDARD_DEVIATION = 0.02


def bfloat16(values: numpy.ndarray) -> numpy.ndarray:
    """float32 -> the bits of bfloat16, by cutting: good enough for random numbers."""
    return (values.astype(numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)


def write_shard(path: Path, shapes: Shapes, *, seed: int | None, tile: numpy.ndarray | None = None) -> int:
    """Write one bfloat16 safetensors file; returns the bytes of its tensors.

    Args:
        path: the file.
        shapes: tensors in file order.
        seed: for fresh random data; ``None`` leaves holes (zeros), or repeats ``tile`` where one is given.
        tile: bits of bfloat16 numbers to repeat.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    generator = numpy.random.default_rng(seed)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        for name, shape in shapes.items():
            left = math.prod(shape)
            if len(shape) == 1 and seed is not None and name.endswith("norm.weight"):
                f.write(bfloat16(numpy.ones(left)).tobytes())
                continue
            while left and (seed is not None or tile is not None):
                n = min(left, CHUNK_ELEMENTS if tile is None else tile.size)
                chunk = (
                    tile[:n] if tile is not None else bfloat16(generator.standard_normal(n, "f4") * STANDARD_DEVIATION)
                )
                f.write(chunk.tobytes())
                left -= n
            f.seek(2 * left, os.SEEK_CUR)
        f.truncate(8 + len(header) + start)
    path.chmod(0o644)
    return start


def write_index(folder: Path, shards: dict[str, Shapes], total: int) -> None:
    """The index that names every tensor's shard."""
    weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def llama(folder: Path, *, width: int, layers: int, head: int = 64, inner: int | None = None) -> int:
    """A Llama of random weights: a quarter of the heads for keys and values; returns its bytes."""
    vocabulary = 512
    heads, kv = width // head, max(1, width // head // 4)
    inner = inner or math.ceil(width * 8 / 3 / 128) * 128
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shards: dict[str, Shapes] = {
        "model-outside.safetensors": {
            "model.embed_tokens.weight": (vocabulary, width),
            "model.norm.weight": (width,),
            "lm_head.weight": (vocabulary, width),
        }
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shards[f"model-layer-{i:03d}.safetensors"] = {
            p + "input_layernorm.weight": (width,),
            p + "post_attention_layernorm.weight": (width,),
            p + "self_attn.q_proj.weight": (heads * head, width),
            p + "self_attn.k_proj.weight": (kv * head, width),
            p + "self_attn.v_proj.weight": (kv * head, width),
            p + "self_attn.o_proj.weight": (width, heads * head),
            p + "mlp.gate_proj.weight": (inner, width),
            p + "mlp.up_proj.weight": (inner, width),
            p + "mlp.down_proj.weight": (width, inner),
        }
    total = sum(write_shard(folder / file, shapes, seed=n) for n, (file, shapes) in enumerate(shards.items()))
    write_index(folder, shards, total)
    return total


GEMMA_TEXT = {
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GEMMA_PATTERN = 6
GEMMA_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def gemma3_27b(folder: Path, *, layers: int, real_layers: int) -> int:
    """The 27B Gemma 3 with holes instead of most weights; returns the bytes of its tensors (holes included)."""
    kinds = ["full_attention" if (i + 1) % GEMMA_PATTERN == 0 else "sliding_attention" for i in range(layers)]
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "text_config": {**GEMMA_TEXT, "num_hidden_layers": layers, "layer_types": kinds},
        "vision_config": GEMMA_VISION,
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    hidden, inner, vocabulary = 5376, 21504, 262208
    shards: dict[str, Shapes] = {
        "model-embedding.safetensors": {"language_model.model.embed_tokens.weight": (vocabulary, hidden)},
        "model-vision.safetensors": gemma_vision(hidden) | {"language_model.model.norm.weight": (hidden,)},
    }
    for i in range(layers):
        p = f"language_model.model.layers.{i}."
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        shards[f"model-layer-{i:03d}.safetensors"] = {
            **{f"{p}{norm}_layernorm.weight": (hidden,) for norm in norms},
            p + "self_attn.q_norm.weight": (128,),
            p + "self_attn.k_norm.weight": (128,),
            p + "self_attn.q_proj.weight": (4096, hidden),
            p + "self_attn.k_proj.weight": (2048, hidden),
            p + "self_attn.v_proj.weight": (2048, hidden),
            p + "self_attn.o_proj.weight": (hidden, 4096),
            p + "mlp.gate_proj.weight": (inner, hidden),
            p + "mlp.up_proj.weight": (inner, hidden),
            p + "mlp.down_proj.weight": (hidden, inner),
        }
    real = {"model-embedding.safetensors"} if real_layers else set()
    real |= {f"model-layer-{i:03d}.safetensors" for i in range(real_layers)}
    tile = bfloat16(numpy.random.default_rng(0).standard_normal(TILE_ELEMENTS, "f4") * STANDARD_DEVIATION)
    total = 0
    for file, shapes in shards.items():
        total += write_shard(folder / file, shapes, seed=None, tile=tile if file in real else None)
    write_index(folder, shards, total)
    return total


def qwen3_235b(folder: Path, *, layers: int) -> int:
    """Blocks of Qwen3-235B-A22B, a mixture of 128 experts, and a small vocabulary; returns the bytes of its tensors."""
    hidden, inner, experts, vocabulary = 4096, 1536, 128, 1024
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": 12288,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shards: dict[str, Shapes] = {
        "model-embedding.safetensors": {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        matrices = {
            f"{p}mlp.experts.{e}.{leaf}.weight": (inner, hidden)
            for e in range(experts)
            for leaf in ("gate_proj", "up_proj")
        }
        matrices |= {f"{p}mlp.experts.{e}.down_proj.weight": (hidden, inner) for e in range(experts)}
        shards[f"model-layer-{i:03d}.safetensors"] = {
            **{f"{p}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")},
            p + "self_attn.q_norm.weight": (128,),
            p + "self_attn.k_norm.weight": (128,),
            p + "self_attn.q_proj.weight": (8192, hidden),
            p + "self_attn.k_proj.weight": (512, hidden),
            p + "self_attn.v_proj.weight": (512, hidden),
            p + "self_attn.o_proj.weight": (hidden, 8192),
            p + "mlp.gate.weight": (experts, hidden),
            **matrices,
        }
    tile = bfloat16(numpy.random.default_rng(0).standard_normal(TILE_ELEMENTS, "f4") * STANDARD_DEVIATION)
    total = sum(write_shard(folder / file, shapes, seed=None, tile=tile) for file, shapes in shards.items())
    write_index(folder, shards, total)
    return total


def gemma_vision(hidden: int) -> Shapes:
    """Names and shapes of the vision tower and the projector."""
    d, inner, p = 1152, 4304, "vision_tower.vision_model."
    found: Shapes = {
        "multi_modal_projector.mm_input_projection_weight": (d, hidden),
        "multi_modal_projector.mm_soft_emb_norm.weight": (d,),
        p + "embeddings.patch_embedding.weight": (d, 3, 14, 14),
        p + "embeddings.patch_embedding.bias": (d,),
        p + "embeddings.position_embedding.weight": (4096, d),
        p + "post_layernorm.weight": (d,),
        p + "post_layernorm.bias": (d,),
    }
    for i in range(27):
        q = f"{p}encoder.layers.{i}."
        square = {f"{q}self_attn.{x}_proj": (d, d) for x in ("q", "k", "v", "out")}
        for name, shape in {**square, q + "mlp.fc1": (inner, d), q + "mlp.fc2": (d, inner)}.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{q}{norm}.weight": (d,), f"{q}{norm}.bias": (d,)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["llama", "gemma3-27b", "qwen3-235b"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--width", type=int, default=1024, help="llama only; a multiple of 256")
    parser.add_argument("--real-layers", type=int, default=2, help="gemma3-27b only; 0: holes everywhere")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    if options.shape == "llama":
        total = llama(options.out, width=options.width, layers=options.layers)
    elif options.shape == "qwen3-235b":
        total = qwen3_235b(options.out, layers=options.layers)
    else:
        total = gemma3_27b(options.out, layers=options.layers, real_layers=options.real_layers)
    print(json.dumps({"tensor_bytes": total}))


if __name__ == "__main__":
    main()
