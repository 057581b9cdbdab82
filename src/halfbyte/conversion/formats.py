"""The formats that ``convert`` reads and writes: a table of names, and how a source's format is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoint.reader import Checkpoint, open_checkpoint
from halfbyte.checkpoint.source import resolve
from halfbyte.conversion.compressed_tensors import CompressedTensorsDecoder, CompressedTensorsEncoder
from halfbyte.conversion.dense import DTYPES, DenseTarget
from halfbyte.conversion.flax_qat import open_flax
from halfbyte.conversion.folder_source import open_folder
from halfbyte.conversion.folder_target import FolderTarget
from halfbyte.conversion.orbax import holds_orbax
from halfbyte.conversion.source import Source
from halfbyte.conversion.target import Target
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.inspection_formats import quantization_config

SOURCES = ("auto", "compressed-tensors", "dense", "flax")
TARGETS = ("compressed-tensors", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a source's own files may not say.

    Attributes:
        dtype: of tensors that are not quantised, for sources without a dtype of their own.
        config: a ``config.json`` or its folder.
        tokenizer: a folder, or a tokenizer's file.
    """

    dtype: str | None = None
    config: Path | None = None
    tokenizer: Path | None = None


def open_source(source: str | Path, source_format: str, beside: Beside | None = None) -> Source:
    """Open a checkpoint of the format given, or of the one that it is found to have.

    Raises:
        UsageError: the format is unknown, or the checkpoint has another.
        CheckpointError: it is broken, or its format is not read.
    """
    if source_format not in SOURCES:
        raise UsageError(
            f"unknown format {source_format!r}", where="--from", remedy=f"Use one of {', '.join(SOURCES)}."
        )
    beside = beside or Beside()
    if source_format == "flax" or (source_format == "auto" and holds_orbax(Path(source))):
        return open_flax(source, dtype=beside.dtype, config=beside.config, tokenizer=beside.tokenizer)
    for option, value in (("--config", beside.config), ("--tokenizer", beside.tokenizer)):
        if value is not None:
            raise UsageError("is for checkpoints that come without one", where=option, remedy="Leave it out.")
    checkpoint = open_checkpoint(resolve(source), str(source))
    found = _folder_format(checkpoint)
    if source_format not in ("auto", found):
        raise UsageError(
            f"the checkpoint's format is {found}", where=f"--from {source_format}", remedy="Leave --from out."
        )
    return _FOLDERS[found](checkpoint)


def target_of(to: str, dtype: str | None) -> Target:
    """The target of a name; ``dtype`` belongs to dense ones."""
    if to not in TARGETS:
        raise UsageError(f"unknown format {to!r}", where="--to", remedy=f"Use one of {', '.join(TARGETS)}.")
    if dtype is not None and (to != "dense" or dtype not in DTYPES):
        raise UsageError(
            f"{dtype} is no dtype of a {to} checkpoint",
            where="--dtype",
            remedy=f"Use {', '.join(DTYPES)}, with --to dense.",
        )
    if to == "dense":
        return DenseTarget(DTYPES[dtype] if dtype else None)
    return FolderTarget(CompressedTensorsEncoder())


def _folder_format(checkpoint: Checkpoint) -> str:
    method = str(quantization_config(checkpoint).get("quant_method", "dense"))
    if method not in _FOLDERS:
        raise CheckpointError(
            f"its weights are in {method} format, which cannot be read",
            where=checkpoint.name,
            remedy=f"Formats that can are {', '.join(SOURCES[1:])}.",
        )
    return method


def _compressed_tensors(checkpoint: Checkpoint) -> Source:
    config = quantization_config(checkpoint)
    return open_folder(checkpoint, CompressedTensorsDecoder(config), config)


# quant_method of config.json -> how to open it
_FOLDERS: dict[str, Callable[[Checkpoint], Source]] = {
    "compressed-tensors": _compressed_tensors,
    "dense": lambda checkpoint: open_folder(checkpoint, None, {}),
}
