"""A checkpoint in service, from start to stop.

    bind the address -> start the engine -> wait until it answers -> front -> test prompt -> announce
    -> until a signal: drain, stop the front, stop the engine; or until the engine ends by itself: say so

The address is bound first, before the checkpoint is prepared too, so that one already in use is found before long work.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from halfbyte.errors import EngineError, UsageError
from halfbyte.progress import Reporter
from halfbyte.records import write_json
from halfbyte.serving import client
from halfbyte.serving.child import Child
from halfbyte.serving.client import Target
from halfbyte.serving.engines import Launch
from halfbyte.serving.front import Access, Backend, Front, is_loopback
from halfbyte.serving.prepare import Prepared

T = TypeVar("T")

QUESTION = "Say hello in one short sentence."
ANSWER_TOKENS = 16
ENGINE_GRACE_S = 10.0
ASK_EVERY_S = 0.2
ASK_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRecord:
    """What is running: printed when the server is ready.

    Attributes:
        url: with ``/v1``; model: its name there.
        engine, reason, advice: what was chosen, why, and what would be better.
        context: tokens of a sequence.
        pictures: whether messages may hold them.
        answer: to the test prompt; first_token_s: until it began; start_s: until the engine answered.
        engine_pid: of its process.
        notes: what a user ought to know.
    """

    url: str
    model: str
    engine: str
    reason: str
    advice: str
    context: int
    pictures: bool
    answer: str
    first_token_s: float
    start_s: float
    engine_pid: int
    notes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen, and who may ask there.

    Attributes:
        host, port: port 0 takes any that is free.
        keys: of clients; no_auth: no key is wanted although others can reach the address.
        origins: of pages elsewhere that may ask; page: serve the chat page.
    """

    host: str
    port: int
    keys: tuple[str, ...]
    no_auth: bool
    origins: tuple[str, ...] = ()
    page: bool = False

    def access(self) -> Access:
        """Who may ask.

        Raises:
            UsageError: others could reach the address, and neither a key nor ``--no-auth`` is given.
        """
        loopback = is_loopback(self.host)
        if not loopback and not self.keys and not self.no_auth:
            raise UsageError(
                f"{self.host} can be reached by others, and everybody could use the model",
                where="--host",
                remedy="Give --api-key KEY (or HALFBYTE_API_KEY), or --no-auth if that is meant.",
            )
        if self.no_auth and self.keys:
            raise UsageError("contradicts --api-key", where="--no-auth", remedy="Give one of them.")
        return Access(keys=self.keys, loopback=loopback, origins=self.origins, page=self.page)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet.

    Raises:
        UsageError: the address does not exist, is in use, or is not allowed.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as e:
        raise UsageError(f"{host} is no address: {e}", where="--host") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(place)
    except OSError as e:
        bound.close()
        raise _unusable(host, port, e) from None
    return bound


def _unusable(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(
        f"{host}:{port} cannot be used: {error.strerror}", where="--port", remedy="Take another, or 0 for any."
    )


class Interrupted(Exception):
    """A signal came before the server was ready."""


@dataclass(frozen=True, slots=True)
class Stops:
    """Signals heard: ``first`` after one, ``second`` after two."""

    first: asyncio.Event
    second: asyncio.Event

    def hear(self) -> None:
        """A signal has come."""
        (self.second if self.first.is_set() else self.first).set()

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work``; a first signal cancels it and raises :class:`Interrupted`."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.first.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted
            return task.result()
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.wait([task, stop])


@contextlib.contextmanager
def signals() -> Iterator[Stops]:
    """Hear SIGINT and SIGTERM instead of ending by them; afterwards, when the process is about to end, ignore them."""
    stops, loop = Stops(asyncio.Event(), asyncio.Event()), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stops.hear)
    try:
        yield stops
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # all is stopped: a late one must not spoil the exit status


@contextlib.asynccontextmanager
async def engine(
    launch: Launch, name: str, *, log: Path | None, reporter: Reporter, stops: Stops | None = None
) -> AsyncIterator[Child]:
    """An engine that answers; it is stopped at the end, whatever happens.

    Args:
        launch: how it is started; name: in words.
        log: file for all of its output.
        reporter: for progress.
        stops: end waiting for it at a signal.

    Raises:
        EngineError: it ended, or did not answer in time; its last lines have been said.
        Interrupted: a signal came first.
    """
    child = launch.start(name, log)
    try:
        waiting = _answers(child, launch, reporter)
        await (waiting if stops is None else stops.unless(waiting))
        yield child
    finally:
        child.stop(ENGINE_GRACE_S)


async def _answers(child: Child, launch: Launch, reporter: Reporter) -> None:
    began, shown = time.monotonic(), 0
    reporter.start(f"starting {child.name}, seconds", int(launch.limit_s))
    url, headers = f"http://127.0.0.1:{launch.port}/health", {"Authorization": f"Bearer {launch.key}"}
    try:
        async with client.session(ASK_TIMEOUT_S) as opened:
            while True:
                if child.ended():
                    raise report(child, "before it answered", reporter)
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    async with opened.get(url, headers=headers) as reply:
                        if reply.status == 200:
                            return
                await asyncio.sleep(ASK_EVERY_S)
                seconds = int(time.monotonic() - began)
                reporter.advance(seconds - shown)
                shown = seconds
                if seconds > launch.limit_s:
                    report(child, "", reporter)
                    raise EngineError(f"does not answer after {launch.limit_s:.0f} s", where=child.name)
    finally:
        reporter.finish()


def report(child: Child, during: str, reporter: Reporter) -> EngineError:
    """Say an engine's last lines; the error to raise."""
    reporter.finish()
    reporter.say(f"The last lines of {child.name}:")
    for line in child.tail():
        reporter.say(f"  {line}")
    return child.error(during)


async def serve(
    prepared: Prepared,
    model: str,
    address: Address,
    bound: socket.socket,
    *,
    announce: Callable[[ServeRecord], None],
    reporter: Reporter,
    drain_s: float,
    log: Path | None = None,
    ready_file: Path | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; a second one does not wait for running answers.

    Args:
        prepared: the engine; model: its name in the API.
        address: where to listen; bound: the socket that :func:`bind` made there.
        announce: called once, when a test prompt has been answered.
        reporter: for progress.
        drain_s: for answers that run when a signal comes.
        log: file for all of the engine's output.
        ready_file: written when ready, with the record; removed at the end.

    Raises:
        UsageError: the address cannot be used.
        EngineError: the engine did not start, gave no answer to the test prompt, or ended.
    """
    access, began = address.access(), time.monotonic()
    with signals() as stops, contextlib.ExitStack() as end:
        end.enter_context(contextlib.suppress(Interrupted))
        launch = prepared.launch
        async with engine(launch, prepared.name, log=log, reporter=reporter, stops=stops) as child:
            start_s = time.monotonic() - began
            backend = Backend(
                url=f"http://127.0.0.1:{launch.port}",
                key=launch.key,
                name=prepared.name,
                model=model,
                context=prepared.context,
                pictures=prepared.pictures,
            )
            front = Front(backend, access)
            async with _listening(front, bound):
                url = address_of(bound)
                target = Target(url=url, key=next(iter(address.keys), None), model=model)
                try:
                    answer, first_s = await stops.unless(first_answer(target))
                except EngineError:
                    raise report(child, "and gave no answer to its first prompt", reporter) from None
                choice = prepared.choice
                record = ServeRecord(
                    url=url + "/v1",
                    model=model,
                    engine=choice.engine,
                    reason=choice.reason,
                    advice=choice.advice,
                    context=prepared.context,
                    pictures=prepared.pictures,
                    answer=answer,
                    first_token_s=round(first_s, 3),
                    start_s=round(start_s, 1),
                    engine_pid=child.pid,
                    notes=prepared.notes,
                )
                if ready_file is not None:
                    write_json(ready_file, record)
                    end.callback(ready_file.unlink, missing_ok=True)
                announce(record)
                while not child.ended():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stops.first.wait(), ASK_EVERY_S)
                        break
                else:
                    raise report(child, "while it served", reporter)
                await _drain(front, stops, drain_s, reporter)


async def _drain(front: Front, stops: Stops, drain_s: float, reporter: Reporter) -> None:
    if front.running:
        reporter.say(f"stopping: waiting for {front.running} running answers, {drain_s:.0f} s at most")
    drained = asyncio.ensure_future(front.drained(drain_s))
    hurry = asyncio.ensure_future(stops.second.wait())
    await asyncio.wait([drained, hurry], return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    drained.cancel()
    reporter.say("stopped" if not front.running else f"stopped; {front.running} answers were cut off")


@contextlib.asynccontextmanager
async def _listening(front: Front, bound: socket.socket) -> AsyncIterator[None]:
    runner = web.AppRunner(front.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        try:
            await web.SockSite(runner, bound).start()
        except OSError as e:  # bound twice, which is allowed until somebody listens
            host, port = bound.getsockname()[:2]
            raise _unusable(host, port, e) from None
        yield
    finally:
        await runner.cleanup()


def address_of(bound: socket.socket) -> str:
    """The URL under which this machine reaches a bound socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def first_answer(target: Target) -> tuple[str, float]:
    """The answer to :data:`QUESTION`, and the seconds until it began; base models continue it as a text.

    Raises:
        EngineError: neither is answered.
    """
    began = time.monotonic()
    first, text = None, ""
    async with client.session() as opened:
        try:
            messages = [{"role": "user", "content": QUESTION}]
            async for event in client.stream(opened, target, messages, {"max_tokens": ANSWER_TOKENS, "temperature": 0}):
                piece = event.thought + event.text
                text += piece
                first = event.at if first is None and piece else first
        except client.Refused as e:
            if e.status != 400:
                raise
            text = await client.continue_text(opened, target, QUESTION, ANSWER_TOKENS)
    return text, (first or time.monotonic()) - began
