"""What a GPU makes of the shapes of Llama 3 8B: seconds a block, by stage, and beside llm-compressor's own functions.

    python benchmarks/gpu.py                              on the GPU, a few minutes
    python benchmarks/gpu.py --device cpu --tiny          the same code on toy shapes, seconds; says nothing about speed

Three parts, none of which needs a model or a network:

- *the card*: its bfloat16 rate, from one large matrix product, best of ten, and the maker's figure where we know it;
- *blocks*: ``halfbyte.quantize`` on a checkpoint of random weights with random tokens (128 x 512), from files to files.
  With ``--effort low``, which is GPTQ and one pass through each block, once as it is, for seconds a block: first and
  last are left out (compiling; no next block to make inputs for). Once with the GPU awaited at the bounds of each
  stage, for the shares of stages; that run is slower. And once at standard, which tunes blocks besides;
- *the same matrices*: Hessians and solver alone, for each Linear of a block, on random activations; halfbyte's and, in
  an interpreter that has it, llm-compressor's. Each twice, the second counts.

Operations are those that have to be done: a product's 2 m n k, a second moment over one triangle, once for each
distinct input. Writes benchmarks/results/DATE-gpu-CARD.json.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import harness
import synthetic
import torch
from gpu_work import LLAMA_3_8B, TINY, Shapes, finish, made, relative_error, seconds

from halfbyte import blocks, pipeline, quantize, solver
from halfbyte.kernels.dispatch import gpu_problem
from halfbyte.methods import gptq
from halfbyte.methods.gptq import factor_hessian, quantize_gptq
from halfbyte.methods.pooled import shrinkage
from halfbyte.schemes import WeightFormat
from halfbyte.sequential import Sequential
from halfbyte.statistics import SecondMoment, multiplies_mixed

PEER = harness.ROOT / "benchmarks" / "peers" / "gpu_llmcompressor.py"
PACKAGES = ("halfbyte", "torch", "triton", "transformers", "compressed-tensors", "numpy", "numba")
# Dense bfloat16 with float32 sums, FLOP/s, from NVIDIA's data sheets.
NOMINAL = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
STAGES: tuple[tuple[Any, str, str], ...] = (
    (blocks.StreamedModel, "_place", "loading"),
    (Sequential, "_run_to_stage", "forward"),
    (pipeline.Stream, "advance", "forward"),
    (SecondMoment, "add", "second moments"),
    (solver, "factor_hessian", "factor"),
    (gptq, "searched", "scale search"),
    (gptq, "solve_columns", "columns"),
    (gptq, "refine", "refinement"),
)


class Clock:
    """Seconds inside each stage, less what nested stages took; the device is awaited at every bound."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, dict.fromkeys((s for _, _, s in STAGES), 0.0)
        self._open: list[float] = []

    def timed(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            finish(self.device)
            start = time.perf_counter()
            self._open.append(0.0)
            try:
                return work(*args, **kwargs)
            finally:
                finish(self.device)
                whole, nested = time.perf_counter() - start, self._open.pop()
                self.spent[stage] += whole - nested
                if self._open:
                    self._open[-1] += whole

        return run

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, stage in STAGES:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), stage)))
            yield


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU. On a CPU this runs with --device cpu --tiny, to try its code.")
    started, shapes = time.perf_counter(), TINY if options.tiny else LLAMA_3_8B
    card = the_card(device, 256 if options.tiny else 8192)
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "date": harness.today(),
        "work": {
            "shapes": {"hidden": shapes.hidden, "inner": shapes.inner, "head": shapes.head, "blocks": options.blocks},
            "scheme": "W4A16",
            "group_size": options.group_size,
            "samples": options.samples,
            "seq_len": options.seq_len,
        },
        "card": card,
        "machine": harness.machine(),
        "commit": harness.git_commit(),
        "versions": harness.versions(sys.executable, PACKAGES),
    }
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-", dir=options.scratch) as scratch:
        result["blocks"] = whole_blocks(options, shapes, device, Path(scratch))
        result["shares"] = shares(result, shapes)
        ours = one_block_twice(options, shapes, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the peer is another process
        result["same_matrices"] = {"halfbyte": ours, "llm-compressor": the_peer(options, Path(scratch))}
    result["seconds"] = time.perf_counter() - started
    slug = re.sub(r"[^a-z0-9]+", "-", card["name"].lower()).strip("-")
    harness.write_result(options.result or harness.RESULTS / f"{result['date']}-gpu-{slug}.json", result)
    print(render(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the code")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument(
        "--peer-python",
        type=Path,
        help="interpreter that has llm-compressor (default: .envs/llmcompressor/bin/python, else this one)",
    )
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints (default: the system's temporary folder)")
    parser.add_argument("--result", type=Path, help="result file (default: in benchmarks/results/)")
    options = parser.parse_args()
    if options.blocks < 3:
        parser.error("--blocks: the first and the last do not count, so at least 3 are needed")
    usual = (64, 64, 32) if options.tiny else (128, 512, 128)
    options.samples, options.seq_len = options.samples or usual[0], options.seq_len or usual[1]
    options.group_size = options.group_size or usual[2]
    return options


def the_card(device: torch.device, n: int) -> dict[str, Any]:
    """The device's name and its bfloat16 rate in FLOP/s: measured on ``n x n x n``, and by its maker."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    fastest = min(seconds(device, lambda: torch.mm(a, b)) for _ in range(11))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "name": name,
        "bfloat16_measured": 2 * n**3 / fastest,
        "bfloat16_nominal": next((rate for known, rate in NOMINAL.items() if known in name), None),
        "second_moments_on_tensor_cores": multiplies_mixed(a),
        "kernels_fail_because": gpu_problem(device) or None if device.type == "cuda" else "there is no GPU",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    }


def whole_blocks(options: argparse.Namespace, shapes: Shapes, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Quantisations of a random checkpoint: for seconds a block, for the stages, and with tuning."""
    source = scratch / "source"
    source.mkdir()
    synthetic.llama(source, width=shapes.hidden, layers=options.blocks, head=shapes.head, inner=shapes.inner)

    def run(name: str, effort: Literal["low", "standard"] = "low") -> list[float]:
        manifest = quantize(
            source,
            scratch / name,
            scheme="W4A16",
            group_size=options.group_size,
            calibration="random-tokens",
            samples=options.samples,
            seq_len=options.seq_len,
            effort=effort,
            device=device.type,
        )
        assert bool(manifest.tuning) == (effort == "standard")
        return [b["seconds"] for b in manifest.run["blocks"]]

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    plain = run("plain")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    clock = Clock(device)
    with clock.running():
        awaited = run("awaited")
    return {
        "block_s": statistics.median(plain[1:-1]),
        "standard_block_s": statistics.median(run("standard", "standard")[1:-1]),
        "all_blocks_s": plain,
        "gpu_peak_bytes": peak,
        "awaited_blocks_s": awaited,
        "stages_s": {**clock.spent, "rest": sum(awaited) - sum(clock.spent.values())},
    }


def shares(result: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Operations of one block, and what share of the card's measured bfloat16 rate they were done at."""
    work, found = result["work"], result["blocks"]
    tokens, count = work["samples"] * work["seq_len"], work["shapes"]["blocks"]
    forward = 2.0 * tokens * shapes.weights + 2.0 * tokens * (work["seq_len"] + 1) * shapes.hidden
    unneeded = 2.0 * tokens * shapes.hidden * shapes.inner  # the last block's last product
    moments = sum(tokens * width * (width + 1.0) for width, _ in shapes.inputs())
    rate = result["card"]["bfloat16_measured"]

    def share(operations: float, taken: float) -> float | None:
        return operations / taken / rate if taken else None

    stages = found["stages_s"]
    return {
        "forward_operations": forward,
        "second_moment_operations": moments,
        "block": share(forward + moments, found["block_s"]),
        "forward": share(forward * count - unneeded, stages["forward"]),
        "second moments": share(moments * count, stages["second moments"]),
    }


def one_block_twice(options: argparse.Namespace, shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """halfbyte's second moments and solver on the matrices that the peer gets."""
    fmt = WeightFormat(num_bits=4, group_size=options.group_size)
    on_gpu = device.type == "cuda" and not gpu_problem(device)
    tokens = options.samples * options.seq_len
    result: dict[str, Any] = {}
    for _ in range(2):
        moments, solving, errors = 0.0, 0.0, {}
        for weights, batches in made(shapes, tokens, device):
            moment = SecondMoment.empty(batches[0].shape[1], device)
            moments += seconds(device, lambda: [moment.add(x) for x in batches])  # noqa: B023
            hessian = moment.take().to(device if on_gpu else "cpu")
            dense: dict[str, torch.Tensor] = {}

            def solve() -> None:
                shrunk = shrinkage(len(hessian), tokens)  # noqa: B023
                factor = factor_hessian(hessian, 0.01, where="benchmark", shrinkage=shrunk)  # noqa: B023
                for name, weight in weights.items():  # noqa: B023
                    w = weight.to(hessian.device, torch.float32)  # noqa: B023
                    dense[name] = quantize_gptq(w, hessian, factor, fmt, torch.bfloat16).dense()  # noqa: B023

            solving += seconds(device, solve)
            for name, weight in weights.items():
                errors[name] = relative_error(weight.to(hessian.device), dense[name], hessian)
        result = {"hessians_s": moments, "solver_s": solving, "relative_errors": errors}
    return result


def the_peer(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """llm-compressor's figures, or why there are none."""
    usual = harness.ROOT / ".envs/llmcompressor/bin/python"
    python = options.peer_python or (usual if usual.exists() else None)
    if python is None and find_spec("llmcompressor") is None:
        return {
            "skipped": "llm-compressor is not installed: make its environment with "
            "envs/make.sh llmcompressor, or give --peer-python"
        }
    report = scratch / "peer.json"
    command = [python or sys.executable, PEER, "--report", report, "--device", options.device]
    command += ["--group-size", str(options.group_size), "--tokens", str(options.samples * options.seq_len)]
    harness.measure([*command, *(["--tiny"] if options.tiny else [])], scratch / "peer.log")
    peer: dict[str, Any] = harness.last_json(report)
    return peer


def render(result: dict[str, Any]) -> str:
    """The result as Markdown; uses nothing but the result."""
    card, found, work = result["card"], result["blocks"], result["work"]
    nominal, percent = card["bfloat16_nominal"], 100 * result["shares"]["block"]
    of_nominal = f" and {percent * card['bfloat16_measured'] / nominal:.1f} % of its maker's" if nominal else ""
    lines = [
        f"{card['name']}, commit {str(result['commit']['commit'])[:10]}, {result['seconds']:.0f} s in all",
        f"bfloat16: {card['bfloat16_measured'] / 1e12:.1f} TFLOP/s measured"
        + (f", {nominal / 1e12:.0f} by its maker" if nominal else ""),
        f"block of {work['shapes']['hidden']} / {work['shapes']['inner']}, {work['samples']} x {work['seq_len']} "
        f"tokens, W4A16 g{work['group_size']}: {found['block_s']:.2f} s, "
        f"{percent:.1f} % of the measured rate{of_nominal} (--effort low); "
        f"{found['standard_block_s']:.2f} s at standard",
    ]
    if card["kernels_fail_because"]:
        lines.append(f"weights were solved on the CPU: {card['kernels_fail_because']}")
    whole = sum(found["awaited_blocks_s"])
    rows = [["stage (run that awaits each)", "s a block", "share of time", "share of bfloat16 rate"]]
    for stage, spent in found["stages_s"].items():
        rate = result["shares"].get(stage)
        share = "" if rate is None else f"{100 * rate:.1f} %"
        rows.append([stage, f"{spent / work['shapes']['blocks']:.3f}", f"{100 * spent / whole:.1f} %", share])
    lines += ["", harness.table(rows), ""]
    rows = [["the same matrices", "Hessians, s", "solver, s", "mean relative error"]]
    for tool, figures in result["same_matrices"].items():
        if "skipped" in figures:
            lines.append(f"{tool}: {figures['skipped']}.")
            continue
        error = statistics.mean(figures["relative_errors"].values())
        rows.append([tool, f"{figures['hessians_s']:.3f}", f"{figures['solver_s']:.3f}", f"{error:.2e}"])
    return "\n".join([*lines, harness.table(rows)])


if __name__ == "__main__":
    main()
