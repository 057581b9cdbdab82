"""A conversation with a model, turn by turn; the terminal is ``cli.chat``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from halfbyte.errors import EngineError
from halfbyte.progress import Reporter
from halfbyte.serving import client, service
from halfbyte.serving.client import Target
from halfbyte.serving.prepare import Prepared

NOTICED_S = 2.0  # a connection breaks a little before its process has ended


async def _as_it_is(error: EngineError) -> EngineError:
    return error


@dataclass(slots=True)
class Conversation:
    """Who said what, and with whom.

    Attributes:
        target: the server; opened: connections to it.
        system: prompt before everything, empty for none.
        options: further fields of requests, such as ``temperature``.
        cause: what is behind an error of the connection.
    """

    target: Target
    opened: aiohttp.ClientSession
    system: str
    options: dict[str, Any]
    cause: Callable[[EngineError], Awaitable[EngineError]] = _as_it_is
    messages: list[dict[str, str]] = field(default_factory=list)

    async def say(self, text: str) -> AsyncGenerator[str, None]:
        """Ask, and give the answer's pieces as they come.

        What came until an interruption stays in the conversation; where nothing came, the question is forgotten too.
        What the model thought before it answered is given too, but not kept: models are not shown it again.
        """
        self.messages.append({"role": "user", "content": text})
        head = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        thinking = False
        try:
            async for event in client.stream(self.opened, self.target, [*head, *self.messages], self.options):
                if event.thought:
                    thinking = True
                    yield event.thought
                if event.text:
                    pieces.append(event.text)
                    yield f"\n\n{event.text}" if thinking else event.text
                    thinking = False
        except EngineError as e:
            raise await self.cause(e) from None
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()


@contextlib.asynccontextmanager
async def with_url(url: str, key: str | None, system: str, options: dict[str, Any]) -> AsyncIterator[Conversation]:
    """A conversation with the first model of a server.

    Raises:
        EngineError: it does not answer.
    """
    async with client.session() as opened:
        model = await client.only_model(opened, url, key)
        yield Conversation(Target(url=url, key=key, model=model), opened, system, options)


@contextlib.asynccontextmanager
async def with_engine(
    prepared: Prepared, model: str, system: str, options: dict[str, Any], log: Path | None, reporter: Reporter
) -> AsyncIterator[Conversation]:
    """A conversation with an engine that is started for it, and stopped after it."""
    launch = prepared.launch
    async with service.engine(launch, prepared.name, log=log, reporter=reporter) as child, client.session() as opened:

        async def cause(error: EngineError) -> EngineError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NOTICED_S):
                    while not child.ended():
                        await asyncio.sleep(0.05)
                return service.report(child, "while it answered", reporter)
            return error

        target = Target(url=f"http://127.0.0.1:{launch.port}", key=launch.key, model=model)
        yield Conversation(target, opened, system, options, cause)
