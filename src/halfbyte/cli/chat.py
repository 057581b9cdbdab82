"""``halfbyte chat``: the terminal's side of a conversation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli.console import json_option, reporter
from halfbyte.cli.serving_options import address_model, engine_options, wishes
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.serving.chat import Conversation

HELP = (
    "/new starts again, /system TEXT sets a system prompt and starts again, /exit or Ctrl-D leaves. Ctrl-C stops an "
    'answer. A line that begins and ends with """ may have many lines between.'
)
EMPTY = {"role": "assistant", "content": ""}


@click.command("chat", short_help="Talk with a checkpoint in the terminal.")
@click.argument("checkpoint", metavar="CKPT|URL")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE FLAGS]")
@engine_options
@click.option("--system", default="", metavar="TEXT", help="System prompt.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is the likeliest token.  [default: the model's]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer, at most.")
@click.option("--api-key", "key", envvar="HALFBYTE_API_KEY", metavar="KEY", help="That a URL wants.")
@json_option
def command(
    checkpoint: str,
    engine_flags: tuple[str, ...],
    engine: str,
    context: int | None,
    embeddings: str,
    cache: Path | None,
    engine_log: Path | None,
    system: str,
    temperature: float | None,
    max_tokens: int | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Talk with a checkpoint, or with the model of a server at URL; answers come as they are written.

    Questions may also come from a pipe, one a line. With --json each answer is one line of JSON.
    """
    from halfbyte.serving.machine import need

    need("aiohttp", "serve", "chatting")
    need("prometheus_client", "serve", "chatting")
    from halfbyte.serving.chat import with_engine, with_url
    from halfbyte.serving.prepare import prepare_apart

    wanted = {"temperature": temperature, "max_tokens": max_tokens}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    progress = reporter()
    if checkpoint.startswith(("http://", "https://")):
        talk = with_url(checkpoint.rstrip("/").removesuffix("/v1"), key, system, options)
    else:
        model = address_model(checkpoint)
        one = wishes(model, context, 1, embeddings, engine_flags)
        prepared = prepare_apart(checkpoint, engine=engine, wishes=one, cache=cache, reporter=reporter)
        progress.say(f"engine: {prepared.name} ({prepared.choice.reason}). {prepared.choice.advice}".rstrip())
        talk = with_engine(prepared, model, system, options, engine_log, progress)
    with asyncio.Runner() as runner:
        conversation = runner.run(talk.__aenter__())
        try:
            _talk(runner, conversation, as_json=as_json)
        finally:
            runner.run(talk.__aexit__(None, None, None))


def _talk(runner: asyncio.Runner, conversation: Conversation, *, as_json: bool) -> None:
    """Read and answer until the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 -- arrows and history in input()
        print(f"{conversation.target.model}. {HELP}", file=sys.stderr)
    while True:
        try:
            line = _read("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return
        if word in ("/new", "/system"):
            conversation.messages.clear()
            if word == "/system":
                conversation.system = rest.strip()
            print("a new conversation", file=sys.stderr)
        elif word.startswith("/") and not rest and word[1:].isalpha():
            print(HELP, file=sys.stderr)
        elif line.strip():
            _answer(runner, conversation, line.strip(), as_json=as_json)


def _read(prompt: str) -> str:
    line = input(prompt)
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(input("  " if prompt else ""))
    return "\n".join(lines)[:-3]


def _answer(runner: asyncio.Runner, conversation: Conversation, text: str, *, as_json: bool) -> None:
    async def write() -> None:
        async with contextlib.aclosing(conversation.say(text)) as pieces:
            async for piece in pieces:
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()

    known = len(conversation.messages)
    try:
        runner.run(write())
        said = conversation.messages[-1] if len(conversation.messages) > known else EMPTY
        print(json.dumps(said, ensure_ascii=False) if as_json else "")
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except HalfbyteError as e:
        if not sys.stdin.isatty():
            raise
        print(f"\n{e}", file=sys.stderr)
