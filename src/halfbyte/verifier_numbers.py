"""The numbers in a checkpoint: scales, codes, copies and the distance from the source, streamed in slices.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfbyte.errors import CheckpointError
from halfbyte.progress import Reporter
from halfbyte.records import Check, PairRecord, SmoothingRecord, numbers_of
from halfbyte.reference import FLOATS, Decoded, Float32, StoredTensor, decode_rows, to_float32
from halfbyte.schemes import WeightFormat
from halfbyte.verifier_layout import QuantizedModule

CHUNK_BYTES = 16 << 20
CHUNK_ELEMENTS = 4 << 20
# Rounding every weight to zero gives 1; a useful quantisation stays far below, a wrong scale or row order far above.
MAX_RELATIVE_ERROR = 1.0
# How far the size of a divided row may be from the source's over the recorded factor; codes of fewer bits than that
# shrink rows by themselves.
MAX_ROW_RATIO = 1.5
LEAST_BITS = 4
# How far a norm that was tuned may be from the source's, as a share of its size. A tuning ends within a tenth.
MAX_NORM_CHANGE = 0.25


@dataclass(frozen=True, slots=True)
class Traded:
    """What became of a weight before it was rounded: its columns multiplied, its rows divided; ``None`` for neither."""

    columns: Float32 | None = None
    rows: Float32 | None = None

    def of(self, weight: np.ndarray[Any, np.dtype[np.float64]], start: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """It, for some rows of the source's weight, the first of which is row ``start``."""
        weight = weight if self.columns is None else weight * self.columns
        return weight if self.rows is None else weight / self.rows[start : start + len(weight), None]


def scan(
    modules: Sequence[QuantizedModule],
    source: Mapping[str, StoredTensor] | None,
    unread: int,
    traded: Mapping[str, Traded],
    reporter: Reporter,
    *,
    signed: bool = False,
) -> tuple[Check, Check, Check]:
    """Decode every module once, in slices of rows: the checks ``scales``, ``codes`` and ``error``.

    Args:
        modules: those whose tensors fit together.
        source: dense tensors by name, or ``None``.
        unread: how many modules are left out, for the details.
        signed: whether scales may be negative or zero, as those that came from another format.
        traded: by module, the factors that it took or gave.
    """
    scale_problems: list[str] = []
    code_problems: list[str] = []
    error_problems: list[str] = []
    errors: dict[str, float] = {}
    reporter.start("decoding", len(modules))
    for m in modules:
        dense = source.get(f"{m.name}.weight") if source else None
        try:
            scales, codes, error, rows = _scan_one(m, dense, traded.get(m.name, Traded()), signed=signed)
        except (CheckpointError, OSError) as e:
            code_problems.append(f"{m.name} cannot be decoded: {e}")
            continue
        finally:
            reporter.advance()
        scale_problems += scales
        code_problems += codes
        error_problems += rows
        if error is not None:
            errors[m.name] = error
            if not error <= MAX_RELATIVE_ERROR:
                error_problems.append(f"{m.name} has relative error {error:.3g} against the source")
    reporter.finish()
    left_out = f"; {unread} not read" if unread else ""
    counted = f"{len(modules)} modules{left_out}"
    sign = "" if signed else " and positive"
    scales_check = _outcome("scales", scale_problems, f"finite{sign} in {counted}", empty=not modules)
    codes_check = _outcome("codes", code_problems, f"within range in {counted}", empty=not modules)
    if source is None:
        return scales_check, codes_check, Check(name="error", status="skipped", detail="no source was given (--source)")
    detail = f"no module to compare{left_out}"
    if errors:
        worst = max(errors, key=lambda n: errors[n] if math.isfinite(errors[n]) else math.inf)
        mean = sum(errors.values()) / len(errors)
        detail = f"relative error: mean {mean:.4f}, worst {errors[worst]:.4f} ({worst}); limit {MAX_RELATIVE_ERROR:g}"
    return scales_check, codes_check, _outcome("error", error_problems, detail, empty=not errors)


def _outcome(name: str, problems: list[str], detail: str, *, empty: bool) -> Check:
    status = "failed" if problems else "skipped" if empty else "passed"
    return Check(name=name, status=status, detail="nothing could be read" if empty else detail, problems=problems)


def _scan_one(
    module: QuantizedModule, dense: StoredTensor | None, traded: Traded, *, signed: bool
) -> tuple[list[str], list[str], float | None, list[str]]:
    """Problems of the scales and of the codes; where ``dense`` is comparable, the relative error and problems of rows
    that were divided."""
    assert module.group is not None
    assert module.group.format is not None
    fmt, parts = module.group.format, module.parts
    scale = parts["weight_scale"]
    values = to_float32(scale.rows(), scale.dtype)
    bad_scales = _scale_problems(scale.name, values, signed=signed)
    body = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    out_features = body.shape[0]
    in_features = int(parts["weight_shape"].rows()[1]) if "weight_shape" in parts else body.shape[1]
    comparable = dense is not None and dense.shape == (out_features, in_features) and dense.dtype in FLOATS
    step = max(8, CHUNK_ELEMENTS // max(in_features, 1) // 8 * 8)
    bad_codes: dict[str, None] = {}
    squares = distance = 0.0
    misscaled: list[int] = []
    for start in range(0, out_features, step):
        with np.errstate(invalid="ignore", over="ignore"):
            decoded = decode_rows(parts, fmt, start, min(start + step, out_features))
        bad_codes.update(dict.fromkeys(_code_problems(module.name, decoded, fmt)))
        if dense is not None and comparable:
            weight = to_float32(dense.rows(start, start + step), dense.dtype).astype(np.float64)
            weight = traded.of(weight, start)
            squares += float(np.sum(weight**2))
            with np.errstate(invalid="ignore", over="ignore"):
                distance += float(np.sum((decoded.weight - weight) ** 2))
            if traded.rows is not None and fmt.num_bits >= LEAST_BITS:
                misscaled += [start + int(i) for i in _misscaled(decoded.weight, weight)]
    if not comparable:
        return bad_scales, list(bad_codes), None, []
    error = math.sqrt(distance / squares) if squares else (0.0 if distance == 0 else math.inf)
    named = f"{module.name}: rows are not the source's over the recorded factors: {len(misscaled)}, such as "
    return bad_scales, list(bad_codes), error, [f"{named}{misscaled[0]}"] if misscaled else []


def _misscaled(decoded: Float32, weight: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows that would be nearer to the weight if they were larger or smaller by more than :data:`MAX_ROW_RATIO`.

    The best multiple of a decoded row q is ``<q, w> / <q, q>`` times it.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        product, energy = np.sum(decoded * weight, axis=1), np.sum(decoded.astype(np.float64) ** 2, axis=1)
        ratio = product / energy
        sound = (ratio < MAX_ROW_RATIO) & (ratio > 1 / MAX_ROW_RATIO)
    return np.flatnonzero((energy > 0) & (np.sum(weight**2, axis=1) > 0) & ~sound)


def _scale_problems(name: str, values: Float32, *, signed: bool) -> list[str]:
    counts = {
        "not finite": int(np.count_nonzero(~np.isfinite(values))),
        "negative": int(np.count_nonzero(values < 0)),
        "zero": int(np.count_nonzero(values == 0)),
    }
    counts = {"not finite": counts["not finite"]} if signed else counts
    return [f"{name}: {n} of {values.size} scales are {what}" for what, n in counts.items() if n]


def _code_problems(name: str, decoded: Decoded, fmt: WeightFormat) -> list[str]:
    problems = []
    if fmt.kind == "float":
        if np.isnan(decoded.codes).any():
            problems.append(f"{name}.weight holds NaN codes")
    elif decoded.codes.size and (decoded.codes.min() < fmt.q_min or decoded.codes.max() > fmt.q_max):
        problems.append(f"{name}.weight holds codes outside {fmt.q_min}..{fmt.q_max}")
    zeros = decoded.zero_points
    if zeros is not None and zeros.size and (zeros.min() < fmt.q_min or zeros.max() > fmt.q_max):
        problems.append(f"{name}.weight_zero_point holds values outside {fmt.q_min}..{fmt.q_max}")
    return problems


def smoothing_factors(
    smoothing: Sequence[SmoothingRecord], found: Mapping[str, StoredTensor], source: Mapping[str, StoredTensor]
) -> tuple[dict[str, Float32], list[str]]:
    """By module what its columns were multiplied by, from the gains of both checkpoints; and what is wrong with these.

    ``s = (offset + weight) / (offset + weight')``, 1 where both are zero.
    """
    factors: dict[str, Float32] = {}
    problems = []
    for record in smoothing:
        old, new = source.get(record.norm), found.get(record.norm)
        if old is None or new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            problems.append(f"{record.norm} is not as in the source in dtype and shape")
            continue
        before = to_float32(old.rows(), old.dtype) + np.float32(record.offset)
        after = to_float32(new.rows(), new.dtype) + np.float32(record.offset)
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where((before == 0) & (after == 0), np.float32(1), before / after)
        if not (np.isfinite(s) & (s > 0)).all():
            problems.append(f"{record.norm} has gains that vanish, change sign or are not finite")
            continue
        factors |= dict.fromkeys(record.linears, s)
    return factors, problems


def tuned_norm_problems(
    names: Sequence[str], found: Mapping[str, StoredTensor], source: Mapping[str, StoredTensor]
) -> list[str]:
    """What is wrong with norms that were tuned: no vectors, not the source's in dtype and shape, or too far from it."""
    problems = []
    for name in names:
        old, new = source.get(name), found.get(name)
        if old is None or new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            problems.append(f"{name} is not as in the source in dtype and shape")
            continue
        if len(old.shape) != 1 or old.dtype not in FLOATS:
            problems.append(f"{name} is recorded as a norm that was tuned, and is no vector of floats")
            continue
        before, after = (to_float32(t.rows(), t.dtype).astype(np.float64) for t in (old, new))
        with np.errstate(invalid="ignore", over="ignore"):
            change, size = float(np.linalg.norm(after - before)), float(np.linalg.norm(before))
        if not change <= MAX_NORM_CHANGE * size:
            share = change / size if size else math.inf
            problems.append(f"{name} is recorded as tuned, which does not move it by {share:.3g} of its size")
    return problems


def pair_factors(
    pairs: Sequence[PairRecord],
    found: Mapping[str, StoredTensor],
    source: Mapping[str, StoredTensor],
    known: Mapping[str, Float32],
) -> tuple[dict[str, Traded], set[str], list[str]]:
    """By module what was traded, by recorded factors and by those of norms; the biases divided; and what is wrong.

    Args:
        pairs: as recorded.
        found, source: tensors of the checkpoint and of what it was made from.
        known: of modules behind a smoothed norm: what their columns were multiplied by.
    """
    traded = {name: Traded(columns=s) for name, s in known.items()}
    biases: set[str] = set()
    problems = []
    for record in pairs:
        weights = [source.get(f"{n}.weight") for n in (record.source, *record.linears)]
        shapes = [w.shape for w in weights if w is not None and len(w.shape) == 2]
        if not record.linears or len(shapes) != len(weights):
            problems.append(f"{record.source} is recorded as divided, but the source has no such weights")
            continue
        try:
            rows = np.frombuffer(base64.b64decode(record.factors, validate=True), "<f4")
            channels = np.array(numbers_of(record.channels, shapes[1][1]), np.int64)
        except ValueError as e:
            problems.append(f"{record.source} is recorded as divided by what cannot be read: {e}")
            continue
        widths = {shape[1] for shape in shapes[1:]}
        fits = len(rows) == shapes[0][0] and widths == {len(channels)} and channels.max(initial=-1) < len(rows)
        if not fits or not (np.isfinite(rows) & (rows > 0)).all():
            problems.append(f"{record.source} is recorded as divided by factors that do not fit its rows")
            continue
        columns = np.where(channels < 0, np.float32(1), rows[channels])
        traded[record.source] = replace(traded.get(record.source, Traded()), rows=rows)
        for name in record.linears:
            traded[name] = replace(traded.get(name, Traded()), columns=columns)
        bias = f"{record.source}.bias"
        if bias in source:
            biases.add(bias)
            problems += _bias_problems(source[bias], found.get(bias), rows)
    return traded, biases, problems


def _bias_problems(old: StoredTensor, new: StoredTensor | None, rows: Float32) -> list[str]:
    if new is None or (old.dtype, old.shape) != (new.dtype, new.shape) or old.shape != rows.shape:
        return [f"{old.name} is not as in the source in dtype and shape"]
    if not np.array_equal(to_float32(old.rows(), old.dtype) / rows, to_float32(new.rows(), new.dtype)):
        return [f"{old.name} is not the source's over the recorded factors"]
    return []


def copy_problems(
    kept: Mapping[str, StoredTensor], expected: Mapping[str, StoredTensor], reporter: Reporter
) -> list[str]:
    """Tensors that were to be copied and are not byte for byte those of the source, by name, dtype, shape and data."""
    problems = [f"{n} of the source is lost" for n in expected if n not in kept]
    problems += [f"{n} is not in the source" for n in kept if n not in expected]
    reporter.start("comparing copies", len(kept))
    for name, tensor in kept.items():
        reporter.advance()
        if name not in expected:
            continue
        other = expected[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            was, now = f"{other.dtype} {list(other.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
            problems.append(f"{name} was {was} in the source and is {now}")
            continue
        at = _first_difference(tensor, other)
        if at is not None:
            problems.append(f"{name} differs from the source from byte {at} of {tensor.size_bytes} on")
    reporter.finish()
    return problems


def _first_difference(a: StoredTensor, b: StoredTensor) -> int | None:
    for start in range(0, a.size_bytes, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, a.size_bytes)
        left, right = a.read_bytes(start, stop), b.read_bytes(start, stop)
        if left != right:
            pairs = np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8)
            return start + int(np.argmax(pairs))
    return None
