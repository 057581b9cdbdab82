"""``halfbyte convert``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from halfbyte.cli.console import duration, emit, json_option, reporter, size
from halfbyte.records import ConvertRecord

SHOWN_WEIGHTS = 5


@click.command("convert", short_help="Write a checkpoint in another format, codes and scales carried over.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="FORMAT", help="compressed-tensors, awq, gptq, gptq-v2, gguf or dense.")
@click.option(
    "--from",
    "source_format",
    default="auto",
    show_default=True,
    metavar="FORMAT",
    help="What SOURCE is; auto finds out.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Of dense weights (dense, gguf): bfloat16, float16, float32.  [default: as they are]",
)
@click.option("--tokenizer", metavar="FOLDER", help="For a Flax SOURCE.  [default: tokenizer.model beside it]")
@click.option("--config", metavar="FILE", help="For a Flax SOURCE of no published size.")
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Round again what the target cannot express; without it, convert stops and names the weights.",
)
@click.option("--resume", is_flag=True, help="Continue the unfinished run in OUT.partial.")
@json_option
def command(
    source: str,
    out: Path,
    to: str,
    source_format: str,
    dtype: str | None,
    tokenizer: str | None,
    config: str | None,
    allow_requantize: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint SOURCE in another format to the new folder OUT.

    SOURCE is a folder, a .gguf file, or a hub id of a checkpoint in safetensors. Of a hub repository of GGUF files,
    fetch the one that you want (hf download ORG/NAME FILE.gguf) and give that.

    Codes and scales are carried over as they are. What the target cannot express is said before anything is written.
    """
    from halfbyte.conversion.run import convert

    progress = reporter()
    try:
        record = convert(
            source,
            out,
            to=to,
            source_format=source_format,
            dtype=dtype,
            tokenizer=tokenizer,
            config=config,
            allow_requantize=allow_requantize,
            resume=resume,
            reporter=progress,
        )
    finally:
        progress.finish()
    emit(record, as_json=as_json, render=lambda console: _render(console, record, out))


def _render(console: Console, record: ConvertRecord, out: Path) -> None:
    console.print(
        f"wrote {out}: {record.source['format']} -> {record.target}, {record.tensors} tensors, "
        f"{size(record.run['bytes_after'])}, {duration(record.run['seconds'])}"
    )
    if record.requantized:
        worst = max(record.requantized, key=lambda r: r.relative_error)
        console.print(
            f"{record.exact} of {record.quantized} quantised weights carried over exactly, {len(record.requantized)} "
            f"rounded again; largest relative error {worst.relative_error:.2e} at {worst.name}"
        )
    elif record.exact:
        console.print(f"all {record.exact} quantised weights carried over exactly")
    for note in record.notes:
        console.print(note, markup=False)
