"""The other side of the API: asking a server and timing how its answer comes. Used by ``chat``, ``bench`` and the first
test of ``serve``."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from halfbyte.errors import EngineError
from halfbyte.serving.api import CHAT, TEXT

CONNECT_S = 10


class Refused(EngineError):
    """A server's answer was an error; ``status`` is HTTP's."""

    status = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server.

    Attributes:
        url: without ``/v1``; key: ``None`` where it wants none; model: its name there.
    """

    url: str
    key: str | None
    model: str

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A piece of a streamed answer: its time on :func:`time.monotonic`'s clock, its text, and what came with it.

    ``thought`` is text too, of a model that thinks before it answers: written, and no part of the answer.
    """

    at: float
    text: str
    thought: str
    finish: str | None
    usage: dict[str, Any] | None


@contextlib.asynccontextmanager
async def session(limit_s: float | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections to servers, as many as are asked for at a time."""
    timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # engines close kept ones without warning
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as opened:
        yield opened


async def only_model(opened: aiohttp.ClientSession, url: str, key: str | None) -> str:
    """The first model that a server lists.

    Raises:
        EngineError: it cannot be reached, refuses the key, or lists none.
    """
    try:
        async with opened.get(url + "/v1/models", headers=Target(url=url, key=key, model="").headers) as reply:
            await _refuse(reply, url)
            listed = (await reply.json())["data"]
            return str(listed[0]["id"])
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise unreachable(url, e) from None
    except (KeyError, IndexError, TypeError, ValueError):
        raise EngineError("lists no model under /v1/models", where=url, remedy="Name an OpenAI server.") from None


async def stream(
    opened: aiohttp.ClientSession, target: Target, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> AsyncIterator[Event]:
    """A streamed chat completion, piece by piece, with usage at its end; ``options`` are further fields of the body.

    Raises:
        EngineError: the server refuses, breaks off, or does not end with ``[DONE]``.
    """
    body = {"model": target.model, "messages": list(messages), "stream": True, **options}
    body["stream_options"] = {"include_usage": True}
    done = False
    try:
        async with opened.post(target.url + CHAT, json=body, headers=target.headers) as reply:
            await _refuse(reply, target.url)
            async for line in reply.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    done = True
                    break
                yield _event(json.loads(data), target.url)
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise unreachable(target.url, e) from None
    if not done:
        raise EngineError("the answer broke off", where=target.url, remedy="Look at the server's own output.")


async def continue_text(opened: aiohttp.ClientSession, target: Target, prompt: str, tokens: int) -> str:
    """A text completion at once, for models that know no chat.

    Raises:
        EngineError: the server refuses or breaks off.
    """
    body = {"model": target.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    try:
        async with opened.post(target.url + TEXT, json=body, headers=target.headers) as reply:
            await _refuse(reply, target.url)
            return str((await reply.json())["choices"][0]["text"])
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise unreachable(target.url, e) from None


def unreachable(url: str, error: BaseException) -> EngineError:
    """A server that does not answer."""
    return EngineError(
        "does not answer",
        where=url,
        why=f"{type(error).__name__}: {error}".rstrip(": "),
        remedy="Is the server running?",
    )


def _event(chunk: dict[str, Any], url: str) -> Event:
    if "error" in chunk:
        error = chunk["error"]
        raise EngineError(str(error.get("message", error) if isinstance(error, dict) else error), where=url)
    choice = (chunk.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    return Event(
        at=time.monotonic(),
        text=delta.get("content") or "",
        thought=delta.get("reasoning_content") or delta.get("reasoning") or "",
        finish=choice.get("finish_reason"),
        usage=chunk.get("usage"),
    )


async def _refuse(reply: aiohttp.ClientResponse, url: str) -> None:
    if reply.status == 200:
        return
    raw = await reply.text()
    try:
        message = str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = raw[:300]
    remedy = "Give the key with --api-key." if reply.status == 401 else ""
    error = Refused(f"refused with status {reply.status}: {message}", where=url, remedy=remedy)
    error.status = reply.status
    raise error
