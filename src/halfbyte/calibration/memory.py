"""Whether the whole model fits in memory, as ``self`` calibration needs, and what is used instead where it does not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

FALLBACK_SPEC = "hf:neuralmagic/calibration:LLM:train"
CPU_GROWTH = 2.0  # 16-bit weights become float32
HEADROOM = 1.25  # key-value cache, logits, everything else
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


def self_needs_bytes(size_bytes: int, device: str = "cpu") -> int:
    """Memory to run a whole checkpoint of ``size_bytes`` on disk, reckoned as 16-bit weights."""
    growth = 1.0 if torch.device(device).type == "cuda" else CPU_GROWTH
    return int(size_bytes * growth * HEADROOM)


def self_fits(size_bytes: int, device: str = "cpu") -> bool:
    """Whether a checkpoint of ``size_bytes`` could write its own calibration text on this machine now."""
    return self_needs_bytes(size_bytes, device) <= available_memory_bytes(device)


def default_spec(size_bytes: int, device: str = "cpu") -> tuple[str, str]:
    """The calibration spec to use when none was given, and a sentence for the user (empty when it is ``self``)."""
    if self_fits(size_bytes, device):
        return "self", ""
    needed, there = self_needs_bytes(size_bytes, device) / 1e9, available_memory_bytes(device) / 1e9
    return FALLBACK_SPEC, (
        f"Writing its own calibration text would need the whole model in memory (about {needed:.1f} GB; {there:.1f} GB "
        f"are available), so the data set {FALLBACK_SPEC.removeprefix('hf:')} from the hub is used instead; "
        "choose another with --calibration."
    )
