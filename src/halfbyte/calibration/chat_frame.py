"""What a chat template puts around turns, read off by rendering a marked conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.calibration.tokenizing import encode, opening, quiet

MARKS = ("QUESTIONMARKER", "ANSWERMARKER", "FOLLOWUPMARKER")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFrame:
    """Token ids between the words of a conversation.

    Attributes:
        opening: everything before the user's first word (BOS, system prompt, the user turn's header).
        bridges: what stands between the user's last word and the assistant's first, and the other way round; each
            begins with what ends the turn.
    """

    opening: tuple[int, ...]
    bridges: tuple[tuple[int, ...], tuple[int, ...]]


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The frame of the tokenizer's chat template, or ``None`` without a template that shows one."""
    if not tokenizer.chat_template:
        return None
    roles = ("user", "assistant", "user")
    try:
        with quiet():
            text = tokenizer.apply_chat_template(
                [{"role": r, "content": m} for r, m in zip(roles, MARKS, strict=True)], tokenize=False
            )
    except Exception:  # a template may refuse any conversation; then there is no frame to learn from it
        return None
    parts: list[str] = []
    rest = str(text)
    for mark in MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        parts.append(before)
    first, *bridges = (tuple(encode(tokenizer, part, special=False)) for part in parts)
    if not all(bridges):
        return None
    prefix = tuple(opening(tokenizer))
    if first[: len(prefix)] != prefix:
        first = prefix + first
    return ChatFrame(opening=first, bridges=(bridges[0], bridges[1])) if first else None
