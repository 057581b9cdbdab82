"""Runs of ``quantize`` in processes of their own, which can be killed, and which can kill themselves at a chosen write.

A fork server imports torch and a model class once; its children start in milliseconds, so that dozens of runs can be
killed.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["halfbyte.pipeline", "halfbyte.conversion.run", "transformers.models.llama.modeling_llama", "interrupted"]
)
# Everything that changes the disk while a run is going on.
WRITES = ("pwrite", "replace", "rename", "unlink", "posix_fallocate", "rmdir")
THREADS = 1


def start(source: Path, out: Path, **options: Any) -> multiprocessing.process.BaseProcess:
    """Start a run in a process of its own: with ``trap``, after :func:`set_trap`; ``said`` is a file for its error.

    With ``to`` it is a run of ``convert``, journalled after every ``stage_bytes``.
    """
    process = CONTEXT.Process(target=_work, args=(source, out, options))
    process.start()
    return process


def _work(source: Path, out: Path, options: dict[str, Any]) -> None:
    import torch

    from halfbyte.conversion import run
    from halfbyte.errors import HalfbyteError
    from halfbyte.pipeline import quantize

    torch.set_num_threads(THREADS)
    trap, said = options.pop("trap", None), options.pop("said", None)
    run.STAGE_BYTES = options.pop("stage_bytes", run.STAGE_BYTES)
    if trap is not None:
        set_trap(*trap)
    try:
        if "to" in options:
            run.convert(source, out, **options)
        else:
            quantize(source, out, device="cpu", **options)
    except HalfbyteError as e:
        if said is not None:
            said.write_text(str(e))
        raise


def start_ranks(
    world: int,
    source: Path,
    out: Path,
    traps: Mapping[int, Any] | None = None,
    said: Path | None = None,
    **options: Any,
) -> list[multiprocessing.process.BaseProcess]:
    """Start a run in ``world`` processes that work together; ``traps`` by rank, ``said`` takes the errors' lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = (environment, source, out, (traps or {}).get(rank), said, options)
        processes.append(CONTEXT.Process(target=_work_together, args=arguments))
        processes[-1].start()
    return processes


def _work_together(
    environment: dict[str, str], source: Path, out: Path, trap: Any, said: Path | None, options: dict[str, Any]
) -> None:
    import torch

    from halfbyte.errors import HalfbyteError
    from halfbyte.pipeline import quantize
    from halfbyte.ranks import joined

    os.environ |= environment
    torch.set_num_threads(THREADS)
    try:
        with joined("cpu") as ranks:
            if trap is not None:
                set_trap(*trap)
            quantize(source, out, device="cpu", ranks=ranks, **options)
    except HalfbyteError as e:
        if said is not None:
            with open(said, "a") as f:
                f.write(f"{e}\n")
        raise SystemExit(e.exit_status) from None


def finish_ranks(processes: list[multiprocessing.process.BaseProcess]) -> list[int]:
    """Wait for all ranks of a run; their exit codes."""
    return [finish(p) for p in processes]


def finish(process: multiprocessing.process.BaseProcess) -> int:
    """Wait for a run; its exit code (minus the signal where one ended it)."""
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def set_trap(kind: str, number: int, log: Path | None = None) -> None:
    """Set this process up to come to grief at one of its writes.

    Args:
        kind: ``"kill"``: end before write ``number``, counted from 0; ``"tear"``: end when half of it is done;
            ``"full"``: there is no space from then on; ``"count"``: nothing happens.
        number: see ``kind``.
        log: takes the name of each write, a line each.
    """
    seen = 0

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            here, seen = seen, seen + 1
            if log is not None:
                with open(log, "a") as f:
                    f.write(f"{name}\n")
            if kind == "full" and here >= number and name in ("pwrite", "posix_fallocate"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if here == number and kind in ("kill", "tear"):
                if kind == "tear" and name == "pwrite":
                    descriptor, data, offset = args
                    real(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(os, name, wrap(name, getattr(os, name)))
