"""A text as windows of tokens in which every token is scored exactly once.

The text is tokenised once, without special tokens. Where the tokenizer opens texts with BOS (models trained that way
predict nonsense without it), each window is BOS and the next ``length - 1`` tokens, and each of these is a target.
Otherwise window k holds tokens ``k L .. k L + L - 1`` and its targets are those tokens shifted by one, so that every
token but the text's first is a target once. The last window may be shorter.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from halfbyte.errors import CalibrationError, CheckpointError

MIN_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """``inputs [n]``, ``targets [m]`` int64, m <= n; the prediction at position i is scored against ``targets[i]``."""

    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """All windows of a text, with what to call it and its hash."""

    windows: list[Window]
    name: str
    sha256: str

    @property
    def tokens(self) -> int:
        return sum(len(w.targets) for w in self.windows)


def cut(token_ids: torch.Tensor, bos: int | None, length: int) -> list[Window]:
    """Deal a text's tokens to windows of ``length`` inputs, see the module's docstring."""
    if bos is not None:
        opening = torch.tensor([bos], dtype=torch.int64)
        return [
            Window(inputs=torch.cat([opening, chunk]), targets=chunk) for chunk in torch.split(token_ids, length - 1)
        ]
    return [
        Window(inputs=token_ids[i : i + length][: len(token_ids) - 1 - i], targets=token_ids[i + 1 : i + 1 + length])
        for i in range(0, len(token_ids) - 1, length)
    ]


def windows_of(model_path: Path, text: Path | None, tokens: int | None, length: int) -> Windows:
    """Tokenise ``text`` (a short one of our own by default) with a checkpoint's tokenizer and cut it.

    Args:
        model_path: checkpoint folder.
        text: UTF-8 file.
        tokens: score at most so many; ``None`` scores all.
        length: inputs in a window.

    Raises:
        CalibrationError: the text is unreadable or too short.
        CheckpointError: there is no usable tokenizer.
    """
    from transformers import AutoTokenizer

    name = "halfbyte's own short text" if text is None else text.name
    try:
        source = files("halfbyte") / "data" / "demo_text.txt" if text is None else text
        content = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(
            f"cannot be read as UTF-8 text: {e}", where=str(text), remedy="Give a text file."
        ) from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise CheckpointError(
            f"its tokenizer cannot be loaded: {str(e).splitlines()[0]}",
            where=str(model_path),
            remedy="Add the tokenizer files of the original checkpoint.",
        ) from None
    token_ids = torch.tensor(
        tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )
    opening = tokenizer("a", verbose=False)["input_ids"][:1]
    bos = tokenizer.bos_token_id if opening and opening[0] == tokenizer.bos_token_id else None
    if tokens is not None:
        token_ids = token_ids[: tokens if bos is not None else tokens + 1]
    if len(token_ids) < MIN_TOKENS:
        raise CalibrationError(
            f"gives {len(token_ids)} tokens, and at least {MIN_TOKENS} are needed", where=name, remedy="Give more text."
        )
    return Windows(windows=cut(token_ids, bos, length), name=name, sha256=hashlib.sha256(content.encode()).hexdigest())
