"""Quantise a checkpoint with AutoRound on given token windows. Runs in the peer's own environment.

    python run_autoround.py MODEL OUT --windows windows.npy --report report.json --group-size 128 [--iters 200]

The work is the peer's documented one: ``AutoRound(scheme="W4A16", group_size=G, sym=True)``, then
``quantize_and_save(format="llm_compressor")``, which writes a compressed-tensors checkpoint. Everything else is at its
default: 200 iterations a block, batches of 8, its learning rates, float16 scales, its choice of dtype for this machine,
``torch.compile`` as it sees fit. Ours are only the windows, given as input ids in the order in which they were cut.

Wall time, CPU time and memory are measured from outside by the harness. The report holds what only the inside knows:
seconds spent loading, and tuning and saving (which the peer does block by block, together).
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("auto-round", "compressed-tensors", "transformers", "torch", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=Path, required=True, help=".npy of int64 [samples, seq_len]")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()

    windows = numpy.load(options.windows)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    loaded = time.perf_counter()
    rows = [torch.from_numpy(row)[None] for row in windows]
    tuner = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=options.group_size,
        sym=True,
        iters=options.iters,
        dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows],
        nsamples=windows.shape[0],
        seqlen=windows.shape[1],
    )
    tuner.quantize_and_save(output_dir=str(options.out), format="llm_compressor")
    (made,) = options.out.iterdir()  # the peer saves into a subfolder that it names itself
    for file in made.iterdir():
        file.rename(options.out / file.name)
    made.rmdir()
    saved = time.perf_counter()

    report = {
        "load_s": loaded - start,
        "tune_and_save_s": saved - loaded,
        "iters": options.iters,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
