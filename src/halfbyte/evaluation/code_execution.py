"""Running programs that a language model wrote, to see whether they pass their tests.

Each runs in a process of its own, in an empty folder that is deleted afterwards, with limits on time, processor time,
memory, file size, open files and processes, as a user without privileges where halfbyte runs as root, and without a
network where the kernel gives it namespaces of its own (code_launch.py). It passes when its last line runs.

What this does not protect from: the program can read and write what its user may: as root's stranger, files that all
users may read and folders that are open to everyone (/tmp); where halfbyte does not run as root, everything of the user
that runs halfbyte, home included. It can use processor time up to the limits, and can attack the kernel. A program that
wants to look as if it had passed can. Run it in a container or a virtual machine where that matters.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import HalfbyteError

WARNING = (
    "Run programs that the models write, limited in time, memory, files and processes, and without a network where the "
    "kernel allows. Run by root, they become an unprivileged user, who can still read what every user may read. Run by "
    "another user, they remain that user: they can read and delete all of that user's files. They can attack the "
    "kernel. Use a container or a virtual machine for models that you do not trust."
)
# Users above those that systems hand out, so that a limit on processes counts nobody else's.
FIRST_USER, USERS = 61_500, 2_000
OUTPUT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use."""

    wall_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    files: int = 64
    processes: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended: ``passed``, ``failed`` or ``timed out``; ``missing`` names protections that were not had."""

    status: str
    detail: str
    missing: tuple[str, ...] = ()


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run one program.

    Raises:
        HalfbyteError: the sandbox itself does not work here.
    """
    token = secrets.token_hex(16)
    interpreter = os.path.realpath(sys.executable)
    folder = Path(tempfile.mkdtemp(prefix="halfbyte-code-"))
    try:
        user = FIRST_USER + secrets.randbelow(USERS)
        (folder / "program.py").write_text(f"{source}\n\nprint({token!r}, flush=True)\n", encoding="utf-8")
        settings = {
            "user": user,
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "files": limits.files,
            "processes": limits.processes,
            "prefix": "" if open_to_all(interpreter) else os.path.realpath(sys.base_prefix),
        }
        (folder / "limits.json").write_text(json.dumps(settings))
        shutil.copyfile(Path(__file__).with_name("code_launch.py"), folder / "launch.py")
        work = folder / "work"
        work.mkdir()
        (folder / "python").mkdir()
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(work, user, user)
        command = [interpreter, "-I", "-S", *(str(folder / n) for n in ("launch.py", "limits.json", "program.py"))]
        ended = _supervise(command, work, limits.wall_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    missing = tuple(line.removeprefix("missing: ") for line in ended.setup if line.startswith("missing: "))
    if ended.timed_out:
        return Outcome(status="timed out", detail=f"after {limits.wall_s:g} s", missing=missing)
    said = ended.err.splitlines()
    last = (said[-1] if said else f"exit status {ended.status}")[:300]
    if ended.setup[-1:] != ["ready"]:
        raise HalfbyteError(
            "the sandbox for generated code cannot be set up",
            where="--allow-code-execution",
            why="; ".join([*ended.setup, last]),
            remedy="Use an interpreter that every user may run, and a system that lets root become another user.",
        )
    if ended.status == 0 and ended.out.rstrip().endswith(token):
        return Outcome(status="passed", detail="", missing=missing)
    return Outcome(status="failed", detail=last, missing=missing)


def open_to_all(path: str) -> bool:
    """Whether every user may go to a file and run it."""
    return all(p.stat().st_mode & 0o001 for p in (Path(path), *Path(path).parents))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """What a launched program left: ``setup`` has the launcher's own lines, which the program cannot write."""

    out: str
    err: str
    timed_out: bool
    status: int
    setup: list[str]


def _supervise(command: list[str], work: Path, wall_s: float) -> _Ended:
    """Launch a program and wait for it. Whatever it started is ended with it."""
    reading, writing = os.pipe()
    with (
        open(reading, "rb", buffering=0) as setup,
        open(writing, "wb") as launcher_s,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        process = subprocess.Popen(
            [*command, str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=work,
            env={},
            start_new_session=True,
            pass_fds=(writing,),
        )
        timed_out = False
        try:
            process.wait(wall_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for f in (out, err):
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - OUTPUT_BYTES))
            texts.append(f.read().decode("utf-8", "replace"))
        launcher_s.close()
        os.set_blocking(reading, False)
        lines = (setup.read(OUTPUT_BYTES) or b"").decode("utf-8", "replace").splitlines()
    return _Ended(out=texts[0], err=texts[1], timed_out=timed_out, status=process.returncode, setup=lines)


def run_programs(sources: list[str], limits: Limits = Limits(), workers: int | None = None) -> list[Outcome]:
    """Run many, a few at a time, in order."""
    with ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(lambda s: run_program(s, limits), sources))
