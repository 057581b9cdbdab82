"""Cut a text into the token windows that halfbyte's ``text:FILE`` calibration uses, independently of its code.

    python make_windows.py MODEL TEXT OUT.npy --samples 64 --seq-len 512

Of a text with more than 64 characters for each token wanted, only that many from its start are kept; the text is then
tokenised once, without special tokens. Where the tokenizer puts a beginning-of-sequence token in front of
a text, each window is that token and the next seq_len - 1 text tokens; otherwise it is the next seq_len text tokens.
The first ``samples`` windows are taken. Prints one JSON object with the sha256 of the windows (see ``digest``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy
from transformers import AutoTokenizer

CHARACTERS_PER_TOKEN = 64


def text_tokens(model: Path, text: Path, wanted: int) -> tuple[list[int], int | None]:
    """Ids of the text, and the token that the tokenizer puts in front of a text (``None`` for none)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    content = text.read_text(encoding="utf-8")[: CHARACTERS_PER_TOKEN * wanted]
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    probe = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
    return ids, tokenizer.bos_token_id if adds_bos else None


def cut(ids: list[int], bos: int | None, samples: int, seq_len: int) -> numpy.ndarray:
    """The first ``samples`` windows, int64 [samples, seq_len]."""
    step = seq_len if bos is None else seq_len - 1
    if len(ids) < samples * step:
        raise SystemExit(f"the text has {len(ids)} tokens, too few for {samples} windows of {seq_len}")
    body = numpy.asarray(ids[: samples * step], dtype=numpy.int64).reshape(samples, step)
    if bos is None:
        return body
    return numpy.concatenate([numpy.full((samples, 1), bos, dtype=numpy.int64), body], axis=1)


def digest(windows: numpy.ndarray) -> str:
    """sha256 over every window in order: its length, then its ids, all as little-endian int64."""
    sha = hashlib.sha256()
    for row in windows:
        sha.update(numpy.asarray([row.size], dtype="<i8").tobytes())
        sha.update(row.astype("<i8").tobytes())
    return sha.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    ids, bos = text_tokens(options.model, options.text, options.samples * options.seq_len)
    windows = cut(ids, bos, options.samples, options.seq_len)
    numpy.save(options.out, windows)
    print(json.dumps({"sha256": digest(windows), "shape": list(windows.shape), "bos": bos, "text_tokens": len(ids)}))


if __name__ == "__main__":
    main()
