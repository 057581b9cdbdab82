"""Statistics of recovery against exact oracles: full enumeration, rational arithmetic, and coverage in simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from halfbyte.errors import UsageError
from halfbyte.evaluation.gates import failures, needs_divergence, parse_gates
from halfbyte.evaluation.recovery import (
    GAIN,
    LOSS,
    NO_LOSS,
    UNRESOLVED,
    Stratum,
    average,
    clopper_pearson_high,
    interval,
    mcnemar,
    recovery,
)


def stratum(base: list[float], value: list[float], weight: float = 1.0) -> Stratum:
    return Stratum(base=np.array(base, float), value=np.array(value, float), weight=weight)


def quantile(outcomes: list[tuple[Fraction, float]], share: float) -> float:
    """Smallest value whose cumulated probability reaches ``share``."""
    total = Fraction(0)
    for probability, value in sorted(outcomes, key=lambda o: o[1]):
        total += probability
        if total >= Fraction(share):
            return value
    raise AssertionError


def test_the_bootstrap_is_the_one_over_documents() -> None:
    """All 5^5 equally likely resamples of five documents, enumerated."""
    base, value = [1.0, 0.7, 1.0, 0.2, 0.9], [0.0, 0.75, 1.0, 0.3, 0.5]
    outcomes = []
    for chosen in itertools.product(range(5), repeat=5):
        b, v = sum(base[i] for i in chosen), sum(value[i] for i in chosen)
        outcomes.append((Fraction(1, 5**5), 100 * v / b))
    found = recovery([stratum(base, value)], resamples=200_000).recovery
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(100 * sum(value) / sum(base))
    assert found.low == pytest.approx(quantile(outcomes, 0.025), abs=0.8)
    assert found.high == pytest.approx(quantile(outcomes, 0.975), abs=0.8)


def test_documents_that_are_alike_make_the_same_bootstrap_as_documents_one_by_one() -> None:
    """Counting kinds is a shortcut: noise of 1e-12 makes every document a kind of its own and changes no quantile."""
    rng = np.random.default_rng(3)
    base = (rng.random(300) < 0.7).astype(float)
    value = np.where(rng.random(300) < 0.1, 1 - base, base)
    noise = 1e-12 * rng.random(300)
    counted = recovery([Stratum(base=base, value=value)], resamples=40_000).recovery
    single = recovery([Stratum(base=base + noise, value=value + noise)], resamples=40_000).recovery
    assert counted is not None
    assert single is not None
    assert counted.low == pytest.approx(single.low, abs=0.15)
    assert counted.high == pytest.approx(single.high, abs=0.15)


def test_strata_are_resampled_apart_and_weighed() -> None:
    """Two strata of which one has no variance: only the other moves the score, by its weight."""
    constant, mixed = stratum([1.0] * 30, [0.5] * 30, 0.25), stratum([1, 0, 1, 1], [0, 0, 1, 1], 0.75)
    found = recovery([constant, mixed], resamples=50_000)
    assert found.base == pytest.approx(0.25 + 0.75 * 0.75)
    assert found.value == pytest.approx(0.125 + 0.75 * 0.5)
    assert found.difference.value == pytest.approx(-0.125 - 0.75 * 0.25)
    # The differences of the second are (-1, 0, 0, 0): four documents drawn, Binomial(4, 1/4) of them are -1.
    tails = [math.comb(4, k) * 3 ** (4 - k) / 4**4 for k in range(5)]
    high_k = next(k for k in range(5) if sum(tails[: k + 1]) >= 0.975)
    assert found.difference.low == pytest.approx(-0.125 - 0.75 * high_k / 4)
    assert found.difference.high == pytest.approx(-0.125)
    variance = np.var([-1, 0, 0, 0], ddof=1)
    assert found.difference_se == pytest.approx(0.75 * math.sqrt(variance / 4))


def test_the_paired_error_is_smaller_than_the_unpaired_one_by_what_documents_share() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(500)
    value = base + 0.01 * rng.standard_normal(500)
    found = recovery([Stratum(base=base, value=value)])
    assert found.difference_se == pytest.approx(np.std(value - base, ddof=1) / math.sqrt(500))
    assert found.unpaired_se == pytest.approx(math.sqrt((base.var(ddof=1) + value.var(ddof=1)) / 500))
    assert found.difference_se is not None
    assert found.unpaired_se is not None
    assert found.difference_se < found.unpaired_se / 10
    assert found.mcnemar_p is None
    assert found.right_to_wrong is None


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 5), (2, 9), (9, 2), (17, 3), (700, 640)])
def test_mcnemar_is_exact(lost: int, won: int) -> None:
    """Sum over all outcomes that are no more likely than the one at hand, in rational arithmetic."""
    m = lost + won
    seen = math.comb(m, lost)
    exact = Fraction(sum(c for c in (math.comb(m, k) for k in range(m + 1)) if c <= seen), 2**m)
    assert mcnemar(lost, won) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("hits", "n"), [(0, 60), (3, 60), (1, 1), (0, 1), (40, 1319)])
def test_clopper_pearson_leaves_the_tail_that_it_should(hits: int, n: int) -> None:
    p = clopper_pearson_high(hits, n)
    if hits == n:
        assert p == 1.0
        return
    exact = Fraction(p)
    tail = sum(math.comb(n, k) * exact**k * (1 - exact) ** (n - k) for k in range(hits + 1))
    assert float(tail) == pytest.approx(0.025, rel=1e-6)


def test_no_flip_among_few_documents_is_no_certainty() -> None:
    """60 equal answers allow for up to 6.0 % of flips; the interval says so instead of 100 to 100."""
    scores = [1.0] * 30 + [0.0] * 30
    found = recovery([stratum(scores, scores)])
    bound = 1 - 0.025 ** (1 / 60)
    assert found.recovery is not None
    assert found.recovery.value == 100
    assert found.recovery.low == pytest.approx(100 * (1 - bound / 0.5))
    assert found.difference.low == pytest.approx(-bound)
    assert found.flips_high == pytest.approx(bound, rel=1e-6)
    assert found.verdict == NO_LOSS


@pytest.mark.parametrize(
    ("base", "value", "said"),
    [
        ([1, 0] * 20, [1, 0] * 19 + [1, 1], NO_LOSS),
        ([1, 0] * 20, [1, 0] * 19 + [0, 0], UNRESOLVED),
        ([1, 1] * 20, [0, 1] * 20, LOSS),
        ([0, 1] * 20, [1, 1] * 20, GAIN),
    ],
)
def test_verdicts(base: list[float], value: list[float], said: str) -> None:
    assert recovery([stratum(base, value)]).verdict == said


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 simulated tasks of 250 documents: about 95 % of the intervals hold the recovery that they were drawn from."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        base = (rng.random(250) < 0.6).astype(float)
        flip_down, flip_up = rng.random(250) < 0.12, rng.random(250) < 0.10
        value = np.where(base == 1, np.where(flip_down, 0.0, 1.0), np.where(flip_up, 1.0, 0.0))
        truth = 100 * (0.6 * 0.88 + 0.4 * 0.10) / 0.6
        found = recovery([Stratum(base=base, value=value)], resamples=600).recovery
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 400 <= 0.985


def test_both_averages_are_what_their_names_say() -> None:
    tasks = [[stratum([1, 1, 1, 1], [1, 1, 1, 0])], [stratum([1, 0, 0, 0], [1, 1, 0, 0])]]
    found = average(tasks)
    assert found.ratio_of_averages is not None
    assert found.average_of_ratios is not None
    assert found.ratio_of_averages.value == pytest.approx(100 * (0.75 + 0.5) / (1 + 0.25))
    assert found.average_of_ratios.value == pytest.approx((75 + 200) / 2)


def test_a_task_that_the_baseline_cannot_do_has_no_recovery_and_is_left_out_of_the_average_of_ratios() -> None:
    nothing = [stratum([0.0017] * 50, [0.0] * 50)]
    plain = [stratum([1, 1, 1, 0], [1, 1, 0, 0])]
    assert recovery(nothing).recovery is None
    found = average([nothing, plain])
    assert found.tasks == 2
    assert found.average_of_ratios is not None
    assert found.average_of_ratios.value == pytest.approx(100 * 2 / 3)
    assert found.base == pytest.approx((0.0017 + 0.75) / 2)


@pytest.mark.parametrize("counts", [(6, 6), (5, 9), (4, 20, 7)])
def test_an_average_of_tasks_in_which_nothing_changed_claims_no_certainty(counts: tuple[int, ...]) -> None:
    """Its bound holds for any shares of changed documents under which no change is seen in 2.5 % of all samples."""
    tasks = [[stratum([1.0] * (n - 1) + [0.0], [1.0] * (n - 1) + [0.0])] for n in counts]
    found = average(tasks)
    assert found.ratio_of_averages is not None
    assert found.ratio_of_averages.value == 100
    assert found.ratio_of_averages.low is not None
    assert found.verdict == NO_LOSS
    claimed = (100 - found.ratio_of_averages.low) / 100 * found.base
    worst, grid = 0.0, np.linspace(0, 0.9, 91)
    for shares in itertools.product(grid, repeat=len(counts)):
        if math.prod((1 - p) ** n for p, n in zip(shares, counts, strict=True)) >= 0.025:
            worst = max(worst, float(np.mean(shares)))
    assert worst <= claimed
    if len(set(counts)) == 1:  # there it is the bound, not only one
        assert claimed == pytest.approx(worst, abs=0.01)
    assert found.average_of_ratios is not None
    assert found.average_of_ratios.low is not None
    assert found.average_of_ratios.low <= found.ratio_of_averages.low


def test_averages_resample_every_task() -> None:
    """The variance of the average is that of its parts: a quarter of their sum for two tasks."""
    rng = np.random.default_rng(2)
    tasks = []
    for _ in range(2):
        base = rng.random(400)
        tasks.append([Stratum(base=base, value=base + rng.normal(0, 0.3, 400))])
    se = math.sqrt(sum((t[0].value - t[0].base).var(ddof=1) / 400 for t in tasks)) / 2
    found = average(tasks).ratio_of_averages
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    base_mean = np.mean([t[0].base.mean() for t in tasks])
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(100 * se / base_mean, rel=0.1)


def test_an_interval_that_most_resamples_cannot_give_has_no_bounds() -> None:
    """One right answer in sixty: a third of the resamples have none at all, and no ratio."""
    assert interval(100.0, np.array([np.nan] * 34 + [100.0] * 66)).low is None
    found = recovery([stratum([1] + [0] * 59, [0, 1] + [0] * 58)])
    assert found.recovery is not None
    assert found.recovery.low is None


@pytest.mark.parametrize(
    ("strata", "why"),
    [
        ([], "no documents"),
        ([stratum([], [])], "no documents"),
        ([stratum([1, 0], [1])], "different documents"),
        ([stratum([1, 0], [1, math.nan])], "finite"),
        ([stratum([1, 0], [1, 0], 0.5)], "weights"),
    ],
)
def test_what_cannot_be_scored_is_refused(strata: list[Stratum], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        recovery(strata)


def test_gates() -> None:
    gates = parse_gates("recovery>=99, kl<=0.05,score.arc_challenge > 0.5,recovery_low.gsm8k>=95%")
    assert [str(g) for g in gates] == [
        "recovery>=99",
        "kl_mean<=0.05",
        "score.arc_challenge>0.5",
        "recovery_low.gsm8k>=95",
    ]
    assert needs_divergence(gates)
    measured = {"recovery": 99.2, "kl_mean": 0.06, "score.arc_challenge": 0.5}
    assert failures(gates, measured) == [
        "kl_mean<=0.05: it is 0.06",
        "score.arc_challenge>0.5: it is 0.5",
        "recovery_low.gsm8k>=95: not measured in this run",
    ]
    assert failures(gates[:1], measured) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [("recovery", "is no condition"), ("accuracy>=3", "no measurement 'accuracy'"), ("kl<=1.2.3", "1.2.3")],
)
def test_gates_that_mean_nothing(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_gates(text)
