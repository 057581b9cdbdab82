"""Recovery of the int4 grid: against a slow twin in exact fractions, and on grids that are known."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.conversion.lattice import GROUP, Lattice, OffGrid, recover

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction | None:
    """The nearest number of a dtype, ties to even, in whole numbers; ``None`` outside of its normal range."""
    bits, low, high = {BF16: (8, -126, 128), F16: (11, -14, 16), F32: (24, -126, 128)}[dtype]
    exponent = 0
    while value >= 2 ** (exponent + 1):
        exponent += 1
    while value < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - bits + 1)
    found = round(value / step) * step  # Python rounds fractions half to even
    return found if Fraction(2) ** low <= found < Fraction(2) ** high else None


def twin(values: list[Fraction], dtype: torch.dtype) -> tuple[list[int], Fraction] | None:
    """The same definition, slowly: every choice of code for the largest, every precision of scale, exact fractions."""
    largest = max(abs(v) for v in values)
    if not largest:
        return [0] * len(values), Fraction(1)
    bits = 8 if dtype == BF16 else 24
    best: tuple[int, list[int], Fraction] | None = None
    for a in range(1, 9):
        codes = [round(v * a / largest) for v in values]
        if max(codes) > 7 or min(codes) < -8:
            continue
        low, high = Fraction(0), None
        for v, q in zip(values, codes, strict=True):
            if (q == 0) != (v == 0) or q * v < 0:
                break
            if q:
                exponent = 0
                while abs(v) >= Fraction(2) ** (exponent + 1):
                    exponent += 1
                while abs(v) < Fraction(2) ** exponent:
                    exponent -= 1
                half = Fraction(2) ** (exponent - bits)
                below = half / 2 if abs(v) == Fraction(2) ** exponent else half
                low = max(low, (abs(v) - below) / abs(q))
                top = (abs(v) + half) / abs(q)
                high = top if high is None else min(high, top)
        else:
            assert high is not None
            if low > high:
                continue
            for need, precision in enumerate((BF16, F16, F32)):
                scale = rounded((low + high) / 2, precision)
                if scale is None or (best is not None and need >= best[0]):
                    continue

                def product(q: int, scale: Fraction = scale) -> Fraction:
                    first = rounded(abs(q) * scale, F32)
                    assert first is not None
                    last = rounded(first, dtype)
                    assert last is not None
                    return last if q > 0 else -last

                if all(v == (product(q) if q else 0) for v, q in zip(values, codes, strict=True)):
                    best = (need, codes, scale)
    return None if best is None else best[1:]


def on_grid(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    grouped = codes.to(F32).unflatten(1, (-1, GROUP)) * scales.to(F32).unsqueeze(-1)
    return grouped.flatten(1).to(dtype)


def exact(found: Lattice, weight: torch.Tensor) -> bool:
    assert found.codes is not None
    assert set(found.codes.flatten().tolist()) <= set(range(-8, 8))
    assert bool((found.scales > 0).all())
    return torch.equal(on_grid(found.codes, found.scales, weight.dtype), weight)


@pytest.mark.parametrize("stored", [BF16, F32])
@pytest.mark.parametrize("of_scales", [BF16, F16, F32])
def test_a_grid_is_recovered_without_error(stored: torch.dtype, of_scales: torch.dtype) -> None:
    torch.manual_seed(3)
    codes = torch.randint(-8, 8, (700, 5 * GROUP), dtype=torch.int8)  # more rows than are upcast at a time, and odd
    scales = (torch.rand(700, 5) * 0.02 + 1e-4).to(of_scales)
    weight = on_grid(codes, scales, stored)
    found = recover(weight)
    assert isinstance(found, Lattice)
    assert exact(found, weight)
    if not (stored == BF16 and of_scales != BF16):  # rounding to bfloat16 leaves several scales to choose from
        assert found.scale_dtype == {BF16: "BF16", F16: "F16", F32: "F32"}[of_scales]
    both = recover(weight, with_codes=False)
    assert isinstance(both, Lattice)
    assert both.codes is None
    assert torch.equal(both.scales, found.scales)


def test_codes_are_the_ones_the_weight_was_made_of_where_these_have_no_common_factor() -> None:
    torch.manual_seed(4)
    codes = torch.randint(-7, 8, (64, 4 * GROUP), dtype=torch.int8)
    codes[:, ::GROUP], codes[:, 1::GROUP] = 3, 7
    scales = (torch.rand(64, 4) + 0.5).to(BF16)
    for stored in (BF16, F32):
        found = recover(on_grid(codes, scales, stored))
        assert isinstance(found, Lattice)
        assert found.codes is not None
        assert torch.equal(found.codes, codes)
        if stored == F32:
            assert torch.equal(found.scales, scales.to(F32))


codes_of_a_group = st.lists(st.integers(-8, 7), min_size=GROUP, max_size=GROUP)
few_codes = st.lists(st.sampled_from([-8, -7, -6, -3, 0, 3, 6, 7]), min_size=GROUP, max_size=GROUP)


@settings(max_examples=60, deadline=None)
@given(
    codes=st.one_of(codes_of_a_group, few_codes),
    mantissa=st.integers(1 << 23, (1 << 24) - 1),
    exponent=st.integers(-60, 20),
    of_scales=st.sampled_from([BF16, F16, F32]),
    stored=st.sampled_from([BF16, F32]),
)
def test_the_slow_twin_finds_the_same(
    codes: list[int], mantissa: int, exponent: int, of_scales: torch.dtype, stored: torch.dtype
) -> None:
    scale = torch.tensor([[float(Fraction(mantissa) * Fraction(2) ** (exponent - 23))]], dtype=F32).to(of_scales)
    if not torch.isfinite(scale).all() or (of_scales == F16 and float(scale) < 2**-14):
        return
    weight = on_grid(torch.tensor([codes], dtype=torch.int8), scale, stored)
    found = recover(weight)
    slow = twin([Fraction(float(v)) for v in weight[0].to(F32)], stored)
    assert isinstance(found, Lattice)
    assert exact(found, weight)
    assert slow is not None
    assert found.codes is not None
    assert found.codes[0].tolist() == slow[0]
    assert Fraction(float(found.scales)) == slow[1]


@settings(max_examples=40, deadline=None)
@given(
    codes=codes_of_a_group,
    place=st.integers(0, GROUP - 1),
    step=st.sampled_from([-3, -1, 1, 2]),
    stored=st.sampled_from([BF16, F32]),
)
def test_a_value_moved_off_the_grid_is_found_by_both(
    codes: list[int], place: int, step: int, stored: torch.dtype
) -> None:
    """Moved by some last places of its dtype. It can still be on some grid, where few codes are not zero."""
    weight = on_grid(torch.tensor([codes], dtype=torch.int8), torch.tensor([[0.0123]], dtype=BF16), stored)
    bits = weight.view(torch.int16 if stored == BF16 else torch.int32)
    if codes[place] == 0:
        return
    bits[0, place] += step
    found = recover(weight)
    slow = twin([Fraction(float(v)) for v in weight[0].to(F32)], stored)
    assert isinstance(found, OffGrid) == (slow is None)
    if isinstance(found, Lattice):
        assert exact(found, weight)
        assert slow is not None
        assert found.codes is not None
        assert found.codes[0].tolist() == slow[0]


def test_what_lies_beside_a_grid_is_taken_with_slack_alone() -> None:
    torch.manual_seed(9)
    codes = torch.randint(-8, 8, (50, 4 * GROUP), dtype=torch.int8)
    scales = torch.rand(50, 4) * 0.02 + 1e-4
    straight = on_grid(codes, scales, F32)
    before = straight + torch.randn_like(straight) * 1e-3
    weight = before + (straight - before)  # as straight-through estimators compute it
    assert not torch.equal(weight, straight)
    assert isinstance(recover(weight), OffGrid)
    found = recover(weight, slack=2.0**-20)
    assert isinstance(found, Lattice)
    assert found.codes is not None
    plain = found.codes.unflatten(1, (-1, GROUP)).abs().amax(-1) == codes.unflatten(1, (-1, GROUP)).abs().amax(-1)
    assert plain.float().mean() > 0.9
    assert torch.equal(found.codes.unflatten(1, (-1, GROUP))[plain], codes.unflatten(1, (-1, GROUP))[plain])
    room = weight.unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True) * 2.0**-20
    assert bool(((on_grid(found.codes, found.scales, F32) - weight).unflatten(1, (-1, GROUP)).abs() <= room).all())
    assert isinstance(recover(torch.randn(8, GROUP), slack=2.0**-20), OffGrid)


def test_random_weights_are_on_no_grid() -> None:
    torch.manual_seed(5)
    for stored in (BF16, F32):
        found = recover(torch.randn(40, 3 * GROUP).to(stored))
        assert isinstance(found, OffGrid)
        assert found.groups == found.of == 120
        assert (found.row, found.column) == (0, 0)


def test_nine_levels_to_a_side_are_too_many() -> None:
    codes = torch.zeros(1, GROUP)
    codes[0, :3] = torch.tensor([9.0, -9.0, 1.0])
    assert isinstance(recover(codes * 0.5), OffGrid)
    codes[0, :3] = torch.tensor([8.0, -8.0, 1.0])  # +8 is no code either
    assert isinstance(recover(codes * 0.5), OffGrid)
    codes[0, 0] = 7.0
    assert isinstance(recover(codes * 0.5), Lattice)


def test_groups_of_zeros_get_a_scale_of_one() -> None:
    weight = torch.zeros(2, 2 * GROUP)
    weight[1, GROUP] = -0.25
    found = recover(weight)
    assert isinstance(found, Lattice)
    assert found.zero_groups == 3
    assert found.scales.tolist() == [[1.0, 1.0], [1.0, 0.25]]
    assert exact(found, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_told_apart(value: float) -> None:
    weight = torch.zeros(3, 2 * GROUP)
    weight[2, GROUP + 5] = value
    found = recover(weight)
    assert isinstance(found, OffGrid)
    assert not found.finite
    assert (found.row, found.column, found.groups, found.of) == (2, GROUP, 1, 6)


def test_transposed_weights_need_no_copy_of_their_own() -> None:
    torch.manual_seed(6)
    codes = torch.randint(-8, 8, (90, 3 * GROUP), dtype=torch.int8)
    weight = on_grid(codes, (torch.rand(90, 3) + 0.1).to(BF16), F32)
    straight, turned = recover(weight), recover(weight.T.contiguous().T)
    assert isinstance(straight, Lattice)
    assert isinstance(turned, Lattice)
    assert straight.codes is not None
    assert turned.codes is not None
    assert torch.equal(straight.codes, turned.codes)
    assert np.array_equal(straight.scales.numpy(), turned.scales.numpy())
