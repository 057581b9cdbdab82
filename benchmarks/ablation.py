"""What each part of the solver is worth: output error on held-out text, Linear by Linear, relative to round-to-nearest.

    python benchmarks/ablation.py --model DIR --text FILE [--samples 32] [--seq-len 512] [--blocks 0,5,11,17]

Half of the windows give the Hessians that the solver sees, the other half those it is judged by:
``tr(E H' E^T) / tr(W H' W^T)`` with ``E = W_q - W`` and ``H'`` of the held-out half. The original model's activations
are used throughout, so the variants differ in nothing but the solver. Writes results/DATE-ablation-MODEL.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.calibration import calibrate
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.kernels.gptq_numba import solve_columns
from halfbyte.methods.gptq import Factor, factor_hessian
from halfbyte.methods.rtn import quantize_rtn
from halfbyte.methods.scales import minmax, searched
from halfbyte.packing import dequantize
from halfbyte.progress import Silent
from halfbyte.schemes import WeightFormat
from halfbyte.statistics import Collector
from halfbyte.weights import Weights

VARIANTS = {
    "rtn": "round to nearest, min-max scales",
    "gptq": "GPTQ, columns in file order, min-max scales",
    "+order": "and static activation order",
    "+search diag(H)": "and scales searched with importance diag(H)",
    "+search 1/R^2": "and scales searched with importance 1/R_jj^2 instead (the default)",
}


def natural(hessian: torch.Tensor, factor: Factor) -> torch.Tensor:
    """``R`` of the same damped Hessian with columns in file order."""
    damped = hessian.double() + factor.damping * torch.eye(len(hessian), dtype=torch.float64)
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float().contiguous()


def variant(name: str, weight: torch.Tensor, hessian: torch.Tensor, factor: Factor, fmt: WeightFormat) -> torch.Tensor:
    """The dequantised weight that a variant gives."""
    if name == "rtn":
        return quantize_rtn(weight, fmt, torch.bfloat16).dense()
    n = weight.shape[1]
    order = torch.arange(n) if name == "gptq" else factor.order
    upper = natural(hessian, factor) if name == "gptq" else factor.upper
    if name == "+search diag(H)":
        scales, zeros = searched(weight, hessian.diagonal().contiguous(), fmt, torch.bfloat16)
    elif name == "+search 1/R^2":
        scales, zeros = searched(weight, factor.importance, fmt, torch.bfloat16)
    else:
        scales, zeros = minmax(weight, fmt, torch.bfloat16)
    group_of = (torch.arange(n) // (n // scales.shape[1]))[order]
    permuted, _ = solve_columns(weight[:, order].contiguous(), upper, scales, zeros, group_of, fmt.q_min, fmt.q_max)
    codes = torch.empty_like(permuted)
    codes[:, order] = permuted
    return dequantize(codes, scales, None if fmt.symmetric else zeros)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--blocks", default="0,5,11,17")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    chosen = {int(b) for b in arguments.blocks.split(",")}
    fmt = WeightFormat(num_bits=4, group_size=arguments.group_size)
    calibration = calibrate(
        f"text:{arguments.text}",
        model_path=arguments.model,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=0,
        device="cpu",
        reporter=Silent(),
    )
    halves = [torch.stack(calibration.sequences[0::2]), torch.stack(calibration.sequences[1::2])]
    model = StreamedModel.of(Weights.of(open_checkpoint(arguments.model)), torch.device("cpu"))
    with model.embeddings(torch.unique(torch.cat(halves))):
        embedded = [model.embed(h, Interner()) for h in halves]
    states = [s for s, _ in embedded]
    rows = []
    for index in range(max(chosen) + 1):
        with model.block(index) as block:
            linears = model.linears(index)
            moments = []
            for half, (_, calls) in enumerate(embedded):
                collector = Collector(linears if index in chosen else {}, torch.device("cpu"))
                with collector:
                    output: list[torch.Tensor] = []
                    collector.run(
                        lambda half=half, calls=calls, output=output, index=index: output.append(
                            run_block(block, states[half], calls[index])
                        ),
                        None,
                    )
                moments.append(collector.moments)
                states[half] = output[0]
            for seen, unseen in zip(*moments, strict=True):
                h, judge = seen.finish(), unseen.finish()
                factor = factor_hessian(h, 0.01, where=seen.names[0])
                for name in seen.names:
                    weight = linears[name].weight.detach()
                    energy = float(((weight @ judge) * weight).sum(dtype=torch.float64))
                    errors = {}
                    for v in VARIANTS:
                        e = variant(v, weight, h, factor, fmt) - weight
                        errors[v] = float(((e @ judge) * e).sum(dtype=torch.float64)) / energy
                    rows.append({"linear": name, "relative_error": errors})
    means = {v: sum(r["relative_error"][v] / r["relative_error"]["rtn"] for r in rows) / len(rows) for v in VARIANTS}
    result = {
        "model": arguments.model.name,
        "what": VARIANTS,
        "mean_error_relative_to_rtn": means,
        "linears": rows,
        "calibration": {"tokens_seen": halves[0].numel(), "tokens_held_out": halves[1].numel()},
        "versions": {p: version(p) for p in ("halfbyte", "torch", "numba")},
        "machine": platform.machine(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "clock": time.strftime("%H:%M"),
    }
    path = arguments.out / f"{result['date']}-ablation-{arguments.model.name}-g{arguments.group_size}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'held-out error, RTN = 1':28s} mean over {len(rows)} Linears")
    for v, mean in means.items():
        print(f"{v:28s} {mean:.4f}  {VARIANTS[v]}")


if __name__ == "__main__":
    main()
