"""GGUF as a source: a file, or a folder with one in it.

Q4_0 and Q8_0 weights of Linears keep codes and scales; every other type is decoded to floats, one tensor at a time.
config.json, tokenizer and generation config are taken from the folder where the GGUF lies among them, as
``convert --to gguf`` leaves it, and are else made from the metadata. A file alone may lie in any folder; nothing beside
it is read but its other parts.

Of a file that halfbyte wrote, its notes (:mod:`halfbyte.conversion.gguf_return`) give names, order, groups and dtypes
back, and the vision tower out of ``mmproj.gguf``, so that the way there and back ends in the same bytes (Q5_0, which
asymmetric weights may have become, in the same values). Does not cover: other tools' ``mmproj``, adapters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.reader import DTYPES, combined_digest, companion_files, digest_of, licence_files
from halfbyte.conversion.coded import CodedWeight, Grid, Steps
from halfbyte.conversion.dense import rounded
from halfbyte.conversion.gguf_blocks import (
    BLOCK,
    BlockType,
    decode,
    grouped,
    has_words,
    heads,
    to_words,
    zero_points_of,
)
from halfbyte.conversion.gguf_configs import config_of, family_in, head_counts, llama3_rope
from halfbyte.conversion.gguf_families import ROPE_KEY, Family, is_norm, turned_heads, unpermute
from halfbyte.conversion.gguf_file import SPLIT_NAME, GgufFile, GgufTensor, open_gguf
from halfbyte.conversion.gguf_out import VISION_NAME
from halfbyte.conversion.gguf_return import MADE, TENSORS_KEY, Noted, in_tower, read_notes
from halfbyte.conversion.gguf_tokenizer_in import tokenizer_files
from halfbyte.conversion.gguf_vision import NORM_OFFSETS, tower_heads, turned_in_tower
from halfbyte.conversion.source import Entry
from halfbyte.errors import CheckpointError
from halfbyte.records import read_json
from halfbyte.schemes import WeightFormat

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_PLAIN_BITS = {"Q4_0": 4, "Q8_0": 8}
_FLOATS = frozenset(_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Where an entry lies: a tensor, or expert ``expert`` of a stack.

    Its rows are in reordered ``heads``, ``added`` was added to its elements, and ``exact`` has those that this changed.
    """

    tensor: str
    expert: int | None = None
    heads: int = 0
    added: float = 0.0
    exact: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class GgufSource:
    """A :class:`~halfbyte.conversion.source.Source` over a GGUF file."""

    name: str
    file: GgufFile
    family: Family
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    origins: Mapping[str, _Origin]
    companions: Sequence[Path]
    extra_files: Mapping[str, bytes]
    notes: Sequence[str]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    concurrent: bool = True
    _digests: dict[str, str] = field(default_factory=dict)

    @property
    def format(self) -> str:
        return "gguf"

    @property
    def path(self) -> Path:
        return self.file.path

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted({t.path for t in self.file.tensors.values()}):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def sha256(self) -> str:
        for name in self.file.tensors:
            if name not in self._digests:
                self._raw(_Origin(tensor=name))
        return combined_digest(self._digests)

    def dense(self, name: str) -> torch.Tensor:
        origin, entry = self.origins[name], self.entries[name]
        kind, dtype = self.file.tensors[origin.tensor].kind, torch.float32
        if not origin.added and (kind in _FLOATS or entry.dtype != "F16"):
            dtype = DTYPES[kind if kind in _FLOATS else entry.dtype]
        tensor = self.file.floats(origin.tensor, dtype, self._raw(origin)).reshape(entry.shape)
        if origin.added:
            tensor = tensor - origin.added
        tensor = rounded(tensor, entry.dtype, name)
        for i, value in origin.exact:
            tensor.view(-1)[i] = value
        if origin.heads:
            tensor = unpermute(tensor, origin.heads)
        return tensor.contiguous()

    def steps(self, name: str) -> Steps:
        kind, grid = self._kind(name)
        if kind == "Q5_0" and not grid.weights.symmetric:
            return self.coded(name).steps  # zero points show in the codes
        origin = self.origins[name]
        d, m = heads(kind, self._raw(origin))
        return self._steps(name, d, None if m is None else zero_points_of(d, m))

    def coded(self, name: str) -> CodedWeight:
        kind, grid = self._kind(name)
        origin, in_features = self.origins[name], self.entries[name].shape[1]
        raw = self._raw(origin)
        if has_words(kind, grid.weights.num_bits):
            words = to_words(kind, raw)
            if origin.heads:
                words = unpermute(words, origin.heads).contiguous()
            d, m = heads(kind, raw)
            steps = self._steps(name, d, None if m is None else zero_points_of(d, m))
            return CodedWeight(grid=grid, in_features=in_features, words=words, steps=steps)
        blocks = decode(kind, raw)
        codes, zeros = blocks.codes, None
        if not grid.weights.symmetric:
            codes, zeros = _with_zero_points(codes, grid.weights.group_size or in_features)
        if origin.heads:
            codes = unpermute(codes, origin.heads)
        return CodedWeight.of_codes(grid, codes.contiguous(), self._steps(name, blocks.d, zeros))

    def _kind(self, name: str) -> tuple[BlockType, Grid]:
        grid = self.entries[name].grid
        assert grid is not None
        kind: Any = self.file.tensors[self.origins[name].tensor].kind
        return kind, grid

    def _steps(self, name: str, d: torch.Tensor, zeros: torch.Tensor | None) -> Steps:
        """Groups of the grid out of blocks (zero points unsigned, 0..15), in the order of rows that the entry has."""
        entry, origin = self.entries[name], self.origins[name]
        assert entry.grid is not None
        size = entry.grid.weights.group_size
        scales = grouped(d, size, entry.shape[1])
        if zeros is not None and zeros.shape == d.shape:
            zeros = grouped(zeros, size, entry.shape[1])
        if scales is None or (zeros is None and not entry.grid.weights.symmetric):
            raise CheckpointError(
                f"tensor {origin.tensor} is not in groups of {size}, as {TENSORS_KEY} says",
                where=str(self.path),
                remedy="The file was changed; convert the original again.",
            )
        signed = None if zeros is None else zeros - 8
        if origin.heads:
            scales = unpermute(scales, origin.heads)
            signed = None if signed is None else unpermute(signed, origin.heads)
        return Steps(scales=scales.to(DTYPES[entry.grid.scale_dtype]), zero_points=signed)

    def _raw(self, origin: _Origin) -> torch.Tensor:
        raw = self.file.raw(origin.tensor, origin.expert)
        if origin.expert is None and origin.tensor not in self._digests:
            self._digests[origin.tensor] = digest_of(raw)
        return raw


def _with_zero_points(codes: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Q5_0's codes ``q - z`` as signed codes q, and the lowest unsigned zero points with which these fit."""
    groups = codes.reshape(codes.shape[0], -1, group_size)
    zeros = (-groups.amin(-1)).clamp(0, 15)
    return (groups + (zeros - 8).unsqueeze(-1)).reshape(codes.shape), zeros


def find_gguf(folder: Path) -> Path | None:
    """The model among a folder's GGUF files, ``None`` where there is none.

    Raises:
        CheckpointError: there are several.
    """
    found = [p for p in sorted(folder.glob("*.gguf")) if "mmproj" not in p.name]
    first_parts = [p for p in found if not (m := SPLIT_NAME.fullmatch(p.name)) or m[2] == "00001"]
    if len(first_parts) > 1:
        raise CheckpointError(
            f"holds {len(first_parts)} models: {', '.join(p.name for p in first_parts[:3])}",
            where=str(folder),
            remedy="Give the file.",
        )
    return first_parts[0] if first_parts else None


def located(path: Path) -> Path:
    """A GGUF file, or the one in a folder."""
    found = find_gguf(path) if path.is_dir() else path
    if found is None:
        raise CheckpointError("holds no GGUF file", where=str(path), remedy="Give a .gguf file or a folder with one.")
    return found


def open_gguf_source(path: Path, name: str | None = None, dtype: str | None = None) -> GgufSource:
    """Open a GGUF file, or the one in a folder.

    Args:
        path: the file, or the folder.
        name: what to call it in messages.
        dtype: safetensors dtype that floats are decoded to where halfbyte's notes do not say; ``None`` finds one.

    Raises:
        CheckpointError: it is broken, or of an architecture or tokenizer that halfbyte does not read.
        MissingDependencyError: the package gguf is not installed.
    """
    folder = path if path.is_dir() else None
    found = located(path)
    file = open_gguf(found)
    where = str(found)
    family = family_in(file.metadata, where)
    described = folder is not None and (folder / "config.json").exists()
    if described and TENSORS_KEY in file.metadata and (tower := found.with_name(VISION_NAME)).exists():
        file = _joined(file, open_gguf(tower))
    noted = read_notes(file.metadata[TENSORS_KEY], file.tensors, where) if TENSORS_KEY in file.metadata else []
    config = _config_beside(folder) if folder is not None and described else {}
    nominal = _dense_dtype(file, family, noted, config)
    notes = [] if noted or dtype else _rounded_matrices(file, nominal)
    decoded = dtype or nominal
    extra: dict[str, bytes] = {}
    if folder is not None and described:
        companions = tuple(companion_files(folder))
        if "text_config" in config and not any(in_tower(n.tensor) for n in noted):
            notes.append("the vision tower stays behind: the language model alone is read out of this GGUF")
            config = _config(file, family, nominal, where)
            companions = tuple(p for p in companions if "processor" not in p.name)
    else:
        config = _config(file, family, nominal if noted else decoded, where)
        extra = tokenizer_files(file.metadata, config["max_position_embeddings"], where)
        finals = _final_ids(file.metadata)
        generation = {k: v for k, v in config.items() if k.endswith("_token_id")}
        generation |= {"eos_token_id": finals[0] if len(finals) == 1 else finals} if finals else {}
        extra["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
        companions = () if folder is None else tuple(licence_files(folder))
        if (
            file.metadata["tokenizer.ggml.model"] == "gpt2"
            and file.metadata.get("tokenizer.ggml.pre", "default") == "default"
        ):
            notes.append(
                "tokenizer: the file does not say how text is split; it is as llama.cpp does then, which may not be as "
                "the model was trained (a folder with the model's own tokenizer files and config.json is believed)"
            )
    if noted:
        entries, origins = _noted(file, family, noted, decoded, where)
    else:
        entries, origins = _listed(file, family, decoded, where)
    return GgufSource(
        name=name or str(path),
        file=file,
        family=family,
        config=config,
        entries=entries,
        origins=origins,
        companions=companions,
        extra_files=extra,
        notes=notes,
    )


def _joined(model: GgufFile, tower: GgufFile) -> GgufFile:
    """A model and its tower as one; of the tower's metadata those that are its own."""
    return GgufFile(
        path=model.path,
        metadata={k: v for k, v in tower.metadata.items() if k.startswith("clip.")} | dict(model.metadata),
        tensors={**model.tensors, **tower.tensors},
    )


def _config_beside(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError("holds no JSON object", where=str(folder / "config.json"))
    return config


def _dense_dtype(file: GgufFile, family: Family, noted: Sequence[Noted], config: Mapping[str, Any]) -> str:
    """What dense weights become: what the embedding table was, what a config beside the file says, the one float type
    of all matrices; else float16, in which scales are, unless there are bfloat16 matrices or it is a Gemma, whose
    activations overflow in float16."""
    known = next((n.dtype for n in noted if n.tensor == "token_embd.weight"), None)
    if known in _NAMES:
        return str(known)
    stated = [p.get(k) for p in (config.get("text_config") or {}, config) for k in ("dtype", "torch_dtype")]
    if found := next((n for n, name in _NAMES.items() for s in stated if s == name), None):
        return found
    kinds = {t.kind for t in file.tensors.values() if len(t.shape) > 1}
    if len(kinds) == 1 and kinds <= _FLOATS:
        return kinds.pop()
    narrow = "F16" in kinds or not kinds.isdisjoint(_PLAIN_BITS)
    return "F16" if narrow and "BF16" not in kinds and not family.architecture.startswith("gemma") else "BF16"


def _rounded_matrices(file: GgufFile, dtype: str) -> list[str]:
    """A note on matrices that are floats in the file and are rounded to another float type."""
    found = [t for t in file.tensors.values() if len(t.shape) > 1 and t.kind in _FLOATS - {dtype}]
    if dtype == "F32" or not found:
        return []
    return [
        f"{len(found)} matrices of floats, such as {found[0].name} ({found[0].kind}), are rounded to {_NAMES[dtype]}; "
        "--to dense --dtype float32 keeps them"
    ]


def _config(file: GgufFile, family: Family, dtype: str, where: str) -> dict[str, Any]:
    shapes = {n: t.shape for n, t in file.tensors.items()}
    config = config_of(file.metadata, family, shapes, _NAMES[dtype], where)
    if "rope_freqs.weight" in file.tensors:
        factors = file.floats("rope_freqs.weight", torch.float32, file.raw("rope_freqs.weight"))
        if bool((factors != 1).any()):
            noted = file.metadata.get(ROPE_KEY)
            config["rope_parameters"] = llama3_rope(config, factors, where, json.loads(noted) if noted else {})
    return config


def _final_ids(metadata: Mapping[str, Any]) -> list[int]:
    keys = (f"tokenizer.ggml.{k}_token_id" for k in ("eos", "eot", "eom"))
    return list(dict.fromkeys(metadata[k] for k in keys if k in metadata))


Listed = tuple[dict[str, Entry], dict[str, _Origin]]  # by dense name


def _noted(file: GgufFile, family: Family, noted: Sequence[Noted], dtype: str, where: str) -> Listed:
    """Entries and where they lie, as halfbyte noted them; ``dtype`` is for what has become codes since."""
    query_heads, kv_heads = head_counts(file.metadata, family, where)
    in_tower_heads = tower_heads(file.metadata)
    entries: dict[str, Entry] = {}
    origins: dict[str, _Origin] = {}
    for note in noted:
        tensor = file.tensors[note.tensor]
        shape = tensor.shape if note.expert is None else tensor.shape[1:]
        grid = note.grid if note.kind == tensor.kind else _plain_grid(tensor, shape)
        kept = grid is not None or tensor.kind in _FLOATS
        entries[note.name] = Entry(name=note.name, dtype=note.dtype if kept else dtype, shape=shape, grid=grid)
        heads, added = turned_in_tower(note.tensor, in_tower_heads), NORM_OFFSETS.get(note.tensor, 0.0)
        if not in_tower(note.tensor):
            heads = turned_heads(family, note.tensor, query_heads, kv_heads)
            added = family.norm_offset if is_norm(note.tensor) else 0.0
        origins[note.name] = _Origin(tensor=note.tensor, expert=note.expert, heads=heads, added=added, exact=note.exact)
    return entries, origins


def _listed(file: GgufFile, family: Family, dtype: str, where: str) -> Listed:
    """Entries in the order of the file, experts one by one, and where each lies."""
    query_heads, kv_heads = head_counts(file.metadata, family, where)
    entries: dict[str, Entry] = {}
    origins: dict[str, _Origin] = {}
    for name, tensor in file.tensors.items():
        if name in MADE:
            continue
        dense = dense_name(name, family)
        if dense is None:
            raise CheckpointError(
                f"tensor {name} has no counterpart in a {family.model_types[0]} checkpoint",
                where=where,
                remedy="Please report the model.",
            )
        experts = range(tensor.shape[0]) if "{e}" in dense else [None]
        shape = tensor.shape[1:] if "{e}" in dense else tensor.shape
        for expert in experts:
            full = dense if expert is None else dense.replace("{e}", str(expert))
            entries[full] = Entry(name=full, dtype=dtype, shape=shape, grid=_plain_grid(tensor, shape))
            origins[full] = _Origin(
                tensor=name,
                expert=expert,
                heads=turned_heads(family, name, query_heads, kv_heads),
                added=family.norm_offset if is_norm(name) else 0.0,
            )
    return entries, origins


def dense_name(name: str, family: Family) -> str | None:
    """The dense name of a tensor of the language model, ``{e}`` for the expert; ``None`` where it has none."""
    stem, _, leaf = name.rpartition(".")
    layer = ""
    if match := re.fullmatch(r"blk\.(\d+)\.(.*)", stem):
        layer, stem = match[1], f"blk.{{}}.{match[2]}"
    if stem not in family.names or leaf not in ("weight", "bias"):
        return None
    return f"{family.names[stem].replace('{}', layer)}.{leaf}"


def _plain_grid(tensor: GgufTensor, shape: tuple[int, ...]) -> Grid | None:
    """The grid of a Linear inside a block by its type alone; ``None`` for floats."""
    linear = tensor.name.startswith("blk.") and len(shape) == 2 and ".ffn_gate_inp" not in tensor.name
    if not linear or tensor.kind not in _PLAIN_BITS:
        return None
    return Grid(weights=WeightFormat(num_bits=_PLAIN_BITS[tensor.kind], group_size=BLOCK), scale_dtype="F16")
