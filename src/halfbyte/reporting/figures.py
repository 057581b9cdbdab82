"""What the page draws, as positions on axes: from records to numbers between 0 and 100, without any drawing.

Axes are chosen from the data; each figure also carries the numbers themselves, for the tables beside the drawings.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from halfbyte.cards.tables import recovery_of
from halfbyte.evaluation_records import AverageResult, EvalRecord, TaskResult
from halfbyte.records import CompareRecord, Manifest

NOTHING_BELOW = 1e-6
BINS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear axis; ``ticks`` are values with their positions in percent of its length."""

    low: float
    high: float
    ticks: list[tuple[str, float]]

    def at(self, value: float) -> float:
        """Position of a value in percent, kept on the axis."""
        return min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryLine:
    """One task or average: where its dot and its interval are, and its numbers as text."""

    title: str
    average: bool
    dot: float
    left: float | None
    width: float | None
    value: str
    interval: str
    base: str
    score: str
    flips: str
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryFigure:
    """Recoveries with intervals; ``full`` is the position of 100 %."""

    axis: Axis
    full: float
    lines: list[RecoveryLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Windows of text by their mean KL: ``bars`` are (height in percent, label)."""

    bars: list[tuple[float, str]]
    axis: Axis
    marks: list[tuple[str, float]]
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGrid:
    """Linears by block and kind.

    Attributes:
        kinds: rows; kind_bits: bits a weight of each row, as text; blocks: columns.
        cells: row by row, ``None`` for what is absent, else (strength 0 to 100, label, bits a weight).
        low, high: errors at strengths 0 and 100, on a logarithmic scale.
        worst: name and error of the largest.
        bits: distinct bits a weight, with how many Linears have them.
    """

    kinds: list[str]
    kind_bits: list[str]
    blocks: list[int]
    cells: list[list[tuple[float, str, float] | None]]
    low: float
    high: float
    worst: list[tuple[str, float]]
    bits: list[tuple[float, int]] = field(default_factory=list)


def axis_over(low: float, high: float, unit: str = "") -> Axis:
    """An axis with round ticks, a few, that holds both ends."""
    if not high > low:
        low, high = low - 1, high + 1
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    count = round((last - first) / step)
    ticks = [(f"{first + i * step:.{digits}f}{unit}", 100 * i / count) for i in range(count + 1)]
    return Axis(low=first, high=last, ticks=ticks)


def recovery_figure(record: EvalRecord) -> RecoveryFigure | None:
    """Tasks, then averages; ``None`` where none has a recovery."""
    results: list[TaskResult | AverageResult] = [*record.tasks, *record.averages]
    found = [(r, recovery_of(r)) for r in results]
    usable = [(r, e) for r, e in found if e is not None]
    if not usable:
        return None
    ends = [100.0] + [v for _, e in usable for v in (e.value, e.low, e.high) if v is not None]
    # One task with few right answers must not squeeze all others into a point.
    axis = axis_over(max(min(ends), 50.0), min(max(ends), 150.0), "%")
    lines = []
    for r, e in usable:
        has = e.low is not None and e.high is not None
        left = axis.at(e.low) if e.low is not None and has else None
        width = axis.at(e.high) - left if left is not None and e.high is not None else None
        task = isinstance(r, TaskResult)
        lines.append(
            RecoveryLine(
                title=r.title if isinstance(r, TaskResult) else f"{r.category}: average",
                average=not task,
                dot=axis.at(e.value),
                left=left,
                width=width,
                value=f"{e.value:.1f}%",
                interval=f"{e.low:.1f} – {e.high:.1f}" if has else "",
                base=f"{100 * r.base:.2f}",
                score=f"{100 * r.value:.2f}",
                flips=f"{r.right_to_wrong} / {r.wrong_to_right}"
                if isinstance(r, TaskResult) and r.right_to_wrong is not None
                else "",
                verdict=r.verdict or "",
            )
        )
    return RecoveryFigure(axis=axis, full=axis.at(100.0), lines=lines)


def histogram(record: CompareRecord) -> Histogram | None:
    """How the divergence is spread over the windows of the text; ``None`` for records without windows."""
    values = [w.kl / w.tokens for w in record.by_window if w.tokens]
    if len(values) < 2:
        return None
    axis = axis_over(min(values), max(max(values), NOTHING_BELOW))
    bins = min(BINS, max(5, 2 * math.isqrt(len(values))))
    counts = [0] * bins
    for v in values:
        counts[min(bins - 1, int(bins * axis.at(v) / 100))] += 1
    edges = [axis.low + i * (axis.high - axis.low) / bins for i in range(bins + 1)]
    labels = [f"{a:.4g} to {b:.4g} nats: {n} windows" for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    bars = [(100 * n / max(counts), label) for n, label in zip(counts, labels, strict=True)]
    mean = record.metrics["kl_mean"]
    return Histogram(bars=bars, axis=axis, marks=[(f"mean {mean:.4f}", axis.at(mean))], windows=len(values))


def layer_grid(manifest: Manifest) -> LayerGrid | None:
    """Errors of all Linears, experts of a layer as their worst; ``None`` where none is known."""
    by_cell: dict[tuple[str, int], tuple[float, float]] = {}
    worst = []
    bits: dict[float, int] = {}
    for linear in manifest.linears:
        bits[round(linear.bits_per_weight, 3)] = bits.get(round(linear.bits_per_weight, 3), 0) + 1
        if not math.isfinite(linear.relative_error):
            continue
        worst.append((linear.name, linear.relative_error))
        key = (kind_of(linear.name, linear.block), linear.block)
        if key not in by_cell or by_cell[key][0] < linear.relative_error:
            by_cell[key] = (linear.relative_error, linear.bits_per_weight)
    if not by_cell:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in by_cell))
    blocks = sorted({block for _, block in by_cell})
    errors = [max(e, NOTHING_BELOW) for e, _ in by_cell.values()]
    low, high = min(errors), max(errors)
    span = math.log(high / low) or 1.0
    cells: list[list[tuple[float, str, float] | None]] = []
    for kind in kinds:
        row: list[tuple[float, str, float] | None] = []
        for block in blocks:
            cell = by_cell.get((kind, block))
            if cell is None:
                row.append(None)
                continue
            strength = 100 * math.log(max(cell[0], NOTHING_BELOW) / low) / span
            row.append((strength, f"block {block}, {kind}: error {cell[0]:.3g}, {cell[1]:.2f} bits", cell[1]))
        cells.append(row)
    worst.sort(key=lambda item: -item[1])
    return LayerGrid(
        kinds=kinds,
        kind_bits=[_range_of([c[2] for c in row if c is not None]) for row in cells],
        blocks=blocks,
        cells=cells,
        low=low,
        high=high,
        worst=worst[:5],
        bits=sorted(bits.items()),
    )


def _range_of(bits: list[float]) -> str:
    ends = dict.fromkeys(f"{b:.2f}" for b in (min(bits), max(bits)))
    return " – ".join(ends)


def kind_of(name: str, block: int) -> str:
    """A Linear's name without its block's number, and without an expert's."""
    tail = re.split(rf"\.{block}\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+\.", ".", tail)


def speed_rows(bench: Any) -> list[list[str]]:
    """Rows of ``bench.json``: target, clients, tokens a second, first token, memory."""
    rows = []
    for server in bench.get("measured", []) if isinstance(bench, dict) else []:
        for level in server.get("levels", []):
            memory = server.get("memory_bytes")
            rows.append(
                [
                    str(server.get("target", "")).rstrip("/").split("/")[-1],
                    str(level.get("clients", "")),
                    f"{level.get('tokens_per_s', 0):.1f}",
                    f"{1000 * level.get('first_token_s', 0):.0f} ms",
                    "" if memory is None else f"{memory / 1e9:.2f} GB",
                ]
            )
    return rows
