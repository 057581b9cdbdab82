"""Recipe text as values that know which line they stand on.

YAML marks its nodes; :mod:`tomllib` does not, so the lines of a TOML document are found by a scan that relies on
:mod:`tomllib` having accepted the text before. Does not cover: what the values mean.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import RecipeError

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A value with the line where it (or, in a mapping, its key) starts: a scalar, a list or a dict of nodes."""

    value: Any
    line: int


def read_document(path: Path) -> Node:
    """Parse a recipe file; TOML or YAML (JSON is YAML) by its suffix.

    Raises:
        RecipeError: no such file, another suffix, not UTF-8, malformed, a key given twice, or empty.
    """
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise RecipeError(
            f"recipes are read by suffix, and {suffix or 'no suffix'!r} is none of them",
            where=str(path),
            remedy="Name it .toml, .yaml, .yml or .json.",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise RecipeError(f"cannot be read: {e.strerror or e}", where=str(path), remedy="Give a recipe file.") from None
    except UnicodeDecodeError as e:
        raise RecipeError(f"is not UTF-8 text (byte {e.start})", where=str(path)) from None
    try:
        root = parse_toml(text, str(path)) if suffix == ".toml" else parse_yaml(text, str(path))
    except RecursionError:
        raise RecipeError("is nested too deeply to be a recipe", where=str(path)) from None
    if not root.value:
        raise RecipeError("is empty", where=str(path), remedy='The shortest recipe is: scheme = "W4A16".')
    return root


def at(file: str, line: int) -> str:
    """The ``where`` of a recipe's errors."""
    return f"{file}, line {line}"


# TOML -----------------------------------------------------------------------------------------------------------------


def parse_toml(text: str, file: str) -> Node:
    """TOML with line numbers."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        found = re.search(r"\(at line (\d+), column \d+\)|\(at end of document\)", str(e))
        line = int(found.group(1)) if found and found.group(1) else text.count("\n") + 1
        message = str(e)[: found.start()].strip() if found else str(e)
        raise RecipeError(f"is not valid TOML: {message}", where=at(file, line)) from None
    return _with_lines(values, TomlLines(text).lines, ())


def _with_lines(value: Any, lines: dict[Path_, int], path: Path_, parent: int = 1) -> Node:
    line = lines.get(path, parent)
    if isinstance(value, dict):
        return Node({k: _with_lines(v, lines, (*path, k), line) for k, v in value.items()}, line)
    if isinstance(value, list):
        return Node([_with_lines(v, lines, (*path, i), line) for i, v in enumerate(value)], line)
    return Node(value, line)


class TomlLines:
    """The line of every key and array element of a TOML text that :mod:`tomllib` accepts.

    ``lines`` maps paths of keys and indices to 1-based lines, e.g. ``("groups", 0, "targets", 1)``.
    """

    _BARE = re.compile(r"[A-Za-z0-9_-]+")
    _BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
    _SPACE = re.compile(r"[ \t]*")
    _SCALAR = re.compile(r"[^,\]}#\r\n]*")
    _STRING = re.compile(
        r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\])*"|' + r"'[^']*'",
        re.DOTALL,
    )

    def __init__(self, text: str) -> None:
        self._text, self._position = text, 0
        self._counts: dict[Path_, int] = {}
        self.lines: dict[Path_, int] = {}
        table: Path_ = ()
        while self._skip(self._BLANK) < len(text):
            if text.startswith("[", self._position):
                table = self._header()
            else:
                self._pair(table)

    def _skip(self, pattern: re.Pattern[str]) -> int:
        found = pattern.match(self._text, self._position)
        assert found is not None
        self._position = found.end()
        return self._position

    def _note(self, path: Path_) -> None:
        self.lines.setdefault(path, self._text.count("\n", 0, self._position) + 1)

    def _key(self) -> list[str]:
        """A dotted key; leaves the position after it and the blanks that follow."""
        parts: list[str] = []
        while True:
            self._skip(self._SPACE)
            start = self._position
            if self._text[start] in "\"'":
                self._skip(self._STRING)
                (part,) = tomllib.loads(f"{self._text[start : self._position]} = 0")
            else:
                self._skip(self._BARE)
                part = self._text[start : self._position]
            parts.append(part)
            self._skip(self._SPACE)
            if not self._text.startswith(".", self._position):
                return parts
            self._position += 1

    def _header(self) -> Path_:
        many = self._text.startswith("[[", self._position)
        self._position += 2 if many else 1
        keys = self._key()
        path: Path_ = ()
        for i, key in enumerate(keys):
            path = (*path, key)
            if many and i == len(keys) - 1:
                self._note(path)
                self._counts[path] = self._counts.get(path, 0) + 1
            if path in self._counts:
                path = (*path, self._counts[path] - 1)
            self._note(path)
        self._position += 2 if many else 1
        return path

    def _pair(self, table: Path_) -> None:
        path = table
        for key in self._key():
            path = (*path, key)
            self._note(path)
        self._position += 1
        self._value(path)

    def _value(self, path: Path_) -> None:
        self._skip(self._SPACE)
        opening = self._text[self._position]
        if opening in "\"'":
            self._skip(self._STRING)
        elif opening == "[":
            self._position += 1
            for i in self._until("]"):
                self._note((*path, i))
                self._value((*path, i))
        elif opening == "{":
            self._position += 1
            for _ in self._until("}"):
                self._pair(path)
        else:
            self._skip(self._SCALAR)

    def _until(self, closing: str) -> Iterator[int]:
        """Count the items of an array or inline table, leaving the position at each, then after the bracket."""
        count = 0
        while True:
            self._skip(self._BLANK)
            if self._text[self._position] == closing:
                self._position += 1
                return
            if self._text[self._position] == ",":
                self._position += 1
                continue
            yield count
            count += 1


# YAML -----------------------------------------------------------------------------------------------------------------


def parse_yaml(text: str, file: str) -> Node:
    """YAML with line numbers, by the safe loader: a tag that would build an object is an error."""
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return Node(None, 1) if root is None else _yaml_node(root, loader, file, {}, set())
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise RecipeError(f"is not valid YAML: {e.problem or e.context}", where=at(file, line)) from None
    except (yaml.YAMLError, ValueError) as e:
        raise RecipeError(f"is not valid YAML: {e}", where=file) from None
    finally:
        if loader is not None:
            loader.dispose()


def _yaml_node(
    node: yaml.Node, loader: yaml.SafeLoader, file: str, done: dict[int, Any], open_: set[int], line: int | None = None
) -> Node:
    """Convert a node; one that an alias repeats is converted once, one that contains itself is an error."""
    line = node.start_mark.line + 1 if line is None else line
    if id(node) in open_:
        raise RecipeError("an alias stands inside the value it repeats", where=at(file, line))
    if id(node) not in done:
        open_.add(id(node))
        done[id(node)] = _yaml_value(node, loader, file, done, open_)
        open_.discard(id(node))
    return Node(done[id(node)], line)


def _yaml_value(node: yaml.Node, loader: yaml.SafeLoader, file: str, done: dict[int, Any], open_: set[int]) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        mapping: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise RecipeError("a key must be a plain word", where=at(file, line))
            if key in mapping:
                raise RecipeError(f"key {key!r} is given twice", where=at(file, line), remedy="Keep one of them.")
            mapping[key] = _yaml_node(value_node, loader, file, done, open_, line)
        return mapping
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_yaml_node(item, loader, file, done, open_) for item in node.value]
    return loader.construct_object(node, deep=True)
