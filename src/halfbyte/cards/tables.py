"""Evaluation tables: rows of numbers from records, as text. Nothing is computed but quotients of two of them.

Scores are printed in percent with two digits (what is no share: as it is), recoveries with one, as most cards do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from halfbyte.evaluation.recovery import LEAST_BASE
from halfbyte.evaluation_records import AverageResult, Estimated, EvalRecord, PublishedTable, TaskResult, score_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table, ready to be printed."""

    category: str
    title: str
    base: str
    value: str
    recovery: str
    average: bool = False


def recovery_of(row: TaskResult | AverageResult) -> Estimated | None:
    """The record's recovery; where it has none, the quotient of its scores, if they are shares, without an interval."""
    found = row.recovery if isinstance(row, TaskResult) else row.ratio_of_averages
    if found is not None:
        return found
    if isinstance(row, TaskResult) and not row.is_share:
        return None
    return Estimated(value=100 * row.value / row.base) if row.base >= LEAST_BASE else None


def shown(found: Estimated | None, absent: str) -> str:
    """``99.4%``, with ``(98.9 – 99.9)`` where there is an interval."""
    if found is None:
        return absent
    text = f"{found.value:.1f}%"
    if found.low is not None and found.high is not None:
        text += f" ({found.low:.1f} – {found.high:.1f})"
    return text


def rows_of(record: EvalRecord, absent: str = "N/A", average: str = "Average") -> list[Row]:
    """Tasks under their categories, each average after the last task that it is over."""
    rows = []
    for category in dict.fromkeys(t.category for t in record.tasks):
        members = [t for t in record.tasks if t.category == category]
        means = [m for m in record.averages if m.category == category]
        for t in members:
            rows.append(row_of(t, t.title, absent))
            done = [m for m in means if m.tasks and m.tasks[-1] == t.task]
            rows += [row_of(m, average, absent) for m in done]
    return rows


def row_of(result: TaskResult | AverageResult, title: str, absent: str) -> Row:
    """One line of text."""
    share = not isinstance(result, TaskResult) or result.is_share
    return Row(
        category=result.category,
        title=title,
        base=score_text(result.base, share=share),
        value=score_text(result.value, share=share),
        recovery=shown(recovery_of(result), absent),
        average=isinstance(result, AverageResult),
    )


def published_record(
    base: str,
    checkpoint: str,
    rows: list[TaskResult],
    *,
    source: str,
    averages: Mapping[str, list[str]] | None = None,
    tables: list[PublishedTable] | None = None,
) -> EvalRecord:
    """A record of figures that somebody else has published, with the averages that follow from them.

    Args:
        rows: with ``base`` and ``value`` alone.
        source: where the figures were published.
        averages: category -> tasks that its average is over.
        tables: carried over from the base model's card.
    """
    means = []
    for category, tasks in (averages or {}).items():
        members = [r for r in rows if r.task in tasks and r.category == category]
        if len(members) != len(tasks):
            raise ValueError(f"{category}: not all of {', '.join(tasks)} have figures")
        means.append(
            AverageResult(
                category=category,
                tasks=list(tasks),
                base=sum(r.base for r in members) / len(members),
                value=sum(r.value for r in members) / len(members),
            )
        )
    return EvalRecord(
        format_version=1,
        base=base,
        checkpoint=checkpoint,
        base_sha256=None,
        checkpoint_sha256=None,
        suites=[],
        backend={"backend": "published", "source": source},
        limit=None,
        tasks=rows,
        averages=means,
        published=tables or [],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Discrepancy:
    """A recovery that somebody printed, and what follows from the scores beside it.

    ``rounding`` tells that scores which round to those printed could give it.
    """

    task: str
    printed: str
    computed: float
    rounding: bool


def discrepancies(record: EvalRecord, printed: Mapping[str, str], *, score_digits: int = 4) -> list[Discrepancy]:
    """Printed recoveries (``99.5%``, or ``0.9944``) that do not follow from the printed scores.

    Args:
        record: with the scores.
        printed: task (or the category of an average) -> recovery as printed; what is no number is left out.
        score_digits: decimals of the scores as shares: 4 for ``81.60`` percent.
    """
    found = []
    results: dict[str, TaskResult | AverageResult] = {t.task: t for t in record.tasks}
    results |= {m.category: m for m in record.averages}
    score_half = 0.5 * 10.0**-score_digits
    for name, text in printed.items():
        number = re.fullmatch(r"(\d+(?:\.(\d+))?)(%?)", text)
        result = results[name]
        computed = recovery_of(result)
        if number is None or computed is None:
            continue
        scale = 1.0 if number.group(3) else 100.0
        half = 0.5 * scale * 10.0 ** -len(number.group(2) or "") + 1e-9
        value = scale * float(number.group(1))
        if abs(computed.value - value) > half:
            low = 100 * (result.value - score_half) / (result.base + score_half)
            high = 100 * (result.value + score_half) / (result.base - score_half)
            rounding = low <= value + half and high >= value - half
            found.append(Discrepancy(task=name, printed=text, computed=computed.value, rounding=rounding))
    return found
