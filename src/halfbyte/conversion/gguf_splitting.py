"""How text is split before byte-level BPE: Hugging Face writes it out, a GGUF names one of llama.cpp's ways.

A way of splitting is a tuple of regular expressions, each of which cuts what the one before it left; tokenizer.json
may spell the same one differently (:func:`expressions_of` brings them into one form). llama.cpp's expressions stand in
``src/llama-vocab.cpp`` under the names of :data:`SPLITTINGS`; the ones here are those of the tokenizers published with
the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # tokenizers' ByteLevel
DIGITS = r"\p{N}"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
NUMBERS, THREES = r"\p{N}+", "[0-9][0-9][0-9]"
GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """What a name in ``tokenizer.ggml.pre`` means.

    Attributes:
        expressions: in order; :data:`GPT2` last is what tokenizers' ByteLevel does itself.
        whole_words: pieces that are tokens are not merged (tokenizer.json's ``ignore_merges``).
        adds_bos: whether BOS comes before a text where the file does not say.
        differs: what llama.cpp does otherwise under this name, for the notes.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    differs: str = ""


# llama.cpp (src/llama-vocab.cpp) writes these two expressions without the class of marks, and capitals as A-Z.
_MARKS = (
    "tokenizer: llama.cpp cuts words of this tokenizer's kind at combining marks (Devanagari, Thai, ...) and tells "
    "capitals in Latin script alone; such text can become other tokens than in transformers"
)


SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting(expressions=(GPT2,)),
    "default": Splitting(expressions=(PUNCTUATION, GPT2, NUMBERS, THREES)),  # a file's that names none, too
    "smollm": Splitting(expressions=(DIGITS, GPT2)),
    "llama-bpe": Splitting(expressions=(LLAMA3,), whole_words=True, adds_bos=True),
    "qwen2": Splitting(expressions=(QWEN2,)),
    "tekken": Splitting(expressions=(TEKKEN,), whole_words=True, adds_bos=True, differs=_MARKS),
    "gpt-4o": Splitting(expressions=(GPT4O,), differs=_MARKS),
}
# Further names that llama.cpp gives the same expressions.
ALIASES: Mapping[str, str] = {
    "gpt2": "gpt-2",
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
    "jais": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "llama4": "gpt-4o",
}


def splitting_named(name: str) -> Splitting | None:
    """What ``tokenizer.ggml.pre`` says, ``None`` for a name that is not known here."""
    return SPLITTINGS.get(ALIASES.get(name, name))


def name_of(expressions: tuple[str, ...], whole_words: bool) -> str | None:
    """llama.cpp's name for a way of splitting, ``None`` where it has none."""
    return next(
        (n for n, s in SPLITTINGS.items() if s.expressions == expressions and s.whole_words == whole_words), None
    )


def expressions_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions of a ``pre_tokenizer`` in tokenizer.json, ``None`` where it does something else."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    found: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"].get("Regex")
            if pattern is None:
                return None
            found.append(DIGITS if pattern in (r"\p{N}", r"\d", "[0-9]") else _plain(pattern))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                found.append(GPT2)
        else:
            return None
    return tuple(found)


def _plain(pattern: str) -> str:
    """One spelling of contractions in any case."""
    spelled = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    return pattern.replace(spelled, _CONTRACTIONS)
