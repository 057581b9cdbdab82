"""Options that ``serve``, ``chat`` and ``bench`` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from halfbyte.errors import OutputError

if TYPE_CHECKING:
    from halfbyte.serving.engines import Wishes


def writable(_: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work whose result it takes; a callback of options."""
    if file is not None and not os.access(file if file.exists() else file.parent, os.W_OK):
        why = "it may not be written" if file.parent.is_dir() else f"there is no folder {file.parent}"
        raise OutputError(f"{file} cannot be written", where=option.opts[0], why=why, remedy="Name another file.")
    return file


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engine``, ``--context``, ``--embeddings``, ``--cache`` and ``--engine-log``."""
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
                "--embeddings",
                type=click.Choice(["as-is", "q8_0"]),
                default="as-is",
                show_default=True,
                help="For llama.cpp: q8_0 rounds them to 8 bits, as its own quantiser does; small models get faster.",
            ),
            click.option(
                "--cache",
                type=click.Path(file_okay=False, path_type=Path),
                help="Folder for converted checkpoints.  [default: .halfbyte beside the checkpoint]",
            ),
            click.option(
                "--engine-log",
                type=click.Path(dir_okay=False, path_type=Path),
                callback=writable,
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


def wishes(name: str, context: int | None, parallel: int, embeddings: str, flags: tuple[str, ...]) -> Wishes:
    """What is wanted of the engine."""
    from halfbyte.serving.engines import Wishes

    small: Literal["as-is", "q8_0"] = "q8_0" if embeddings == "q8_0" else "as-is"
    return Wishes(name=name, context=context, parallel=parallel, embeddings=small, flags=flags)
