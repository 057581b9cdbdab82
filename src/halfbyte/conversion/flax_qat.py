"""Gemma 3 int4 checkpoints for Flax, as Kaggle ships them: quantisation-aware training, the grid not stored.

The decoder's Linears are on an int4 grid of 32 inputs to a scale, which :mod:`~halfbyte.conversion.lattice` finds again
from the values, with zero error or not at all. The embedding table is on such a grid too, but no target but dense holds
it as anything else, so it stays as it is; so do norms, vision tower and projector.

One array is in memory at a time, or two where two tensors share one. Every Linear is read twice: for its scales before
anything is written, and to be written.

Does not cover: adapters, Gemma 3n, checkpoints that were not trained for int4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.reader import DTYPES, combined_digest, digest_of
from halfbyte.conversion import gemma3
from halfbyte.conversion.coded import CodedWeight, Grid, Steps
from halfbyte.conversion.flax_layout import Piece, canonical, check, layout, shape_of
from halfbyte.conversion.gemma3_tokenizer import Tokenizer, find_tokenizer
from halfbyte.conversion.lattice import GROUP, Lattice, OffGrid, recover
from halfbyte.conversion.orbax import ArrayInfo, OrbaxCheckpoint, find_checkpoint, open_orbax
from halfbyte.conversion.source import Entry
from halfbyte.errors import CheckpointError, NumericsError, UsageError
from halfbyte.schemes import WeightFormat

# Beside the grid by so much of a group's largest number at most, some last places of float32, for --allow-requantize.
SLACK = 2.0**-20
INT4 = Grid(weights=WeightFormat(num_bits=4, group_size=GROUP), scale_dtype="F32")
NOMINAL = {"bfloat16": "BF16", "float32": "F32"}


class _Arrays:
    """Reads arrays, keeps the last one for the tensor that shares it, and hashes each once, beside the work."""

    def __init__(self, checkpoint: OrbaxCheckpoint, infos: Mapping[str, ArrayInfo]) -> None:
        self.checkpoint, self.infos = checkpoint, infos
        self._last: tuple[str, torch.Tensor] | None = None
        self._digests: dict[str, Future[str]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1)

    def read(self, array: str, rows: int | None = None) -> torch.Tensor:
        if self._last is None or self._last[0] != array or rows is not None:
            self._last = None  # freed before the next one is read
            if self._digests:
                next(reversed(self._digests.values())).result()
            info = self.infos[array]
            tensor = self.checkpoint.read(info.name, rows)
            if array not in self._digests:
                stored = tensor if rows is None else tensor[: info.shape[0]]
                self._digests[array] = self._pool.submit(digest_of, stored)
            if rows is not None:
                return tensor
            self._last = (array, tensor)
        return self._last[1]

    def sha256(self, wanted: Sequence[str]) -> str:
        for array in wanted:
            if array not in self._digests:
                self.read(array)
        self._last = None
        return combined_digest({n: d.result() for n, d in self._digests.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaxSource:
    """A :class:`~halfbyte.conversion.source.Source` over an orbax folder."""

    name: str
    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    companions: Sequence[Path]
    extra_files: Mapping[str, bytes]
    said: Sequence[str]
    pieces: Mapping[str, Piece]
    arrays: _Arrays
    near: bool = False
    moved: dict[str, None] = field(default_factory=dict)
    format: str = "flax"
    concurrent: bool = False  # arrays are large, and the last one is kept

    @property
    def notes(self) -> Sequence[str]:
        if not self.moved:
            return self.said
        first = ", ".join(n.removesuffix(".weight") for n in list(self.moved)[:3])
        return [
            *self.said,
            f"{len(self.moved)} Linears lay beside their grids, by 2^-20 of a group's largest number at most, and were "
            f"put onto them (--allow-requantize), first {first}",
        ]

    @property
    def quantization(self) -> Mapping[str, Any]:
        return {}

    def fingerprint(self) -> str:
        return self.arrays.checkpoint.fingerprint()

    def sha256(self) -> str:
        return self.arrays.sha256(sorted({p.array for p in self.pieces.values()}))

    def dense(self, name: str) -> torch.Tensor:
        piece, entry = self.pieces[name], self.entries[name]
        rows = piece.shape[0] if piece.shape != piece.stored and piece.turn == "as is" else None
        tensor = piece.cut(self.arrays.read(piece.array, rows))
        return tensor.to(DTYPES[entry.dtype]).contiguous()

    def steps(self, name: str) -> Steps:
        return Steps(scales=self._lattice(name, with_codes=False).scales)

    def coded(self, name: str) -> CodedWeight:
        found = self._lattice(name, with_codes=True)
        assert found.codes is not None
        return CodedWeight.of_codes(INT4, found.codes, Steps(scales=found.scales))

    def _lattice(self, name: str, *, with_codes: bool) -> Lattice:
        piece = self.pieces[name]
        weight = piece.cut(self.arrays.read(piece.array))
        if self.entries[name].dtype == "BF16" and _is_bfloat16(weight):
            weight = weight.to(torch.bfloat16)
        found = recover(weight, with_codes=with_codes)
        if isinstance(found, OffGrid) and found.finite:
            near = recover(weight, with_codes=with_codes, slack=SLACK)
            if isinstance(near, Lattice) and self.near:
                self.moved[name] = None
                found = near
            elif isinstance(near, Lattice):
                raise self._off_grid(piece, found, weight, moved=True)
        if isinstance(found, OffGrid):
            raise self._off_grid(piece, found, weight)
        if found.zero_groups == found.scales.numel():
            raise CheckpointError(
                f"{piece.name} holds nothing but zeros", where=self._where(piece), remedy="Download it again."
            )
        return found

    def _off_grid(self, piece: Piece, found: OffGrid, weight: torch.Tensor, *, moved: bool = False) -> Exception:
        place = f"output {found.row}, inputs {found.column} to {found.column + GROUP - 1}"
        if not found.finite:
            return NumericsError(
                f"{piece.name} holds NaN or infinity ({place})", where=self._where(piece), remedy="Download it again."
            )
        listed = ", ".join(f"{v:.6g}" for v in found.values[:4])
        if found.groups == found.of:
            remedy = "Only checkpoints of quantisation-aware training for int4 (int4 in their names) can be converted."
        else:
            remedy = "The checkpoint is damaged, or was trained on after quantisation."
        if weight.dtype == torch.float32 and _is_bfloat16(weight):
            remedy = "Its numbers were rounded to bfloat16 before they were stored as float32: add --dtype bfloat16."
        if moved:
            remedy = "All are beside one by a few last places; --allow-requantize puts them onto it."
        return CheckpointError(
            f"{piece.name} is not on an int4 grid: {found.groups} of {found.of} groups of {GROUP} inputs have no scale "
            f"whose multiples from -8 to 7 are their values; the first is {place}: {listed}, ...",
            where=self._where(piece),
            remedy=remedy,
        )

    def _where(self, piece: Piece) -> str:
        return f"{self.path}: {piece.array}"


def open_flax(
    source: str | Path,
    *,
    dtype: str | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    near: bool = False,
) -> FlaxSource:
    """Open a checkpoint: headers are read, names and shapes are held against Gemma 3's; no weights yet.

    Args:
        source: the orbax folder, or the folder around it.
        dtype: what tensors that are not quantised become, and what a dense copy is in: ``bfloat16`` or ``float32``.
            Kaggle's int4 checkpoints hold float32; ``None`` is bfloat16, as this model is published for every engine.
        config: a ``config.json`` or its folder, for shapes that are not among the four sizes.
        tokenizer: a folder (or the ``tokenizer.model`` alone); ``None`` looks beside the checkpoint.
        near: also take Linears that lie beside their grid by a few last places of float32; the notes name them.

    Raises:
        CheckpointError: unfinished, truncated, not Gemma 3, or of a shape that needs a config.
        UsageError: ``dtype``, ``config`` or ``tokenizer`` does not fit.
        MissingDependencyError: tensorstore is not installed.
    """
    if dtype is not None and dtype not in NOMINAL:
        raise UsageError(
            f"{dtype} is no dtype of a Flax checkpoint", where="--dtype", remedy="Use bfloat16 or float32."
        )
    around = Path(source)
    path = find_checkpoint(around)
    checkpoint = open_orbax(path)
    arrays = canonical(checkpoint.arrays)
    text, tower = shape_of(arrays, str(path))
    chat, notes = _is_chat(around, path)
    nominal = dtype or "bfloat16"
    contents = _config(config, text, tower, chat=chat, dtype=nominal, where=str(path))
    rows = (contents.get("text_config") or contents)["vocab_size"]
    pieces = {p.name: p for p in layout(text, tower, rows)}
    left = check(pieces, arrays, str(path))
    if left:
        notes.append(f"left behind, as no published Gemma 3 has them: {', '.join(left)}")
    entries = {p.name: _entry(p, NOMINAL[nominal], str(path)) for p in pieces.values()}
    narrowed = [p for p in pieces.values() if arrays[p.array].dtype == "F32"] if nominal == "bfloat16" else []
    if narrowed:
        notes.append(
            f"{sum(not p.linear for p in narrowed)} tensors that are not quantised were stored as float32 and are "
            "rounded to bfloat16; --dtype float32 keeps them"
        )
    files = find_tokenizer(tokenizer, [around, path, path.parent], chat=chat, tower=tower is not None, vocab=text.vocab)
    return FlaxSource(
        name=str(source),
        path=path,
        config=contents,
        entries=entries,
        companions=files.companions,
        extra_files=_extra(files, chat=chat, tower=tower is not None),
        said=[*notes, *files.notes],
        pieces=pieces,
        arrays=_Arrays(checkpoint, arrays),
        near=near,
    )


def _entry(piece: Piece, dtype: str, where: str) -> Entry:
    if piece.linear and piece.shape[1] % GROUP:
        raise CheckpointError(
            f"{piece.array} has {piece.shape[1]} inputs, which do not divide into groups of {GROUP}", where=where
        )
    return Entry(name=piece.name, dtype=dtype, shape=piece.shape, grid=INT4 if piece.linear else None)


def _extra(files: Tokenizer, *, chat: bool, tower: bool) -> dict[str, bytes]:
    """Files that are written from what is known of the model, where the user gave none of that name."""
    made = {"generation_config.json": gemma3.generation_config(chat=chat), **files.written}
    if tower:
        made |= gemma3.processor_files()
    given = {p.name for p in files.companions}
    return {n: content for n, content in made.items() if n not in given}


def _is_chat(*paths: Path) -> tuple[bool, list[str]]:
    """Whether the model was tuned to chat, which only names say: ``-it`` or ``-pt`` in that of a folder."""
    for path in paths:
        for name in (path.resolve().name, path.resolve().parent.name):
            parts = name.lower().replace("_", "-").split("-")
            if "it" in parts or "pt" in parts:
                return "it" in parts, []
    return True, ["no folder's name says -it or -pt: taken for a model that was tuned to chat"]


def _is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether all of its numbers are bfloat16 numbers, whatever they are stored as."""
    if weight.dtype == torch.bfloat16:
        return True
    strips = (weight[first : first + 1024] for first in range(0, weight.shape[0], 1024))
    return all(torch.equal(rows.to(torch.bfloat16).to(rows.dtype), rows) for rows in strips)


def _config(
    given: Path | None,
    text: gemma3.Shape,
    tower: gemma3.TowerShape | None,
    *,
    chat: bool,
    dtype: str,
    where: str,
) -> dict[str, Any]:
    if given is not None:
        return _given_config(given, text, tower, dtype)
    size = gemma3.size_of(text, tower)
    if size is None:
        found = text.words() + (f"; vision tower: {tower.words()}" if tower else "")
        sizes = "; ".join(f"{s.name}: {s.shape.words()}" for s in gemma3.SIZES)
        raise CheckpointError(
            f"has the shape of no published Gemma 3 ({found})",
            where=where,
            why=sizes,
            remedy="Give its config with --config FILE.",
        )
    return gemma3.config_of(size, tower=tower is not None, chat=chat, dtype=dtype)


def _given_config(file: Path, text: gemma3.Shape, tower: gemma3.TowerShape | None, dtype: str) -> dict[str, Any]:
    """The user's config, held against the shapes."""
    file = file / "config.json" if file.is_dir() else file
    try:
        contents = json.loads(file.read_bytes())
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot be read ({e})", where=f"--config {file}") from None
    if not isinstance(contents, dict) or contents.get("model_type") != ("gemma3_text" if tower is None else "gemma3"):
        wanted = "gemma3_text" if tower is None else "gemma3"
        why = "there is no vision tower" if tower is None else "there is a vision tower"
        raise UsageError(f"is not of model_type {wanted}", where=f"--config {file}", why=why)
    stated = gemma3.shapes_in(contents)
    found = {n: getattr(text, n) for n in ("layers", "hidden", "ffw", "heads", "kv_heads", "head_dim")}
    if tower is not None:
        found |= {f"tower_{n}": getattr(tower, n) for n in ("layers", "hidden", "ffw", "heads", "patch")}
    wrong = [f"{n} {stated.get(n)}, not {value}" for n, value in found.items() if stated.get(n) != value]
    vocab = (contents.get("text_config") or contents).get("vocab_size")
    if vocab not in (text.vocab, text.vocab + gemma3.PADDING_ROWS):
        wrong.append(f"vocab_size {vocab}, not {text.vocab} or {gemma3.PADDING_ROWS} more")
    if wrong:
        raise UsageError(f"does not fit the checkpoint: {'; '.join(wrong)}", where=f"--config {file}")
    contents.pop("quantization_config", None)
    contents.setdefault("architectures", ["Gemma3ForCausalLM" if tower is None else "Gemma3ForConditionalGeneration"])
    parts = [contents, *(contents[k] for k in ("text_config", "vision_config") if isinstance(contents.get(k), dict))]
    for part in parts:
        part |= {k: dtype for k in ("dtype", "torch_dtype") if k in part}
    if not any(k in contents for k in ("dtype", "torch_dtype")):
        contents["torch_dtype"] = dtype
    return contents
