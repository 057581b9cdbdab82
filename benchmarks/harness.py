"""What the benchmarks share: measuring a child process, describing the machine, writing results, printing tables.

Imports neither torch nor numpy, and must stay so: on Linux the peak memory that the kernel reports for a child
includes its parent's memory at the moment of the fork, so the measuring process has to be small.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAMPLE_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One child process, from its start to its end.

    Attributes:
        wall_s: elapsed time, interpreter start and imports included.
        cpu_s: user plus system time of the child and of the children it waited for (``os.wait4``).
        peak_rss_bytes: the kernel's own peak of resident memory (``ru_maxrss``), file-mapped pages included.
        peak_anonymous_bytes: largest sampled anonymous memory, i.e. without pages that are backed by files and that
            the kernel may drop at will; 0 where it cannot be read.
        other_cpu_share: how much of the machine's processor time everything else used meanwhile, 0 to 1; near 0 on a
            quiet machine, ``None`` where it cannot be read.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    other_cpu_share: float | None


def measure(
    command: Sequence[str | Path],
    log: Path,
    env: dict[str, str] | None = None,
    data_limit: int | None = None,
    group: Path | None = None,
) -> Measurement:
    """Run a command to its end with stdout in ``log`` and stderr in ``log`` + ``.err``; stop with its tail if it fails.

    Both sides of a comparison go through here, so they are measured alike. With ``data_limit`` the kernel refuses the
    child more private memory than so many bytes (``RLIMIT_DATA``, the shell's ``ulimit -d``); with ``group`` it runs in
    that group of the kernel's, see :func:`memory_group`.
    """

    def limit() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        if data_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))

    error_log = log.with_name(log.name + ".err")
    with open(log, "wb") as out, open(error_log, "wb") as err:
        busy, start = busy_s(), perf_counter()
        environment = {**os.environ, **(env or {})}
        words = [str(c) for c in command]
        child = subprocess.Popen(words, stdout=out, stderr=err, env=environment, preexec_fn=limit)
        anonymous = _AnonymousPeak(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        wall = perf_counter() - start
        busy_after = busy_s()
        anonymous.stop()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = error_log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(map(str, command))}\nended with status {child.returncode}:\n{tail}")
    cpu = usage.ru_utime + usage.ru_stime
    others = None
    if busy is not None and busy_after is not None:
        others = max(0.0, busy_after - busy - cpu) / (wall * (os.cpu_count() or 1))
    return Measurement(
        wall_s=wall,
        cpu_s=cpu,
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        peak_anonymous_bytes=anonymous.bytes,
        other_cpu_share=others,
    )


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group whose processes have so many bytes of memory together, page cache included.

    It is what ``systemd-run --scope -p MemoryMax=`` makes: the kernel takes the page cache back when the limit is
    reached, and kills a process of the group where that is not enough. Swap is switched off for it where the kernel
    has such a switch. Needs the right to write to ``/sys/fs/cgroup``.
    """
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    group = (root if unified else root / "memory") / f"halfbyte-benchmark-{os.getpid()}"
    swap, most = ("memory.swap.max", "memory.max") if unified else ("memory.swappiness", "memory.limit_in_bytes")
    try:
        try:
            if unified:
                (root / "cgroup.subtree_control").write_text("+memory")
            group.mkdir()
            if (group / swap).exists():
                (group / swap).write_text("0")
            (group / most).write_text(str(limit))
        except OSError as error:
            why = f"no group with a limit of memory can be made here: {error}"
            raise SystemExit(f"{why}\nrun without --group") from None
        yield group
    finally:
        _remove_group(group)


def _remove_group(group: Path) -> None:
    """With whatever still runs in it; where that does not help, say so and leave it."""
    for _ in range(20):
        try:
            for pid in (group / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            sleep(0.1)
        else:
            return
    print(f"{group} could not be removed", file=sys.stderr)


def group_peak_bytes(group: Path) -> int | None:
    """Most that the processes of a group had at a time, page cache included; ``None`` where the kernel does not say."""
    names = ("memory.peak", "memory.max_usage_in_bytes")
    return next((int((group / name).read_text()) for name in names if (group / name).exists()), None)


def forget_pages(folder: Path) -> None:
    """Have a folder's files leave the page cache: pages that stay there are charged to whoever put them there."""
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def busy_s() -> float | None:
    """Processor seconds that the whole machine has used since it started (Linux; else ``None``)."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq = map(int, f.readline().split()[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class _AnonymousPeak:
    """Samples ``RssAnon`` of a process in a thread."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._path = f"/proc/{pid}/status"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            try:
                with open(self._path) as f:
                    line = next((x for x in f if x.startswith("RssAnon:")), None)
            except OSError:
                return
            if line is not None:
                self.bytes = max(self.bytes, int(line.split()[1]) * 1024)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def compared(
    model: Path, checkpoint: Path, text: Path, tokens: int, log: Path, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """What ``halfbyte compare`` says, scoring the first ``tokens`` of a text (0: all), less this machine's paths."""
    limit = ["--tokens", str(tokens)] if tokens else []
    judge = [sys.executable, "-m", "halfbyte", "compare", model, checkpoint, "--json", "--text", text, *limit]
    measure(judge, log, env)
    record = last_json(log)
    return {key: record[key] for key in ("text_sha256", "tokens", "window", "metrics", "versions", "by_window")}


def last_json(log: Path) -> Any:
    """The JSON that a command printed on stdout."""
    return json.loads(log.read_text(encoding="utf-8"))


def json_from(command: Sequence[str | Path]) -> Any:
    """Run a helper to its end and parse the JSON on its stdout."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """CPU, usable cores, memory, kernel and, where there is one, the GPU.

    Virtual CPUs may tell no more than their maker, so family and model, which tell the generation, are kept as well.
    """
    model = platform.processor() or platform.machine()
    generation: dict[str, int] = {}
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("cpu family", "model"):
                generation[key.strip()] = int(value)
            elif key.strip() == "flags":
                flags = set(value.split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "cpu": model,
        "cpu_generation": generation,
        "cpu_features": [f for f in wanted if f in flags],
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": _gpu(),
    }


def _gpu() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def git_commit() -> dict[str, Any]:
    """The commit that was measured, and whether files under src/ differed from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return {"commit": None, "modified": []}
    return {"commit": head.stdout.strip() or None, "modified": [x[3:] for x in changed.stdout.splitlines()]}


def versions(python: str | Path, packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages in another interpreter's environment; ``None`` for one that is not installed."""
    code = (
        "import json, platform, sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n        found[name] = None\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str | None] = json_from([python, "-c", code, *packages])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def plain(measurement: Measurement) -> dict[str, float]:
    """A measurement as JSON values."""
    return asdict(measurement)


def today() -> str:
    """The date in the names of result files."""
    return datetime.date.today().isoformat()


def kept(pattern: str) -> list[Path]:
    """Result files of a pattern, those that newer ones have replaced included."""
    return sorted([*RESULTS.glob(pattern), *(RESULTS / "earlier").glob(pattern)])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, numbers are set right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for n, row in enumerate(rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if n == 0:
            rules = ["-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
            lines.append("|" + "|".join(rules) + "|")
    return "\n".join(lines)


def gib(n: float) -> str:
    """Bytes as GiB."""
    return f"{n / 2**30:.2f} GiB"
