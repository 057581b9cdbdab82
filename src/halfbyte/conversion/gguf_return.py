"""What a GGUF's metadata keep for the way back, where GGUF itself has no place for it.

``halfbyte.tensors`` lists the tensors that the file was made from, in their order: dense name, where it lies, dtype,
number format, and those elements of norms that do not survive llama.cpp's ``1 + w`` in float32 and back. With it the
way there and back ends in the same bytes. Other tools leave it alone, llama-quantize too: a format counts only while
the tensor still has the type that it was written in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from halfbyte.conversion.coded import Grid
from halfbyte.conversion.gguf_families import text_name
from halfbyte.conversion.gguf_file import GgufTensor
from halfbyte.errors import CheckpointError
from halfbyte.schemes import ActivationFormat, WeightFormat

TENSORS_KEY = "halfbyte.tensors"
BREAK_EMBEDDING = "v.token_embd.img_break"
# Tensors of a file that stand for none of the source.
MADE = frozenset({"rope_freqs.weight", BREAK_EMBEDDING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """One tensor that a file was made from.

    Attributes:
        name: its dense name; tensor: of what it lies in; expert: as which part, of a stack.
        dtype: safetensors dtype, of a quantised one what it would be if it were dense.
        kind, grid: ggml's type and the number format of a quantised one.
        exact: ``(index, value)`` of elements that reading gives otherwise.
    """

    name: str
    tensor: str
    dtype: str
    expert: int | None = None
    kind: str | None = None
    grid: Grid | None = None
    exact: tuple[tuple[int, float], ...] = ()


def lost_by_adding(tensor: torch.Tensor, offset: float) -> tuple[tuple[int, float], ...]:
    """Elements w for which ``(w + offset) - offset`` in float32, rounded to w's dtype, is not w."""
    flat = tensor.flatten()
    back = ((flat.to(torch.float32) + offset) - offset).to(flat.dtype)
    lost = (back != flat) | (back.signbit() != flat.signbit())
    return tuple((int(i), float(flat[i])) for i in lost.nonzero().flatten())


def write_notes(notes: list[Noted]) -> str:
    """As JSON; equal notes give equal text."""
    grids: dict[Grid, int] = {}
    listed: dict[str, dict[str, Any]] = {}
    for note in notes:
        item: dict[str, Any] = {"in": note.tensor, "dtype": note.dtype}
        if note.expert is not None:
            item["expert"] = note.expert
        if note.grid is not None:
            item |= {"kind": note.kind, "grid": grids.setdefault(note.grid, len(grids))}
        if note.exact:
            item["exact"] = note.exact
        listed[note.name] = item
    return json.dumps({"grids": [_plain(g) for g in grids], "tensors": listed}, separators=(",", ":"))


def read_notes(text: str, tensors: Mapping[str, GgufTensor], where: str) -> list[Noted]:
    """Notes on the tensors of a file; without its tower's file, on the language model by the names of a plain one.

    Raises:
        CheckpointError: they are not notes, or on other tensors.
    """
    try:
        whole = json.loads(text)
        grids = [_grid(g) for g in whole["grids"]]
        found = list(_parsed(whole["tensors"], grids))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(
            f"metadata {TENSORS_KEY} are not what halfbyte writes", where=where, remedy="Convert the original again."
        ) from None
    blind = not any(in_tower(n) for n in tensors)
    if blind:
        found = [_renamed(n) for n in found if not in_tower(n.tensor)]
    listed = {n.tensor for n in found}
    odd = sorted((listed ^ set(tensors)) - MADE)
    odd += [n.tensor for n in found if n.expert is not None and not 0 <= n.expert < tensors[n.tensor].shape[0]]
    if odd:
        raise CheckpointError(
            f"metadata {TENSORS_KEY} are on other tensors than the file has: {', '.join(odd[:3])}",
            where=where,
            remedy="The file was changed; convert the original again.",
        )
    return found


def in_tower(tensor: str) -> bool:
    """Whether a tensor (by its GGUF name) is part of the vision tower or projector."""
    return tensor.startswith(("v.", "mm."))


def _renamed(note: Noted) -> Noted:
    values = {f: getattr(note, f) for f in Noted.__dataclass_fields__}
    return Noted(**(values | {"name": text_name(note.name)}))


def _parsed(listed: Mapping[str, Mapping[str, Any]], grids: list[Grid]) -> Iterator[Noted]:
    for name, item in listed.items():
        yield Noted(
            name=name,
            tensor=str(item["in"]),
            dtype=str(item["dtype"]),
            expert=None if "expert" not in item else int(item["expert"]),
            kind=item.get("kind"),
            grid=grids[item["grid"]] if "grid" in item else None,
            exact=tuple((int(i), float(v)) for i, v in item.get("exact", ())),
        )


def _plain(grid: Grid) -> dict[str, Any]:
    w = grid.weights
    found: dict[str, Any] = {"bits": w.num_bits, "symmetric": w.symmetric, "group_size": w.group_size}
    found["scale_dtype"] = grid.scale_dtype
    if grid.activations is not None:
        found["activations"] = asdict(grid.activations)
    return found


def _grid(plain: Mapping[str, Any]) -> Grid:
    weights = WeightFormat(num_bits=plain["bits"], symmetric=plain["symmetric"], group_size=plain["group_size"])
    activations = plain.get("activations")
    return Grid(
        weights=weights,
        scale_dtype=plain["scale_dtype"],
        activations=None if activations is None else ActivationFormat(**activations),
    )
