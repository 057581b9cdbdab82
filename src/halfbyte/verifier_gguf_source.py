"""``verify OUT --source X.gguf``: what was made from a GGUF, against the file as the gguf package decodes it.

Part of :mod:`halfbyte.verifier_gguf`. Here the other side is rounded: a tensor of the checkpoint has to be the file's
float32 values, rows in transformers' order and Gemma's 1 taken away, rounded to its dtype; a quantised one has to
decode to them exactly unless convert.json lists it.
"""

from __future__ import annotations

import math

import numpy as np

from halfbyte.progress import Reporter
from halfbyte.records import Check, ConvertRecord
from halfbyte.reference import FLOATS
from halfbyte.verifier_converted import Contents, Plain, Weight, rounded
from halfbyte.verifier_gguf import (
    MADE,
    STEP_ELEMENTS,
    GgufOriginal,
    check_of,
    named,
    one_added,
    turn,
    turned_heads,
)
from halfbyte.verifier_numbers import MAX_RELATIVE_ERROR


def compare_with_original(
    found: Contents, original: GgufOriginal, record: ConvertRecord | None, reporter: Reporter
) -> tuple[Check, Check]:
    """The checks ``copies`` and ``error``."""
    allowed = {f"{r.name}.weight" for r in record.requantized} if record else set()
    copies: list[str] = []
    codes: list[str] = []
    used = set(MADE)
    equal = 0
    names = [*found.dense, *found.quantized]
    reporter.start("comparing weights", len(names))
    for name, held, expert in named(names, original.metadata):
        reporter.advance()
        coded = name in found.quantized
        into = codes if coded else copies
        if held is None or held not in original.tensors:
            into.append(f"{name} stands for no tensor of the source")
            continue
        used.add(held)
        tensor = None if coded else found.dense[name]
        if tensor is not None and tensor.dtype not in FLOATS:
            into.append(f"{name} is {tensor.dtype}, and the source's is a number")
            continue
        weight: Weight = found.quantized[name] if tensor is None else Plain(tensor)
        dtype = "" if tensor is None else tensor.dtype
        same, error = _distance(weight, dtype, original, held, expert)
        equal += same
        if not same and (not coded or name not in allowed or not error <= MAX_RELATIVE_ERROR):
            into.append(f"{name} differs from the source's {held} (relative error {error:.3g})")
    reporter.finish()
    seen = [n for n in original.tensors if n not in used and not (_in_tower(n) and not _sees(names))]
    copies += [f"{n} of the source is lost" for n in seen]
    detail = (
        f"{equal} of {len(names)} tensors are the source's, as the gguf package decodes it, rounded to their dtypes"
    )
    return check_of("copies", copies, detail), check_of(
        "error", codes, f"{len(found.quantized)} quantised weights; {len(allowed)} on record as rounded again"
    )


def _in_tower(held: str) -> bool:
    return held.startswith(("v.", "mm."))


def _sees(names: list[str]) -> bool:
    return any("vision" in n for n in names)


def _distance(weight: Weight, dtype: str, original: GgufOriginal, held: str, expert: int | None) -> tuple[bool, float]:
    """Whether a weight has the values of a GGUF tensor, and ``||w - v|| / ||v||``."""
    shape, tensor = tuple(weight.shape), original.tensors[held]
    if math.prod(tensor.shape[1:] if expert is not None else tensor.shape) != math.prod(shape):
        return False, math.inf
    vector = len(shape) == 1
    rows = 1 if vector else shape[0]
    heads = turned_heads(held, original.metadata)
    width = rows // heads if heads and not vector else 1
    step = max(1, STEP_ELEMENTS // (math.prod(shape) // rows) // width) * width
    plus = np.float32(1 if one_added(held, original.metadata) else 0)
    same, squares, distance = True, 0.0, 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        ours = weight.rows(start, shape[0] if vector else stop).reshape(stop - start, -1)
        if heads:
            ours = turn(ours, heads if vector else (stop - start) // width, vector)
        theirs = tensor.rows(start, stop, expert).reshape(ours.shape)
        values = np.ascontiguousarray(theirs - plus)
        # A small w does not survive 1 + w in float32: then the file cannot say more than that it was added.
        good = (ours == rounded(values, dtype)) | (ours + plus == theirs)
        same = same and bool(good.all())
        squares += float(np.sum(values.astype(np.float64) ** 2))
        distance += float(np.sum((ours.astype(np.float64) - values) ** 2))
    return same, math.sqrt(distance / squares) if squares else (0.0 if distance == 0 else math.inf)
