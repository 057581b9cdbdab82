"""What commands share for talking: the ``--json`` option, progress on stderr, sizes in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from halfbyte.progress import Reporter
from halfbyte.records import to_json

PLAIN_INTERVAL_S = 10.0


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` as the parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def emit(record: Any, *, as_json: bool, render: Callable[[Console], None]) -> None:
    """Print a result on stdout: the record as JSON, or whatever ``render`` draws for a person."""
    if as_json:
        sys.stdout.write(to_json(record))
        return
    width = None if sys.stdout.isatty() else 120
    render(Console(file=sys.stdout, width=width, highlight=False, soft_wrap=True))


class Bar:
    """Progress as a bar on a terminal's stderr, with facts as lines above it."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def start(self, task: str, total: int) -> None:
        self.finish()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(task, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


class Lines:
    """Progress as plain lines on stderr: facts as they come, counts at most every ten seconds."""

    def __init__(self) -> None:
        self._task, self._total, self._done, self._last = "", 0, 0, 0.0

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def start(self, task: str, total: int) -> None:
        self._task, self._total, self._done, self._last = task, total, 0, time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if time.monotonic() - self._last >= PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            self.say(f"{self._task}: {self._done}/{self._total}")

    def finish(self) -> None:
        self._task = ""


def reporter() -> Reporter:
    """A bar when stderr is a terminal, plain lines otherwise."""
    return Bar() if sys.stderr.isatty() else Lines()


def size(n: float) -> str:
    """Bytes in decimal units, as disks and hubs count them: ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
