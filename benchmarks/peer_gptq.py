"""halfbyte's GPTQ beside llm-compressor's: same model, same calibration tokens, same run, same yardstick.

    python benchmarks/peer_gptq.py --model DIR --calibration-text FILE --validation-text FILE [--runs N]
    python benchmarks/peer_gptq.py --show benchmarks/results/FILE.json

The tools run alternately as child processes that are measured alike (``harness.measure``). Then every tool's last
checkpoint is scored by ``halfbyte compare`` on the validation text; ``--cross-check`` scores it a second time with
``peers/score_transformers.py``, which shares no code with halfbyte. Prints a table made from the result file alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

PEER, OURS = "llmcompressor", "halfbyte"
GROUP_SIZE = 128  # of the peer's W4A16 preset
PEERS = harness.ROOT / "benchmarks" / "peers"
PACKAGES = {
    PEER: ("llmcompressor", "compressed-tensors", "transformers", "torch", "numpy"),
    OURS: ("halfbyte", "compressed-tensors", "transformers", "torch", "numpy", "numba"),
}
KL = "KL divergence (nats)"
SCORES = {  # row of the table: metric of `halfbyte compare`, of score_transformers.py
    KL: ("kl_mean", "kl"),
    "standard error of KL": ("kl_se", "kl_se"),
    "perplexity ratio": ("perplexity_ratio", "perplexity_ratio"),
    "standard error of the ratio": ("perplexity_ratio_se", "perplexity_ratio_se"),
    "top-1 agreement": ("top1_agreement", "top1"),
}


def main() -> None:
    options = arguments()
    if options.show:
        print(render(json.loads(options.show.read_text(encoding="utf-8"))))
        return
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as scratch:
        work = options.out or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = run(options, work)
        path = options.result or harness.RESULTS / f"{result['date']}-peer-gptq-{options.model.name}.json"
        harness.write_result(path, result)  # before scoring, so that hours of runs outlive a failing score
        if not options.no_score:
            result["scores"] = {tool: score(options, work / tool, work) for tool in options.tools}
            harness.write_result(path, result)
    print(render(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="source checkpoint folder")
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--validation-text", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="runs of each tool, alternating (default 3)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--score-tokens", type=int, default=0, help="score the first N validation tokens (0: all)")
    parser.add_argument("--cross-check", action="store_true", help="score with plain transformers as well")
    parser.add_argument("--no-score", action="store_true", help="measure time and memory only")
    parser.add_argument("--only", choices=[PEER, OURS], help="run one of the tools")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of both tools (default: each tool's own choice)")
    parser.add_argument("--peer-python", type=Path, default=harness.ROOT / ".envs/llmcompressor/bin/python")
    parser.add_argument("--out", type=Path, help="keep checkpoints and logs in this folder")
    parser.add_argument(
        "--result", type=Path, help="result file (default: benchmarks/results/DATE-peer-gptq-MODEL.json)"
    )
    parser.add_argument("--show", type=Path, metavar="RESULT", help="print the table of a result file and stop")
    options = parser.parse_args()
    needed = () if options.show else ("model", "calibration_text", "validation_text")
    missing = [f"--{name.replace('_', '-')}" for name in needed if vars(options)[name] is None]
    if missing:
        parser.error(f"needs {', '.join(missing)}")
    options.tools = [options.only] if options.only else [PEER, OURS]
    if not options.show and PEER in options.tools and not options.peer_python.exists():
        parser.error(f"{options.peer_python} is missing; run benchmarks/peers/make_env.sh or give --peer-python")
    return options


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make the windows, run the tools alternately, and gather everything but the scores."""
    windows = work / "windows.npy"
    size = ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    cut = [sys.executable, PEERS / "make_windows.py", options.model, options.calibration_text, windows, *size]
    tokens = harness.json_from(cut)
    python = {PEER: options.peer_python, OURS: Path(sys.executable)}
    runs: list[dict[str, Any]] = []
    for i in range(options.runs):
        for tool in options.tools:
            print(f"run {i + 1} of {options.runs}: {tool}", file=sys.stderr, flush=True)
            runs.append({"run": i, "tool": tool, **one_run(tool, options, work, windows, tokens["sha256"])})
    return {
        "benchmark": "peer-gptq",
        "date": harness.today(),
        "work": {
            "model": options.model.name,
            "model_sha256": file_digest(sorted(options.model.glob("*.safetensors"))),
            "scheme": "W4A16",
            "group_size": GROUP_SIZE,
            "calibration_text": options.calibration_text.name,
            "calibration_text_sha256": file_digest([options.calibration_text]),
            "samples": options.samples,
            "seq_len": options.seq_len,
            "windows_sha256": tokens["sha256"],
            "threads": options.threads,
        },
        "machine": harness.machine(),
        "commit": harness.git_commit(),
        "versions": {tool: harness.versions(python[tool], PACKAGES[tool]) for tool in options.tools},
        "runs": runs,
        "summary": summary(runs, options.tools),
        "scores": {},
    }


def one_run(tool: str, options: argparse.Namespace, work: Path, windows: Path, digest: str) -> dict[str, Any]:
    """Quantise once into ``work / tool``; returns the measurement and what the tool says of itself."""
    out, log, report = work / tool, work / f"{tool}.log", work / f"{tool}.report.json"
    shutil.rmtree(out, ignore_errors=True)
    if tool == PEER:
        command = [options.peer_python, PEERS / "run_llmcompressor.py", options.model, out]
        command += ["--windows", windows, "--report", report]
    else:
        command = [sys.executable, "-m", "halfbyte", "quantize", options.model, out, "--json"]
        command += ["--scheme", "W4A16", "--group-size", str(GROUP_SIZE)]
        command += ["--calibration", f"text:{options.calibration_text}"]
        command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    env = {"HF_HUB_OFFLINE": "1"}
    if options.threads:
        env["OMP_NUM_THREADS"] = str(options.threads)
    measured = harness.plain(harness.measure(command, log, env))
    if tool == PEER:
        inside = json.loads(report.read_text(encoding="utf-8"))
    else:
        manifest = json.loads((out / "halfbyte.json").read_text(encoding="utf-8"))
        if manifest["calibration"]["sha256"] != digest:
            raise SystemExit(f"halfbyte calibrated on other tokens ({manifest['calibration']['sha256']}) than {digest}")
        inside = manifest["run"]
    return {**measured, "checkpoint_sha256": file_digest(sorted(out.glob("*.safetensors"))), "inside": inside}


def summary(runs: list[dict[str, Any]], tools: list[str]) -> dict[str, Any]:
    """Spread of each figure for each tool, and of the ratios halfbyte / peer within each pair of neighbouring runs."""
    figures = ("wall_s", "cpu_s", "peak_rss_bytes", "peak_anonymous_bytes")
    by_tool = {tool: [r for r in runs if r["tool"] == tool] for tool in tools}
    found: dict[str, Any] = {t: {f: harness.spread([r[f] for r in rs]) for f in figures} for t, rs in by_tool.items()}
    if len(tools) == 2:
        pairs = list(zip(by_tool[PEER], by_tool[OURS], strict=True))
        found["paired_ratios"] = {
            f: harness.spread([ours[f] / peer[f] for peer, ours in pairs])
            for f in figures
            if all(p[f] for p, _ in pairs)
        }
    return found


def score(options: argparse.Namespace, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Divergence from the source on the validation text, by halfbyte and, if asked for, by plain transformers."""
    print(f"scoring {checkpoint.name}", file=sys.stderr, flush=True)
    tokens = ["--tokens", str(options.score_tokens)] if options.score_tokens else []
    log = work / f"{checkpoint.name}.compare.log"
    command = [sys.executable, "-m", "halfbyte", "compare", options.model, checkpoint, "--json"]
    harness.measure([*command, "--text", options.validation_text, *tokens], log)
    record = harness.last_json(log)
    kept = ("text_sha256", "tokens", "window", "metrics", "versions")  # not the paths of this machine
    found: dict[str, Any] = {"halfbyte_compare": {key: record[key] for key in kept}}
    if options.cross_check:
        log = work / f"{checkpoint.name}.transformers.log"
        command = [sys.executable, PEERS / "score_transformers.py", options.model, checkpoint, options.validation_text]
        harness.measure([*command, *tokens], log)
        found["transformers"] = harness.last_json(log)
    return found


def file_digest(paths: list[Path]) -> str:
    """sha256 over the files' bytes, one after the other."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 22):
                sha.update(chunk)
    return sha.hexdigest()


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with a line about where it was measured. Uses nothing but the result."""
    tools = [t for t in (PEER, OURS) if t in result["summary"]]
    names = [f"{t} {result['versions'][t].get(t)}" for t in tools]
    ratios = result["summary"].get("paired_ratios", {})
    rows = [["median of runs", *names, "ratio in pairs (range)"]]
    shown = {
        "wall time (s)": ("wall_s", "{:.0f}", 1.0),
        "CPU time (s)": ("cpu_s", "{:.0f}", 1.0),
        "peak memory (GiB)": ("peak_rss_bytes", "{:.2f}", 2.0**30),
        "peak anonymous memory (GiB)": ("peak_anonymous_bytes", "{:.2f}", 2.0**30),
    }
    for title, (figure, form, unit) in shown.items():
        cells = [form.format(result["summary"][t][figure]["median"] / unit) for t in tools]
        r = ratios.get(figure)
        rows.append([title, *cells, f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" if r else ""])
    scores = result["scores"]
    for source, column in (("halfbyte_compare", 0), ("transformers", 1)):
        if not all(source in scores.get(t, {}) for t in tools):
            continue
        for title, keys in SCORES.items():
            values = [scores[t][source]["metrics"][keys[column]] for t in tools]
            label = title if source == "halfbyte_compare" else f"{title}, by plain transformers"
            quotient = f"{values[-1] / values[0]:.2f}" if len(tools) == 2 and title == KL else ""
            rows.append([label, *(f"{v:.4f}" for v in values), quotient])
    machine, work = result["machine"], result["work"]
    where = (
        f"{work['model']}, {work['scheme']} g{work['group_size']}, {work['samples']} x {work['seq_len']} tokens; "
        f"{machine['cpu']}, {machine['cores']} cores, {harness.gib(machine['memory_bytes'])}; {result['date']}, "
        f"commit {(result['commit']['commit'] or 'unknown')[:12]}"
        + (" with changes" if result["commit"]["modified"] else "")
        + others(result["runs"])
    )
    return f"{harness.table(rows)}\n\n{where}"


def others(runs: list[dict[str, Any]]) -> str:
    """How busy the machine was with other work, in words."""
    shares = [r["other_cpu_share"] for r in runs if r["other_cpu_share"] is not None]
    return f"; other work used {min(shares):.0%} to {max(shares):.0%} of the processors meanwhile" if shares else ""


if __name__ == "__main__":
    main()
