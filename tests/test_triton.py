"""Triton's kernels against their slow twins and numba's: on a GPU as they are, without one in Triton's interpreter.

The interpreter runs what the kernels say but nothing of the compiler, so they are also compiled, for cards that need
not be there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux on x86-64, with halfbyte[dev])")

from halfbyte.kernels import dispatch, gptq_numba, gptq_reference, gptq_triton, refine_reference, refine_triton
from halfbyte.methods import gptq, refine, scales
from halfbyte.schemes import WeightFormat
from test_kernels import TIE, Problem, off_nearest, problem, stacked
from test_refine import FORMATS, Linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def solve(*problems: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (t.to(DEVICE) for t in stacked(problems))
    codes, loss = gptq_triton.solve_columns(*tensors, problems[0].q_min, problems[0].q_max)
    return codes.cpu(), loss.cpu()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 8), (17, 129), (7, 260)])
def test_columns_match_the_slow_twin(rows: int, n: int, symmetric: bool, bits: int) -> None:
    problems = [problem(rows, n, bits=bits, symmetric=symmetric, seed=seed) for seed in range(3)]
    for p, found, loss in zip(problems, *solve(*problems), strict=True):
        weight, factor, s, z, group_of, q_min, q_max = p.in_float64()
        codes = found.numpy()
        free, _, _ = gptq_reference.solve_columns(weight, factor, s, z, group_of, q_min, q_max)
        _, exact, forced = gptq_reference.solve_columns(
            weight, factor, s, z, group_of, q_min, q_max, forced_codes=codes
        )
        assert off_nearest(exact, codes, q_min, q_max).max() <= TIE
        assert (free != codes).any(axis=1).mean() <= 0.1
        assert np.allclose(loss.numpy(), forced, rtol=1e-4)
        assert codes.min() >= q_min
        assert codes.max() <= q_max


def test_a_tie_goes_to_the_even_code() -> None:
    weight = torch.tensor([[[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 9.0, -8.5, 1e30]]], device=DEVICE)
    n = weight.shape[2]
    one, zero = torch.ones(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 1, device=DEVICE)
    group_of = torch.zeros(1, n, dtype=torch.int64, device=DEVICE)
    codes, _ = gptq_triton.solve_columns(weight, torch.eye(n, device=DEVICE)[None], one, zero, group_of, -8, 7)
    assert codes.tolist() == [[[0, 2, 2, 0, -2, 7, 7, -8, 7]]]


def test_a_slip_of_one_column_would_be_seen() -> None:
    p = problem(17, 129, bits=4, symmetric=True)
    slipped = p.factor.clone()
    slipped[:, 1:] = p.factor[:, :-1].triu(1)
    slipped.diagonal().copy_(p.factor.diagonal())
    codes = solve(replace(p, factor=slipped))[0][0].numpy()
    weight, factor, s, z, group_of, q_min, q_max = p.in_float64()
    _, exact, _ = gptq_reference.solve_columns(weight, factor, s, z, group_of, q_min, q_max, forced_codes=codes)
    assert off_nearest(exact, codes, q_min, q_max).max() > 0.1


@pytest.mark.parametrize(("groups", "width"), [(1, 8), (3, 32), (1, 300)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_scale_search_matches_numba(groups: int, width: int, symmetric: bool, bits: int) -> None:
    rng = np.random.default_rng([groups, width, symmetric, bits])
    rows, q_min, q_max = 19, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = rng.normal(size=(rows, groups * width))
    importance = rng.exponential(size=groups * width)
    candidates = rng.uniform(1.0, 6.0, size=(rows, groups, 12)) / (q_max - q_min)
    zeros = np.zeros_like(candidates) if symmetric else rng.integers(-3, 4, size=candidates.shape)
    tensors = [torch.from_numpy(a.astype(np.float32)) for a in (weight, importance, candidates, zeros)]
    expected = gptq_numba.search_scales(*tensors, q_min, q_max)
    best = gptq_triton.search_scales(*(t.to(DEVICE) for t in tensors), q_min, q_max).cpu()
    assert best.dtype == expected.dtype == torch.int64
    assert (best == expected).float().mean() > 0.97


def test_the_first_of_equal_scales_wins() -> None:
    weight, importance = torch.tensor([[1.0, -2.0]]), torch.ones(2)
    candidates = torch.tensor([[[0.7, 0.5, 1.0, 0.25]]])
    tensors = (weight, importance, candidates, torch.zeros_like(candidates))
    assert gptq_triton.search_scales(*(t.to(DEVICE) for t in tensors), -8, 7).tolist() == [[1]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 8), (33, 100), (7, 128)])
def test_descent_matches_the_slow_twin(rows: int, n: int, symmetric: bool, bits: int) -> None:
    fmt = WeightFormat(num_bits=bits, symmetric=symmetric)
    linears = [Linear(rows, n, fmt, seed=seed) for seed in range(3)]
    starts = torch.stack([linear.codes for linear in linears])
    squares = torch.stack([linear.hessian + linear.damping * torch.eye(n) for linear in linears])
    squares[:, 0] = squares[:, :, 0] = 0.0  # a dead input: its codes stay
    errors = torch.stack([linear.weight - linear.dense() for linear in linears])
    gradients = errors @ squares
    # Views of wider matrices, as the caller has them.
    wide, steps = torch.zeros(3, rows, n + 5, dtype=torch.int8), torch.full((3, rows, n), 0.5)
    wide[:, :, 5:] = starts
    wide, steps, kept = wide.to(DEVICE), steps.to(DEVICE), gradients.to(DEVICE)
    refine_triton.descend(
        kept,
        squares.to(DEVICE),
        wide[:, :, 5:],
        torch.stack([linear.scales[:, 0] for linear in linears]).to(DEVICE),
        torch.stack([linear.zeros[:, 0] for linear in linears]).to(DEVICE),
        fmt.q_min,
        fmt.q_max,
        steps,
    )
    assert torch.equal(kept.cpu(), gradients)
    assert not wide[:, :, :5].any()
    found = zip(linears, starts, squares, wide[:, :, 5:].cpu(), steps.cpu(), strict=True)
    for linear, start, square, codes, its_steps in found:
        check_descent(linear, start, square, codes, its_steps)


def check_descent(
    linear: Linear, start: torch.Tensor, square: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor
) -> None:
    """Against the slow twin, with these codes forced on it."""
    fmt, n = linear.fmt, square.shape[0]
    assert torch.equal(codes[:, 0], start[:, 0])
    moved = (codes - start).float() * linear.scales
    torch.testing.assert_close(steps, moved + 0.5, rtol=1e-5, atol=1e-6)
    assert (moved != 0).any() or n == 8

    rest = slice(1, n)
    w, h, s, z = (t.numpy().astype(np.float64) for t in (linear.weight, square, linear.scales, linear.zeros))
    _, exact = refine_reference.descend(
        w[:, rest],
        h[rest, rest],
        start[:, rest].numpy(),
        s,
        z,
        np.zeros(n - 1, dtype=np.int64),
        fmt.q_min,
        fmt.q_max,
        forced_codes=codes[:, rest].numpy(),
    )
    assert off_nearest(exact, codes[:, rest].numpy(), fmt.q_min, fmt.q_max).max() <= TIE


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size in (None, 32)], ids=str)
def test_the_whole_solver_with_triton_agrees_with_numba(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(15, 160, fmt)
    factor = gptq.factor_hessian(linear.hessian, 0.01, where="w")
    expected = gptq.quantize_gptq(linear.weight, linear.hessian, factor, fmt, torch.bfloat16)
    monkeypatch.setattr(gptq, "solve_columns", gptq_triton.solve_columns)
    monkeypatch.setattr(scales, "search_scales", gptq_triton.search_scales)
    monkeypatch.setattr(refine, "descend", refine_triton.descend)
    hessian = linear.hessian.to(DEVICE)
    factor = gptq.factor_hessian(hessian, 0.01, where="w")
    found = gptq.quantize_gptq(linear.weight.to(DEVICE), hessian, factor, fmt, torch.bfloat16).map(torch.Tensor.cpu)
    # A tie that falls otherwise moves what comes after it in its row.
    same = (found.codes == expected.codes).all(dim=1)
    assert same.float().mean() > 0.8
    assert found.relative_error == pytest.approx(expected.relative_error, rel=0.02)
    assert found.codes.shape == expected.codes.shape
    assert (found.zero_points is None) == fmt.symmetric


def test_the_trial_passes_and_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.trial(DEVICE) == ""

    def off_by_one(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        codes, loss = gptq_numba.solve_columns(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
        return codes.roll(1, dims=1).to(DEVICE), loss

    monkeypatch.setattr(gptq_triton, "solve_columns", off_by_one)
    assert dispatch.trial(DEVICE).startswith("the column loop chose otherwise than the CPU's in ")


def test_what_keeps_the_gpu_from_solving_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.device) -> str:
        raise RuntimeError("no such instruction\nand much more")

    monkeypatch.setattr(dispatch, "trial", fail)
    dispatch.gpu_problem.cache_clear()
    assert dispatch.gpu_problem(DEVICE) == "RuntimeError: no such instruction"
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    dispatch.gpu_problem.cache_clear()
    assert dispatch.gpu_problem(DEVICE) == "Triton is not installed"
    dispatch.gpu_problem.cache_clear()


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    """To machine code, by the compiler and assembler that Triton brings along; no card takes part."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", script, str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_panel", "_search", "_descend"]
