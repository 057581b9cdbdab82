"""How much of its baseline's score a checkpoint keeps, and how sure that is: paired, by document.

Both models answer the same documents, so what differs between them is far smaller than what differs between documents.
With b and q the scores of one document under baseline and checkpoint, and strata s (the subtasks of a group) that a
score weighs by w_s::

    score = sum_s w_s mean_s(q)              recovery = 100 score / score of the baseline, in percent
    se of the difference = sqrt(sum_s w_s^2 var_s(q - b) / n_s)
    interval of the recovery: quantiles of the same ratio over resamples of *documents*, drawn with replacement within
        each stratum and the same for both models (paired, stratified bootstrap)
    McNemar: of m documents that only one model got right, c went wrong; p = 2 P(Binomial(m, 1/2) <= min(c, m - c))

Resampling n documents draws counts of each distinct pair (b, q) from a multinomial, which for right-or-wrong scores has
at most four kinds: that is how a bootstrap of 14,000 documents takes milliseconds, and it is the same distribution.

Where no document differs at all, a bootstrap has nothing to resample and would claim certainty. The interval is then
that of Clopper and Pearson for a share of documents that was never seen to change: at most 1 - (alpha / 2)^(1 / n). For
the mean of T tasks n is T times the fewest documents of one: shares p_t under which nothing is seen to change have
prod_t (1 - p_t)^(n_t) >= alpha / 2, and where all n_t are alike their mean is largest when they are, too.

Sources: Efron & Tibshirani 1993, chapters 6 and 13 (percentile bootstrap); McNemar 1947, Clopper & Pearson 1934;
Dutta et al. 2024, arXiv 2407.09141 (flips say more than accuracy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
# A baseline that scores less than this has nothing that could be kept: 0.17 % -> 0.00 % is no recovery of 0 %.
LEAST_BASE = 0.01
# Resamples at a time where every document is a kind of its own.
CELLS = 1 << 22

NO_LOSS = "no measurable loss"
GAIN = "measurable gain"
LOSS = "measurable loss"
UNRESOLVED = "loss within the error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """Scores of the same documents under both models.

    Attributes:
        base, value: float64 ``[n]``, in the same order of documents; the mean over repeats where there are some.
        weight: what the stratum counts for; the weights of a task add up to 1.
    """

    base: Array
    value: Array
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A point estimate and its 95 % interval; bounds are ``None`` where they cannot be told."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What :func:`recovery` found; scores are shares (0 to 1), recovery is in percent.

    Attributes:
        documents: how many there are.
        base, value: scores of baseline and checkpoint.
        recovery: ``None`` where the baseline scores less than 1 %.
        difference: ``value - base``, with its bootstrap interval; difference_se: its paired standard error.
        unpaired_se: what the standard error would be had the models answered different documents.
        right_to_wrong, wrong_to_right: documents that flipped; ``None`` where scores are not right or wrong.
        mcnemar_p: exact two-sided p-value for "flips go both ways equally"; ``None`` likewise.
        flips_high: upper end of the exact 95 % interval of the share of documents that flip; ``None`` likewise.
        verdict: ``no measurable loss``, ``loss within the error``, ``measurable loss`` or ``measurable gain``.
    """

    documents: int
    base: float
    value: float
    recovery: Interval | None
    difference: Interval
    difference_se: float | None
    unpaired_se: float | None
    right_to_wrong: int | None
    wrong_to_right: int | None
    mcnemar_p: float | None
    flips_high: float | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """Several tasks as one, each counting the same.

    Attributes:
        base, value: means of the tasks' scores.
        ratio_of_averages: ``100 mean(value) / mean(base)``, as published cards have it: easy tasks count more.
        average_of_ratios: mean of the tasks' recoveries, over those that have one: each task counts the same.
        verdict: of the ratio of averages.
    """

    tasks: int
    base: float
    value: float
    ratio_of_averages: Interval | None
    average_of_ratios: Interval | None
    verdict: str


def recovery(strata: Sequence[Stratum], *, resamples: int = RESAMPLES, seed: int = SEED) -> Recovery:
    """Score, recovery, interval and flips of one task.

    Args:
        strata: one for a plain task, one for each subtask of a group.
        resamples: of the bootstrap; seed: equal seeds give equal intervals.

    Raises:
        ValueError: no document, or scores of both models are not of the same documents.
    """
    check(strata)
    base, value = means(strata)
    boot_base, boot_value = bootstrap(strata, resamples, np.random.default_rng(seed))
    documents = sum(len(s.base) for s in strata)
    same = all(np.array_equal(s.base, s.value) for s in strata)
    unseen = unseen_share(documents)
    difference = Interval(value=0.0, low=-unseen, high=unseen)
    if not same:
        difference = interval(value - base, boot_value - boot_base)
    ratio = None
    if base >= LEAST_BASE and same:
        ratio = whole(unseen / base)
    elif base >= LEAST_BASE:
        ratio = interval(100 * value / base, percent(boot_value, boot_base))
    flips = flips_of(strata)
    return Recovery(
        documents=documents,
        base=base,
        value=value,
        recovery=ratio,
        difference=difference,
        difference_se=standard_error([(s.value - s.base) for s in strata], [s.weight for s in strata]),
        unpaired_se=unpaired(strata),
        right_to_wrong=None if flips is None else flips[0],
        wrong_to_right=None if flips is None else flips[1],
        mcnemar_p=None if flips is None else mcnemar(*flips),
        flips_high=None if flips is None else clopper_pearson_high(sum(flips), documents),
        verdict=verdict(difference),
    )


def average(tasks: Sequence[Sequence[Stratum]], *, resamples: int = RESAMPLES, seed: int = SEED) -> Average:
    """Both ways to average tasks; documents are resampled within each stratum of each task.

    Raises:
        ValueError: no task, or one without documents.
    """
    if not tasks:
        raise ValueError("there is no task to average")
    for strata in tasks:
        check(strata)
    rng = np.random.default_rng(seed)
    scores = [means(strata) for strata in tasks]
    boots = [bootstrap(strata, resamples, rng) for strata in tasks]
    base, value = (float(np.mean([s[i] for s in scores])) for i in (0, 1))
    boot_base, boot_value = (np.mean([b[i] for b in boots], axis=0) for i in (0, 1))
    difference = interval(value - base, boot_value - boot_base)
    of_averages = of_ratios = None
    if base >= LEAST_BASE:
        of_averages = interval(100 * value / base, percent(boot_value, boot_base))
    kept = [i for i, (b, _) in enumerate(scores) if b >= LEAST_BASE]
    if all(np.array_equal(s.base, s.value) for strata in tasks for s in strata):
        unseen = unseen_share(len(tasks) * min(sum(len(s.base) for s in strata) for strata in tasks))
        difference = Interval(value=0.0, low=-unseen, high=unseen)
        of_averages = whole(unseen / base) if of_averages else None
        least = min((scores[i][0] for i in kept), default=0.0)
        of_ratios = whole(unseen / least * len(tasks) / len(kept)) if kept else None
    elif kept:
        point = float(np.mean([100 * scores[i][1] / scores[i][0] for i in kept]))
        of_ratios = interval(point, np.mean([percent(boots[i][1], boots[i][0]) for i in kept], axis=0))
    return Average(
        tasks=len(tasks),
        base=base,
        value=value,
        ratio_of_averages=of_averages,
        average_of_ratios=of_ratios,
        verdict=verdict(difference),
    )


def unseen_share(documents: int) -> float:
    """The largest share of documents that may change, though none of these did: its 95 % interval's upper end."""
    return float(1 - ((1 - CONFIDENCE) / 2) ** (1 / documents))


def whole(share: float) -> Interval:
    """100 %, give or take a share of the score."""
    return Interval(value=100.0, low=max(0.0, 100 * (1 - share)), high=100 * (1 + share))


def check(strata: Sequence[Stratum]) -> None:
    """Raise :class:`ValueError` for strata that no score can be made of."""
    if not strata or any(len(s.base) == 0 for s in strata):
        raise ValueError("there are no documents")
    if any(s.base.shape != s.value.shape or s.base.ndim != 1 for s in strata):
        raise ValueError("baseline and checkpoint have scores of different documents")
    if not all(bool(np.isfinite(s.base).all() and np.isfinite(s.value).all()) for s in strata):
        raise ValueError("a score is not a finite number")
    if not math.isclose(sum(s.weight for s in strata), 1.0, rel_tol=1e-9):
        raise ValueError(f"weights of strata add up to {sum(s.weight for s in strata)}, not to 1")


def means(strata: Sequence[Stratum]) -> tuple[float, float]:
    """The task's two scores."""
    base = sum(s.weight * float(s.base.mean()) for s in strata)
    return base, sum(s.weight * float(s.value.mean()) for s in strata)


def bootstrap(strata: Sequence[Stratum], resamples: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """The task's two scores in each resample, ``[resamples]`` each."""
    base, value = np.zeros(resamples), np.zeros(resamples)
    for s in strata:
        n = len(s.base)
        kinds, counts = np.unique(np.stack([s.base, s.value], axis=1), axis=0, return_counts=True)
        step = max(1, CELLS // len(kinds))
        for first in range(0, resamples, step):
            rows = min(step, resamples - first)
            drawn = rng.multinomial(n, counts / n, size=rows) @ kinds / n
            base[first : first + rows] += s.weight * drawn[:, 0]
            value[first : first + rows] += s.weight * drawn[:, 1]
    return base, value


def percent(value: Array, base: Array) -> Array:
    """``100 value / base``, NaN where the baseline has nothing."""
    result = np.full_like(value, np.nan)
    np.divide(100 * value, base, out=result, where=base > 0)
    return result


def interval(point: float, drawn: Array) -> Interval:
    """The percentile interval; no bounds where more than a tail of the resamples have no value."""
    usable = drawn[np.isfinite(drawn)]
    tail = (1 - CONFIDENCE) / 2
    if len(usable) < (1 - tail) * len(drawn):
        return Interval(value=point, low=None, high=None)
    low, high = np.quantile(usable, [tail, 1 - tail])
    return Interval(value=point, low=float(low), high=float(high))


def standard_error(parts: Sequence[Array], weights: Sequence[float]) -> float | None:
    """Of the weighted mean of strata; ``None`` where a stratum has one document."""
    if any(len(p) < 2 for p in parts):
        return None
    return math.sqrt(sum(w * w * float(p.var(ddof=1)) / len(p) for p, w in zip(parts, weights, strict=True)))


def unpaired(strata: Sequence[Stratum]) -> float | None:
    """Standard error of the difference if the two scores came from different documents."""
    weights = [s.weight for s in strata]
    one, other = standard_error([s.base for s in strata], weights), standard_error([s.value for s in strata], weights)
    return None if one is None or other is None else math.hypot(one, other)


def flips_of(strata: Sequence[Stratum]) -> tuple[int, int] | None:
    """How many documents went from right to wrong and from wrong to right; ``None`` where scores are not 0 and 1."""
    if any(not np.isin(scores, (0.0, 1.0)).all() for s in strata for scores in (s.base, s.value)):
        return None
    lost = sum(int(((s.base == 1) & (s.value == 0)).sum()) for s in strata)
    return lost, sum(int(((s.base == 0) & (s.value == 1)).sum()) for s in strata)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value; 1 where nothing flipped."""
    m = lost + won
    tail = sum(math.comb(m, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**m) if m else 1.0


def clopper_pearson_high(hits: int, n: int) -> float:
    """The p for which ``P(Binomial(n, p) <= hits) = alpha / 2``, by bisection."""
    if hits >= n:
        return 1.0
    log_combinations = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(hits + 1)]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        logs = [c + k * math.log(p) + (n - k) * math.log1p(-p) for k, c in enumerate(log_combinations)]
        if math.fsum(map(math.exp, logs)) > (1 - CONFIDENCE) / 2:
            low = p
        else:
            high = p
    return (low + high) / 2


def verdict(difference: Interval) -> str:
    """The words for a difference of scores; what its interval does not resolve is not called a loss or a gain."""
    if difference.high is not None and difference.high < 0:
        return LOSS
    if difference.low is not None and difference.low > 0:
        return GAIN
    return NO_LOSS if difference.value >= 0 else UNRESOLVED
