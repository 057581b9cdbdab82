"""What ``model.py`` asks of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from settings import Settings


@dataclass(frozen=True)
class Job:
    """One prompt on its way.

    Attributes:
        ids: the prompt's tokens.
        settings: how to go on from there.
        limit: tokens to generate, at most.
        receive: takes pieces of the answer and, with the last one (which may be empty), the reason why it ended:
            "stop", "length", "cancelled", or "error: ...". Called from the engine's threads.
        cancelled: whether nobody waits for it any more.
        together: equal for the prompts of one request.
    """

    ids: Sequence[int]
    settings: Settings
    limit: int
    receive: Callable[[str, str | None], None]
    cancelled: Callable[[], bool]
    together: int = 0


@dataclass(frozen=True)
class Options:
    """The parameters of ``config.pbtxt`` that concern an engine.

    Attributes:
        checkpoint: folder of the checkpoint.
        context: tokens of prompt and answer together; 0 for as many as the model has been made for.
        max_batch: prompts that are worked on at once, at most.
        dtype: of the computation: "auto", "float32", "bfloat16", "float16".
        gpus: that the model is split over, where it is not run on the CPU.
    """

    checkpoint: Path
    context: int
    max_batch: int
    dtype: str
    gpus: int


class Engine(Protocol):
    """A loaded model. ``context`` is what it can read and write in all, in tokens."""

    context: int

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with those that the model wants before every text."""

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the assistant answers; BadRequest without a chat template."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start to work on the prompts of one request, and return."""

    def close(self) -> None:
        """Stop all work."""
