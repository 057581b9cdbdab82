"""``halfbyte``: the group that finds commands, and the one place where errors become exit statuses.

Command modules are imported only when their command runs, so that ``halfbyte --help`` starts without torch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from importlib.metadata import version

import click

from halfbyte.errors import HalfbyteError
from halfbyte.heap import prefer_huge_pages
from halfbyte.startup import collect_less, end_process

# name -> (module that defines `command`, one-line help)
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("halfbyte.cli.plan", "Say what would be quantised, what it costs and every problem, before any work."),
    "quantize": ("halfbyte.cli.quantize", "Write a few-bit checkpoint, one decoder block in memory at a time."),
    "verify": ("halfbyte.cli.verify", "Re-read a written checkpoint with an independent decoder and check every byte."),
    "compare": ("halfbyte.cli.compare", "Measure how far a checkpoint's predictions are from its baseline's."),
    "eval": ("halfbyte.cli.eval", "Measure what a checkpoint keeps of its baseline's abilities, with intervals."),
    "report": ("halfbyte.cli.report", "Draw everything that is known of a checkpoint on one page of HTML."),
    "card": ("halfbyte.cli.card", "Write the model card, every number from a record."),
    "inspect": ("halfbyte.cli.inspect", "Show what is inside a checkpoint: schemes, bits, bytes, errors."),
    "convert": ("halfbyte.cli.convert", "Write a checkpoint in another format, codes and scales carried over."),
    "deploy": ("halfbyte.cli.deploy", "Write the files that put a checkpoint into service: Triton, KServe, podman."),
    "serve": ("halfbyte.cli.serve", "Serve a checkpoint with OpenAI's API, on a GPU or a laptop."),
    "chat": ("halfbyte.cli.chat", "Talk with a checkpoint in the terminal."),
    "bench": ("halfbyte.cli.bench", "Time the answers of a served checkpoint, beside its baseline's."),
    "demo": ("halfbyte.cli.demo", "Do the whole way on a real small model, with explanations."),
}

INTERNAL_ERROR_STATUS = 70


class LazyGroup(click.Group):
    """A group whose commands live in :data:`COMMANDS` and are imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 passed, 1 a check failed, 2 wrong usage or input.",
)
@click.version_option(version("halfbyte"), prog_name="halfbyte")
def cli() -> None:
    """Make a language model small, prove that it is still good, and put it into service.

    Results go to stdout, progress to stderr; every command takes --json.
    """


def entry_point() -> None:
    """Run the command line and exit: 0 passed, 1 a gate failed, 2 usage or input error, 70 a bug in halfbyte."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prefer_huge_pages()
    try:
        cli.main(standalone_mode=False)
    except HalfbyteError as e:
        fail(str(e), e.exit_status, result_printed=e.result_printed)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.UsageError as e:
        hint = f" Try '{e.ctx.command_path} --help'." if e.ctx else ""
        fail(e.format_message().rstrip(".") + "." + hint, 2)
    except click.ClickException as e:
        fail(e.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted; nothing is lost: run the same command with --resume where it has one", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        fail("this is a bug in halfbyte; please report it with the lines above", INTERNAL_ERROR_STATUS)


def process() -> None:
    """What a process of its own does: :func:`entry_point`, and then end at once."""
    collect_less()
    status = 0
    try:
        entry_point()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    end_process(status)
    sys.exit(status)


def fail(message: str, status: int, *, result_printed: bool = False) -> None:
    """Print one line on stderr (with ``--json`` also an object on stdout, unless the result is there) and exit."""
    if "--json" in sys.argv and status != 130 and not result_printed:
        print(json.dumps({"error": message, "exit_status": status}, ensure_ascii=False))
    print(f"halfbyte: {message}", file=sys.stderr)
    sys.exit(status)
