"""The reference decoder against literal bytes, and against the compressed-tensors library."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from attacks.checkpoints import build
from halfbyte.errors import CheckpointError
from halfbyte.reference import E4M3, StoredTensor, decode, decode_rows, read_header, to_float32, unpack
from halfbyte.schemes import PRESETS, WeightFormat


def write(path: Path, entries: dict[str, tuple[str, list[int], bytes]]) -> dict[str, StoredTensor]:
    """A safetensors file from raw bytes, and its parsed tensors by name."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    parsed = read_header(path)
    assert parsed.problems == []
    return {t.name: t for t in parsed.tensors}


def test_words_hold_the_low_nibble_first() -> None:
    words = np.array([[0x76543210, 0xFEDCBA98]], dtype=np.uint32)
    assert unpack(words, 4, 16).tolist() == [list(range(-8, 8))]
    assert unpack(words, 4, 13).tolist() == [list(range(-8, 5))]


def test_two_bits_to_a_code() -> None:
    words = np.array([[0xE4E4E4E4, 0x0000001B]], dtype=np.uint32)
    assert unpack(words, 2, 20).tolist() == [[-2, -1, 0, 1] * 4 + [1, 0, -1, -2]]


def test_three_bits_to_a_code_across_words() -> None:
    """0 .. 7 over and over, in octal 76543210: codes 10 and 21 begin in one word and end in the next."""
    row = int("76543210" * 4, 8)
    words = np.array([[row & 0xFFFFFFFF, row >> 32 & 0xFFFFFFFF, row >> 64]], dtype=np.uint32)
    assert unpack(words, 3, 32).tolist() == [list(range(-4, 4)) * 4]
    assert unpack(words[:, :2], 3, 21).tolist() == [(list(range(-4, 4)) * 3)[:21]]


def test_words_hold_the_low_byte_first() -> None:
    words = np.array([[0x817F00FF]], dtype=np.uint32)
    assert unpack(words, 8, 4).tolist() == [[127, -128, -1, 1]]


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [32, 40, 13])
def test_unpacks_what_the_library_packs(num_bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    low = -(2 ** (num_bits - 1))
    codes = torch.randint(low, -low, (5, columns), generator=generator, dtype=torch.int8)
    packed = pack_to_int32(codes, num_bits).numpy()
    assert np.array_equal(unpack(packed, num_bits, columns), codes.numpy())


def test_symmetric_groups_from_literal_bytes(tmp_path: Path) -> None:
    codes = struct.pack("<8I", *[0x76543210, 0xFEDCBA98] * 4)
    scales = struct.pack("<2H", 0x3F80, 0xC000)  # bfloat16 1.0 and -2.0
    parts = write(
        tmp_path / "a.safetensors",
        {
            "weight_packed": ("I32", [1, 8], codes),
            "weight_scale": ("BF16", [1, 2], scales),
            "weight_shape": ("I64", [2], struct.pack("<2q", 1, 64)),
        },
    )
    weight = decode(parts, WeightFormat(num_bits=4, group_size=32))
    assert weight.dtype == np.float32
    assert weight[0, :16].tolist() == list(range(-8, 8))
    assert weight[0, 32:48].tolist() == [-2 * q for q in range(-8, 8)]


def test_asymmetric_zero_points_are_packed_along_out(tmp_path: Path) -> None:
    rows = 9
    codes = struct.pack("<36I", *[0x76543210, 0xFEDCBA98, 0x88888888, 0x88888888] * rows)
    # rows 0..7 have zero points -8..-1 in one word, row 8 has 3 in the next
    zeros = struct.pack("<2I", 0x76543210, 0x0000000B)
    parts = write(
        tmp_path / "a.safetensors",
        {
            "weight_packed": ("I32", [rows, 4], codes),
            "weight_scale": ("F16", [rows, 1], struct.pack("<9H", *[0x3800] * rows)),  # 0.5
            "weight_shape": ("I64", [2], struct.pack("<2q", rows, 32)),
            "weight_zero_point": ("I32", [2, 1], zeros),
        },
    )
    fmt = WeightFormat(num_bits=4, symmetric=False, group_size=32)
    weight = decode(parts, fmt)
    for row, zero in enumerate([*range(-8, 0), 3]):
        assert weight[row, :16].tolist() == [(q - zero) * 0.5 for q in range(-8, 8)]
    last = decode_rows(parts, fmt, 8, 16)
    assert last.zero_points is not None
    assert last.zero_points.tolist() == [[3]]
    assert np.array_equal(last.weight, weight[8:])


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_zero_points_of_any_rows(tmp_path: Path, num_bits: int) -> None:
    """Words of zero points span rows: those of a slice begin inside a word."""
    generator = torch.Generator().manual_seed(num_bits)
    low = -(2 ** (num_bits - 1))
    codes = torch.randint(low, -low, (72, 64), generator=generator, dtype=torch.int8)
    zeros = torch.randint(low, -low, (72, 2), generator=generator, dtype=torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes, num_bits),
        "weight_scale": torch.ones(72, 2),
        "weight_shape": torch.tensor([72, 64]),
        "weight_zero_point": pack_to_int32(zeros, num_bits, packed_dim=0).contiguous(),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    parts = {t.name: t for t in read_header(tmp_path / "a.safetensors").tensors}
    fmt = WeightFormat(num_bits=num_bits, symmetric=False, group_size=32)
    expected = (codes.float() - zeros.float().repeat_interleave(32, 1)).numpy()
    assert np.array_equal(decode(parts, fmt), expected)
    slices = [decode_rows(parts, fmt, r, r + 8).weight for r in range(0, 72, 8)]
    assert np.array_equal(np.concatenate(slices), expected)


def test_int8_rows_from_literal_bytes(tmp_path: Path) -> None:
    parts = write(
        tmp_path / "a.safetensors",
        {
            "weight": ("I8", [2, 3], struct.pack("<6b", -128, -1, 127, 1, 2, 3)),
            "weight_scale": ("F32", [2, 1], struct.pack("<2f", 0.25, 3.0)),
        },
    )
    assert decode(parts, PRESETS["W8A8"].weights).tolist() == [[-32.0, -0.25, 31.75], [3.0, 6.0, 9.0]]


def test_float8_rows_from_literal_bytes(tmp_path: Path) -> None:
    parts = write(
        tmp_path / "a.safetensors",
        {
            "weight": ("F8_E4M3", [1, 5], bytes([0x38, 0xB8, 0x7E, 0x01, 0x08])),
            "weight_scale": ("BF16", [1, 1], struct.pack("<H", 0x4000)),  # 2.0
        },
    )
    assert decode(parts, PRESETS["FP8_DYNAMIC"].weights).tolist() == [[2.0, -2.0, 896.0, 2.0**-8, 2.0**-5]]


def test_blocks_from_literal_bytes(tmp_path: Path) -> None:
    """Blocks of 8 x 2, the last of 3 rows: scales 1, 2 above and 4, 8 below; codes are 1, the last row's 1.5."""
    parts = write(
        tmp_path / "a.safetensors",
        {
            "weight": ("F8_E4M3", [11, 4], bytes([0x38] * 40 + [0x3C] * 4)),
            "weight_scale": ("BF16", [2, 2], struct.pack("<4H", 0x3F80, 0x4000, 0x4080, 0x4100)),
        },
    )
    fmt = WeightFormat(num_bits=8, kind="float", block=(8, 2))
    expected = [[1.0, 1.0, 2.0, 2.0]] * 8 + [[4.0, 4.0, 8.0, 8.0]] * 2 + [[6.0, 6.0, 12.0, 12.0]]
    assert decode(parts, fmt).tolist() == expected
    assert decode_rows(parts, fmt, 8, 16).weight.tolist() == expected[8:]


def test_float_formats_agree_with_torch_bit_for_bit() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(E4M3, bytes_.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        bits = words.numpy() if dtype == "BF16" else words.numpy().view("<f2")
        assert np.array_equal(to_float32(bits, dtype), words.view(kind).float().numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [
        ("W4A16", None),
        ("W4A16", 32),
        ("W4A16", "channel"),
        ("W4A16_ASYM", 64),
        ("W8A16", None),
        ("W3A16", 32),
        ("W3A16", "channel"),
        ("W2A16", None),
        ("W8A8", None),
        ("W4A8", 64),
        ("FP8_DYNAMIC", None),
        ("FP8_BLOCK", None),
    ],
)
def test_decodes_what_the_library_compresses(tmp_path: Path, scheme: str, group_size: int | str | None) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    folder = build(tmp_path, scheme, group_size=group_size).quantized
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    library = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(library.format)
    stored = {t.name: t for t in read_header(folder / "model.safetensors").tensors}
    loaded = load_file(folder / "model.safetensors")
    w = library.weights
    fmt = WeightFormat(
        num_bits=w.num_bits,
        kind=w.type,
        symmetric=w.symmetric,
        group_size=w.group_size,
        block=tuple(w.block_structure) if w.block_structure else None,
    )
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        parts = {n.removeprefix(module + "."): t for n, t in stored.items() if n.startswith(module + ".")}
        state = {n: loaded[f"{module}.{n}"] for n in parts}
        state["weight_scale"] = state["weight_scale"].float()
        expected = compressor.decompress(state, library)["weight"]
        decoded = decode(parts, fmt)
        assert np.array_equal(decoded, expected.numpy())
        rows = [decode_rows(parts, fmt, r, r + 8).weight for r in range(0, decoded.shape[0], 8)]
        assert np.array_equal(np.concatenate(rows), decoded)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    parts = write(tmp_path / "a.safetensors", {"weight": ("I8", [1, 1], b"\1")})
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        decode(parts, PRESETS["W8A8"].weights)


def test_other_bit_widths_are_refused() -> None:
    with pytest.raises(CheckpointError, match="5 bits"):
        unpack(np.zeros((1, 5), dtype=np.int32), 5, 32)


class TestHeader:
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.zeros(4), "b": torch.ones(2, 2)}, path)
        return path

    def test_agrees_with_the_library(self, tmp_path: Path) -> None:
        header = read_header(self.file(tmp_path))
        assert header.problems == []
        by_name = {t.name: t for t in header.tensors}
        assert by_name["a"].rows().tolist() == [0.0] * 4
        assert by_name["b"].rows(1, 2).tolist() == [[1.0, 1.0]]
        assert math.prod(by_name["b"].shape) == by_name["b"].numel

    @pytest.mark.parametrize("keep", [0, 7, 9, 40])
    def test_a_cut_header_is_an_error_that_names_the_file(self, tmp_path: Path, keep: int) -> None:
        path = self.file(tmp_path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            read_header(path)

    def test_cut_data_name_the_tensor(self, tmp_path: Path) -> None:
        path = self.file(tmp_path)
        path.write_bytes(path.read_bytes()[:-1])
        header = read_header(path)
        assert [t.name for t in header.tensors] == ["a"]
        assert header.problems == ["a.safetensors: truncated, the file ends inside tensor b"]

    def raw(self, tmp_path: Path, text: str, data: bytes) -> list[str]:
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
        return read_header(path).problems

    def test_a_name_given_twice(self, tmp_path: Path) -> None:
        entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
        (problem,) = self.raw(tmp_path, f'{{"a":{entry},"a":{entry}}}', b"x")
        assert "names a twice" in problem

    def test_gap_overlap_and_trailing_bytes(self, tmp_path: Path) -> None:
        def entry(a: int, b: int) -> str:
            return f'{{"dtype":"U8","shape":[{b - a}],"data_offsets":[{a},{b}]}}'

        problems = self.raw(tmp_path, f'{{"a":{entry(1, 3)},"b":{entry(2, 4)}}}', b"123456")
        assert ["gap" in problems[0], "overlaps" in problems[1], "2 bytes after" in problems[2]] == [True] * 3

    @pytest.mark.parametrize(
        "entry",
        [
            '{"dtype":"U8","shape":[2],"data_offsets":[0,1]}',
            '{"dtype":"X9","shape":[1],"data_offsets":[0,1]}',
            '{"dtype":"U8","shape":[-1],"data_offsets":[1,0]}',
            '{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}',
            '{"dtype":"U8","shape":1,"data_offsets":[0,1]}',
            '{"shape":[1],"data_offsets":[0,1]}',
            "[]",
            "null",
        ],
    )
    def test_malformed_entries_are_named(self, tmp_path: Path, entry: str) -> None:
        problems = self.raw(tmp_path, f'{{"bad.one":{entry}}}', b"x")
        assert "bad.one" in problems[0]
