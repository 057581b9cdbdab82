"""A checkpoint's GGUF, made once and kept: what serving with llama.cpp starts from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import TEMPLATES_FOLDER, companion_name
from halfbyte.conversion.formats import open_source
from halfbyte.conversion.gguf_out import MODEL_NAME, VISION_NAME
from halfbyte.conversion.run import convert
from halfbyte.progress import Reporter
from halfbyte.records import CONVERT_NAME, ConvertRecord, read_record

# How names of files begin that say how a model is talked to.
DESCRIBING = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    TEMPLATES_FOLDER,
    "generation_config",
    "preprocessor_config",
    "processor_config",
)


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

    The folder is :func:`folder_for` the checkpoint and the options. A conversion that was killed goes on.

    Args:
        source: a checkpoint folder, in any format that ``convert`` reads.
        cache: folder for GGUFs, made if need be; beside the checkpoint, say.
        dtype: of what is not quantised: "bfloat16", "float16", "float32"; ``None`` keeps it.
        allow_requantize: round what blocks cannot hold exactly.
        reporter: for progress.

    Raises:
        What ``convert`` raises: UsageError where something cannot be held exactly, or at all, before any work.
    """
    source = Path(source).resolve()  # one run, however it is spelled
    folder = folder_for(source, cache, "gguf", dtype, allow_requantize)
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


def folder_for(source: Path, cache: Path, *options: Any) -> Path:
    """Where ``cache`` keeps a checkpoint that was converted with ``options``.

    The name has a hash of the source's fingerprint (headers, sizes, times of its weights), of the files that describe
    its tokenizer, chat template, generation and pictures, of the options and of halfbyte's version, so that a changed
    checkpoint is converted anew and no two share a folder. Records and licences may change.
    """
    opened = open_source(source, "auto")
    named = {companion_name(f): f.stat() for f in opened.companions}
    told = [(n, stat) for n, stat in named.items() if n.startswith(DESCRIBING)]
    beside = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in told)
    key = json.dumps([opened.fingerprint(), beside, options, version("halfbyte")])
    return cache / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
