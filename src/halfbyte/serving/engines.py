"""How each engine is started: an interpreter, its arguments, its environment, and where it will listen.

Every engine listens on the loopback address at a port of its own and wants a key that only the front has, so that no
other user of the machine goes round the front. Keys and settings go through the environment or standard input, never
through arguments, which everybody on the machine can read.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import UsageError
from halfbyte.serving.child import Child
from halfbyte.serving.choice import Engine, Served
from halfbyte.serving.machine import Machine, foreign_environment

DEFAULT_CONTEXT = 4096
DEFAULT_PARALLEL = 4
GIB = 1 << 30
# Name on the command line -> (attribute of xllamacpp's CommonParams, kind of its value).
LLAMACPP_FLAGS: dict[str, tuple[str, type]] = {
    "--threads": ("cpuparams.n_threads", int),
    "--threads-batch": ("cpuparams_batch.n_threads", int),
    "--poll": ("cpuparams.poll", int),
    "--batch-size": ("n_batch", int),
    "--ubatch-size": ("n_ubatch", int),
    "--n-gpu-layers": ("n_gpu_layers", int),
    "--cache-reuse": ("n_cache_reuse", int),
    "--rope-freq-base": ("rope_freq_base", float),
    "--rope-freq-scale": ("rope_freq_scale", float),
    "--seed": ("sampling.seed", int),
}
TRANSFORMERS_FLAGS: dict[str, type] = {"--device": str, "--dtype": str, "--threads": int}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A process that will be an engine.

    Attributes:
        python, arguments, environment: of the process.
        settings: first line of its standard input, JSON; empty for none.
        port: where it listens; key: what it wants in ``Authorization``.
        limit_s: for it to answer.
    """

    python: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    settings: str
    port: int
    key: str
    limit_s: float

    def start(self, name: str, log: Path | None = None) -> Child:
        """The process, running; ``name`` for messages, ``log`` takes its output as well."""
        return Child(
            name=name,
            python=self.python,
            arguments=self.arguments,
            environment=self.environment,
            first_line=self.settings,
            log=log,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a user wants of an engine, whichever it is.

    Attributes:
        name: the model's, in the API.
        context: tokens of a sequence, prompt and answer; ``None`` for the model's, at most :data:`DEFAULT_CONTEXT`.
        parallel: sequences at a time.
        embeddings: ``q8_0`` rounds them for llama.cpp (:mod:`halfbyte.serving.gguf_embeddings`).
        flags: for the engine itself.
    """

    name: str
    context: int | None = None
    parallel: int = DEFAULT_PARALLEL
    embeddings: Literal["as-is", "q8_0"] = "as-is"
    flags: tuple[str, ...] = field(default=())

    def tokens(self, served: Served) -> int:
        """Of a sequence."""
        if self.context is not None:
            return self.context
        return min(DEFAULT_CONTEXT, served.context or DEFAULT_CONTEXT)


def check_wishes(engine: Engine, wishes: Wishes, served: Served, machine: Machine) -> None:
    """Find what cannot be before anything is started.

    Raises:
        UsageError: the context is longer than the model's, keys and values would not fit into memory, or a flag is
            unknown.
    """
    if wishes.context is not None and served.context is not None and wishes.context > served.context:
        raise UsageError(
            f"{wishes.context} tokens are more than the {served.context} that the model was made for",
            where="--context",
            remedy=f"Use at most {served.context}.",
        )
    if engine != "llamacpp" and wishes.embeddings != "as-is":
        raise UsageError(
            f"{engine} serves embeddings as they are",
            where="--embeddings",
            remedy="Use --engine llamacpp, or leave it.",
        )
    if engine == "llamacpp":
        parse_flags(wishes.flags, {name: kind for name, (_, kind) in LLAMACPP_FLAGS.items()}, "llama.cpp")
        needed = served.kv_bytes * wishes.tokens(served) * wishes.parallel
        if machine.memory_bytes is not None and needed > machine.memory_bytes:
            raise UsageError(
                f"keys and values of {wishes.parallel} sequences of {wishes.tokens(served)} tokens take "
                f"{needed / GIB:.1f} GiB, {machine.memory_bytes / GIB:.1f} GiB are free",
                where="--context, --parallel",
                remedy="Ask for less of either.",
            )
    elif engine == "transformers":
        parse_flags(wishes.flags, TRANSFORMERS_FLAGS, "transformers")


def parse_flags(flags: Sequence[str], known: dict[str, type], engine: str) -> dict[str, Any]:
    """``--name value`` and ``--name=value``, by a table of kinds.

    Raises:
        UsageError: a flag is unknown, has no value, or one of another kind.
    """
    found: dict[str, Any] = {}
    rest = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    while rest:
        name = rest.pop(0)
        if name not in known:
            raise UsageError(
                f"{engine} is passed no flag {name}", where="after --", remedy=f"Known are {', '.join(known)}."
            )
        try:
            found[name] = known[name](rest.pop(0))
        except (IndexError, ValueError):
            raise UsageError(f"{name} wants a value ({known[name].__name__})", where="after --") from None
    return found


def vllm(served: Served, wishes: Wishes, machine: Machine) -> Launch:
    """vLLM's own OpenAI server. On a CPU eager, with room for the sequences wanted; flags of the user's win."""
    assert machine.vllm is not None
    port, key = free_port(), new_key()
    tokens = wishes.tokens(served)
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(served.path)]
    arguments += ["--served-model-name", wishes.name, "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--max-model-len", str(tokens), "--disable-uvicorn-access-log"]
    environment = foreign_environment(machine.vllm.python)
    environment |= {"VLLM_API_KEY": key, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if machine.vllm.cpu or not machine.gpus:
        room = math.ceil(served.kv_bytes * tokens * wishes.parallel / GIB) or 1
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(room))
        arguments += ["--max-num-seqs", str(wishes.parallel), "--enforce-eager", "--gpu-memory-utilization", "0.3"]
    return Launch(
        python=machine.vllm.python,
        arguments=(*arguments, *wishes.flags),
        environment=environment,
        settings="",
        port=port,
        key=key,
        limit_s=1800,
    )


def llamacpp(model: Path, mmproj: Path | None, served: Served, wishes: Wishes, machine: Machine) -> Launch:
    """llama.cpp in a process of ours (:mod:`halfbyte.serving.llamacpp_process`)."""
    assert machine.llamacpp is not None
    port, key = free_port(), new_key()
    flags = parse_flags(wishes.flags, {name: kind for name, (_, kind) in LLAMACPP_FLAGS.items()}, "llama.cpp")
    settings = {
        "model": str(model),
        "mmproj": None if mmproj is None else str(mmproj),
        "name": wishes.name,
        "context": wishes.tokens(served),
        "parallel": wishes.parallel,
        "port": port,
        "key": key,
        "set": {LLAMACPP_FLAGS[name][0]: value for name, value in flags.items()},
    }
    return Launch(
        python=machine.llamacpp,
        arguments=(str(Path(__file__).with_name("llamacpp_process.py")),),
        environment=foreign_environment(machine.llamacpp),
        settings=json.dumps(settings),
        port=port,
        key=key,
        limit_s=600,
    )


def transformers(path: Path, served: Served, wishes: Wishes) -> Launch:
    """transformers in a process of ours (:mod:`halfbyte.serving.transformers_process`)."""
    port, key = free_port(), new_key()
    flags = parse_flags(wishes.flags, TRANSFORMERS_FLAGS, "transformers")
    settings = {
        "model": str(path),
        "name": wishes.name,
        "context": wishes.tokens(served),
        "port": port,
        "key": key,
        "device": flags.get("--device", "auto"),
        "dtype": flags.get("--dtype", "auto"),
        "threads": flags.get("--threads"),
    }
    return Launch(
        python=sys.executable,
        arguments=("-m", "halfbyte.serving.transformers_process"),
        environment=dict(os.environ),
        settings=json.dumps(settings),
        port=port,
        key=key,
        limit_s=1800,
    )


def free_port() -> int:
    """A port of the loopback address that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def new_key() -> str:
    """A key that cannot be guessed."""
    return secrets.token_urlsafe(24)
