"""Seconds and memory of ``convert`` on a Flax checkpoint with one decoder layer in the shapes of Gemma 3 27B.

    python benchmarks/flax_qat.py [--to awq compressed-tensors] [--runs 3] [--dtype float32]

Makes the checkpoint (zarr with zstd, as orbax writes it, int4 grids of random codes), then measures, each in a child
process: reading and decoding every array once, recovering each Linear's grid, and the whole conversion. Needs
``halfbyte[flax]`` and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import harness

PACKAGES = ("halfbyte", "torch", "numpy", "numba", "tensorstore")
HIDDEN, FFW, HEADS, KV_HEADS, DIM, VOCAB = 5376, 21_504, 32, 16, 128, 4096
LINEARS = {  # array -> shape, and the axis of its inputs
    "transformer/layer_0/attn/q_einsum.w": ((HEADS, HIDDEN, DIM), 1),
    "transformer/layer_0/attn/kv_einsum.w": ((2, KV_HEADS, HIDDEN, DIM), 2),
    "transformer/layer_0/attn/attn_vec_einsum.w": ((HEADS, DIM, HIDDEN), 1),
    "transformer/layer_0/mlp/gating_einsum.w": ((2, FFW, HIDDEN), 2),
    "transformer/layer_0/mlp/linear.w": ((FFW, HIDDEN), 0),
}
OTHERS = {
    "transformer/embedder.input_embedding": (VOCAB, HIDDEN),
    "transformer/final_norm.scale": (HIDDEN,),
    "transformer/layer_0/attn/_query_norm.scale": (DIM,),
    "transformer/layer_0/attn/_key_norm.scale": (DIM,),
    **{f"transformer/layer_0/{n}.scale": (HIDDEN,) for n in ("pre_attention_norm", "post_attention_norm")},
    **{f"transformer/layer_0/{n}.scale": (HIDDEN,) for n in ("pre_ffw_norm", "post_ffw_norm")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", nargs="+", default=["awq"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="on disk")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"make": make, "read": read, "recover": recovered}[options.child[0]](Path(options.child[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-", dir=options.scratch) as scratch:
        result = measured(options, Path(scratch))
    harness.write_result(options.result or harness.RESULTS / f"{result['date']}-flax-27b-layer.json", result)
    print(render(result))


def measured(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder, log = scratch / f"gemma-3-27b-it-int4-{options.dtype}", scratch / "log"
    child = [sys.executable, __file__, "--child"]
    made = harness.json_from([*child, "make", folder])
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.runs):
        for work in ("read", "recover"):
            measurement = harness.measure([*child, work, folder], log)
            runs.setdefault(work, []).append({**harness.plain(measurement), "detail": harness.last_json(log)})
        for to in options.to:
            command = [sys.executable, "-m", "halfbyte", "convert", folder, scratch / "out", "--to", to, "--json"]
            command += ["--config", folder / "config.json", "--tokenizer", folder / "tokenizer"]
            measurement = harness.measure(command, log)
            record = harness.last_json(log)
            runs.setdefault(f"convert to {to}", []).append(
                {**harness.plain(measurement), "detail": {"bytes_after": record["run"]["bytes_after"]}}
            )
            for file in sorted((scratch / "out").iterdir()):
                file.unlink()
            (scratch / "out").rmdir()
    return {
        "benchmark": "flax-27b-layer",
        "date": harness.today(),
        "work": {"dtype": options.dtype, "layers": 1, "vocab": VOCAB, **made},
        "machine": harness.machine(),
        "commit": harness.git_commit(),
        "versions": harness.versions(sys.executable, PACKAGES),
        "runs": runs,
    }


def make(folder: Path) -> dict[str, int]:
    """Write the checkpoint, a config and a tokenizer; the dtype stands in the folder's name."""
    import numpy
    import tensorstore

    chance = numpy.random.default_rng(0)
    dtype = folder.name.rpartition("-")[2]
    element = tensorstore.dtype(dtype).numpy_dtype

    def write(name: str, values: Any) -> int:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/{name}/"},
            "metadata": {
                "shape": values.shape,
                "chunks": values.shape,
                "dtype": "bfloat16" if dtype == "bfloat16" else "<f4",
                "compressor": {"id": "zstd", "level": 1},
            },
        }
        tensorstore.open(spec, create=True).result().write(values.astype(element)).result()
        return int(values.size) * element.itemsize

    total = 0
    for name, (shape, axis) in LINEARS.items():
        codes = chance.integers(-7, 8, shape, dtype="i1")
        groups = (*shape[:axis], shape[axis] // 32, *shape[axis + 1 :])
        scales = (chance.random(groups, dtype="f4") + 0.5) * 0.01
        scales = (scales.view("u4") & 0xFFFF0000).view("f4").repeat(32, axis=axis)
        total += write(name, codes * scales)
    for name, plain in OTHERS.items():
        total += write(name, chance.standard_normal(plain, dtype="f4"))
    (folder / "_METADATA").write_text("{}")
    text = {"num_hidden_layers": 1, "hidden_size": HIDDEN, "intermediate_size": FFW, "num_attention_heads": HEADS}
    text |= {"num_key_value_heads": KV_HEADS, "head_dim": DIM, "vocab_size": VOCAB, "model_type": "gemma3_text"}
    (folder / "config.json").write_text(json.dumps(text))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    stored = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {"array_bytes": total, "stored_bytes": stored}


def read(folder: Path) -> dict[str, float]:
    """Seconds to read and decode each array."""
    from halfbyte.conversion.orbax import open_orbax

    checkpoint = open_orbax(folder)
    found = {}
    for name in checkpoint.arrays:
        begun = perf_counter()
        checkpoint.read(name)
        found[name] = round(perf_counter() - begun, 3)
    return found


def recovered(folder: Path) -> dict[str, Any]:
    """Seconds to recover each Linear's grid, its array being in memory."""
    import torch

    from halfbyte.conversion.flax_qat import open_flax
    from halfbyte.conversion.lattice import OffGrid, recover

    recover(torch.zeros(1, 32))  # compiled, or fetched from numba's cache
    source = open_flax(folder, config=folder, tokenizer=folder / "tokenizer")
    found = {}
    for piece in (p for p in source.pieces.values() if p.linear):
        weight = piece.cut(source.arrays.read(piece.array))
        begun = perf_counter()
        lattice = recover(weight)
        seconds = perf_counter() - begun
        assert not isinstance(lattice, OffGrid)
        found[piece.name] = {"seconds": round(seconds, 3), "weights": weight.numel()}
    return found


def render(result: dict[str, Any]) -> str:
    rows = [["work", "wall s", "CPU s", "peak GiB", "others' CPU"]]
    for work, runs in result["runs"].items():
        wall, cpu, peak = (harness.spread([r[k] for r in runs]) for k in ("wall_s", "cpu_s", "peak_rss_bytes"))
        shares = [r["other_cpu_share"] for r in runs if r["other_cpu_share"] is not None]
        busy = f"{max(shares):.0%}" if shares else ""
        rows.append([work, f"{wall['median']:.1f}", f"{cpu['median']:.1f}", harness.gib(peak["max"]), busy])
    arrays = harness.gib(result["work"]["array_bytes"])
    return f"{arrays} of {result['work']['dtype']} arrays\n\n{harness.table(rows)}"


if __name__ == "__main__":
    main()
