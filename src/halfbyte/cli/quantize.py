"""``halfbyte quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from halfbyte.cli.console import duration, emit, json_option, reporter, size
from halfbyte.cli.options import calibration_options, device_option, scheme_options
from halfbyte.recipe import WIDER
from halfbyte.records import EndToEndRecord, Manifest, TuningRecord


@click.command("quantize")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@scheme_options
@calibration_options
@device_option
@click.option("--resume", is_flag=True, help="Continue the unfinished run in OUT.partial.")
@click.option("--seed", type=click.IntRange(min=0), help="For calibration that is drawn at random.  [default: 0]")
@json_option
def command(
    source: str,
    out: Path,
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
    device: str,
    offload: bool | None,
    dtype: Literal["auto", "float32", "bfloat16"],
    resume: bool,
    seed: int | None,
    as_json: bool,
) -> None:
    """Write a few-bit copy of the checkpoint SOURCE (a folder or a hub id) to the new folder OUT.

    Weights are read, quantised and written one decoder block at a time. A killed run leaves OUT.partial, from which
    --resume continues to the same bytes.

    Started by torchrun (torchrun --nproc-per-node N -m halfbyte quantize ...), N processes share the work.
    """
    from halfbyte.pipeline import quantize
    from halfbyte.progress import Silent
    from halfbyte.ranks import joined

    with joined(device) as ranks:
        manifest = quantize(
            source,
            out,
            scheme=scheme,
            group_size=group_size,
            method=method,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            ignore=ignore,
            recipe=recipe,
            effort=effort,
            target_bits=target_bits,
            all_experts=all_experts,
            device=device,
            offload=offload,
            dtype=dtype,
            resume=resume,
            seed=seed,
            reporter=reporter() if ranks.first else Silent(),
            ranks=ranks,
        )
    if ranks.first:
        emit(manifest, as_json=as_json, render=lambda console: render(console, manifest, out))


def render(console: Console, manifest: Manifest, out: Path) -> None:
    """What was written, how well, and what to do next."""
    worst = max(manifest.linears, key=lambda r: r.relative_error)
    console.print(
        f"wrote {out}: {size(manifest.bytes_before)} -> {size(manifest.bytes_after)}, "
        f"{manifest.bits_per_weight:.3f} bits a weight in {len(manifest.linears)} Linears; "
        f"largest relative error {worst.relative_error:.2e} at {worst.name}; "
        f"{duration(manifest.run['seconds'])}, peak memory {manifest.run['peak_bytes'] / 2**30:.2f} GiB"
    )
    if manifest.tuning:
        console.print(_tuning(manifest.tuning))
    if manifest.end_to_end is not None:
        console.print(_end_to_end(manifest.end_to_end))
    if manifest.rare_experts:
        of = len({r.name.rpartition(".")[0] for r in manifest.linears if ".experts." in r.name})
        console.print(
            f"{len(manifest.rare_experts)} of {of} experts saw few calibration tokens (rare_experts in halfbyte.json "
            "names them); more --samples reach more of them"
        )
    if manifest.sensitivity is not None:
        found = manifest.sensitivity
        wide = sum(u.scheme == WIDER for u in found.units)
        console.print(
            f"mixed precision: target {found.target_bits:g} bits; {wide} of {len(found.units)} units got {WIDER}"
        )
    console.print(f"next: halfbyte verify {out} --source {manifest.source['name']}")


def _tuning(blocks: list[TuningRecord]) -> str:
    """How many blocks gained, and by how much on average, where a block that stayed as it was counts as 1."""
    ratios = [b.loss_after / b.loss_before if b.kept else 1.0 for b in blocks]
    return (
        f"block tuning: {sum(b.kept for b in blocks)} of {len(blocks)} blocks kept their tuned scales; output error on "
        f"samples that were not tuned on is {sum(ratios) / len(ratios):.3f} of what it was, on average"
    )


def _end_to_end(found: EndToEndRecord) -> str:
    verdict = "kept" if found.kept else "not kept"
    return (
        f"all scales together: divergence on samples that were not tuned on {found.kl_before:.5f} nats, "
        f"{found.kl_after:.5f} after {found.steps} steps; {verdict}"
    )
