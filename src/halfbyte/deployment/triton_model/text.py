"""A conversation as a prompt's tokens; an answer's text as its tokens come: characters of several tokens, and
texts that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from settings import BadRequest

UNFINISHED = "\ufffd"  # what decoders write for a part of a character


def conversation(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation, through the chat template of transformers' tokenizer."""
    if not tokenizer.chat_template:
        raise BadRequest("text_input is a conversation, but the model has no chat template; send plain text")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # templates refuse what they do not expect, in errors of their own
        raise BadRequest(f"text_input: the model's chat template refuses the conversation: {e}") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class Growing:
    """The text of one answer.

    A token may be a part of a character, and its text may depend on the token before it. So each time the tokens since
    the last but one release are decoded, and what they add is released once it ends in a whole character. Where an
    ending of the text could become a stop text, it is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def add(self, token: int) -> str:
        """What can be sent now that this token is known."""
        self._ids.append(token)
        return self._release(self._added(last=False))

    def end(self) -> str:
        """What is left to be sent when no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._added(last=True))
        text, self._held = text + self._held, ""
        return text

    def _added(self, *, last: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _release(self, added: str) -> str:
        text = self._held + added
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
