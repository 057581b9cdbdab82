"""Peak memory of halfbyte on checkpoints of growing depth, and on the shapes of a 27B model.

    python benchmarks/memory.py layers   [--width 1024] [--layers 4 8 16 32]
    python benchmarks/memory.py gemma27b [--layers 4] [--real-layers 2]
    python benchmarks/memory.py mixture  [--layers 1]
    python benchmarks/memory.py limit    [--width 2048] [--layers 28] [--limit-mib 1200] [--group]
    python benchmarks/memory.py show RESULT.json        the table again, and the picture beside the result

``layers`` quantises synthetic Llama-shaped checkpoints, with and without ``--offload``, each in a child process whose
peak memory the kernel reports; it writes a result and a picture. ``gemma27b`` plans the 27B Gemma 3 at its full depth
and quantises ``--layers`` of its blocks (62 for all: hours on a small CPU, and 17 GB of disk). ``mixture`` quantises
blocks in the shapes of Qwen3-235B-A22B, of which one alone has 4.8 GB of experts. ``limit`` quantises a checkpoint that
is larger than the memory which the kernel lets the process have: private memory (``ulimit -d``), or with ``--group``
all of it, page cache included (a control group, as ``systemd-run -p MemoryMax=`` makes one).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

MAKER = harness.ROOT / "benchmarks" / "synthetic.py"
PACKAGES = ("halfbyte", "torch", "transformers", "numpy", "numba")
GEMMA_LAYERS = 62


def main() -> None:
    options = arguments()
    if options.work == "show":
        path, result = options.result, json.loads(options.result.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory(prefix="halfbyte-bench-", dir=options.scratch) as scratch:
            works = {"layers": layers, "gemma27b": gemma27b, "mixture": mixture, "limit": limit}
            result = works[options.work](options, Path(scratch))
        path = options.result or harness.RESULTS / f"{result['date']}-{result['benchmark']}.json"
        harness.write_result(path, result)
    print(render(result))
    if result["benchmark"] == "memory-layers":
        draw(result, path.with_suffix(".png"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = parser.add_subparsers(dest="work", required=True)
    depth = works.add_parser("layers", help="peak memory against depth")
    depth.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    depth.add_argument("--width", type=int, default=1024)
    large = works.add_parser("gemma27b", help="plan and quantise the shapes of Gemma 3 27B")
    large.add_argument("--layers", type=int, default=4, help="decoder blocks to quantise (the plan has all 62)")
    large.add_argument("--real-layers", type=int, default=2, help="of these, how many hold random data; others zeros")
    mixed = works.add_parser("mixture", help="quantise the shapes of Qwen3-235B-A22B")
    mixed.add_argument("--layers", type=int, default=1)
    limited = works.add_parser("limit", help="a checkpoint larger than the memory limit")
    limited.add_argument("--layers", type=int, default=32)
    limited.add_argument("--width", type=int, default=2048)
    limited.add_argument("--limit-mib", type=int, default=1200)
    limited.add_argument("--group", action="store_true", help="limit all memory by a control group (Linux, as root)")
    for p, samples, seq_len in ((depth, 8, 256), (large, 2, 64), (mixed, 4, 256), (limited, 8, 256)):
        p.add_argument("--samples", type=int, default=samples)
        p.add_argument("--seq-len", type=int, default=seq_len)
        p.add_argument("--threads", type=int, help="OMP_NUM_THREADS of halfbyte")
        p.add_argument("--scratch", type=Path, help="folder for checkpoints (default: the system's temporary folder)")
        p.add_argument("--result", type=Path, help="result file (default: in benchmarks/results/)")
    shown = works.add_parser("show", help="print and draw a result file")
    shown.add_argument("result", type=Path)
    return parser.parse_args()


def header(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What every result starts with."""
    return {
        "benchmark": name,
        "date": harness.today(),
        "work": {
            "scheme": "W4A16",
            "samples": options.samples,
            "seq_len": options.seq_len,
            "calibration": "random-tokens",
            "threads": options.threads,
        },
        "machine": harness.machine(),
        "commit": harness.git_commit(),
        "versions": harness.versions(sys.executable, PACKAGES),
    }


def quantize(
    options: argparse.Namespace,
    source: Path,
    scratch: Path,
    *,
    offload: bool | None,
    data_limit: int | None = None,
    group: Path | None = None,
) -> dict[str, Any]:
    """Quantise once, drop the output, and return the measurement beside the peak that the run's own plan foretold, and
    where hidden states were: with ``offload=None`` halfbyte chooses."""
    out = scratch / "out"
    rest = ["--scheme", "W4A16", "--json", "--device", "cpu", "--calibration", "random-tokens"]
    rest += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    rest += [] if offload is None else ["--offload" if offload else "--no-offload"]
    command = [sys.executable, "-m", "halfbyte", "quantize", source, out, *rest]
    measured = harness.measure(command, scratch / "log", environment(options), data_limit, group)
    facts = json.loads((out / "halfbyte.json").read_text(encoding="utf-8"))["run"]
    shutil.rmtree(out)
    foretold = {"planned_peak_bytes": facts["planned_peak_bytes"], "offload": facts["offload"]}
    return {**foretold, **harness.plain(measured)}


def environment(options: argparse.Namespace) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}


def layers(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Peak memory of each depth, with and without hidden states on disk."""
    result = header("memory-layers", options)
    result["work"]["width"] = options.width
    runs: list[dict[str, Any]] = []
    for depth in options.layers:
        source = scratch / f"llama-{depth}"
        size = ["--width", str(options.width), "--layers", str(depth)]
        made = harness.json_from([sys.executable, MAKER, "llama", source, *size])
        for offload in (False, True):
            print(f"{depth} layers, {'with' if offload else 'without'} --offload", file=sys.stderr, flush=True)
            measured = quantize(options, source, scratch, offload=offload)
            runs.append({"layers": depth, "checkpoint_bytes": made["tensor_bytes"], **measured})
        shutil.rmtree(source)
    result["runs"] = runs
    result["growth"] = {str(offload): growth([r for r in runs if r["offload"] is offload]) for offload in (False, True)}
    return result


def growth(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Peak of the deepest checkpoint over that of the shallowest, beside the same ratio of their sizes."""
    first, last = min(runs, key=lambda r: r["layers"]), max(runs, key=lambda r: r["layers"])
    return {
        "from_layers": first["layers"],
        "to_layers": last["layers"],
        "peak_ratio": last["peak_rss_bytes"] / first["peak_rss_bytes"],
        "anonymous_ratio": last["peak_anonymous_bytes"] / max(1, first["peak_anonymous_bytes"]),
        "checkpoint_ratio": last["checkpoint_bytes"] / first["checkpoint_bytes"],
    }


def gemma27b(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Plan all 62 blocks from headers; quantise some."""
    result = header("memory-gemma3-27b", options)
    result["work"]["real_layers"] = options.real_layers
    whole, part = scratch / "gemma3-27b", scratch / "gemma3-27b-part"
    make = [sys.executable, MAKER, "gemma3-27b"]
    made = harness.json_from([*make, whole, "--layers", str(GEMMA_LAYERS), "--real-layers", "0"])
    log = scratch / "plan.log"
    print("plan", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "halfbyte", "plan", whole, "--scheme", "W4A16", "--json"]
    measured = harness.plain(harness.measure(command, log, environment(options)))
    plan = harness.last_json(log)
    keys = ("num_blocks", "quantized_parameters", "copied_parameters", "bytes_before", "bytes_after", "problems")
    plan_run = {"work": "plan", "layers": GEMMA_LAYERS, "checkpoint_bytes": made["tensor_bytes"], **measured}
    plan_run["plan"] = {k: plan[k] for k in keys}
    shutil.rmtree(whole)
    depth = ["--layers", str(options.layers), "--real-layers", str(min(options.real_layers, options.layers))]
    made = harness.json_from([*make, part, *depth])
    print(f"quantise {options.layers} blocks", file=sys.stderr, flush=True)
    measured = quantize(options, part, scratch, offload=True)
    solved = {"work": "quantize", "layers": options.layers, "checkpoint_bytes": made["tensor_bytes"], **measured}
    result["runs"] = [plan_run, solved]
    return result


def mixture(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Blocks that are larger than what is held of them."""
    result = header("memory-mixture", options)
    source = scratch / "mixture"
    made = harness.json_from([sys.executable, MAKER, "qwen3-235b", source, "--layers", str(options.layers)])
    measured = quantize(options, source, scratch, offload=False)
    run = {"work": "quantize", "layers": options.layers, "checkpoint_bytes": made["tensor_bytes"]}
    result["runs"] = [{**run, **measured}]
    return result


def limit(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A checkpoint larger than the memory that the kernel gives to the process, which nobody tells halfbyte of."""
    result = header("memory-limit", options)
    source, allowed = scratch / "llama", options.limit_mib * 2**20
    size = ["--width", str(options.width), "--layers", str(options.layers)]
    made = harness.json_from([sys.executable, MAKER, "llama", source, *size])
    run = {"work": "quantize", "layers": options.layers, "width": options.width}
    run |= {"limit_bytes": allowed, "page_cache_too": options.group}
    if options.group:
        harness.forget_pages(source)
        with harness.memory_group(allowed) as group:
            measured = quantize(options, source, scratch, offload=None, group=group)
            measured["group_peak_bytes"] = harness.group_peak_bytes(group)
    else:
        measured = quantize(options, source, scratch, offload=None, data_limit=allowed)
    result["runs"] = [{**run, "checkpoint_bytes": made["tensor_bytes"], **measured}]
    return result


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table; uses nothing but the result."""
    head = ["run", "layers", "checkpoint", "peak memory", "of it anonymous", "plan said", "wall (s)", "CPU (s)"]
    rows = [head]
    for r in result["runs"]:
        name = r["work"] if "work" in r else "quantize --offload" if r["offload"] else "quantize"
        sizes = (r["checkpoint_bytes"], r["peak_rss_bytes"], r["peak_anonymous_bytes"])
        said = harness.gib(r["planned_peak_bytes"]) if "planned_peak_bytes" in r else ""
        times = (f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}")
        rows.append([name, str(r["layers"]), *map(harness.gib, sizes), said, *times])
    lines = [harness.table(rows), ""]
    for offload, g in result.get("growth", {}).items():
        side = "with" if offload == "True" else "without"
        ratios = f"peak x {g['peak_ratio']:.3f}, anonymous x {g['anonymous_ratio']:.3f}"
        ratios += f", checkpoint x {g['checkpoint_ratio']:.2f}"
        lines.append(f"{side} --offload, {g['from_layers']} to {g['to_layers']} layers: {ratios}")
    for r in result["runs"]:
        if "limit_bytes" in r:
            ratio = r["checkpoint_bytes"] / r["limit_bytes"]
            what = "all memory, page cache included" if r.get("page_cache_too") else "private memory"
            limit = f"limit of {what}: {harness.gib(r['limit_bytes'])}; checkpoint x {ratio:.2f} of it"
            if "offload" in r:  # it is not in results from before there was a choice
                limit += f"; hidden states by its own choice {'on disk' if r['offload'] else 'in memory'}"
            lines.append(limit)
    m = result["machine"]
    lines.append(f"{m['cpu']}, {m['cores']} cores, {harness.gib(m['memory_bytes'])}; {result['date']}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Peak memory against layers, with the checkpoint's size for comparison, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    styles = (
        (False, "halfbyte, peak memory", "o", "#0072B2"),
        (True, "halfbyte --offload, peak memory", "s", "#D55E00"),
    )
    for offload, label, marker, colour in styles:
        runs = [r for r in result["runs"] if r["offload"] is offload]
        xs, ys = [r["layers"] for r in runs], [r["peak_rss_bytes"] / 2**30 for r in runs]
        axes.plot(xs, ys, marker=marker, color=colour, label=label)
    runs = [r for r in result["runs"] if not r["offload"]]
    xs, ys = [r["layers"] for r in runs], [r["checkpoint_bytes"] / 2**30 for r in runs]
    axes.plot(xs, ys, linestyle="--", color="0.45", label="size of the checkpoint (bfloat16)")
    axes.set_xticks(xs)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decoder blocks")
    axes.set_ylabel("GiB")
    axes.set_title(f"Peak memory against depth (Llama shape, width {result['work']['width']}, W4A16 GPTQ)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
