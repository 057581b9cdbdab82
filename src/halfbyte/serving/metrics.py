"""What Prometheus is told about the front; the engine's own metrics follow them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CANCELLED = 499  # as web servers log a client that went away


class Watched:
    """One request; ``status`` is set when it is known."""

    def __init__(self, path: str, first: Histogram) -> None:
        self.status = CANCELLED
        self._path, self._first, self._began, self._seen = path, first, time.monotonic(), False

    def first_byte(self) -> None:
        """The first byte of the answer has come; later calls change nothing."""
        if not self._seen:
            self._seen = True
            self._first.labels(self._path).observe(self.seconds())

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began


class Metrics:
    """Counters of one server, apart from any other's in this process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: str, model: str) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "halfbyte_requests", "Requests for text, by outcome.", ("path", "status"), registry=self._registry
        )
        self._running = Gauge("halfbyte_requests_running", "Requests that run or wait.", registry=self._registry)
        self._first = Histogram(
            "halfbyte_first_byte_seconds",
            "Until the first byte of an answer.",
            ("path",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._all = Histogram(
            "halfbyte_request_seconds",
            "Until the last byte of an answer.",
            ("path",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._up = Gauge(
            "halfbyte_engine_up", "Whether the engine gives its metrics.", ("engine", "model"), registry=self._registry
        ).labels(engine, model)

    @contextmanager
    def watch(self, path: str) -> Iterator[Watched]:
        """Count what happens within as a request."""
        watched = Watched(path, self._first)
        self._running.inc()
        try:
            yield watched
        finally:
            self._running.dec()
            self._requests.labels(path, str(watched.status)).inc()
            self._all.labels(path).observe(watched.seconds())

    def text(self, *, engine_up: bool) -> bytes:
        """All of them, in Prometheus' text format."""
        self._up.set(engine_up)
        return generate_latest(self._registry)
