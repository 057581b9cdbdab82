"""``verify`` for converted checkpoints: dense, AutoAWQ's, AutoGPTQ's, and any of them beside a quantised source.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.

Whatever formats the two sides have, each weight is decoded by the reference decoder of its format, and the values are
compared, bit for bit: what ``convert.json`` does not list as requantised must be equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from halfbyte.errors import CheckpointError
from halfbyte.progress import Reporter
from halfbyte.records import CONVERT_NAME, Check, ConvertRecord, read_record
from halfbyte.reference import FLOATS, Float32, StoredTensor, decode_rows, to_float32
from halfbyte.reference_columns import ColumnWeight
from halfbyte.verifier_columns import METHODS, ColumnModule, column_modules
from halfbyte.verifier_files import Inventory
from halfbyte.verifier_layout import parse_rules, quantized_parts
from halfbyte.verifier_models import Loaded, Stored, as_torch, first_line, model_class, quiet
from halfbyte.verifier_numbers import MAX_RELATIVE_ERROR, copy_problems

STEP_ELEMENTS = 4 << 20
SLACK = 2.0**-20  # relative; what was beside its grid by some last places and put onto it
HASH_CHUNK_BYTES = 16 << 20
LINEAR = frozenset({"Linear"})


class Weight(Protocol):
    """A weight ``[out, in]`` that can be read some rows at a time, as float32.

    ``grain`` is the dtype that products of codes and scales were rounded to, empty where they are as they come.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def grain(self) -> str: ...

    def rows(self, start: int, stop: int) -> Float32: ...


@dataclass(frozen=True, slots=True)
class Plain:
    """A dense one."""

    tensor: StoredTensor
    grain: ClassVar[str] = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> Float32:
        return to_float32(self.tensor.rows(start, stop), self.tensor.dtype)


@dataclass(frozen=True, slots=True)
class Packed:
    """One of compressed-tensors."""

    parts: Mapping[str, StoredTensor]
    group: Any
    shape: tuple[int, int]
    grain: ClassVar[str] = ""

    def rows(self, start: int, stop: int) -> Float32:
        return decode_rows(self.parts, self.group.format, start, stop).weight


@dataclass(slots=True)
class Columns:
    """One of AutoAWQ or AutoGPTQ, read when the first rows are asked for."""

    module: ColumnModule
    shape: tuple[int, int]
    _weight: ColumnWeight | None = None
    grain: ClassVar[str] = ""

    def rows(self, start: int, stop: int) -> Float32:
        if self._weight is None or start == 0:
            self._weight = self.module.load()
        rows = self._weight.decode(start, stop).weight
        if stop >= self.shape[0]:
            self._weight = None
        return rows


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint of any format: quantised weights by dense name, and all other tensors.

    ``given`` are those of the others that lie in no safetensors file.
    """

    quantized: Mapping[str, Weight]
    dense: Mapping[str, StoredTensor]
    modules: Sequence[ColumnModule] = ()
    given: Mapping[str, Weight] = field(default_factory=dict)


def method_of(found: Inventory) -> str | None:
    """``quant_method``; ``None`` for a dense checkpoint."""
    return str(found.quantization.get("quant_method")) if isinstance(found.quantization, dict) else None


def contents_of(found: Inventory) -> Contents:
    """Sort a checkpoint's tensors; :class:`CheckpointError` where its format is not decoded."""
    method = method_of(found)
    if method is None:
        return Contents({}, found.tensors)
    quantization = found.quantization
    weights: dict[str, Weight] = {}
    if method in METHODS:
        modules = column_modules(found.tensors, quantization)
        owned = {t.name for m in modules for t in m.parts.values()}
        for m in modules:
            loaded = m.load()
            weights[f"{m.name}.weight"] = Columns(m, loaded.shape)
        return Contents(weights, {n: t for n, t in found.tensors.items() if n not in owned}, modules)
    if method != "compressed-tensors":
        raise CheckpointError(f"weights in {method} format are not decoded", where=str(found.folder))
    rules, parts = parse_rules(quantization), quantized_parts(found.tensors)
    for name, leaves in parts.items():
        group = rules.group_of(name, LINEAR)
        if group is None or group.format is None or group.unsupported:
            raise CheckpointError(f"{name} is not decoded", where=str(found.folder))
        shape = leaves["weight_shape"].rows() if "weight_shape" in leaves else leaves["weight"].shape
        weights[f"{name}.weight"] = Packed(leaves, group, (int(shape[0]), int(shape[1])))
    owned = {t.name for leaves in parts.values() for t in leaves.values()}
    return Contents(weights, {n: t for n, t in found.tensors.items() if n not in owned})


def read_convert_record(found: Inventory) -> ConvertRecord | None:
    """``convert.json``; one that cannot be read is a problem of the files."""
    if not (found.folder / CONVERT_NAME).exists():
        return None
    try:
        return read_record(ConvertRecord, found.folder / CONVERT_NAME)
    except CheckpointError as e:
        found.file_problems.append(f"{CONVERT_NAME} {e.what}")
        return None


def hash_problems(found: Inventory, record: ConvertRecord | None, reporter: Reporter) -> list[str]:
    """Whether the tensors hash to what ``convert`` recorded: sha256 over lines ``name sha256``, sorted by name."""
    if record is None:
        return []
    lines = []
    reporter.start("hashing tensors", len(found.tensors))
    for name, tensor in sorted(found.tensors.items()):
        digest = hashlib.sha256()
        for start in range(0, tensor.size_bytes, HASH_CHUNK_BYTES):
            digest.update(tensor.read_bytes(start, min(start + HASH_CHUNK_BYTES, tensor.size_bytes)))
        lines.append(f"{name} {digest.hexdigest()}\n")
        reporter.advance()
    reporter.finish()
    actual = hashlib.sha256("".join(lines).encode()).hexdigest()
    if actual == record.sha256:
        return []
    return [f"the tensors have changed since they were written: sha256 {actual[:12]}, not {record.sha256[:12]}"]


def compare(found: Contents, source: Contents, record: ConvertRecord | None, reporter: Reporter) -> tuple[Check, Check]:
    """The checks ``copies`` and ``error`` of two checkpoints of whatever formats."""
    coded = found.quantized.keys() | source.quantized.keys()
    given = {n: t for n, t in found.dense.items() if n in source.given}
    kept = {n: t for n, t in found.dense.items() if n not in coded | given.keys()}
    expected = {n: t for n, t in source.dense.items() if n not in coded and (n in kept or not _is_spare(n, t, coded))}
    cast = {n for n, t in kept.items() if n in expected and t.dtype != expected[n].dtype and not found.quantized}
    plain = {n: t for n, t in kept.items() if n not in cast}
    problems = copy_problems(plain, {n: t for n, t in expected.items() if n not in cast}, reporter)
    problems += [
        f"{n} is not the source's, rounded to {kept[n].dtype}"
        for n in sorted(cast)
        if not _is_cast(kept[n], expected[n])
    ]
    problems += [f"{n} of the source is lost" for n in source.given if n not in given]
    problems += [
        f"{n} is not the source's, rounded to {t.dtype}" for n, t in given.items() if not _is_given(t, source.given[n])
    ]
    size = sum(t.size_bytes for t in [*kept.values(), *given.values()])
    detail = f"{len(plain)} tensors equal to the source byte for byte, {len(cast)} rounded to another dtype"
    if source.given:
        detail = f"{len(given)} tensors equal to the source, rounded to their dtypes"
    copies = _check("copies", problems, f"{detail}; {size / 1e6:.1f} MB")
    return copies, _error(found, source, record, sorted(coded), reporter)


def _is_spare(name: str, tensor: StoredTensor, coded: Set[str]) -> bool:
    """Whether it is a bias of zeros beside a quantised weight, as AutoGPTQ gave every Linear."""
    if not name.endswith(".bias") or f"{name.removesuffix('bias')}weight" not in coded or tensor.dtype not in FLOATS:
        return False
    return not bool(to_float32(tensor.rows(), tensor.dtype).any())


def _is_cast(tensor: StoredTensor, original: StoredTensor) -> bool:
    if tensor.shape != original.shape or tensor.dtype not in FLOATS or original.dtype not in FLOATS:
        return False
    values = to_float32(original.rows(), original.dtype)
    return bool(np.array_equal(to_float32(tensor.rows(), tensor.dtype), rounded(values, tensor.dtype), equal_nan=True))


def _is_given(tensor: StoredTensor, original: Weight) -> bool:
    if tensor.shape != tuple(original.shape) or tensor.dtype not in FLOATS:
        return False
    return _distance(Plain(tensor), original, tensor.dtype)[0]


def rounded(values: Float32, dtype: str) -> Float32:
    """float32 values to the nearest of another dtype, half to even, as float32."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
        return bits.astype(np.uint32).view(np.float32)
    return values


def _error(
    found: Contents, source: Contents, record: ConvertRecord | None, names: Sequence[str], reporter: Reporter
) -> Check:
    allowed = {f"{r.name}.weight" for r in record.requantized} if record else set()
    problems: list[str] = []
    equal, errors = 0, {}
    reporter.start("comparing weights", len(names))
    for name in names:
        reporter.advance()
        after, before = _weight(found, name), _weight(source, name)
        if after is None or before is None:
            problems.append(f"{name} is not in the {'checkpoint' if after is None else 'source'}")
            continue
        if tuple(after.shape) != tuple(before.shape):
            problems.append(f"{name} is {list(after.shape)}, the source's {list(before.shape)}")
            continue
        dtype = after.tensor.dtype if isinstance(after, Plain) else ""
        same, error = _distance(after, before, dtype)
        equal += same
        if same:
            continue
        errors[name] = error
        if not error <= MAX_RELATIVE_ERROR:
            problems.append(f"{name} has relative error {error:.3g} against the source")
        elif name in source.quantized and name not in allowed and not (before.grain and error <= SLACK):
            problems.append(f"{name} differs from the source (relative error {error:.3g}), and is not on record for it")
    reporter.finish()
    detail = f"{equal} of {len(names)} weights equal the source's bit for bit"
    if not found.quantized:
        detail += ", rounded to the dtype"
    if errors:
        worst = max(errors, key=lambda n: errors[n] if math.isfinite(errors[n]) else math.inf)
        detail += f"; relative error of the others at most {errors[worst]:.4g} ({worst}); limit {MAX_RELATIVE_ERROR:g}"
    return _check("error", problems, detail)


def _weight(contents: Contents, name: str) -> Weight | None:
    if name in contents.quantized:
        return contents.quantized[name]
    tensor = contents.dense.get(name)
    return None if tensor is None or tensor.dtype not in FLOATS else Plain(tensor)


def _distance(after: Weight, before: Weight, dtype: str) -> tuple[bool, float]:
    """Whether the values are equal (those before rounded to ``dtype``), and ``||after - before|| / ||before||``."""
    rows, columns = after.shape[0], math.prod(after.shape[1:])
    step = max(32, STEP_ELEMENTS // max(columns, 1) // 32 * 32)
    same, squares, distance = True, 0.0, 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        with np.errstate(invalid="ignore", over="ignore"):
            a, b = after.rows(start, stop), before.rows(start, stop)
            good = (a == rounded(b, dtype)) | (bool(before.grain) & (rounded(a, before.grain) == b))
            same = same and bool(good.all())
            squares += float(np.sum(b.astype(np.float64) ** 2))
            distance += float(np.sum((a.astype(np.float64) - b) ** 2))
    return same, math.sqrt(distance / squares) if squares else (0.0 if distance == 0 else math.inf)


def reload_columns(folder: Path, contents: Contents, reporter: Reporter) -> Check:
    """The check ``reload`` of AutoAWQ's and AutoGPTQ's, which transformers loads with gptqmodel alone.

    Instead, its model of the config is filled with the reference decoder's dense weights: every name and shape must
    find its place, and logits of a few tokens be finite.
    """
    how = "transformers loads this format only with gptqmodel; its dense model takes the reference decoder's weights"
    reporter.start("reloading with transformers", 1)
    try:
        with quiet(), torch.no_grad():
            stored = Stored(folder=folder, tensors={}, modules=[])
            config = stored.config()
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            state = {n: as_torch(t) for n, t in contents.dense.items()}
            for m in contents.modules:
                weight = m.load()
                values = np.ascontiguousarray(weight.decode(0, weight.shape[0]).weight)
                state[f"{m.name}.weight"] = torch.from_numpy(values)
            like = model_class(config)
            model, info = like.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
            loaded = Loaded.of(model, info, stored)
            logits = model(torch.arange(8)[None], use_cache=False).logits
    except Exception as e:  # whatever transformers raises is the finding
        return Check(name="reload", status="failed", detail=how, problems=[first_line(e)])
    finally:
        reporter.finish()
    problems = loaded.problems + ([] if bool(torch.isfinite(logits).all()) else ["logits are not finite"])
    return _check("reload", problems, how)


def _check(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems)
