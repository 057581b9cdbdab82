"""From a calibration spec to tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from halfbyte.calibration.hub import dataset_rows
from halfbyte.calibration.random_tokens import random_ids
from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.rows import jsonl_rows
from halfbyte.calibration.self_generated import self_generated
from halfbyte.calibration.sequences import Calibration, digest_of_sequences
from halfbyte.calibration.text import text_windows
from halfbyte.calibration.tokenizing import text_config
from halfbyte.errors import UsageError
from halfbyte.progress import Reporter
from halfbyte.records import CalibrationRecord

# name -> (function, what follows the colon; None: nothing does)
SOURCES: dict[str, tuple[Callable[[Request], Found], str | None]] = {
    "self": (self_generated, None),
    "text": (text_windows, "FILE"),
    "jsonl": (jsonl_rows, "FILE"),
    "hf": (dataset_rows, "DATASET[:CONFIG][:SPLIT]"),
    "random-tokens": (random_ids, None),
}


def calibrate(
    spec: str, *, model_path: Path, samples: int, seq_len: int, seed: int, device: str, reporter: Reporter
) -> Calibration:
    """Get calibration sequences.

    Args:
        spec: ``self``, ``text:FILE``, ``jsonl:FILE``, ``hf:DATASET[:CONFIG][:SPLIT]`` or ``random-tokens``.
        model_path: local checkpoint folder.
        samples: sequences wanted; a source that holds fewer gives what it has, and the record says so.
        seq_len: most tokens in a sequence.
        seed: fixes everything random; the same seed, machine and thread count give the same tokens.
        device: torch device for ``self``, e.g. ``"cpu"`` or ``"cuda"``.
        reporter: hears how far the work is.

    Raises:
        UsageError: unknown spec, or samples or seq_len out of range.
        CalibrationError: the source is missing, malformed, empty or too short.
        CheckpointError: the checkpoint lacks a tokenizer.
    """
    source, argument = parse_spec(spec)
    _check_sizes(model_path, samples, seq_len)
    found = source(
        Request(
            argument=argument,
            model_path=model_path,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            reporter=reporter,
        )
    )
    record = CalibrationRecord(
        spec=spec,
        samples=len(found.sequences),
        tokens=sum(len(s) for s in found.sequences),
        seq_len=seq_len,
        seed=seed,
        sha256=digest_of_sequences(found.sequences),
        description=found.description,
    )
    return Calibration(record=record, sequences=found.sequences)


def parse_spec(spec: str) -> tuple[Callable[[Request], Found], str]:
    """The source's function and its argument; raises a :class:`UsageError` that lists the sources."""
    name, colon, argument = spec.partition(":")
    listed = ", ".join(n if a is None else f"{n}:{a}" for n, (_, a) in SOURCES.items())
    if name not in SOURCES:
        raise UsageError(f"unknown calibration source {spec!r}", where="--calibration", remedy=f"Use one of: {listed}.")
    function, wanted = SOURCES[name]
    if wanted is None and colon:
        raise UsageError(f"{name} takes nothing after a colon: {spec!r}", where="--calibration", remedy=f"Use {name}.")
    if wanted is not None and not argument:
        raise UsageError(f"{name} needs {wanted}", where="--calibration", remedy=f"Write it as {name}:{wanted}.")
    return function, argument


def _check_sizes(model_path: Path, samples: int, seq_len: int) -> None:
    if samples < 1:
        raise UsageError(f"must be at least 1, not {samples}", where="--samples")
    if seq_len < 2:
        raise UsageError(f"must be at least 2, not {seq_len}", where="--seq-len")
    longest = text_config(model_path).get("max_position_embeddings")
    if isinstance(longest, int) and seq_len > longest:
        raise UsageError(
            f"{seq_len} is more than the model's {longest} positions",
            where="--seq-len",
            remedy=f"Use at most {longest}.",
        )
