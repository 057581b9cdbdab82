"""``SPEC*WEIGHT+SPEC*WEIGHT``: several sources, interleaved by weight.

A ``+`` separates two sources only where the name of a source follows it, and a part ends in a weight only where ``*``
and a number end it; a weight not given is 1. Where what would be taken apart is the path of something that exists, it
is left whole, so files may have any names. Weights are divided by their sum.

``samples`` are dealt out in proportion (largest remainders first), each part draws its own with the same seed, and
sample ``k`` of a part with ``n`` stands at ``(k + 1/2) / n`` of the way: sources alternate evenly, in an order that
follows from the counts alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.calibration.request import Found, Request
from halfbyte.errors import UsageError

WEIGHT = re.compile(r"\*(-?(?:\d+\.?\d*|\.\d+|inf|nan))$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source of a mixture: its spec and its share of the samples, which all parts' add up to 1."""

    spec: str
    share: float


def parts_of(spec: str, names: Collection[str]) -> list[Part]:
    """A spec taken apart; a plain one is its only part.

    Args:
        spec: as given with ``--calibration``.
        names: of all sources.

    Raises:
        UsageError: a weight is negative or not finite, or none is above zero.
    """
    if _there(spec, names):
        return [Part(spec=spec, share=1.0)]
    start = re.compile(r"\+(?=(?:" + "|".join(map(re.escape, names)) + r")(?:[:*+]|$))")
    pieces: list[str] = []
    for piece in start.split(spec):
        whole = f"{pieces[-1]}+{piece}" if pieces else piece
        if pieces and _there(whole, names):
            pieces[-1] = whole
        else:
            pieces.append(piece)
    weighed = [(p, 1.0) if _there(p, names) else _weighed(p) for p in pieces]
    total = sum(w for _, w in weighed)
    if any(w < 0 or not math.isfinite(w) for _, w in weighed) or total <= 0:
        raise UsageError(
            f"weights must be numbers from 0 on, not all 0: {spec!r}",
            where="--calibration",
            remedy="For example hf:DATASET*0.5+vlm:FOLDER*0.5.",
        )
    return [Part(spec=s, share=w / total) for s, w in weighed]


def _there(spec: str, names: Collection[str]) -> bool:
    """Whether it is one source whose argument is the path of something."""
    name, _, argument = spec.partition(":")
    try:
        return name in names and argument != "" and Path(argument).exists()
    except (OSError, ValueError):  # too long for a path, or not one at all
        return False


def _weighed(piece: str) -> tuple[str, float]:
    found = WEIGHT.search(piece)
    return (piece, 1.0) if found is None else (piece[: found.start()], float(found[1]))


def counts(shares: Sequence[float], samples: int) -> list[int]:
    """``samples`` in proportion to ``shares``: rounded down, and the rest to the largest remainders."""
    exact = [share * samples for share in shares]
    whole = [math.floor(e + 1e-9) for e in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_rest[: samples - sum(whole)]:
        whole[i] += 1
    return whole


def mixed(parts: Sequence[tuple[Callable[[Request], Found], str, float]], request: Request) -> Found:
    """Draw from every part (function, argument, share) and interleave."""
    wanted = counts([share for _, _, share in parts], request.samples)
    found = [
        (n, function(replace(request, argument=argument, samples=n)))
        for (function, argument, _), n in zip(parts, wanted, strict=True)
        if n
    ]
    places = sorted(
        ((k + 0.5) / len(f.sequences), i, k) for i, (_, f) in enumerate(found) for k in range(len(f.sequences))
    )
    pictured = {at: found[i][1].pictured[k] for at, (_, i, k) in enumerate(places) if k in found[i][1].pictured}
    return Found(
        sequences=[found[i][1].sequences[k] for _, i, k in places],
        pictured=pictured,
        description=f"{len(found)} sources interleaved: " + "; ".join(f.description for _, f in found),
    )
