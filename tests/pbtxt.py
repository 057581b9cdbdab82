"""Reads ``config.pbtxt``: as much of protobuf's text format as ``halfbyte deploy triton`` writes."""

from __future__ import annotations

import json
import math
import re
from typing import Any


def parse_config(text: str) -> dict[str, Any]:
    """A ``config.pbtxt`` as plain values. Fields that occur several times become lists.

    Raises:
        ValueError: text that is not of that form.
    """
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]:,]', re.sub(r"#[^\n]*", "", text))
    value, rest = _message(tokens)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}")
    return value


def _message(tokens: list[str]) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    while tokens and tokens[0] != "}":
        name, tokens = tokens[0], tokens[1:]
        if tokens and tokens[0] == ":":
            tokens = tokens[1:]
        value, tokens = _value(tokens)
        if tokens and tokens[0] == ",":
            tokens = tokens[1:]
        if name in found:
            earlier = found[name] if isinstance(found[name], list) else [found[name]]
            value = [*earlier, *(value if isinstance(value, list) else [value])]
        found[name] = value
    return found, tokens


def _value(tokens: list[str]) -> tuple[Any, list[str]]:
    if not tokens:
        raise ValueError("ends too early")
    first, tokens = tokens[0], tokens[1:]
    if first == "{":
        value, tokens = _message(tokens)
        if not tokens:
            raise ValueError("a { is not closed")
        return value, tokens[1:]
    if first == "[":
        listed = []
        while tokens and tokens[0] != "]":
            value, tokens = _value(tokens)
            listed.append(value)
            if tokens and tokens[0] == ",":
                tokens = tokens[1:]
        if not tokens:
            raise ValueError("a [ is not closed")
        return listed, tokens[1:]
    if first.startswith('"'):
        return json.loads(first), tokens
    if re.fullmatch(r"[+-]?\d+", first):
        return int(first), tokens
    if re.fullmatch(r"[+-]?\d*\.\d+", first):
        number = float(first)
        return (number if math.isfinite(number) else first), tokens
    return {"true": True, "false": False}.get(first, first), tokens
