"""Which kernel does the work: numba's on the CPU, Triton's on a GPU. By the device of the tensors, nothing else.

Triton is imported with the first tensor on a GPU. Before a run relies on it, :func:`gpu_problem` tries the kernels on
the card against the CPU's; where they fail or differ, the caller solves on the CPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from halfbyte.kernels import general, gptq_numba, order_numba, refine_numba

PANEL = gptq_numba.PANEL
# Share of codes that may differ in the trial: ties, and what follows them in the same row.
MOST_DIFFERENT = 0.02


def solve_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    q_min: int,
    q_max: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ over all columns of a batch, see :func:`halfbyte.kernels.gptq_numba.solve_columns`."""
    if weight.device.type == "cpu":
        return gptq_numba.solve_columns(weight, factor, scales, zeros, group_of, q_min, q_max)
    from halfbyte.kernels import gptq_triton

    return gptq_triton.solve_columns(weight, factor, scales, zeros, group_of, q_min, q_max)


def search_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    candidates: torch.Tensor,
    zeros: torch.Tensor,
    q_min: int,
    q_max: int,
) -> torch.Tensor:
    """Best candidate for each row and group, see :func:`halfbyte.kernels.gptq_numba.search_scales`."""
    if weight.device.type == "cpu":
        return gptq_numba.search_scales(weight, importance, candidates, zeros, q_min, q_max)
    from halfbyte.kernels import gptq_triton

    return gptq_triton.search_scales(weight, importance, candidates, zeros, q_min, q_max)


def descend(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    q_min: int,
    q_max: int,
    steps: torch.Tensor,
) -> None:
    """One sweep over the columns of one panel of a batch, see :func:`halfbyte.kernels.refine_numba.descend`."""
    if gradient.device.type == "cpu":
        refine_numba.descend(gradient, hessian, codes, scales, zeros, q_min, q_max, steps)
        return
    from halfbyte.kernels import refine_triton

    refine_triton.descend(gradient, hessian, codes, scales, zeros, q_min, q_max, steps)


def take_square(x: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows and columns of square matrices in an order, see :func:`halfbyte.kernels.order_numba.take_square`."""
    if x.device.type == "cpu":
        return order_numba.take_square(x, order, dtype)
    return general.take_square(x, order, dtype)


def take_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of a batch in an order, see :func:`halfbyte.kernels.order_numba.take_columns`."""
    if x.device.type == "cpu":
        return order_numba.take_columns(x, order)
    return general.take_columns(x, order)


def put_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of a batch back where they were, see :func:`halfbyte.kernels.order_numba.put_columns`."""
    if x.device.type == "cpu":
        return order_numba.put_columns(x, order)
    return general.put_columns(x, order)


def rounding_error(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding did to a batch, see :func:`halfbyte.kernels.refine_numba.rounding_error`."""
    if weights.device.type == "cpu":
        return refine_numba.rounding_error(weights, codes, scales, zeros)
    return general.rounding_error(weights, codes, scales, zeros)


@cache
def gpu_problem(device: torch.device) -> str:
    """Why the GPU kernels cannot be relied upon; empty where they can. Tried once a process, on a small problem."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        return trial(device)
    except Exception as e:  # compilers, drivers and their wrappers raise what they like
        return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def trial(device: torch.device) -> str:
    """All three Triton kernels on ``device`` against the CPU's on a batch of small Linears; what differs, in words."""
    from halfbyte.kernels import gptq_triton, refine_triton

    batch, rows, n, groups, q_min, q_max = 2, 20, 160, 5, -8, 7
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(batch, rows, n, generator=generator)
    diagonal = torch.rand(batch, n, generator=generator).add(0.5)
    factor = (torch.randn(batch, n, n, generator=generator) * 0.02).triu(1) + diagonal.diag_embed()
    scales = torch.rand(batch, rows, groups, generator=generator).mul(0.1).add(0.25)
    zeros = torch.randint(-2, 3, (batch, rows, groups), generator=generator).float()
    group_of = torch.stack([torch.randperm(n, generator=generator) % groups for _ in range(batch)])
    candidates = scales[0].unsqueeze(-1) * torch.linspace(0.6, 1.1, 20)
    offsets = zeros[0].unsqueeze(-1).expand_as(candidates).contiguous()
    square = factor[:, :32, :32].mT @ factor[:, :32, :32]

    def run(gptq: ModuleType, refine: ModuleType, of: torch.device) -> list[torch.Tensor]:
        w, r, s, z, g, c, o, h, d = (
            t.clone().to(of) for t in (weight, factor, scales, zeros, group_of, candidates, offsets, square, diagonal)
        )
        best = gptq.search_scales(w[0], d[0], c, o, q_min, q_max)
        codes, _ = gptq.solve_columns(w.clone(), r, s, z, g, q_min, q_max)
        refined, steps = codes[:, :, :32].clone(), torch.zeros(batch, rows, 32, device=of)
        first_s, first_z = s[:, :, 0].contiguous(), z[:, :, 0].contiguous()
        refine.descend(w[:, :, :32].contiguous(), h, refined, first_s, first_z, q_min, q_max, steps)
        return [best.cpu(), codes.cpu(), refined.cpu()]

    names = ("the scale search", "the column loop", "the refinement")
    found = run(gptq_triton, refine_triton, device)
    expected = run(gptq_numba, refine_numba, torch.device("cpu"))
    for name, ours, right in zip(names, found, expected, strict=True):
        share = float((ours != right).float().mean())
        if share > MOST_DIFFERENT:
            return f"{name} chose otherwise than the CPU's in {share:.0%} of a trial"
    return ""
