"""``halfbyte serve``."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from halfbyte.cli.console import emit, json_option, reporter
from halfbyte.cli.serving_options import address_model, engine_options, wishes, writable

if TYPE_CHECKING:
    from halfbyte.serving.service import ServeRecord


@click.command(
    "serve",
    short_help="Serve a checkpoint with OpenAI's API, on a GPU or a laptop.",
)
@click.argument("checkpoint")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE FLAGS]")
@engine_options
@click.option("--parallel", type=click.IntRange(1, 256), default=4, show_default=True, help="Answers at a time.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key", "keys", multiple=True, envvar="HALFBYTE_API_KEY", metavar="KEY", help="Wanted of clients; repeatable."
)
@click.option("--no-auth", is_flag=True, help="Serve an address that others can reach without a key.")
@click.option("--allow-origin", "origins", multiple=True, metavar="ORIGIN", help="Web pages there may ask; repeatable.")
@click.option("--ui", is_flag=True, help="A chat page at /.")
@click.option("--name", metavar="NAME", help="The model's name in the API.  [default: the folder's]")
@click.option(
    "--drain", type=click.FloatRange(min=0), default=30, show_default=True, help="Seconds for answers to end."
)
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=writable,
    help="Written when ready, with what --json prints.",
)
@json_option
def command(
    checkpoint: str,
    engine_flags: tuple[str, ...],
    engine: str,
    context: int | None,
    embeddings: str,
    cache: Path | None,
    engine_log: Path | None,
    parallel: int,
    host: str,
    port: int,
    keys: tuple[str, ...],
    no_auth: bool,
    origins: tuple[str, ...],
    ui: bool,
    name: str | None,
    drain: float,
    ready_file: Path | None,
    as_json: bool,
) -> None:
    """Serve CHECKPOINT (a folder, a hub id or a GGUF file) until Ctrl-C.

    What follows -- goes to the engine, such as -- --tensor-parallel-size 2 for vLLM.
    """
    import asyncio

    from halfbyte.serving.machine import need

    need("aiohttp", "serve", "serving")
    need("prometheus_client", "serve", "serving")
    from halfbyte.serving.prepare import prepare_apart
    from halfbyte.serving.service import Address, bind, serve

    if any(not key.strip() for key in keys):
        raise click.BadParameter("is empty", param_hint="--api-key")
    address = Address(host=host, port=port, keys=keys, no_auth=no_auth, origins=origins, page=ui)
    address.access()
    progress = reporter()
    model = name or address_model(checkpoint)

    def announce(record: ServeRecord) -> None:
        emit(record, as_json=as_json, render=lambda console: _render(console, record, keyed=bool(keys), page=ui))
        sys.stdout.flush()

    with contextlib.closing(bind(host, port)) as bound:
        prepared = prepare_apart(
            checkpoint,
            engine=engine,
            wishes=wishes(model, context, parallel, embeddings, engine_flags),
            cache=cache,
            reporter=reporter,
        )
        progress.say(f"engine: {prepared.name} ({prepared.choice.reason}). {prepared.choice.advice}".rstrip())
        for note in prepared.notes:
            progress.say(note)
        asyncio.run(
            serve(
                prepared,
                model,
                address,
                bound,
                announce=announce,
                reporter=progress,
                drain_s=drain,
                log=engine_log,
                ready_file=ready_file,
            )
        )


def _render(console: Console, record: ServeRecord, *, keyed: bool, page: bool) -> None:
    body = json.dumps({"model": record.model, "messages": [{"role": "user", "content": "Hello!"}]})
    key = ' -H "Authorization: Bearer $HALFBYTE_API_KEY"' if keyed else ""
    given = 'os.environ["HALFBYTE_API_KEY"]' if keyed else '"none"'
    quoted = body.replace("'", "'\\''")
    root = record.url.removesuffix("/v1")
    lines = [
        f"{record.model} is served at {record.url} ({record.engine}, {record.context} tokens of context).",
        f"To a test prompt it answered after {record.first_token_s:.2f} s: {' '.join(record.answer.split())!r}",
        "",
        f"  curl {record.url}/chat/completions -H 'Content-Type: application/json'{key} \\",
        f"    -d '{quoted}'",
        "",
        *(["  import os"] if keyed else []),
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{record.url}", api_key={given})',
        f"  answer = client.chat.completions.create(model={record.model!r}, "
        "messages=[{'role': 'user', 'content': 'Hello!'}])",
        "  print(answer.choices[0].message.content)",
        "",
        f"Metrics: {root}/metrics" + (f"   Page: {root}/" if page else "") + "   Ctrl-C stops it.",
    ]
    for line in lines:
        console.print(line, markup=False)
