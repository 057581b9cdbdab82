"""``random-tokens``: ids drawn uniformly from the whole vocabulary, special tokens included.

That is how Neural Magic's W8A8 cards calibrate ("random.randint(0, max_token_id)" with max_token_id the size of the
tokenizer's vocabulary less one). It needs no text and no tokenizer, and suits 8-bit schemes; at 4 bits, text is better,
since random ids visit parts of the activation space that language never does.
"""

from __future__ import annotations

import torch

from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.tokenizing import has_tokenizer, load_tokenizer, text_config
from halfbyte.errors import CheckpointError


def random_ids(request: Request) -> Found:
    """``samples`` sequences of ``seq_len`` ids, uniform over ``0 .. n - 1``.

    ``n`` is the tokenizer's vocabulary, added tokens included, but never more than the model has embeddings for (the
    config's ``vocab_size``), which alone counts where there is no tokenizer.
    """
    rows = text_config(request.model_path).get("vocab_size")
    sizes = [rows] if isinstance(rows, int) and rows > 0 else []
    if has_tokenizer(request.model_path):
        sizes.append(len(load_tokenizer(request.model_path)))
    if not sizes:
        raise CheckpointError(
            "gives no vocab_size, and there is no tokenizer to count",
            where=str(request.model_path / "config.json"),
            remedy="Add vocab_size to it.",
        )
    n = min(sizes)
    generator = torch.Generator().manual_seed(request.seed)
    ids = torch.randint(n, (request.samples, request.seq_len), generator=generator, dtype=torch.int64)
    return Found(
        sequences=list(ids), description=f"{request.samples} x {request.seq_len} ids, uniform over all {n} tokens"
    )
