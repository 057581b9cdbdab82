"""Render docs/benchmarks.md from the newest result of each kind in results/; nothing in that page is typed by hand.

python benchmarks/report.py            write docs/benchmarks.md
python benchmarks/report.py --check    exit 1 when the page does not match the results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import floor
import gpu
import harness
import memory
import peers
from parts import render as render_parts

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BASELINE = "llmcompressor"
PAGE = HERE.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `benchmarks/report.py` from the files in [benchmarks/results](../benchmarks/results); do not edit.
Absolute times belong to the machine and the hour; ratios between runs that took turns on one machine are the claim.
Where a table says one run of each, a ratio's range is that of one pair. Rows with another commit are of other code,
which [the log](log.md) tells of. [How to run each](../benchmarks/README.md).
"""


def newest(kind: str) -> list[Path]:
    """The latest result file of each subject of a kind (``DATE-KIND-SUBJECT.json``)."""
    latest: dict[str, Path] = {}
    for path in sorted(RESULTS.glob(f"*-{kind}*.json")):
        latest[path.name[len("2026-01-01") :]] = path
    return list(latest.values())


def block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def ablation(result: dict[str, Any]) -> str:
    rows = [f"{'held-out error, RTN = 1':28s} mean over {len(result['linears'])} Linears"]
    rows += [f"{v:28s} {m:.4f}  {result['what'][v]}" for v, m in result["mean_error_relative_to_rtn"].items()]
    tokens = result["calibration"]["tokens_seen"]
    rows += ["", f"{result['model']}, {tokens} tokens; {result['date']}, commit {result['commit'][:12]}"]
    return "\n".join(rows)


def serving(result: dict[str, Any]) -> str:
    """Decode speed and memory of each server, the ratios within rounds, and what eight clients met."""
    rows = [["server", "tokens/s, median", "min", "max", "memory"]]
    for name, found in result["summary"].items():
        speeds = [f"{found[key]:.1f}" for key in ("median", "min", "max")]
        rows.append([name, *speeds, harness.gib(result["memory_bytes"][name])])
    lines = [harness.table(rows), ""]
    lines += [f"- {pair}, median of rounds: {ratio:.3f}" for pair, ratio in result["ratios"].items()]
    threads = result["threads"] or "its own choice of"
    lines += [f"- {result['checkpoint']}, {result['tokens']} tokens an answer, each engine with {threads} threads."]
    if result["soak"]:
        soak = result["soak"]
        lines.append(
            f"- {soak['clients']} clients for {soak['seconds']:.0f} s: {soak['answers']} answers, "
            f"{soak['failed']} errors, "
            f"{soak['tokens_per_s']} tokens/s."
        )
    if result["other_cpu_share"] is not None:
        lines.append(f"- Other work used {100 * result['other_cpu_share']:.0f}% of the processors meanwhile.")
    return "\n".join(lines)


def converting(result: dict[str, Any]) -> str:
    """Times of conversions as multiples of copying the source, with the source in memory and on the disk."""
    rows = [["from", "to", *(f"x cp, source {state}" for state in next(iter(result["median_ratio"].values())))]]
    for pair, ratios in result["median_ratio"].items():
        rows.append([*pair.split(" -> "), *(f"{ratio:.1f}" for ratio in ratios.values())])
    copied = [f"{result['bytes'] / 1e6 / r['cp_s']:.0f}" for r in result["runs"]]
    speeds = f"{min(copied, key=int)} to {max(copied, key=int)} MB/s"
    return f"{harness.table(rows)}\n\n- {result['bytes'] / 1e6:.0f} MB; medians of runs; `cp` with sync had {speeds}."


def beside(kind: str) -> str:
    """One table of all paired runs: every tool's divergence, and its cost as a share of the baseline tool's.

    A tool that was run by itself on the same model, tokens and text stands beside them, without shares of time, and is
    marked. What a file's name says after model and scheme, as the processor, stands behind the tool.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for path in newest(kind):
        r = json.loads(path.read_text(encoding="utf-8"))
        work = r["work"]
        score = next((s["halfbyte_compare"] for s in r["scores"].values() if "halfbyte_compare" in s), {})
        key = (work["model"], work["scheme"], work["group_size"], work["windows_sha256"])
        where = path.stem.partition(f"-{work['model']}-{work['scheme']}")[2].strip("-")
        groups.setdefault((*key, score.get("text_sha256"), score.get("tokens")), []).append((where, r))
    head = ["model, scheme, tool", "KL (nats)", f"of {BASELINE}'s", "wall time", "CPU time", "peak memory", "commit"]
    rows = [head]
    for (model, scheme, size, *_), members in groups.items():
        paired = [(where, r) for where, r in members if BASELINE in r["summary"]["paired_ratios"]]
        alone = [("not in turns", r) for _, r in members if BASELINE not in r["summary"]["paired_ratios"]]
        alone = alone if paired else []
        baseline = next(filter(None, (_divergence(r, BASELINE) for _, r in paired)), None)
        for where, r in [*paired, *alone]:
            ratios = r["summary"]["paired_ratios"].get(BASELINE, {})
            for name in r["competitors"]:
                m = _divergence(r, name)
                if m is None:
                    continue
                shares = [
                    f"{ratios[name][f]['median']:.2f}" if name in ratios else "1" if name == BASELINE else ""
                    for f in ("wall_s", "cpu_s", "peak_rss_bytes")
                ]
                of_baseline = f"{m['kl_mean'] / baseline['kl_mean']:.2f}" if baseline else ""
                words = [f"{model} {scheme} g{size}" if size else f"{model} {scheme}", peers.title(r, name), where]
                kl, commit = peers.plus_minus(m, "kl_mean", "kl_se"), str(r["commit"]["commit"])[:7]
                rows.append([", ".join(filter(None, words)), kl, of_baseline, *shares, commit])
    return harness.table(rows) + "\n"


def _divergence(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    metrics: dict[str, Any] | None = result["scores"].get(name, {}).get("halfbyte_compare", {}).get("metrics")
    return metrics


def page() -> str:
    parts = [HEAD, f"## All paired runs, as shares of {BASELINE}'s\n", beside("peers")]
    for path in newest("peers"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## Against other quantisers: `{path.name}`\n", block(peers.render(result))]
        if path.with_suffix(".png").exists():
            parts.append(f"![accuracy against time, and errors of layers](../benchmarks/results/{path.stem}.png)\n")
    for path in newest("floor"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## Against the arithmetic's floor: `{path.name}`\n", block(floor.render(result))]
    for path in newest("gpu"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## On a GPU: `{path.name}`\n", gpu.render(result) + "\n"]
    for path in newest("serve"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## Serving: `{path.name}`\n", serving(result) + "\n"]
    for path in newest("convert"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## Converting: `{path.name}`\n", converting(result) + "\n"]
    for path in newest("memory"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## Peak memory: `{path.name}`\n", block(memory.render(result))]
        if path.with_suffix(".png").exists():
            parts.append(f"![peak memory against depth](../benchmarks/results/{path.stem}.png)\n")
    for path in newest("parts"):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## What each part is worth for the whole model: `{path.name}`\n", block(render_parts(result))]
    for path in newest("ablation"):
        result = json.loads(path.read_text(encoding="utf-8"))
        title = f"## What each part of the solver is worth, Linear by Linear: `{path.name}`\n"
        parts += [title, block(ablation(result))]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        sys.exit(
            0 if PAGE.read_text(encoding="utf-8") == text else "docs/benchmarks.md is stale: run benchmarks/report.py"
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
