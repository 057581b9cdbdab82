"""What configs of the formats say about modules: numbers in them, and which modules they leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.architectures import EMBEDDING, NOT_LANGUAGE, NUMBERED, BlockMap, find_block_prefix, map_blocks
from halfbyte.checkpoint.reader import Checkpoint, TensorInfo
from halfbyte.conversion.source import Source
from halfbyte.errors import ArchitectureError, CheckpointError


def integer_in(config: Mapping[str, Any], where: str, *keys: str) -> int:
    """The whole number under the first of some keys that is there; without one, :class:`CheckpointError`."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1 and value != -1:
                raise CheckpointError(f"quantization_config says {key} {value}", where=where)
            return value
        if value is not None:
            raise CheckpointError(f"quantization_config says {key} {value!r}, which is no whole number", where=where)
    raise CheckpointError(
        f"quantization_config has no {' or '.join(keys)}", where=where, remedy="Restore config.json from the original."
    )


def unrounded(source: Source) -> list[str]:
    """A note where engines round inputs in the source's format, for targets that know nothing of it."""
    if not any(e.grid is not None and e.grid.activations is not None for e in source.entries.values()):
        return []
    return ["in the source's format engines round activations; in this one they are left as they are"]


def dense_blocks(source: Source) -> BlockMap:
    """Where the source's tensors would be in the dense model."""
    tensors = {
        e.name: TensorInfo(name=e.name, dtype=e.dtype, shape=e.shape, file="", offset=0, size_bytes=0)
        for e in source.entries.values()
    }
    dense = Checkpoint(path=source.path, name=source.name, config=source.config, tensors=tensors)
    try:
        return map_blocks(dense)
    except ArchitectureError:
        return BlockMap(prefix="", linears=(), others=(), outside=tuple(tensors), unsupported=())


def plain_modules(source: Source) -> list[str]:
    """Modules that are not quantised and may be Linears, as ``modules_to_not_convert`` names them.

    A component besides the language model goes by its own name, with and without the prefix ``model.``; a Linear of a
    decoder block by ``layers.3.mlp.gate``. transformers matches these from the start of a name or at its end, vLLM
    anywhere in it: the number keeps ``mlp.gate`` of one block from covering ``mlp.gate_proj`` of another.
    """
    prefix = find_block_prefix(source.entries) or ""
    found: list[str] = []
    for entry in source.entries.values():
        if entry.grid is not None or not entry.name.endswith(".weight") or len(entry.shape) < 2:
            continue
        component = next((p for p in entry.module.split(".") if NOT_LANGUAGE.search(p)), None)
        match = NUMBERED.match(entry.name)
        if match is not None and match["prefix"] == prefix:
            found.append(f"{prefix.rpartition('.')[2]}.{match['index']}.{match['rest'].removesuffix('.weight')}")
        elif component is not None:
            found += [component, f"model.{component}"]
        elif EMBEDDING.search(entry.module) is None:
            found.append(entry.module)
    if "lm_head.weight" not in source.entries or source.entries["lm_head.weight"].grid is None:
        found.append("lm_head")
    return list(dict.fromkeys(found))
