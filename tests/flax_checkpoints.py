"""Tiny Gemma 3 checkpoints for Flax, and the transformers models that they are the same as.

A model is built by transformers, its Linears are put on an int4 grid, and its tensors are brought into Flax' layout by
inverses that are written here from the shapes alone, in numpy, and share nothing with ``halfbyte.conversion``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import tiny

Array = npt.NDArray[Any]

VOCAB, HEADS = tiny.VOCAB, 4
has_orbax = all(importlib.util.find_spec(m) for m in ("orbax", "jax", "tensorstore"))

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 7,  # the sixth attends to everything
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True, slots=True)
class Made:
    """A model with its Linears on the grid, and how they came there.

    Attributes:
        model: float32, whose numbers are those that are stored.
        grids: codes int8 and scales float32 by dense name as transformers' module tree has it.
        arrays: what the Flax checkpoint holds.
    """

    model: torch.nn.Module
    grids: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    arrays: Mapping[str, torch.Tensor]


def build(*, pictures: bool, stored: torch.dtype, seed: int = 0) -> Made:
    """A random model; ``stored`` is the dtype on disk."""
    torch.manual_seed(seed)
    model: Any
    if pictures:
        text = TEXT | {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": VOCAB + 64}
        text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
        config = transformers.Gemma3Config(
            text_config=text,
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=VOCAB,
            boi_token_index=VOCAB - 2,
            eoi_token_index=VOCAB - 1,
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
    grids = {}
    for name, parameter in model.named_parameters():
        value = torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
        if name.endswith("embed_tokens.weight"):
            value[VOCAB:] = 0
        if "_proj.weight" in name and "vision" not in name:
            grids[name] = fake_quantise(value)
            value = (grids[name][0].unflatten(1, (-1, 32)) * grids[name][1].unsqueeze(-1)).flatten(1)
        parameter.data = value.to(stored).to(torch.float32)
    arrays = {n: a.to(stored) for n, a in to_flax(model.state_dict(), pictures=pictures).items()}
    return Made(model.eval(), grids, arrays)


def fake_quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -7..7 and bfloat16 scales of 32 inputs each, as training does it; one group of zeros."""
    groups = weight.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16).to(torch.float32)
    codes = (groups / scales.unsqueeze(-1)).round().clamp(-7, 7)
    codes[3, 1] = 0
    return codes.flatten(1).to(torch.int8), scales


def to_flax(state: Mapping[str, torch.Tensor], *, pictures: bool) -> dict[str, torch.Tensor]:
    """Flax' arrays from transformers' tensors: heads split off, inputs before outputs, pairs in one."""
    text = "model.language_model" if pictures else "model"
    heads, dim = HEADS, int(TEXT["head_dim"])
    kv = 2 if pictures else 1
    out: dict[str, torch.Tensor] = {
        "transformer/embedder/input_embedding": state[f"{text}.embed_tokens.weight"][:VOCAB],
        "transformer/final_norm/scale": state[f"{text}.norm.weight"],
    }

    def split(weight: torch.Tensor, count: int) -> torch.Tensor:
        """``[count * dim, in]`` to ``[count, in, dim]``, by hand."""
        return torch.stack([weight[h * dim : (h + 1) * dim].T for h in range(count)])

    for i in range(int(TEXT["num_hidden_layers"])):
        theirs, ours = f"{text}.layers.{i}", f"transformer/layer_{i}"
        w = {n: state[f"{theirs}.{n}.weight"] for n in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
        a = {n: state[f"{theirs}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        out[f"{ours}/attn/q_einsum/w"] = split(a["q_proj"], heads)
        out[f"{ours}/attn/kv_einsum/w"] = torch.stack([split(a["k_proj"], kv), split(a["v_proj"], kv)])
        columns = [a["o_proj"][:, h * dim : (h + 1) * dim].T for h in range(heads)]
        out[f"{ours}/attn/attn_vec_einsum/w"] = torch.stack(columns)
        out[f"{ours}/mlp/gating_einsum/w"] = torch.stack([w["mlp.gate_proj"], w["mlp.up_proj"]])
        out[f"{ours}/mlp/linear/w"] = w["mlp.down_proj"].T
        out[f"{ours}/attn/_query_norm/scale"] = state[f"{theirs}.self_attn.q_norm.weight"]
        out[f"{ours}/attn/_key_norm/scale"] = state[f"{theirs}.self_attn.k_norm.weight"]
        out[f"{ours}/pre_attention_norm/scale"] = state[f"{theirs}.input_layernorm.weight"]
        out[f"{ours}/post_attention_norm/scale"] = state[f"{theirs}.post_attention_layernorm.weight"]
        out[f"{ours}/pre_ffw_norm/scale"] = state[f"{theirs}.pre_feedforward_layernorm.weight"]
        out[f"{ours}/post_ffw_norm/scale"] = state[f"{theirs}.post_feedforward_layernorm.weight"]
    if pictures:
        projector = "model.multi_modal_projector"
        out["transformer/embedder/mm_input_projection/w"] = state[f"{projector}.mm_input_projection_weight"]
        out["transformer/embedder/mm_soft_embedding_norm/scale"] = state[f"{projector}.mm_soft_emb_norm.weight"]
        out |= _tower({n.removeprefix("model.vision_tower."): t for n, t in state.items() if "vision_tower" in n})
    return out


def _tower(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    base, heads, width = "SigLiPFromPatches_0/siglip_encoder", VISION["num_attention_heads"], VISION["hidden_size"]
    state = {n.removeprefix("vision_model."): t for n, t in state.items()}
    patches = state["embeddings.patch_embedding.weight"]
    out = {
        f"{base}/embedding/kernel": torch.einsum("oihw->hwio", patches),
        f"{base}/embedding/bias": state["embeddings.patch_embedding.bias"],
        f"{base}/pos_embedding": state["embeddings.position_embedding.weight"][None],
        f"{base}/Transformer/encoder_norm/scale": state["post_layernorm.weight"],
        f"{base}/Transformer/encoder_norm/bias": state["post_layernorm.bias"],
    }
    for i in range(VISION["num_hidden_layers"]):
        theirs, ours = f"encoder.layers.{i}", f"{base}/Transformer/encoderblock_{i}"
        for n in (0, 1):
            out[f"{ours}/LayerNorm_{n}/scale"] = state[f"{theirs}.layer_norm{n + 1}.weight"]
            out[f"{ours}/LayerNorm_{n}/bias"] = state[f"{theirs}.layer_norm{n + 1}.bias"]
            out[f"{ours}/MlpBlock_0/Dense_{n}/kernel"] = torch.einsum("oi->io", state[f"{theirs}.mlp.fc{n + 1}.weight"])
            out[f"{ours}/MlpBlock_0/Dense_{n}/bias"] = state[f"{theirs}.mlp.fc{n + 1}.bias"]
        for name, leaf in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            weight, bias = (state[f"{theirs}.self_attn.{leaf}.{n}"] for n in ("weight", "bias"))
            kernel = torch.einsum("hdi->ihd", weight.reshape(heads, width // heads, width))
            out[f"{ours}/MultiHeadDotProductAttention_0/{name}/kernel"] = kernel
            out[f"{ours}/MultiHeadDotProductAttention_0/{name}/bias"] = bias.reshape(heads, width // heads)
        weight = state[f"{theirs}.self_attn.out_proj.weight"].reshape(width, heads, width // heads)
        out[f"{ours}/MultiHeadDotProductAttention_0/out/kernel"] = torch.einsum("ohd->hdo", weight)
        out[f"{ours}/MultiHeadDotProductAttention_0/out/bias"] = state[f"{theirs}.self_attn.out_proj.bias"]
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checkpoint to be written."""

    arrays: Mapping[str, torch.Tensor]
    out: Path
    ocdbt: bool = True
    zarr3: bool = False
    nested: bool = False


def write(jobs: Sequence[Job], scratch: Path) -> None:
    """Have orbax write checkpoints, in one process of their own."""
    listed = []
    for number, job in enumerate(jobs):
        file = scratch / f"arrays-{number}.npz"
        np.savez(file, **{_key(n, a): _bits(a) for n, a in job.arrays.items()})
        job.out.parent.mkdir(parents=True, exist_ok=True)
        kind = {"ocdbt": job.ocdbt, "zarr3": job.zarr3, "nested": job.nested}
        listed.append({"arrays": str(file), "out": str(job.out), **kind})
    jobs_file = scratch / "jobs.json"
    jobs_file.write_text(json.dumps(listed))
    program = Path(__file__).parent / "write_orbax.py"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(program), str(jobs_file)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _key(name: str, array: torch.Tensor) -> str:
    return f"{name}:bf16" if array.dtype == torch.bfloat16 else name


def _bits(array: torch.Tensor) -> Array:
    array = array.contiguous()
    found: Array = array.view(torch.int16).numpy().view(np.uint16) if array.dtype == torch.bfloat16 else array.numpy()
    return found


def save_config(made: Made, folder: Path) -> Path:
    """The config and the tokenizer that go with a model, as a user would have them."""
    folder.mkdir(parents=True)
    made.model.config.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder
