"""What serving needs in memory, with the reckoning behind it. Nothing is measured here.

weights    their bytes on disk; where transformers unpacks them, one number a parameter
cache      keys and values of ``sequences`` full contexts, see :func:`cache_bytes`
runtime    what a Python process with torch holds, as measured for `plan`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from halfbyte.deployment.options import Options
from halfbyte.deployment.subject import Subject
from halfbyte.errors import UsageError
from halfbyte.estimates import RUNTIME_BYTES
from halfbyte.records import Estimate

GIB = 1 << 30
# Of a GPU's memory vLLM takes this share; it is passed on explicitly.
GPU_SHARE = 0.9
CACHE_ITEM = 2  # 16 bits, in every engine but transformers on a CPU
# Whose layers all have the window, where there is one, without layer_types that say so. Of others without, full
# attention is the most that it can be.
SLIDING = ("mistral", "mixtral", "phi3", "starcoder2")
# Shared memory by which vLLM's processes pass tensors on, for each of them.
SHARED_BYTES = 1 << 30
# Of an amount that a container may not exceed: reckonings miss something.
HEADROOM = 0.25


def cache_bytes(config: Mapping[str, Any], tokens: int, item: int = CACHE_ITEM) -> int:
    """Bytes of the key-value cache of one sequence, ``item`` of them an element.

    A layer of full attention keeps ``2 * kv_heads * head_dim`` elements a token, one of sliding attention as many for
    the tokens of its window alone. Multi-head latent attention (DeepSeek) keeps ``kv_lora_rank + qk_rope_head_dim``.
    Linear attention keeps none that grows.
    """
    layers = int(config.get("num_hidden_layers") or 0)
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    elements = 2 * int(config.get("num_key_value_heads") or heads) * width
    if config.get("kv_lora_rank"):
        elements = int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)
    window = int(config.get("sliding_window") or tokens)
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        kinds = ["sliding_attention" if config.get("model_type") in SLIDING else "full_attention"] * layers
    kept = {"sliding_attention": min(window, tokens), "chunked_attention": tokens, "full_attention": tokens}
    return item * elements * sum(kept.get(str(kind), 0) for kind in kinds)


def estimates(subject: Subject, options: Options) -> dict[str, Estimate]:
    """``memory`` (of the host, one node) and, on GPUs, ``gpu_memory`` (of each GPU)."""
    unpacked = options.engine == "transformers"
    item = 4 if unpacked and not options.gpus else CACHE_ITEM
    cache = float(options.sequences * cache_bytes(subject.config, options.context, item))
    of_cache = {f"key-value cache of {options.sequences} x {options.context} tokens, {8 * item} bits": cache}
    weights = float(subject.weights_bytes)
    model = {"weights": weights}
    if unpacked:
        model = {f"weights, unpacked to {8 * item} bits": float(item * subject.parameters)}
    runtime = {"runtime (torch and the engine)": RUNTIME_BYTES}
    if not options.gpus:
        how = "what a server on the CPU holds"
        return {"memory": _estimate(how, runtime | model | of_cache)}
    processes = options.gpus + 2 if options.engine == "vllm" else 1
    host = {
        f"runtime of {processes} processes": processes * RUNTIME_BYTES,
        "the largest weight file, while it is loaded": float(subject.largest_file_bytes),
    }
    if options.engine == "vllm":
        host["shared memory"] = float(shared_bytes(options))
    cards = options.gpus * options.nodes
    share = f", one of {cards} parts" if cards > 1 else ""
    parts = {name + share: value / cards for name, value in (model | of_cache).items()}
    if options.engine == "vllm":
        parts[f"what vLLM leaves free ({1 - GPU_SHARE:.0%})"] = sum(parts.values()) * (1 / GPU_SHARE - 1)
    return {
        "memory": _estimate("what a node holds beside its GPUs", host),
        "gpu_memory": _estimate("what each GPU must have at least; activations and CUDA need some more", parts),
    }


def shared_bytes(options: Options) -> int:
    """Size of ``/dev/shm``: vLLM's processes pass tensors through it."""
    return SHARED_BYTES * max(1, options.gpus)


def gib(value: float, headroom: float = 0.0) -> int:
    """Bytes as whole GiB, rounded up, with some more on top."""
    return max(1, math.ceil(value * (1 + headroom) / GIB))


def check_fits(found: Mapping[str, Estimate], options: Options, gpu_memory_gb: float | None) -> None:
    """Refuse what does not fit into GPUs of a given size, in GB.

    Raises:
        UsageError: it does not; the message says how many GPUs would do.
    """
    if gpu_memory_gb is None:
        return
    if "gpu_memory" not in found:
        raise UsageError("there is no GPU", where="--gpu-memory", remedy="Leave it out, or use --gpus.")
    needed = found["gpu_memory"].value
    if needed <= gpu_memory_gb * 1e9:
        return
    cards = options.gpus
    while needed * options.gpus / cards > gpu_memory_gb * 1e9:
        cards *= 2
    raise UsageError(
        f"each of {options.gpus * options.nodes} GPUs would need {needed / 1e9:.1f} GB and has {gpu_memory_gb:g}",
        where="--gpu-memory",
        remedy=f"Use --gpus {cards}, a shorter --max-model-len than {options.context}, or fewer --sequences.",
    )


def _estimate(how: str, parts: dict[str, float]) -> Estimate:
    return Estimate(value=sum(parts.values()), unit="bytes", how=how, parts=parts)
