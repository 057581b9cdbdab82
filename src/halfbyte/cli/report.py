"""``halfbyte report RUN -o report.html``: everything that is known, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from halfbyte.cli.console import emit, json_option


@click.command("report")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The page to write.",
)
@click.option(
    "--plots", type=click.Path(file_okay=False, path_type=Path), help="Folder for the figures as SVG and PNG, too."
)
@json_option
def command(run: Path, out: Path, plots: Path | None, as_json: bool) -> None:
    """Draw what the records in RUN hold on one page of HTML that needs nothing else.

    RUN is a checkpoint's folder, or the one that `eval --out` wrote.
    """
    from halfbyte.reporting.page import read_run, report

    written = [report(run, out)]
    if plots is not None:
        from halfbyte.reporting.plots import write_plots

        written += write_plots(read_run(run), plots)
    result = {"files": [str(p) for p in written]}
    emit(result, as_json=as_json, render=lambda console: console.print("\n".join(result["files"])))
