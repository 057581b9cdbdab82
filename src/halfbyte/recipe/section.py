"""Reading one mapping of a recipe key by key, and collecting what is wrong with it.

A reader asks a :class:`Section` for each key by the type it needs; a wrong type, a number out of range or a key that
nobody asked for becomes a problem with its line, and reading goes on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from halfbyte.errors import HalfbyteError, RecipeError
from halfbyte.recipe.document import Node, at


class Problems:
    """What was found wrong in one recipe file, in the order it was found."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[HalfbyteError] = []

    def add(self, line: int, what: str, *, why: str = "", remedy: str = "") -> None:
        self.found.append(RecipeError(what, where=at(self.file, line), why=why, remedy=remedy))

    def in_order(self) -> list[HalfbyteError]:
        """By line, as a reader of the file would meet them."""
        return sorted(self.found, key=lambda p: int(p.where.rpartition(" ")[2]))


class Section:
    """A mapping node. ``finish`` must be called last: it reports the keys that were never asked for."""

    def __init__(self, node: Node, what: str, problems: Problems) -> None:
        self.line, self.problems = node.line, problems
        self._asked: list[str] = []
        self._entries: dict[str, Node] = {}
        self.is_table = node.value is None or isinstance(node.value, dict)
        if isinstance(node.value, dict):
            self._entries = node.value
        elif not self.is_table:
            problems.add(node.line, f"{what} must be a table of keys, not {kind_of(node.value)}")

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Node | None:
        """The node of a key; a null counts as absent."""
        self._asked.append(key)
        node = self._entries.get(key)
        return None if node is None or node.value is None else node

    def line_of(self, key: str) -> int:
        node = self._entries.get(key)
        return self.line if node is None else node.line

    def wrong(self, key: str, expected: str) -> None:
        node = self._entries[key]
        self.problems.add(node.line, f"{key} must be {expected}, not {kind_of(node.value)}")

    def string(self, key: str, choices: Iterable[str] = ()) -> str | None:
        """A string; with ``choices``, one of them in any case (returned in lower case)."""
        node = self.get(key)
        if node is None:
            return None
        if not isinstance(node.value, str):
            self.wrong(key, "a string")
            return None
        allowed = list(choices)
        if allowed and node.value.lower() not in allowed:
            self.problems.add(
                node.line,
                f"unknown {key} {node.value!r}",
                remedy=did_you_mean(node.value.lower(), allowed) or f"Use {' or '.join(allowed)}.",
            )
            return None
        return node.value.lower() if allowed else node.value

    def boolean(self, key: str) -> bool | None:
        node = self.get(key)
        if node is None:
            return None
        if not isinstance(node.value, bool):
            self.wrong(key, "true or false")
            return None
        return node.value

    def integer(self, key: str, minimum: int) -> int | None:
        node = self.get(key)
        if node is None:
            return None
        if not isinstance(node.value, int) or isinstance(node.value, bool):
            self.wrong(key, "a whole number")
            return None
        if node.value < minimum:
            self.problems.add(node.line, f"{key} must be at least {minimum}, not {node.value}")
            return None
        return node.value

    def number(self, key: str, minimum: float | None = None) -> float | None:
        node = self.get(key)
        if node is None:
            return None
        if not isinstance(node.value, int | float) or isinstance(node.value, bool):
            self.wrong(key, "a number")
            return None
        if minimum is not None and not minimum <= node.value < math.inf:
            self.problems.add(node.line, f"{key} must be at least {minimum:g} and finite, not {node.value}")
            return None
        return float(node.value)

    def fraction(self, key: str) -> float | None:
        """A number between 0 and 1."""
        value = self.number(key)
        if value is not None and not 0 <= value <= 1:
            self.problems.add(self.line_of(key), f"{key} must be between 0 and 1, not {self._entries[key].value}")
            return None
        return value

    def strings(self, key: str) -> list[Node] | None:
        """A list of strings with their lines; a single string counts as a list of one."""
        node = self.get(key)
        return None if node is None else string_list(node, key, self.problems)

    def is_null(self, key: str) -> bool:
        """Whether a key is there with a null."""
        return key in self._entries and self._entries[key].value is None

    def nodes(self) -> list[Node]:
        """All values, counting every key as asked for."""
        self._asked += self._entries
        return list(self._entries.values())

    def finish(self) -> None:
        for key, node in self._entries.items():
            if key not in self._asked:
                known = ", ".join(sorted(set(self._asked)))
                remedy = did_you_mean(key, self._asked) or f"Known here: {known}."
                self.problems.add(node.line, f"unknown key {key!r}", remedy=remedy)


def string_list(node: Node, what: str, problems: Problems) -> list[Node]:
    """The strings of a list node (or of a lone string); other items are problems."""
    items = node.value if isinstance(node.value, list) else [node]
    for item in items:
        if not isinstance(item.value, str):
            problems.add(item.line, f"{what} must be a list of strings, not {kind_of(item.value)}")
    return [item for item in items if isinstance(item.value, str)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def kind_of(value: Any) -> str:
    """What a value is, in words; containers are not printed."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return repr(value)
