"""From a calibration spec to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.calibration.hub import dataset_rows
from halfbyte.calibration.mixture import mixed, parts_of
from halfbyte.calibration.pictured import Processing
from halfbyte.calibration.processing import picture_problems
from halfbyte.calibration.random_tokens import random_ids
from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.rows import jsonl_rows
from halfbyte.calibration.self_generated import self_generated
from halfbyte.calibration.sequences import Calibration, digest_of_sequences
from halfbyte.calibration.text import text_windows
from halfbyte.calibration.tokenizing import text_config
from halfbyte.calibration.vision import pictured_rows
from halfbyte.errors import CalibrationError, HalfbyteError, UsageError, raise_all
from halfbyte.progress import Reporter
from halfbyte.records import CalibrationRecord, read_json

# name -> (function, what follows the colon; None: nothing does)
SOURCES: dict[str, tuple[Callable[[Request], Found], str | None]] = {
    "self": (self_generated, None),
    "text": (text_windows, "FILE"),
    "jsonl": (jsonl_rows, "FILE"),
    "hf": (dataset_rows, "DATASET[:CONFIG][:SPLIT]"),
    "vlm": (pictured_rows, "FOLDER_OR_JSONL"),
    "random-tokens": (random_ids, None),
}

OF_FILES = ("text", "jsonl", "vlm")


def calibrate(
    spec: str, *, model_path: Path, samples: int, seq_len: int, seed: int, device: str, reporter: Reporter
) -> Calibration:
    """Get calibration sequences.

    Args:
        spec: ``self``, ``text:FILE``, ``jsonl:FILE``, ``vlm:FOLDER_OR_JSONL``, ``hf:DATASET[:CONFIG][:SPLIT]``,
            ``random-tokens``, or several of them with weights, ``SPEC*0.5+SPEC*0.5``.
        model_path: local checkpoint folder.
        samples: sequences wanted; a source that holds fewer gives what it has, and the record says so.
        seq_len: most tokens in a sequence.
        seed: fixes everything random; the same seed, machine and thread count give the same tokens.
        device: torch device for ``self``, e.g. ``"cpu"`` or ``"cuda"``.
        reporter: hears how far the work is.

    Raises:
        UsageError: unknown spec, or samples or seq_len out of range.
        CalibrationError: the source is missing, malformed, empty or too short, or has pictures for a text model.
        CheckpointError: the checkpoint lacks a tokenizer, or a processor where there are pictures.
        MissingDependencyError: pictures or data sets need a package that is not installed.
    """
    parts = parse_spec(spec)
    _check_sizes(model_path, samples, seq_len)
    raise_all(calibration_problems(spec, model_path, read_json(model_path / "config.json")))
    request = Request(
        argument=parts[0].argument,
        model_path=model_path,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        reporter=reporter,
    )
    if len(parts) == 1:
        found = parts[0].function(request)
    else:
        found = mixed([(p.function, p.argument, p.share) for p in parts], request)
    record = CalibrationRecord(
        spec=spec,
        samples=len(found.sequences),
        tokens=sum(len(s) for s in found.sequences),
        seq_len=seq_len,
        seed=seed,
        sha256=digest_of_sequences(found.sequences, found.pictured),
        description=found.description,
        image_samples=len(found.pictured),
        images=sum(len(s.pictures) for s in found.pictured.values()),
    )
    return Calibration(
        record=record,
        sequences=found.sequences,
        pictured=found.pictured,
        processing=Processing(model_path) if found.pictured else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source that was asked for: its function, its argument, and its share of the samples in a mixture."""

    name: str
    function: Callable[[Request], Found]
    argument: str
    share: float


def parse_spec(spec: str) -> list[Source]:
    """The sources of a spec, one unless it is a mixture; raises a :class:`UsageError` that lists what there is."""
    return [_source(part.spec, part.share) for part in parts_of(spec, SOURCES)]


def calibration_problems(spec: str, model_path: Path, config: Mapping[str, Any]) -> list[HalfbyteError]:
    """Why a checkpoint cannot be calibrated so, as far as that shows without reading any data.

    Args:
        spec: a valid one.
        model_path: folder of the checkpoint's JSON and tokenizer files.
        config: its ``config.json``.
    """
    return picture_problems(model_path, config, spec) if any(s.name == "vlm" for s in parse_spec(spec)) else []


def absent_sources(spec: str) -> list[HalfbyteError]:
    """The files and folders of a spec that are not there."""
    return [
        CalibrationError("there is no such file or folder", where=f"--calibration {s.name}:{s.argument}")
        for s in parse_spec(spec)
        if s.name in OF_FILES and not Path(s.argument).exists()
    ]


def writes_itself(spec: str) -> bool:
    """Whether the model writes some of this calibration set, for which it has to fit in memory."""
    return any(s.name == "self" for s in parse_spec(spec))


def may_have_pictures(spec: str) -> bool:
    """Whether some samples of this calibration set may have pictures, as far as the spec tells."""
    return any(s.name in ("vlm", "hf") for s in parse_spec(spec))


def _source(spec: str, share: float) -> Source:
    name, colon, argument = spec.partition(":")
    listed = ", ".join(n if a is None else f"{n}:{a}" for n, (_, a) in SOURCES.items())
    if name not in SOURCES:
        raise UsageError(
            f"unknown calibration source {spec!r}",
            where="--calibration",
            remedy=f"Use one of: {listed}; or several with weights, SPEC*0.5+SPEC*0.5.",
        )
    function, wanted = SOURCES[name]
    if wanted is None and colon:
        raise UsageError(f"{name} takes nothing after a colon: {spec!r}", where="--calibration", remedy=f"Use {name}.")
    if wanted is not None and not argument:
        raise UsageError(f"{name} needs {wanted}", where="--calibration", remedy=f"Write it as {name}:{wanted}.")
    return Source(name=name, function=function, argument=argument, share=share)


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
