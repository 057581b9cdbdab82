"""``text:FILE``: consecutive windows of a text file.

To get the same windows with other software:

1. Read the file as UTF-8. Of a file with more than 64 characters for each token wanted (samples * seq_len), keep only
   that many characters from its start.
2. Tokenise it in one piece with the checkpoint's tokenizer and ``add_special_tokens=False``.
3. Let ``b`` be ``[bos]`` where the tokenizer puts a BOS before every text by itself, else ``[]``.
   Window ``i`` is ``b`` followed by tokens ``i * n`` to ``(i + 1) * n`` with ``n = seq_len - len(b)``.
4. Take the first ``samples`` windows; tokens that do not fill a window are dropped.
"""

from __future__ import annotations

from pathlib import Path

import torch

from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.tokenizing import encode, load_tokenizer, opening
from halfbyte.errors import CalibrationError

CHARACTERS_PER_TOKEN = 64


def text_windows(request: Request) -> Found:
    """Sequences of exactly ``seq_len`` tokens; fewer than ``samples`` when the text ends earlier.

    Raises:
        CalibrationError: the file cannot be read as UTF-8, or does not fill a single window.
    """
    text = read_text(Path(request.argument), limit=CHARACTERS_PER_TOKEN * request.samples * request.seq_len)
    tokenizer = load_tokenizer(request.model_path)
    windows, found = cut(encode(tokenizer, text, special=False), opening(tokenizer), request.seq_len, request.samples)
    if not windows:
        raise CalibrationError(
            f"too short: {found} tokens, and one window of --seq-len {request.seq_len} needs {request.seq_len}",
            where=request.argument,
            remedy="Give more text or a smaller --seq-len.",
        )
    description = f"{len(windows)} consecutive windows of {request.seq_len} tokens from {Path(request.argument).name}"
    if len(windows) < request.samples:
        description += f" (the text holds no more; {request.samples} were asked for)"
    return Found(sequences=windows, description=description)


def cut(ids: list[int], prefix: list[int], seq_len: int, samples: int) -> tuple[list[torch.Tensor], int]:
    """At most ``samples`` windows of ``seq_len`` tokens that each start with ``prefix``, and the tokens there were."""
    step = seq_len - len(prefix)
    count = min(samples, len(ids) // step)
    windows = [torch.tensor(prefix + ids[i * step : (i + 1) * step], dtype=torch.int64) for i in range(count)]
    return windows, len(prefix) + len(ids)


def read_text(path: Path, *, limit: int) -> str:
    """The first ``limit`` characters of a UTF-8 file."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read(limit)
    except FileNotFoundError:
        raise CalibrationError("there is no such file", where=str(path), remedy="Give a text file.") from None
    except UnicodeDecodeError as e:
        raise CalibrationError(
            f"is not UTF-8 text (byte {e.start})", where=str(path), remedy="Convert it to UTF-8."
        ) from None
    except OSError as e:
        raise CalibrationError(f"cannot be read: {e.strerror}", where=str(path)) from None
