"""docs/evaluation.md: its figures are those of the records that it names, its suites those that there are."""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.evaluation import suites
from halfbyte.evaluation_records import EvalRecord
from halfbyte.records import read_record

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_demonstration_is_what_the_records_say() -> None:
    names = re.findall(r"\(\.\./(benchmarks/results/[\w.-]+\.json)\)", PAGE)
    quick, real, again, *tuned, gemma = (read_record(EvalRecord, ROOT / n) for n in names)
    assert quick.divergence is not None
    d = quick.divergence
    shown = [
        f"up by {100 * (d['perplexity_ratio'] - 1):.1f} % ± {100 * d['perplexity_ratio_se']:.1f} %",
        f"{d['kl_mean']:.4f} ± {d['kl_se']:.4f} nats",
        f"{100 * d['top1_agreement']:.1f} %",
        f"is {d['kl_mean'] / d['kl_se']:.0f} standard errors from zero",
    ]
    for task in [*quick.tasks, *real.tasks]:
        r = task.recovery
        assert r is not None
        assert task.mcnemar_p is not None
        interval = f"{task.documents} documents | recovery {r.value:.1f} % ({r.low:.1f} to {r.high:.1f})"
        shown.append(f'{interval}, p = {task.mcnemar_p:.2f}: "{task.verdict}"')
    (mean,) = real.averages
    assert mean.ratio_of_averages is not None
    r = mean.ratio_of_averages
    shown.append(f"recovery {r.value:.1f} % ({r.low:.1f} to {r.high:.1f})")
    for task in (t for record in tuned for t in record.tasks):
        r, kept = task.recovery, "none: the baseline can do none"
        if r is not None:
            kept = f"{r.value:.1f} %" + (", no bounds" if r.low is None else f" ({r.low:.1f} to {r.high:.1f})")
        flips = f"{task.right_to_wrong}/{task.wrong_to_right}, {task.mcnemar_p:.2f} |"
        shown.append(f"{task.documents} documents | {100 * task.base:.2f} | {100 * task.value:.2f} | {kept} | {flips}")
    flat = " ".join(PAGE.split())
    assert again.divergence is not None
    d = again.divergence
    assert (
        f"up by {100 * (d['perplexity_ratio'] - 1):.1f} % ± {100 * d['perplexity_ratio_se']:.1f} %, KL divergence "
        f"{d['kl_mean']:.4f} ± {d['kl_se']:.4f} nats, same most likely token {100 * d['top1_agreement']:.1f} %"
    ) in flat
    assert [(t.right_to_wrong, t.wrong_to_right, t.documents) for t in again.tasks] == [(1, 0, 60), (1, 0, 60)]
    (row,) = gemma.tasks
    assert row.documents is not None
    solved = [round(row.documents * score) for score in (row.base, row.value)]
    assert (
        f"solves {solved[0]} of HumanEval's {row.documents} problems, its W4A16 (groups of 128) {solved[1]} (" in flat
    )
    for text in shown:
        assert text in PAGE, text
    assert len({t.checkpoint_sha256 for t in tuned}) == 1
    assert quick.checkpoint_sha256 == real.checkpoint_sha256


def test_every_suite_is_listed() -> None:
    assert re.findall(r"^\| `([\w-]+)` \| ", PAGE.split("## Suites")[1].split("## ")[0], re.MULTILINE) == [
        n for n in ("quick", "openllm-v1", "openllm-v1-chat", "openllm-v2", "llama-instruct", "multilingual-mmlu",
                    "reasoning", "vision", "code") if n in suites.names()
    ]  # fmt: skip
    assert len(suites.names()) == 9
