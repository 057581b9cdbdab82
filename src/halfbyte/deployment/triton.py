"""Triton: a model repository for the python backend, another for the vllm backend.

    model_repository/NAME/           answers in one piece (/infer, /generate); hands requests on to
    model_repository/NAME_stream/    decoupled, holds engine and weights; streams (/generate_stream, gRPC streams)
    vllm_repository/NAME/            for images with Triton's vllm backend

Both models of the first take the inputs of :data:`INPUTS`. Their code is that of ``triton_model/``, copied as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from halfbyte.deployment.memory import GPU_SHARE
from halfbyte.deployment.options import Options
from halfbyte.deployment.render import render_all
from halfbyte.deployment.server import MODEL_PATH
from halfbyte.deployment.subject import Subject
from halfbyte.records import Estimate

# name, Triton's type, values (-1 any number), what it is
INPUTS = (
    ("text_input", "TYPE_STRING", -1, "a text, or a conversation as a JSON list of messages; of several, a batch"),
    ("max_length", "TYPE_INT32", 1, "tokens of prompt and answer together, at most"),
    ("max_new_tokens", "TYPE_INT32", 1, "tokens of the answer, at most"),
    ("do_sample", "TYPE_BOOL", 1, "draw tokens; else the likeliest is taken each time"),
    ("top_k", "TYPE_INT32", 1, "draw among so many; 0 for all"),
    ("top_p", "TYPE_FP32", 1, "draw among the likeliest that make up this share"),
    ("temperature", "TYPE_FP32", 1, "above 1 flattens, below 1 sharpens what is drawn from; 0 does not draw"),
    ("repetition_penalty", "TYPE_FP32", 1, "above 1 disfavours tokens that were there before"),
    ("stream", "TYPE_BOOL", 1, "pieces as they come (NAME_stream) or one answer"),
    ("seed", "TYPE_INT64", 1, "equal requests with equal seeds draw alike"),
    ("stop", "TYPE_STRING", -1, "texts that end the answer"),
)
# Where nobody names a length: neither the request nor the checkpoint's generation_config.json.
NEW_TOKENS = 256
# Requests that the model that answers in one piece hands on at once.
MAX_REQUESTS = 64
ENGINE_FILES = ("engine.py", "settings.py", "text.py")
HTTP_PORT = 8000
# What each engine needs in the python that Triton's python backend runs.
REQUIREMENTS = {
    "transformers": ("torch>=2.6", "transformers>=5.16", "compressed-tensors>=0.20", "accelerate>=1.6"),
    "vllm": ("vllm>=0.11",),
    "llamacpp": ("xllamacpp>=2026.10",),
}
IMAGE = "nvcr.io/nvidia/tritonserver:25.09-py3"
VLLM_IMAGE = "nvcr.io/nvidia/tritonserver:25.09-vllm-python-py3"
CHECKPOINT = "checkpoint"


def files(subject: Subject, options: Options, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """Everything but the weights, which belong into :func:`checkpoint_folder`."""
    stream = f"{options.name}_stream"
    listed = [
        ("triton/config.pbtxt.j2", f"model_repository/{options.name}/config.pbtxt"),
        ("triton/config_stream.pbtxt.j2", f"model_repository/{stream}/config.pbtxt"),
        ("triton/requirements.txt.j2", "requirements.txt"),
        ("triton/Containerfile.j2", "Containerfile"),
        ("triton/README.md.j2", "README.md"),
    ]
    if subject.format != "gguf":
        listed.append(("triton/config_vllm.pbtxt.j2", f"vllm_repository/{options.name}/config.pbtxt"))
    found = render_all(
        listed,
        subject,
        options,
        estimates,
        stream=stream,
        inputs=INPUTS,
        requirements=REQUIREMENTS[options.engine],
        new_tokens=NEW_TOKENS,
        max_requests=MAX_REQUESTS,
        checkpoint=CHECKPOINT,
        image=options.image or IMAGE,
        vllm_image=VLLM_IMAGE,
        model_path=MODEL_PATH,
        port=HTTP_PORT,
    )
    found[f"model_repository/{options.name}/1/model.py"] = shipped("front.py")
    found[f"model_repository/{stream}/1/model.py"] = shipped("streaming.py")
    for file in (*ENGINE_FILES, f"{options.engine}_engine.py"):
        found[f"model_repository/{stream}/1/{file}"] = shipped(file)
    if subject.format != "gguf":
        found[f"vllm_repository/{options.name}/1/model.json"] = vllm_model(options)
    return found


def shipped(file: str) -> str:
    """A file of ``triton_model/``."""
    return (resources.files("halfbyte.deployment") / "triton_model" / file).read_text(encoding="utf-8")


def checkpoint_folder(options: Options) -> str:
    """Where the weights belong, relative to the output folder."""
    return f"model_repository/{options.name}_stream/{CHECKPOINT}"


def vllm_model(options: Options) -> str:
    """``model.json`` of Triton's vllm backend: arguments of vLLM's AsyncEngineArgs, one GPU at least."""
    arguments: dict[str, Any] = {
        "model": MODEL_PATH,
        "max_model_len": options.context,
        "max_num_seqs": options.max_batch,
        "gpu_memory_utilization": GPU_SHARE,
        "tensor_parallel_size": max(1, options.gpus),
    }
    return json.dumps(arguments, indent=2) + "\n"
