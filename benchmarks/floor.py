"""The least time that GPTQ's arithmetic can take here, and how close halfbyte comes to it.

    python benchmarks/floor.py --model DIR --calibration-text FILE [--samples 64] [--seq-len 512] [--dtype D] [--runs 3]

The floor counts what cannot be left out, at this machine's matmul rates in the dtype that blocks compute in: the
Linears' products, attention over the causal half or the window, and second moments over one triangle, one for each
distinct input (summed in float32). The run is ``--effort low``: tuning is no part of the floor. Norms, activations,
softmax, the solver, reading, writing and start-up count as zero. It is given twice: for two passes through every block
(observe, then move its inputs on; in the first without the last Linear, and the last block has no second), as GPTQ is
mostly done, and for the one pass that halfbyte takes. The rate is measured before and after each run, and the best of
all counts for all: one that is too low would make the floor too easy.

Writes benchmarks/results/DATE-floor-MODEL-DTYPE.json.
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

COUNT = harness.ROOT / "benchmarks" / "operations.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="what blocks compute in"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as scratch:
        runs = by_the_best_rate([one_run(options, Path(scratch)) for _ in range(options.runs)])
    result = {
        "benchmark": "floor",
        "date": harness.today(),
        "work": {
            "model": options.model.name,
            "scheme": "W4A16",
            "group_size": options.group_size,
            "samples": options.samples,
            "seq_len": options.seq_len,
        },
        "machine": harness.machine(),
        "commit": harness.git_commit(),
        "versions": harness.versions(sys.executable, ("halfbyte", "torch", "transformers", "numpy", "numba")),
        "runs": runs,
    }
    name = f"{result['date']}-floor-{options.model.name}-{runs[0]['dtype']}.json"
    path = options.result or harness.RESULTS / name
    harness.write_result(path, result)
    print(render(result))


def one_run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One quantisation between two measurements of the rate."""
    count = [sys.executable, COUNT, options.model, str(options.samples), str(options.seq_len), options.dtype]
    before = harness.json_from(count)
    out = scratch / "out"
    command = [sys.executable, "-m", "halfbyte", "quantize", options.model, out, "--json"]
    command += ["--group-size", str(options.group_size), "--calibration", f"text:{options.calibration_text}"]
    command += ["--effort", "low", "--dtype", options.dtype]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    measured = harness.plain(harness.measure(command, scratch / "log"))
    after = harness.json_from(count)
    manifest = json.loads((out / "halfbyte.json").read_text(encoding="utf-8"))
    assert manifest["run"]["dtype"] == before["dtype"]
    shutil.rmtree(out)
    return {
        "operations": before["operations"],
        "dtype": before["dtype"],
        "rates_around": [before["rates"], after["rates"]],
        "blocks_s": sum(b["seconds"] for b in manifest["run"]["blocks"]),
        "solver_s": sum(b["solver_seconds"] for b in manifest["run"]["blocks"]),
        **measured,
    }


def by_the_best_rate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run with the best rate that was measured around any of them, and its floor by that."""
    around = [rates for run in runs for rates in run["rates_around"]]
    best = {kind: max(rates[kind] for rates in around) for kind in around[0]}

    def floors(operations: dict[str, dict[str, float]]) -> dict[str, float]:
        return {name: sum(n / best[kind] for kind, n in parts.items()) for name, parts in operations.items()}

    return [{**run, "rates": best, "floor_s": floors(run["operations"])} for run in runs]


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table; uses nothing but the result."""
    names = list(result["runs"][0]["floor_s"])
    head = [
        "run",
        "Linears (GFLOP/s)",
        "moments (GFLOP/s)",
        *(f"floor, {n} (s)" for n in names),
        "blocks (s)",
        "of it solver (s)",
        "wall (s)",
        "CPU (s)",
    ]
    rows = [[*head, *(f"wall / floor, {n}" for n in names)]]
    for i, r in enumerate(result["runs"]):
        times = (*r["floor_s"].values(), r["blocks_s"], r["solver_s"], r["wall_s"], r["cpu_s"])
        shares = [f"{r['wall_s'] / r['floor_s'][n]:.2f}" for n in names]
        rates = [f"{r['rates'][kind] / 1e9:.0f}" for kind in ("linears", "second moments")]
        rows.append([str(i + 1), *rates, *(f"{t:.0f}" for t in times), *shares])
    m = result["machine"]
    lines = [
        harness.table(rows),
        "",
        f"{m['cpu']}, {m['cores']} cores; {result['date']}, commit {str(result['commit']['commit'])[:12]}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
