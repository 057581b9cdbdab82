"""How long work tells what it is doing, without knowing who listens.

Library functions take a :class:`Reporter`; the command line passes one that draws a bar on stderr (``cli.console``),
a Python caller gets silence by default.
"""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Listener for progress. One task runs at a time."""

    def say(self, line: str) -> None:
        """A finished fact worth a line of its own."""

    def start(self, task: str, total: int) -> None:
        """A task of ``total`` steps begins; it replaces the one before."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more steps of the current task are done."""

    def finish(self) -> None:
        """The current task is over."""


class Silent:
    """A reporter that says nothing."""

    def say(self, line: str) -> None:
        pass

    def start(self, task: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def finish(self) -> None:
        pass
