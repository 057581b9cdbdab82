"""The exception tree as drawn, the lines that people read, and exit statuses."""

from __future__ import annotations

import re

import pytest

from halfbyte import errors
from halfbyte.errors import (
    CheckpointError,
    GateFailed,
    HalfbyteError,
    OutputError,
    RecipeError,
    UsageError,
    counted,
    raise_all,
)

DRAWN = re.compile(r"^    (?P<rails>[|` -]*)(?P<name>[A-Z]\w+)\s+\S")


def drawn_tree() -> dict[str, str]:
    """Class name -> parent's name, read off the docstring's drawing by indentation."""
    parents: dict[str, str] = {}
    open_at: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = DRAWN.match(line)
        if match is None:
            continue
        depth = len(match["rails"])
        while open_at and open_at[-1][0] >= depth:
            open_at.pop()
        parents[match["name"]] = open_at[-1][1] if open_at else "Exception"
        open_at.append((depth, match["name"]))
    return parents


def real_tree() -> dict[str, str]:
    return {
        name: thing.__bases__[0].__name__
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, Exception)
    }


def test_the_tree_is_drawn_as_it_is() -> None:
    assert drawn_tree() == real_tree()
    assert len(real_tree()) >= 11


def test_every_class_says_what_it_is_for() -> None:
    for name in real_tree():
        assert vars(errors)[name].__doc__, name


def test_exit_statuses() -> None:
    for name in real_tree():
        assert vars(errors)[name].exit_status == (1 if name == "GateFailed" else 2), name
    assert "exit status 2" in (errors.__doc__ or "").splitlines()[2]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HalfbyteError("it is wrong"), "it is wrong."),
        (HalfbyteError("it is wrong", where="a.json"), "a.json: it is wrong."),
        (HalfbyteError("it is wrong", why="of a reason"), "it is wrong (of a reason)."),
        (HalfbyteError("is that so?", remedy="Look."), "is that so? Look."),
        (HalfbyteError("over.", where="x"), "x: over."),
        (
            CheckpointError("is not whole", where="m.safetensors", why="12 bytes on disk", remedy="Download it again."),
            "m.safetensors: is not whole (12 bytes on disk). Download it again.",
        ),
        (OutputError("two\n  lines\tand tabs", where="out"), "out: two lines and tabs."),
    ],
)
def test_messages_are_one_line(error: HalfbyteError, line: str) -> None:
    assert str(error) == line


def test_the_parts_are_attributes() -> None:
    error = UsageError("what", where="where", why="why", remedy="Remedy.")
    assert (error.what, error.where, error.why, error.remedy) == ("what", "where", "why", "Remedy.")
    bare = UsageError("what")
    assert (bare.where, bare.why, bare.remedy) == ("", "", "")


def test_nothing_collected_raises_nothing() -> None:
    raise_all([])


def test_one_problem_is_raised_as_it_is() -> None:
    problem = RecipeError("wrong", where="r.toml:3")
    with pytest.raises(RecipeError) as caught:
        raise_all([problem])
    assert caught.value is problem


def test_problems_of_one_kind_keep_it() -> None:
    with pytest.raises(RecipeError) as caught:
        raise_all([RecipeError("a", where="r.toml:3"), RecipeError("b", where="r.toml:5", remedy="Fix it.")])
    assert str(caught.value) == "2 problems: (1) r.toml:3: a. (2) r.toml:5: b. Fix it."


def test_mixed_problems_are_raised_as_their_base() -> None:
    with pytest.raises(HalfbyteError) as caught:
        raise_all([UsageError("a"), CheckpointError("b"), CheckpointError("c")])
    assert type(caught.value) is HalfbyteError
    assert str(caught.value) == "3 problems: (1) a. (2) b. (3) c."
    assert caught.value.exit_status == 2


def test_a_failed_gate_is_no_usage_error() -> None:
    assert not issubclass(GateFailed, UsageError)
    with pytest.raises(GateFailed) as caught:
        raise_all([GateFailed("a"), GateFailed("b")])
    assert caught.value.exit_status == 1


def test_one_is_not_several() -> None:
    assert [counted(n, "block") for n in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]
    assert [counted(n, "batch", "batches") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
