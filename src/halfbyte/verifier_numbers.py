"""The numbers in a checkpoint: scales, codes, copies and the distance from the source, streamed in slices.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from halfbyte.errors import CheckpointError
from halfbyte.progress import Reporter
from halfbyte.records import Check, SmoothingRecord
from halfbyte.reference import FLOATS, Decoded, Float32, StoredTensor, decode_rows, to_float32
from halfbyte.schemes import WeightFormat
from halfbyte.verifier_layout import QuantizedModule

CHUNK_BYTES = 16 << 20
CHUNK_ELEMENTS = 4 << 20
# Rounding every weight to zero gives 1; a useful quantisation stays far below, a wrong scale or row order far above.
MAX_RELATIVE_ERROR = 1.0


def scan(
    modules: Sequence[QuantizedModule],
    source: Mapping[str, StoredTensor] | None,
    unread: int,
    factors: Mapping[str, Float32],
    reporter: Reporter,
) -> tuple[Check, Check, Check]:
    """Decode every module once, in slices of rows: the checks ``scales``, ``codes`` and ``error``.

    Args:
        modules: those whose tensors fit together.
        source: dense tensors by name, or ``None``.
        unread: how many modules are left out, for the details.
        factors: of modules behind a smoothed norm: what each column of the source was multiplied by.
    """
    scale_problems: list[str] = []
    code_problems: list[str] = []
    error_problems: list[str] = []
    errors: dict[str, float] = {}
    reporter.start("decoding", len(modules))
    for m in modules:
        dense = source.get(f"{m.name}.weight") if source else None
        try:
            scales, codes, error = _scan_one(m, dense, factors.get(m.name))
        except (CheckpointError, OSError) as e:
            code_problems.append(f"{m.name} cannot be decoded: {e}")
            continue
        finally:
            reporter.advance()
        scale_problems += scales
        code_problems += codes
        if error is not None:
            errors[m.name] = error
            if not error <= MAX_RELATIVE_ERROR:
                error_problems.append(f"{m.name} has relative error {error:.3g} against the source")
    reporter.finish()
    left_out = f"; {unread} not read" if unread else ""
    counted = f"{len(modules)} modules{left_out}"
    scales_check = _outcome("scales", scale_problems, f"finite and positive in {counted}", empty=not modules)
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
    module: QuantizedModule, dense: StoredTensor | None, factors: Float32 | None
) -> tuple[list[str], list[str], float | None]:
    """Problems of the scales and of the codes, and the relative error where ``dense`` is comparable."""
    assert module.group is not None
    assert module.group.format is not None
    fmt, parts = module.group.format, module.parts
    scale = parts["weight_scale"]
    values = to_float32(scale.rows(), scale.dtype)
    bad_scales = _scale_problems(scale.name, values)
    body = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    out_features = body.shape[0]
    in_features = int(parts["weight_shape"].rows()[1]) if "weight_shape" in parts else body.shape[1]
    comparable = dense is not None and dense.shape == (out_features, in_features) and dense.dtype in FLOATS
    step = max(8, CHUNK_ELEMENTS // max(in_features, 1) // 8 * 8)
    bad_codes: dict[str, None] = {}
    squares = distance = 0.0
    for start in range(0, out_features, step):
        with np.errstate(invalid="ignore", over="ignore"):
            decoded = decode_rows(parts, fmt, start, min(start + step, out_features))
        bad_codes.update(dict.fromkeys(_code_problems(module.name, decoded, fmt)))
        if dense is not None and comparable:
            weight = to_float32(dense.rows(start, start + step), dense.dtype).astype(np.float64)
            weight = weight if factors is None else weight * factors
            squares += float(np.sum(weight**2))
            with np.errstate(invalid="ignore", over="ignore"):
                distance += float(np.sum((decoded.weight - weight) ** 2))
    if not comparable:
        return bad_scales, list(bad_codes), None
    error = math.sqrt(distance / squares) if squares else (0.0 if distance == 0 else math.inf)
    return bad_scales, list(bad_codes), error


def _scale_problems(name: str, values: Float32) -> list[str]:
    counts = {
        "not finite": int(np.count_nonzero(~np.isfinite(values))),
        "negative": int(np.count_nonzero(values < 0)),
        "zero": int(np.count_nonzero(values == 0)),
    }
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
