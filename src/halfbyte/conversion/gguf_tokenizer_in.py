"""The tokenizer in a GGUF as Hugging Face files.

A GGUF keeps tokens, their types and merges or scores. How text is split stands behind a name that llama.cpp knows
(:mod:`halfbyte.conversion.gguf_splitting`), and what goes around a text behind two flags. (transformers' own conversion
takes the wrong EOS for SmolLM2, and for Gemma a Unigram model without BOS, which needs twice as many tokens.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.conversion.gguf_splitting import GPT2, SPLITTINGS, Splitting, splitting_named
from halfbyte.conversion.gguf_tokenizer_out import (
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    merges_from_scores,
)
from halfbyte.errors import CheckpointError

_PREFIX = "tokenizer."


def tokenizer_files(metadata: Mapping[str, Any], context_length: int, where: str) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and, where there is one, ``chat_template.jinja``.

    Args:
        metadata: of the whole file.
        context_length: what becomes ``model_max_length``.
        where: for messages.

    Raises:
        CheckpointError: there is no tokenizer, or none of the kinds that halfbyte reads.
    """
    fields = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
    kind = fields.get("ggml.model")
    if kind == "gpt2":
        whole = _byte_level(fields, where)
    elif kind == "llama":
        whole = _sentencepiece(fields, where)
    else:
        raise CheckpointError(
            f"holds a tokenizer of kind {kind}" if kind else "holds no tokenizer",
            where=where,
            why="byte-level BPE (gpt2) and SentencePiece BPE (llama) are read",
            remedy="Put the model's tokenizer files and config.json into the same folder and give the folder.",
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    tokens = fields["ggml.tokens"]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        i = fields.get(f"ggml.{key}_token_id")
        if i is not None and 0 <= i < len(tokens):
            config[f"{name}_token"] = tokens[i]
    files = {"tokenizer.json": _json(whole), "tokenizer_config.json": _json(config)}
    if template := fields.get("chat_template"):
        files["chat_template.jinja"] = template.encode("utf-8")
    return files


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")


def _tokens(fields: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens = fields.get("ggml.tokens")
    kinds = fields.get("ggml.token_type") or [1] * len(tokens or [])
    if not tokens or len(kinds) != len(tokens):
        raise CheckpointError("its tokenizer lists no tokens, or other than as many types", where=where)
    return tokens, kinds


def _whole(
    model: Mapping[str, Any],
    added: Sequence[Mapping[str, Any]],
    around: tuple[list[str], list[str]],
    vocabulary: Mapping[str, int],
    **steps: Any,
) -> dict[str, Any]:
    """tokenizer.json; ``around`` are the tokens before and behind a text."""
    before, behind = around
    processor = None
    if before or behind:

        def template(letter: str, number: int) -> list[dict[str, Any]]:
            special = [[{"SpecialToken": {"id": t, "type_id": number}} for t in side] for side in around]
            return [*special[0], {"Sequence": {"id": letter, "type_id": number}}, *special[1]]

        processor = {
            "type": "TemplateProcessing",
            "single": template("A", 0),
            "pair": template("A", 0) + template("B", 1),
            "special_tokens": {
                t: {"id": t, "ids": [vocabulary[t]], "tokens": [t]} for t in dict.fromkeys([*before, *behind])
            },
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": processor,
        "decoder": None,
        **steps,
        "model": dict(model),
    }


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": SPACE in token,  # runs of spaces are looked for behind the normalizer, which makes them
            "special": kind != USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _around(fields: Mapping[str, Any], tokens: Sequence[str], bos_by_default: bool) -> tuple[list[str], list[str]]:
    bos, eos = fields.get("ggml.bos_token_id"), fields.get("ggml.eos_token_id")
    before = [tokens[bos]] if bos is not None and fields.get("ggml.add_bos_token", bos_by_default) else []
    behind = [tokens[eos]] if eos is not None and fields.get("ggml.add_eos_token", False) else []
    return before, behind


def _byte_level(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    tokens, kinds = _tokens(fields, where)
    name = fields.get("ggml.pre", "default")
    splitting = splitting_named(name)
    if splitting is None:
        raise CheckpointError(
            f"its tokenizer splits text as {name!r} does, which halfbyte does not know",
            where=where,
            why=f"known are {', '.join(SPLITTINGS)}",
            remedy="Put the model's tokenizer files and config.json into the same folder and give the folder.",
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": splitting.whole_words,
        "vocab": vocabulary,
        "merges": [m.split(" ", 1) for m in fields.get("ggml.merges", [])],
    }
    return _whole(
        model,
        _added(tokens, kinds),
        _around(fields, tokens, splitting.adds_bos),
        vocabulary,
        pre_tokenizer=_pre_tokenizer(splitting),
        decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    )


def _pre_tokenizer(splitting: Splitting) -> dict[str, Any]:
    *before, last = splitting.expressions
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": False}
        for e in (before if last == GPT2 else splitting.expressions)
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last == GPT2})
    return {"type": "Sequence", "pretokenizers": steps}


def _sentencepiece(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    listed, kinds = _tokens(fields, where)
    scores = fields.get("ggml.scores")
    if scores is None or len(scores) != len(listed):
        raise CheckpointError("its tokenizer has no scores, or other than one a token", where=where)
    # A GGUF writes runs of spaces that are looked for in the text as they are, SentencePiece as runs of U+2581. Behind
    # a normalizer that puts one before every piece of text, these would not be found: there they stay as they are.
    prefix = fields.get("ggml.add_space_prefix", True)
    tokens = [SPACE * len(t) if t and not t.strip(" ") and not prefix else t for t in listed]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = fields.get("ggml.unknown_token_id")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [list(m) for m in merges_from_scores(tokens, kinds, scores, vocabulary)],
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: dict[str, Any] = spaces
    if prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _whole(
        model,
        _added(tokens, kinds),
        _around(fields, tokens, True),
        vocabulary,
        normalizer=normalizer,
        decoder={"type": "Sequence", "decoders": decoders},
    )
