"""One task of lm-evaluation-harness on one model: how it is asked, and each document's score.

The harness does prompts, answers and metrics. This module gives its cache of responses the identity of the model (one
file for each), so that a killed run goes on where it was, and takes scores by document rather than averages, so that
two models can be compared on the same ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluation.identity import plain, task_digest
from halfbyte.evaluation.suites import SuiteTask, folder

FEWSHOT_SEED = 1234  # lm-eval's own, for all its seeds
TOLERANCE = 1e-6
ANSWER_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names
DEFAULT_ANSWER = 256  # lm-eval's
MODELS_LOG = "lm_eval.models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One document, answered by one model.

    Attributes:
        task: the subtask it is of; document: which one of it; sha256: of its contents and its prompt.
        score: under the task's metric; ``None`` where the metric gives no number for a document.
        response: what the model said: texts, or log-likelihoods of choices.
        target: what was right.
    """

    task: str
    document: int
    sha256: str
    score: float | None
    response: Any
    target: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What one model made of one task.

    Attributes:
        metric: with its filter; value: lm-eval's aggregate.
        shots: examples in the prompt.
        digest: of configuration and documents.
        weights: subtask -> share in ``value``; empty where ``value`` is no weighted mean of documents' scores.
        higher_is_better: false for errors and perplexities.
        cut: whether prompts were longer than the engine's context and lost their beginning.
    """

    task: str
    metric: str
    value: float
    shots: int | None
    digest: str
    weights: dict[str, float]
    answers: list[Answered]
    higher_is_better: bool = True
    cut: bool = False


class Harness:
    """lm-eval with halfbyte's own tasks, and those of a folder.

    Args:
        tasks_dir: YAML files of further tasks.
        limit: documents of each (sub)task, at most.
        chat_template, fewshot_as_multiturn: ``None`` leaves both to the suite.
    """

    def __init__(
        self,
        tasks_dir: Path | None,
        *,
        limit: int | None,
        chat_template: bool | None,
        system_instruction: str | None = None,
    ) -> None:
        quieten()
        from lm_eval.tasks import TaskManager

        self.limit, self.chat_template, self.system = limit, chat_template, system_instruction
        own = folder("tasks")
        self.paths = [str(own)] + ([str(tasks_dir)] if tasks_dir else [])
        self.near = TaskManager(include_path=self.paths, include_defaults=False)
        self.own = {f.stem: f.with_suffix(".jsonl") for f in own.glob("*.yaml")}

    @cached_property
    def everything(self) -> Any:
        """lm-eval's own tasks too: indexing its 14,000 files takes seconds, so only where one is asked for."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.paths)

    def knows(self, name: str) -> bool:
        """Whether there is such a task or group."""
        return name in self.near.task_index or name in self.everything.task_index

    def is_local(self, name: str) -> bool:
        """Whether a task is halfbyte's own or from the user's folder, so that lm-eval's command does not find it."""
        return name in self.near.task_index

    def known(self) -> set[str]:
        """Names of all tasks and groups."""
        return set(self.everything.all_tasks)

    def load(self, task: SuiteTask) -> Any:
        """lm-eval's objects for a task: ``{"tasks": ..., "groups": ...}``, with the suite's shots.

        Raises:
            HalfbyteError: its data cannot be had, or a package that it needs is missing.
        """
        spec: Any = task.task
        if task.task in self.own:
            import yaml

            config = yaml.safe_load(self.own[task.task].with_suffix(".yaml").read_text(encoding="utf-8"))
            spec = config | {"dataset_kwargs": {"data_files": {"test": str(self.own[task.task])}}}
        try:
            entry = self.near.task_index.get(task.task)
            alone = entry is not None and entry.kind.name in ("TASK", "PY_TASK")  # a group may name lm-eval's own
            with seeded():  # some tasks shuffle choices while they load
                loaded = (self.near if alone else self.everything).load([spec])
        except ModuleNotFoundError as e:
            raise HalfbyteError(
                f"the task needs the package {e.name}", where=task.task, remedy=f"Install it: pip install {e.name}."
            ) from None
        except Exception as e:
            first = (str(e).splitlines() or [""])[0][:300]
            raise HalfbyteError(
                "its data set or configuration could not be loaded",
                where=task.task,
                why=f"{type(e).__name__}: {first}",
                remedy="Without a network, give a local data set in a YAML file in --tasks-dir (docs/evaluation.md).",
            ) from e
        for leaf in loaded["tasks"].values():
            if task.shots is not None:
                leaf.set_config(key="num_fewshot", value=task.shots)
            elif leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
            if task.max_gen_toks and leaf.get_config("output_type") == "generate_until":
                leaf.set_config(key="generation_kwargs", value={"max_gen_toks": task.max_gen_toks}, update=True)
        if len(loaded["tasks"]) > 1 and task.task not in loaded["groups"]:
            raise UsageError(
                f"it is a tag for several tasks: {', '.join(sorted(loaded['tasks'])[:6])}",
                where=task.task,
                remedy="Name the one that is meant.",
            )
        return loaded

    def kinds(self, loaded: Any) -> set[str]:
        """Of requests: ``generate_until``, ``multiple_choice`` and so on."""
        return {str(leaf.OUTPUT_TYPE) for leaf in loaded["tasks"].values()}

    def answer_tokens(self, loaded: Any) -> int:
        """How long the longest answer may be."""
        options = [leaf.get_config("generation_kwargs") or {} for leaf in loaded["tasks"].values()]
        return max(int(next((o[n] for n in ANSWER_TOKENS if o.get(n)), DEFAULT_ANSWER)) for o in options)

    def settings(self, task: SuiteTask, *, has_template: bool) -> dict[str, Any]:
        """How a task is asked."""
        chat = (task.chat_template if self.chat_template is None else self.chat_template) and has_template
        return {
            "chat_template": chat,
            "fewshot_as_multiturn": chat and task.fewshot_as_multiturn,
            "max_gen_toks": task.max_gen_toks,
            "limit": self.limit,
            "system_instruction": self.system,
            "fewshot_seed": FEWSHOT_SEED,
        }

    def digest(self, loaded: Any, settings: dict[str, Any]) -> str:
        """sha256 of what is asked; without paths, which say where data are and not what they are."""
        configs = {name: leaf.config.to_dict(keep_callable=True) for name, leaf in loaded["tasks"].items()}
        for config in configs.values():
            config.pop("dataset_kwargs", None)
        return task_digest(configs, {n: self._documents(t) for n, t in loaded["tasks"].items()}, settings)

    def _documents(self, leaf: Any) -> Iterator[Any]:
        for _, document in leaf.doc_iterator(rank=0, limit=self.limit, world_size=1):
            yield document

    def run(
        self, lm: Any, loaded: Any, task: SuiteTask, settings: dict[str, Any], digest: str, cache: Path
    ) -> TaskScores:
        """Ask a model; responses are kept in ``cache`` as they come, and taken from there.

        Raises:
            UsageError: the metric is none of the task's, or the model cannot be asked such a task.
        """
        from lm_eval.api.model import CachingLM
        from lm_eval.evaluator import evaluate

        cache.parent.mkdir(parents=True, exist_ok=True)
        for leaf in loaded["tasks"].values():
            leaf.set_fewshot_seed(seed=FEWSHOT_SEED)  # here, since each draw of examples moves it on
        found = evaluate(
            lm=CachingLM(lm, str(cache)),
            task_dict=loaded,
            limit=self.limit,
            bootstrap_iters=0,
            system_instruction=self.system,
            apply_chat_template=settings["chat_template"],
            fewshot_as_multiturn=settings["fewshot_as_multiturn"],
        )
        assert found is not None
        metric, chosen = choose_metric(found, task)
        value = reported(found, task.task, metric, chosen)
        answers = [
            answered(name, sample, metric)
            for name in loaded["tasks"]
            for sample in found["samples"][name]
            if sample["filter"] == chosen
        ]
        shots = {int(leaf.get_config("num_fewshot") or 0) for leaf in loaded["tasks"].values()}
        return TaskScores(
            task=task.task,
            metric=metric if chosen == "none" else f"{metric},{chosen}",
            value=value,
            shots=shots.pop() if len(shots) == 1 else None,
            digest=digest,
            weights=weights_of(answers, value),
            answers=answers,
            higher_is_better=all(leaf.higher_is_better().get(metric) is not False for leaf in loaded["tasks"].values()),
        )


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The seeds that lm-eval's own command sets, for as long as tasks load; afterwards those of before."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def quieten() -> None:
    """Let lm-eval and what it uses report problems alone: a result's progress is told by halfbyte."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("lm_eval", "lm-eval", "datasets", "evaluate", "httpx", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()


class Cuts(logging.Handler):
    """Hears, while it is entered, whether lm-eval's models cut prompts: they only tell their logs."""

    found = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            logging.getLogger("lm_eval").handle(record)
        elif "truncat" in record.getMessage().lower():
            self.found = True

    def __enter__(self) -> Cuts:
        models = logging.getLogger(MODELS_LOG)
        models.setLevel(logging.WARNING)
        models.propagate = False
        models.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        models = logging.getLogger(MODELS_LOG)
        models.setLevel(logging.NOTSET)
        models.propagate = True
        models.removeHandler(self)


def choose_metric(found: Any, task: SuiteTask) -> tuple[str, str]:
    """Metric and filter: the suite's, or the first of the task's configuration."""
    names = sorted(
        {(m, s["filter"]) for samples in found["samples"].values() for s in samples[:20] for m in s["metrics"]}
    )
    first = next(iter(found["samples"].values()))
    if not first:
        raise UsageError("it has no documents", where=task.task)
    if task.metric is None:
        return str(first[0]["metrics"][0]), str(first[0]["filter"])
    metric, _, chosen = task.metric.partition(",")
    kinds = [f for m, f in names if m == metric]
    if metric and kinds and (chosen in kinds or not chosen):
        return metric, chosen or ("none" if "none" in kinds else kinds[0])
    offered = ", ".join(m if f == "none" else f"{m},{f}" for m, f in names)
    raise UsageError(f"it has no metric {task.metric!r}", where=task.task, remedy=f"It has: {offered}.")


def reported(found: Any, task: str, metric: str, chosen: str) -> float:
    """lm-eval's aggregate."""
    for table in (found.get("groups") or {}, found["results"]):
        for name, row in table.items():
            if (name == task or len(table) == 1) and f"{metric},{chosen}" in row:
                return float(row[f"{metric},{chosen}"])
    raise UsageError(f"lm-eval gives no {metric},{chosen} for it as a whole", where=task)


def answered(name: str, sample: dict[str, Any], metric: str) -> Answered:
    """A sample of lm-eval's, as far as it is kept."""
    score: Any = sample.get(metric)
    is_number = isinstance(score, bool | int | float) or hasattr(score, "item")
    number = float(score) if is_number else None
    identity = plain([sample["doc"], sample["prompt_hash"], sample["target_hash"]])
    return Answered(
        task=name,
        document=int(sample["doc_id"]),
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        score=number,
        response=json.loads(plain(sample["filtered_resps"])),
        target=json.loads(plain(sample["target"])),
    )


def weights_of(answers: list[Answered], value: float) -> dict[str, float]:
    """Each subtask's share, by which documents' scores give lm-eval's own aggregate; empty where none does.

    Groups weigh subtasks by size, or alike; what the aggregate is not a mean of (F1 over a corpus) has no shares.
    """
    scores: dict[str, list[float]] = {}
    for a in answers:
        if a.score is None or not math.isfinite(a.score):
            return {}
        scores.setdefault(a.task, []).append(a.score)
    total = sum(len(s) for s in scores.values())
    for weights in ({t: len(s) / total for t, s in scores.items()}, {t: 1 / len(scores) for t in scores}):
        if math.isclose(sum(w * sum(scores[t]) / len(scores[t]) for t, w in weights.items()), value, abs_tol=TOLERANCE):
            return weights
    return {}
