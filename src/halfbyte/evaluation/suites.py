"""What is measured, as data: ``suites/NAME.yaml`` lists tasks with shots, metric and the form of the prompts.

    category: OpenLLM v1            heading of the rows
    divergence: true                measure what `compare` does, too
    defaults: {...}                 fields of every task, unless it has its own
    tasks:
    - task: arc_challenge           lm-eval's name of a task or group
      title: ARC Challenge
      shots: 25                     unless given, the task's own; shown_shots: only says what these are
      metric: acc_norm              with its filter behind a comma where there are several
      chat_template, fewshot_as_multiturn, max_gen_toks, pictures, runs_code

A name that is no suite is a task of the suite ``code``, or of lm-eval's, or of a YAML file in ``--tasks-dir``.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import yaml

from halfbyte.errors import HalfbyteError, UsageError, raise_all

OTHER = "Other tasks"
TASK_FILE = "If it is a task in lm-eval's form: --tasks-dir FOLDER_OF_THE_FILE --suite NAME_OF_THE_TASK."


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteTask:
    """A row to be measured. ``metric`` is ``None`` where lm-eval's configuration decides: its first one."""

    suite: str
    category: str
    task: str
    title: str
    metric: str | None = None
    shots: int | None = None
    shown_shots: int | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool = False
    max_gen_toks: int | None = None
    pictures: bool = False
    runs_code: bool = False

    @property
    def label(self) -> str:
        """Title with the number of examples, where it is known."""
        shots = self.shown_shots if self.shots is None else self.shots
        return self.title if shots is None else f"{self.title} ({shots}-shot)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Tasks under one heading."""

    name: str
    category: str
    tasks: list[SuiteTask]
    divergence: bool = False


def names() -> list[str]:
    """The suites that come with halfbyte."""
    return sorted(f.name.removesuffix(".yaml") for f in folder("suites").iterdir() if f.name.endswith(".yaml"))


def folder(name: str) -> Path:
    """Where suites or tasks that come with halfbyte are."""
    return Path(str(files("halfbyte.evaluation"))) / name


def load(name: str) -> Suite:
    """One of halfbyte's own suites.

    Raises:
        UsageError: a key or a value in it is not known.
    """
    path = folder("suites") / f"{name}.yaml"
    return suite_of(name, yaml.safe_load(path.read_text(encoding="utf-8")), path.name)


def read(path: Path) -> Suite:
    """A suite from a file.

    Raises:
        UsageError: it cannot be read, is no YAML, or does not hold a suite.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise UsageError("it cannot be read", where=f"--suite {path}", why=why or "") from None
    except yaml.YAMLError as e:
        remedy = TASK_FILE if isinstance(e, yaml.constructor.ConstructorError) else ""
        raise UsageError(
            "it is no YAML file of a suite", where=str(path), why=" ".join(str(e).split()), remedy=remedy
        ) from None
    return suite_of(path.stem, content, str(path))


def suite_of(name: str, content: Any, where: str) -> Suite:
    """A suite from what its file says; see the module's docstring."""
    problems: list[HalfbyteError] = []
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
        of_a_task = isinstance(content, dict) and content.keys() & {"task", "dataset_path", "doc_to_text", "include"}
        raise UsageError("it has no list of tasks", where=where, remedy=TASK_FILE if of_a_task else "")
    known = {f.name for f in dataclasses.fields(SuiteTask)} - {"suite", "category"}
    unknown_keys = sorted(content.keys() - {"category", "divergence", "defaults", "tasks"})
    problems += [UsageError(f"unknown key {key!r}", where=where) for key in unknown_keys]
    category = str(content.get("category", name))
    tasks = []
    for number, entry in enumerate(content["tasks"], 1):
        fields = {**(content.get("defaults") or {}), **(entry if isinstance(entry, dict) else {"task": entry})}
        unknown = sorted(fields.keys() - known)
        if unknown or "task" not in fields:
            what = f"unknown key {unknown[0]!r}" if unknown else "no task is named"
            close = difflib.get_close_matches(unknown[0], known, 1) if unknown else []
            remedy = f"Did you mean {close[0]!r}?" if close else ""
            problems.append(UsageError(what, where=f"{where}, task {number}", remedy=remedy))
            continue
        tasks.append(SuiteTask(suite=name, category=category, **{"title": fields["task"], **fields}))
    raise_all(problems)
    return Suite(name=name, category=category, tasks=tasks, divergence=bool(content.get("divergence", False)))


class Tasks(Protocol):
    """Names of tasks, as far as they have to be known."""

    def knows(self, name: str) -> bool:
        """Whether there is such a task or group."""

    def known(self) -> set[str]:
        """All of them; slow."""


def resolve(wanted: list[str], known: Tasks, tasks_dir: Path | None = None) -> list[Suite]:
    """Suites by name, files that hold one, and single tasks; tasks of their own come under one heading.

    Args:
        wanted: names, or paths of YAML files with a list of tasks.
        known: lm-eval's tasks, those in ``tasks_dir`` included.

    Raises:
        UsageError: nothing has such a name; every one is told.
    """
    problems: list[HalfbyteError] = []
    suites: list[Suite] = []
    own = names()
    programs = {t.task: t for t in load("code").tasks}
    for name in wanted:
        if name in own:
            suites.append(load(name))
        elif name.endswith((".yaml", ".yml")):
            try:
                suites.append(read(Path(name)))
            except HalfbyteError as e:
                problems.append(e)
        elif name in programs:  # before lm-eval's tasks of the same names, which run programs unguarded
            suites.append(Suite(name="code", category=programs[name].category, tasks=[programs[name]]))
        elif known.knows(name):
            suites.append(
                Suite(name=name, category=OTHER, tasks=[SuiteTask(suite=name, category=OTHER, task=name, title=name)])
            )
        else:
            close = difflib.get_close_matches(name, [*own, *programs, *known.known()], 3, 0.7)
            hint = f"Did you mean {', '.join(close)}? " if close else ""
            where = f"lm-eval's tasks or {tasks_dir}" if tasks_dir else "lm-eval's tasks"
            problems.append(
                UsageError(
                    f"{name!r} is neither a suite nor one of {where}",
                    where="--suite",
                    remedy=f"{hint}Suites: {', '.join(own)}.",
                )
            )
    raise_all(problems)
    return suites
