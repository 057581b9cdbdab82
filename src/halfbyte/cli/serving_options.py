"""Options that ``serve``, ``chat`` and ``bench`` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from halfbyte.serving.engines import Wishes


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engine``, ``--context``, ``--cache`` and ``--engine-log``."""
    for option in reversed(
        (
            click.option(
                "--engine",
                default="auto",
                show_default=True,
                metavar="ENGINE",
                help="vllm, llamacpp, transformers; auto chooses and says why.",
            ),
            click.option(
                "--context",
                type=click.IntRange(min=16),
                help="Tokens of a conversation, at most.  [default: the model's, up to 4096]",
            ),
            click.option(
                "--cache",
                type=click.Path(file_okay=False, path_type=Path),
                help="Folder for converted checkpoints.  [default: .halfbyte beside the checkpoint]",
            ),
            click.option(
                "--engine-log",
                type=click.Path(dir_okay=False, path_type=Path),
                help="File for all that the engine says.",
            ),
        )
    ):
        function = option(function)
    return function


def address_model(checkpoint: str) -> str:
    """A model's name in the API: the folder's, the file's, or the hub id."""
    path = Path(checkpoint)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else checkpoint


def wishes(name: str, context: int | None, parallel: int, flags: tuple[str, ...]) -> Wishes:
    """What is wanted of the engine."""
    from halfbyte.serving.engines import Wishes

    return Wishes(name=name, context=context, parallel=parallel, flags=flags)
