"""``halfbyte inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli.console import emit, json_option, size
from halfbyte.errors import counted

if TYPE_CHECKING:
    from halfbyte.inspection import Inspection

SHOWN = 5


@click.command("inspect")
@click.argument("checkpoint", metavar="CKPT")
@json_option
def command(checkpoint: str, as_json: bool) -> None:
    """Show what is inside CKPT (a folder, a GGUF file or a hub id): schemes, bits, bytes, errors.

    Reads headers only. Knows dense, compressed-tensors, AWQ, GPTQ and GGUF checkpoints, whoever made them, and Gemma 3
    for Flax.
    """
    from halfbyte.inspection import inspect

    result = inspect(checkpoint)
    emit(result, as_json=as_json, render=lambda console: render(console, result))


def render(console: Console, result: Inspection) -> None:
    """Draw an inspection for a person."""
    console.print(f"{result.name}: {result.architecture} ({result.model_type}), {result.blocks} blocks", markup=False)
    stored = f"{size(result.size_bytes)} in {counted(result.files, 'file')}"
    console.print(
        f"{result.parameters / 1e6:,.1f} M parameters, {stored}, {result.bits_per_parameter:.2f} bits a parameter"
    )
    kind = result.quantization + (f" ({result.format})" if result.format else "")
    if result.bits_per_weight is not None:
        kind += (
            f", {result.quantized_parameters / 1e6:,.1f} M weights at {result.bits_per_weight:.3f} bits,"
            " scales included"
        )
    console.print(f"quantisation: {kind}\n", markup=False)
    console.print(_modules(result))
    console.print()
    console.print(_parts(result))
    if result.errors:
        console.print()
        console.print(_errors(result))
    _records(console, result)
    for note in result.notes:
        console.print(f"\nnote: {note}", markup=False)


def _table(*headings: str, words: int) -> Table:
    """A plain table whose first ``words`` columns hold text and whose others hold numbers."""
    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < words else "right", no_wrap=i == 0)
    return table


def _modules(result: Inspection) -> Table:
    table = _table("modules", "stored as", "shape", "count", "bytes", "bits/weight", words=3)
    for g in result.groups:
        shape = " x ".join(map(str, g.shape))
        table.add_row(g.modules, g.scheme, shape, f"x{g.count}", size(g.bytes), f"{g.bits_per_weight:.3f}")
    return table


def _parts(result: Inspection) -> Table:
    table = _table("part", "tensors", "parameters", "bytes", "share", words=1)
    for p in result.parts:
        share = p.bytes / result.size_bytes if result.size_bytes else 0.0
        table.add_row(p.name, str(p.tensors), f"{p.parameters:,}", size(p.bytes), f"{share:.1%}")
    return table


def _errors(result: Inspection) -> Table:
    table = _table("block", "worst Linear", "its error", "mean error", words=2)
    for e in result.errors:
        table.add_row(str(e.block), e.worst, f"{e.worst_relative_error:.5f}", f"{e.mean_relative_error:.5f}")
    return table


def _records(console: Console, result: Inspection) -> None:
    """Calibration, verification and comparison, each in a line."""
    if result.rare_experts:
        named = ", ".join(result.rare_experts[:SHOWN]) + (", ..." if len(result.rare_experts) > SHOWN else "")
        console.print(
            f"\nexperts that few calibration tokens reached: {len(result.rare_experts)} ({named})", markup=False
        )
    c, s, v, d = result.calibration, result.sensitivity, result.verify, result.compare
    if c is not None:
        console.print(
            f"\ncalibration: {c.spec}, {c.samples} samples, {c.tokens} tokens, seed {c.seed}, sha256 {c.sha256[:12]}",
            markup=False,
        )
    if s is not None:
        console.print(
            f"\nmixed precision: target {s.target_bits:g} bits, {s.bits_per_weight:.3f} reached; sensitivity of "
            f"{len(s.units)} units measured on {s.sequences} sequences, {s.tokens} tokens; the most sensitive:"
        )
        for u in sorted(s.units, key=lambda u: -u.kl_nats)[:SHOWN]:
            console.print(f"  {u.kl_nats:.2e} nats  {u.scheme}  {', '.join(u.linears[:3])}", markup=False)
    if v is not None:
        failed = [check.name for check in v.checks if check.status == "failed"]
        outcome = "passed" if v.passed else f"FAILED ({', '.join(failed)})"
        console.print(f"\nverify: {outcome}, {len(v.checks)} checks over {v.tensors} tensors", markup=False)
    if d is not None:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in d.metrics.items())
        console.print(f"\ncompare with {d.base} on {d.tokens} tokens: {metrics}", markup=False)
