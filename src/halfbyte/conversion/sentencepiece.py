"""SentencePiece's ``.model`` files, read without its library: pieces, scores and types, and a few settings.

The file is one protocol buffer. Read of it: ``pieces`` (field 1: text 1, score 2, type 3), ``trainer_spec`` (field 2:
model_type 3, unk_id 40, bos_id 41, eos_id 42, pad_id 43) and ``normalizer_spec`` (field 3: precompiled_charsmap 2,
add_dummy_prefix 3, remove_extra_whitespaces 4); everything else is skipped. Source: ``sentencepiece_model.proto`` in
google/sentencepiece; the wire format is described at protobuf.dev/programming-guides/encoding.

Types of pieces have the numbers that a GGUF has for them as well: 1 normal, 2 unknown, 3 control, 4 user-defined,
5 unused, 6 byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import CheckpointError

BPE = 2
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a model file says.

    Attributes:
        pieces, scores, kinds: of every token.
        is_bpe: whether it merges pairs; otherwise it is a unigram, word or character model.
        unknown_id, bos_id, eos_id, pad_id: below zero where there is none.
        adds_space: whether a space is put before every text.
        is_plain: whether text is taken as it is but for spaces: no table of characters, no spaces removed.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    is_bpe: bool
    unknown_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    adds_space: bool
    is_plain: bool


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Parse a model file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return _parsed(file.read_bytes())
    except (ValueError, IndexError, struct.error, OSError) as e:
        raise CheckpointError(
            f"is no SentencePiece model ({e})", where=str(file), remedy="Download it again, or give a tokenizer.json."
        ) from None


def _parsed(raw: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1:
            piece = dict(_fields(_octets(value)))
            pieces.append(_octets(piece[1]).decode("utf-8"))
            scores.append(struct.unpack("<f", _octets(piece.get(2, b"\0\0\0\0")))[0])
            kinds.append(_whole(piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(_octets(value)))
        elif number == 3:
            normalizer = dict(_fields(_octets(value)))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        kinds=kinds,
        is_bpe=_whole(trainer.get(3, 1)) == BPE,
        unknown_id=_whole(trainer.get(40, 0)),
        bos_id=_whole(trainer.get(41, 1)),
        eos_id=_whole(trainer.get(42, 2)),
        pad_id=_whole(trainer.get(43, -1)),
        adds_space=bool(_whole(normalizer.get(3, 1))),
        is_plain=not normalizer.get(2) and not _whole(normalizer.get(4, 1)),
    )


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; fixed-size values as bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(raw, at)
        elif kind in (_FOUR, _EIGHT):
            size = 4 if kind == _FOUR else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(raw):
            raise ValueError("it ends in the middle of a field")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, lowest first; negative ones are 64 bits wide."""
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return (value if value < 1 << 63 else value - (1 << 64)), at
        if shift > 63:
            raise ValueError("a number is too long")


def _octets(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where text should")
    return value


def _whole(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("text stands where a number should")
    return value
