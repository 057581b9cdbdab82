"""GPTQ against its equations: the factor, the order, the error that is reported, and the closed-form optimum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from halfbyte.errors import NumericsError
from halfbyte.methods.gptq import MAX_RAISES, factor_hessian, factor_upper, invert_upper, quantize_gptq
from halfbyte.methods.rtn import nearest, quantize_rtn
from halfbyte.methods.scales import minmax, searched
from halfbyte.recipe import GptqSteps
from halfbyte.schemes import WeightFormat

INT4 = WeightFormat(num_bits=4, group_size=32)
# The columns alone, with what is found for them beforehand.
COLUMNS = GptqSteps(scale_refit=False, code_descent=False)
Array = npt.NDArray[np.float64]


def inputs(n: int, *, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    """Correlated activations of different strengths ``[tokens, n]``, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * n, n, generator=generator)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    return x @ mixing * torch.rand(n, generator=generator).add(0.1)


def weights(rows: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 33, 200])
@pytest.mark.parametrize("damp_fraction", [0.0, 0.01])
def test_factor_is_that_of_the_damped_inverse(n: int, damp_fraction: float) -> None:
    x = inputs(n)
    hessian = x.T @ x
    kept = hessian.clone()
    factor = factor_hessian(hessian, damp_fraction, where="w")
    assert torch.equal(hessian, kept)

    damped = hessian.double().numpy() + damp_fraction * float(hessian.double().diagonal().mean()) * np.eye(n)
    order = factor.order[0].numpy()
    strengths = hessian.diagonal().numpy()[order]
    assert sorted(order.tolist()) == list(range(n))
    assert (np.diff(strengths) <= 0).all()
    expected = np.linalg.inv(damped[np.ix_(order, order)])
    upper = factor.upper[0].double().numpy()
    assert np.array_equal(upper, np.triu(upper))
    assert (upper.diagonal() > 0).all()
    assert np.allclose(upper.T @ upper, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    importance = np.empty(n)
    for position, column in enumerate(order):
        importance[column] = 1 / upper[position, position] ** 2
    assert np.allclose(factor.importance[0].numpy(), importance, rtol=1e-6)
    assert (factor.raises, factor.damp_fractions) == ((0,), (damp_fraction,))
    assert not factor.dead.any()


def test_equally_strong_columns_keep_their_order() -> None:
    assert factor_hessian(torch.eye(6), 0.01, where="w").order.tolist() == [list(range(6))]


@pytest.mark.parametrize(("damping", "limit"), [(0.01, 4096), (0.0005, 32)])
def test_well_damped_and_large_hessians_are_factored_in_float32(
    damping: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(64)
    hessian = x.T @ x
    monkeypatch.setattr("halfbyte.methods.gptq.ENOUGH_FOR_SINGLE", 1.0)
    exact = factor_hessian(hessian, damping, where="w")
    monkeypatch.undo()
    monkeypatch.setattr("halfbyte.methods.gptq.DOUBLE_LIMIT", limit)
    single = factor_hessian(hessian, damping, where="w")
    assert torch.equal(single.order, exact.order)
    assert not torch.equal(single.upper, exact.upper)
    assert torch.allclose(single.upper, exact.upper, rtol=1e-3, atol=1e-4 * float(exact.upper.abs().max()))


@pytest.mark.parametrize("damp_fraction", [0.0, 0.01])
def test_dead_inputs_get_weight_zero_and_disturb_nothing(damp_fraction: float) -> None:
    x, weight = inputs(64), weights(5, 64)
    x[:, [3, 40]] = 0.0
    hessian = x.T @ x
    factor = factor_hessian(hessian, damp_fraction, where="w")
    assert factor.dead[0].nonzero().flatten().tolist() == [3, 40]
    assert factor.raises == (0,)
    result = quantize_gptq(weight, hessian, factor, INT4, torch.float32)
    assert (result.dense()[:, [3, 40]] == 0).all()

    other = weight.clone()
    other[:, [3, 40]] = 1000.0
    again = quantize_gptq(other, hessian, factor, INT4, torch.float32)
    assert torch.equal(again.codes, result.codes)
    assert torch.equal(again.scales, result.scales)


def test_inputs_that_are_all_dead_are_quantised_to_zero() -> None:
    hessian = torch.zeros(32, 32)
    result = quantize_gptq(
        weights(4, 32),
        hessian,
        factor_hessian(hessian, 0.01, where="w"),
        INT4,
        torch.float32,
    )
    assert (result.dense() == 0).all()
    assert result.relative_error == 0.0


def test_damping_rises_in_recorded_steps_where_none_was_asked_for() -> None:
    hessian = torch.ones(8, 8)  # rank 1
    factor = factor_hessian(hessian, 0.0, where="w")
    assert (factor.raises, factor.damp_fractions) == ((1,), (0.01,))
    assert factor.damping.tolist() == [pytest.approx([0.01] * 8)]
    given = factor_hessian(hessian, 0.01, where="w")
    assert torch.equal(factor.upper, given.upper)
    assert given.raises == (0,)


def test_damping_rises_tenfold_until_the_hessian_can_be_factored() -> None:
    hessian = torch.eye(4)
    hessian[3, 3] = -0.5  # no second moment, but what accumulated rounding can look like, much exaggerated
    mean = (3 - 0.5) / 4
    factor = factor_hessian(hessian, 0.01, where="w")
    assert factor.raises == (2,)
    assert factor.damp_fractions == pytest.approx((1.0,))
    assert factor.damping.tolist() == [pytest.approx([mean] * 4)]


def test_a_hopeless_hessian_is_an_error_that_names_the_linear() -> None:
    hessian = torch.diag(torch.tensor([1.0, -500.0, 1.0, 499.0]))
    with pytest.raises(NumericsError, match=r"^layers\.3\.q: the Hessian cannot be factored even with 100 of its mean"):
        factor_hessian(hessian, 0.01, where="layers.3.q")
    assert 0.01 * 10**MAX_RAISES == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (1, 3)])
def test_a_hessian_that_is_not_finite_is_an_error(value: float, place: tuple[int, int]) -> None:
    hessian = torch.eye(4)
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(NumericsError, match=r"^layers\.3\.q: the Hessian holds NaN or infinity"):
        factor_hessian(hessian, 0.01, where="layers.3.q")


def test_a_hessian_whose_sum_alone_overflows_is_factored() -> None:
    hessian = torch.full((64, 64), 2e37) + 2e37 * torch.eye(64)
    assert not torch.isfinite(hessian.sum())
    factors = factor_hessian(hessian, 0.01, where="layers.3.q")
    small = factor_hessian(hessian * 2.0**-100, 0.01, where="layers.3.q")
    assert torch.allclose(factors.upper * 2.0**50, small.upper, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_reported_error_is_the_outputs_energy(
    symmetric: bool, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> None:
    fmt = WeightFormat(num_bits=bits, symmetric=symmetric, group_size=group_size)
    x, weight = inputs(96), weights(11, 96)
    hessian = x.T @ x
    factor = factor_hessian(hessian, 0.01, where="w")
    kept = weight.clone()
    result = quantize_gptq(weight, hessian, factor, fmt, scale_dtype, COLUMNS)
    assert torch.equal(weight, kept)
    assert result.scales.dtype == scale_dtype
    assert result.codes.dtype == torch.int8
    assert (result.zero_points is None) == symmetric
    scales, zeros = searched(weight, factor.importance[0], fmt, scale_dtype)
    assert torch.equal(result.scales.float(), scales)
    if result.zero_points is not None:
        assert torch.equal(result.zero_points.float(), zeros)

    error = x.double() @ (result.dense().double() - weight.double()).T
    energy = x.double() @ weight.double().T
    expected = float(error.square().sum() / energy.square().sum())
    assert result.relative_error == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_leave_rounding_to_nearest(symmetric: bool) -> None:
    fmt = WeightFormat(num_bits=4, symmetric=symmetric, group_size=32)
    weight = weights(40, 128)
    factor = factor_hessian(torch.eye(128), 0.0, where="w")
    result = quantize_gptq(weight, torch.eye(128), factor, fmt, torch.bfloat16, COLUMNS)
    scales, zeros = searched(weight, torch.ones(128), fmt, torch.bfloat16)
    assert torch.equal(result.scales.float(), scales)
    assert torch.equal(result.codes, nearest(weight, scales, zeros, fmt))
    difference = (result.dense() - weight).double().square().sum() / weight.double().square().sum()
    assert result.relative_error == pytest.approx(float(difference), rel=1e-5)


def solve_by_first_principles(weight: Array, hessian: Array, scale: float) -> npt.NDArray[np.int64]:
    """Round columns in order; after each, move the open ones to the minimum of ``e H e^T`` by solving for it."""
    w, n = weight.copy(), len(weight)
    codes = np.zeros(n, dtype=np.int64)
    for j in range(n):
        codes[j] = np.clip(np.rint(w[j] / scale), -8, 7)
        fixed = codes[: j + 1] * scale - weight[: j + 1]
        if j + 1 < n:
            coupling = hessian[j + 1 :, : j + 1] @ fixed
            w[j + 1 :] = weight[j + 1 :] - np.linalg.solve(hessian[j + 1 :, j + 1 :], coupling)
    return codes


@pytest.mark.parametrize("n", [2, 3, 5])
def test_codes_are_those_of_the_closed_form_optimum(n: int) -> None:
    """Each open weight sits where the output's error is least, given all rounded so far: solved directly, not by R."""
    fmt = WeightFormat(num_bits=4)
    different_from_rtn = 0
    for seed in range(40):
        x, weight = inputs(n, tokens=4 * n, seed=seed), weights(3, n, seed=seed + 1000)
        hessian = x.T @ x
        factor = factor_hessian(hessian, 0.0, where="w")
        result = quantize_gptq(weight, hessian, factor, fmt, torch.float32, COLUMNS)
        order = factor.order[0].numpy()
        h = hessian.double().numpy()[np.ix_(order, order)]
        for row in range(3):
            expected = solve_by_first_principles(weight[row].double().numpy()[order], h, float(result.scales[row, 0]))
            assert result.codes[row].numpy()[order].tolist() == expected.tolist()
        plain = nearest(weight, result.scales, torch.zeros_like(result.scales), fmt)
        different_from_rtn += int((plain != result.codes).any())
    assert different_from_rtn > 5  # or the oracle would have checked nothing but rounding


def test_rtn_error_is_the_share_of_the_weights_energy() -> None:
    weight = weights(6, 64)
    result = quantize_rtn(weight, INT4, torch.bfloat16)
    expected = (result.dense() - weight).double().square().sum() / weight.double().square().sum()
    assert result.relative_error == pytest.approx(float(expected), rel=1e-6)
    assert quantize_rtn(torch.zeros(4, 64), INT4, torch.bfloat16).relative_error == 0.0


@pytest.mark.parametrize("n", [1, 5, 256, 257, 700])
def test_factor_and_inverse_in_place(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2 * n + 1, n, dtype=torch.float64, generator=generator)
    a = x.T @ x / n + torch.eye(n, dtype=torch.float64)
    # The lower triangle is not read, and what cannot be factored disturbs no other.
    upper = torch.stack([a, -a]).triu() + torch.tril(torch.full_like(a, torch.nan), -1)
    assert factor_upper(upper).tolist() == [True, False]
    upper = upper[:1]
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper[0] @ upper[0].T, a, rtol=0, atol=1e-10)
    inverse = upper.clone()
    invert_upper(inverse)
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(inverse[0] @ upper[0], torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", [0, 300, 699])
def test_a_matrix_that_is_not_positive_definite_is_not_factored(place: int) -> None:
    a = torch.eye(700, dtype=torch.float64).repeat(3, 1, 1)
    a[1, place, place] = -1.0
    assert factor_upper(a).tolist() == [True, False, True]


def test_columns_in_file_order() -> None:
    x = inputs(40)
    hessian = x.T @ x
    factor = factor_hessian(hessian, 0.01, where="w", static_order=False)
    assert factor.order.tolist() == [list(range(40))]
    damped = hessian.double() + factor.damping[0].diag()
    upper = factor.upper[0].double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(40).double(), rtol=0, atol=1e-3)


def test_scales_from_the_range() -> None:
    x, weight = inputs(64), weights(8, 64)
    hessian = x.T @ x
    steps = GptqSteps(scale_search=False, scale_refit=False, code_descent=False)
    result = quantize_gptq(weight, hessian, factor_hessian(hessian, 0.01, where="w"), INT4, torch.bfloat16, steps)
    assert torch.equal(result.scales.float(), minmax(weight, INT4, torch.bfloat16)[0])


@pytest.mark.parametrize("damp_fraction", [0.0, 0.01])
@pytest.mark.parametrize("group_size", [None, 32])
def test_shrinkage_is_a_share_of_the_own_diagonal(damp_fraction: float, group_size: int | None) -> None:
    """It is as if H had that diagonal, but the reported error is that of the H that was seen."""
    x, weight = inputs(160, tokens=40), weights(8, 160)
    x[:, 7] = 0.0
    hessian, fmt = x.T @ x, WeightFormat(num_bits=4, group_size=group_size)
    factor = factor_hessian(hessian, damp_fraction, where="w", shrinkage=0.5)
    plain = damp_fraction * float(hessian.diagonal().double().mean())
    assert torch.allclose(factor.damping[0], plain + 0.5 * hessian.diagonal(), rtol=1e-6)
    loaded = hessian + 0.5 * hessian.diagonal().diag()
    same = factor_hessian(loaded, damp_fraction / 1.5, where="w")
    assert torch.equal(factor.order, same.order)
    assert torch.equal(factor.dead, same.dead)
    live = ~factor.dead[0][factor.order[0]]  # a dead input's pivot is the mean diagonal, which differs
    torch.testing.assert_close(factor.upper[0][live][:, live], same.upper[0][live][:, live], rtol=1e-3, atol=1e-6)
    result = quantize_gptq(weight, hessian, factor, fmt, torch.bfloat16)
    assert float((result.codes == quantize_gptq(weight, loaded, same, fmt, torch.bfloat16).codes).float().mean()) > 0.99
    error, energy = x @ (result.dense() - weight).T, x @ weight.T
    assert result.relative_error == pytest.approx(float(error.square().sum() / energy.square().sum()), rel=1e-3)
