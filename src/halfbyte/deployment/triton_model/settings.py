"""What a request may ask of generation: defaults, the request's values over them, and what is refused.

Needs neither Triton nor a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class BadRequest(Exception):
    """The request cannot be served as it is; the message says why and what to send instead."""


@dataclass(frozen=True)
class Settings:
    """How one request is to be generated.

    Attributes:
        max_new_tokens: tokens to generate, at most; None where ``max_length`` or the default decides.
        max_length: likewise, the prompt's tokens counted too.
        do_sample: draw tokens; without it, the likeliest one is taken each time and the next three say nothing.
        temperature, top_k, top_p: what to draw from; top_k 0 and top_p 1 leave nothing out.
        repetition_penalty: above 1 disfavours tokens that prompt or answer have already.
        seed: equal requests with equal seeds draw alike.
        stop: texts that end the answer; they are not part of it.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


DRAWING = ("temperature", "top_k", "top_p")
NAMES = tuple(f.name for f in fields(Settings))
# name -> (test, what passes it)
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "max_length": (lambda v: v >= 1, "at least 1"),
    "temperature": (lambda v: math.isfinite(v) and v >= 0, "a finite number, 0 or more (0 takes the likeliest token)"),
    "top_k": (lambda v: v >= 0, "0 or more (0 leaves no token out)"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda v: math.isfinite(v) and v > 0, "a finite number above 0 (1 is none)"),
    "seed": (lambda v: 0 <= v < 1 << 63, "0 or more"),
    "stop": (lambda v: all(v) and len(v) <= 16, "at most 16 texts, none of them empty"),
}


def defaults(folder: Path) -> Settings:
    """What the checkpoint's ``generation_config.json`` wishes for; :class:`Settings` where it is absent or silent."""
    path = folder / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {n: found[n] for n in NAMES if n not in ("max_length", "seed", "stop") and found.get(n) is not None}
    return check(Settings(**known), path.name)


def merge(asked: Mapping[str, Any], default: Settings) -> Settings:
    """The request's values over the defaults.

    One of temperature, top_k and top_p without do_sample asks for sampling too; temperature 0 for the contrary. A
    length of either kind replaces both kinds of the defaults.

    Raises:
        BadRequest: a value is out of range, or max_new_tokens and max_length are both given.
    """
    if asked.get("max_new_tokens") is not None and asked.get("max_length") is not None:
        raise BadRequest("max_new_tokens and max_length are both given; send one of them")
    values = {n: getattr(default, n) for n in NAMES} | {n: v for n, v in asked.items() if v is not None}
    if asked.get("max_length") is not None:
        values["max_new_tokens"] = None
    if asked.get("do_sample") is None and any(asked.get(n) is not None for n in DRAWING):
        values["do_sample"] = True
    settings = check(Settings(**values), "the request")
    if settings.temperature == 0:
        settings = Settings(**values | {"do_sample": False, "temperature": 1.0})
    return settings


def check(settings: Settings, where: str) -> Settings:
    """The settings, or a :class:`BadRequest` that lists everything wrong with them."""
    wrong = [
        f"{name} is {value!r}, must be {words}"
        for name, (allowed, words) in RULES.items()
        if (value := getattr(settings, name)) is not None and not allowed(value)
    ]
    if wrong:
        raise BadRequest(f"{where}: " + "; ".join(wrong))
    return settings


def limit(settings: Settings, default: Settings, fallback: int, prompt_tokens: int, context: int) -> int:
    """How many tokens to generate at most, given the prompt.

    Args:
        default: whose lengths count only as far as the context reaches.
        fallback: where nobody has named a length.
        context: of the model; prompt and answer have to fit in.

    Raises:
        BadRequest: there is no room.
    """
    room = context - prompt_tokens
    if room < 1:
        raise BadRequest(f"the prompt has {prompt_tokens} tokens, the model reads {context} at most; shorten it")
    if settings.max_length is not None:
        wanted = settings.max_length - prompt_tokens
        if wanted < 1:
            raise BadRequest(
                f"max_length {settings.max_length} leaves no room behind the prompt's {prompt_tokens} tokens; "
                "raise it or send max_new_tokens"
            )
        return min(wanted, room)
    if settings.max_new_tokens is None or settings.max_new_tokens == default.max_new_tokens:
        return min(settings.max_new_tokens or fallback, room)
    if settings.max_new_tokens > room:
        raise BadRequest(
            f"the prompt's {prompt_tokens} tokens and max_new_tokens {settings.max_new_tokens} exceed the {context} "
            f"that the model reads; max_new_tokens can be {room}"
        )
    return settings.max_new_tokens


def conversation(text: str) -> list[dict[str, Any]] | None:
    """The messages, where the text is a JSON list of them; None for anything else, which is plain text.

    Raises:
        BadRequest: it is one, but a message lacks its role or its text.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not any(isinstance(m, dict) and "role" in m for m in found):
        return None
    return [_message(i, m) for i, m in enumerate(found)]


def _message(index: int, message: Any) -> dict[str, Any]:
    where = f"text_input: message {index}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f'{where} is no object with "role" and "content"')
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's form: parts, here of text alone
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise BadRequest(f'{where}: only parts of the form {{"type": "text", "text": ...}} are understood here')
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise BadRequest(f'{where} has no "content"')
    return message | {"content": content}
