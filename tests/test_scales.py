"""Scales by range against compressed-tensors, and searched scales against trying every share."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

from halfbyte.methods.rtn import nearest, quantize_rtn
from halfbyte.methods.scales import SHRINK, minmax, searched, shares
from halfbyte.packing import FLOAT8_MAX
from halfbyte.schemes import WeightFormat

FORMATS = {
    "int2": WeightFormat(num_bits=2, group_size=32),
    "int3": WeightFormat(num_bits=3, group_size=32),
    "int3-channel": WeightFormat(num_bits=3),
    "int4": WeightFormat(num_bits=4, group_size=32),
    "int4-asymmetric": WeightFormat(num_bits=4, symmetric=False, group_size=32),
    "int4-channel": WeightFormat(num_bits=4),
    "int8": WeightFormat(num_bits=8, group_size=32),
    "int8-asymmetric": WeightFormat(num_bits=8, symmetric=False, group_size=32),
    "int8-channel": WeightFormat(num_bits=8),
    "fp8": WeightFormat(num_bits=8, kind="float"),
}
BLOCK = WeightFormat(num_bits=8, kind="float", block=(10, 32))
INTEGERS = [f for f in FORMATS.values() if f.kind == "int"]
INTEGER_NAMES = [n for n, f in FORMATS.items() if f.kind == "int"]


def weight(rows: int = 24, n: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=generator) * torch.rand(rows, 1, generator=generator)


def library(fmt: WeightFormat, scale_dtype: torch.dtype | None = None) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=fmt.num_bits,
        type=fmt.kind,
        symmetric=fmt.symmetric,
        strategy=fmt.strategy,
        group_size=fmt.group_size,
        scale_dtype=scale_dtype,
    )


def library_scales(w: torch.Tensor, fmt: WeightFormat, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = w.reshape(w.shape[0], fmt.groups(w.shape[1]), -1)
    scales, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    return scales.float(), zeros.float()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_range_scales_and_codes_equal_the_librarys(fmt: WeightFormat) -> None:
    w, args = weight(), library(fmt)
    scales, zeros = minmax(w, fmt, torch.float32)
    expected_scales, expected_zeros = library_scales(w, fmt, args)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(zeros, expected_zeros)
    codes = nearest(w, scales, zeros, fmt)
    expected = library_quantize(w, scales, zeros, args)
    assert torch.equal(codes.float(), expected.float())
    assert codes.float().unique().numel() > min(10, 2**fmt.num_bits - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_blocks_equal_the_librarys(dtype: torch.dtype) -> None:
    """24 rows in blocks of 10: the last block has 4, and its scale is theirs alone."""
    w = weight()
    args = QuantizationArgs(
        num_bits=8,
        type="float",
        strategy="block",
        block_structure=[10, 32],
        scale_dtype=None if dtype == torch.float32 else dtype,
    )
    padded = maybe_pad_tensor_for_block_quant(w, (10, 32)).reshape(3, 10, 3, 32).transpose(1, 2).flatten(-2)
    expected, _ = calculate_qparams(padded.amin(-1), padded.amax(-1), args)
    scales, zeros = minmax(w, BLOCK, dtype)
    assert scales.shape == (24, 3)
    assert (zeros == 0).all()
    assert torch.equal(scales[::10], expected.float())
    assert torch.equal(scales, scales[torch.arange(24) // 10 * 10])
    codes = quantize_rtn(w, BLOCK, dtype).codes
    assert torch.equal(codes.float(), library_quantize(w, expected.float(), None, args).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_rounded_scales_equal_the_librarys(fmt: WeightFormat, dtype: torch.dtype) -> None:
    w, args = weight(seed=1), library(fmt, dtype)
    scales, zeros = minmax(w, fmt, dtype)
    expected_scales, expected_zeros = library_scales(w, fmt, args)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(scales, scales.to(dtype).float())
    if fmt.symmetric:
        assert torch.equal(zeros, expected_zeros)
    else:
        # The library chooses the zero point before it rounds the scale; we choose it for the scale that is stored.
        grouped = w.reshape(w.shape[0], fmt.groups(w.shape[1]), -1)
        assert torch.equal(zeros, (fmt.q_min - torch.round(grouped.amin(-1) / scales)).clamp(fmt.q_min, fmt.q_max))
        assert (zeros - expected_zeros).abs().max() <= 1
    codes = quantize_rtn(w, fmt, dtype).codes
    assert torch.equal(codes.float(), library_quantize(w, scales, zeros, args).float())


def test_bfloat16_weights_are_rounded_in_float32() -> None:
    stored = weight(64, 256, seed=2).to(torch.bfloat16)
    fmt = FORMATS["int4"]
    result = quantize_rtn(stored.float(), fmt, torch.bfloat16)
    exact = torch.round(stored.double().reshape(64, -1, 32) / result.scales.double().unsqueeze(-1)).clamp(-8, 7)
    narrow = torch.round(stored.reshape(64, -1, 32) / result.scales.unsqueeze(-1)).clamp(-8, 7)
    assert torch.equal(result.codes.double(), exact.reshape(64, 256))
    assert not torch.equal(result.codes.double(), narrow.double().reshape(64, 256))


def test_int4_grid_in_full() -> None:
    """The range -8 .. 7 takes part in 15 steps, so its middle, 7.5, stands for the extreme."""
    w = torch.arange(-8, 8, dtype=torch.float32).repeat(2).reshape(1, 32)
    scales, zeros = minmax(w, FORMATS["int4"], torch.float32)
    assert scales.item() == pytest.approx(8 / 7.5)
    assert zeros.item() == 0
    scales, zeros = minmax(w, FORMATS["int4-asymmetric"], torch.float32)
    assert (scales.item(), zeros.item()) == (1.0, 0.0)
    assert torch.equal(nearest(w, scales, zeros, FORMATS["int4-asymmetric"]).float(), w)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_of_one_sign_still_holds_zero(sign: float) -> None:
    w = sign * torch.linspace(5.0, 6.0, 32).reshape(1, 32)
    result = quantize_rtn(w, FORMATS["int4-asymmetric"], torch.float32)
    assert result.zero_points is not None
    assert result.zero_points.item() == (-8 if sign > 0 else 7)
    assert result.scales.item() == pytest.approx(6.0 / 15)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zeros_stay_zeros(fmt: WeightFormat, dtype: torch.dtype) -> None:
    w = weight(4, 64)
    w[1] = 0.0
    w[2, :32] = 0.0
    result = quantize_rtn(w, fmt, dtype)
    assert (result.dense()[1] == 0).all()
    assert (result.dense()[2, :32] == 0).all()
    assert (result.scales[1] == 1).all()
    assert (result.scales > 0).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-7, 1e-4, 1.0, 6e4, 1e30])
def test_scales_of_tiny_and_huge_weights_are_usable(fmt: WeightFormat, dtype: torch.dtype, size: float) -> None:
    limit = torch.finfo(dtype).max
    w = (weight(4, 64) * size).clamp(-limit, limit).to(dtype).float()
    choices = [minmax(w, fmt, dtype)]
    if fmt.kind == "int":
        choices.append(searched(w, torch.ones(64), fmt, dtype))
    for scales, zeros in choices:
        assert (scales > 0).all()
        assert torch.isfinite(scales).all()
        assert torch.equal(scales, scales.to(dtype).float())
        assert (zeros >= fmt.q_min).all()
        assert (zeros <= fmt.q_max).all()
        if fmt.kind == "int":
            codes = nearest(w, scales, zeros, fmt)
            assert torch.isfinite(
                (codes.float().reshape(4, scales.shape[1], -1) - zeros[..., None]) * scales[..., None]
            ).all()


@pytest.mark.parametrize("fmt", INTEGERS, ids=INTEGER_NAMES)
def test_small_float16_groups_keep_their_precision(fmt: WeightFormat) -> None:
    """Scales below float16's least normal number are stored as subnormal ones, not raised to it."""
    w = (weight(8, 64) * 3e-4).half().float()
    scales, zeros = minmax(w, fmt, torch.float16)
    step = (nearest(w, scales, zeros, fmt).float().reshape(8, scales.shape[1], -1) - zeros[..., None]) * scales[
        ..., None
    ]
    worst = (step.reshape(8, 64) - w).abs().reshape(8, scales.shape[1], -1).amax(-1)
    assert (worst <= 0.55 * scales + 2.0**-24 * 2**fmt.num_bits).all()
    grouped = w.reshape(8, scales.shape[1], -1)
    spread = (
        grouped.abs().amax(-1) * 2 if fmt.symmetric else grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    )
    assert ((scales - spread / (fmt.q_max - fmt.q_min)).abs() <= 2.0**-24 + scales * 2.0**-11).all()


@pytest.mark.parametrize("fmt", INTEGERS, ids=INTEGER_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_searched_scales_are_the_best_of_all_shares(fmt: WeightFormat, dtype: torch.dtype) -> None:
    w = weight(6, 96, seed=3)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(4)) + 0.01
    scales, zeros = searched(w, importance, fmt, dtype)
    assert torch.equal(scales, scales.to(dtype).float())
    groups = scales.shape[1]
    wide, h = w.double().reshape(6, groups, -1), importance.double().reshape(1, groups, -1)

    def error(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        s, z = s.double().unsqueeze(-1), z.double().unsqueeze(-1)
        codes = (torch.round(wide / s) + z).clamp(fmt.q_min, fmt.q_max)
        result: torch.Tensor = (h * (wide - (codes - z) * s) ** 2).sum(-1)
        return result

    least = torch.full((6, groups), float("inf"), dtype=torch.float64)
    for share in shares(fmt).tolist():
        # A share of the range is the range of weights multiplied by it.
        s, z = minmax(w * torch.tensor(share), fmt, dtype)
        least = torch.minimum(least, error(s, z))
    assert torch.allclose(error(scales, zeros), least, rtol=1e-5)
    assert (least < error(*minmax(w, fmt, dtype))).any()


def test_search_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance, fmt = weight(23, 64), torch.ones(64), FORMATS["int4"]
    whole = searched(w, importance, fmt, torch.bfloat16)
    monkeypatch.setattr("halfbyte.methods.scales.CANDIDATES_PER_CALL", 5 * 2 * len(SHRINK))
    parts = searched(w, importance, fmt, torch.bfloat16)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_search_obeys_the_importance() -> None:
    """All the importance on small weights: the outlier is clipped."""
    w = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([1.8])]).reshape(1, 32)
    importance = torch.ones(32)
    importance[-1] = 1e-6
    clipped, _ = searched(w, importance, FORMATS["int4"], torch.float32)
    importance[-1] = 1e6
    kept, _ = searched(w, importance, FORMATS["int4"], torch.float32)
    assert clipped.item() * 7 < 1.3
    assert min(abs(kept.item() * q - 1.8) for q in range(8)) < 0.05  # 0.12 off where nothing is clipped


def test_fp8_scales_reach_the_largest_number() -> None:
    w = weight(8, 64)
    result = quantize_rtn(w, FORMATS["fp8"], torch.float32)
    assert result.codes.dtype == torch.float8_e4m3fn
    assert (result.codes.float().abs().amax(-1) == FLOAT8_MAX).all()
    assert result.zero_points is None
