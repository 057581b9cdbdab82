"""Runs in llm-compressor's environment: a checkpoint quantised by it, round to nearest.

python make_llmcompressor.py SOURCE OUT SCHEME
"""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

source, out, scheme = sys.argv[1:4]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
groups = {}
bits, symmetric = int(scheme[1]), not scheme.endswith("ASYM")
groups["group_0"] = {
    "targets": ["Linear"],
    "weights": {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32},
}
if scheme == "W8A8":
    groups = None
recipe = QuantizationModifier(
    ignore=["lm_head"], **({"scheme": scheme, "targets": ["Linear"]} if groups is None else {"config_groups": groups})
)
oneshot(model=model, recipe=recipe, output_dir=out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
