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
    """Add the options that make a recipe: ``--scheme``, ``--group-size``, ``--target-bits`` and so on."""
    options = [
        click.option("--scheme", default="W4A16", show_default=True, help=f"Number format: {', '.join(PRESETS)}."),
        click.option(
            "--group-size",
            type=GroupSizeType(),
            help="Weights that share a scale: 128, 64, 32, channel.  [default: the scheme's]",
        ),
        click.option(
            "--target-bits",
            type=float,
            metavar="BITS",
            help="Mixed precision: stored bits a weight, at most, on average, e.g. 4.5. Linears that suffer most from "
            "the scheme, by measurement, get W8A16.",
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
        click.option(
            "--effort",
            type=click.Choice(["low", "standard", "high"]),
            help="How long each block is tuned on its output after GPTQ: low is not at all; high ends with all scales "
            "tuned together, and takes several times as long.  [default: standard]",
        ),
        click.option(
            "--all-experts",
            is_flag=True,
            default=None,
            help="Let every expert of a mixture see all calibration tokens, not only those routed to it.",
        ),
    ]
    return _with(function, options)


def calibration_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--calibration``, ``--samples``, ``--seq-len``, ``--offload`` and ``--dtype``."""
    options = [
        click.option(
            "--calibration",
            metavar="SPEC",
            help="self, text:FILE, jsonl:FILE, hf:DATASET[:CONFIG][:SPLIT], vlm:FOLDER_OR_JSONL (pictures and text), "
            "random-tokens, or a mixture such as hf:DATASET*0.5+vlm:FOLDER*0.5.  "
            "[default: self where the model fits in memory]",
        ),
        click.option("--samples", type=click.IntRange(min=1), help="Calibration sequences.  [default: 128]"),
        click.option("--seq-len", type=click.IntRange(min=2), help="Tokens in each.  [default: 512]"),
        click.option(
            "--offload/--no-offload",
            default=None,
            help="Keep hidden states on disk instead of in memory.  [default: where they would not fit]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
            show_default=True,
            help="What blocks compute in; auto takes the checkpoint's bfloat16 where the processor multiplies it fast.",
        ),
    ]
    return _with(function, options)


def _with(function: Callable[..., Any], options: list[Callable[..., Any]]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto takes a GPU where there is one.",
)
