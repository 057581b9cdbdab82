"""From two models' answers to a record's rows: pairs by document, recoveries, averages, what gates see, samples."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.evaluation.backends import Backend
from halfbyte.evaluation.harness import Answered, TaskScores
from halfbyte.evaluation.recovery import Interval, Stratum, average, recovery
from halfbyte.evaluation.suites import SuiteTask
from halfbyte.evaluation_records import AverageResult, Estimated, TaskResult
from halfbyte.records import CompareRecord, write_text

CUT = "some prompts were longer than the engine's context and lost their beginning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A task, ready to be asked: ``loaded`` are lm-eval's objects or problems of code."""

    task: SuiteTask
    loaded: Any
    settings: dict[str, Any]
    digest: str


def strata_of(base: TaskScores, value: TaskScores, where: str) -> list[Stratum]:
    """Pair two models' scores by document; empty where the metric has none by document.

    Raises:
        HalfbyteError: they were not asked the same.
    """
    if not base.weights or not value.weights:
        return []
    return pairs_of(base.answers, value.answers, base.weights, where)


def pairs_of(
    base: Sequence[Answered], value: Sequence[Answered], weights: Mapping[str, float], where: str
) -> list[Stratum]:
    """Pair two models' answers, a stratum for each subtask; see :func:`strata_of`."""
    sides: list[dict[tuple[str, int], Answered]] = [{(a.task, a.document): a for a in s} for s in (base, value)]
    one, other = sides
    if one.keys() != other.keys() or any(one[k].sha256 != other[k].sha256 for k in one):
        raise HalfbyteError(
            "baseline and checkpoint were not asked the same documents and prompts",
            where=where,
            why="their tokenizer or chat template differ",
            remedy="Compare a checkpoint with the model that it was made from, or pass --no-chat-template.",
        )
    strata = []
    for task, weight in weights.items():
        keys = sorted(k for k in one if k[0] == task)
        scores = [np.array([side[k].score for k in keys], dtype=np.float64) for side in sides]
        strata.append(Stratum(base=scores[0], value=scores[1], weight=weight))
    return strata


def row_of(p: Prepared, base: TaskScores, value: TaskScores, command: str) -> tuple[TaskResult, list[Stratum]]:
    """A row of the record, and the pairs that its recovery is of (none where it has no recovery)."""
    strata = strata_of(base, value, p.task.task)
    cut = CUT if base.cut or value.cut else None
    plain_row = TaskResult(
        suite=p.task.suite,
        category=p.task.category,
        task=p.task.task,
        title=p.task.label,
        metric=value.metric,
        shots=value.shots if p.task.shown_shots is None else p.task.shown_shots,
        higher_is_better=value.higher_is_better,
        base=base.value,
        value=value.value,
        documents=len(value.answers),
        config_sha256=p.digest,
        settings={k: v for k, v in p.settings.items() if v is not None},
        command=command,
    )
    if not strata:
        note = "the metric is no mean over documents, so there is no interval"
        return dataclasses.replace(plain_row, note=with_note(cut, note)), []
    r = recovery(strata)
    if not plain_row.is_share:
        return dataclasses.replace(
            plain_row,
            difference=estimated(r.difference),
            difference_se=r.difference_se,
            unpaired_se=r.unpaired_se,
            note=with_note(cut, "no share of right answers" if plain_row.higher_is_better else "lower is better"),
        ), []
    return (
        dataclasses.replace(
            plain_row,
            recovery=estimated(r.recovery),
            difference=estimated(r.difference),
            difference_se=r.difference_se,
            unpaired_se=r.unpaired_se,
            right_to_wrong=r.right_to_wrong,
            wrong_to_right=r.wrong_to_right,
            mcnemar_p=r.mcnemar_p,
            flips_high=r.flips_high,
            verdict=r.verdict,
            note=with_note(
                cut, None if r.recovery else "the baseline scores less than 1 %, so there is nothing to recover"
            ),
        ),
        strata,
    )


def with_note(*notes: str | None) -> str | None:
    """Notes as one."""
    return "; ".join(filter(None, notes)) or None


def estimated(found: Interval | None) -> Estimated | None:
    """An interval as records have it."""
    return None if found is None else Estimated(value=found.value, low=found.low, high=found.high)


def averages_of(rows: list[TaskResult], pairs: list[list[Stratum]]) -> list[AverageResult]:
    """One for each category with several tasks that can be averaged."""
    results = []
    for category in dict.fromkeys(r.category for r in rows):
        members = [(r, s) for r, s in zip(rows, pairs, strict=True) if r.category == category and r.averaged and s]
        if len(members) < 2:
            continue
        found = average([s for _, s in members])
        results.append(
            AverageResult(
                category=category,
                tasks=[r.task for r, _ in members],
                base=found.base,
                value=found.value,
                ratio_of_averages=estimated(found.ratio_of_averages),
                average_of_ratios=estimated(found.average_of_ratios),
                verdict=found.verdict,
            )
        )
    return results


def measured(rows: list[TaskResult], divergence: CompareRecord | None, pairs: list[list[Stratum]]) -> dict[str, float]:
    """What gates may ask for. ``recovery`` is over all tasks of the run."""
    found: dict[str, float] = dict(divergence.metrics) if divergence else {}
    for row in rows:
        found[f"score.{row.task}"] = row.value
        if row.recovery is not None:
            found[f"recovery.{row.task}"] = row.recovery.value
            if row.recovery.low is not None:
                found[f"recovery_low.{row.task}"] = row.recovery.low
    usable = [s for s in pairs if s]
    if usable and len(usable) == len(rows):
        overall = average(usable).ratio_of_averages
        if overall is not None:
            found["recovery"] = overall.value
            if overall.low is not None:
                found["recovery_low"] = overall.low
    return found


def lm_eval_command(checkpoint: str | Path, p: Prepared, backend: Backend) -> str:
    """lm-eval's own command for the checkpoint's score, of a task and an engine (``hf``, ``vllm``) that it can name."""
    arguments = {"pretrained": f'"{checkpoint}"', "dtype": "auto"} | backend.arguments
    kind = backend.name
    if kind == "hf":
        arguments["dtype"] = "float32" if backend.device_used() == "cpu" else "auto"
    if p.task.pictures:
        kind = {"hf": "hf-multimodal", "vllm": "vllm-vlm"}[kind]
    given = ",".join(f"{k}={v}" for k, v in arguments.items())
    parts = ["lm_eval", f"--model {kind}", f"--model_args {given}", f"--tasks {p.task.task}"]
    if p.task.shots is not None:
        parts.append(f"--num_fewshot {p.task.shots}")
    if p.settings["chat_template"]:
        parts.append("--apply_chat_template")
    parts.append(f"--fewshot_as_multiturn {'true' if p.settings['fewshot_as_multiturn'] else 'false'}")
    if p.task.max_gen_toks:
        parts.append(f"--gen_kwargs max_gen_toks={p.task.max_gen_toks}")
    if p.settings.get("limit"):
        parts.append(f"--limit {p.settings['limit']}")
    if backend.name == "hf":
        parts.append(f"--device {backend.device_used()}")
    parts.append("--batch_size auto")
    return " \\\n  ".join(parts)


def halfbyte_command(
    checkpoint: str | Path,
    baseline: str | Path,
    suite: str,
    backend: Backend,
    *,
    limit: int | None,
    tasks_dir: Path | None,
    chat_template: bool | None,
    runs_code: bool,
) -> str:
    """``halfbyte eval`` for a task that lm-eval does not have, or an engine that it cannot start."""
    options: dict[str, Any] = {
        "--baseline": baseline,
        "--suite": suite,
        "--tasks-dir": tasks_dir,
        "--backend": backend.name,
        "--backend-args": ",".join(f"{k}={v}" for k, v in backend.arguments.items()) or None,
        "--url": backend.url,
        "--base-url": backend.base_url,
        "--limit": limit,
        "--batch-size": backend.batch_size,
        "--device": backend.device_used() if backend.name == "hf" else None,
    }
    flags = {
        "--chat-completions": backend.chat,
        "--chat-template": chat_template is True,
        "--no-chat-template": chat_template is False,
        "--allow-code-execution": runs_code,
    }
    parts = [f"halfbyte eval {shlex.quote(str(checkpoint))}"]
    parts += [f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    parts += [name for name, is_set in flags.items() if is_set]
    return " \\\n  ".join(parts)


def write_samples(folder: Path, p: Prepared, scores: dict[str, TaskScores]) -> dict[str, str]:
    """A line for each document and model; returns the files' paths relative to the record."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for side, found in scores.items():
        path = folder / f"{p.task.suite}.{p.task.task}.{side}.jsonl"
        lines = [json.dumps(dataclasses.asdict(a), ensure_ascii=False) + "\n" for a in found.answers]
        write_text(path, "".join(lines))
        paths[side] = f"{folder.name}/{path.name}"
    return paths
