"""Divergence of a checkpoint from its base, computed with plain transformers: a check on ``halfbyte compare``.

    python score_transformers.py BASE CHECKPOINT TEXT [--tokens N] [--window 512]

Shares no code with halfbyte. Both models are held whole, dequantised, in float32, and run one window at a time.
Checkpoints may be dense, of 4-bit symmetric packed weights, or of 8-bit weights with one scale a row; of the last the
input of every Linear is rounded to 8 bits as well, one scale a token, where the config says so. The text is tokenised
once without special tokens. Where the tokenizer puts a beginning-of-sequence token in front of a text, a window is that
token and the next window - 1 text tokens, and each text token is a target once; otherwise window k reads tokens
kL .. kL+L-1 and its targets are kL+1 .. kL+L, so each token after the first is a target once. The last window may be
short. Prints JSON: with P the base and Q the checkpoint, in nats, over all targets,

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
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 64  # rows of logits that are held in float64 at once


def load(base: Path, checkpoint: Path) -> Any:
    """The base's model class in float32, holding the weights of a checkpoint.

    A stored weight becomes exactly q * s in float32. (transformers' own dequantisation rounds it to bfloat16, which
    moves KL by a thousandth and a few top-1 choices in a thousand.)
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    own = model.state_dict()
    seen = set()
    rounds_inputs = inputs_are_rounded(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    with torch.no_grad():
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                for name in sorted(names):
                    module, _, leaf = name.rpartition(".")
                    if leaf in ("weight_scale", "weight_shape"):
                        continue
                    value, target = file.get_tensor(name), f"{module}.weight" if leaf == "weight_packed" else name
                    if f"{module}.weight_scale" in names and leaf in ("weight", "weight_packed"):
                        scale = file.get_tensor(f"{module}.weight_scale").float()
                        value = unpack(value, scale) if leaf == "weight_packed" else value.float() * scale
                        if rounds_inputs:
                            model.get_submodule(module).register_forward_pre_hook(round_inputs)
                    own[target].copy_(value.float())
                    seen.add(target)
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    if missing := sorted(own.keys() - seen - tied):
        raise SystemExit(f"{checkpoint} lacks {', '.join(missing[:5])}")
    return model


def inputs_are_rounded(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's Linears take 8-bit inputs with a scale found for each token, the one kind known here."""
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    found = [g.get("input_activations") for g in groups]
    if not any(found):
        return False
    if len(found) > 1 or any(
        found[0][key] != value
        for key, value in {
            "num_bits": 8,
            "type": "int",
            "strategy": "token",
            "dynamic": True,
            "symmetric": True,
        }.items()
    ):
        raise SystemExit(f"inputs in a format that is not known here: {found}")
    return True


def round_inputs(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The input of a Linear as codes of 8 bits times one scale a token, max|x| / 127."""
    scale = inputs[0].abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return ((inputs[0] / scale).round() * scale, *inputs[1:])


def unpack(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int32 [out, in / 8], eight codes + 8 a word, lowest nibble first; float32 scales [out, groups] -> [out, in]."""
    nibbles = torch.stack([(packed.long() >> (4 * j)) & 15 for j in range(8)], dim=-1).flatten(1)
    codes = (nibbles - 8).float()
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


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


def rows_of(p: torch.Tensor, q: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """KL, nll_Q - nll_P, nll_P and agreement of logit rows, in float64: in float32 the sum over a vocabulary of a
    quarter of a million terms is off by 1e-5."""
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    nll_p, nll_q = -log_p.gather(1, y)[:, 0], -log_q.gather(1, y)[:, 0]
    return [(log_p.exp() * (log_p - log_q)).sum(-1), nll_q - nll_p, nll_p, agree]


def score(base: Any, other: Any, pairs: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """The divergence set over all targets of all windows."""
    kl, change, agree, nll_p = Mean(), Mean(), Mean(), Mean()
    with torch.inference_mode():
        for inputs, targets in pairs:
            x = torch.tensor([inputs])
            p, q = (model(input_ids=x, use_cache=False).logits[0].float() for model in (base, other))
            parts = [
                rows_of(a, b, t)
                for a, b, t in zip(
                    p.split(ROWS), q.split(ROWS), torch.tensor(targets)[:, None].split(ROWS), strict=True
                )
            ]
            for mean, values in zip((kl, change, nll_p, agree), zip(*parts, strict=True), strict=True):
                mean.add(torch.cat(values))
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
    metrics = score(load(options.base, options.base), load(options.base, options.checkpoint), pairs)
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"text_sha256": digest, "window": options.window, "metrics": metrics}, indent=2))


if __name__ == "__main__":
    main()
