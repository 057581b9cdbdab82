"""llm-compressor's own Hessian and GPTQ functions on one block's shapes. For gpu.py, in the peer's environment.

    python gpu_llmcompressor.py --report report.json --device cuda --tokens 65536 --group-size 128 [--tiny]

As in its modifier: a float32 Hessian for each Linear from bfloat16 inputs, then ``quantize_weight`` with static
activation order for one Linear at a time. Scales are the range's, and the time to find them is not counted. Batches
have 4096 tokens, which is more than it would take by itself, in its favour. Everything is done twice and the second
time counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_work import LLAMA_3_8B, TINY, Activations, made, relative_error, seconds

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "triton")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=options.group_size, actorder="static")
    result = {}
    for _ in range(2):
        result = one_block(options, device, args)
    options.report.write_text(json.dumps(result | {"versions": {p: found(p) for p in PACKAGES}}))


def found(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def one_block(options: argparse.Namespace, device: torch.device, args: QuantizationArgs) -> dict[str, object]:
    moments, solving, errors = 0.0, 0.0, {}
    with torch.no_grad():
        for weights, batches in made(TINY if options.tiny else LLAMA_3_8B, options.tokens, device):
            for name, weight in weights.items():
                module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                hessian = make_empty_hessian(module, device)
                samples = torch.zeros((), device=device)
                moments += seconds(device, lambda: accumulate(batches, module, hessian, samples))  # noqa: B023
                scale, zero = scales(weight.float(), args)
                batch = (weight.float()[None], (hessian / samples)[None], scale[None], zero[None])
                kept: list[torch.Tensor] = []
                solving += seconds(device, lambda: kept.append(quantize_weight(*batch, None, args)[0][0]))  # noqa: B023
                errors[name] = relative_error(weight, kept[0], hessian)
    return {"hessians_s": moments, "solver_s": solving, "relative_errors": errors}


def accumulate(batches: Activations, module: torch.nn.Linear, hessian: torch.Tensor, samples: torch.Tensor) -> None:
    for x in batches:
        accumulate_hessian(x, module, hessian, samples)


def scales(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = weight.reshape(weight.shape[0], -1, args.group_size)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    return scale.bfloat16(), zero


if __name__ == "__main__":
    main()
