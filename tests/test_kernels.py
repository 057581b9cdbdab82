"""The fast kernels against their slow twins: every code, ties excepted, and the loss they report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch

from halfbyte.kernels import general, gptq_numba, gptq_reference, order_numba, refine_numba
from halfbyte.packing import dequantize

Array = npt.NDArray[np.float64]
# How far from the middle between two codes float32 may still pick the other one: an open column collects up to n
# updates, each rounded to 2^-24 of its size.
TIE = 2e-4


@dataclass
class Problem:
    """One Linear's columns, in float32, ready for a solver; ``hessian`` is the one that ``factor`` was made from."""

    weight: torch.Tensor
    hessian: Array
    factor: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor
    q_min: int
    q_max: int

    def in_float64(self) -> tuple[Array, Array, Array, Array, npt.NDArray[np.int64], int, int]:
        arrays = (self.weight, self.factor, self.scales, self.zeros)
        w, r, s, z = (t.numpy().astype(np.float64) for t in arrays)
        return w, r, s, z, self.group_of.numpy(), self.q_min, self.q_max


def problem(rows: int, n: int, *, bits: int, symmetric: bool, groups: int = 2, seed: int = 0) -> Problem:
    """Correlated inputs, a tenth of them ten times as strong, and groups scattered as activation order does."""
    rng = np.random.default_rng([seed, rows, n, bits, symmetric])
    mixing = rng.normal(size=(n, n)) / np.sqrt(n) + np.eye(n)
    strength = np.where(rng.random(n) < 0.1, 10.0, 1.0)
    x = (rng.normal(size=(2 * n + 8, n)) @ mixing) * strength
    hessian = x.T @ x
    hessian[np.diag_indices(n)] += 0.01 * hessian.diagonal().mean()
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    exact = np.linalg.inv(factor.astype(np.float64))
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = rng.normal(size=(rows, n)).astype(np.float32)
    scales = rng.uniform(3.0, 5.0, size=(rows, groups)) / (q_max - q_min)
    zeros = np.zeros((rows, groups)) if symmetric else rng.integers(q_min // 2, q_max // 2, size=(rows, groups))
    return Problem(
        weight=torch.from_numpy(weight),
        hessian=exact @ exact.T,
        factor=torch.from_numpy(np.ascontiguousarray(factor)),
        scales=torch.from_numpy(scales.astype(np.float32)),
        zeros=torch.from_numpy(zeros.astype(np.float32)),
        group_of=torch.from_numpy(rng.permutation(np.arange(n) * groups // n)),
        q_min=q_min,
        q_max=q_max,
    )


def stacked(problems: Sequence[Problem]) -> tuple[torch.Tensor, ...]:
    """What a kernel is called with for a batch; the weight is a copy."""
    names = ("weight", "factor", "scales", "zeros", "group_of")
    return tuple(torch.stack([getattr(p, name) for p in problems]) for name in names)


def solve(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of one."""
    codes, loss = gptq_numba.solve_columns(*stacked([p]), p.q_min, p.q_max)
    return codes[0], loss[0]


def off_nearest(exact: Array, codes: npt.NDArray[np.int8], q_min: int, q_max: int) -> Array:
    """How much farther than half a step each code is from the value that it stands for; clipping is no distance."""
    return np.abs(np.clip(exact, q_min, q_max) - codes) - 0.5


SHAPES = [(rows, n) for rows in (1, 7, 32, 33, 100) for n in (8, 100, 128, 129, 300)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_columns_match_the_slow_twin(rows: int, n: int, symmetric: bool, bits: int) -> None:
    p = problem(rows, n, bits=bits, symmetric=symmetric)
    weight, factor, scales, zeros, group_of, q_min, q_max = p.in_float64()
    found, loss = solve(p)
    codes = found.numpy()
    assert codes.min() >= q_min
    assert codes.max() <= q_max

    # Under the kernel's own earlier choices, each code is a nearest one of the exact value.
    _, exact, forced_loss = gptq_reference.solve_columns(
        weight, factor, scales, zeros, group_of, q_min, q_max, forced_codes=codes
    )
    assert off_nearest(exact, codes, q_min, q_max).max() <= TIE

    # Left to itself the twin parts from the kernel only at ties: the first difference of each row is one.
    free, free_exact, _ = gptq_reference.solve_columns(weight, factor, scales, zeros, group_of, q_min, q_max)
    different = free != codes
    for row in np.flatnonzero(different.any(axis=1)):
        first = int(different[row].argmax())
        from_middle = abs(free_exact[row, first] - np.floor(free_exact[row, first]) - 0.5)
        assert from_middle <= TIE
        assert abs(int(free[row, first]) - int(codes[row, first])) == 1
    assert different.any(axis=1).mean() <= 0.1 or rows < 10

    group = group_of
    dense = (codes - zeros[:, group]) * scales[:, group]
    error = weight - dense
    direct = np.einsum("ri,ij,rj->r", error, p.hessian, error)
    assert np.allclose(forced_loss, direct, rtol=1e-8)
    assert np.allclose(loss.numpy(), direct, rtol=1e-4)


def test_a_slip_of_one_column_would_be_seen() -> None:
    """The oracle's own check: shift the factor by one column, and the codes no longer fit."""
    p = problem(33, 129, bits=4, symmetric=True)
    weight, factor, scales, zeros, group_of, q_min, q_max = p.in_float64()
    slipped = p.factor.clone()
    slipped[:, 1:] = p.factor[:, :-1].triu(1)[:, :]
    slipped.diagonal().copy_(p.factor.diagonal())
    codes, _ = solve(replace(p, factor=slipped))
    _, exact, _ = gptq_reference.solve_columns(
        weight, factor, scales, zeros, group_of, q_min, q_max, forced_codes=codes.numpy()
    )
    assert off_nearest(exact, codes.numpy(), q_min, q_max).max() > 0.1


@pytest.mark.parametrize("rows", [7, 32, 100])
def test_columns_do_not_depend_on_the_batch(rows: int) -> None:
    problems = [problem(rows, 300, bits=4, symmetric=False, seed=seed) for seed in range(5)]
    codes, loss = gptq_numba.solve_columns(*stacked(problems), -8, 7)
    for p, of_one, its_loss in zip(problems, codes, loss, strict=True):
        alone, loss_alone = solve(p)
        assert torch.equal(of_one, alone)
        assert torch.equal(its_loss, loss_alone)


def test_columns_do_not_depend_on_the_number_of_threads() -> None:
    p = problem(100, 300, bits=4, symmetric=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(solve(p))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize(("groups", "width"), [(1, 8), (3, 32), (2, 100)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scale_search_matches_the_slow_twin(rows: int, groups: int, width: int, symmetric: bool, bits: int) -> None:
    rng = np.random.default_rng([rows, groups, width, symmetric, bits])
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = rng.normal(size=(rows, groups * width)).astype(np.float32)
    importance = rng.exponential(size=groups * width).astype(np.float32)
    candidates = (rng.uniform(1.0, 6.0, size=(rows, groups, 20)) / (q_max - q_min)).astype(np.float32)
    zeros = np.zeros_like(candidates) if symmetric else rng.integers(-3, 4, size=candidates.shape).astype(np.float32)
    tensors = [torch.from_numpy(a) for a in (weight, importance, candidates, zeros)]
    best = gptq_numba.search_scales(*tensors, q_min, q_max).numpy()
    wide = [a.astype(np.float64) for a in (weight, importance, candidates, zeros)]
    expected = gptq_reference.search_scales(*wide, q_min, q_max)
    assert best.shape == expected.shape == (rows, groups)

    def error(choice: npt.NDArray[np.int64]) -> Array:
        s = np.take_along_axis(wide[2], choice[..., None], 2)
        z = np.take_along_axis(wide[3], choice[..., None], 2)
        w, h = wide[0].reshape(rows, groups, width), wide[1].reshape(1, groups, width)
        off = w - (np.clip(np.rint(w / s) + z, q_min, q_max) - z) * s
        result: Array = (h * off * off).sum(-1)
        return result

    # Another index is right only where both candidates are equally good to float32's precision.
    assert np.allclose(error(best), error(expected), rtol=1e-5)
    assert (best == expected).mean() > 0.95


def test_the_first_of_equal_scales_wins() -> None:
    weight, importance = torch.tensor([[1.0, -2.0]]), torch.ones(2)
    candidates = torch.tensor([[[0.7, 0.5, 1.0, 0.25]]])
    best = gptq_numba.search_scales(weight, importance, candidates, torch.zeros_like(candidates), -8, 7)
    assert best.tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("of", [order_numba, general])
def test_columns_in_their_order_and_back(of: ModuleType, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(3)])
    square = torch.randn(3, n, n, generator=generator)
    expected = torch.stack([h[o][:, o] for h, o in zip(square, order, strict=True)]).to(dtype)
    assert torch.equal(of.take_square(square, order, dtype), expected)
    for weights in (torch.randn(3, 5, n, generator=generator), torch.randint(-8, 8, (3, 5, n)).to(torch.int8)):
        taken = of.take_columns(weights, order)
        assert torch.equal(taken, torch.stack([w[:, o] for w, o in zip(weights, order, strict=True)]))
        assert torch.equal(of.put_columns(taken, order), weights)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 3), (1030, 2)])
@pytest.mark.parametrize("of", [refine_numba, general])
def test_the_error_of_rounding_is_the_file_formats_to_the_bit(
    of: ModuleType, rows: int, groups: int, symmetric: bool
) -> None:
    problems = [problem(rows, 96, bits=4, symmetric=symmetric, groups=groups, seed=seed) for seed in range(2)]
    weights, _, scales, zeros, _ = stacked(problems)
    codes = torch.randint(-8, 8, weights.shape, generator=torch.Generator().manual_seed(rows)).to(torch.int8)
    error, most = of.rounding_error(weights, codes, scales, zeros)
    expected = weights - torch.stack([dequantize(*of_one) for of_one in zip(codes, scales, zeros, strict=True)])
    assert torch.equal(error, expected)
    assert torch.equal(most, expected.abs().amax(dim=(1, 2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("of", [refine_numba, general])
def test_an_error_that_is_not_finite_is_told_of_its_own_linear(of: ModuleType, value: float) -> None:
    weights = torch.ones(3, 5, 8)
    weights[1, 2, 3] = value
    codes, ones = torch.ones(3, 5, 8, dtype=torch.int8), torch.ones(3, 5, 2)
    _, most = of.rounding_error(weights, codes, ones, torch.zeros(3, 5, 2))
    assert torch.isfinite(most).tolist() == [True, False, True]
