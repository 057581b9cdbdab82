"""What is deployed: the facts of a checkpoint that a deployment depends on. Reads headers and JSON files only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.source import open_headers
from halfbyte.conversion.formats import is_gguf
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.inspection import inspect_checkpoint

# A Kubernetes name has 63 characters at most, and KServe adds "-predictor-00001-private" to it.
NAME_LENGTH = 39
NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint to be deployed.

    Attributes:
        source: what the user called it, a folder, file or hub id.
        folder: where its files are; ``None`` for a hub id.
        format: ``dense``, ``compressed-tensors``, ``awq``, ``gptq``, ``gguf``, ... by its config.
        gguf: name of the GGUF file in the folder, where it is one; parts: of all files that it is split into.
        architecture: class name of the model.
        parameters: logical ones; weights_bytes: of all weight files; largest_file_bytes: of the largest.
        config: of the language model, as ``config.json`` has it.
        notes: what was found odd.
    """

    source: str
    folder: Path | None
    format: str
    gguf: str | None
    parts: tuple[str, ...] = ()
    architecture: str
    parameters: int
    weights_bytes: int
    largest_file_bytes: int
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def context(self) -> int | None:
        """Tokens that the model has been made for, where the config says."""
        found = self.config.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else None


def open_subject(source: str | Path) -> Subject:
    """Look at a folder, a GGUF file or a hub id.

    Raises:
        CheckpointError: it is missing, broken, or not loadable by any engine.
    """
    if re.search(r"[\x00-\x1f\x7f]", str(source)):
        raise CheckpointError("its name has control characters", where=repr(str(source)), remedy="Rename it.")
    if is_gguf(source):
        return _open_gguf(Path(source))
    checkpoint = open_headers(source)
    found = inspect_checkpoint(checkpoint)
    if found.quantization == "unknown":
        raise CheckpointError(
            "its weights are quantised, but config.json has no quantization_config",
            where=str(source),
            why="no engine can load that",
            remedy="Quantise the model again, or give the folder that the quantiser wrote.",
        )
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.file] = sizes.get(info.file, 0) + info.size_bytes
    local = Path(source).is_dir()
    return Subject(
        source=str(source),
        folder=Path(source).resolve() if local else None,
        format="dense" if found.quantization == "none" else found.quantization,
        gguf=None,
        architecture=found.architecture,
        parameters=found.parameters,
        weights_bytes=found.size_bytes,
        largest_file_bytes=max(sizes.values(), default=0),
        config=checkpoint.text_config,
        notes=tuple(found.notes),
    )


def _open_gguf(path: Path) -> Subject:
    from halfbyte.conversion.gguf_in import open_gguf_source

    opened = open_gguf_source(path)
    files = {t.path for t in opened.file.tensors.values()}
    config = opened.config.get("text_config", opened.config)
    names = opened.config.get("architectures") or ["unknown"]
    return Subject(
        source=str(path),
        folder=opened.path.resolve().parent,
        format="gguf",
        gguf=opened.path.name,
        parts=tuple(sorted(f.name for f in files)),
        architecture=str(names[0]),
        parameters=sum(_product(e.shape) for e in opened.entries.values()),
        weights_bytes=sum(f.stat().st_size for f in files),
        largest_file_bytes=max(f.stat().st_size for f in files),
        config=config,
        notes=tuple(opened.notes),
    )


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def name_for(source: str, wanted: str | None) -> str:
    """The name under which a model is deployed and called: lower-case letters, digits and hyphens.

    ``Llama-3.3-70B-Instruct-quantized.w8a8`` becomes ``llama-3-3-70b-instruct-quantized-w8a8``; what is too long is cut
    at a hyphen.

    Raises:
        UsageError: ``wanted`` is no such name, or none can be made.
    """
    if wanted is not None:
        if NAME.fullmatch(wanted) is None or len(wanted) > NAME_LENGTH:
            raise UsageError(
                f"{wanted!r} is no name that every target takes",
                where="--name",
                remedy=f"Use at most {NAME_LENGTH} lower-case letters, digits and hyphens, no hyphen at either end.",
            )
        return wanted
    last = re.sub(r"\.gguf$", "", source.rstrip("/").rpartition("/")[2])
    if last in ("", ".", "..", "model"):
        last = Path(source).resolve().parent.name if last == "model" else Path(source).resolve().name
    name = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    if len(name) > NAME_LENGTH:
        name = name[: NAME_LENGTH + 1].rpartition("-")[0] or name[:NAME_LENGTH]
    if not name:
        raise UsageError(f"no name can be made of {source}", where="--name", remedy="Give one.")
    return name
