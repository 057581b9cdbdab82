"""What each decoder layer of a checkpoint does wrong on its own, computed with plain transformers on held-out text.

    python layer_errors.py BASE CHECKPOINT TEXT [--tokens 2048] [--window 512]

The original model runs; each decoder layer of the checkpoint gets what the original's layer got, so errors of earlier
layers play no part. With f the original's layer, g the checkpoint's, h the hidden state in front of it, a layer's error
is the mean over tokens of

    |g(h) - f(h)|^2 / |f(h) - h|^2,

the energy of the mistake relative to the energy of what the layer adds. A mean of quotients, not a quotient of sums:
the first token's hidden state can be a hundred times longer than all others, and would be the whole of the sums. Since
whole layers are compared, tools that move factors between a layer's weights (SmoothQuant) are judged like those that do
not, and rounded inputs of Linears count. ``linears`` has the same for the output of each Linear, relative to that
output, where the Linear's input comes from the checkpoint's own layer.

Shares no code with halfbyte; weights are read as ``score_transformers.py`` reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from score_transformers import load, windows
from transformers import AutoTokenizer


class Layer:
    """Sums over tokens for one decoder layer and its Linears."""

    def __init__(self, original: Any, other: Any) -> None:
        self.other = other
        self.layer_sum, self.tokens = 0.0, 0
        self.linear_sums: dict[str, float] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        for name, module in original.named_modules():
            if isinstance(module, torch.nn.Linear):
                self.linear_sums[name] = 0.0
                module.register_forward_hook(lambda _m, _i, out, name=name: self._outputs.update({name: out}))
        for name, module in other.named_modules():
            if name in self.linear_sums:
                module.register_forward_hook(lambda _m, _i, out, name=name: self._add_linear(name, out))
        original.register_forward_hook(self._add, with_kwargs=True)

    def _add_linear(self, name: str, output: torch.Tensor) -> None:
        right = self._outputs.pop(name)
        self.linear_sums[name] += quotients(output - right, right)

    def _add(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        other = self.other(*args, **kwargs)
        right, wrong = (x[0] if isinstance(x, tuple) else x for x in (output, other))
        self.layer_sum += quotients(wrong - right, right - hidden)
        self.tokens += right.shape[:-1].numel()


def quotients(error: torch.Tensor, reference: torch.Tensor) -> float:
    """Sum over tokens of |error|^2 / |reference|^2."""
    ratio = error.double().square().sum(-1) / reference.double().square().sum(-1).clamp(min=1e-30)
    return float(ratio.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="use the first N text tokens (0: all)")
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    content = options.text.read_bytes()
    ids = tokenizer(content.decode("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[: options.tokens] if options.tokens else ids
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    base, other = load(options.base, options.base), load(options.base, options.checkpoint)
    layers = [Layer(f, g) for f, g in zip(base.model.layers, other.model.layers, strict=True)]
    with torch.inference_mode():
        for inputs, _ in windows(ids, tokenizer.bos_token_id if adds_bos else None, options.window):
            base.model(input_ids=torch.tensor([inputs]), use_cache=False)
    print(
        json.dumps(
            {
                "text_sha256": hashlib.sha256(content).hexdigest(),
                "tokens": len(ids),
                "window": options.window,
                "layers": [layer.layer_sum / layer.tokens for layer in layers],
                "linears": {
                    f"{i}.{name}": total / layer.tokens
                    for i, layer in enumerate(layers)
                    for name, total in layer.linear_sums.items()
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
