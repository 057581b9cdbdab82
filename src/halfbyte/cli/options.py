"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from halfbyte.schemes import GROUP_SIZES, PRESETS


class GroupSizeType(click.ParamType[Any]):
    """``128``, ``64``, ``32`` or ``channel``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["channel"]:
        if value == "channel":
            return "channel"
        try:
            return int(value)
        except ValueError:
            self.fail(
                f"{value!r} is neither a number nor 'channel'. Use {', '.join(map(str, GROUP_SIZES))}.", param, ctx
            )


def scheme_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--scheme``, ``--group-size``, ``--method``, ``--ignore`` and ``--recipe``."""
    options = [
        click.option("--scheme", default="W4A16", show_default=True, help=f"Number format: {', '.join(PRESETS)}."),
        click.option(
            "--group-size",
            type=GroupSizeType(),
            help="Weights that share a scale: 128, 64, 32, channel.  [default: the scheme's]",
        ),
        click.option(
            "--method", type=click.Choice(["gptq", "rtn"]), help="How codes are chosen.  [default: gptq; rtn for FP8]"
        ),
        click.option(
            "--ignore",
            multiple=True,
            metavar="PATTERN",
            help="Leave a Linear alone: exact name, or re:REGEX. Repeatable.",
        ),
        click.option(
            "--recipe",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="TOML or YAML recipe, or llm-compressor's recipe.yaml.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
