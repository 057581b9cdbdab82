"""The address that clients see: one small server before whichever engine runs.

It holds what all engines have to do alike and do not: keys, the model's name, errors in OpenAI's form, metrics, the
page, and what protects a server on a laptop from web pages that its user visits. Answers of the engine pass through as
they come, byte for byte.

Security. A browser lets any page send simple requests to 127.0.0.1, and lets a page whose own name was made to resolve
there read the answers (DNS rebinding). So bodies have to be declared JSON, which pages of other origins may not send
without asking; no origin is allowed unless named; and while the address is a loopback one, the name by which the server
is called has to be one too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import SplitResult, urlsplit

import aiohttp
from aiohttp import web

from halfbyte.serving import api
from halfbyte.serving.api import CHAT, TEXT, ApiError
from halfbyte.serving.metrics import CANCELLED, Metrics

LOG = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 << 20
MOST_REQUESTS = 256  # at a time; more are told to come later
METRICS_TIMEOUT_S = 5
PAGE_FILES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The engine behind.

    Attributes:
        url: of the engine, without a path; key: what it wants.
        name: of the engine; model: the name that clients use.
        context: tokens of a sequence; pictures: whether the engine shows them to the model.
    """

    url: str
    key: str
    name: str
    model: str
    context: int
    pictures: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask.

    Attributes:
        keys: any of them will do; none for everybody.
        loopback: whether it listens for this machine alone.
        origins: of pages elsewhere that may ask.
        page: whether the chat page is served.
    """

    keys: tuple[str, ...]
    loopback: bool
    origins: tuple[str, ...]
    page: bool


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Front:
    """The application; :meth:`app` is what a server runs.

    Args:
        backend: the engine; access: who may ask.
    """

    def __init__(self, backend: Backend, access: Access) -> None:
        self._backend, self._access = backend, access
        self._metrics = Metrics(backend.name, backend.model)
        self._session: aiohttp.ClientSession | None = None
        self._created = int(time.time())
        self.running = 0
        self.draining = False

    def app(self) -> web.Application:
        """Routes and what surrounds them."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._around])
        app.cleanup_ctx.append(self._sessions)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._one_model)
        app.router.add_post(CHAT, self._generate)
        app.router.add_post(TEXT, self._generate)
        if self._access.page:
            app.router.add_get("/", self._page)
            app.router.add_get("/page/{name}", self._page)
            app.router.add_get("/page.json", self._page_facts)
        return app

    async def drained(self, limit_s: float) -> bool:
        """Take no more requests and wait for those that run; ``False`` when some still did at the limit."""
        self.draining = True
        end = time.monotonic() + limit_s
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.running

    async def _sessions(self, _: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        # A connection that is kept can be closed by the engine in the moment in which it is used again, and a request
        # for text may not be sent twice. A new one on the loopback device costs a fraction of a millisecond.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
            self._session = session
            yield

    # What surrounds every route

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_caller(request)
            if request.method == "OPTIONS":
                return self._preflight(request)
            self._check_key(request)
            response = await handler(request)
        except ApiError as e:
            response = _told(e)
        except web.HTTPException as e:
            response = _told(_of_route(request, e))
        except Exception:
            if request.writer.output_size:  # an answer has begun, and cannot become another
                raise
            LOG.exception("%s %s", request.method, request.path)
            response = _told(ApiError(500, "The server failed; its own output says why."))
        if not response.prepared:
            self._add_headers(request, response)
        return response

    def _check_caller(self, request: web.Request) -> None:
        host = _split(f"//{request.headers.get('Host', '')}").hostname or ""
        if self._access.loopback and not is_loopback(host):
            raise ApiError(403, f"This server is for its own machine and is not called {host!r}.", code="host")
        origin = request.headers.get("Origin")
        if origin is None or origin in self._access.origins:
            return
        if _split(origin).netloc != request.headers.get("Host"):
            raise ApiError(
                403, f"Pages of {origin} may not ask here; --allow-origin names those that may.", code="origin"
            )

    def _preflight(self, request: web.Request) -> web.Response:
        headers = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        response = web.Response(status=204, headers=headers)
        self._add_headers(request, response)
        return response

    def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin")
        if origin is not None and origin in self._access.origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
        response.headers["X-Content-Type-Options"] = "nosniff"

    def _check_key(self, request: web.Request) -> None:
        if not self._access.keys or request.path in ("/health", "/", "/page.json") or request.path.startswith("/page/"):
            return
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise ApiError(401, "Give the API key as 'Authorization: Bearer KEY'.", code="missing_api_key")
        # All keys are compared, each in constant time.
        said = given.strip().encode("utf-8", "surrogateescape")  # aiohttp reads headers so
        if not any([hmac.compare_digest(said, key.encode()) for key in self._access.keys]):  # noqa: C419
            raise ApiError(401, "The API key is wrong.", code="invalid_api_key")

    # Routes

    async def _health(self, _: web.Request) -> web.Response:
        if self.draining:
            raise ApiError(503, "The server is stopping.", code="stopping")
        try:
            async with self._ask("GET", "/health", timeout=METRICS_TIMEOUT_S) as reply:
                if reply.status == 200:
                    return web.json_response({"status": "ok", "model": self._backend.model})
        except (aiohttp.ClientError, TimeoutError):
            pass
        raise ApiError(503, f"{self._backend.name} does not answer.", code="engine")

    async def _show_metrics(self, _: web.Request) -> web.Response:
        own, theirs, up = self._metrics, b"", False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._ask("GET", "/metrics", timeout=METRICS_TIMEOUT_S) as reply:
                up = reply.status == 200
                theirs = await reply.read() if up else b""
        return web.Response(body=own.text(engine_up=up) + theirs, headers={"Content-Type": own.content_type})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        wanted = request.match_info["model"]
        if wanted != self._backend.model:
            raise ApiError(404, f"The model {wanted!r} does not exist here.", param="model", code="model_not_found")
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        backend = self._backend
        return {
            "id": backend.model,
            "object": "model",
            "created": self._created,
            "owned_by": "halfbyte",
            "max_model_len": backend.context,
        }

    async def _page(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", "page.html")
        if name not in PAGE_FILES:
            raise ApiError(404, f"There is no {request.path} here.")
        text = resources.files("halfbyte.serving").joinpath("page", name).read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return web.Response(text=text, content_type=PAGE_FILES[name], charset="utf-8", headers=headers)

    async def _page_facts(self, _: web.Request) -> web.Response:
        backend = self._backend
        facts = {"model": backend.model, "pictures": backend.pictures, "key": bool(self._access.keys)}
        return web.json_response(facts)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            raise ApiError(503, "The server is stopping.", code="stopping")
        if self.running >= MOST_REQUESTS:
            raise ApiError(429, f"{MOST_REQUESTS} requests are running or waiting; try again later.", code="busy")
        self.running += 1
        with self._metrics.watch(request.path) as watched:
            try:
                response, whole = await self._pass_on(request, watched.first_byte)
                watched.status = response.status if whole else CANCELLED
                return response
            except ApiError as e:
                watched.status = e.status
                raise
            except Exception:
                watched.status = 500
                raise
            finally:
                self.running -= 1

    async def _pass_on(self, request: web.Request, first_byte: Callable[[], None]) -> tuple[web.StreamResponse, bool]:
        """The engine's answer, given on; and whether the client was there to the end."""
        if request.content_type != "application/json":
            raise ApiError(415, "The body has to be sent with 'Content-Type: application/json'.", code="content_type")
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.") from None
        body = api.parse(raw)
        api.check(request.path, body, self._backend.model)
        if "model" not in body:
            raw = json.dumps(body | {"model": self._backend.model}).encode()
        response: web.StreamResponse | None = None
        try:
            async with self._ask("POST", request.path, data=raw) as reply:
                if reply.status != 200:
                    raise api.engine_error(reply.status, await reply.read())
                if reply.content_type != "text/event-stream":
                    whole = await reply.read()
                    first_byte()
                    return web.Response(body=whole, content_type="application/json"), True
                response = web.StreamResponse(
                    headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
                )
                self._add_headers(request, response)
                await response.prepare(request)
                async for piece in reply.content.iter_any():
                    first_byte()
                    await response.write(piece)
        except (aiohttp.ClientError, TimeoutError) as e:
            if request.transport is None or request.transport.is_closing():  # the client has gone, not the engine
                return response or web.Response(status=CANCELLED), False
            error = ApiError(502, f"{self._backend.name} broke off: {type(e).__name__}.", code="engine")
            if response is None:
                raise error from None
            await response.write(b"data: " + json.dumps(error.body()).encode() + b"\n\n")
        await response.write_eof()
        return response, True

    def _ask(
        self, method: str, path: str, *, data: bytes | None = None, timeout: float | None = None
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        assert self._session is not None
        headers = {"Authorization": f"Bearer {self._backend.key}", "Content-Type": "application/json"}
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=10)
        return self._session.request(method, self._backend.url + path, data=data, headers=headers, timeout=limit)


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise ApiError(403, f"{url!r} names no host.", code="host") from None


def _told(error: ApiError) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    return web.json_response(error.body(), status=error.status, headers=headers)


def _of_route(request: web.Request, error: web.HTTPException) -> ApiError:
    if error.status == 404:
        return ApiError(404, f"There is no {request.path} here.", code="unknown_url")
    if error.status == 405:
        return ApiError(405, f"{request.path} does not take {request.method}.", code="method_not_allowed")
    return ApiError(error.status, error.reason)
