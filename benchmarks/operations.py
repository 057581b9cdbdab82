"""Print as JSON how many operations a GPTQ run cannot do without, and this machine's matmul rates (see floor.py).

python benchmarks/operations.py MODEL SAMPLES SEQ_LEN DTYPE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from halfbyte.arithmetic import compute_dtype
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.estimates import matmul_rate, shared_inputs
from halfbyte.planner import plan
from halfbyte.records import TensorPlan


def operations(model: Path, samples: int, seq_len: int, *, passes: int) -> dict[str, float]:
    """Floating-point operations of one or two passes through every block, of attention and of the second moments.

    Two passes observe a block, then move its inputs on (so the first leaves out the last Linear, and the last block has
    no second). One pass does both, as halfbyte does; there only the last block's last Linear can be left out.
    """
    config = open_checkpoint(model).text_config
    tokens = samples * seq_len
    by_block: dict[int, list[TensorPlan]] = {}
    for t in plan(model, group_size="channel", calibration="random-tokens").tensors:
        if t.action == "quantize" and t.block is not None:
            by_block.setdefault(t.block, []).append(t)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    kinds = config.get("layer_types")
    products = attention = moments = 0.0
    for index, linears in by_block.items():
        sizes = {t.name: t.shape[0] * t.shape[1] for t in linears}
        at_end = index == max(by_block)
        runs = 1 if at_end else passes
        last = sum(n for name, n in sizes.items() if name.endswith("down_proj.weight")) if at_end or passes > 1 else 0
        products += 2.0 * tokens * (runs * sum(sizes.values()) - last)
        window = config.get("sliding_window") if kinds and kinds[index] == "sliding_attention" else None
        seen = sum(min(i + 1, window or seq_len) for i in range(seq_len)) / seq_len
        attention += runs * 4.0 * tokens * seen * heads * width
        moments += sum(tokens * s.width * (s.width + 1.0) for s in shared_inputs(linears))
    return {"linears": products, "attention": attention, "second moments": moments}


if __name__ == "__main__":
    work = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    counted = {name: operations(*work, passes=n) for name, n in (("one pass", 1), ("two passes", 2))}
    dtype = compute_dtype(sys.argv[4], open_checkpoint(work[0]).dtype, "cpu", 4)  # type: ignore[arg-type]
    # The best of many: a rate that is too low would make the floor too easy.
    rate = max(matmul_rate(dtype) for _ in range(10))
    rates = dict.fromkeys(counted["one pass"], rate)
    print(json.dumps({"operations": counted, "dtype": str(dtype).removeprefix("torch."), "rates": rates}))
