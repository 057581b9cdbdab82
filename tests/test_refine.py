"""Refinement against its definitions: each step is least where it says, none raises the error, the kernel does it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from halfbyte.kernels import refine_numba, refine_reference
from halfbyte.methods.gptq import factor_hessian, quantize_gptq
from halfbyte.methods.refine import refine
from halfbyte.methods.rtn import nearest
from halfbyte.methods.scales import minmax
from halfbyte.packing import dequantize
from halfbyte.recipe import GptqSteps
from halfbyte.schemes import WeightFormat

Array = npt.NDArray[np.float64]
TIE = 2e-4


class Linear:
    """A weight rounded to nearest, and the Hessian of correlated inputs."""

    def __init__(
        self, rows: int, n: int, fmt: WeightFormat, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(rows * 1000 + n + seed)
        mixing = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
        x = torch.randn(3 * n, n, generator=generator) @ mixing * torch.rand(n, generator=generator).add(0.1)
        self.hessian = x.T @ x
        self.damping = 0.01 * float(self.hessian.diagonal().mean())
        self.weight = torch.randn(rows, n, generator=generator)
        self.fmt, self.dtype = fmt, dtype
        self.scales, self.zeros = minmax(self.weight, fmt, dtype)
        self.codes = nearest(self.weight, self.scales, self.zeros, fmt)

    def dense(self) -> torch.Tensor:
        return dequantize(self.codes, self.scales, self.zeros)

    def refine(self, *, refit: bool = True, descent: bool = True, sweeps: int = 1) -> float:
        return float(refine_all([self], refit=refit, descent=descent, sweeps=sweeps)[0].sum())

    def error(self, *, damped: bool) -> float:
        e = (self.weight - self.dense()).double()
        h = self.hessian.double() + (self.damping if damped else 0.0) * torch.eye(len(self.hessian))
        return float(((e @ h) * e).sum())


def refine_all(linears: Sequence[Linear], *, refit: bool, descent: bool, sweeps: int) -> torch.Tensor:
    """Refine Linears in one batch: each gets what became of its codes and scales; returns the errors left."""
    codes, scales = (torch.stack(t) for t in zip(*((x.codes, x.scales) for x in linears), strict=True))
    errors = refine(
        torch.stack([x.weight for x in linears]),
        torch.stack([x.hessian for x in linears]),
        torch.stack([torch.full((len(x.hessian),), x.damping) for x in linears]),
        codes,
        scales,
        torch.stack([x.zeros for x in linears]),
        linears[0].fmt,
        linears[0].dtype,
        refit=refit,
        descent=descent,
        sweeps=sweeps,
    )
    for linear, c, s in zip(linears, codes, scales, strict=True):
        linear.codes, linear.scales = c, s
    return errors


FORMATS = [
    WeightFormat(num_bits=bits, symmetric=symmetric, group_size=size)
    for bits, symmetric, size in itertools.product((4, 8), (True, False), (None, 32, 128))
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_sweep_raises_the_error_and_the_error_is_reported(fmt: WeightFormat) -> None:
    linear = Linear(9, 384, fmt)
    before = linear.error(damped=True)
    for refit, descent in ((True, False), (False, True), (True, True), (True, True)):
        reported = linear.refine(refit=refit, descent=descent)
        assert reported == pytest.approx(linear.error(damped=False), rel=1e-3)
        after = linear.error(damped=True)
        assert after < before or (after == pytest.approx(before, rel=1e-6) and not (refit and descent))
        before = after
    assert int(linear.codes.min()) >= fmt.q_min
    assert int(linear.codes.max()) <= fmt.q_max
    assert torch.equal(linear.scales, linear.scales.to(torch.bfloat16).float())
    assert (linear.scales > 0).all()


def test_no_steps_change_nothing() -> None:
    linear = Linear(5, 128, WeightFormat(num_bits=4, group_size=32))
    codes, scales = linear.codes.clone(), linear.scales.clone()
    assert linear.refine(sweeps=0) == pytest.approx(linear.error(damped=False), rel=1e-4)
    linear.refine(refit=False, descent=False, sweeps=3)
    assert torch.equal(linear.codes, codes)
    assert torch.equal(linear.scales, scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [None, 32])
def test_a_refitted_scale_is_the_least_squares_one(symmetric: bool, size: int | None) -> None:
    """The group that is moved last has all others in their final place: its scale must solve its normal equation."""
    linear = Linear(6, 160, WeightFormat(num_bits=4, symmetric=symmetric, group_size=size), torch.float32)
    linear.refine(descent=False)
    width = size or 160
    last = slice(160 - width, 160)
    h = linear.hessian.double() + linear.damping * torch.eye(160)
    rest = (linear.weight - linear.dense()).double()
    v = (linear.codes[:, last] - linear.zeros[:, -1:]).double()
    rest[:, last] = linear.weight[:, last].double()
    # min over s of (rest - s v) H (rest - s v)^T
    best = ((rest @ h)[:, last] * v).sum(dim=1) / ((v @ h[last, last]) * v).sum(dim=1)
    torch.testing.assert_close(linear.scales[:, -1].double(), best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [None, 32])
def test_a_scale_that_should_be_negative_gets_small_but_stays_what_float16_holds(
    symmetric: bool, size: int | None
) -> None:
    """Correlated columns can turn a group against its own sign; AWQ and GPTQ keep scales in float16."""
    linear = Linear(6, 160, WeightFormat(num_bits=4, symmetric=symmetric, group_size=size))
    opposite = 2 * linear.zeros[:, :1] - linear.codes[:, : size or 160]
    linear.codes[:, : size or 160] = opposite.clamp(linear.fmt.q_min, linear.fmt.q_max).to(torch.int8)
    start, before = linear.scales[:, 0].clone(), linear.error(damped=True)
    linear.refine(descent=False)
    torch.testing.assert_close(linear.scales[:, 0], start / 16, rtol=0, atol=0)
    assert linear.error(damped=True) < before
    assert torch.equal(linear.scales, linear.scales.half().float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_after_descent_no_single_code_can_do_better(symmetric: bool) -> None:
    linear = Linear(4, 96, WeightFormat(num_bits=4, symmetric=symmetric, group_size=32), torch.float32)
    linear.refine(refit=False, sweeps=50)
    h = linear.hessian.double() + linear.damping * torch.eye(96)
    error = (linear.weight - linear.dense()).double()
    gradient = error @ h
    scales = linear.scales.double().repeat_interleave(32, dim=1)
    for step in (-1, 1):
        moved = linear.codes + step
        allowed = (moved >= -8) & (moved <= 7)
        change = -2 * step * scales * gradient + scales.square() * h.diagonal()
        assert float(change[allowed].min()) > -1e-4 * float((error @ h * error).sum(dim=1).mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 8), (7, 32), (33, 100), (64, 128)])
def test_the_kernel_matches_the_slow_twin(rows: int, n: int, symmetric: bool, bits: int) -> None:
    """With the kernel's codes forced on it, the twin shows what each stands for: the nearest, ties excepted."""
    fmt = WeightFormat(num_bits=bits, symmetric=symmetric)
    linear = Linear(rows, n, fmt)
    start = linear.codes.clone()
    square = linear.hessian + linear.damping * torch.eye(n)
    gradient = (linear.weight - linear.dense()) @ square
    kept, steps = gradient.clone(), torch.full((rows, n), 0.5)
    scales, zeros = linear.scales[:, 0].contiguous(), linear.zeros[:, 0].contiguous()
    tensors = (t[None] for t in (gradient, square, linear.codes, scales, zeros))
    refine_numba.descend(*tensors, fmt.q_min, fmt.q_max, steps[None])
    assert torch.equal(gradient, kept)
    moved = (linear.codes - start).float() * linear.scales
    torch.testing.assert_close(steps, moved + 0.5, rtol=1e-5, atol=1e-6)
    assert (moved != 0).any() or n == 8

    w, h, s, z = (t.numpy().astype(np.float64) for t in (linear.weight, square, linear.scales, linear.zeros))
    group_of = np.zeros(n, dtype=np.int64)
    _, exact = refine_reference.descend(
        w, h, start.numpy(), s, z, group_of, fmt.q_min, fmt.q_max, forced_codes=linear.codes.numpy()
    )
    distance = np.abs(np.clip(exact, fmt.q_min, fmt.q_max) - linear.codes.numpy()) - 0.5
    assert distance.max() < TIE * (1 if bits == 4 else 16)
    # Left to itself it takes the same codes, unless one is so close to a tie that float32 may go the other way.
    if (np.abs(distance) > TIE * (1 if bits == 4 else 16)).all():
        free, _ = refine_reference.descend(w, h, start.numpy(), s, z, group_of, fmt.q_min, fmt.q_max)
        assert np.array_equal(free, linear.codes.numpy())
    else:
        assert rows * n > 200  # too few codes for a tie by chance


def test_views_of_codes_are_changed_in_place() -> None:
    linear = Linear(40, 256, WeightFormat(num_bits=4))
    square = linear.hessian[100:150, 100:150] + linear.damping * torch.eye(50)
    gradient = ((linear.weight - linear.dense()) @ linear.hessian)[:, 100:150].contiguous()
    before = linear.codes.clone()
    scales, zeros = linear.scales[:, 0].contiguous(), linear.zeros[:, 0].contiguous()
    tensors = (t[None] for t in (gradient, square, linear.codes[:, 100:150], scales, zeros))
    refine_numba.descend(*tensors, -8, 7, torch.zeros(1, 40, 50))
    changed = (linear.codes != before).any(dim=0)
    assert changed[100:150].any()
    assert not changed[:100].any()
    assert not changed[150:].any()


def test_dead_columns_stay_at_zero_without_damping() -> None:
    linear = Linear(8, 64, WeightFormat(num_bits=4, group_size=32))
    linear.damping = 0.0
    linear.hessian[[3, 40]] = 0.0
    linear.hessian[:, [3, 40]] = 0.0
    linear.weight[:, [3, 40]] = 0.0
    linear.codes[:, [3, 40]] = 0
    linear.refine(sweeps=3)
    assert (linear.codes[:, [3, 40]] == 0).all()
    assert torch.isfinite(linear.scales).all()


def test_columns_without_a_pivot_stay_and_move_no_others() -> None:
    """In mid-block and in the last block of eight; ones whose slope would move them, had they a pivot."""
    linear = Linear(40, 256, WeightFormat(num_bits=4, group_size=64))
    dead = [3, 40, 63]
    square = (linear.hessian + linear.damping * torch.eye(256))[:64, :64].clone()
    gradient = ((linear.weight - linear.dense()) @ linear.hessian)[:, :64].contiguous()
    scales, zeros = linear.scales[:, 0].contiguous(), linear.zeros[:, 0].contiguous()

    def descended(
        square: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, steps = codes.clone(), torch.zeros_like(gradient)
        tensors = (t[None] for t in (gradient, square, codes, scales, zeros))
        refine_numba.descend(*tensors, -8, 7, steps[None])
        return codes, steps

    square[dead] = 0.0
    square[:, dead] = 0.0
    gradient[:, dead] = 1e3
    before = linear.codes[:, :64].contiguous()
    codes, steps = descended(square, gradient, before)
    assert torch.equal(codes[:, dead], before[:, dead])
    assert (steps[:, dead] == 0).all()
    alive = [j for j in range(64) if j not in dead]
    alone = (square[alive][:, alive].contiguous(), gradient[:, alive].contiguous(), before[:, alive].contiguous())
    fewer_codes, fewer_steps = descended(*alone)
    assert torch.equal(codes[:, alive], fewer_codes)
    torch.testing.assert_close(steps[:, alive], fewer_steps)
    assert not torch.equal(codes, before)


def test_an_error_that_overflows_moves_nothing() -> None:
    linear = Linear(4, 32, WeightFormat(num_bits=4))
    linear.weight *= 1e37
    linear.scales *= 3e36
    codes, scales = linear.codes.clone(), linear.scales.clone()
    assert linear.refine() == float("inf")
    assert torch.equal(linear.codes, codes)
    assert torch.equal(linear.scales, scales)


def test_an_error_that_overflows_moves_nothing_but_the_others_of_its_batch() -> None:
    fmt = WeightFormat(num_bits=4)
    linears, alone = ([Linear(4, 32, fmt, seed=seed) for seed in range(3)] for _ in range(2))
    for same in (linears[1], alone[1]):
        same.weight *= 1e37
        same.scales *= 3e36
    errors = refine_all(linears, refit=True, descent=True, sweeps=1)
    expected = [linear.refine() for linear in alone]
    assert errors.sum(dim=1).tolist() == expected
    assert expected[1] == float("inf")
    for one, other in zip(linears, alone, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)


def test_each_step_lowers_what_gptq_leaves() -> None:
    linear = Linear(64, 256, WeightFormat(num_bits=4, group_size=64))
    factor = factor_hessian(linear.hessian, 0.01, where="w")
    errors = {}
    for refit, descent in itertools.product((False, True), repeat=2):
        steps = GptqSteps(scale_refit=refit, code_descent=descent)
        result = quantize_gptq(linear.weight, linear.hessian, factor, linear.fmt, torch.bfloat16, steps)
        errors[refit, descent] = result.relative_error
    assert errors[True, True] < errors[False, True] < errors[False, False]
    assert errors[True, True] < errors[True, False] < errors[False, False]
