"""How a checkpoint is to be deployed. Everything that can be wrong is found here, before anything is written."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from halfbyte.deployment.subject import Subject
from halfbyte.errors import HalfbyteError, UsageError, raise_all

# target -> what it writes
TARGETS = {
    "triton": "Triton model repositories: the python backend, its streaming twin, the vllm backend",
    "kserve": "ServingRuntime and InferenceService for KServe and OpenShift AI",
    "kubernetes": "a plain Deployment and Service",
    "podman": "command, quadlet unit and Containerfile, with Red Hat AI Inference Server's image",
    "compose": "a compose file for docker or podman",
    "rhel-ai": "ilab commands for Red Hat Enterprise Linux AI",
}
ENGINES = ("transformers", "vllm", "llamacpp")
# Formats that transformers reads by itself.
UNPACKED = ("dense", "compressed-tensors")
CLUSTERS = ("kserve", "kubernetes")
STORAGES = {
    "kserve": ("oci", "hf", "pvc", "s3"),
    "kubernetes": ("oci", "hf", "pvc"),
    "rhel-ai": ("docker", "hf"),
}
MODES = ("standard", "raw")
WEIGHTS = ("copy", "link", "none")
PORTS = {"kserve": 8080}
PORT = 8000
# Longer contexts are read by few and cost everybody memory; --max-model-len asks for more.
CONTEXT = 32768
# What `ilab model serve` listens on, by its own configuration.
ILAB_PORT = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user asks for; ``None`` leaves the choice to :func:`settle`."""

    engine: str = "auto"
    image: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    gpus: int = 1
    nodes: int = 1
    gpu_memory_gb: float | None = None
    max_model_len: int | None = None
    sequences: int = 1
    max_batch: int = 8
    storage: str | None = None
    mode: str = "standard"
    replicas: int = 1
    weights: str = "copy"
    trace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was settled.

    Attributes:
        target, name: where to, and the model's name there.
        engine: ``vllm``, ``llamacpp`` or, for Triton, ``transformers``.
        image: of the container, where the user named one.
        host: address to publish on, of targets on one machine; port: of the OpenAI API, inside and outside.
        gpus: of each node; 0 is the CPU alone. nodes: machines that share the model.
        context: tokens of prompt and answer, at most; sequences: of that length whose cache memory is reckoned for.
        max_batch: prompts at once (Triton).
        storage: where a cluster finds the weights.
        mode: of KServe; replicas: of the server; weights: how they get into Triton's repository; trace: log requests.
    """

    target: str
    name: str
    engine: str
    image: str | None
    host: str
    port: int
    gpus: int
    nodes: int
    context: int
    sequences: int
    max_batch: int
    storage: str | None
    mode: str
    replicas: int
    weights: str
    trace: bool

    @property
    def exposed(self) -> bool:
        """Whether others than this machine can call it, so that a key has to be asked for."""
        return not _loopback(self.host)


def check_target(target: str) -> None:
    """Refuse an unknown target, before the checkpoint is looked at.

    Raises:
        UsageError: it is none of :data:`TARGETS`.
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}", where="deploy", remedy=f"Use one of {', '.join(TARGETS)}.")


def settle(target: str, subject: Subject, name: str, wishes: Wishes) -> Options:
    """Check the wishes against each other and the checkpoint, and choose what was left open.

    Raises:
        UsageError: options are out of range, contradict each other or do not fit the checkpoint. All problems are
            listed.
    """
    problems: list[HalfbyteError] = _ranges(wishes)
    engine = _engine(target, subject, wishes, problems)
    storage = _storage(target, subject, wishes, problems)
    _shape(target, wishes, engine, storage, problems)
    if target in ("podman", "compose") and re.search(r'[:{}"$\\]', str(subject.folder or "")):
        problems.append(
            UsageError(
                'a container cannot be given a folder with any of : { } " $ \\ in its path',
                where=str(subject.folder),
                remedy="Rename it.",
            )
        )
    context = wishes.max_model_len or min(subject.context or CONTEXT, CONTEXT)
    if subject.context is not None and context > subject.context:
        problems.append(
            UsageError(
                f"{context} tokens are more than the {subject.context} that the model was made for",
                where="--max-model-len",
                remedy="Ask for fewer.",
            )
        )
    raise_all(problems)
    return Options(
        target=target,
        name=name,
        engine=engine,
        image=wishes.image,
        host=wishes.host,
        port=wishes.port or PORTS.get(target, PORT),
        gpus=wishes.gpus,
        nodes=wishes.nodes,
        context=context,
        sequences=wishes.sequences,
        max_batch=wishes.max_batch,
        storage=storage,
        mode=wishes.mode,
        replicas=wishes.replicas,
        weights=wishes.weights,
        trace=wishes.trace,
    )


def _ranges(wishes: Wishes) -> list[HalfbyteError]:
    problems: list[HalfbyteError] = []
    numbers = {
        "--gpus": (wishes.gpus, 0),
        "--nodes": (wishes.nodes, 1),
        "--max-model-len": (wishes.max_model_len, 1),
        "--sequences": (wishes.sequences, 1),
        "--max-batch": (wishes.max_batch, 1),
        "--replicas": (wishes.replicas, 1),
    }
    for option, (value, least) in numbers.items():
        if value is not None and value < least:
            problems.append(UsageError(f"is {value}", where=option, remedy=f"Use {least} or more."))
    if wishes.gpu_memory_gb is not None and wishes.gpu_memory_gb <= 0:
        problems.append(UsageError(f"is {wishes.gpu_memory_gb:g}", where="--gpu-memory", remedy="Use more than 0."))
    if wishes.port is not None and not 1024 <= wishes.port <= 65535:
        problems.append(UsageError(f"is {wishes.port}", where="--port", remedy="Use 1024 to 65535."))
    for option, chosen, allowed in (
        ("--engine", wishes.engine, ("auto", *ENGINES)),
        ("--mode", wishes.mode, MODES),
        ("--weights", wishes.weights, WEIGHTS),
    ):
        if chosen not in allowed:
            problems.append(UsageError(f"unknown value {chosen!r}", where=option, remedy=f"Use {', '.join(allowed)}."))
    try:
        known = "%" not in wishes.host and bool(ipaddress.ip_address(wishes.host))
    except ValueError:
        known = False
    if not known:
        problems.append(
            UsageError(f"{wishes.host!r} is no IP address", where="--host", remedy="Use 127.0.0.1 or 0.0.0.0, say.")
        )
    if wishes.image is not None and re.fullmatch(r"[\w.:/@-]+", wishes.image) is None:
        problems.append(
            UsageError(f"{wishes.image!r} is no image's name", where="--image", remedy="Mind the spelling.")
        )
    return problems


def _engine(target: str, subject: Subject, wishes: Wishes, problems: list[HalfbyteError]) -> str:
    asked, gguf = wishes.engine, subject.format == "gguf"
    if asked == "auto":
        unpackable = target == "triton" and subject.format in UNPACKED
        return "llamacpp" if gguf else "transformers" if unpackable else "vllm"
    if asked == "transformers" and target != "triton":
        problems.append(
            UsageError(
                "transformers has no server for this target", where="--engine", remedy="Use vllm, or target triton."
            )
        )
    if asked != "llamacpp" and gguf:
        problems.append(
            UsageError(
                f"{asked} does not serve GGUF files well",
                where="--engine",
                remedy="Use llamacpp, or give the checkpoint that the file was made of.",
            )
        )
    if asked == "transformers" and not gguf and subject.format not in UNPACKED:
        problems.append(
            UsageError(
                f"transformers needs further packages for {subject.format} checkpoints",
                where="--engine",
                remedy="Use vllm, or `halfbyte convert --to compressed-tensors` first.",
            )
        )
    if asked == "llamacpp" and not gguf and target != "triton":
        problems.append(
            UsageError(
                "llama.cpp reads GGUF files",
                where="--engine",
                remedy=f"Run `halfbyte convert {subject.source} OUT --to gguf`, and deploy OUT.",
            )
        )
    return asked


def _storage(target: str, subject: Subject, wishes: Wishes, problems: list[HalfbyteError]) -> str | None:
    allowed = STORAGES.get(target)
    if wishes.storage is not None:
        if allowed is None:
            problems.append(
                UsageError(f"{target} takes the weights from this machine", where="--storage", remedy="Leave it out.")
            )
            return None
        found = re.fullmatch(r"(\w+)://([\w.-]+(?:[/:@][\w.:@/-]*)?)", wishes.storage)
        if found is None or found[1] not in allowed:
            problems.append(
                UsageError(
                    f"{wishes.storage!r} is no place that {target} takes weights from",
                    where="--storage",
                    remedy=f"Use {', '.join(f'{a}://...' for a in allowed)}.",
                )
            )
        return wishes.storage
    if subject.folder is None and allowed is not None:
        return f"hf://{subject.source}"
    if target in CLUSTERS and allowed is not None:
        problems.append(
            UsageError(
                "a cluster cannot read a folder of this machine",
                where="--storage",
                remedy=f"Say where the weights will be: {', '.join(f'{a}://...' for a in allowed)}.",
            )
        )
    return None


def _shape(target: str, wishes: Wishes, engine: str, storage: str | None, problems: list[HalfbyteError]) -> None:
    """Machines, GPUs, modes and ports that a target has not got."""

    def wrong(option: str, what: str, remedy: str) -> None:
        problems.append(UsageError(what, where=option, remedy=remedy))

    if wishes.nodes > 1:
        if target != "kserve":
            wrong("--nodes", f"{target} runs on one node", "Leave it out, or use target kserve.")
        elif engine != "vllm" or wishes.gpus < 1:
            wrong("--nodes", "several nodes need vLLM on GPUs", "Use --engine vllm and --gpus 1 or more.")
        elif storage is not None and not storage.startswith("pvc://"):
            wrong("--storage", "several nodes read one volume", "Use pvc://CLAIM/PATH, access mode ReadWriteMany.")
        if wishes.replicas > 1:
            wrong("--replicas", "a model on several nodes cannot be replicated by KServe", "Leave it out.")
    if wishes.mode != "standard" and target != "kserve":
        wrong("--mode", "is KServe's", "Leave it out.")
    if wishes.replicas > 1 and target not in CLUSTERS:
        wrong("--replicas", f"{target} starts one server", "Leave it out, or use target kserve or kubernetes.")
    if target == "kubernetes" and engine == "llamacpp" and storage is not None and storage.startswith("hf://"):
        wrong("--storage", "llama.cpp is given a file, and nothing here fetches it", "Use oci:// or pvc://.")
    if target == "rhel-ai":
        if wishes.gpus < 1:
            wrong("--gpus", "RHEL AI serves on GPUs", "Use 1 or more, or target podman with a GGUF file.")
        if engine == "llamacpp":
            wrong("--engine", "RHEL AI serves with vLLM", "Use target podman for GGUF files.")
        if wishes.port not in (None, ILAB_PORT):
            wrong("--port", f"ilab listens on {ILAB_PORT}", "Change serve.host_port with `ilab config edit` instead.")
        if wishes.image is not None:
            wrong("--image", "RHEL AI brings its own", "Leave it out.")
    if not _loopback(wishes.host) and target not in ("podman", "compose"):
        wrong("--host", f"{target} does not publish an address itself", "Leave it out.")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # reported already
