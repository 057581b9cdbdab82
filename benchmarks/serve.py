"""How fast ``halfbyte serve`` decodes, beside llama.cpp's own server and the dense model in transformers.

    python benchmarks/serve.py --model DENSE --checkpoint W4A16 [--rounds 6] [--soak 120] [--threads N]

Five servers run at once and are asked in turn, one answer each a round, so that whatever else the machine does meets
all alike; a server that is not asked sleeps. Answers have a fixed number of tokens, drawn greedily.

    serve          halfbyte serve --engine llamacpp, through its front
    serve q8_0     likewise, with --embeddings q8_0
    llama.cpp      llama.cpp's own server, the same GGUF, nothing between
    own Q4_0       likewise, embeddings in Q8_0: llama.cpp's quantiser rounds them, halfbyte leaves them as they are
    dense          halfbyte serve --engine transformers of the dense model

Decode speed is (tokens - 1) / (last piece - first piece) as a client sees it. The claim is the median over rounds of
the ratio within a round. Memory is PSS of all processes of a server after the rounds. Then ``--soak`` seconds with
eight clients on ``serve`` count answers and errors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import busy_s, git_commit, machine, spread, today, versions, write_result

from halfbyte.errors import EngineError
from halfbyte.progress import Silent
from halfbyte.serving import bench, client, engines
from halfbyte.serving.child import Child
from halfbyte.serving.choice import read_served
from halfbyte.serving.client import Target
from halfbyte.serving.gguf_embeddings import with_small_embeddings
from halfbyte.serving.machine import look
from halfbyte.serving.prepare import prepare

ARMS = ("serve", "serve q8_0", "llama.cpp", "own Q4_0", "dense")
PAIRS = (
    ("serve", "llama.cpp"),
    ("serve q8_0", "own Q4_0"),
    ("serve", "own Q4_0"),
    ("serve", "dense"),
    ("serve q8_0", "dense"),
)
CLIENTS = 8
CONTEXT, PARALLEL = 1024, 4


@dataclass(frozen=True)
class Arm:
    """A server that runs: where, and its process."""

    target: Target
    pid: int


@contextmanager
def served(checkpoint: Path, *options: str) -> Iterator[Arm]:
    with bench.started(str(checkpoint), options, Silent()) as (ready, pid):
        yield Arm(Target(url=str(ready["url"]).removesuffix("/v1"), key=None, model=ready["model"]), pid)


@contextmanager
def plain(model: Path, name: str, flags: tuple[str, ...]) -> Iterator[Arm]:
    """llama.cpp's server, asked directly."""
    wishes = engines.Wishes(name=name, context=CONTEXT, parallel=PARALLEL, flags=flags)
    launch = engines.llamacpp(model, None, read_served(model), wishes, look())
    child = launch.start(name)
    try:
        target = Target(url=f"http://127.0.0.1:{launch.port}", key=launch.key, model=name)
        asyncio.run(answers(target, child))
        yield Arm(target, child.pid)
    finally:
        child.stop(5)


async def answers(target: Target, child: Child) -> None:
    async with client.session() as opened:
        while not child.ended():
            try:
                await client.continue_text(opened, target, "x", 1)
            except EngineError:
                await asyncio.sleep(0.2)
            else:
                return
    raise SystemExit("\n".join(child.tail()))


async def decode(target: Target, prompt: str, tokens: int) -> float:
    async with client.session() as opened:
        a = await bench._ask(opened, target, prompt, tokens)
    if a.tokens != tokens:
        raise SystemExit(f"{target.model} wrote {a.tokens} tokens instead of {tokens}")
    return (a.tokens - 1) / (a.last - a.first)


async def soak(target: Target, seconds: float) -> dict[str, Any]:
    """Eight clients that ask again as soon as they are answered."""
    prompts, done, errors = bench.Prompts(48), [], []
    end = time.monotonic() + seconds

    async def ask(opened: Any) -> None:
        while time.monotonic() < end:
            try:
                done.append(await bench._ask(opened, target, prompts.next(), 48))
            except EngineError as e:
                errors.append(str(e))

    async with client.session() as opened:
        began = time.monotonic()
        await asyncio.gather(*(ask(opened) for _ in range(CLIENTS)))
        took = time.monotonic() - began
    first = [a.first - a.began for a in done]
    return {
        "clients": CLIENTS,
        "seconds": round(took, 1),
        "answers": len(done),
        "errors": errors[:10],
        "failed": len(errors),
        "tokens_per_s": round(sum(a.tokens for a in done) / took, 1),
        "first_token_p95_s": round(bench.percentile(first, 0.95), 2) if first else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint")
    parser.add_argument("--checkpoint", type=Path, required=True, help="its W4A16, in groups of a multiple of 32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--soak", type=float, default=120)
    parser.add_argument("--threads", type=int, help="of every engine  [default: each one's own]")
    parser.add_argument("--cache", type=Path, help="folder for GGUFs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "results" / f"{today()}-serve-{args.model.name}.json"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        cache = args.cache or Path(temporary)
        shared = ("--context", str(CONTEXT), "--parallel", str(PARALLEL), "--cache", str(cache))
        flags = ("--threads", str(args.threads)) if args.threads else ()
        wishes = engines.Wishes(name="x", context=CONTEXT)
        prepared = prepare(args.checkpoint, engine="llamacpp", wishes=wishes, cache=cache, reporter=Silent())
        model = Path(json.loads(prepared.launch.settings)["model"])
        small = with_small_embeddings(model, Silent())
        arms = {
            "serve": stack.enter_context(served(args.checkpoint, "--engine", "llamacpp", *shared, "--", *flags)),
            "serve q8_0": stack.enter_context(
                served(args.checkpoint, "--engine", "llamacpp", "--embeddings", "q8_0", *shared, "--", *flags)
            ),
            "llama.cpp": stack.enter_context(plain(model, "llama.cpp", flags)),
            "own Q4_0": stack.enter_context(plain(small, "own", flags)),
            "dense": stack.enter_context(served(args.model, "--engine", "transformers", *shared, "--", *flags)),
        }
        prompts = bench.Prompts(48)
        rates: dict[str, list[float]] = {name: [] for name in ARMS}
        began, busy, own = time.monotonic(), busy_s(), own_s(arms)
        for number in range(args.rounds + 1):  # the first one warms up
            order = ARMS if number % 2 else ARMS[::-1]
            for name in order:
                rate = asyncio.run(decode(arms[name].target, prompts.next(), args.tokens))
                if number:
                    rates[name].append(round(rate, 2))
                    print(f"round {number}: {name} {rate:.1f} tokens/s", file=sys.stderr)
        wall = time.monotonic() - began
        others = None if busy is None else (busy_s() or 0) - busy - (own_s(arms) - own)
        memory = {name: bench.tree_bytes(arm.pid) for name, arm in arms.items()}
        soaked = asyncio.run(soak(arms["serve"].target, args.soak)) if args.soak else None
    result = {
        "what": "decode speed of one client, tokens per second as the client sees them",
        "model": args.model.name,
        "checkpoint": args.checkpoint.name,
        "tokens": args.tokens,
        "threads": args.threads,
        "rates": rates,
        "summary": {name: spread(values) for name, values in rates.items()},
        "ratios": {
            f"{one} / {other}": round(
                statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3
            )
            for one, other in PAIRS
        },
        "memory_bytes": memory,
        "soak": soaked,
        "other_cpu_share": None if others is None else round(max(others, 0) / wall / (os.cpu_count() or 1), 3),
        "machine": machine(),
        "versions": versions(sys.executable, ["halfbyte", "xllamacpp", "torch", "transformers", "aiohttp"]),
        "git": git_commit(),
    }
    write_result(out, result)
    print(json.dumps({key: result[key] for key in ("summary", "ratios", "memory_bytes", "soak")}, indent=2))


def own_s(arms: dict[str, Arm]) -> float:
    """Processor seconds of the servers and of this process."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = {int(listed[i]): int(listed[i + 1]) for i in range(0, len(listed), 2)}
    for pid in parents:
        at: int | None = pid
        while at in parents and at not in {a.pid for a in arms.values()}:
            at = parents[at]
        if at in {a.pid for a in arms.values()}:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


if __name__ == "__main__":
    main()
