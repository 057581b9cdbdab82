"""The work that gpu.py gives to both tools: shapes of a block, random weights and activations. Needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

TOKENS_PER_BATCH = 4096
Activations = list[torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A Llama block: hidden size, MLP size, head size; a quarter of the heads for keys and values."""

    hidden: int
    inner: int
    head: int

    def inputs(self) -> list[tuple[int, dict[str, int]]]:
        """Each distinct input of a block's Linears: its width, and the rows of each Linear that reads it."""
        kv = self.hidden // 4
        return [
            (self.hidden, {"q_proj": self.hidden, "k_proj": kv, "v_proj": kv}),
            (self.hidden, {"o_proj": self.hidden}),
            (self.hidden, {"gate_proj": self.inner, "up_proj": self.inner}),
            (self.inner, {"down_proj": self.hidden}),
        ]

    @property
    def weights(self) -> int:
        """Numbers in all Linears of a block."""
        return sum(width * rows for width, linears in self.inputs() for rows in linears.values())


LLAMA_3_8B = Shapes(hidden=4096, inner=14336, head=128)
TINY = Shapes(hidden=64, inner=128, head=16)


def made(shapes: Shapes, tokens: int, device: torch.device) -> Iterator[tuple[dict[str, torch.Tensor], Activations]]:
    """For each distinct input its weights ``[rows, width]`` and batches ``[tokens, width]``, bfloat16.

    Inputs are mixed, so that columns are correlated, and a tenth of them is ten times as strong. Equal arguments give
    equal numbers, for both tools.
    """
    for i, (width, linears) in enumerate(shapes.inputs()):
        generator = torch.Generator(device).manual_seed(i)

        def normal(*size: int, of: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*size, generator=of, device=device)

        strength = torch.where(torch.rand(width, generator=generator, device=device) < 0.1, 10.0, 1.0)
        mixing = (normal(width, width) / width**0.5 + torch.eye(width, device=device)).mul_(strength)
        sizes = [min(TOKENS_PER_BATCH, tokens - first) for first in range(0, tokens, TOKENS_PER_BATCH)]
        batches = [(normal(n, width) @ mixing).bfloat16() for n in sizes]
        yield {name: (normal(rows, width) * 0.02).bfloat16() for name, rows in linears.items()}, batches


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long it takes, start to end on the device."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def relative_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)``, the products of float32 matrices summed up in float64."""
    weight = weight.float()
    error = weight - quantized.float()
    lost = sum(float((e @ hessian).mul_(e).sum(dtype=torch.float64)) for e in error.split(1024))
    energy = sum(float((w @ hessian).mul_(w).sum(dtype=torch.float64)) for w in weight.split(1024))
    return lost / energy
