"""vLLM in an environment of its own, served for the length of an evaluation.

vLLM pins other versions of what halfbyte needs, so it may live beside it (docs/models.md); lm-eval then asks it over
HTTP. It is started as ``halfbyte serve`` starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.progress import Reporter
from halfbyte.serving import engines
from halfbyte.serving.choice import Served, read_served, vllm_obstacle
from halfbyte.serving.engines import Launch, Wishes
from halfbyte.serving.machine import Machine, look
from halfbyte.serving.service import engine

MODEL = "checkpoint"


def require_kernels(served: Served, machine: Machine) -> None:
    """Raise :class:`UsageError` where vLLM cannot run a checkpoint's weights on this machine."""
    obstacle = vllm_obstacle(served, machine)
    if obstacle is not None:
        raise UsageError(obstacle, where=f"--backend vllm: {served.path}", remedy="Use --backend llamacpp or hf.")


@contextlib.contextmanager
def serving(folder: Path, *, tokens: int, parallel: int, log: Path, reporter: Reporter) -> Iterator[Launch]:
    """A server of the model :data:`MODEL` that answers; it is ended afterwards.

    Args:
        folder: the checkpoint.
        tokens: of a sequence.
        parallel: sequences at a time.
        log: file for all that vLLM says.
        reporter: hears progress.

    Raises:
        UsageError: vLLM cannot run these weights on this machine.
        EngineError: it ended, or did not answer in time.
    """
    machine, served = look(), read_served(folder)
    require_kernels(served, machine)
    wishes = Wishes(name=MODEL, context=tokens, parallel=parallel)
    launch = engines.vllm(served, wishes, machine)
    log.parent.mkdir(parents=True, exist_ok=True)
    reporter.say(f"vLLM serves {folder}; its log is {log}")
    with asyncio.Runner() as runner:
        running = engine(launch, "vLLM", log=log, reporter=reporter)
        runner.run(running.__aenter__())
        try:
            yield launch
        finally:
            runner.run(running.__aexit__(None, None, None))
