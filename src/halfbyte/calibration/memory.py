"""Whether the whole model fits in memory, as ``self`` calibration needs, and what is used instead where it does not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FALLBACK_SPEC = "hf:neuralmagic/calibration:LLM:train"
CPU_GROWTH = 2.0  # 16-bit weights become float32
HEADROOM = 1.1
LOGIT_COPIES = 4  # as the model has them, as float32, masked, cumulative
# Fixed numbers rather than what is free at the time: the batch size changes rounding, and so the text.
MAX_ROWS = {"cpu": 64, "cuda": 256}
MAX_CACHE_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory_bytes(device: str = "cpu") -> int:
    """Memory that could be allocated now: the GPU's free memory, or the machine's, within the container's limit."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free)
    amounts = [_machine_bytes()]
    for limit, used in CGROUP_FILES:
        try:
            amounts.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return max(0, min(amounts))


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rows_per_batch(config: Mapping[str, Any], seq_len: int, device: str = "cpu") -> int:
    """Sequences written at once: as many as keep the key-value cache within :data:`MAX_CACHE_BYTES`."""
    kind = _kind(device)
    return max(1, min(MAX_ROWS[kind], MAX_CACHE_BYTES[kind] // _cache_bytes(config, seq_len, kind)))


def self_writing_bytes(
    size_bytes: int, config: Mapping[str, Any], samples: int, seq_len: int, device: str = "cpu"
) -> int:
    """Memory that ``self`` calibration needs: the whole model, its key-value cache and the logits of one position.

    Args:
        size_bytes: the checkpoint on disk, reckoned as 16-bit weights.
        config: of the text model.
        samples, seq_len: sequences to write, and tokens in each.
        device: float32 on a CPU, 16 bits on a GPU.
    """
    kind = _kind(device)
    rows = min(samples, rows_per_batch(config, seq_len, device))
    logits = 4 * rows * int(config.get("vocab_size") or 0) * LOGIT_COPIES
    weights = size_bytes * (CPU_GROWTH if kind == "cpu" else 1.0)
    return int(weights) + rows * _cache_bytes(config, seq_len, kind) + logits


def default_spec(
    size_bytes: int, config: Mapping[str, Any], samples: int, seq_len: int, device: str = "cpu"
) -> tuple[str, str]:
    """The calibration spec to use when none was given, and a sentence for the user (empty when it is ``self``).

    Arguments are those of :func:`self_writing_bytes`.
    """
    needed = HEADROOM * self_writing_bytes(size_bytes, config, samples, seq_len, device)
    there = available_memory_bytes(device)
    if needed <= there:
        return "self", ""
    return FALLBACK_SPEC, (
        f"Writing its own calibration text would need the whole model in memory (about {needed / 1e9:.1f} GB; "
        f"{there / 1e9:.1f} GB are available), so the data set {FALLBACK_SPEC.removeprefix('hf:')} from the hub is "
        "used instead; choose another with --calibration."
    )


def _kind(device: str) -> str:
    return "cuda" if torch.device(device).type == "cuda" else "cpu"


def _cache_bytes(config: Mapping[str, Any], seq_len: int, kind: str) -> int:
    """The key-value cache of one sequence."""
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or int(config.get("hidden_size") or 1024) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    element = 4 if kind == "cpu" else 2
    return 2 * int(config.get("num_hidden_layers") or 32) * kv_heads * width * seq_len * element
