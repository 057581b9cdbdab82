"""Starts the real tritonserver on a model repository, and asks it with the real client.

Both are in an environment of their own: ``.envs/triton`` (``envs/make.sh triton``, or ``make test-triton``), or the one
of the interpreter that ``HALFBYTE_TRITON_PYTHON`` names. The server is that of the wheel nvidia-pytriton.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_S, STOP_S = 600, 120
MISSING = (
    "Triton has no environment here (.envs/triton): make it with `envs/make.sh triton`, or name its interpreter in "
    "HALFBYTE_TRITON_PYTHON"
)


def python() -> Path | None:
    """The interpreter of Triton's environment, ``None`` where there is none."""
    named = os.environ.get("HALFBYTE_TRITON_PYTHON")
    path = Path(named) if named else ROOT / ".envs/triton/bin/python"
    return path if path.exists() else None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(interpreter: Path) -> dict[str, str]:
    """Of the server: the stub of its python backend takes interpreter and packages from PATH, and links libpython."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")}
    ask = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    libraries = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    path = f"{interpreter.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return kept | {"PATH": path, "LD_LIBRARY_PATH": libraries, "OMP_NUM_THREADS": "1"}


class Triton:
    """A running tritonserver: ``http`` is its address, ``log`` what it has said so far."""

    def __init__(self, repository: Path, log: Path) -> None:
        interpreter = python()
        assert interpreter is not None, MISSING
        where = "from importlib.util import find_spec as f; print(f('pytriton').origin)"
        found = subprocess.run([interpreter, "-c", where], capture_output=True, text=True, check=True)
        home = Path(found.stdout.strip()).parent / "tritonserver"
        self._log = log
        http, grpc = free_port(), free_port()
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        with log.open("w") as out:
            self._server = subprocess.Popen(
                [
                    home / "bin/tritonserver",
                    f"--model-repository={repository}",
                    f"--backend-directory={home / 'backends'}",
                    "--http-address=127.0.0.1",
                    f"--http-port={http}",
                    "--grpc-address=127.0.0.1",
                    f"--grpc-port={grpc}",
                    "--allow-metrics=false",
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(interpreter),
            )
        self._client: subprocess.Popen[str] | None = None
        try:
            self._wait()
        except BaseException:
            self._server.kill()
            raise
        self._client = subprocess.Popen(
            [interpreter, HERE / "triton_calls.py", self.http, self.grpc],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(interpreter),
        )

    def _wait(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._server.poll() is not None:
                raise AssertionError(f"tritonserver ended with {self._server.returncode}:\n{self.log[-4000:]}")
            try:
                with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"tritonserver was not ready after {START_S} s:\n{self.log[-4000:]}")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def calls(self, calls: Sequence[dict[str, Any]], *, at_once: bool = False) -> list[dict[str, Any]]:
        """What tritonclient gets for each call, see ``triton_calls.py``."""
        assert self._client is not None
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(json.dumps({"calls": list(calls), "at_once": at_once}) + "\n")
        self._client.stdin.flush()
        answers: list[dict[str, Any]] = json.loads(self._client.stdout.readline())
        return answers

    def call(self, protocol: str, model: str, **inputs: Any) -> dict[str, Any]:
        return self.calls([{"protocol": protocol, "model": model, "inputs": inputs}])[0]

    def post(self, model: str, verb: str, **fields: Any) -> tuple[int, list[dict[str, Any]]]:
        """``/generate`` or ``/generate_stream``: the status and the events, or the one answer."""
        request = urllib.request.Request(
            f"http://{self.http}/v2/models/{model}/{verb}", json.dumps(fields).encode(), method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                status, text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as e:
            status, text = e.code, e.read().decode()
        if verb == "generate" or not text.startswith("data: "):
            return status, [json.loads(text)]
        return status, [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]

    def stop(self) -> int:
        """SIGTERM, as a container's end is; returns the exit status."""
        if self._client is not None:
            self._client.communicate(timeout=STOP_S)
        self._server.terminate()
        return self._server.wait(timeout=STOP_S)
