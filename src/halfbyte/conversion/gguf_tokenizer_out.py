"""A Hugging Face tokenizer as the metadata that llama.cpp reads.

Two kinds: byte-level BPE ("gpt2": tokens, merges, the name of a way of splitting) and SentencePiece BPE ("llama":
tokens with scores). tokenizer.json has merges for both; SentencePiece's scores are recovered from their order, and it
is checked that llama.cpp, which merges any two tokens whose union is a token, would find these merges and no others.

Does not cover: Unigram and WordPiece, normalisation other than SentencePiece's spaces (llama.cpp does none; Qwen's NFC
is left out, and the notes say so).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.checkpoint.reader import TEMPLATES_FOLDER
from halfbyte.conversion.gguf_families import Metadata
from halfbyte.conversion.gguf_splitting import SPLITTINGS, expressions_of, name_of
from halfbyte.records import parse_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types in a GGUF vocabulary
SPACE = "\u2581"  # SentencePiece's space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(slots=True)
class TokenizerFiles:
    """What was found of a tokenizer: the parsed files and the chat templates by name ("default" is the usual one)."""

    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    templates: Mapping[str, str]


@dataclass(slots=True)
class WrittenTokenizer:
    """Metadata, with what llama.cpp will do otherwise (``notes``) and why there is none (``problems``)."""

    metadata: Metadata = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_tokenizer_files(files: Mapping[str, bytes]) -> TokenizerFiles | None:
    """From the contents of tokenizer.json (``None`` without it), tokenizer_config.json and chat templates."""
    if "tokenizer.json" not in files:
        return None
    config = parse_object(files, "tokenizer_config.json")
    templates: dict[str, str] = {}
    given = config.get("chat_template")
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        templates |= {t["name"]: t["template"] for t in given}
    for name, content in files.items():
        if name == "chat_template.jinja":
            templates["default"] = content.decode("utf-8")
        elif name == "chat_template.json":
            template = parse_object(files, name).get("chat_template")
            templates |= {"default": template} if isinstance(template, str) and "default" not in templates else {}
        elif name.startswith(f"{TEMPLATES_FOLDER}/"):
            templates[name.split("/")[1].removesuffix(".jinja")] = content.decode("utf-8")
    tokenizer = parse_object(files, "tokenizer.json")
    return TokenizerFiles(tokenizer=tokenizer, tokenizer_config=config, templates=templates)


def tokenizer_metadata(
    found: TokenizerFiles, vocab_size: int, ids: Mapping[str, Any], final_ids: Sequence[int] = ()
) -> WrittenTokenizer:
    """Metadata below ``tokenizer.``.

    Args:
        found: the tokenizer's files.
        vocab_size: rows of the embedding table; ids that no token has are filled.
        ids: ``bos_token_id`` and so on of the model's config, for what the tokenizer's own config does not name.
        final_ids: tokens at which generation ends (``eos_token_id`` of the generation config, all of them).
    """
    out = WrittenTokenizer()
    model = found.tokenizer.get("model", {})
    if model.get("type", "BPE") != "BPE":
        out.problems.append(f"a {model.get('type')} tokenizer: byte-level and SentencePiece BPE are converted")
        return out
    added = {t["id"]: t for t in found.tokenizer.get("added_tokens") or []}
    vocabulary: dict[str, int] = {**model["vocab"], **{t["content"]: i for i, t in added.items()}}
    beyond = [t for t, i in vocabulary.items() if i >= vocab_size]
    if beyond:
        out.problems.append(f"{len(beyond)} tokens have no row in the embedding table of {vocab_size}: {beyond[0]!r}")
        return out
    tokens: list[str | None] = [None] * vocab_size
    for token, i in vocabulary.items():
        tokens[i] = token
    for i, t in added.items():
        tokens[i] = t["content"]
    sentencepiece = bool(model.get("byte_fallback"))
    kinds = [_kind(t, added.get(i), model, sentencepiece) for i, t in enumerate(tokens)]
    texts = [_text(t, i, kinds[i], sentencepiece) for i, t in enumerate(tokens)]
    out.metadata |= {
        "tokenizer.ggml.model": ("llama" if sentencepiece else "gpt2", "STRING"),
        "tokenizer.ggml.tokens": (texts, "ARRAY"),
        "tokenizer.ggml.token_type": (kinds, "ARRAY"),
    }
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if sentencepiece:
        _sentencepiece(out, found, tokens, kinds, merges, vocabulary)
    else:
        _byte_level(out, found, merges)
    _special_tokens(out, found, vocabulary, ids, final_ids)
    if "default" in found.templates:
        out.metadata["tokenizer.chat_template"] = (found.templates["default"], "STRING")
    others = sorted(n for n in found.templates if n != "default")
    for name in others:
        out.metadata[f"tokenizer.chat_template.{name}"] = (found.templates[name], "STRING")
    if others:
        out.metadata["tokenizer.chat_templates"] = (others, "ARRAY")
    return out


def _kind(token: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any], sentencepiece: bool) -> int:
    if token is None:
        return UNUSED
    if sentencepiece and token == model.get("unk_token"):
        return UNKNOWN
    if sentencepiece and _BYTE_TOKEN.fullmatch(token):
        return BYTE
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return NORMAL


def _text(token: str | None, i: int, kind: int, sentencepiece: bool) -> str:
    """A token as a GGUF spells it. What is looked for in the text itself has plain spaces."""
    if token is None:
        return f"[PAD{i}]"
    return token.replace(SPACE, " ") if sentencepiece and kind == USER_DEFINED else token


def _byte_level(out: WrittenTokenizer, found: TokenizerFiles, merges: Sequence[tuple[str, ...]]) -> None:
    pre_tokenizer = found.tokenizer.get("pre_tokenizer")
    expressions = expressions_of(pre_tokenizer)
    whole_words = bool(found.tokenizer["model"].get("ignore_merges"))
    name = None if expressions is None else name_of(expressions, whole_words)
    if name is None:
        shown = json.dumps(pre_tokenizer)
        out.problems.append(
            f"the tokenizer splits text (ignore_merges {str(whole_words).lower()}) in a way that halfbyte knows no "
            f"name for in llama.cpp: {shown[:300]}"
        )
        return
    _normalizer(out, found.tokenizer.get("normalizer"), ())
    out.notes += [SPLITTINGS[name].differs] if SPLITTINGS[name].differs else []
    out.metadata["tokenizer.ggml.pre"] = (name, "STRING")
    if merges:
        out.metadata["tokenizer.ggml.merges"] = ([" ".join(m) for m in merges], "ARRAY")
    out.metadata["tokenizer.ggml.add_space_prefix"] = (False, "BOOL")


def _sentencepiece(
    out: WrittenTokenizer,
    found: TokenizerFiles,
    tokens: Sequence[str | None],
    kinds: Sequence[int],
    merges: Sequence[tuple[str, ...]],
    vocabulary: Mapping[str, int],
) -> None:
    scores = scores_from_merges(tokens, kinds, merges, vocabulary)
    made = {i for i, kind in enumerate(kinds) if kind == NORMAL}
    expected = {m for m in merges if vocabulary.get("".join(m)) in made}
    found_merges = set(merges_from_scores([t or "" for t in tokens], kinds, scores, vocabulary))
    if expected != found_merges:
        odd = sorted(found_merges ^ expected)
        out.problems.append(
            f"the tokenizer's merges are not SentencePiece's: {len(odd)} pairs such as {odd[0]} are merged by one of "
            "tokenizer.json and llama.cpp alone"
        )
        return
    _normalizer(out, found.tokenizer.get("normalizer"), ("Prepend", "Replace"))
    out.notes += _unreachable(found.tokenizer, set(map("".join, merges)))
    out.metadata |= {
        "tokenizer.ggml.pre": ("default", "STRING"),
        "tokenizer.ggml.scores": (scores, "ARRAY"),
        "tokenizer.ggml.add_space_prefix": (_prepends_space(found.tokenizer), "BOOL"),
        "tokenizer.ggml.remove_extra_whitespaces": (False, "BOOL"),
    }


def _unreachable(tokenizer: Mapping[str, Any], merged: set[str]) -> list[str]:
    """A note on tokens of spaces that SentencePiece and llama.cpp cut out of a text, and this tokenizer.json does not.

    tokenizers looks for added tokens that are not "normalized" before spaces have become U+2581.
    """
    prepends = _prepends_space(tokenizer)
    lost = [
        t["content"]
        for t in tokenizer.get("added_tokens") or []
        if not t.get("special") and SPACE in t["content"] and t["content"] not in merged
        if prepends or not t.get("normalized")
    ]
    if not lost:
        return []
    return [
        f"tokenizer: llama.cpp finds {len(lost)} tokens of spaces ({lost[0]!r} and so on) in a text, as SentencePiece "
        "does; this tokenizer.json does not"
    ]


def _normalizer(out: WrittenTokenizer, normalizer: Mapping[str, Any] | None, known: tuple[str, ...]) -> None:
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for kind in dict.fromkeys(s["type"] for s in steps):
        if kind in ("NFC", "NFKC"):
            out.notes.append(f"tokenizer: llama.cpp takes text as it is, without {kind} normalisation")
        elif kind not in known:
            out.problems.append(f"the tokenizer normalises text ({kind}), which llama.cpp does not do")


def _prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word (Llama 2, Mistral; not Gemma)."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    splitters = splitter.get("pretokenizers", [splitter])
    return any(s.get("type") == "Prepend" for s in steps) or any(
        s.get("type") == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in splitters
    )


def scores_from_merges(
    tokens: Sequence[str | None], kinds: Sequence[int], merges: Sequence[tuple[str, ...]], vocabulary: Mapping[str, int]
) -> list[float]:
    """Scores that rank tokens as merges do: -1 for what the first merge makes, -2 for the next token made, and so on.

    Tokens that no merge makes come after all, by their ids; what is no normal token has 0.
    """
    rank: dict[int, int] = {}
    for merge in merges:
        i = vocabulary.get("".join(merge))
        if i is not None:
            rank.setdefault(i, len(rank) + 1)
    scores = []
    last = len(rank)
    for i, kind in enumerate(kinds):
        if kind != NORMAL or tokens[i] is None:
            scores.append(0.0)
        elif i in rank:
            scores.append(-float(rank[i]))
        else:
            last += 1
            scores.append(-float(last))
    return scores


def merges_from_scores(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """SentencePiece keeps a score a token and no merges: any split of a token into two tokens is a merge with its rank.

    Merges are ordered by falling score of what they make; those that make the same token, by their parts' ids.
    """
    merges: list[tuple[float, int, int, int]] = []
    for i, token in enumerate(tokens):
        if kinds[i] == NORMAL:
            for k in range(1, len(token)):
                left, right = vocabulary.get(token[:k]), vocabulary.get(token[k:])
                if left is not None and right is not None:
                    merges.append((-scores[i], i, left, right))
    merges.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in merges]


def _special_tokens(
    out: WrittenTokenizer,
    found: TokenizerFiles,
    vocabulary: Mapping[str, int],
    ids: Mapping[str, Any],
    final_ids: Sequence[int],
) -> None:
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i: Any = _special_id(found.tokenizer_config.get(f"{key}_token"), vocabulary)
        if i is None:
            given = ids.get(f"{key}_token_id")
            i = given[0] if isinstance(given, list) and given else given
        if isinstance(i, int) and 0 <= i < len(out.metadata["tokenizer.ggml.tokens"][0]):
            out.metadata[f"tokenizer.ggml.{name}_token_id"] = (i, "UINT32")
    prefix, suffix = _around(found)
    bos = out.metadata.get("tokenizer.ggml.bos_token_id", (None, ""))[0]
    eos = out.metadata.get("tokenizer.ggml.eos_token_id", (None, ""))[0]
    if prefix not in ([], [bos]) or suffix not in ([], [eos]):
        out.problems.append(
            f"the tokenizer puts tokens {prefix} before and {suffix} behind a text; llama.cpp knows BOS before and EOS "
            "behind it"
        )
    out.metadata["tokenizer.ggml.add_bos_token"] = (bool(prefix), "BOOL")
    out.metadata["tokenizer.ggml.add_eos_token"] = (bool(suffix), "BOOL")
    tokens = out.metadata["tokenizer.ggml.tokens"][0]
    others = [i for i in dict.fromkeys(final_ids) if i != eos and 0 <= i < len(tokens)]
    for key, words in (("eot", ("eot", "end_of_turn", "im_end", "<|end|>")), ("eom", ("eom",))):
        match = next((i for i in others if any(w in tokens[i] for w in words)), None)
        if match is not None:
            out.metadata[f"tokenizer.ggml.{key}_token_id"] = (match, "UINT32")
            others.remove(match)
    free = [k for k in ("eot", "eom") if f"tokenizer.ggml.{k}_token_id" not in out.metadata]
    for key, i in zip(free, others, strict=False):
        out.metadata[f"tokenizer.ggml.{key}_token_id"] = (i, "UINT32")


def _special_id(token: Any, vocabulary: Mapping[str, int]) -> int | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return vocabulary.get(content) if isinstance(content, str) else None


def _around(found: TokenizerFiles) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text, by its template and the config's wish."""
    processor = found.tokenizer.get("post_processor") or {}
    vocabulary = {t["content"]: t["id"] for t in found.tokenizer.get("added_tokens") or []}
    before: list[int] = []
    behind: list[int] = []
    for step in processor.get("processors", [processor]):
        if step.get("type") != "TemplateProcessing":
            continue
        side = before
        for item in step["single"]:
            if "Sequence" in item:
                side = behind
            else:
                side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    for key, name, side in (("add_bos_token", "bos_token", before), ("add_eos_token", "eos_token", behind)):
        i = _special_id(found.tokenizer_config.get(name), vocabulary)
        if found.tokenizer_config.get(key) is True and i is not None and not side:
            side.append(i)
        elif found.tokenizer_config.get(key) is False:
            side.clear()
    return before, behind
