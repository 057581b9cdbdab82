"""The formats that ``convert`` reads and writes: a table of names, and how a source's format is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import Checkpoint, open_checkpoint
from halfbyte.checkpoint.source import resolve
from halfbyte.conversion.awq import AwqDecoder, AwqEncoder
from halfbyte.conversion.compressed_tensors import CompressedTensorsDecoder, CompressedTensorsEncoder
from halfbyte.conversion.dense import DTYPES, DenseTarget
from halfbyte.conversion.flax_qat import open_flax
from halfbyte.conversion.folder_source import Decoder, open_folder
from halfbyte.conversion.folder_target import Encoder, FolderTarget
from halfbyte.conversion.gptq import GptqDecoder, GptqEncoder, spare_biases
from halfbyte.conversion.orbax import holds_orbax
from halfbyte.conversion.source import Source
from halfbyte.conversion.target import Target
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.inspection_formats import quantization_config
from halfbyte.records import read_json

SOURCES = ("auto", "compressed-tensors", "awq", "gptq", "gptq-v2", "gguf", "dense", "flax")
TARGETS = ("compressed-tensors", "awq", "gptq", "gptq-v2", "gguf", "dense")
# How older tools call a quantization_config that is a file of its own, and its quant_method.
LOOSE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a source's own files may not say.

    Attributes:
        dtype: what tensors that are not quantised become, for sources without a dtype of their own (Flax, GGUF).
        config: a ``config.json`` or its folder.
        tokenizer: a folder, or a tokenizer's file.
        near: whether numbers may be beside the grid that they stand for, by a few last places.
    """

    dtype: str | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    near: bool = False


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
        return open_flax(source, dtype=beside.dtype, config=beside.config, tokenizer=beside.tokenizer, near=beside.near)
    for option, value in (("--config", beside.config), ("--tokenizer", beside.tokenizer)):
        if value is not None:
            raise UsageError("is for checkpoints that come without one", where=option, remedy="Leave it out.")
    if is_gguf(source, asked=source_format == "gguf"):
        if source_format not in ("auto", "gguf"):
            raise _other_format("gguf", source_format)
        from halfbyte.conversion.gguf_in import open_gguf_source

        return open_gguf_source(Path(source), dtype=DTYPES.get(beside.dtype or ""))
    checkpoint = open_checkpoint(resolve(source), str(source))
    opened = _open_folder(checkpoint)
    if source_format not in ("auto", opened.format):
        raise _other_format(opened.format, source_format)
    return opened


def _other_format(found: str, source_format: str) -> UsageError:
    return UsageError(
        f"the checkpoint's format is {found}", where=f"--from {source_format}", remedy="Leave --from out."
    )


def is_gguf(source: str | Path, *, asked: bool = False) -> bool:
    """Whether a path is a GGUF file, or a folder that holds one and, unless it is ``asked`` for, no safetensors."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.gguf")) and (asked or not any(path.glob("*.safetensors")))
    return path.is_file() and path.suffix == ".gguf"


def target_of(to: str, dtype: str | None) -> Target:
    """The target of a name; ``dtype`` belongs to dense ones."""
    if to not in TARGETS:
        raise UsageError(f"unknown format {to!r}", where="--to", remedy=f"Use one of {', '.join(TARGETS)}.")
    if dtype is not None and (to not in ("dense", "gguf") or dtype not in DTYPES):
        raise UsageError(
            f"{dtype} cannot be chosen with --to {to}",
            where="--dtype",
            remedy=f"Use {', '.join(DTYPES)}, with --to dense, or with --to gguf for what is not quantised.",
        )
    if to == "dense":
        return DenseTarget(DTYPES[dtype] if dtype else None)
    if to == "gguf":
        from halfbyte.conversion.gguf_out import GgufTarget

        return GgufTarget(DTYPES[dtype] if dtype else None)
    return FolderTarget(_ENCODERS[to])


def _open_folder(checkpoint: Checkpoint) -> Source:
    config = _quantization(checkpoint)
    method = str(config.get("quant_method", "dense"))
    decoder: Decoder | None
    if method in ("auto-round", "intel/auto-round"):
        method, config = _auto_round(config, checkpoint.name)
    if method == "dense":
        decoder = None
    elif method == "compressed-tensors":
        decoder = CompressedTensorsDecoder(config)
    elif method == "awq":
        decoder = AwqDecoder.of(config, checkpoint.name)
    elif method == "gptq":
        decoder = GptqDecoder.of(config, checkpoint.name)
    else:
        raise CheckpointError(
            f"its weights are in {method} format, which cannot be read",
            where=checkpoint.name,
            remedy=f"Formats that can are {', '.join(SOURCES[1:])}.",
        )
    spare = spare_biases(checkpoint) if isinstance(decoder, GptqDecoder) else frozenset()
    source = open_folder(checkpoint, decoder, config, spare)
    if isinstance(decoder, (AwqDecoder, GptqDecoder)) and not source.modules:
        raise CheckpointError(
            f"its config says {method}, but no tensor is a qweight",
            where=checkpoint.name,
            why="older layouts of the same name, such as marlin's, are not read",
            remedy="Convert the checkpoint that it was repacked from.",
        )
    if isinstance(decoder, AwqDecoder) and all(decoder.is_symmetric(m) for m in source.modules.values()):
        source = open_folder(checkpoint, replace(decoder, symmetric=True), config)
    return source


def _quantization(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The quantisation config, in config.json or beside it."""
    found = quantization_config(checkpoint)
    for name, method in LOOSE_CONFIGS.items():
        if not found and (checkpoint.path / name).exists():
            loose = read_json(checkpoint.path / name)
            if not isinstance(loose, dict):
                raise CheckpointError("holds no JSON object", where=str(checkpoint.path / name))
            found = {"quant_method": method} | loose
    return found


def _auto_round(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """Which of the other layouts AutoRound's own is: it names one in ``packing_format``, in older versions beside the
    kernel in ``backend`` (``auto_round:gptq:exllamav2``; one without a layout is its own)."""
    packing = str(config.get("packing_format") or _packing_of(str(config.get("backend") or "auto_round")))
    if packing not in _PACKINGS:
        raise CheckpointError(
            f"AutoRound's packing_format {packing} is not read",
            where=where,
            remedy="Export it as auto_gptq, auto_awq or llm_compressor.",
        )
    method, version = _PACKINGS[packing]
    return method, {k: v for k, v in config.items() if k not in ("format", "version")} | {"checkpoint_format": version}


def _packing_of(backend: str) -> str:
    named = next((f"auto_round:auto_{name}" for name in ("gptq", "awq") if name in backend), None)
    own = re.match("auto[_-]?round(:|$)", backend)
    return named or ("auto_round" if own else backend)


_PACKINGS = {
    "auto_round:auto_gptq": ("gptq", "gptq"),
    "auto_round": ("gptq", "gptq_v2"),
    "auto_round:gptqmodel": ("gptq", "gptq_v2"),
    "auto_round:auto_awq": ("awq", ""),
}
_ENCODERS: dict[str, Encoder] = {
    "compressed-tensors": CompressedTensorsEncoder(),
    "awq": AwqEncoder(),
    "gptq": GptqEncoder("gptq"),
    "gptq-v2": GptqEncoder("gptq_v2"),
}
