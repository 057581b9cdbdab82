"""``halfbyte verify``: re-read a written checkpoint with an independent decoder."""

from __future__ import annotations

from pathlib import Path

import click

from halfbyte.cli.console import emit, json_option, reporter, size
from halfbyte.errors import GateFailed
from halfbyte.records import VERIFY_NAME, VerifyRecord

SHOWN_PROBLEMS = 10
COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.command("verify", short_help="Re-read a written checkpoint with an independent decoder and check every byte.")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--source", metavar="SOURCE", help="Checkpoint it was made from: compares copies and measures the error.")
@click.option(
    "--reload/--no-reload",
    default=None,
    help="Load it with transformers too, or not. [default: when that fits in free memory]",
)
@json_option
def command(checkpoint: str, source: str | None, reload: bool | None, as_json: bool) -> None:
    """Re-read the checkpoint CKPT (a folder, a hub id or a GGUF file) and say what is wrong with it.

    Checks files, headers, config, shapes, scales, codes and error with a decoder that shares no code with the writer,
    then reloads it with transformers and compares weights bit for bit and logits. Writes verify.json into CKPT.
    Exit status 1 when a check failed.
    """
    from halfbyte.checkpoint.source import resolve
    from halfbyte.verifier import verify

    progress = reporter()

    def found(name: str) -> Path:
        return Path(name) if name.endswith(".gguf") and not Path(name).is_dir() else resolve(name)

    path = found(checkpoint)
    try:
        record = verify(path, source=found(source) if source else None, reload=reload, reporter=progress)
    finally:
        progress.finish()
    emit(record, as_json=as_json, render=lambda console: console.print(_table(record)))
    failed = [c for c in record.checks if c.status == "failed"]
    if failed:
        first = failed[0].problems[0] if failed[0].problems else failed[0].detail
        more = sum(len(c.problems) for c in failed) - 1
        raise GateFailed(
            f"{len(failed)} of {len(record.checks)} checks failed: {first}" + (f" and {more} more" if more > 0 else ""),
            where=checkpoint,
            remedy=f"Every problem is listed {f'in {path / VERIFY_NAME} and ' if path.is_dir() else ''}by --json.",
        )


def _table(record: VerifyRecord) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{record.checkpoint}: {'passed' if record.passed else 'FAILED'}", title_justify="left")
    table.add_column("check")
    table.add_column("outcome")
    table.add_column("what was found", overflow="fold")
    for check in record.checks:
        lines = [check.detail, *check.problems[:SHOWN_PROBLEMS]]
        if len(check.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(check.problems) - SHOWN_PROBLEMS} more in {VERIFY_NAME}")
        table.add_row(check.name, Text(check.status, style=COLOURS[check.status]), Text("\n".join(lines)))
    table.caption = f"{record.tensors} tensors, {size(record.bytes_read)}"
    return table
