"""Asks llama.cpp about GGUF files: runs in an interpreter that has xllamacpp, apart from the tests, because a file that
llama.cpp dislikes can end the process.

    python llamacpp_run.py QUESTION.json ANSWER.json

The question is ``{"model": PATH, "mmproj": PATH or null, "context": n, "tokenize": [text, ...], "prefixes": [[id, ...],
...], "count": n, "continue": [[id, ...], steps], "chat": [messages, steps]}``. The answer has, for each text, its ids;
for each prefix, the ``count`` largest log probabilities of the next token as pairs of id and value; and the greedy
continuation, ids and text. "picture" is ``[prompt with <__media__> in it, base64 of a PNG]``; its answer, the log
probabilities of the next token. Keys and values are kept in float32, so that only products of weights are rounded.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

os.environ["LLAMA_MEDIA_MARKER"] = "<__media__>"  # otherwise another one in each process
import xllamacpp


def main(question: Path, answer: Path) -> None:
    asked = json.loads(question.read_text())
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    if asked.get("mmproj"):
        params.mmproj.path = asked["mmproj"]
        params.mmproj_use_gpu = False
    params.n_ctx = asked.get("context", 256)
    params.n_batch = params.n_ubatch = params.n_ctx
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{path}: {e.code} {e.read().decode()}") from None

    found: dict[str, Any] = {"version": xllamacpp.__version__}
    found["tokens"] = [
        post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        for text in asked.get("tokenize", [])
    ]
    found["next"] = []
    # Probabilities come with a token that is text of its own, not with EOS or half a character; so "a" is drawn. They
    # are those of the model all the same: biases count when drawing alone.
    plain = post("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    for prefix in asked.get("prefixes", []):
        body = {"prompt": prefix, "n_predict": 1, "n_probs": asked["count"], "temperature": -1.0}
        body["logit_bias"] = [[plain, 1000.0]]
        reply = post("/completion", body)
        listed = reply["completion_probabilities"][0]["top_logprobs"]
        found["next"].append([[p["id"], p["logprob"]] for p in listed])
    if asked.get("continue"):
        prompt, steps = asked["continue"]
        body = {"prompt": prompt, "n_predict": steps, "temperature": -1.0, "return_tokens": True, "ignore_eos": True}
        reply = post("/completion", body)
        found["continuation"], found["text"] = reply["tokens"], reply["content"]
    if asked.get("picture"):
        prompt, data = asked["picture"]
        body = {"prompt": {"prompt_string": prompt, "multimodal_data": [data]}, "n_predict": 1, "temperature": -1.0}
        body |= {"n_probs": asked["count"], "logit_bias": [[plain, 1000.0]]}
        listed = post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        found["next"].append([[p["id"], p["logprob"]] for p in listed])
    if asked.get("chat"):
        messages, steps = asked["chat"]
        body = {"messages": messages, "max_tokens": steps, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        reply = post("/v1/chat/completions", body)
        found["chat"] = reply["choices"][0]
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
