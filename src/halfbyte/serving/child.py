"""One process that is watched: its last lines kept, and stopped with everything that it started.

It runs in a session of its own, so that Ctrl-C in the terminal reaches halfbyte alone, which then stops it in order,
and so that whatever it forks can be reached by its group. It ends when halfbyte ends in whatever way: on Linux the
kernel sends it SIGTERM, and its standard input closes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from halfbyte.errors import EngineError

KEPT_LINES = 200
SHOWN_LINES = 15
LONGEST_LINE = 500
POLL_S = 0.05
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception): \S.*")
_NO_ERROR = re.compile(r"\b(WARNING|INFO|DEBUG)\b")
# Ask the kernel for a SIGTERM at the parent's death, then become the program. The parent may have died before.
TIED = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Child:
    """A Python program in a process of its own.

    Args:
        name: for messages.
        python: interpreter; arguments: what follows it.
        environment: all of its variables.
        first_line: written to its standard input, which stays open as long as this process lives.
        log: file that its output is appended to as well.
        listener: hears each line of its output.
    """

    def __init__(
        self,
        *,
        name: str,
        python: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        first_line: str = "",
        log: Path | None = None,
        listener: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._listener = listener
        self._log = log.open("a", encoding="utf-8") if log is not None else None
        try:
            self._process = subprocess.Popen(
                [python, "-c", TIED, str(os.getpid()), *arguments],
                env={**environment, "PYTHONSAFEPATH": "1"},  # no module of the current folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as e:
            raise EngineError(f"{python} cannot be started: {e.strerror}", where=name) from None
        self._reader = threading.Thread(target=self._read, name=f"{name} output", daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        if first_line:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(first_line + "\n")
                self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Process id, also that of its group."""
        return self._process.pid

    def ended(self) -> bool:
        """Whether it is no longer running."""
        return self._process.poll() is not None

    def tail(self, lines: int = SHOWN_LINES) -> list[str]:
        """The last lines that it said."""
        if self.ended():
            self._reader.join(timeout=2)  # what it said last may still be in the pipe
        return list(self._lines)[-lines:]

    def cause(self) -> str:
        """The first error among what it said last, else its last line: of several processes the first knows why."""
        for line in self._lines:
            found = _ERROR.search(line)
            if found is not None and not _NO_ERROR.search(line):
                return found.group()
        return "; ".join(self.tail(1)).strip() or "it said nothing"

    def how_it_ended(self) -> str:
        """``ended with status 1``, ``was killed by SIGKILL``."""
        code = self._process.poll()
        if code is None:
            return "runs"
        if code >= 0:
            return f"ended with status {code}"
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        hint = ": the system may have run out of memory" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"

    def error(self, during: str) -> EngineError:
        """What to raise when it ended by itself."""
        return EngineError(
            f"{self.how_it_ended()} {during}",
            where=self.name,
            why=self.cause(),
            remedy="Its last lines are above.",
        )

    def stop(self, grace_s: float) -> None:
        """SIGTERM to its group, SIGKILL to what is left of it after ``grace_s`` seconds."""
        if not self.ended():
            self._signal(signal.SIGTERM)
            end = time.monotonic() + grace_s
            while not self.ended() and time.monotonic() < end:
                time.sleep(POLL_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._reader.join(timeout=2)
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._log is not None:
            self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while reading
            for line in self._process.stdout:
                line = line.rstrip()[:LONGEST_LINE]
                if not line:
                    continue
                self._lines.append(line)
                if self._log is not None:
                    self._log.write(line + "\n")
                    self._log.flush()
                if self._listener is not None:
                    self._listener(line)
