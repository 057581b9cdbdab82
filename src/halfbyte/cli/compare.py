"""``halfbyte compare``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli.console import emit, json_option, reporter
from halfbyte.cli.options import device_option
from halfbyte.errors import GateFailed
from halfbyte.records import CompareRecord


@click.command("compare")
@click.argument("base")
@click.argument("checkpoint")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to predict.  [default: a short one that comes with halfbyte]",
)
@click.option("--tokens", type=click.IntRange(min=16), help="Score at most so many tokens.  [default: all]")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context.")
@device_option
@click.option("--max-kl", type=float, metavar="NATS", help="Exit with status 1 when the mean KL is larger.")
@json_option
def command(
    base: str,
    checkpoint: str,
    text: Path | None,
    tokens: int | None,
    window: int,
    device: str,
    max_kl: float | None,
    as_json: bool,
) -> None:
    """Measure how far CHECKPOINT's predictions are from BASE's, on the same text.

    Streams both models block by block; every token is scored exactly once.
    """
    from halfbyte.evaluation.divergence import compare

    record = compare(base, checkpoint, text=text, tokens=tokens, window=window, device=device, reporter=reporter())
    emit(record, as_json=as_json, render=lambda console: render(console, record))
    if max_kl is not None and record.metrics["kl_mean"] > max_kl:
        raise GateFailed(f"mean KL {record.metrics['kl_mean']:.4f} is above {max_kl}", where=checkpoint)


def render(console: Console, record: CompareRecord) -> None:
    """Draw a comparison for a person."""
    m = record.metrics
    console.print(f"{record.checkpoint} against {record.base}: {record.tokens:,} tokens of {record.text}")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("perplexity", f"{m['perplexity']:.3f}", f"baseline {m['perplexity_base']:.3f}")
    table.add_row(
        "perplexity ratio", f"{m['perplexity_ratio']:.4f}", f"± {m['perplexity_ratio_se']:.4f} (paired standard error)"
    )
    table.add_row("KL divergence, mean", f"{m['kl_mean']:.5f}", f"± {m['kl_se']:.5f} nats")
    table.add_row("  median", f"{m['kl_median']:.5f}", "")
    table.add_row("  99th percentile", f"{m['kl_p99']:.4f}", "")
    table.add_row("  99.9th percentile", f"{m['kl_p999']:.4f}", "")
    table.add_row("  largest", f"{m['kl_max']:.4f}", "")
    table.add_row("top-1 agreement", f"{100 * m['top1_agreement']:.2f}%", f"± {100 * m['top1_agreement_se']:.2f}%")
    table.add_row("target probability, rms change", f"{m['rms_probability_change']:.4f}", "")
    console.print(table)
