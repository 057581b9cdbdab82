"""``halfbyte plan``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli.console import duration, emit, json_option, size
from halfbyte.cli.options import calibration_options, scheme_options
from halfbyte.errors import HalfbyteError, counted
from halfbyte.records import Plan


class PlanProblems(HalfbyteError):
    """A plan was printed, and what it lists would stop the run."""

    result_printed = True


@click.command("plan")
@click.argument("source")
@scheme_options
@calibration_options
@click.option("--tensors", "every_tensor", is_flag=True, help="List every tensor, not only groups of them.")
@json_option
def command(
    source: str,
    scheme: str,
    group_size: int | Literal["channel"] | None,
    method: Literal["gptq", "rtn"] | None,
    ignore: tuple[str, ...],
    recipe: Path | None,
    effort: Literal["low", "standard", "high"] | None,
    target_bits: float | None,
    all_experts: bool | None,
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    offload: bool | None,
    dtype: Literal["auto", "float32", "bfloat16"],
    every_tensor: bool,
    as_json: bool,
) -> None:
    """Say what quantising SOURCE (a folder or a hub id) would do, without doing it.

    Reads headers only. Exit status 2 when something would stop the run; all of it is listed at once.
    """
    from halfbyte.planner import plan

    result = plan(
        source,
        scheme=scheme,
        group_size=group_size,
        method=method,
        ignore=ignore,
        recipe=recipe,
        effort=effort,
        target_bits=target_bits,
        all_experts=all_experts,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        offload=offload,
        dtype=dtype,
    )
    emit(result, as_json=as_json, render=lambda console: render(console, result, every_tensor=every_tensor))
    if result.problems:
        count = len(result.problems)
        raise PlanProblems(f"{counted(count, 'problem')} would stop this run", where=source)


def render(console: Console, plan: Plan, *, every_tensor: bool = False) -> None:
    """Draw a plan for a person."""
    console.print(f"{plan.source}: {plan.architecture}, {plan.num_blocks} blocks at {plan.block_prefix or '(none)'}")
    table = Table(box=None, pad_edge=False)
    for heading in ("tensors", "count", "shape", "action", "before", "after", "bits/weight"):
        words = heading in ("tensors", "shape", "action")
        table.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=heading == "tensors")
    rows: dict[tuple[str, str, str], list[float]] = {}
    for t in plan.tensors:
        name = t.name
        if not every_tensor and t.block is not None:
            name = name.replace(f"{plan.block_prefix}.{t.block}.", f"{plan.block_prefix}.*.", 1)
            name = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        label = f"{t.scheme} g{t.group_size}" if t.group_size else f"{t.scheme}"
        action = label if t.action == "quantize" else f"copy ({t.reason})"
        row = rows.setdefault((name, " x ".join(map(str, t.shape)), action), [0, 0, 0, t.bits_per_weight or 0.0])
        row[0] += 1
        row[1] += t.bytes_before
        row[2] += t.bytes_after
    for (name, shape, action), (count, before, after, bits) in rows.items():
        table.add_row(name, f"{count:.0f}", shape, action, size(before), size(after), f"{bits:.3f}" if bits else "")
    console.print(table)
    if plan.quantized_parameters:
        at_most = "at most " if plan.mixed else ""
        console.print(
            f"\n{plan.quantized_parameters / 1e6:,.1f} M weights quantised by {plan.method} to {plan.scheme}: "
            f"{at_most}{plan.bits_per_weight:.3f} bits each, scales included; "
            f"{plan.copied_parameters / 1e6:,.1f} M parameters copied; "
            f"{plan.bits_per_parameter:.2f} bits a parameter over all"
        )
        console.print(f"on disk {size(plan.bytes_before)} -> {at_most}{size(plan.bytes_after)}")
    if plan.mixed:
        m = plan.mixed
        console.print(
            f"mixed precision: target {m.target_bits:g} bits, between {m.lowest_bits:.3f} (as in the table) and "
            f"{m.highest_bits:.3f} (all in {m.wider}) can be reached; {m.units} units, measured on {m.sequences} "
            f"sequences, {m.tokens} tokens"
        )
    for name, estimate in plan.estimates.items():
        show = duration if estimate.unit == "seconds" else size
        console.print(f"\nestimated {name.replace('_', ' ')}: {show(estimate.value)} ({estimate.how})")
        for part, value in estimate.parts.items():
            console.print(f"  {show(value):>12}  {part}")
    for note in plan.notes:
        console.print(f"\nnote: {note}", markup=False)
    for problem in plan.problems:
        console.print(f"\nproblem: {problem}", markup=False)
