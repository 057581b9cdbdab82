"""llama.cpp as the engine (package ``xllamacpp``): fast on every CPU, reads one GGUF file.

Tokenizer and chat template are those inside the file. llama.cpp works on ``max_batch`` prompts at once and takes the
next ones in as others end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import xllamacpp
from settings import BadRequest

from engine import Job, Options

TIMEOUT_S = 3600


class LlamaCppEngine:
    """See :class:`engine.Engine`."""

    def __init__(self, options: Options) -> None:
        files = sorted(options.checkpoint.glob("*.gguf"))
        models = [f for f in files if not f.name.startswith("mmproj")]
        if not models:
            raise FileNotFoundError(f"{options.checkpoint} holds no GGUF file; `halfbyte convert --to gguf` makes one")
        params = xllamacpp.CommonParams()
        params.model.path = str(models[0])  # of a split model llama.cpp finds the other parts by name
        params.n_parallel = options.max_batch
        params.kv_unified = True  # one cache that the prompts share, so that each may be as long as the context
        params.n_ctx = options.context  # 0 is what the model was made for
        params.n_gpu_layers = -1 if options.gpus > 0 else 0
        self._server = xllamacpp.Server(params)
        self._url = self._server.listening_address  # 127.0.0.1, unless hostnames says otherwise
        found = self._get("/props")
        self.context = options.context or int(found["default_generation_settings"]["n_ctx"])
        self._has_template = bool(found.get("chat_template"))
        self._threads = ThreadPoolExecutor(options.max_batch, thread_name_prefix="generate")
        self._closed = False

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._post("/tokenize", {"content": text, "add_special": True})["tokens"]]

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if not self._has_template:
            raise BadRequest("text_input is a conversation, but the model has no chat template; send plain text")
        try:
            text = self._post("/apply-template", {"messages": messages})["prompt"]
        except RuntimeError as e:
            raise BadRequest(f"text_input: the model's chat template refuses the conversation: {e}") from None
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(i) for i in self._post("/tokenize", body)["tokens"]]

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._threads.submit(self._run, job)

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=True)
        del self._server

    def _run(self, job: Job) -> None:
        try:
            reason = "cancelled" if self._gone(job) else self._generate(job)
        except Exception as e:
            reason = f"error: {type(e).__name__}: {e}"
        job.receive("", reason)

    def _generate(self, job: Job) -> str:
        s = job.settings
        body = {
            "prompt": list(job.ids),
            "n_predict": job.limit,
            "temperature": s.temperature if s.do_sample else -1.0,  # below 0: always the likeliest
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": 0.0,
            "repeat_penalty": s.repetition_penalty,
            "repeat_last_n": self.context,  # all that was read and written, as transformers has it
            "seed": s.seed if s.seed is not None else -1,
            "stop": list(s.stop),
            "cache_prompt": False,  # what comes from the cache is summed up otherwise: the same request, another answer
            "stream": True,
        }
        with self._open("/completion", body) as reply:
            for line in reply:
                if self._gone(job):
                    return "cancelled"  # closing the connection makes llama.cpp stop
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"].get("message", event["error"]))
                if event.get("content"):
                    job.receive(event["content"], None)
                if event.get("stop"):
                    return "length" if event.get("stop_type") == "limit" else "stop"
        raise RuntimeError("llama.cpp ended the answer without saying so")

    def _gone(self, job: Job) -> bool:
        return self._closed or job.cancelled()

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self._url + path, data, {"Content-Type": "application/json"}), timeout=TIMEOUT_S)
        except HTTPError as e:
            raise RuntimeError(e.read().decode(errors="replace")) from None

    def _get(self, path: str) -> Any:
        with self._open(path) as reply:
            return json.load(reply)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        with self._open(path, body) as reply:
            return json.load(reply)
