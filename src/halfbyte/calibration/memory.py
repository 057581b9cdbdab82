"""Whether the whole model fits in memory, as ``self`` calibration needs, and what is used instead where it does not."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
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
MEMINFO, STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
OWN_GROUPS, MOUNTS = Path("/proc/self/cgroup"), Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Where the kernel accounts for the memory of a group of processes: a container's, or one that systemd-run made.

    Groups lie in groups, and each may have a limit, so all from the process's own up to the outermost that is mounted
    count. A container mostly sees its own group as the outermost, while the path to it may still be the host's.

    The page cache counts as used, though the kernel drops it for whoever asks for memory. A file that is written and
    then read (a download that is hashed) is in the active part, which is dropped as well when the inactive one is gone;
    so both parts count as free, as in the kernel's own ``MemAvailable``. What processes have mapped does not: it is
    their libraries, for the most part, and would be read again at once.

    Attributes:
        folder: of the outermost group.
        controller: how ``/proc/self/cgroup`` names what keeps this account.
        limits, used: names of files with bytes; a limit may be the word ``max``, or absent.
        cached, mapped: names in its ``memory.stat`` of the page cache's parts, and of what is mapped of them.
    """

    folder: Path
    controller: str
    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]
    mapped: str

    def available_bytes(self) -> int | None:
        """What a process may still allocate by the tightest of its groups; ``None`` where none has a limit."""
        left = [self._left(self.folder / group) for group in self._groups()]
        return min((bytes_left for bytes_left in left if bytes_left is not None), default=None)

    def _groups(self) -> list[Path]:
        """This process's own group and those around it, relative to the outermost, which comes last."""
        own, mounted = Path("/"), Path("/")
        for line in _lines(OWN_GROUPS):
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if self.controller in controllers.split(","):
                own = Path("/", path)
        for line in _lines(MOUNTS):
            fields = line.split(" ")
            if fields[4:5] == [str(self.folder)]:
                mounted = Path(fields[3])
        if ".." in own.parts or not own.is_relative_to(mounted):
            return [Path()]
        inside = own.relative_to(mounted)
        return [inside, *inside.parents]

    def _left(self, folder: Path) -> int | None:
        limits = [number for name in self.limits if (number := _number(folder / name)) is not None]
        used = _number(folder / self.used)
        if not limits or used is None:
            return None
        stat = _amounts(folder / "memory.stat")
        droppable = max(0, sum(stat.get(name, 0) for name in self.cached) - stat.get(self.mapped, 0))
        return max(0, min(limits) - max(0, used - droppable))


CGROUPS = (
    Cgroup(
        Path("/sys/fs/cgroup"),
        "",
        ("memory.max", "memory.high"),
        "memory.current",
        ("inactive_file", "active_file"),
        "file_mapped",
    ),  # version 2
    Cgroup(
        Path("/sys/fs/cgroup/memory"),
        "memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
        "total_mapped_file",
    ),  # version 1
)


def available_memory_bytes(device: str = "cpu", *, processes: int = 1) -> int:
    """Memory that this process could allocate now, in bytes.

    On a GPU what is free there; else the machine's, within the limits of the process's groups (a container's,
    systemd-run's) and of the process (``ulimit -d``, ``ulimit -v``).

    Args:
        processes: so many share what machine and groups have. Limits of a process are its own.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free)
    groups = [g.available_bytes() for g in CGROUPS]
    shared = min([_machine_bytes(), *(b for b in groups if b is not None)])
    return max(0, min([shared // processes, *_left_by_limits()]))


def local_processes() -> int:
    """How many processes torchrun runs on this machine; 1 without it."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(said)) if said.isdecimal() else 1


def _left_by_limits() -> list[int]:
    """What the kernel still lets this process have, by each limit that is set: of private memory, of addresses."""
    used = _amounts(STATUS)
    limits = ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize"))
    soft = [(resource.getrlimit(limit)[0], name) for limit, name in limits]
    return [at_most - used[name] for at_most, name in soft if at_most != resource.RLIM_INFINITY and name in used]


def _machine_bytes() -> int:
    found = _amounts(MEMINFO).get("MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found


def _amounts(path: Path) -> dict[str, int]:
    """Bytes by name from a file of the kernel's: ``name 123`` or ``Name: 123 kB`` a line. None where it is absent."""
    found = {}
    for line in _lines(path):
        name, *words = line.replace(":", " ").split() or [""]
        if words and words[0].isdecimal():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _number(path: Path) -> int | None:
    """What a file with one number says."""
    words = " ".join(_lines(path)).split()
    return int(words[0]) if len(words) == 1 and words[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    """None where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").splitlines()
    return []


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

    Arguments are those of :func:`self_writing_bytes`. Of several processes one writes, while the others hold little.
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
