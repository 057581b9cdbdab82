"""``report``: one HTML page, whole in itself, from the records in a folder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from halfbyte.cards.facts import Facts, optional, public_name
from halfbyte.cards.write import size
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.evaluation_records import EVAL_NAME, EvalRecord
from halfbyte.records import (
    BENCH_NAME,
    COMPARE_NAME,
    CONVERT_NAME,
    MANIFEST_NAME,
    VERIFY_NAME,
    CompareRecord,
    ConvertRecord,
    Manifest,
    VerifyRecord,
    read_json,
)
from halfbyte.reporting.figures import histogram, layer_grid, recovery_figure, speed_rows

METRICS = (
    ("KL divergence, mean", "kl_mean", "kl_se", 1, "{:.5f}", " nats"),
    ("KL divergence, median", "kl_median", None, 1, "{:.5f}", " nats"),
    ("KL divergence, 99th percentile", "kl_p99", None, 1, "{:.4f}", " nats"),
    ("KL divergence, largest", "kl_max", None, 1, "{:.3f}", " nats"),
    ("Perplexity, baseline", "perplexity_base", None, 1, "{:.3f}", ""),
    ("Perplexity, this model", "perplexity", None, 1, "{:.3f}", ""),
    ("Perplexity ratio", "perplexity_ratio", "perplexity_ratio_se", 1, "{:.4f}", ""),
    ("Same most likely token", "top1_agreement", "top1_agreement_se", 100, "{:.2f}", "%"),
)


def read_run(folder: Path) -> Facts:
    """The records in a folder: a checkpoint's, or the one that ``eval --out`` wrote.

    Raises:
        CheckpointError: there is no record in it, or one that cannot be read.
    """
    names = (MANIFEST_NAME, VERIFY_NAME, COMPARE_NAME, EVAL_NAME, CONVERT_NAME)
    if not any((folder / n).is_file() for n in names):
        raise CheckpointError(
            "there is no record in it",
            where=str(folder),
            why=f"looked for {', '.join(names)}",
            remedy="Give a folder that halfbyte's quantize, compare or eval wrote.",
        )
    return Facts(
        folder=folder,
        config={},
        manifest=optional(Manifest, folder / MANIFEST_NAME),
        verify=optional(VerifyRecord, folder / VERIFY_NAME),
        compare=optional(CompareRecord, folder / COMPARE_NAME),
        convert=optional(ConvertRecord, folder / CONVERT_NAME),
        evaluation=optional(EvalRecord, folder / EVAL_NAME),
    )


def report(run: str | Path, out: str | Path) -> Path:
    """Write the page.

    Args:
        run: folder with records.
        out: the file.

    Raises:
        CheckpointError: there is nothing to report; OutputError: the file cannot be written.
    """
    folder, target = Path(run), Path(out)
    facts = read_run(folder)
    bench = read_json(folder / BENCH_NAME) if (folder / BENCH_NAME).is_file() else None
    text = render(facts, bench)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as e:
        raise OutputError(f"the page cannot be written: {e.strerror}", where=str(target)) from None
    return target


def render(facts: Facts, bench: Any = None) -> str:
    """The page's text. Everything in it that came from a file is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda n: (files("halfbyte.reporting") / n).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
    )
    record, manifest = facts.evaluation, facts.manifest
    source = facts.source_name
    name = public_name(record.checkpoint) if record else facts.folder.resolve().name
    versions = (manifest.versions if manifest else {}) | (record.versions if record else {})
    return environment.get_template("page.html.jinja").render(
        title=name,
        base=public_name(source) if source else "",
        tiles=tiles(facts),
        gates=gates(record),
        recovery=recovery_figure(record) if record else None,
        metrics=metrics(facts),
        divergence_text=divergence_text(facts),
        histogram=histogram(facts.compare) if facts.compare else None,
        grid=layer_grid(manifest) if manifest else None,
        calibrated=manifest is not None and manifest.calibration is not None,
        sizes=sizes(manifest),
        speed=speed_rows(bench),
        checks=[(c.name, c.status, c.detail) for c in facts.verify.checks] if facts.verify else [],
        versions=", ".join(f"{k} {v}" for k, v in sorted(versions.items())),
    )


def tiles(facts: Facts) -> list[tuple[str, str]]:
    """The numbers that come first."""
    found = []
    if facts.evaluation:
        means = [(m.category, m.ratio_of_averages) for m in facts.evaluation.averages]
        found += [(f"{r.value:.1f}%", f"recovery, {category}") for category, r in means if r is not None]
    measured = divergence_of(facts)
    if measured:
        found.append((f"{measured['kl_mean']:.4f}", "nats, mean KL divergence"))
        found.append((f"{100 * measured['top1_agreement']:.1f}%", "same most likely token"))
    if facts.manifest:
        m = facts.manifest
        found.append((f"{m.bits_per_weight:.2f}", "bits a quantised weight"))
        found.append((size(m.bytes_after), f"of {size(m.bytes_before)} before"))
    return found


def divergence_of(facts: Facts) -> dict[str, float] | None:
    """compare.json's metrics, or those that eval.json holds."""
    if facts.compare:
        return facts.compare.metrics
    return facts.evaluation.divergence if facts.evaluation else None


def divergence_text(facts: Facts) -> str:
    """What it was measured on."""
    if facts.compare:
        return f"{facts.compare.tokens:,} tokens of {Path(facts.compare.text).name}"
    return (facts.evaluation.divergence_text or "") if facts.evaluation else ""


def metrics(facts: Facts) -> list[tuple[str, str]]:
    """Rows of the divergence table."""
    measured = divergence_of(facts)
    rows = []
    for title, key, error, scale, form, unit in METRICS if measured else ():
        if measured is not None and key in measured:
            text = form.format(scale * measured[key])
            if error and error in measured:
                text += " ± " + form.format(scale * measured[error])
            rows.append((title, text + unit))
    return rows


def gates(record: EvalRecord | None) -> list[tuple[str, str]]:
    """Each gate with what was said of it when it failed."""
    if record is None:
        return []
    return [(g, next((f for f in record.gate_failures if f.startswith(f"{g}:")), "")) for g in record.gates]


def sizes(manifest: Manifest | None) -> list[tuple[str, str, float]]:
    """Bytes before and after, and the share of the larger."""
    if manifest is None:
        return []
    most = max(manifest.bytes_before, manifest.bytes_after)
    return [
        (name, size(n), 100 * n / most)
        for name, n in (("before", manifest.bytes_before), ("after", manifest.bytes_after))
    ]
