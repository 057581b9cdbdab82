"""``halfbyte bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli.console import emit, json_option, reporter, size
from halfbyte.cli.serving_options import writable
from halfbyte.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from halfbyte.serving.bench import BenchRecord, Measured


@click.command("bench", short_help="Time the answers of a served checkpoint, beside its baseline's.")
@click.argument("target", metavar="CKPT|URL")
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE OPTIONS]")
@click.option("--baseline", metavar="CKPT|URL", help="Measured the same way, such as the dense model.")
@click.option("--baseline-engine", default="auto", show_default=True, help="Engine of a baseline that is a checkpoint.")
@click.option("--clients", default="1,2,4,8", show_default=True, metavar="N,...", help="Concurrencies.")
@click.option("--requests", type=click.IntRange(1, 10_000), default=4, show_default=True, help="Of each client.")
@click.option("--tokens", type=click.IntRange(2, 100_000), default=64, show_default=True, help="Of each answer.")
@click.option("--words", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Of each prompt.")
@click.option(
    "--limit",
    type=click.FloatRange(1, 86_400),
    default=300,
    show_default=True,
    help="Seconds for asking in a level, and of an answer.",
)
@click.option("--api-key", "key", envvar="HALFBYTE_API_KEY", metavar="KEY", help="That a URL wants.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), callback=writable, help="File for the result as JSON."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), callback=writable, help="File for plots (PNG, SVG)."
)
@json_option
def command(
    target: str,
    serve_options: tuple[str, ...],
    baseline: str | None,
    baseline_engine: str,
    clients: str,
    requests: int,
    tokens: int,
    words: int,
    limit: float,
    key: str | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast a server at URL answers, or one that is started for the checkpoint CKPT.

    What follows -- goes to halfbyte serve, such as -- --engine llamacpp. Exit status 1 when an answer failed.
    """
    from halfbyte.records import write_json
    from halfbyte.serving.machine import need

    need("aiohttp", "serve", "benchmarking")
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg"):
            raise UsageError(f"{plot.name} is neither .png nor .svg", where="--plot", remedy="Name one that is.")
        need("matplotlib", "plots", "--plot")
    from halfbyte.serving.bench import BenchRecord, Load, draw, measure

    load = Load(clients=_numbers(clients), requests=requests, limit_s=limit, answer_tokens=tokens, prompt_words=words)
    progress = reporter()
    measured = [measure(target, load, key=key, serve_options=serve_options, reporter=progress)]
    if baseline is not None:
        options = ("--engine", baseline_engine)
        measured.append(measure(baseline, load, key=key, serve_options=options, reporter=progress))
    record = BenchRecord(answer_tokens=tokens, prompt_words=words, measured=measured)
    if out is not None:
        write_json(out, record)
    if plot is not None:
        draw(record, plot)
    emit(record, as_json=as_json, render=lambda console: _render(console, record))
    failed = [(one, level) for one in measured for level in one.levels if level.errors]
    if failed:
        one, level = failed[0]
        raise GateFailed(
            f"{level.errors} of {level.requests} answers failed at {level.clients} clients: {level.first_error}",
            where=one.target,
        )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(1 <= n <= 1024 for n in found):
        raise UsageError(f"{text!r} is no list of numbers from 1 to 1024", where="--clients", remedy="Say 1,2,4,8.")
    return found


def _render(console: Console, record: BenchRecord) -> None:
    for one in record.measured:
        console.print(_head(one), markup=False)
        table = Table(box=None, pad_edge=False)
        for title in ("clients", "tokens/s", "of one answer", "first token", "95%", "between tokens", "95%", "errors"):
            table.add_column(title, justify="right")
        for level in one.levels:
            table.add_row(
                str(level.clients),
                f"{level.tokens_per_s:.1f}",
                f"{level.each_tokens_per_s:.1f}",
                f"{1000 * level.first_token_s:.0f} ms",
                f"{1000 * level.first_token_p95_s:.0f} ms",
                f"{1000 * level.between_tokens_s:.1f} ms",
                f"{1000 * level.between_tokens_p95_s:.1f} ms",
                f"{level.errors} of {level.requests}",
            )
        console.print(table)


def _head(one: Measured) -> str:
    facts = [one.engine] if one.engine else []
    facts += [f"{size(one.memory_bytes)} of memory"] if one.memory_bytes else []
    facts += [f"prompts of {one.prompt_tokens} tokens"]
    return f"{one.model}: {', '.join(facts)}"
