"""Which engine runs a checkpoint on a machine, with the reason in words, before anything is started.

The table of what an engine's kernels can do is :func:`vllm_obstacle`; it was read from vLLM 0.32 and tried on CPUs.
Does not cover: whether vLLM or llama.cpp knows the architecture; the first says so when it starts, the second when the
checkpoint is converted.

Imports torch only where a checkpoint is read, as all that a running server holds does: see :mod:`prepare`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import UsageError
from halfbyte.serving.machine import Machine

Engine = Literal["vllm", "llamacpp", "transformers"]
ENGINES: tuple[Engine, ...] = ("vllm", "llamacpp", "transformers")
INSTALL: dict[Engine, str] = {
    "vllm": "pip install vllm in an environment of its own, and name its interpreter in HALFBYTE_VLLM_PYTHON",
    "llamacpp": 'pip install "halfbyte[serve]"',
    "transformers": 'pip install "halfbyte[serve]"',
}
NAMES: dict[Engine, str] = {"vllm": "vLLM", "llamacpp": "llama.cpp", "transformers": "transformers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How a group of weights is stored: what kernels care about.

    Attributes:
        bits: of a code; floating: float8 codes.
        input_bits: to which inputs are rounded while it runs, ``None`` for not at all.
    """

    bits: int
    floating: bool
    input_bits: int | None

    @property
    def name(self) -> str:
        return f"{'FP' if self.floating else 'W'}{self.bits}A{self.input_bits or 16}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A checkpoint, as far as the choice depends on it.

    Attributes:
        path: folder, or GGUF file.
        method: ``none``, ``compressed-tensors``, ``awq``, ``gptq``, ``gguf``, ``fp8``.
        weights: one entry for each kind of quantised weight.
        context: the longest sequence that the model was made for; ``None`` where the config does not say.
        pictures: whether it has a vision tower.
        kv_bytes: of keys and values of one token in 16 bits, at most.
    """

    path: Path
    method: str
    weights: tuple[Weights, ...]
    context: int | None
    pictures: bool
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An engine, why, and what would be better."""

    engine: Engine
    reason: str
    advice: str


def read_served(name: str | Path) -> Served:
    """Read a checkpoint's config and headers; a hub id is fetched.

    Raises:
        CheckpointError: it is missing or broken.
    """
    from halfbyte.checkpoint.reader import open_checkpoint
    from halfbyte.checkpoint.source import resolve
    from halfbyte.conversion.formats import is_gguf
    from halfbyte.inspection_formats import quantization_config

    if is_gguf(name):
        return Served(path=Path(name), method="gguf", weights=(), context=None, pictures=False, kv_bytes=0)
    path = resolve(name)
    checkpoint = open_checkpoint(path, str(name))
    config = quantization_config(checkpoint)
    text = checkpoint.text_config
    context = text.get("max_position_embeddings")
    return Served(
        path=path,
        method=str(config.get("quant_method", "none")),
        weights=_weights(config),
        context=context if isinstance(context, int) else None,
        pictures="vision_config" in checkpoint.config,
        kv_bytes=_kv_bytes(text),
    )


def _weights(config: Mapping[str, Any]) -> tuple[Weights, ...]:
    method = config.get("quant_method")
    if method in ("awq", "gptq"):
        return (Weights(bits=int(config.get("bits") or config.get("w_bit") or 4), floating=False, input_bits=None),)
    if method == "fp8":
        return (Weights(bits=8, floating=True, input_bits=8),)
    groups = config.get("config_groups")
    found: dict[Weights, None] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        bits, input_bits = weights.get("num_bits", 8), inputs.get("num_bits", 8) if inputs else None
        found[Weights(bits=int(bits), floating=weights.get("type") == "float", input_bits=input_bits)] = None
    return tuple(found)


def _kv_bytes(text: Mapping[str, Any]) -> int:
    heads = text.get("num_attention_heads") or 0
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or (text.get("hidden_size", 0) // heads if heads else 0)
    layers = text.get("num_hidden_layers") or 0
    sizes = (kv_heads, head_dim, layers)
    return 2 * 2 * kv_heads * head_dim * layers if all(isinstance(n, int) for n in sizes) else 0


def vllm_obstacle(served: Served, machine: Machine) -> str | None:
    """Why vLLM cannot run these weights on this machine; ``None`` if it can."""
    if served.method == "gguf":
        return "vLLM is not asked to read GGUF"
    on_gpu = bool(machine.gpus) and not (machine.vllm is not None and machine.vllm.cpu)
    for weights in served.weights:
        found = _gpu_obstacle(weights, machine) if on_gpu else _cpu_obstacle(weights, served.method, machine)
        if found is not None:
            return found
    return None


def _gpu_obstacle(weights: Weights, machine: Machine) -> str | None:
    gpu = min(machine.gpus, key=lambda g: g.capability)
    # Marlin, which holds weights alone quantised, starts at 7.5; int8 products likewise; W4A8's kernels at 9.0.
    least = 9.0 if weights.bits == 4 and weights.input_bits == 8 else 7.5
    if gpu.capability < least:
        return f"vLLM's kernels for {weights.name} need compute capability {least}, {gpu.name} has {gpu.capability}"
    if weights.bits in (2, 3):
        return f"vLLM serves {weights.name} only where the humming kernels are installed"
    return None


def _cpu_obstacle(weights: Weights, method: str, machine: Machine) -> str | None:
    if weights.input_bits is None and weights.bits != 4:
        return f"vLLM has no kernel for {weights.name} on CPUs"
    if weights.bits == 4 and not machine.avx512:
        name = weights.name if method == "compressed-tensors" else method.upper()
        return f"vLLM's kernel for {name} on CPUs needs AVX512, which this CPU lacks"
    return None


def choose(wanted: str, served: Served, machine: Machine, *, gguf_obstacle: str | None) -> Choice:
    """The engine for a checkpoint.

    vLLM where there is a GPU, or a CPU with AVX512, and where it is installed; llama.cpp on every other CPU; else
    transformers, which runs everything, slowly.

    Args:
        wanted: ``auto``, or an engine's name.
        served: the checkpoint; machine: where it is to run.
        gguf_obstacle: why the checkpoint cannot become GGUF, ``None`` if it can.

    Raises:
        UsageError: the engine wanted is unknown, not installed, or cannot run this checkpoint here.
    """
    if wanted != "auto" and wanted not in ENGINES:
        raise UsageError(
            f"unknown engine {wanted!r}", where="--engine", remedy=f"Use auto or one of {', '.join(ENGINES)}."
        )
    obstacles: dict[Engine, str | None] = {
        "vllm": None if machine.vllm else "vLLM is not installed",
        "llamacpp": None if machine.llamacpp else "llama.cpp (xllamacpp) is not installed",
        "transformers": None,
    }
    installed = {engine: found is None for engine, found in obstacles.items()}
    obstacles["vllm"] = vllm_obstacle(served, machine) or obstacles["vllm"]
    obstacles["llamacpp"] = gguf_obstacle or obstacles["llamacpp"]
    for engine in ENGINES:
        if wanted == engine:
            return _as_wanted(engine, obstacles[engine], installed=installed[engine])
    where = machine.gpus[0].name if machine.gpus else "a CPU with AVX512" if machine.avx512 else "a CPU without AVX512"
    likes_vllm = bool(machine.gpus) or machine.avx512
    order: list[Engine] = ["vllm", "llamacpp", "transformers"] if likes_vllm else ["llamacpp", "transformers"]
    engine = next(e for e in order if obstacles[e] is None)
    passed = order[: order.index(engine)]
    why = [str(obstacles[e]) for e in passed]
    reason = f"on {where} it is the first choice" if not why else "; ".join(why)
    better = next((e for e in passed if not installed[e] and _only_missing(e, served, machine, gguf_obstacle)), None)
    advice = f"For {NAMES[better]}: {INSTALL[better]}." if better else ""
    return Choice(engine=engine, reason=reason, advice=advice)


def _as_wanted(engine: Engine, obstacle: str | None, *, installed: bool) -> Choice:
    if obstacle is None:
        return Choice(engine=engine, reason="asked for", advice="")
    remedy = f"Install it: {INSTALL[engine]}." if not installed else "Leave --engine out, and one that can is chosen."
    raise UsageError(obstacle, where=f"--engine {engine}", remedy=remedy)


def _only_missing(engine: Engine, served: Served, machine: Machine, gguf_obstacle: str | None) -> bool:
    """Whether an engine that is not installed would run the checkpoint if it were."""
    return (vllm_obstacle(served, machine) if engine == "vllm" else gguf_obstacle) is None
