"""GGUF: blocks, files, tokenizers, the ways there and back. llama.cpp itself is asked in engines/test_llamacpp.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import halfbyte
import tiny
from conftest import Models
from halfbyte.conversion.bits import pack_rows
from halfbyte.conversion.formats import open_source
from halfbyte.conversion.gguf_blocks import (
    BLOCK_BYTES,
    BlockType,
    block_type,
    decode,
    encode,
    from_words,
    grouped,
    has_words,
    in_float16,
    to_words,
    zero_points_of,
)
from halfbyte.conversion.gguf_cache import to_gguf
from halfbyte.conversion.gguf_families import FAMILIES, permute, rope_factors, unpermute
from halfbyte.conversion.gguf_file import GgufFile, GgufFiles, GgufSpec, Planned, open_gguf
from halfbyte.conversion.gguf_splitting import GPT2, LLAMA3, QWEN2, SPLITTINGS, TEKKEN, expressions_of, name_of
from halfbyte.conversion.gguf_tokenizer_in import tokenizer_files
from halfbyte.conversion.gguf_tokenizer_out import merges_from_scores, scores_from_merges
from halfbyte.errors import CheckpointError, UsageError

KINDS: tuple[BlockType, ...] = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
MULTILINGUAL = (
    "Größe, façade und naïve: 12345 x 3.14 = ?  zwei  Leerzeichen\t\tTabs\n\n\nneue Zeilen\r\n"
    "東京は日本の首都です。 한국어 문장입니다. مرحبا بالعالم! שלום עולם. नमस्ते दुनिया। สวัสดีชาวโลก Привет, мир 1984 года. "
    "Ελληνικά; tiếng Việt; ქართული; 🙂👩‍👩‍👧 e\u0301 \u200b don't WE'LL I'm they'RE   def f(x):\n    return x**2 # ok\n"
)


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Dozens of small files; what is on the disk after a crash is test_convert_resume's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


# ---- blocks -----------------------------------------------------------------------------------------------------


def slow(kind: str, block: bytes) -> list[float]:
    """One block by ggml's comments, byte by byte, sharing nothing with what is tested."""

    def half(at: int) -> float:
        return float(struct.unpack_from("<e", block, at)[0])

    if kind == "Q8_0":
        return [half(0) * c for c in struct.unpack_from("<32b", block, 2)]
    nibbles = [block[len(block) - 16 + i % 16] >> (4 * (i // 16)) & 15 for i in range(32)]
    if kind == "Q4_0":
        return [half(0) * (c - 8) for c in nibbles]
    if kind == "Q4_1":
        return [half(0) * c + half(2) for c in nibbles]
    fifth = struct.unpack_from("<I", block, 2)[0]
    if kind == "Q5_0":
        return [half(0) * (c + 16 * (fifth >> i & 1) - 16) for i, c in enumerate(nibbles)]
    assert kind == "Q5_1"
    fifth = struct.unpack_from("<I", block, 4)[0]
    return [half(0) * (c + 16 * (fifth >> i & 1)) + half(2) for i, c in enumerate(nibbles)]


def test_a_block_of_each_type_byte_by_byte() -> None:
    """Byte i holds elements i and i + 16; 1.0 in float16 is 3c00, -0.5 is b800."""
    ramp = torch.arange(32, dtype=torch.int8).remainder(16).sub(8).unsqueeze(0)
    scale = torch.ones(1, 1)
    assert encode("Q4_0", ramp, scale).numpy().tobytes().hex() == "003c" + "".join(
        f"{i}{i}" for i in "0123456789abcdef"
    )
    q8 = encode("Q8_0", torch.arange(-16, 16, dtype=torch.int8).unsqueeze(0), scale).numpy().tobytes()
    assert q8 == b"\x00\x3c" + bytes(i % 256 for i in range(-16, 16))
    half = encode("Q4_1", ramp, scale / 2, torch.full((1, 1), -7)).numpy().tobytes()
    assert half.hex() == "0038" + "00b8" + "".join(f"{i}{i}" for i in "0123456789abcdef")
    five = encode("Q5_0", torch.arange(-16, 16, dtype=torch.int8).unsqueeze(0), scale).numpy().tobytes()
    assert five.hex() == "003c" + "0000ffff" + "".join(f"{i}{i}" for i in "0123456789abcdef")


@st.composite
def coded(draw: st.DrawFn) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A weight in groups with scales that float16 holds, subnormal, negative and zero ones among them."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    width = 32 * draw(st.integers(1, 4))
    kind = draw(st.sampled_from(KINDS))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    bits = 8 if kind == "Q8_0" else 4
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, groups * width), generator=seed, dtype=torch.int8)
    patterns = torch.randint(-32768, 32768, (rows, groups), generator=seed, dtype=torch.int16).view(torch.float16)
    scales = torch.where(torch.isfinite(patterns), patterns, 0.0)
    zeros = None
    if kind in ("Q4_1", "Q5_0"):
        zeros = torch.randint(-8, 8, (rows, groups), generator=seed, dtype=torch.int8)
    if kind == "Q4_1":
        scales = (torch.randint(-64, 64, (rows, groups), generator=seed) / 16).to(torch.float16)
    return kind, codes, scales, zeros


@given(coded())
@settings(max_examples=200, deadline=None)
def test_blocks_hold_codes_and_scales_exactly(case: tuple[BlockType, torch.Tensor, torch.Tensor, Any]) -> None:
    kind, codes, scales, zeros = case
    data = encode(kind, codes, scales, zeros)
    assert data.shape == (codes.shape[0], codes.shape[1] // 32 * BLOCK_BYTES[kind])
    size = codes.shape[1] // scales.shape[1]
    expected = codes.double() - (0 if zeros is None else zeros.double().repeat_interleave(size, 1))
    expected *= scales.double().repeat_interleave(size, 1)
    by_hand = [v for block in data.reshape(-1, BLOCK_BYTES[kind]) for v in slow(kind, block.numpy().tobytes())]
    assert torch.equal(torch.tensor(by_hand, dtype=torch.float64).reshape(expected.shape), expected)
    theirs = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.allclose(theirs, expected.numpy(), rtol=1e-6, atol=1e-9)
    bits = 8 if kind == "Q8_0" else 4
    if has_words(kind, bits):  # the fast way, without unpacking
        words = pack_rows((codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8), bits)
        assert torch.equal(from_words(kind, words, scales, zeros), data)
        assert torch.equal(to_words(kind, data), words)
    blocks = decode(kind, data)
    back = grouped(blocks.d, size, codes.shape[1])
    assert back is not None
    assert torch.equal(back.view(torch.int16), scales.view(torch.int16))
    if kind == "Q4_1":
        assert zeros is not None
        assert blocks.m is not None
        found = zero_points_of(blocks.d, blocks.m)
        assert found is not None
        unsigned = grouped(found, size, codes.shape[1])
        assert unsigned is not None
        assert torch.equal((unsigned - 8)[scales != 0], zeros[scales != 0])
        assert torch.equal(blocks.codes - 8, codes)
    elif kind != "Q5_0":
        assert torch.equal(blocks.codes, codes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_every_type_is_decoded_as_ggml_does(kind: str, tmp_path: Path) -> None:
    """Random bytes with sane scales; the simple types by hand, K-quants by the gguf package's own scalar rule."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    values = np.random.default_rng(3).standard_normal((6, 2 * block)).astype(np.float32)
    if kind.endswith("_K"):
        data = _random_k_blocks(kind, 6 * 2, size).reshape(6, 2 * size)
    else:
        data = gguf.quantize(values, number)
    files = GgufFiles(
        [
            Planned(
                file="m.gguf",
                architecture="llama",
                metadata={},
                tensors=[GgufSpec(name="a", kind=kind, shape=(6, 2 * block))],
                constants={"a": torch.from_numpy(data)},
            )
        ]
    )
    files.create(tmp_path)
    opened = open_gguf(tmp_path / "m.gguf")
    found = opened.floats("a", torch.float32, opened.raw("a"))
    flat = data.reshape(-1, size)
    decoder = k_quant if kind.endswith("_K") else slow
    expected = torch.tensor([v for b in flat for v in decoder(kind, b.tobytes())], dtype=torch.float64)
    torch.testing.assert_close(found.double().flatten(), expected, rtol=1e-5, atol=1e-6)


def _random_k_blocks(kind: str, count: int, size: int) -> np.ndarray:
    """Random bytes, but float16 scales between -1 and 1 where the type has them."""
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, (count, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in places:
        data[:, at : at + 2] = rng.uniform(-1, 1, (count, 1)).astype(np.float16).view(np.uint8)
    return data


def k_quant(kind: str, block: bytes) -> list[float]:
    """One superblock of 256, element by element, after the comments of ggml-common.h."""

    def half(at: int) -> float:
        return float(struct.unpack_from("<e", block, at)[0])

    out = []
    for i in range(256):
        if kind == "Q2_K":  # scales[16], qs[64], d, dmin; 128 at a time, 2 bits of 32 bytes
            scale = block[i // 16]
            q = block[16 + i // 128 * 32 + i % 32] >> (2 * (i % 128 // 32)) & 3
            out.append(half(80) * (scale & 15) * q - half(82) * (scale >> 4))
        elif kind == "Q3_K":  # hmask[32], qs[64], scales[12] of 6 bits, d
            low = block[32 + i // 128 * 32 + i % 32] >> (2 * (i % 128 // 32)) & 3
            high = block[i % 32] >> (i // 32) & 1
            out.append(half(108) * (_six_bits_of_q3(block[96:108], i // 16) - 32) * (low - (0 if high else 4)))
        elif kind in ("Q4_K", "Q5_K"):  # d, dmin, scales[12], (qh[32],) qs[128]; 64 at a time, low halves first
            scale, minimum = _six_bits_of_q4(block[4:16], i // 32)
            start = 16 if kind == "Q4_K" else 48
            q = block[start + i // 64 * 32 + i % 32] >> (4 * (i % 64 // 32)) & 15
            if kind == "Q5_K":
                q += 16 * (block[16 + i % 32] >> (i // 32) & 1)
            out.append(half(0) * scale * q - half(2) * minimum)
        else:  # Q6_K: ql[128], qh[64], scales int8[16], d; 128 at a time
            part, j = i // 128, i % 128
            low = block[part * 64 + j % 64] >> (4 * (j // 64)) & 15
            high = block[128 + part * 32 + j % 32] >> (2 * (j // 32)) & 3
            scale = struct.unpack_from("b", block, 192 + i // 16)[0]
            out.append(half(208) * scale * ((low | high << 4) - 32))
    return out


def _six_bits_of_q4(packed: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4


def _six_bits_of_q3(packed: bytes, j: int) -> int:
    low = packed[j % 8] >> (4 * (j // 8)) & 15
    return low | (packed[8 + j % 4] >> (2 * (j // 4)) & 3) << 4


def test_the_smallest_exact_type_is_chosen() -> None:
    fits, large = torch.tensor([[0.5]], dtype=torch.bfloat16), torch.tensor([[1e6]], dtype=torch.bfloat16)
    tiny_one, odd = torch.tensor([[1e-9]], dtype=torch.bfloat16), torch.tensor([[1.9921875]], dtype=torch.bfloat16)
    zero = torch.tensor([[5]], dtype=torch.int8)
    assert block_type(4, fits, None) == block_type(3, fits, None) == "Q4_0"
    assert block_type(8, fits, None) == "Q8_0"
    assert block_type(4, fits, zero) == "Q4_1"
    # 255/128 x 13 has 12 significant bits, float16 has 11
    assert block_type(4, odd, zero) == "Q5_0"
    assert block_type(4, large, None) is None
    assert block_type(4, tiny_one, None) is None
    assert block_type(8, fits, zero) is None
    assert in_float16(torch.tensor([65504.0, 65505.0, 2.0**-24, 2.0**-25, float("nan")])).tolist() == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_codes_out_of_range_are_not_wrapped() -> None:
    with pytest.raises(ValueError, match=r"codes 9\.\.9 do not fit Q4_0"):
        encode("Q4_0", torch.full((1, 32), 9, dtype=torch.int8), torch.ones(1, 1))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_rows_of_heads_are_reordered_and_back(heads: int, half: int, columns: int) -> None:
    weight = torch.arange(heads * 2 * half * columns).reshape(-1, columns)
    stored = permute(weight, heads)
    for head in range(heads):
        for h in range(2):
            for i in range(half):
                assert torch.equal(stored[head * 2 * half + 2 * i + h], weight[head * 2 * half + h * half + i])
    assert torch.equal(unpermute(stored, heads), weight)


def test_names_are_those_of_the_gguf_package() -> None:
    """Stems of every family, by the package's own table (which knows them without the layer number)."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for family in FAMILIES:
        table = gguf.get_tensor_name_map(numbers[family.architecture], 2)
        for ours, dense in family.names.items():
            if "{e}" in dense:
                dense = dense.replace("experts.{e}.", "experts.")
            assert table.get_name(dense.replace("{}", "1")) == ours.replace("{}", "1"), (family.architecture, dense)


def test_llama3_factors_are_those_of_transformers() -> None:
    config = transformers.LlamaConfig(
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = rope_factors(config)
    assert factors is not None
    torch.testing.assert_close(plain / factors.double(), stretched.double(), rtol=1e-5, atol=0)
    assert factors.min() == 1
    assert factors.max() == 8


# ---- files ------------------------------------------------------------------------------------------------------


def small(folder: Path) -> Path:
    values = torch.arange(8.0).reshape(2, 4)
    plan = Planned(
        file="m.gguf",
        architecture="llama",
        metadata={"a.list": ([1, 2, 3], "ARRAY"), "a.text": ("ä", "STRING"), "a.words": (["x", ""], "ARRAY")},
        tensors=[GgufSpec(name="t", kind="F32", shape=(2, 4)), GgufSpec(name="u", kind="BF16", shape=(3,))],
        constants={"t": values},
    )
    files = GgufFiles([plan])
    files.create(folder)
    files.write(folder, {"u": torch.ones(3, dtype=torch.bfloat16)})
    files.sync(folder)
    return folder / "m.gguf"


def test_a_file_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = small(tmp_path)
    theirs = gguf.GGUFReader(str(path))
    assert {t.name: (t.tensor_type.name, [int(n) for n in t.shape]) for t in theirs.tensors} == {
        "t": ("F32", [4, 2]),
        "u": ("BF16", [3]),
    }
    assert theirs.tensors[0].data.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert theirs.fields["a.text"].contents() == "ä"
    ours = open_gguf(path)
    assert ours.metadata["a.list"] == [1, 2, 3]
    assert ours.metadata["a.words"] == ["x", ""]
    assert ours.metadata["general.architecture"] == "llama"
    assert ours.tensors["t"].shape == (2, 4)
    assert ours.floats("u", torch.float32, ours.raw("u")).tolist() == [[1, 1, 1]]


def test_a_file_cut_anywhere_is_refused_with_its_name(tmp_path: Path) -> None:
    whole = small(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    ends = [*range(0, len(whole) - 64, 7), len(whole) - 64]
    for end in ends:
        cut.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: .*(GGUF|ends inside)"):
            open_gguf(cut)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "is not a GGUF file"),
        (4, b"\x01\0\0\0", "is GGUF version 1"),
        (8, b"\xff" * 8, "dimensions|whole"),
        (16, b"\xff" * 8, "is not a whole GGUF file"),
        (24, b"\xff" * 8, "bytes announced"),
    ],
)
def test_hostile_heads_are_refused(at: int, value: bytes, message: str, tmp_path: Path) -> None:
    path = small(tmp_path)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = small(tmp_path).rename(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"1 of 2 parts are missing: m-00002-of-00002\.gguf"):
        open_gguf(path)


# ---- tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expressions"), [(n, s.expressions) for n, s in SPLITTINGS.items()])
def test_every_way_of_splitting_is_recognised_in_what_it_becomes(name: str, expressions: tuple[str, ...]) -> None:
    from halfbyte.conversion.gguf_tokenizer_in import _pre_tokenizer

    written = _pre_tokenizer(SPLITTINGS[name])
    assert expressions_of(written) == expressions
    assert name_of(expressions, SPLITTINGS[name].whole_words) == name


def byte_level(folder: Path, pattern: str | None, *, whole_words: bool, bos: bool) -> Path:
    """A byte-level tokenizer as published ones are, trained on a few scripts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        from tokenizers import Regex

        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny.TEXT + MULTILINGUAL], trainer)
    if bos:
        from tokenizers import processors

        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = tiny.TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


def sentencepiece(folder: Path, *, prefix: bool) -> Path:
    """A SentencePiece model (BPE with byte fallback), trained by the library and converted as transformers does."""
    import sentencepiece as spm

    defined = {"\n\n"} if prefix else {"\u2581\u2581", "\n\n"}  # Llama 2 has none of spaces, Gemma has
    text = folder / "text.txt"
    folder.mkdir(parents=True, exist_ok=True)
    text.write_text(tiny.TEXT + MULTILINGUAL, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "sp"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=sorted(defined),
        minloglevel=2,
    )
    model = spm.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    tokens = list(vocabulary)
    plain = [not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i)) for i in range(len(tokens))]
    merges = []
    for i, token in enumerate(tokens):
        if plain[i] and token not in defined:
            splits = [(token[:k], token[k:]) for k in range(1, len(token))]
            found = [(vocabulary[a], vocabulary[b]) for a, b in splits if a in vocabulary and b in vocabulary]
            merges += [(-model.get_score(i), i, a, b) for a, b in sorted(found)]
    merges.sort(key=lambda m: (m[0], m[1]))
    bpe = models.BPE(
        vocabulary,
        [(tokens[a], tokens[b]) for _, _, a, b in merges],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    # what SentencePiece cuts out first: runs of spaces once they are U+2581, anything else in the text as it is
    tokenizer.add_tokens([AddedToken(t, special=False, normalized="\u2581" in t) for t in sorted(defined)])
    if not prefix:
        assert tokenizer.encode(MULTILINGUAL).ids == [1, *model.encode(MULTILINGUAL)]
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    wrapped.chat_template = tiny.TEMPLATE
    wrapped.save_pretrained(folder)
    for leftover in ("text.txt", "sp.model", "sp.vocab"):
        (folder / leftover).unlink()
    return folder


TOKENIZERS = {
    "gpt2": lambda f: byte_level(f, None, whole_words=False, bos=True),
    "llama3": lambda f: byte_level(f, LLAMA3, whole_words=True, bos=True),
    "qwen2": lambda f: byte_level(f, QWEN2, whole_words=False, bos=False),
    "tekken": lambda f: byte_level(f, TEKKEN, whole_words=True, bos=True),
    "llama2": lambda f: sentencepiece(f, prefix=True),
    "gemma": lambda f: sentencepiece(f, prefix=False),
}


def with_tokenizer(models_of: Models, kind: str, folder: Path) -> Path:
    """A tiny model with one of the tokenizers."""
    source = models_of("llama", vocab_size=720)
    made = TOKENIZERS[kind](folder)
    for file in source.iterdir():
        if not (made / file.name).exists() and "token" not in file.name and "template" not in file.name:
            (made / file.name).write_bytes(file.read_bytes())
    return made


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_come_back_token_for_token(kind: str, tiny_model: Models, tmp_path: Path) -> None:
    source = with_tokenizer(tiny_model, kind, tmp_path / "source")
    halfbyte.convert(source, tmp_path / "out", to="gguf")
    alone = (tmp_path / "out/model.gguf").rename(tmp_path / "alone.gguf")
    halfbyte.convert(alone, tmp_path / "back", to="dense")
    before, after = (transformers.AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "back"))
    for text in (MULTILINGUAL, tiny.TEXT, "", " ", "a", "</s> x", "  two"):
        assert after(text).input_ids == before(text).input_ids
        ids = before(text).input_ids
        assert after.decode(ids) == before.decode(ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(after, name) == getattr(before, name)


def test_what_llama_cpp_tokenises_otherwise_is_noted(tiny_model: Models, tmp_path: Path) -> None:
    record = halfbyte.convert(with_tokenizer(tiny_model, "tekken", tmp_path / "tekken"), tmp_path / "a", to="gguf")
    assert [n for n in record.notes if "combining marks" in n]
    source = with_tokenizer(tiny_model, "gemma", tmp_path / "gemma")
    assert not [n for n in halfbyte.convert(source, tmp_path / "b", to="gguf").notes if n.startswith("tokenizer")]
    whole = json.loads((source / "tokenizer.json").read_text())
    for token in whole["added_tokens"]:
        token["normalized"] = False  # as files are that were made of a GGUF without much thought
    (source / "tokenizer.json").write_text(json.dumps(whole))
    record = halfbyte.convert(source, tmp_path / "c", to="gguf")
    assert [n for n in record.notes if "1 tokens of spaces ('\u2581\u2581' and so on)" in n]


def test_runs_of_spaces_are_found_behind_a_prefix_too(tmp_path: Path) -> None:
    """As llama.cpp does: cut out of the text first, what comes next gets a space before it."""
    pieces = ["<unk>", "<s>", "</s>", "  ", "\u2581", "a", "b", "\u2581a", "\u2581b"]
    kinds = [2, 3, 3, 4, 1, 1, 1, 1, 1]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    for prefix, ids in ((True, [1, 7, 3, 8]), (False, [1, 5, 3, 6])):
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
        folder = tmp_path / str(prefix)
        folder.mkdir()
        for name, content in tokenizer_files(metadata, 512, "here").items():
            (folder / name).write_bytes(content)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("a  b").input_ids == ids
        assert tokenizer.decode(ids[1:]).strip() == "a  b".replace("  ", "   " if prefix else "  ")


def test_a_tokenizer_that_llama_cpp_lacks_stops_the_conversion(tiny_model: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    whole = json.loads((source / "tokenizer.json").read_text())
    whole["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match=r"splits text .* knows no name for in llama\.cpp: .*Whitespace"):
        halfbyte.convert(source, tmp_path / "out", to="gguf")
    whole["pre_tokenizer"], whole["normalizer"] = tiny_pre(), {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match=r"normalises text \(Lowercase\)"):
        halfbyte.convert(source, tmp_path / "out", to="gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"there is no tokenizer\.json"):
        halfbyte.convert(source, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def tiny_pre() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_merges_that_are_not_sentencepieces_stop_the_conversion(tiny_model: Models, tmp_path: Path) -> None:
    source = with_tokenizer(tiny_model, "gemma", tmp_path / "source")
    whole = json.loads((source / "tokenizer.json").read_text())
    dropped = whole["model"]["merges"].pop(5)
    (source / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match="merges are not SentencePiece's: 1 pairs") as e:
        halfbyte.convert(source, tmp_path / "out", to="gguf")
    assert dropped[0] in str(e.value)


def test_merges_follow_scores_then_parts() -> None:
    tokens = ["a", "b", "ab", "ba", "aba", "<x>"]
    kinds, scores = [1, 1, 1, 1, 1, 4], [0.0, 0.0, -2.0, -1.0, -3.0, 0.0]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    merges = merges_from_scores(tokens, kinds, scores, vocabulary)
    assert merges == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]
    back = scores_from_merges(tokens, kinds, merges, vocabulary)
    assert merges_from_scores(tokens, kinds, back, vocabulary) == merges


def test_gpt2_is_what_byte_level_does() -> None:
    """The expression that stands for ByteLevel's own splitting cuts as it does."""
    from tokenizers import Regex

    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert ours.pre_tokenize_str(MULTILINGUAL) == own.pre_tokenize_str(MULTILINGUAL)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def same_stored(a: Path, b: Path) -> None:
    left, right = tiny.stored(a), tiny.stored(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


CASES = [
    ("llama", {"scheme": "W4A16", "group_size": 32}),
    ("llama", {"scheme": "W4A16", "group_size": 64}),
    ("llama", {"scheme": "W4A16", "group_size": "channel"}),
    ("mistral", {"scheme": "W8A16", "group_size": 32}),
    ("qwen2", {"scheme": "W8A16", "group_size": "channel"}),
    ("qwen3", {"scheme": "W4A16", "group_size": 32}),
    ("gemma2", {"scheme": "W4A16", "group_size": 32}),
    ("gemma3", {"scheme": "W4A16", "group_size": 32}),
    ("llama3", {"scheme": "W4A16", "group_size": 32}),
    ("granite", {"scheme": "W4A16", "group_size": 32}),
    ("ministral3", {"scheme": "W4A16", "group_size": 32}),
    ("mixtral", {"scheme": "W4A16", "group_size": 32}),
    ("qwen3-moe", {"scheme": "W8A16", "group_size": 32}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_there_and_back_ends_in_the_same_bytes(
    family: str, options: dict[str, Any], tiny_model: Models, tmp_path: Path
) -> None:
    halfbyte.quantize(tiny_model(family), tmp_path / "q", method="rtn", **options)
    record = halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    assert record.exact == record.quantized > 0
    halfbyte.convert(tmp_path / "gguf", tmp_path / "back", to="compressed-tensors")
    same_bytes(tmp_path / "q", tmp_path / "back")
    # the file alone, without the folder around it
    alone = (tmp_path / "gguf/model.gguf").rename(tmp_path / "alone.gguf")
    halfbyte.convert(alone, tmp_path / "again", to="compressed-tensors")
    same_bytes(tmp_path / "q", tmp_path / "again")
    assert torch.equal(logits(tmp_path / "q"), logits(tmp_path / "again"))


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = halfbyte.load(folder, dtype=torch.float32)(tiny.token_ids(folder, 12)).logits
        return found


@pytest.mark.parametrize("group_size", [32, 64])
def test_asymmetric_weights_keep_their_values(group_size: int, tiny_model: Models, tmp_path: Path) -> None:
    """Q4_1 where float16 holds the minima, Q5_0 elsewhere: exact either way."""
    halfbyte.quantize(tiny_model("qwen3"), tmp_path / "q", method="rtn", scheme="W4A16_ASYM", group_size=group_size)
    halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "gguf/model.gguf")).tensors}
    assert "Q5_0" in kinds
    for name in ("q", "gguf"):
        halfbyte.convert(tmp_path / name, tmp_path / f"{name}-dense", to="dense", dtype="float32")
    same_stored(tmp_path / "q-dense", tmp_path / "gguf-dense")
    halfbyte.convert(tmp_path / "gguf", tmp_path / "back", to="compressed-tensors")
    halfbyte.convert(tmp_path / "back", tmp_path / "back-dense", to="dense", dtype="float32")
    same_stored(tmp_path / "q-dense", tmp_path / "back-dense")


def test_a_scale_that_float16_lacks_stops_the_conversion_by_name(tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_model("llama"), tmp_path / "q", method="rtn", group_size=32)
    file = tmp_path / "q/model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(file)
    scales = tensors["model.layers.1.mlp.up_proj.weight_scale"]
    scales[3, 1] = 3.1e-7  # between float16's subnormals
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"1 of its weights exactly: model\.layers\.1\.mlp\.up_proj: scales that float16"
    ):
        halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
    record = halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf", allow_requantize=True)
    assert [r.name for r in record.requantized] == ["model.layers.1.mlp.up_proj"]
    assert 0 < record.requantized[0].relative_error < 1e-3
    assert record.exact == record.quantized - 1


def test_float8_and_odd_widths_stop_with_a_remedy(tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_model("llama"), tmp_path / "q", method="rtn", scheme="FP8_DYNAMIC")
    with pytest.raises(UsageError, match=r"float8 weights have no type in GGUF.*Convert it to dense"):
        halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf")
    odd = tiny_model("llama", intermediate_size=80)
    halfbyte.quantize(odd, tmp_path / "odd", method="rtn", scheme="W8A8")
    with pytest.raises(UsageError, match=r"down_proj\.weight: .*in_features 80 is not a multiple of 32"):
        halfbyte.convert(tmp_path / "odd", tmp_path / "out", to="gguf")


def test_what_llama_cpp_computes_otherwise_stops_the_conversion(tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"query_pre_attn_scalar 48: llama\.cpp divides by the square root of 32"):
        halfbyte.convert(tiny_model("gemma3", query_pre_attn_scalar=48), tmp_path / "out", to="gguf")
    with pytest.raises(UsageError, match="hidden_act gelu"):
        halfbyte.convert(tiny_model("llama", hidden_act="gelu"), tmp_path / "out", to="gguf")
    with pytest.raises(UsageError, match=r"cannot write model_type falcon for llama\.cpp.*Types that it can: llama"):
        halfbyte.convert(tiny_model("falcon"), tmp_path / "out", to="gguf")


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    plan = Planned(
        file="m.gguf",
        architecture="rwkv7",
        metadata={},
        tensors=[GgufSpec(name="t", kind="F32", shape=(1, 4))],
        constants={},
    )
    GgufFiles([plan]).create(tmp_path)
    with pytest.raises(CheckpointError, match=r"has architecture rwkv7, which halfbyte cannot read.*llama, mistral3"):
        open_source(tmp_path / "m.gguf", "auto")


def test_a_killed_conversion_ends_in_the_same_bytes(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halfbyte.quantize(tiny_model("gemma3"), tmp_path / "q", method="rtn", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "whole", to="gguf")
    from halfbyte.conversion import run

    monkeypatch.setattr(run, "STAGE_BYTES", 1)
    written = GgufFiles.write

    def dying(self: GgufFiles, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "blk.1.attn_q.weight" in tensors:
            raise KeyboardInterrupt
        written(self, folder, tensors)

    monkeypatch.setattr(GgufFiles, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf")
    monkeypatch.setattr(GgufFiles, "write", written)
    halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf", resume=True)
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "whole/model.gguf").read_bytes()


def test_everything_arrives_beside_the_weights(tiny_model: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "LICENSE").write_text("do as you like")
    halfbyte.convert(source, tmp_path / "out", to="gguf")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    expected = {"model.gguf", "config.json", "generation_config.json", "tokenizer.json", "LICENSE", "convert.json"}
    assert expected <= names
    found = open_gguf(tmp_path / "out/model.gguf").metadata
    assert found["tokenizer.chat_template"] == tiny.TEMPLATE
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["general.file_type"] == 32


def test_a_conversion_is_kept_and_reused(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    halfbyte.quantize(tiny_model("llama"), source, method="rtn", group_size=32)
    first = to_gguf(source, tmp_path / "cache")
    assert first.model.exists()
    assert first.mmproj is None
    stamp = first.model.stat().st_mtime_ns
    assert to_gguf(source, tmp_path / "cache").model.stat().st_mtime_ns == stamp
    assert to_gguf(source, tmp_path / "cache", dtype="float32").folder != first.folder
    (source / "eval.json").write_text("{}")
    assert to_gguf(source, tmp_path / "cache").folder == first.folder
    (source / "chat_template.jinja").write_text("{{ messages }}")
    told = to_gguf(source, tmp_path / "cache")
    assert told.folder != first.folder
    assert open_gguf(told.model).metadata["tokenizer.chat_template"] == "{{ messages }}"
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert to_gguf(source, tmp_path / "cache").folder != told.folder


@pytest.mark.parametrize("family", ["gemma3-vision", "gemma3-vision-nested", "mistral3"])
def test_what_sees_pictures_becomes_two_files(family: str, tiny_model: Models, tmp_path: Path) -> None:
    """Every tensor of tower and projector arrives, once; both come back to the byte, and one alone."""
    source = tiny_model(family)
    halfbyte.quantize(source, tmp_path / "q", method="rtn", group_size=32)
    made = to_gguf(tmp_path / "q", tmp_path / "cache")
    assert made.mmproj is not None
    seen = open_gguf(made.mmproj)
    tower = [n for n in tiny.stored(source) if "vision" in n or "projector" in n]
    assert len(seen.tensors) == len(tower) + (family == "mistral3")
    kind = "pixtral" if family == "mistral3" else "gemma3"
    assert seen.metadata["clip.projector_type"] == kind
    back = tmp_path / "back/q"  # a GGUF is called what its source's folder is
    back.parent.mkdir()
    halfbyte.convert(made.folder, back, to="compressed-tensors")
    same_bytes(tmp_path / "q", back)
    assert tiny.config_of(back) == tiny.config_of(tmp_path / "q")
    halfbyte.convert(back, tmp_path / "again", to="gguf")
    for name in ("model.gguf", "mmproj.gguf"):
        assert (tmp_path / "again" / name).read_bytes() == (made.folder / name).read_bytes()
    made.mmproj.unlink()
    record = halfbyte.convert(made.folder, tmp_path / "blind", to="compressed-tensors")
    assert "vision tower stays behind" in record.notes[0]
    theirs = {plain(n): t for n, t in tiny.stored(tmp_path / "q").items() if n not in tower}
    ours = tiny.stored(tmp_path / "blind")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, ours[n]) for n, t in theirs.items())
    assert logits(tmp_path / "blind").isfinite().all()


def plain(name: str) -> str:
    return name.replace("model.language_model.", "model.").removeprefix("language_model.")


def same_bytes(a: Path, b: Path) -> None:
    files = sorted(p.name for p in a.glob("model*"))
    assert files == sorted(p.name for p in b.glob("model*"))
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def edited(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, out)
    tensors = tiny.stored(out)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_what_adding_one_would_lose_comes_back(tiny_model: Models, tmp_path: Path) -> None:
    """1 + w in float32 has no room for a small w, a dtype of its own, or a stored head that is the embedding's."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        norm = tensors["model.layers.1.input_layernorm.weight"]
        norm[:4] = torch.tensor([1e-9, -3e-8, 2.0**-130, -0.0])
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() / 3

    source = edited(tiny_model("gemma3"), tmp_path / "source", change)
    halfbyte.quantize(source, tmp_path / "q", method="rtn", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    halfbyte.convert(tmp_path / "gguf", tmp_path / "back", to="compressed-tensors")
    same_bytes(tmp_path / "q", tmp_path / "back")


def test_the_sign_of_a_zero_comes_back(tiny_model: Models, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = -0.0

    source = edited(tiny_model("llama"), tmp_path / "source", change)
    halfbyte.quantize(source, tmp_path / "q", method="rtn", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    halfbyte.convert(tmp_path / "gguf", tmp_path / "back", to="compressed-tensors")
    same_bytes(tmp_path / "q", tmp_path / "back")


def of_another_tool(plain: GgufFile, out: Path, kinds: dict[str, str], without: str = "") -> Path:
    """A file as llama-quantize leaves it: tensors in the kinds given, no notes of halfbyte's, and ``without`` a key."""
    specs, constants = [], {}
    for name, t in plain.tensors.items():
        kind, raw = kinds.get(name, t.kind), plain.raw(name)
        if kind != t.kind:
            values = plain.floats(name, torch.float32, raw).numpy() * 1.137
            raw = torch.from_numpy(gguf.quantize(values, gguf.GGMLQuantizationType[kind]))
        specs.append(GgufSpec(name=name, kind=kind, shape=t.shape))
        constants[name] = raw
    types = {str: "STRING", bool: "BOOL", float: "FLOAT32", list: "ARRAY", int: "UINT32"}
    own = {k: v for k, v in plain.metadata.items() if not k.startswith(("halfbyte.", "general.arch"))}
    own.pop(without, None)
    metadata = {k: (v, types[type(v)]) for k, v in own.items()}
    architecture = plain.metadata["general.architecture"]
    plan = Planned(file=out.name, architecture=architecture, metadata=metadata, tensors=specs, constants=constants)
    GgufFiles([plan]).create(out.parent)
    return out


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float16"), ("gemma3", "bfloat16")])
def test_a_file_of_another_tool_keeps_what_it_holds(
    family: str, dtype: str, tiny_model: Models, tmp_path: Path
) -> None:
    """Scales are float16, so the model becomes float16 where it can run in it; --dtype float32 rounds nothing."""
    halfbyte.convert(tiny_model(family), tmp_path / "f16", to="gguf", dtype="float16")
    plain = open_gguf(tmp_path / "f16/model.gguf")
    matrices = [n for n, t in plain.tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
    kinds = {n: "Q5_1" if "ffn_down" in n else "Q4_0" for n in matrices}
    (tmp_path / "hub").mkdir()
    file = of_another_tool(plain, tmp_path / "hub/some-q4_0.gguf", kinds)
    (tmp_path / "hub/LICENSE").write_text("terms")
    record = halfbyte.convert(tmp_path / "hub", tmp_path / "dense", to="dense", dtype="float32")
    assert not record.notes
    found, name = tiny.stored(tmp_path / "dense"), "model.layers.0.mlp.down_proj.weight"
    theirs = gguf.dequantize(open_gguf(file).raw("blk.0.ffn_down.weight").numpy(), gguf.GGMLQuantizationType.Q5_1)
    assert torch.equal(found[name], torch.from_numpy(theirs))
    assert (tmp_path / "dense/LICENSE").read_text() == "terms"
    if dtype == "float16":
        record = halfbyte.convert(tmp_path / "hub", tmp_path / "small", to="compressed-tensors")
        assert record.exact == record.quantized > 0
        assert not record.notes
    else:
        with pytest.raises(UsageError, match="engines load scales in the model's dtype, BF16"):
            halfbyte.convert(tmp_path / "hub", tmp_path / "small", to="compressed-tensors")
        record = halfbyte.convert(tmp_path / "hub", tmp_path / "small", to="compressed-tensors", allow_requantize=True)
        assert "token_embd.weight (F16), are rounded to bfloat16" in record.notes[0]
    assert tiny.config_of(tmp_path / "small")["dtype"] == dtype
    assert halfbyte.verify(tmp_path / "small", source=file).passed


def test_a_way_of_splitting_that_is_not_named_is_llama_cpps_own(tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.convert(tiny_model("llama"), tmp_path / "f32", to="gguf", dtype="float32")
    file = of_another_tool(open_gguf(tmp_path / "f32/model.gguf"), tmp_path / "old.gguf", {}, "tokenizer.ggml.pre")
    record = halfbyte.convert(file, tmp_path / "out", to="dense")
    assert "does not say how text is split" in record.notes[0]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345!")]
    assert pieces == ["it", "'", "s", "\u0120", "123", "45", "!"]


def test_a_gguf_beside_safetensors_can_be_asked_for(tiny_model: Models, tmp_path: Path) -> None:
    source = edited(tiny_model("llama"), tmp_path / "source", lambda tensors: None)
    halfbyte.convert(source, tmp_path / "gguf", to="gguf")
    shutil.copy(tmp_path / "gguf/model.gguf", source / "model.gguf")
    assert halfbyte.convert(source, tmp_path / "a", to="dense").source["format"] == "dense"
    assert halfbyte.convert(source, tmp_path / "b", to="dense", source_format="gguf").source["format"] == "gguf"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_json_is_named(name: str, tiny_model: Models, tmp_path: Path) -> None:
    source = edited(tiny_model("llama"), tmp_path / "source", lambda tensors: None)
    (source / name).write_text("{")
    with pytest.raises(CheckpointError, match=rf"^{name}: not valid JSON at line 1"):
        halfbyte.convert(source, tmp_path / "out", to="gguf")
    (source / name).write_text("[]")
    with pytest.raises(CheckpointError, match=rf"^{name}: holds no JSON object"):
        halfbyte.convert(source, tmp_path / "out", to="gguf")


def test_what_other_tools_did_to_a_file_is_believed(tiny_model: Models, tmp_path: Path) -> None:
    """llama-quantize keeps metadata: a tensor of another type than noted is what its type says."""
    halfbyte.quantize(tiny_model("llama"), tmp_path / "q", method="rtn", scheme="W8A16", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    before = open_gguf(tmp_path / "gguf/model.gguf")
    name = "blk.0.ffn_up.weight"
    values = before.floats(name, torch.float32, before.raw(name))
    rounded = torch.from_numpy(gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0))
    kinds = {"STRING": str, "BOOL": bool, "FLOAT32": float}
    specs, constants = [], {}
    for t in before.tensors.values():
        specs.append(GgufSpec(name=t.name, kind="Q4_0" if t.name == name else t.kind, shape=t.shape))
        raw = rounded if t.name == name else before.raw(t.name)
        constants[t.name] = raw
    metadata = {}
    for key, value in before.metadata.items():
        known = next((k for k, kind in kinds.items() if type(value) is kind), "UINT32")
        metadata[key] = (value, "ARRAY" if isinstance(value, list) else known)
    metadata.pop("general.architecture")
    plan = Planned(file="m.gguf", architecture="llama", metadata=metadata, tensors=specs, constants=constants)
    GgufFiles([plan]).create(tmp_path)
    source = open_source(tmp_path / "m.gguf", "auto")
    entry = source.entries["model.layers.0.mlp.up_proj.weight"]
    assert entry.grid is not None
    assert entry.grid.weights.num_bits == 4
    theirs = torch.from_numpy(gguf.dequantize(rounded.numpy(), gguf.GGMLQuantizationType.Q4_0))
    assert torch.equal(source.coded(entry.name).dense(), theirs)
    constants.pop(specs.pop().name)
    GgufFiles([plan]).create(tmp_path)
    with pytest.raises(CheckpointError, match=r"halfbyte\.tensors are on other tensors than the file has: "):
        open_source(tmp_path / "m.gguf", "auto")
    metadata["halfbyte.tensors"] = ("[]", "STRING")
    GgufFiles([plan]).create(tmp_path)
    with pytest.raises(CheckpointError, match="are not what halfbyte writes"):
        open_source(tmp_path / "m.gguf", "auto")
