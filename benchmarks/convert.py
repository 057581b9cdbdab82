"""How fast ``halfbyte convert`` is, beside ``cp`` of the same files in the same run.

    python benchmarks/convert.py [--bytes 500000000] [--runs 3] [--out results/convert.json]

Makes a checkpoint of random codes (compressed-tensors, W4A16, groups of 128, Linears of 4096 x 4096 and 14336 x 4096),
has it in every format, then for each pair of formats in turn copies the source with ``cp`` and converts it, each to a
new folder and made durable: after ``cp`` its files are synced, and ``convert`` syncs by itself. Both are done twice:
with the source in the page cache, so that both read from memory, and after it was evicted, so that both read the disk,
as they would any checkpoint that is large or new. Wall time is compared; the result has every single time, and the
processor time of either. ``convert`` hashes what it reads and what it writes; ``cp`` does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from halfbyte.heap import prefer_huge_pages

prefer_huge_pages()  # before torch is imported, as the command does

import torch  # noqa: E402
from harness import git_commit, machine, today, versions, write_result  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

PLAIN = "compressed-tensors"
PAIRS = (
    *((PLAIN, to) for to in ("awq", "gptq", "gptq-v2", "gguf", PLAIN)),
    *((source, PLAIN) for source in ("awq", "gptq", "gptq-v2", "gguf")),
    ("awq", "gguf"),
    ("gguf", "awq"),
)
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
    tensors["model.embed_tokens.weight"] = torch.rand((256, 4096), generator=draw).to(torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(4096, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP_SIZE, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"dynamic": False}, "format": "pack-quantized"}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": layer,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 256,
        "tie_word_embeddings": True,
        "quantization_config": quantization | {"config_groups": {"group_0": group}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def evict(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not on the disk yet stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fetch(folder: Path) -> None:
    """Read a folder's files, so that they are in the page cache."""
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as f:
            while f.read(1 << 24):
                pass


def cpu_s() -> float:
    """Processor time of this process and of the children that it waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def copied(source: Path, out: Path) -> tuple[float, float]:
    """Seconds, and processor seconds, that ``cp -r`` and syncing its files take."""
    begun, used = time.perf_counter(), cpu_s()
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begun, cpu_s() - used


def converted(source: Path, out: Path, to: str) -> tuple[float, float]:
    """The same inside ``halfbyte.convert``, in a process that has imported it (and its kernels) before."""
    import halfbyte

    begun, used = time.perf_counter(), cpu_s()
    halfbyte.convert(source, out, to=to)
    return time.perf_counter() - begun, cpu_s() - used


STATES = {"cached": fetch, "on disk": evict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=500_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        root = Path(name)
        small, first = root / "small", root / PLAIN
        build(small, 1)
        size = build(first, options.bytes)
        sources = {PLAIN: first}
        for to in dict.fromkeys(source for source, _ in PAIRS if source != PLAIN):
            sources[to] = root / to
            converted(first, sources[to], to)
        runs: list[dict[str, Any]] = []
        for to in dict.fromkeys(to for _, to in PAIRS):
            converted(small, root / "warm", to)  # imports, compiled kernels
            shutil.rmtree(root / "warm")
        for run in range(options.runs):
            for (source, to), (state, ready) in itertools.product(PAIRS, STATES.items()):
                ready(sources[source])
                wall, cpu = copied(sources[source], root / "copy")
                ready(sources[source])
                again, more = converted(sources[source], root / "out", to)
                found = {"run": run, "from": source, "to": to, "source": state}
                found |= {"cp_s": wall, "convert_s": again, "ratio": again / wall}
                runs.append(found | {"cp_cpu_s": cpu, "convert_cpu_s": more})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                shutil.rmtree(root / "copy")
                shutil.rmtree(root / "out")
    medians = {
        f"{source} -> {to}": {
            state: statistics.median(
                r["ratio"] for r in runs if (r["from"], r["to"], r["source"]) == (source, to, state)
            )
            for state in STATES
        }
        for source, to in PAIRS
    }
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
