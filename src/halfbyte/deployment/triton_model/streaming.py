"""NAME_stream: the model that holds the engine. Decoupled, so that text can be sent while it is being generated.

Inputs and outputs are in config.pbtxt. A request of n texts gets responses whose ``text_output`` has n pieces, most of
them empty: the pieces of one place, joined in their order, are the answer to the text in that place. Whoever asks for
``stream`` false gets one response with whole answers.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the checkpoint; nothing is fetched
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from settings import NAMES, BadRequest, conversation, defaults, limit, merge

from engine import Engine, Job, Options

ENGINES = {
    "transformers": ("transformers_engine", "TransformersEngine"),
    "vllm": ("vllm_engine", "VllmEngine"),
    "llamacpp": ("llamacpp_engine", "LlamaCppEngine"),
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        found = json.loads(args["model_config"]).get("parameters", {})
        parameters = {name: value["string_value"] for name, value in found.items()}
        self._name = args["model_name"]
        self._trace = parameters["enable_inference_trace"].lower() == "true"
        self._fallback = int(parameters["max_new_tokens"])
        options = Options(
            checkpoint=folder_of(args) / parameters["checkpoint"],
            context=int(parameters["context"]),
            max_batch=int(parameters["max_batch"]),
            dtype=parameters["dtype"],
            gpus=int(parameters["gpus"]),
        )
        engine = parameters["engine"]
        if engine not in ENGINES:
            raise pb_utils.TritonModelException(f"parameter engine is {engine!r}, must be one of {', '.join(ENGINES)}")
        module, name = ENGINES[engine]
        self._default = defaults(options.checkpoint)
        self._engine: Engine = getattr(importlib.import_module(module), name)(options)
        self._numbers = itertools.count(1)
        pb_utils.Logger.log_info(f"{self._name}: {engine} has loaded {options.checkpoint}")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except BadRequest as e:
                fail(sender, f"{self._name}: {e}")
            except Exception as e:
                fail(sender, f"{self._name}: {type(e).__name__}: {e}")

    def finalize(self) -> None:
        self._engine.close()

    def _start(self, request: Any, sender: Any) -> None:
        begun = time.monotonic()
        texts = read(request, "text_input", many=True)
        if not texts:
            raise BadRequest("text_input is missing: send a text, or a conversation as a JSON list of messages")
        asked = {name: read(request, name, many=name == "stop") for name in NAMES}
        settings = merge(asked, self._default)
        prompts = [self._prompt(text) for text in texts]
        limits = [limit(settings, self._default, self._fallback, len(p), self._engine.context) for p in prompts]
        number = next(self._numbers)
        stream = read(request, "stream")
        answer = Answer(sender, len(texts), stream=stream is None or bool(stream))
        if self._trace:
            asked_for = {"request": request.request_id() or number, "text_input": texts, "settings": vars(settings)}
            answer.finally_do(lambda: self._log(asked_for, prompts, answer, begun))
        self._engine.submit(
            [
                Job(ids, settings, most, answer.taker(place), sender.is_cancelled, together=number)
                for place, (ids, most) in enumerate(zip(prompts, limits, strict=True))
            ]
        )

    def _prompt(self, text: str) -> list[int]:
        messages = conversation(text)
        ids: list[int] = self._engine.encode(text) if messages is None else self._engine.chat(messages)
        if not ids:
            raise BadRequest("text_input is empty, and the model has no token to begin with; send some text")
        return ids

    def _log(self, asked: dict[str, Any], prompts: list[list[int]], answer: Answer, begun: float) -> None:
        trace = asked | {
            "prompt_tokens": [len(p) for p in prompts],
            "text_output": answer.texts,
            "ended": answer.reasons,
            "seconds": round(time.monotonic() - begun, 3),
        }
        pb_utils.Logger.log_info(f"{self._name}: trace {json.dumps(trace, ensure_ascii=False, default=str)}")


class Answer:
    """Sends the pieces of one request as they come, from whichever thread, and the end once."""

    def __init__(self, sender: Any, count: int, *, stream: bool) -> None:
        self._sender, self._stream = sender, stream
        self._lock = threading.Lock()
        self._after: Any = None
        self.texts = [""] * count
        self.reasons: list[str | None] = [None] * count

    def finally_do(self, action: Any) -> None:
        """What to do when all answers are known, before the last is sent."""
        self._after = action

    def taker(self, place: int) -> Any:
        """What takes the pieces of one place, see :class:`engine.Job`."""

        def take(piece: str, reason: str | None) -> None:
            with self._lock:
                self._take(place, piece, reason)

        return take

    def _take(self, place: int, piece: str, reason: str | None) -> None:
        self.texts[place] += piece
        if piece and self._stream:
            self._send([piece if i == place else "" for i in range(len(self.texts))])
        if reason is None:
            return
        self.reasons[place] = reason
        if None in self.reasons:
            return
        if self._after is not None:
            self._after()
        errors = [r for r in self.reasons if r is not None and r.startswith("error: ")]
        if errors:
            fail(self._sender, errors[0].removeprefix("error: "))
        else:
            if not self._stream or not any(self.texts):
                self._send(self.texts)  # an answer without any text is one response all the same
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, texts: list[str]) -> None:
        output = pb_utils.Tensor("text_output", np.array([t.encode() for t in texts], dtype=np.object_))
        self._sender.send(pb_utils.InferenceResponse(output_tensors=[output]))


def read(request: Any, name: str, *, many: bool = False) -> Any:
    """An input as a plain Python value, or a tuple of them; None where it is absent.

    Raises:
        BadRequest: text that is not UTF-8, or another number of values than one.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tuple(plain(v, name) for v in tensor.as_numpy().reshape(-1))
    if many:
        return values
    if len(values) != 1:
        raise BadRequest(f"{name} has {len(values)} values, must have one")
    return values[0]


def plain(value: Any, name: str) -> Any:
    """A numpy scalar as str, bool, int or float; a float32 by its shortest decimal form, 0.7 and not 0.699999988."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as e:
            raise BadRequest(f"{name} is not UTF-8 at byte {e.start}") from None
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def fail(sender: Any, message: str) -> None:
    response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def folder_of(args: dict[str, str]) -> Path:
    """The model's folder in the repository: what Triton calls its repository, or the folder of that name in it."""
    repository = Path(args["model_repository"])
    return repository if (repository / "config.pbtxt").exists() else repository / args["model_name"]
