"""What a GGUF file or a Flax checkpoint holds, from headers alone: what ``inspect`` shows of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import TensorInfo
from halfbyte.conversion.flax_layout import canonical, layout, shape_of
from halfbyte.conversion.formats import is_gguf
from halfbyte.conversion.gguf_configs import known_family
from halfbyte.conversion.gguf_file import GgufFile, open_gguf
from halfbyte.conversion.gguf_in import dense_name, located
from halfbyte.conversion.gguf_out import VISION_NAME
from halfbyte.conversion.gguf_return import TENSORS_KEY, in_tower
from halfbyte.conversion.orbax import find_checkpoint, holds_orbax, open_orbax

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """A checkpoint that is no folder of safetensors files.

    Attributes:
        path: the file or folder; format: ``gguf`` or ``flax``.
        architecture: class of the dense model, or the format's own name of it; model_type: transformers', likewise.
        tensors: by dense name, or by the file's where halfbyte knows no dense one; ``dtype`` is the format's name of
            the type, a stack of experts is one tensor.
        quantized: names of those that hold codes.
        kind: the type that most of its weights have, where it has names for types.
        notes: what a reader ought to know.
    """

    path: Path
    format: str
    architecture: str
    model_type: str
    tensors: Mapping[str, TensorInfo]
    quantized: frozenset[str]
    kind: str | None = None
    notes: tuple[str, ...] = ()


def headers_of(source: str | Path) -> Headers | None:
    """Headers of a GGUF file, of a folder with one, or of an orbax folder; ``None`` for anything else.

    Raises:
        CheckpointError: it is truncated, unfinished, or no Gemma 3.
        MissingDependencyError: the package gguf, or tensorstore, is not installed.
    """
    if is_gguf(source):
        return _gguf(located(Path(source)))
    return _flax(Path(source)) if holds_orbax(Path(source)) else None


def _gguf(path: Path) -> Headers:
    files = [open_gguf(path)]
    if (tower := path.with_name(VISION_NAME)) != path and tower.exists():
        files.append(open_gguf(tower))
    metadata = files[0].metadata
    family = known_family(metadata)
    found = [(name, info) for file in files for name, info in _tensors(file, _noted(metadata))]
    if family is not None:
        found = [(dense_name(n, family) or n, info) for n, info in found]
    architecture = str(metadata.get("general.architecture", "unknown"))
    return Headers(
        path=path,
        format="gguf",
        architecture=architecture if family is None else family.model_class,
        model_type=architecture if family is None else family.model_types[0],
        tensors={
            n.replace("{e}", "*"): TensorInfo(
                name=n, dtype=i.dtype, shape=i.shape, file=i.file, offset=i.offset, size_bytes=i.size_bytes
            )
            for n, i in found
        },
        quantized=frozenset(n.replace("{e}", "*") for n, i in found if i.dtype not in _FLOATS),
        kind=_commonest(i for _, i in found),
        notes=() if family is not None else ("convert does not read this architecture: names are the file's own",),
    )


def _commonest(tensors: Iterable[TensorInfo]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else "empty"


def _tensors(file: GgufFile, noted: Mapping[str, str]) -> Iterator[tuple[str, TensorInfo]]:
    """A file's tensors; those of a tower by their dense names, as far as halfbyte noted them."""
    for name, tensor in file.tensors.items():
        known = noted.get(name, f"vision_tower.{name}") if in_tower(name) else name
        yield (
            known,
            TensorInfo(
                name=known,
                dtype=tensor.kind,
                shape=tensor.shape,
                file=tensor.path.name,
                offset=tensor.offset,
                size_bytes=tensor.size_bytes,
            ),
        )


def _noted(metadata: Mapping[str, Any]) -> dict[str, str]:
    """GGUF name -> dense name, of a file that halfbyte wrote."""
    try:
        listed = json.loads(metadata.get(TENSORS_KEY, "{}")).get("tensors", {})
        return {str(item["in"]): str(name) for name, item in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _flax(folder: Path) -> Headers:
    path = find_checkpoint(folder)
    arrays = canonical(open_orbax(path).arrays)
    text, tower = shape_of(arrays, str(path))
    pieces = list(layout(text, tower, text.vocab))
    shared = {p.array: sum(q.array == p.array for q in pieces) for p in pieces}
    return Headers(
        path=path,
        format="flax",
        architecture="Gemma3ForCausalLM" if tower is None else "Gemma3ForConditionalGeneration",
        model_type="gemma3_text" if tower is None else "gemma3",
        tensors={
            p.name: TensorInfo(
                name=p.name,
                dtype=arrays[p.array].dtype,
                shape=p.shape,
                file=path.name,
                offset=0,
                size_bytes=arrays[p.array].size_bytes // shared[p.array],
            )
            for p in pieces
            if p.array in arrays
        },
        quantized=frozenset(),
        notes=("whether these numbers lie on int4 grids shows when convert reads them",),
    )
