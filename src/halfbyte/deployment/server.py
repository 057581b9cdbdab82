"""The server that every target but Triton's starts: one image, command, environment, port and model path for all."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.deployment.memory import GPU_SHARE, cache_bytes, gib
from halfbyte.deployment.options import Options
from halfbyte.deployment.subject import Subject

# Where every container finds the weights; KServe mounts them there.
MODEL_PATH = "/mnt/models"
CACHE_PATH = "/tmp/hf_home"
RED_HAT = "registry.redhat.io/rhaiis/vllm-cuda-rhel9:3.2"
IMAGES = {
    ("vllm", True): "docker.io/vllm/vllm-openai:latest",
    ("vllm", False): "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:latest",
    ("llamacpp", True): "ghcr.io/ggml-org/llama.cpp:server-cuda",
    ("llamacpp", False): "ghcr.io/ggml-org/llama.cpp:server",
}
COMMANDS = {"vllm": ("python3", "-m", "vllm.entrypoints.openai.api_server"), "llamacpp": ("/app/llama-server",)}
# The variable by which each engine takes the key that it asks its callers for.
KEYS = {"vllm": "VLLM_API_KEY", "llamacpp": "LLAMA_API_KEY"}
# What each image has to ask a URL with.
PROBES = {
    "vllm": ("python3", "-c", "import urllib.request as u; u.urlopen('{url}')"),
    "llamacpp": ("curl", "--fail", "--silent", "{url}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A container that answers OpenAI's API.

    Attributes:
        image, command: what runs; ``command`` replaces the image's entry point.
        args: its arguments, each ``--option=value``.
        environment: without secrets.
        key: name of the variable for the key that callers must send.
        health: command inside the container that fails while the server does not answer.
        port: of the API, ``/health`` and ``/metrics``.
    """

    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    environment: dict[str, str]
    key: str
    health: tuple[str, ...]
    port: int


def server_of(subject: Subject, options: Options, *, model: str = MODEL_PATH, served: str | None = None) -> Server:
    """The server of a checkpoint.

    Args:
        model: path inside the container, or a hub id that the server fetches itself.
        served: the name that callers use; the deployment's by default.
    """
    engine, gpu = options.engine, options.gpus > 0
    red_hat = engine == "vllm" and gpu and options.target in ("podman", "kserve", "kubernetes", "compose")
    image = options.image or (RED_HAT if red_hat else IMAGES[engine, gpu])
    served = served or options.name
    fetched = not model.startswith("/")
    environment = {"HF_HOME": CACHE_PATH, "HF_HUB_OFFLINE": "0" if fetched else "1"}
    if engine == "llamacpp":
        args = [
            f"--model={model}/{subject.gguf}",
            f"--alias={served}",
            "--host=0.0.0.0",
            f"--port={options.port}",
            f"--ctx-size={options.context * options.sequences}",
            f"--parallel={options.sequences}",
            "--metrics",
            "--jinja",
        ]
        if gpu:
            args.append("--n-gpu-layers=999")
        environment = {}
    else:
        args = [
            f"--model={model}",
            f"--served-model-name={served}",
            "--host=0.0.0.0",
            f"--port={options.port}",
            f"--max-model-len={options.context}",
        ]
        if gpu:
            args.append(f"--gpu-memory-utilization={GPU_SHARE}")
        else:
            cache = options.sequences * cache_bytes(subject.config, options.context)
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(gib(cache))
        if options.gpus > 1 or options.nodes > 1:
            args.append(f"--tensor-parallel-size={options.gpus}")
        if options.nodes > 1:
            args += [f"--pipeline-parallel-size={options.nodes}", "--distributed-executor-backend=ray"]
        environment["VLLM_NO_USAGE_STATS"] = "1"
    return Server(
        image=image,
        command=COMMANDS[engine],
        args=tuple(args),
        environment=environment,
        key=KEYS[engine],
        health=(*PROBES[engine][:-1], PROBES[engine][-1].format(url=f"http://localhost:{options.port}/health")),
        port=options.port,
    )
