"""An OpenAI server over a transformers model, in a process of its own: the engine that runs every checkpoint.

The first line of standard input is its settings (:func:`halfbyte.serving.engines.transformers`); it ends when standard
input closes. Requests are answered one after the other. The front has looked at bodies already; here is what only this
engine knows about them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web

from halfbyte.serving import api
from halfbyte.serving.api import CHAT, TEXT, ApiError
from halfbyte.serving.generation import Sampling, Writer, Written, sampling_of

MAX_BODY_BYTES = 64 << 20


def load_writer(model: Path, context: int, device: str, dtype: str, threads: int | None) -> Writer:
    """The model, dequantised, and its tokenizer.

    Args:
        model: checkpoint folder, dense or compressed-tensors.
        context: tokens of a sequence.
        device: ``auto`` takes a GPU where there is one.
        dtype: ``auto`` is the checkpoint's, on CPUs without instructions for bfloat16 float32.
        threads: of the CPU.
    """
    import torch
    from transformers import GenerationConfig

    from halfbyte.arithmetic import fast_bfloat16
    from halfbyte.calibration.tokenizing import load_tokenizer, quiet
    from halfbyte.loading import load

    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = (
        None
        if dtype == "auto"
        else {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    )
    if chosen is None and device == "cpu" and not fast_bfloat16():
        chosen = torch.float32
    with quiet():
        loaded: Any = load(model, dtype=chosen, device=device)
        if (model / "generation_config.json").exists():
            loaded.generation_config = GenerationConfig.from_pretrained(model)
        tokenizer = load_tokenizer(model)
    if loaded.generation_config.pad_token_id is None:
        loaded.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return Writer(loaded, tokenizer, context)


class Api:
    """The routes."""

    def __init__(self, writer: Writer, name: str, key: str) -> None:
        self._writer, self._name, self._key = writer, name, key
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._prompt_tokens = self._tokens = 0
        self._seconds = 0.0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post(CHAT, self._answer)
        app.router.add_post(TEXT, self._answer)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            if request.headers.get("Authorization") != f"Bearer {self._key}":
                raise ApiError(401, "This engine answers its front alone.")
            return await handler(request)
        except ApiError as e:
            return web.json_response(e.body(), status=e.status)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        rows = (
            ("prompt_tokens_total", "Prompt tokens read.", self._prompt_tokens),
            ("tokens_total", "Tokens written.", self._tokens),
            ("seconds_total", "Time spent reading prompts and writing.", self._seconds),
        )
        lines = [
            f"# HELP transformers_{name} {text}\n# TYPE transformers_{name} counter\ntransformers_{name} {value}\n"
            for name, text, value in rows
        ]
        return web.Response(text="".join(lines))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = api.parse(await request.read())
        api.check(request.path, body, self._name)
        how = sampling_of(body)
        chat = request.path == CHAT
        writer = self._writer
        ids = writer.chat_prompt(body["messages"]) if chat else writer.text_prompt(body["prompt"])
        if len(ids) >= writer.context:  # found before the turn comes
            writer.write(ids, how, print, threading.Event())
        form = _Form(chat=chat, model=self._name)
        stop = threading.Event()
        try:
            async with self._turn:
                if body.get("stream"):
                    return await self._stream(request, body, form, ids, how, stop)
                pieces: list[str] = []
                written = await self._write(ids, how, pieces.append, stop)
                return web.json_response(form.whole("".join(pieces), written))
        finally:
            stop.set()

    async def _write(
        self, ids: list[int], how: Sampling, tell: Callable[[str], None], stop: threading.Event
    ) -> Written:
        began = time.monotonic()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._writer.write, ids, how, tell, stop)
        try:
            written = await asyncio.shield(work)
        except asyncio.CancelledError:  # the client has gone
            stop.set()
            await asyncio.wait([work])
            raise
        self._prompt_tokens += written.prompt_tokens
        self._tokens += written.tokens
        self._seconds += time.monotonic() - began
        return written

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        form: _Form,
        ids: list[int],
        how: Sampling,
        stop: threading.Event,
    ) -> web.StreamResponse:
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def tell(piece: str) -> None:  # called in the thread that writes
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async def work() -> Written:
            try:
                return await self._write(ids, how, tell, stop)
            finally:
                loop.call_soon(pieces.put_nowait, None)

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        task = asyncio.create_task(work())
        try:
            await response.write(_event(form.first(usage)))
            while (piece := await pieces.get()) is not None:
                await response.write(_event(form.piece(piece, usage)))
            try:
                written = await task
            except Exception as e:  # the status is sent: an event has to say it
                await response.write(_event(ApiError(500, f"{type(e).__name__}: {e}").body()))
                return response
            await response.write(_event(form.last(written, usage)))
            if usage:
                await response.write(_event(form.usage(written)))
            await response.write(b"data: [DONE]\n\n")
        finally:
            stop.set()
            task.cancel()
            await asyncio.wait([task])
        await response.write_eof()
        return response


class _Form:
    """Answers as OpenAI's API has them, for chat and for text."""

    def __init__(self, *, chat: bool, model: str) -> None:
        self._chat = chat
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, written: Written) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": written.finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": _usage(written)}

    def first(self, usage: bool) -> dict[str, Any]:
        return self._chunk([self._choice({"role": "assistant", "content": ""}, "", None)], usage)

    def piece(self, text: str, usage: bool) -> dict[str, Any]:
        return self._chunk([self._choice({"content": text}, text, None)], usage)

    def last(self, written: Written, usage: bool) -> dict[str, Any]:
        return self._chunk([self._choice({}, "", written.finish)], usage)

    def usage(self, written: Written) -> dict[str, Any]:
        return {**self._chunk([], True), "usage": _usage(written)}

    def _choice(self, delta: dict[str, str], text: str, finish: str | None) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        return {"index": 0, **content, "finish_reason": finish, "logprobs": None}

    def _chunk(self, choices: list[dict[str, Any]], usage: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices} | ({"usage": None} if usage else {})


def _usage(written: Written) -> dict[str, int]:
    total = written.prompt_tokens + written.tokens
    return {"prompt_tokens": written.prompt_tokens, "completion_tokens": written.tokens, "total_tokens": total}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def serve(settings: dict[str, Any], writer: Writer) -> None:
    """Listen until standard input closes."""
    runner = web.AppRunner(
        Api(writer, settings["name"], settings["key"]).app(), handler_cancellation=True, access_log=None
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", settings["port"]).start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    writer = load_writer(
        Path(settings["model"]), settings["context"], settings["device"], settings["dtype"], settings["threads"]
    )
    asyncio.run(serve(settings, writer))


if __name__ == "__main__":
    main()
