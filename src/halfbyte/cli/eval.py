"""``halfbyte eval CKPT --baseline BASE --suite NAME``: tasks on both models, paired."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli.console import emit, json_option, reporter
from halfbyte.cli.options import device_option
from halfbyte.errors import GateFailed
from halfbyte.evaluation.code_execution import WARNING
from halfbyte.evaluation_records import Estimated, EvalRecord, score_text


@click.command("eval")
@click.argument("checkpoint")
@click.option("--baseline", required=True, metavar="BASE", help="The model that it was made from.")
@click.option(
    "--suite",
    "suites",
    default="quick",
    show_default=True,
    metavar="NAME[,NAME...]",
    help="quick, openllm-v1, openllm-v1-chat, openllm-v2, llama-instruct, multilingual-mmlu, reasoning, vision, code; "
    "a YAML file with a list of tasks; or tasks of lm-eval's.",
)
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm", "llamacpp", "openai-url"]),
    default="hf",
    show_default=True,
    help="hf dequantises once; vllm and llamacpp run the packed weights; openai-url asks servers.",
)
@click.option("--backend-args", metavar="K=V,...", help="Further arguments for the engine, e.g. max_length=4096.")
@click.option("--url", help="With openai-url: where the checkpoint is served, up to /v1.")
@click.option("--base-url", help="With openai-url: where the baseline is served.")
@click.option(
    "--chat-completions", is_flag=True, help="With openai-url: ask /chat/completions; no choices, only texts."
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each (sub)task, at most.  [default: all]")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Requests at a time.")
@click.option(
    "--tasks-dir",
    type=click.Path(path_type=Path),
    help="Folder with YAML files of further lm-eval tasks.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Where eval.json and eval/ go.  [default: CHECKPOINT]")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Where scores are kept.  [default: ~/.cache/halfbyte]"
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Take what was measured before, the unfinished task's answers too, from the cache.",
)
@click.option("--chat-template/--no-chat-template", default=None, help="For all tasks.  [default: as the suites say]")
@click.option(
    "--gate", "gate", metavar="CONDITIONS", help="Exit with status 1 unless they hold, e.g. recovery>=99,kl<=0.05."
)
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help=f"For the suite code. {WARNING}",
)
@device_option
@json_option
def command(
    checkpoint: str,
    baseline: str,
    suites: str,
    backend: str,
    backend_args: str | None,
    url: str | None,
    base_url: str | None,
    chat_completions: bool,
    limit: int | None,
    batch_size: int,
    tasks_dir: Path | None,
    out: Path | None,
    cache_dir: Path | None,
    resume: bool,
    chat_template: bool | None,
    gate: str | None,
    allow_code_execution: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure what CHECKPOINT keeps of BASE's abilities: scores, recovery with its interval, flips, divergence.

    Scores of the baseline are kept and used again for the next checkpoint; a run that was killed goes on where it was.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm: progress is told by halfbyte
    from halfbyte.evaluation.backends import Backend, parse_arguments
    from halfbyte.evaluation.gates import parse_gates

    gates = parse_gates(gate or "")
    engine = Backend(
        name=backend,
        batch_size=batch_size,
        device=device,
        url=url,
        base_url=base_url,
        chat=chat_completions,
        arguments=parse_arguments(backend_args),
    )
    from halfbyte.evaluation.run import evaluate

    record = evaluate(
        checkpoint,
        baseline=baseline,
        suite=[s.strip() for s in suites.split(",") if s.strip()],
        backend=engine,
        limit=limit,
        tasks_dir=tasks_dir,
        out=out,
        cache=cache_dir,
        resume=resume,
        chat_template=chat_template,
        gates=gates,
        allow_code_execution=allow_code_execution,
        reporter=reporter(),
    )
    emit(record, as_json=as_json, render=lambda console: render(console, record))
    if record.gate_failures:
        raise GateFailed("; ".join(record.gate_failures), where=f"{checkpoint}: --gate")


def render(console: Console, record: EvalRecord) -> None:
    """Draw an evaluation for a person."""
    console.print(f"{record.checkpoint} against {record.base}, engine {record.backend['backend']}")
    table = Table(box=None, pad_edge=False)
    for name in ("", "documents", "baseline", "this", "recovery, %", "95 %", "lost/won", "p", ""):
        table.add_column(name, justify="left" if not name else "right")
    earlier = [row for row in record.tasks if row.measured]
    for row in record.tasks:
        flips = "" if row.right_to_wrong is None else f"{row.right_to_wrong}/{row.wrong_to_right}"
        p = "" if row.mcnemar_p is None else f"{row.mcnemar_p:.3f}"
        table.add_row(
            f"{row.title} *" if row.measured else row.title,
            str(row.documents),
            score_text(row.base, share=row.is_share),
            score_text(row.value, share=row.is_share),
            *recovery_cells(row.recovery),
            flips,
            p,
            row.verdict or row.note or "",
        )
    for mean in record.averages:
        name = f"{mean.category}: average"
        table.add_row(
            name, "", f"{100 * mean.base:.2f}", f"{100 * mean.value:.2f}", *recovery_cells(mean.ratio_of_averages),
            "", "", f"{mean.verdict} (ratio of averages)",
        )  # fmt: skip
        table.add_row("", "", "", "", *recovery_cells(mean.average_of_ratios), "", "", "(average of ratios)")
    console.print(table)
    if earlier:
        engines = dict.fromkeys(str(record.measured(row).backend.get("backend")) for row in earlier)
        console.print(f"* measured by an earlier command (engine {', '.join(engines)})")
    if record.divergence:
        d = record.divergence
        console.print(
            f"on {record.divergence_text}: KL {d['kl_mean']:.5f} ± {d['kl_se']:.5f} nats, perplexity ratio "
            f"{d['perplexity_ratio']:.4f} ± {d['perplexity_ratio_se']:.4f}, "
            f"top-1 agreement {100 * d['top1_agreement']:.2f}%"
        )


def recovery_cells(found: Estimated | None) -> tuple[str, str]:
    """A recovery and its interval, in percent."""
    if found is None:
        return "n/a", ""
    return (
        f"{found.value:.1f}",
        "" if found.low is None or found.high is None else f"{found.low:.1f} – {found.high:.1f}",
    )
