"""Every error that halfbyte raises on purpose.

    HalfbyteError                     exit status 2
    |-- UsageError                    an option is wrong, or two options contradict each other
    |   |-- RecipeError               a recipe file holds something that cannot be honoured
    |   `-- ResumeError               a run cannot be continued: its options, source or machine changed
    |-- CheckpointError               a checkpoint is missing, truncated, inconsistent or unsafe
    |   `-- ArchitectureError         no decoder blocks could be found in it
    |-- CalibrationError              calibration data are absent, empty or too short
    |-- OutputError                   the output folder exists, cannot be written or does not fit on the disk
    |-- NumericsError                 NaN or infinity in weights or activations, or a matrix that cannot be factored
    |-- RankError                     another process of a run on several ended, or failed without a message
    |-- MemoryShortage                the system or the device gave no more memory
    |-- EngineError                   an engine that serves a model did not start, ended by itself or does not answer
    |-- MissingDependencyError        an optional package is needed; the message says which to install
    `-- GateFailed                    exit status 1: the work was done, and a check on its result failed

Each message says what is wrong, where, why, and what to do about it, in one line. The command line prints that line
and exits; a Python caller gets the same line and the parts as attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class HalfbyteError(Exception):
    """Base class. ``str(error)`` is one line: ``where: what (why). remedy``.

    Args:
        what: what is wrong, as a sentence without its full stop.
        where: the file, tensor, option or line it concerns.
        why: the reason, when it is not plain from ``what``.
        remedy: what the reader can do about it, as a full sentence.
    """

    exit_status = 2
    result_printed = False  # with --json stdout then holds the result already, and the message goes to stderr alone

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        line = f"{where}: {what}" if where else what
        if why:
            line += f" ({why})"
        line += "." if not line.endswith((".", "?", "!")) else ""
        if remedy:
            line += f" {remedy}"
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> Any:
        """For pickles, which carry errors between processes: the parts, which the one line does not tell apart."""
        return _rebuilt, (type(self), self.what, self.where, self.why, self.remedy)


def _rebuilt(kind: type[HalfbyteError], what: str, where: str, why: str, remedy: str) -> HalfbyteError:
    return kind(what, where=where, why=why, remedy=remedy)


class UsageError(HalfbyteError):
    """An option is wrong, or two options contradict each other."""


class RecipeError(UsageError):
    """A recipe file holds something that cannot be honoured; ``where`` names file and line."""


class ResumeError(UsageError):
    """A partial run cannot be continued with these options, this source or this machine."""


class CheckpointError(HalfbyteError):
    """A checkpoint is missing, truncated, inconsistent or unsafe to read."""


class ArchitectureError(CheckpointError):
    """The decoder blocks of a model could not be found."""


class CalibrationError(HalfbyteError):
    """Calibration data are absent, empty or too short."""


class OutputError(HalfbyteError):
    """The output folder exists already, cannot be written or does not fit on the disk."""


class NumericsError(HalfbyteError):
    """NaN or infinity where a finite number is needed, or a Hessian that cannot be factored."""


class RankError(HalfbyteError):
    """Another process of a run on several has ended, or failed in a way that has no message of its own."""


class MemoryShortage(HalfbyteError):
    """The system or the device gave no more memory."""


class EngineError(HalfbyteError):
    """An engine that serves a model did not start, ended by itself, or does not answer."""


class MissingDependencyError(HalfbyteError):
    """An optional package is needed for what was asked."""


class GateFailed(HalfbyteError):
    """The work was done, and a check on its result failed."""

    exit_status = 1
    result_printed = True


def raise_all(problems: Sequence[HalfbyteError]) -> None:
    """Raise what was collected: nothing for none, the error itself for one, else one error that lists them all."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    first = type(problems[0])
    kind = first if all(type(p) is first for p in problems) else HalfbyteError
    listed = " ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
    raise kind(f"{len(problems)} problems: {listed}")


def counted(number: int, one: str, several: str = "") -> str:
    """``1 file``, ``2 files``; ``several`` is the plural where it is not the singular with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"
