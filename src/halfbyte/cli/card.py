"""``halfbyte card CKPT``: the model card, from records."""

from __future__ import annotations

from pathlib import Path

import click

from halfbyte.cli.console import emit, json_option, reporter
from halfbyte.errors import UsageError


@click.command("card")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The base model's folder: its card has licence, languages, citation.",
)
@click.option("--base-model", metavar="ORG/NAME", help="The base model's hub id, where the records know a folder only.")
@click.option("--license", "licence", metavar="ID", help="The licence, where the source's card does not say.")
@click.option("--repo-id", metavar="ORG/NAME", help="What it will be published as.")
@click.option("--lang", type=click.Choice(["en", "zh", "ko"]), default="en", show_default=True, help="Of the text.")
@click.option("--push", is_flag=True, help="Upload the folder to --repo-id.")
@json_option
def command(
    checkpoint: Path,
    source: Path | None,
    base_model: str | None,
    licence: str | None,
    repo_id: str | None,
    lang: str,
    push: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT/README.md for the Hugging Face hub: every number from a record, none typed.

    What no record knows is left out; what could be given is said on stderr.
    """
    if push and repo_id is None:
        raise UsageError("where to is not said", where="--push", remedy="Add --repo-id ORG/NAME.")
    from halfbyte.cards.write import CARD_NAME, card

    written = card(checkpoint, source=source, repo_id=repo_id, base_model=base_model, licence=licence, lang=lang)
    say = reporter()
    for note in written.notes:
        say.say(note)
    address = None
    if push and repo_id is not None:
        from halfbyte.cards.files import push as upload

        address = upload(checkpoint, repo_id)
    paths = [str(checkpoint / CARD_NAME), *(str(checkpoint / p) for p in written.results)]
    result = {"files": paths, "notes": written.notes, "url": address}
    emit(
        result, as_json=as_json, render=lambda console: console.print("\n".join(paths + ([address] if address else [])))
    )
