"""Rows with pictures, read into one form: turns whose content is a list of parts, and the pictures in their order.

Understood are

- ``messages`` (``role``, ``content``) or ``conversations`` (ShareGPT's ``from``, ``value``), content being a string or
  parts: ``{"type": "text", "text"}``, ``{"type": "image", "image" | "path" | "url"}``, OpenAI's
  ``{"type": "image_url", "image_url": {"url"}}``, or ``{"type": "image"}`` for the next of the row's own pictures;
- or a text: ``text``, ``caption``, ``question`` (with ``answer``) or ``prompt``;
- beside either, the row's own pictures: ``image``, ``images``, ``file_name`` or ``file_names``.

Own pictures that no part asks for stand where the strings say ``<image>``, or before the first words of the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.calibration.pictures import read_picture
from halfbyte.errors import CalibrationError

TURNS = ("messages", "conversations")
TEXTS = ("text", "caption", "question", "prompt")
PICTURES = ("images", "image", "file_names", "file_name")
REFERENCES = ("image", "path", "url")
MARK = "<image>"
INSTRUCTION = "Describe this picture."
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
HELP = (
    f"Each row needs {' or '.join(repr(n) for n in TURNS)} or one of {', '.join(repr(n) for n in TEXTS)}, and pictures "
    "in 'image' or 'images' or in the parts of its messages."
)

Part = dict[str, str]
Turn = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row.

    Attributes:
        where: which one, for messages.
        turns: ``role`` and ``content``, the latter a list of parts ``{"type": "image"}`` and ``{"type": "text",
            "text"}``; empty for a row without any words or pictures.
        text: the row's text as it stands, where it was given as one string; it may have been rendered already.
        pictures: files' bytes, one for each image part.
        instructed: the row had pictures alone, and the words are :data:`INSTRUCTION`.
    """

    where: str
    turns: list[Turn]
    text: str | None
    pictures: tuple[bytes, ...]
    instructed: bool = False


def has_pictures(row: Mapping[str, Any]) -> bool:
    """Whether a row carries pictures of its own."""
    return any(row.get(name) for name in PICTURES)


def read_row(row: Any, base: Path | None, where: str) -> Conversation:
    """A row as a conversation.

    Args:
        row: what a line of JSON or a data set holds.
        base: the folder that relative paths of pictures start at.
        where: which row, for messages.

    Raises:
        CalibrationError: it has another form, or pictures and what refers to them do not go together.
    """
    if not isinstance(row, Mapping):
        raise CalibrationError(f"is a {type(row).__name__}, not an object", where=where, remedy=HELP)
    own = _own_pictures(row, where)
    text, instructed = None, False
    turns = _turns(next((row[n] for n in TURNS if row.get(n)), None), where)
    if not turns:
        text = next((row[n] for n in TEXTS if isinstance(row.get(n), str) and row[n].strip()), None)
        if text is None and not own and not any(n in row for n in (*TURNS, *TEXTS)):
            raise CalibrationError("has neither words nor pictures in any field known", where=where, remedy=HELP)
        if text is None and not own:
            return Conversation(where=where, turns=[], text=None, pictures=())
        instructed = text is None
        turns = [{"role": "user", "content": [_words(text or INSTRUCTION)]}]
        answer = row.get("answer")
        if text is not None and text == row.get("question") and isinstance(answer, str) and answer.strip():
            turns.append({"role": "assistant", "content": [_words(answer)]})
            text = None
    references = _join(turns, own, where)
    pictures = tuple(read_picture(r, base, where) for r in references)
    return Conversation(where=where, turns=turns, text=text, pictures=pictures, instructed=instructed)


def _own_pictures(row: Mapping[str, Any], where: str) -> list[Any]:
    for name in PICTURES:
        given = row.get(name)
        if given is None or given == "" or given == []:
            continue
        if isinstance(given, list):
            return [g for g in given if g is not None]
        if isinstance(given, (str, bytes, dict)):
            return [given]
        raise CalibrationError(f"has {type(given).__name__} in {name!r}, not the path of a picture", where=where)
    return []


def _words(text: str) -> Part:
    return {"type": "text", "text": text}


def _turns(given: Any, where: str) -> list[Turn]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(m, Mapping) for m in given):
        raise CalibrationError("its messages are no list of objects", where=where, remedy=HELP)
    turns = []
    for message in given:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise CalibrationError("has a message without a role", where=where, remedy=HELP)
        turns.append({"role": ROLES.get(role, role), "content": _parts(content, where)})
    return turns


def _parts(content: Any, where: str) -> list[Any]:
    """Content as parts; image parts still hold their reference (``None`` for the next of the row's own)."""
    if isinstance(content, str):
        return [_words(content)]
    if not isinstance(content, list):
        raise CalibrationError("has a message whose content is neither a string nor a list", where=where, remedy=HELP)
    parts: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(_words(part["text"]))
        elif kind == "image":
            parts.append({"type": "image", "of": next((part[k] for k in REFERENCES if part.get(k)), None)})
        elif kind == "image_url":
            url = part.get("image_url")
            parts.append({"type": "image", "of": url.get("url") if isinstance(url, Mapping) else url})
        else:
            raise CalibrationError(
                f"has a part of type {kind!r}; text, image and image_url are read", where=where, remedy=HELP
            )
    return parts


def _join(turns: list[Turn], own: list[Any], where: str) -> list[Any]:
    """Give every image part a picture, put the row's own pictures into ``turns`` where they belong, list all."""
    asked = [p for t in turns for p in t["content"] if p["type"] == "image"]
    waiting = sum(p["of"] is None for p in asked)
    if own and not asked:
        _place(turns, own, where)
        return own
    if waiting != len(own):
        raise CalibrationError(
            f"its messages ask for {waiting} pictures of the row, and it has {len(own)}", where=where, remedy=HELP
        )
    rest = iter(own)
    references = [next(rest) if p["of"] is None else p["of"] for p in asked]
    for part in asked:
        del part["of"]
    return references


def _place(turns: list[Turn], own: list[Any], where: str) -> None:
    marks = sum(p["text"].count(MARK) for t in turns for p in t["content"])
    if marks not in (0, len(own)):
        raise CalibrationError(f"says {MARK} {marks} times, and it has {len(own)} pictures", where=where)
    if marks:
        for turn in turns:
            turn["content"] = [part for p in turn["content"] for part in _at_marks(p["text"])]
        return
    first = next((t for t in turns if t["role"] == "user"), turns[0])
    first["content"] = [{"type": "image"} for _ in own] + first["content"]


def _at_marks(text: str) -> list[Part]:
    parts: list[Part] = []
    for i, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] if i else []
        parts += [_words(piece.strip("\n"))] if piece.strip() else []
    return parts
