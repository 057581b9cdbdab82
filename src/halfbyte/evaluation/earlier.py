"""What earlier commands measured on the same two models: it stays in ``eval.json`` until it is measured anew.

The tables of a card are many hours of work, of several engines perhaps, so they are made by several commands. Averages
are over all rows of their category, so those of a category that a command adds to are reckoned again, from the samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluation.harness import Answered, weights_of
from halfbyte.evaluation.recovery import Stratum
from halfbyte.evaluation.results import averages_of, pairs_of
from halfbyte.evaluation_records import EVAL_NAME, EvalRecord, TaskResult
from halfbyte.progress import Reporter
from halfbyte.records import from_plain, read_record


def earlier(out: Path, digests: Mapping[str, str]) -> EvalRecord | None:
    """The record in ``out``.

    Args:
        digests: of the models ``base`` and ``checkpoint``.

    Raises:
        HalfbyteError: it cannot be read, or is of other models: neither is overwritten.
    """
    path = out / EVAL_NAME
    if not path.exists():
        return None
    record = read_record(EvalRecord, path)
    for side, recorded in (("checkpoint", record.checkpoint_sha256), ("base", record.base_sha256)):
        if recorded != digests[side]:
            named = {"checkpoint": record.checkpoint, "base": record.base}[side]
            raise UsageError(
                "it holds scores of other models",
                where=str(path),
                why=f"its {'baseline' if side == 'base' else side}, {named}, had other bytes (sha256 "
                f"{(recorded or 'none')[:12]}, now {digests[side][:12]})",
                remedy="Give --out FOLDER, or remove this file and the folder eval beside it.",
            )
    return record


def joined(
    before: EvalRecord | None, record: EvalRecord, pairs: list[list[Stratum]], out: Path, reporter: Reporter
) -> EvalRecord:
    """A command's record with what earlier ones measured and it did not, and with averages over both.

    Args:
        before: what lies in ``out``; record: the command's own, without averages; pairs: of its tasks.
    """
    if before is None:
        return dataclasses.replace(record, averages=averages_of(record.tasks, pairs))
    fresh = {(r.suite, r.task): (r, p) for r, p in zip(record.tasks, pairs, strict=True)}
    touched = {r.category for r in record.tasks} | {r.category for r in before.tasks if (r.suite, r.task) in fresh}
    rows, strata = [], []
    for old in before.tasks:
        row, found = fresh.pop((old.suite, old.task), (None, None))
        if row is None:
            row = dataclasses.replace(old, measured=before.measured(old))
            found = _pairs(old, out, reporter) if old.category in touched else []
        rows.append(row)
        strata.append(found or [])
    rows += [r for r, _ in fresh.values()]
    strata += [p for _, p in fresh.values()]
    anew = [(r, s) for r, s in zip(rows, strata, strict=True) if r.category in touched]
    averages = [a for a in before.averages if a.category not in touched]
    return dataclasses.replace(
        record,
        suites=[s for s in before.suites if s not in record.suites] + record.suites,
        tasks=rows,
        averages=averages + averages_of([r for r, _ in anew], [s for _, s in anew]),
        divergence=record.divergence or before.divergence,
        divergence_text=record.divergence_text or before.divergence_text,
        published=record.published or before.published,
    )


def _pairs(row: TaskResult, out: Path, reporter: Reporter) -> list[Stratum]:
    """A row's scores by document, from its samples; none where it enters no average."""
    if not row.is_share or not row.averaged:
        return []
    try:
        texts = [(out / row.samples[side]).read_text(encoding="utf-8") for side in ("base", "checkpoint")]
        base, value = ([from_plain(Answered, json.loads(line)) for line in t.splitlines()] for t in texts)
        return pairs_of(base, value, weights_of(base, row.base), row.task) if weights_of(value, row.value) else []
    except (OSError, ValueError, TypeError, KeyError, HalfbyteError) as e:
        reporter.say(f"{row.title} has no part in the average of {row.category}: its samples cannot be read ({e})")
        return []
