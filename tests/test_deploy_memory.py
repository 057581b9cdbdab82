"""The memory that serving is reckoned to need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import halfbyte
import tiny
from conftest import Models
from deployments import NEEDED, manifest
from halfbyte.deployment.memory import cache_bytes
from halfbyte.deployment.options import Wishes
from halfbyte.errors import UsageError


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_the_cache_is_as_large_as_transformers_makes_it(tiny_model: Models, family: str) -> None:
    """The oracle is transformers' own cache, filled."""
    folder = tiny_model(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = 40
    with torch.inference_mode():
        out = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True)
    held = 0
    for layer, kind in zip(out.past_key_values.layers, layer_kinds(model.config), strict=True):
        window = int(model.config.sliding_window) if kind == "sliding_attention" else tokens
        for tensor in (layer.keys, layer.values):
            kept = min(window, tokens)
            assert tensor.shape[-2] in (kept, kept - 1)  # of a window, transformers drops what the next token ends
            held += tensor.nbytes // tensor.shape[-2] * kept
    assert cache_bytes(tiny.config_of(folder), tokens) == held


def layer_kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None):
        assert config.model_type == "mistral"
        return ["sliding_attention"] * config.num_hidden_layers
    return kinds or ["full_attention"] * config.num_hidden_layers


def test_latent_attention_is_counted_once() -> None:
    """DeepSeek-V3: 61 layers of 512 + 64 elements."""
    config = {"num_hidden_layers": 61, "num_attention_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512}
    assert cache_bytes(config | {"qk_rope_head_dim": 64}, 1000) == 2 * 61 * 576 * 1000


def test_figures_in_the_files_are_those_of_the_record(ferry: Path, tmp_path: Path) -> None:
    record = halfbyte.deploy("kserve", ferry, tmp_path / "out", wishes=replace(NEEDED["kserve"], gpus=2, sequences=3))
    for estimate in record.estimates.values():
        assert estimate.value == pytest.approx(sum(estimate.parts.values()))
    resources = manifest(tmp_path / "out", "inferenceservice.yaml")["spec"]["predictor"]["model"]["resources"]
    requested = int(resources["requests"]["memory"].removesuffix("Gi")) << 30
    assert 0 <= requested - record.estimates["memory"].value < 1 << 30
    assert int(resources["limits"]["memory"].removesuffix("Gi")) << 30 >= 1.25 * record.estimates["memory"].value
    readme = (tmp_path / "out" / "README.md").read_text()
    for estimate in record.estimates.values():
        assert f"{estimate.value / 1e9:.2f} GB" in readme
    weights = sum(f.stat().st_size for f in ferry.glob("*.safetensors"))
    parts = record.estimates["gpu_memory"].parts
    assert parts["weights, one of 2 parts"] == pytest.approx(weights / 2, rel=0.05)


def test_what_does_not_fit_is_refused(ferry: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--gpu-memory: each of 1 GPUs would need .* Use --gpus \d+, a shorter"):
        halfbyte.deploy("podman", ferry, tmp_path / "out", wishes=Wishes(gpu_memory_gb=1e-4))
    halfbyte.deploy("podman", ferry, tmp_path / "out", wishes=Wishes(gpu_memory_gb=80.0))
