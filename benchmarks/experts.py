"""How much faster are experts solved in batches than one by one?

    python benchmarks/experts.py [--experts 8] [--runs 2] [--device cpu]

Random weights and correlated inputs in the shapes of mixtures that people run; of each layer a few experts are solved,
factorisation included, in batches of one and of more, in turn. The results must be the same (on a CPU to the bit). For
all experts of a layer it is said how many fit into a batch of 2 GiB; where that is one, none are timed. Writes
results/DATE-experts-DEVICE.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from halfbyte.heap import mapped
from halfbyte.methods.batching import largest_batch, peak_bytes
from halfbyte.methods.gptq import factor_hessians, quantize_gptq_batch
from halfbyte.methods.result import QuantizedWeight
from halfbyte.schemes import WeightFormat

FORMAT = WeightFormat(num_bits=4, group_size=128)
DAMPING = 0.01
ROOM_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Linears of a layer's experts that share an input: so many of ``rows`` rows each."""

    model: str
    name: str
    experts: int
    linears: int
    rows: int
    width: int


LAYERS = [
    Layer(model="Qwen3-30B-A3B", name="gate, up", experts=128, linears=2, rows=768, width=2048),
    Layer(model="Qwen3-30B-A3B", name="down", experts=128, linears=1, rows=2048, width=768),
    Layer(model="OLMoE-1B-7B", name="gate, up", experts=64, linears=2, rows=1024, width=2048),
    Layer(model="OLMoE-1B-7B", name="down", experts=64, linears=1, rows=2048, width=1024),
    Layer(model="Mixtral-8x7B", name="gate, up", experts=8, linears=2, rows=14336, width=4096),
    Layer(model="Mixtral-8x7B", name="down", experts=8, linears=1, rows=4096, width=14336),
]


def made(layer: Layer, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and Hessians: one of correlated inputs, whose strengths differ from expert to expert."""
    generator = torch.Generator().manual_seed(0)
    n = layer.width
    x = torch.randn(n + n // 4, n, generator=generator)
    x += x.roll(1, dims=1)
    strengths = torch.rand(count, n, generator=generator).add(0.1)
    hessians = (x.T @ x) * strengths[:, :, None] * strengths[:, None, :]
    weights = torch.randn(count, layer.linears * layer.rows, n, generator=generator)
    return weights.to(device), hessians.to(device)


def solve(layer: Layer, weights: torch.Tensor, hessians: torch.Tensor, batch: int) -> list[QuantizedWeight]:
    results: list[QuantizedWeight] = []
    for first in range(0, len(weights), batch):
        w, h = weights[first : first + batch], hessians[first : first + batch]
        with mapped():
            factors = factor_hessians(h, DAMPING, where=["benchmark"] * len(h))
            found = quantize_gptq_batch(w, h, factors, FORMAT, torch.bfloat16, rows=[layer.rows] * layer.linears)
        results += [linear for expert in found for linear in expert]
    if weights.is_cuda:
        torch.cuda.synchronize()
    return results


def of_layer(layer: Layer, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shape = layer.linears * layer.rows, layer.width, FORMAT, DAMPING
    fits = largest_batch(layer.experts, *shape, ROOM_BYTES)
    result: dict[str, Any] = asdict(layer) | {"fit_into_2_gib": fits, "one_expert_bytes": peak_bytes(1, *shape)}
    if fits == 1:
        return result
    count = min(options.experts, layer.experts)
    sizes = sorted({1, 2, min(count, fits)})
    weights, hessians = made(layer, count, device)
    alone = solve(layer, weights, hessians, 1)  # and compile
    taken: dict[int, list[float]] = {batch: [] for batch in sizes}
    worked: dict[int, list[float]] = {batch: [] for batch in sizes}
    same = 0
    for _ in range(options.runs):
        for batch in sizes:
            start, cpu = time.perf_counter(), time.process_time()
            found = solve(layer, weights, hessians, batch)
            taken[batch].append((time.perf_counter() - start) / count)
            worked[batch].append((time.process_time() - cpu) / count)
            same = sum(torch.equal(a.codes, b.codes) for a, b in zip(alone, found, strict=True))
            if same < len(found) and device.type == "cpu":
                raise SystemExit(
                    f"{layer.model}, {layer.name}: {len(found) - same} Linears differ in a batch of {batch}"
                )
    return result | {
        "solved": count,
        "seconds_an_expert": {str(b): harness.spread(t) for b, t in taken.items()},
        "cpu_seconds_an_expert": {str(b): harness.spread(t) for b, t in worked.items()},
        "largest_batch_of_one_by_one": min(taken[sizes[-1]]) / min(taken[1]),
        "linears_equal_in_largest_batch": same / len(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8, help="how many of a layer are solved")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    busy, start, own = harness.busy_s(), time.perf_counter(), time.process_time()
    layers = [of_layer(layer, options, device) for layer in LAYERS]
    wall, own = time.perf_counter() - start, time.process_time() - own
    after = harness.busy_s()
    others = None if busy is None or after is None else max(0.0, after - busy - own) / (wall * (os.cpu_count() or 1))
    result = {
        "date": harness.today(),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "layers": layers,
        "other_cpu_share": others,
        "versions": harness.versions(sys.executable, ("halfbyte", "torch", "numba", "triton")),
        "machine": harness.machine(),
        **harness.git_commit(),
    }
    rows = [["", "fit into 2 GiB", "one by one (s/expert)", "in twos", "in the largest", "share"]]
    for found in layers:
        times = found.get("seconds_an_expert", {})
        shown = [f"{t['min']:.3f}" for t in times.values()] or ["", "", ""]
        share = f"{found['largest_batch_of_one_by_one']:.2f}" if times else ""
        rows.append([f"{found['model']}, {found['name']}", str(found["fit_into_2_gib"]), *shown, share])
    print(harness.table(rows))
    harness.write_result(options.out / f"{harness.today()}-experts-{options.device}.json", result)


if __name__ == "__main__":
    main()
