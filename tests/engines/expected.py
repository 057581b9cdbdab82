"""What an engine has to compute from a checkpoint, written out with transformers and the independent decoder.

The source model in float32 with the weights that the checkpoint stands for. In W8A8, each quantised layer's input is
rounded as engines round it: ``x -> s round(x / s)``, ``s = absmax / 127`` for each token.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import tiny
import zoo

Logits = torch.Tensor
Inputs = dict[str, torch.Tensor]


def rounded(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., features] as int8 with one scale for each row, and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (x / scale).round() * scale


@contextlib.contextmanager
def products_of_rounded_inputs() -> Iterator[None]:
    """Within, the two functions that experts are computed with round their first argument."""
    linear, bmm = torch.nn.functional.linear, torch.bmm
    torch.nn.functional.linear = lambda x, *weights: linear(rounded(x), *weights)  # type: ignore[assignment]
    torch.bmm = lambda x, weights: bmm(rounded(x), weights)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.linear, torch.bmm = linear, bmm


def dense_copy(source: Path, out: Path, folder: Path) -> Path:
    """A checkpoint in the source's names that holds, in float32, the weights that a quantised one stands for."""
    dense = tiny.decoded(out)
    weights = {}
    for name, original in tiny.stored(source).items():
        weights[name] = (dense[name] if name in dense else stacked(name, original.shape, dense)).contiguous()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stacked(name: str, shape: torch.Size, dense: dict[str, torch.Tensor]) -> torch.Tensor:
    """All experts' weights ``[E, ...]`` under a source's name, from those that were written one by one."""
    layer, _, leaf = name.removesuffix(".weight").rpartition(".")
    experts = layer if layer.endswith(".experts") else f"{layer}.experts"
    parts = {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "input_linear": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
        "output_linear": ("down_proj",),
    }[leaf]
    whole = torch.stack([torch.cat([dense[f"{experts}.{i}.{part}.weight"] for part in parts]) for i in range(shape[0])])
    return whole if whole.shape == shape else whole.mT


def quantized_modules(out: Path) -> set[str]:
    return {n.removesuffix(".weight_scale") for n in tiny.stored(out) if n.endswith(".weight_scale")}


def in_block(name: str) -> str:
    """A module's name from its block's number on, which files and transformers spell alike."""
    return re.split(r"(?:layers|h)\.(?=\d)", name)[-1]


def predictions(folder: Path, family: str, inputs: list[Inputs], quantized: set[str]) -> list[Logits]:
    """Log-probabilities ``[tokens, vocabulary]`` for each input, inputs of ``quantized`` modules rounded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say about themselves
        model = getattr(transformers, zoo.FAMILIES[family].model).from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
    model.eval()
    blocks = {in_block(name) for name in quantized}
    with_experts = {name.partition(".")[0] for name in blocks if ".experts." in name}
    weights = tiny.stored(folder)
    originals = {in_block(n): weights[f"{n}.weight"] for n in quantized if f"{n}.weight" in weights}
    for name, module in model.named_modules():
        block = in_block(name)
        # Towers have blocks of these names too: what is meant is the module that holds the weight.
        if isinstance(module, torch.nn.Linear) and block in originals and torch.equal(module.weight, originals[block]):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))
        elif name.endswith(".experts") and block.partition(".")[0] in with_experts:
            module.forward = _rounding(module.forward)
    with torch.inference_mode():
        return [model(**values).logits[0].float().log_softmax(-1) for values in inputs]


def _rounding(forward: Any) -> Any:
    def rounding(*args: Any, **kwargs: Any) -> Any:
        with products_of_rounded_inputs():
            return forward(*args, **kwargs)

    return rounding
