"""How fast ``halfbyte convert`` is, beside ``cp`` of the same files in the same run.

    python benchmarks/convert.py [--bytes 500000000] [--runs 3] [--out results/convert.json]

Makes a checkpoint of random codes (compressed-tensors, W4A16, groups of 128, Linears of 4096 x 4096 and 14336 x 4096),
then for each target in turn copies it with ``cp`` and converts it, each to a new folder and made durable: after
``cp`` its files are synced, and ``convert`` syncs by itself. All is in the page cache before, so both read from memory.
Wall time is compared; the result has every single time. Conversion hashes what it reads and writes, ``cp`` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import git_commit, machine, today, versions, write_result
from safetensors.torch import save_file

TARGETS = ("awq", "gptq", "gptq-v2", "compressed-tensors")
SHAPES = ((4096, 4096), (14336, 4096))
GROUP_SIZE = 128


def build(folder: Path, size_bytes: int) -> int:
    """A checkpoint of about ``size_bytes``; returns what it has."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    total = layer = 0
    while total < size_bytes:
        for name, (rows, columns) in zip(("self_attn.o_proj", "mlp.up_proj"), SHAPES, strict=True):
            module = f"model.layers.{layer}.{name}"
            words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=draw, dtype=torch.int64)
            steps = torch.rand((rows, columns // GROUP_SIZE), generator=draw) * 0.01 + 0.001
            tensors[f"{module}.weight_packed"] = words.to(torch.int32)
            tensors[f"{module}.weight_scale"] = steps.to(torch.bfloat16)
            tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        layer += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP_SIZE, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"dynamic": False}, "format": "pack-quantized"}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": layer,
        "quantization_config": quantization | {"config_groups": {"group_0": group}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def copied(source: Path, out: Path) -> float:
    """Seconds that ``cp -r`` and syncing its file take."""
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begun


def converted(source: Path, out: Path, to: str) -> float:
    """Seconds inside ``halfbyte.convert``, in a process that has imported it (and its kernels) before."""
    import halfbyte

    begun = time.perf_counter()
    halfbyte.convert(source, out, to=to)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=500_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        root = Path(name)
        small, source = root / "small", root / "source"
        build(small, 1)
        size = build(source, options.bytes)
        runs: list[dict[str, Any]] = []
        for to in TARGETS:
            converted(small, root / "warm", to)  # imports, compiled kernels
            shutil.rmtree(root / "warm")
        for run in range(options.runs):
            for to in TARGETS:
                times = {"cp_s": copied(source, root / "copy"), "convert_s": converted(source, root / "out", to)}
                runs.append({"run": run, "to": to, **times, "ratio": times["convert_s"] / times["cp_s"]})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                shutil.rmtree(root / "copy")
                shutil.rmtree(root / "out")
    medians = {to: sorted(r["ratio"] for r in runs if r["to"] == to)[options.runs // 2] for to in TARGETS}
    result = {
        "benchmark": "convert",
        "date": today(),
        "bytes": size,
        "machine": machine(),
        "commit": git_commit(),
        "versions": versions(sys.executable, ("halfbyte", "torch", "numba")),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "median_ratio": medians,
    }
    if options.out:
        write_result(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
