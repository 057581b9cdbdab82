"""The files of a finished checkpoint besides its weights: config, tokenizer and friends, manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.layout import copy_companions, write_error
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.mixing import groups_of
from halfbyte.planner import WorkPlan
from halfbyte.recipe import Recipe
from halfbyte.records import (
    MANIFEST_NAME,
    CalibrationRecord,
    EndToEndRecord,
    LinearRecord,
    Manifest,
    PairRecord,
    Sensitivity,
    SmoothingRecord,
    TuningRecord,
    write_json,
)
from halfbyte.schemes import quantization_config


def write_config(folder: Path, checkpoint: Checkpoint, work: WorkPlan, recipe: Recipe) -> None:
    """Write ``config.json`` with its ``quantization_config``, which says how the weights are to be read."""
    config = dict(checkpoint.config)
    # Several groups are spelt so that every loader reads them alike: where vLLM has fused Linears into one, it
    # prefers the target Linear to the names of the parts.
    groups = recipe.groups if len(recipe.groups) == 1 else groups_of(work.blocks, work.schemes)
    targets = [(g.scheme, list(g.targets)) for g in groups]
    config["quantization_config"] = quantization_config(targets, work.ignore_patterns)
    try:
        write_json(folder / "config.json", config)
    except OSError as e:
        raise write_error(e, folder, 0) from None


def finish_checkpoint(
    *,
    folder: Path,
    checkpoint: Checkpoint,
    work: WorkPlan,
    recipe: Recipe,
    options: dict[str, Any],
    calibration: CalibrationRecord | None,
    linears: list[LinearRecord],
    smoothing: list[SmoothingRecord],
    pairs: list[PairRecord],
    tuning: list[TuningRecord],
    sensitivity: Sensitivity | None,
    end_to_end: EndToEndRecord | None,
    source_sha256: str,
    companions: list[Path],
    run: dict[str, Any],
) -> Manifest:
    """Copy companion files and write ``config.json`` and the manifest."""
    try:
        copy_companions(companions, folder)
        write_config(folder, checkpoint, work, recipe)
        manifest = Manifest(
            format_version=1,
            source={
                "name": checkpoint.name,
                "origin": "folder" if checkpoint.path == Path(checkpoint.name) else "hub",
                "architecture": checkpoint.architecture,
                "sha256": source_sha256,
            },
            recipe={k: v for k, v in options.items() if k not in ("source", "threads", "versions", "device")},
            calibration=calibration,
            linears=linears,
            bits_per_weight=work.plan.bits_per_weight,
            bytes_before=work.plan.bytes_before,
            bytes_after=work.plan.bytes_after,
            files={f.name: file_sha256(f) for f in sorted(folder.glob("*.safetensors"))},
            versions=options["versions"],
            smoothing=smoothing,
            pairs=pairs,
            tuning=tuning,
            rare_experts=list(dict.fromkeys(r.name.rpartition(".")[0] for r in linears if r.rare)),
            sensitivity=sensitivity,
            end_to_end=end_to_end,
            run={**run, "threads": options["threads"]},
        )
        write_json(folder / MANIFEST_NAME, manifest)
    except OSError as e:
        raise write_error(e, folder, work.plan.bytes_after) from None
    return manifest


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
