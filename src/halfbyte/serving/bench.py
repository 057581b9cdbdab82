"""How fast a server answers: time to the first token, time between tokens, tokens a second, at several concurrencies.

Clients are real ones: each has connections of its own and reads streamed answers. Prompts differ from each other from
their first word on, so that no prompt cache helps, and answers have a fixed length where the server can be told to
(``ignore_eos``; vLLM, llama.cpp, halfbyte). Every level is bounded in requests and in time: after its limit it
asks no more, and no answer may take longer than that.

    time to first token  = first piece of text - request
    inter-token latency  = (last piece - first piece) / (tokens - 1), for each answer
    tokens per second    = tokens of all answers / (end of the last - start of the first)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp

from halfbyte.errors import EngineError, counted
from halfbyte.progress import Reporter
from halfbyte.serving import client
from halfbyte.serving.client import Target

START_LIMIT_S = 1800
STOP_LIMIT_S = 60
SAMPLE_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What was measured at one concurrency; times in seconds, medians and 95th percentiles over answers.

    Attributes:
        clients: at a time; requests: all together, of which ``errors`` failed.
        tokens: of answers; seconds: from the first request to the last answer's end.
        each_tokens_per_s: of one answer, the median; tokens_per_s: of all clients together.
        first_error: its message, empty for none.
    """

    clients: int
    requests: int
    errors: int
    tokens: int
    seconds: float
    tokens_per_s: float
    each_tokens_per_s: float
    first_token_s: float
    first_token_p95_s: float
    between_tokens_s: float
    between_tokens_p95_s: float
    first_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One server.

    Attributes:
        target: as given; model: its name in the API; engine: empty for a URL.
        memory_bytes: most that the server's processes held at a sample, shared pages divided among those that share
            them (PSS); ``None`` for a URL.
        start_s: until it answered; ``None`` for a URL.
        prompt_tokens: of a prompt, the median.
    """

    target: str
    model: str
    engine: str
    memory_bytes: int | None
    start_s: float | None
    prompt_tokens: int
    levels: list[Level]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecord:
    """What ``bench`` measured: the target and, where one was given, its baseline."""

    answer_tokens: int
    prompt_words: int
    measured: list[Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked.

    Attributes:
        clients: concurrencies, one level each.
        requests: of one client in a level; limit_s: for asking in a level, and of an answer.
        answer_tokens: of each answer; prompt_words: of each prompt.
    """

    clients: tuple[int, ...]
    requests: int
    limit_s: float
    answer_tokens: int
    prompt_words: int


@dataclass(frozen=True, slots=True)
class _Answer:
    began: float
    first: float
    last: float
    tokens: int
    prompt_tokens: int


@contextlib.contextmanager
def started(checkpoint: str, options: Sequence[str], reporter: Reporter) -> Iterator[tuple[dict[str, Any], int]]:
    """``halfbyte serve`` of a checkpoint in a process of its own: what it says when ready, and its process id.

    Raises:
        EngineError: it ended before it was ready; its own words have gone to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as folder:
        ready = Path(folder, "ready.json")
        head, split, flags = _split(options)
        command = [sys.executable, "-m", "halfbyte", "serve", "--port", "0", "--ready-file", str(ready), *head]
        process = subprocess.Popen([*command, checkpoint, *split, *flags], stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + START_LIMIT_S
            while not ready.exists():
                if process.poll() is not None:
                    raise EngineError("could not be served; see above", where=checkpoint)
                if time.monotonic() > end:
                    raise EngineError(f"is not ready after {START_LIMIT_S} s", where=checkpoint)
                time.sleep(0.1)
            yield json.loads(ready.read_text(encoding="utf-8")), process.pid
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reporter.finish()


def _split(options: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    listed = list(options)
    place = listed.index("--") if "--" in listed else len(listed)
    return listed[:place], listed[place : place + 1], listed[place + 1 :]


def measure(target: str, load: Load, *, key: str | None, serve_options: Sequence[str], reporter: Reporter) -> Measured:
    """Measure a server, or a checkpoint that is served for it.

    Args:
        target: URL, or what ``serve`` takes.
        load: what is asked.
        key: that a URL wants.
        serve_options: for ``serve``.

    Raises:
        EngineError: the server cannot be reached, or not one answer of a level came.
    """
    if target.startswith(("http://", "https://")):
        url = target.rstrip("/").removesuffix("/v1")
        model, prompt_tokens, levels, _ = asyncio.run(_measure(url, key, load, None, reporter))
        return Measured(
            target=target,
            model=model,
            engine="",
            memory_bytes=None,
            start_s=None,
            prompt_tokens=prompt_tokens,
            levels=levels,
        )
    with started(target, serve_options, reporter) as (ready, pid):
        url = str(ready["url"]).removesuffix("/v1")
        model, prompt_tokens, levels, memory = asyncio.run(_measure(url, key, load, pid, reporter))
        return Measured(
            target=target,
            model=model,
            engine=ready["engine"],
            memory_bytes=memory,
            start_s=ready["start_s"],
            prompt_tokens=prompt_tokens,
            levels=levels,
        )


async def _measure(
    url: str, key: str | None, load: Load, pid: int | None, reporter: Reporter
) -> tuple[str, int, list[Level], int | None]:
    async with client.session(load.limit_s) as opened:
        found = Target(url=url, key=key, model=await client.only_model(opened, url, key))
        prompts = Prompts(load.prompt_words)
        await _ask(opened, found, prompts.next(), load.answer_tokens)  # what is loaded or compiled at first use
        memory: list[int] = []
        sampling = asyncio.create_task(_sample(pid, memory)) if pid is not None else None
        levels, read = [], []
        for clients in load.clients:
            level, prompt_tokens = await _level(opened, found, load, clients, prompts, reporter)
            levels.append(level)
            read += prompt_tokens
        if sampling is not None:
            sampling.cancel()
    return found.model, int(statistics.median(read)), levels, max(memory, default=None)


async def _level(
    opened: aiohttp.ClientSession, target: Target, load: Load, clients: int, prompts: Prompts, reporter: Reporter
) -> tuple[Level, list[int]]:
    answers: list[_Answer] = []
    errors: list[str] = []
    reporter.start(counted(clients, "client"), clients * load.requests)
    began = time.monotonic()

    async def ask_in_turn() -> None:
        for _ in range(load.requests):
            if time.monotonic() - began > load.limit_s:
                return
            try:
                answers.append(await _ask(opened, target, prompts.next(), load.answer_tokens))
            except EngineError as e:
                errors.append(str(e))
            reporter.advance()

    await asyncio.gather(*(ask_in_turn() for _ in range(clients)))
    reporter.finish()
    if not answers:
        raise EngineError(f"no answer at all came: {errors[0] if errors else 'none was asked for'}", where=target.url)
    return level_of(clients, answers, errors), [a.prompt_tokens for a in answers]


def level_of(clients: int, answers: Sequence[_Answer], errors: Sequence[str]) -> Level:
    """Figures of a level from its answers; the equations are the module's."""
    tokens = sum(a.tokens for a in answers)
    seconds = max(a.last for a in answers) - min(a.began for a in answers)
    first = [a.first - a.began for a in answers]
    between = [(a.last - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1] or [0.0]
    middle = statistics.median(between)
    return Level(
        clients=clients,
        requests=len(answers) + len(errors),
        errors=len(errors),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_s=round(tokens / seconds, 2) if seconds else 0.0,
        each_tokens_per_s=round(1 / middle, 2) if middle else 0.0,
        first_token_s=round(statistics.median(first), 4),
        first_token_p95_s=round(percentile(first, 0.95), 4),
        between_tokens_s=round(middle, 5),
        between_tokens_p95_s=round(percentile(between, 0.95), 5),
        first_error=errors[0] if errors else "",
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


async def _ask(opened: aiohttp.ClientSession, target: Target, prompt: str, tokens: int) -> _Answer:
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.monotonic()
    times: list[float] = []
    pieces, usage = 0, None
    async for event in client.stream(opened, target, [{"role": "user", "content": prompt}], options):
        if event.text or event.thought:
            times.append(event.at)
            pieces += 1
        usage = event.usage or usage
    counted = int(usage["completion_tokens"]) if usage else pieces
    if not times:
        raise EngineError("an answer held no text", where=target.url)
    return _Answer(began, times[0], times[-1], counted, int(usage["prompt_tokens"]) if usage else 0)


class Prompts:
    """Prompts of so many words of halfbyte's own demo text, no two alike at their start."""

    def __init__(self, words: int) -> None:
        text = resources.files("halfbyte").joinpath("data/demo_text.txt").read_text(encoding="utf-8")
        self._all, self._words, self._random = text.split(), words, random.Random(0)
        self._number = 0

    def next(self) -> str:
        """Another one."""
        self._number += 1
        start = self._random.randrange(len(self._all))
        turned = self._all[start:] + self._all[:start]
        body = (turned * (self._words // len(turned) + 1))[: self._words]
        return f"{self._number}. Continue: {' '.join(body)}"


async def _sample(pid: int, found: list[int]) -> None:
    while True:
        found.append(await asyncio.to_thread(tree_bytes, pid))
        await asyncio.sleep(SAMPLE_EVERY_S)


def tree_bytes(pid: int) -> int:
    """Memory of a process and all that it started: the sum of their PSS; 0 where the system does not tell."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    tree, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in tree} - tree
        tree |= more
        grown = bool(more)
    total = 0
    for each in tree:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def draw(record: BenchRecord, file: Path) -> None:
    """Three plots over concurrency: all tokens a second, time to the first token, time between tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = (
        ("tokens a second, all clients", "tokens_per_s", None),
        ("time to the first token, s (to 95%)", "first_token_s", "first_token_p95_s"),
        ("time between tokens, s (to 95%)", "between_tokens_s", "between_tokens_p95_s"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (title, value, high) in zip(axes, shown, strict=True):
        for one in record.measured:
            at = [level.clients for level in one.levels]
            middle = [_of(level, value) for level in one.levels]
            (line,) = axis.plot(at, middle, marker="o", label=f"{one.model} {one.engine}".strip())
            if high is not None:
                axis.fill_between(
                    at, middle, [_of(level, high) for level in one.levels], alpha=0.15, color=line.get_color()
                )
        axis.set(title=title, xlabel="clients", ylim=(0, None), xticks=at)
    axes[0].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _of(level: Level, name: str) -> float:
    values = {
        "tokens_per_s": level.tokens_per_s,
        "first_token_s": level.first_token_s,
        "first_token_p95_s": level.first_token_p95_s,
        "between_tokens_s": level.between_tokens_s,
        "between_tokens_p95_s": level.between_tokens_p95_s,
    }
    return values[name]
