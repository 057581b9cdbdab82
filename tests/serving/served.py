"""A real ``halfbyte serve`` in a process of its own, for tests: started, asked, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NO_VLLM = "vLLM has no environment here: envs/make.sh vllm makes one, or HALFBYTE_VLLM_PYTHON names its interpreter"
START_LIMIT_S = 600
STOP_LIMIT_S = 60


def vllm_python() -> Path | None:
    """The interpreter of vLLM's environment, ``None`` where there is none."""
    named = os.environ.get("HALFBYTE_VLLM_PYTHON")
    path = Path(named) if named else ROOT / ".envs/vllm/bin/python"
    return path if path.exists() else None


@dataclass
class Server:
    """One that is ready. ``errors`` is the file of its stderr, ``out`` of its stdout."""

    process: subprocess.Popen[bytes]
    record: dict[str, Any]
    out: Path
    errors: Path

    @property
    def url(self) -> str:
        return str(self.record["url"]).removesuffix("/v1")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_LIMIT_S)


def start(folder: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """``halfbyte serve ARGUMENTS`` with its output in ``folder``."""
    command = [sys.executable, "-m", "halfbyte", "serve", *map(str, arguments)]
    with (folder / "out.txt").open("wb") as out, (folder / "errors.txt").open("wb") as errors:
        return subprocess.Popen(command, stdout=out, stderr=errors, env={**os.environ, **(environment or {})})


@contextlib.contextmanager
def server(folder: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready, at a free port; stopped at the end.

    Raises:
        AssertionError: it ended before; with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "ready.json"
    places = ("--port", "0", "--ready-file", ready, "--cache", folder / "cache")
    process = start(folder, *places, *arguments, environment=environment)
    try:
        end = time.monotonic() + START_LIMIT_S
        while not ready.exists():
            assert process.poll() is None, f"it ended:\n{(folder / 'errors.txt').read_text()}"
            assert time.monotonic() < end, f"it did not start:\n{(folder / 'errors.txt').read_text()}"
            time.sleep(0.1)
        yield Server(process, json.loads(ready.read_text()), folder / "out.txt", folder / "errors.txt")
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def group(leader: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[2]) == leader:
                    found.append(int(entry.name))
    return found
