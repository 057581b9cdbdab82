"""Divergence of a checkpoint from its base, computed with plain transformers: a check on ``halfbyte compare``.

    python score_transformers.py BASE CHECKPOINT TEXT [--tokens N] [--window 512]

Shares no code with halfbyte. Both models are loaded whole, dequantised, in float32, and run one window at a time. The
text is tokenised once without special tokens. Where the tokenizer puts a beginning-of-sequence token in front of a
text, a window is that token and the next window - 1 text tokens, and each text token is a target once; otherwise
window k reads tokens kL .. kL+L-1 and its targets are kL+1 .. kL+L, so each token after the first is a target once.
The last window may be short. Prints JSON: with P the base and Q the checkpoint, in nats, over all targets,

    perplexity_ratio = exp(mean(nll_Q - nll_P)),   kl = mean over targets of sum_v P(v) (ln P(v) - ln Q(v)),
    top1 = share of targets for which both models' most likely token is the same.

Standard errors take the windows as independent, not the tokens in them: with W windows and n targets,
se = sqrt(W / (W - 1) * sum over windows of (sum of (x - mean) in the window)^2) / n.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig


def load(folder: Path) -> Any:
    """A causal model in float32; a compressed-tensors checkpoint is dequantised while it loads."""
    config = AutoConfig.from_pretrained(folder)
    quantized = "quantization_config" in config.to_dict()
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra).eval()
    wrong = sorted({str(p.dtype) for p in model.parameters()} - {"torch.float32"})
    if wrong:
        model = model.float()
    return model


def windows(ids: list[int], bos: int | None, length: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) pairs by the rule above; the targets cover the text without gap or overlap."""
    if bos is not None:
        step = length - 1
        chunks = [ids[i : i + step] for i in range(0, len(ids), step)]
        return [([bos, *chunk[:-1]], chunk) for chunk in chunks]
    pairs = [(ids[i : i + length], ids[i + 1 : i + length + 1]) for i in range(0, len(ids) - 1, length)]
    return [(inputs[: len(targets)], targets) for inputs, targets in pairs]


class Mean:
    """Mean of values that come window by window, and its standard error over windows, in float64."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.counts: list[int] = []

    def add(self, values: torch.Tensor) -> None:
        self.sums.append(values.double().sum().item())
        self.counts.append(values.numel())

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return math.fsum(self.sums) / self.n

    @property
    def se(self) -> float:
        windows, mean = len(self.sums), self.mean
        squares = math.fsum((s - c * mean) ** 2 for s, c in zip(self.sums, self.counts, strict=True))
        return math.sqrt(windows / max(1, windows - 1) * squares) / self.n


def score(base: Any, other: Any, pairs: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """The divergence set over all targets of all windows."""
    kl, change, agree, nll_p = Mean(), Mean(), Mean(), Mean()
    with torch.inference_mode():
        for inputs, targets in pairs:
            x, y = torch.tensor([inputs]), torch.tensor(targets)[:, None]
            log_p = base(input_ids=x, use_cache=False).logits[0].float().log_softmax(-1)
            log_q = other(input_ids=x, use_cache=False).logits[0].float().log_softmax(-1)
            kl.add((log_p.exp() * (log_p - log_q)).sum(-1))
            change.add((log_p.gather(1, y) - log_q.gather(1, y))[:, 0])
            nll_p.add(-log_p.gather(1, y)[:, 0])
            agree.add((log_p.argmax(-1) == log_q.argmax(-1)).float())
    ratio = math.exp(change.mean)
    return {
        "targets": kl.n,
        "kl": kl.mean,
        "kl_se": kl.se,
        "perplexity_base": math.exp(nll_p.mean),
        "perplexity_ratio": ratio,
        "perplexity_ratio_se": ratio * change.se,
        "top1": agree.mean,
        "top1_se": agree.se,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=0, help="use the first N text tokens (0: all)")
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    content = options.text.read_bytes()
    ids = tokenizer(content.decode("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[: options.tokens] if options.tokens else ids
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    pairs = windows(ids, tokenizer.bos_token_id if adds_bos else None, options.window)
    metrics = score(load(options.base), load(options.checkpoint), pairs)
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"text_sha256": digest, "window": options.window, "metrics": metrics}, indent=2))


if __name__ == "__main__":
    main()
