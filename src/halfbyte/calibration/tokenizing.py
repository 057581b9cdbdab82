"""A checkpoint's own tokenizer, loaded without code from the checkpoint and without noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.records import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
)
NO_LIMIT = 10**18  # so that tokenising a whole book is not warned about


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and bars off the screen while its loaders run."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def text_config(model_path: Path) -> Mapping[str, Any]:
    """The language model's part of ``config.json``."""
    config = read_json(model_path / "config.json")
    return Checkpoint(path=model_path, name=str(model_path), config=config, tensors={}).text_config


def has_tokenizer(model_path: Path) -> bool:
    """Whether the folder holds a file that a tokenizer could be built from."""
    return any((model_path / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(model_path: Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be loaded without running code from the checkpoint.
    """
    remedy = (
        "Copy the tokenizer files of the original model into it, or calibrate with random-tokens, which needs none."
    )
    if not has_tokenizer(model_path):
        raise CheckpointError("holds no tokenizer files", where=str(model_path), remedy=remedy)
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                model_path, trust_remote_code=False, local_files_only=True, model_max_length=NO_LIMIT
            )
    except Exception as e:  # the loaders raise whatever their parsers raise
        raise CheckpointError(
            f"its tokenizer cannot be loaded: {type(e).__name__}: {first_line(e)}", where=str(model_path), remedy=remedy
        ) from None
    # Where older multimodal checkpoints keep the template; transformers reads it for their processor alone.
    beside = model_path / "chat_template.json"
    if not tokenizer.chat_template and beside.exists():
        kept = read_json(beside)
        tokenizer.chat_template = kept.get("chat_template") if isinstance(kept, dict) else None
    return tokenizer


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text, with the special tokens that the model wants around it (``special``) or without."""
    with quiet():
        return list(tokenizer(text, add_special_tokens=special).input_ids)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself: ``[bos]``, or nothing."""
    bare, dressed = encode(tokenizer, "a", special=False), encode(tokenizer, "a", special=True)
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and dressed[:1] == [bos] and bare[:1] != [bos] else []


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line, for messages of one line."""
    return next(iter(str(error).strip().splitlines()), "no message")
