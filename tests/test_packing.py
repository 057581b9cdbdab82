"""Stored tensors: announced and made alike, the bytes of FORMATS section 1, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint.reader import DTYPE_NAMES, bytes_of
from halfbyte.packing import dequantize, pack, stored_tensors, unpack
from halfbyte.schemes import PRESETS, Scheme

SCHEMES: list[Scheme] = [
    *PRESETS.values(),
    PRESETS["W4A16"].with_group_size(32),
    PRESETS["W4A16"].with_group_size("channel"),
    PRESETS["W4A16_ASYM"].with_group_size(64),
    PRESETS["W8A16"].with_group_size("channel"),
    PRESETS["W3A16"].with_group_size("channel"),
    PRESETS["W2A16"].with_group_size(32),
]
IDS = [f"{s.name}-{s.weights.group_size}" for s in SCHEMES]


def made(
    scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random codes over the whole range, scales and zero points of one Linear."""
    generator = torch.Generator().manual_seed(seed)
    w = scheme.weights
    groups = w.groups(columns)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5).to(dtype)
    if w.block is not None:
        scales = scales[torch.arange(rows) // w.block[0]]
    if w.kind == "float":
        return torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn), scales, None
    codes = torch.randint(w.q_min, w.q_max + 1, (rows, columns), generator=generator, dtype=torch.int8)
    zeros = None
    if not w.symmetric:
        zeros = torch.randint(w.q_min, w.q_max + 1, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, scales, zeros


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(bytes_of(a)) == bytes(bytes_of(b))


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (24, 384), (16, 256), (264, 256)])
def test_announced_tensors_are_those_that_are_made(scheme: Scheme, dtype: torch.dtype, rows: int, columns: int) -> None:
    tensors = pack(scheme, *made(scheme, rows, columns, dtype))
    found = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    announced = stored_tensors(scheme, (rows, columns), DTYPE_NAMES[dtype])
    assert found == announced
    assert list(found) == list(announced)
    assert all(t.is_contiguous() for t in tensors.values())


@settings(max_examples=60)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing(scheme: Scheme, rows: int, groups: int, seed: int) -> None:
    rows *= 8  # zero points are packed by eights along the rows
    columns = groups * (scheme.weights.block or (0, scheme.weights.group_size or 8))[1]
    codes, scales, zeros = made(scheme, rows, columns, torch.bfloat16, seed)
    again = unpack(scheme.weights, pack(scheme, codes, scales, zeros))
    assert same(again[0], codes)
    assert same(again[1], scales)
    if zeros is None:
        assert again[2] is None
    else:
        assert again[2] is not None
        assert same(again[2], zeros)


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 7),
    columns=st.integers(1, 41),
    seed=st.integers(0, 2**31),
)
def test_rows_of_any_length_with_one_scale_each(bits: int, rows: int, columns: int, seed: int) -> None:
    scheme = PRESETS[f"W{bits}A16"].with_group_size("channel")
    codes, scales, zeros = made(scheme, rows, columns, torch.float32, seed)
    tensors = pack(scheme, codes, scales, zeros)
    assert {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()} == stored_tensors(
        scheme, (rows, columns), "F32"
    )
    assert same(unpack(scheme.weights, tensors)[0], codes)


def test_int4_bytes() -> None:
    """FORMATS: the row -8..7 packs to 0x76543210, 0xfedcba98; low nibble first, so bytes 10 32 54 76 98 ba dc fe."""
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16)
    scheme = PRESETS["W4A16"].with_group_size("channel")
    tensors = pack(scheme, codes, torch.tensor([[0.5]], dtype=torch.bfloat16), None)
    assert bytes(bytes_of(tensors["weight_packed"])).hex(" ") == "10 32 54 76 98 ba dc fe"
    assert bytes(bytes_of(tensors["weight_scale"])).hex(" ") == "00 3f"
    assert bytes(bytes_of(tensors["weight_shape"])).hex(" ") == "01 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00"


def test_int3_bytes() -> None:
    """Three bits a code, lowest first, without gaps: -4 .. 3 are 0 .. 7, in octal 76543210."""
    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(4).reshape(1, 32)
    packed = pack(PRESETS["W3A16"].with_group_size(32), codes, torch.ones(1, 1), None)["weight_packed"]
    assert packed.shape == (1, 3)
    assert bytes(bytes_of(packed)) == 4 * 0o76543210.to_bytes(3, "little")


def test_int2_bytes() -> None:
    codes = torch.tensor([-2, -1, 0, 1], dtype=torch.int8).repeat(8).reshape(1, 32)
    packed = pack(PRESETS["W2A16"].with_group_size(32), codes, torch.ones(1, 1), None)["weight_packed"]
    assert packed.shape == (1, 2)
    assert bytes(bytes_of(packed)) == 8 * bytes([0b11100100])


def test_blocks_store_one_scale_each() -> None:
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    codes = torch.zeros(130, 256).to(torch.float8_e4m3fn)
    tensors = pack(PRESETS["FP8_BLOCK"], codes, scales[torch.arange(130) // 128], None)
    assert torch.equal(tensors["weight_scale"], scales)
    assert tensors["weight"].dtype == torch.float8_e4m3fn


def test_int8_bytes() -> None:
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    packed = pack(PRESETS["W8A16"].with_group_size("channel"), codes, torch.ones(1, 1), None)["weight_packed"]
    assert bytes(bytes_of(packed)).hex(" ") == "00 7f 80 ff"
    plain = pack(PRESETS["W8A8"], codes, torch.ones(1, 1), None)["weight"]
    assert bytes(bytes_of(plain)).hex(" ") == "80 ff 00 7f"


def test_zero_points_are_packed_down_the_rows() -> None:
    scheme = PRESETS["W4A16_ASYM"].with_group_size(32)
    zeros = torch.stack([torch.arange(-8, 0), torch.arange(0, 8)], dim=1).to(torch.int8)  # [8 rows, 2 groups]
    tensors = pack(scheme, torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2), zeros)
    assert tensors["weight_zero_point"].shape == (1, 2)
    assert bytes(bytes_of(tensors["weight_zero_point"])).hex(" ") == "10 32 54 76 98 ba dc fe"


def test_a_short_row_is_padded_to_whole_words() -> None:
    scheme = PRESETS["W4A16"].with_group_size("channel")
    tensors = pack(scheme, torch.tensor([[7, -8, 1]], dtype=torch.int8), torch.ones(1, 1), None)
    assert tensors["weight_packed"].shape == (1, 1)
    assert tensors["weight_packed"].item() & 0xFFF == 0x90F
    assert unpack(scheme.weights, tensors)[0].tolist() == [[7, -8, 1]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_dequantised_one_weight_at_a_time(scheme: Scheme) -> None:
    codes, scales, zeros = made(scheme, 8, 128, torch.bfloat16)
    dense = dequantize(codes, scales, zeros)
    width = 128 // scales.shape[1]
    assert dense.dtype == torch.float32
    for i in range(8):
        for k in range(0, 128, 7):
            z = 0.0 if zeros is None else float(zeros[i, k // width])
            assert dense[i, k].item() == (float(codes[i, k]) - z) * float(scales[i, k // width])
