"""vLLM in an environment of its own, as a server for the length of an evaluation.

vLLM pins other versions of what halfbyte needs, so it may live beside it (docs/models.md); lm-eval then asks it over
HTTP.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from halfbyte.errors import HalfbyteError
from halfbyte.progress import Reporter

READY_S = 900


@contextlib.contextmanager
def serving(interpreter: str, folder: Path, max_length: int, log: Path, reporter: Reporter) -> Iterator[str]:
    """The address (``http://127.0.0.1:PORT/v1``) of a server that answers; it is ended afterwards.

    Raises:
        HalfbyteError: it ended, or did not answer in time; the end of its log is in the message.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        *(interpreter, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "checkpoint", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(max_length), "--max-num-seqs", "4", "--enforce-eager"),
        *("--gpu-memory-utilization", os.environ.get("HALFBYTE_VLLM_MEMORY", "0.4"), "--dtype", "bfloat16"),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")}
    environment |= {"VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    log.parent.mkdir(parents=True, exist_ok=True)
    reporter.say(f"starting vLLM for {folder} (a minute or two); its log is {log}")
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=log.parent
        )
        try:
            wait(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once the server says that it is healthy."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(1)
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line] or lines
    state = "ended" if process.poll() is not None else f"did not answer within {READY_S} s"
    raise HalfbyteError(f"vLLM {state}", where=str(log), why=errors[-1][-300:] if errors else "its log is empty")
