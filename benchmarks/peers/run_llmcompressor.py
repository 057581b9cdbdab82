"""Quantise a checkpoint with llm-compressor's GPTQ on given token windows. Runs in the peer's own environment.

    python run_llmcompressor.py MODEL OUT --windows windows.npy --report report.json --scheme W4A16 [--group-size 64]

The work is the peer's documented one: ``oneshot`` with ``GPTQModifier``, all Linears but ``lm_head``, everything else
at its default. W8A8 has ``SmoothQuantModifier(smoothing_strength=0.8)`` before it, as in the peer's guide to INT8.
These choices are ours, each in the peer's favour or neutral:

- The model is loaded in float32. Linears in bfloat16 are many times slower on CPUs without bfloat16 instructions.
- The windows are given as input ids, unshuffled, so that both tools see the same tokens in the same order.
- After the solver, and before saving, a W4A16 model is cast to the dtype that its config names (bfloat16), so the
  result is an ordinary checkpoint: bfloat16 scales, embeddings and norms. A solved weight is an integer code in [-8, 7]
  times its scale; rounding both to bfloat16 moves their quotient by less than 8 * 2**-7 < 1/2, so packing finds the
  same codes. ``--float32-out`` skips the cast, to show that its effect is small. Codes of 8 bits would not survive it,
  so of a W8A8 model only the embeddings are cast; scales and (smoothed) norms stay in float32.
- SmoothQuant on Gemma 2 and 3 is told the norm in front of gate_proj and up_proj, ``pre_feedforward_layernorm``. The
  peer's own table names ``post_attention_layernorm``, whose output in these models goes to the residual sum and not to
  those Linears, so that smoothing by it changes what the model computes. ``--own-mappings`` uses that table anyway.

Wall time, CPU time and memory are measured from outside by the harness. The report holds what only the inside knows:
seconds spent loading, calibrating, in the solver and in Hessians, and saving.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "numpy")


class Stopwatch:
    """Seconds spent inside wrapped functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Any) -> Any:
        self.seconds[name] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


GEMMA_NORMS = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"],
]
MAPPINGS = {"Gemma2ForCausalLM": GEMMA_NORMS, "Gemma3ForCausalLM": GEMMA_NORMS}


def recipe(scheme: str, group_size: int | None, mappings: list[Any] | None) -> list[Any]:
    """The modifiers of a scheme, in the order in which they are applied."""
    wanted = preset_name_to_scheme(scheme, ["Linear"])
    if group_size is not None:
        wanted.weights = wanted.weights.model_copy(update={"group_size": group_size})
    gptq = GPTQModifier(config_groups={"group_0": wanted}, ignore=["lm_head"])
    if scheme != "W8A8":
        return [gptq]
    return [SmoothQuantModifier(smoothing_strength=0.8, mappings=mappings), gptq]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=Path, required=True, help=".npy of int64 [samples, seq_len]")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--scheme", choices=["W4A16", "W8A8"], default="W4A16")
    parser.add_argument("--group-size", type=int, help="of W4A16 (default: its preset's, 128)")
    parser.add_argument("--own-mappings", action="store_true", help="SmoothQuant with the peer's own table of norms")
    parser.add_argument("--float32-out", action="store_true", help="keep scales and copied tensors in float32")
    options = parser.parse_args()

    windows = numpy.load(options.windows)
    watch = Stopwatch()
    gptq_base.quantize_weight = watch.wrap("solver_s", gptq_base.quantize_weight)
    gptq_base.accumulate_hessian = watch.wrap("hessian_s", gptq_base.accumulate_hessian)

    start = time.perf_counter()
    stored_dtype = AutoConfig.from_pretrained(options.model).dtype
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    loaded = time.perf_counter()

    rows = windows.tolist()
    mappings = None if options.own_mappings else MAPPINGS.get(type(model).__name__)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe(options.scheme, options.group_size, mappings),
        max_seq_length=windows.shape[1],
        num_calibration_samples=windows.shape[0],
        shuffle_calibration_samples=False,
    )
    solved = time.perf_counter()

    if not options.float32_out:
        (model if options.scheme == "W4A16" else model.get_input_embeddings()).to(stored_dtype)
        model.config.dtype = stored_dtype
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    saved = time.perf_counter()

    report = {
        "load_s": loaded - start,
        "calibrate_and_solve_s": solved - loaded,
        **watch.seconds,
        "save_s": saved - solved,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
