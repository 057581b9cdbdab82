"""The tokenizer of a Flax checkpoint: SentencePiece's file read without its library, against the library."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

import tiny
from halfbyte.conversion.gemma3_tokenizer import SPECIAL, TEMPLATE, find_tokenizer
from halfbyte.conversion.sentencepiece import read_sentencepiece
from halfbyte.errors import CheckpointError

PARTS = (
    "the",
    "a ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "é",
    "漢字",
    "🙂",
    "ferry",
    "<end_of_turn>",
    "<start_of_image>",
    "1984",
    "\t",
)
PARTS += ("ing", "bay.", ",", "<bos", "\u2581", "fog", "   ")


def sentencepiece_like_gemmas(scratch: Path, vocab: int, **other: Any) -> bytes:
    """A model trained on our text with the settings of Gemma's: BPE, byte fallback, whitespace kept, runs as pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    scratch.mkdir(exist_ok=True)
    (scratch / "text.txt").write_text(tiny.TEXT)
    settings: dict[str, Any] = {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "unk_piece": "<unk>",
        "user_defined_symbols": [*SPECIAL[4:], "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581"],
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(scratch / "text.txt"), model_prefix=str(scratch / "model"), vocab_size=vocab, **(settings | other)
    )
    return (scratch / "model.model").read_bytes()


def save(tmp_path: Path, *, tower: bool, vocab: int = 400) -> Path:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", vocab))
    out = tmp_path / "out"
    out.mkdir()
    for name, content in find_tokenizer(file, [], chat=True, tower=tower, vocab=vocab).written.items():
        (out / name).write_bytes(content)
    (out / "config.json").write_text(json.dumps({"model_type": "gemma3" if tower else "gemma3_text"}))
    return out


@pytest.mark.parametrize("tower", [False, True])
def test_ids_are_those_of_sentencepiece(tower: bool, tmp_path: Path) -> None:
    out = save(tmp_path, tower=tower)
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    chance = random.Random(7)
    texts = [tiny.TEXT, "", *("".join(chance.choices(PARTS, k=chance.randint(1, 25))) for _ in range(300))]
    for text in texts:
        assert tokenizer(text).input_ids == [library.bos_id(), *library.encode(text)], repr(text)
    assert tokenizer.decode(tokenizer("Hi <end_of_turn>").input_ids, skip_special_tokens=True) == "Hi "
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert ("<image_soft_token>" in tokenizer.get_vocab()) == tower
    if tower:
        assert tokenizer.image_token_id == 400
        assert tokenizer.boi_token == "<start_of_image>"


def test_the_file_says_what_the_library_says(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", 350))
    library = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(file))
    found = read_sentencepiece(file)
    count = library.get_piece_size()
    assert found.pieces == [library.id_to_piece(i) for i in range(count)]
    assert found.scores == [library.get_score(i) for i in range(count)]
    assert [k == 3 for k in found.kinds] == [library.is_control(i) for i in range(count)]
    assert [k == 6 for k in found.kinds] == [library.is_byte(i) for i in range(count)]
    assert (found.pad_id, found.eos_id, found.bos_id, found.unknown_id) == (0, 1, 2, 3)
    assert found.is_bpe
    assert found.is_plain
    assert not found.adds_space


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"model_type": "unigram"}, "merges or normalises otherwise"),
        ({"add_dummy_prefix": True}, "merges or normalises otherwise"),
        ({"normalization_rule_name": "nmt_nfkc"}, "merges or normalises otherwise"),
        ({"user_defined_symbols": ["<start_of_turn>"]}, "it has no <end_of_turn>"),
    ],
)
def test_other_models_tokenizers_are_refused(other: dict[str, Any], why: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", 350, **other))
    with pytest.raises(CheckpointError, match=why):
        find_tokenizer(file, [], chat=True, tower=False, vocab=350)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a SentencePiece model",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x0a\x05\x0a\x03abc"[:-1],
        b"\x08\x01",
        b"\xff" * 40,
    ],
)
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no SentencePiece model"):
        read_sentencepiece(file)


def test_the_chat_template_writes_turns_as_gemma_reads_them() -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<bos>")
    tokenizer.chat_template = TEMPLATE

    def text(messages: Any, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello. "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    assert text(turns, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello.<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n"
        "<start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="turns of user and assistant"):
        text([turns[1], turns[1]])
