"""``eval.json``: what an evaluation found, task by task. Every number of a card's or report's tables is from here.

Scores are as lm-eval has them, nearly always shares (0 to 1); recoveries are percent. Bounds of intervals are ``None``
where there are none, as in records that were made from figures that somebody published without them. Never imports
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EVAL_NAME = "eval.json"
EVAL_FOLDER = "eval"


def is_share(score: float, higher_is_better: bool) -> bool:
    """Whether a score is a share of what there was to get, rather than an error, a perplexity or BLEU points."""
    return higher_is_better and 0 <= score <= 1


def score_text(score: float, *, share: bool) -> str:
    """A score for a table: in percent where it is a share, else as it is."""
    return f"{100 * score:.2f}" if share else f"{score:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """A number and its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How and when a row was measured.

    Attributes:
        backend: what ran the models, with its options; versions: of packages.
        limit: documents a task, at most; ``None`` for all.
        date: ISO 8601, UTC; ``None`` where it is not known.
    """

    backend: dict[str, Any]
    limit: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One row of a table.

    Attributes:
        suite: as asked for; category: the heading that the row stands under.
        task: lm-eval's name (or ``humaneval`` and the like); title: what people call it; shots: examples in the prompt.
        metric: with its filter where that matters (``exact_match,strict-match``).
        base, value: scores of baseline and checkpoint.
        higher_is_better: false for errors and perplexities.
        averaged: whether it enters its category's average.
        documents: how many were answered.
        recovery, difference and the fields after them: see :class:`halfbyte.evaluation.recovery.Recovery`.
        config_sha256: of the task's configuration, its documents included.
        settings: chat template, few-shot turns, generation: what shaped the prompts and answers.
        command: what reproduces the checkpoint's score.
        samples: files with every document's score, relative to the record's folder: ``base`` and ``checkpoint``.
        note: why something is missing.
        measured: of rows that an earlier command left, how that measured them; ``None``: as the record says.
    """

    suite: str
    category: str
    task: str
    title: str
    metric: str
    base: float
    value: float
    shots: int | None = None
    higher_is_better: bool = True
    averaged: bool = True
    documents: int | None = None
    recovery: Estimated | None = None
    difference: Estimated | None = None
    difference_se: float | None = None
    unpaired_se: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    mcnemar_p: float | None = None
    flips_high: float | None = None
    verdict: str | None = None
    config_sha256: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    samples: dict[str, str] = field(default_factory=dict)
    note: str | None = None
    measured: Measured | None = None

    @property
    def is_share(self) -> bool:
        """Whether the scores are shares of what there was to get: only these have recoveries, and print in percent."""
        return is_share(self.base, self.higher_is_better) and is_share(self.value, self.higher_is_better)


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageResult:
    """Tasks of one category as one; see :class:`halfbyte.evaluation.recovery.Average`."""

    category: str
    tasks: list[str]
    base: float
    value: float
    ratio_of_averages: Estimated | None = None
    average_of_ratios: Estimated | None = None
    verdict: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTable:
    """A table that others have published about the base model, as it was: strings, nothing computed.

    Attributes:
        title, source: what it is and whose; columns, rows: its cells.
    """

    title: str
    source: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """``eval.json``: rows of the last command, and of earlier ones on the same two models what it did not measure.

    Attributes:
        base, checkpoint: as they were named; base_sha256, checkpoint_sha256: of tensors, tokenizer and configuration.
        suites: all that were asked for.
        backend: what ran the models in the last command, with its options.
        limit: documents a task, at most; ``None`` for all.
        gates: those that the last command asked for; gate_failures: what was said of those that failed.
        divergence: metrics of ``compare``, where a suite has it; divergence_text: what they were measured on.
        published: tables carried over from the base model's card.
        run: seconds, date; differs between equal runs.
    """

    format_version: int
    base: str
    checkpoint: str
    base_sha256: str | None
    checkpoint_sha256: str | None
    suites: list[str]
    backend: dict[str, Any]
    limit: int | None
    tasks: list[TaskResult]
    averages: list[AverageResult]
    divergence: dict[str, float] | None = None
    divergence_text: str | None = None
    gates: list[str] = field(default_factory=list)
    gate_failures: list[str] = field(default_factory=list)
    published: list[PublishedTable] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def measured(self, row: TaskResult) -> Measured:
        """How one of its rows was measured."""
        return row.measured or Measured(
            backend=self.backend, limit=self.limit, versions=self.versions, date=self.run.get("date")
        )
