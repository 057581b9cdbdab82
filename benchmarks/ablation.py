"""What each part of the solver is worth: output error on held-out text, Linear by Linear, relative to round-to-nearest.

    python benchmarks/ablation.py --model DIR --text FILE [--samples 32] [--seq-len 512] [--blocks 0,5,11,17]

Half of the windows give the Hessians that the solver sees, the other half those it is judged by:
``tr(E H' E^T) / tr(W H' W^T)`` with ``E = W_q - W`` and ``H'`` of the held-out half. The original model's activations
are used throughout, so the variants differ in nothing but the solver. Writes results/DATE-ablation-MODEL.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import subprocess
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.calibration import calibrate
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.methods.gptq import factor_hessian, quantize_gptq
from halfbyte.methods.pooled import shrinkage
from halfbyte.methods.rtn import quantize_rtn
from halfbyte.progress import Silent
from halfbyte.recipe import GptqSteps
from halfbyte.schemes import WeightFormat
from halfbyte.statistics import Collector
from halfbyte.weights import Weights

UNSHRUNK = replace(GptqSteps(), shrinkage=0.0)
NOTHING = replace(UNSHRUNK, static_order=False, scale_search=False, scale_refit=False, code_descent=False)
ORDER = replace(NOTHING, static_order=True)
SEARCH = replace(ORDER, scale_search=True)
VARIANTS: dict[str, tuple[str, GptqSteps | None]] = {
    "rtn": ("round to nearest, min-max scales", None),
    "gptq": ("GPTQ, columns in file order, min-max scales", NOTHING),
    "+order": ("and static activation order", ORDER),
    "+search diag(H)": ("and scales searched with importance diag(H)", SEARCH),
    "+search 1/R^2": ("and scales searched with importance 1/R_jj^2 instead", SEARCH),
    "+refit": ("and scales refitted after the columns", replace(SEARCH, scale_refit=True)),
    "+descent": ("and coordinate descent on codes instead", replace(SEARCH, code_descent=True)),
    "+both": ("and both in turn", UNSHRUNK),
    "+both, 2 sweeps": ("and both in turn, two sweeps", replace(UNSHRUNK, sweeps=2)),
    "+both, 8 sweeps": ("and both in turn, eight sweeps", replace(UNSHRUNK, sweeps=8)),
    "+shrinkage": ("and one sweep of both, correlations shrunk by sqrt(inputs / tokens) (the default)", GptqSteps()),
}


def variant(name: str, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, fmt: WeightFormat) -> torch.Tensor:
    """The dequantised weight that a variant gives."""
    steps = VARIANTS[name][1]
    if steps is None:
        return quantize_rtn(weight, fmt, torch.bfloat16).dense()
    shrunk = steps.shrinkage * shrinkage(hessian.shape[0], tokens)
    factor = factor_hessian(hessian, 0.01, where=name, static_order=steps.static_order, shrinkage=shrunk)
    if name == "+search diag(H)":
        factor = replace(factor, importance=hessian.diagonal().contiguous()[None])
    return quantize_gptq(weight, hessian, factor, fmt, torch.bfloat16, steps).dense()


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
                for name in seen.names:
                    weight = linears[name].weight.detach()
                    energy = float(((weight @ judge) * weight).sum(dtype=torch.float64))
                    errors = {}
                    for v in VARIANTS:
                        e = variant(v, weight, h, halves[0].numel(), fmt) - weight
                        errors[v] = float(((e @ judge) * e).sum(dtype=torch.float64)) / energy
                    rows.append({"linear": name, "relative_error": errors})
    means = {v: sum(r["relative_error"][v] / r["relative_error"]["rtn"] for r in rows) / len(rows) for v in VARIANTS}
    result = {
        "model": arguments.model.name,
        "blocks": sorted(chosen),
        "group_size": arguments.group_size,
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
        "what": {v: words for v, (words, _) in VARIANTS.items()},
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
        print(f"{v:28s} {mean:.4f}  {VARIANTS[v][0]}")


if __name__ == "__main__":
    main()
