"""A checkpoint's GGUF, made once and kept: what serving with llama.cpp starts from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from halfbyte.conversion.formats import open_source
from halfbyte.conversion.gguf_out import MODEL_NAME, VISION_NAME
from halfbyte.conversion.run import convert
from halfbyte.progress import Reporter
from halfbyte.records import CONVERT_NAME, ConvertRecord, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A folder that ``convert --to gguf`` wrote.

    Attributes:
        folder: it.
        model: the language model.
        mmproj: vision tower and projector, ``None`` where there is none.
        record: of the conversion; its notes are for users.
    """

    folder: Path
    model: Path
    mmproj: Path | None
    record: ConvertRecord


def to_gguf(
    source: str | Path,
    cache: Path,
    *,
    dtype: str | None = None,
    allow_requantize: bool = False,
    reporter: Reporter | None = None,
) -> GgufModel:
    """The GGUF of a checkpoint: from ``cache`` if it is there, else converted into it.

    The folder's name has a hash of the source's fingerprint (headers, sizes, times of its files), of the options and of
    halfbyte's version, so that a changed checkpoint is converted anew. A conversion that was killed goes on.

    Args:
        source: a checkpoint folder, in any format that ``convert`` reads.
        cache: folder for GGUFs, made if need be; beside the checkpoint, say.
        dtype: of what is not quantised: "bfloat16", "float16", "float32"; ``None`` keeps it.
        allow_requantize: round what blocks cannot hold exactly.
        reporter: for progress.

    Raises:
        What ``convert`` raises: UsageError where something cannot be held exactly, or at all, before any work.
    """
    fingerprint = open_source(source, "auto").fingerprint()
    key = json.dumps([fingerprint, dtype, allow_requantize, version("halfbyte")])
    name = Path(source).resolve().name
    folder = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(folder.name + ".partial").exists()
        convert(
            source,
            folder,
            to="gguf",
            dtype=dtype,
            allow_requantize=allow_requantize,
            resume=unfinished,
            reporter=reporter,
        )
    mmproj = folder / VISION_NAME
    return GgufModel(
        folder=folder,
        model=folder / MODEL_NAME,
        mmproj=mmproj if mmproj.exists() else None,
        record=read_record(ConvertRecord, folder / CONVERT_NAME),
    )
