"""Calibration sequences, how they are hashed, and how they are dealt into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from halfbyte.records import CalibrationRecord

PADDING_ID = 0
# Few enough that a batch's activations stay in a CPU's cache: 4096 run a third slower (docs/log.md).
TOKENS_PER_BATCH = 1024
# Enough that a matrix product of a batch keeps a large GPU busy, and that its second moment costs more than adding it.
TOKENS_PER_BATCH_ON_GPU = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of similar length, padded on the right with :data:`PADDING_ID`.

    In a causal model a token never sees what stands to its right, so the padding needs no attention mask; it must only
    be kept out of the statistics, which ``lengths`` is for.

    Attributes:
        token_ids: int64 [batch, longest].
        lengths: int64 [batch], the real tokens of each row.
    """

    token_ids: torch.Tensor
    lengths: torch.Tensor
    inputs: Callable[[], dict[str, torch.Tensor]] | None = None

    @property
    def tokens(self) -> int:
        """Real tokens in the batch, padding not counted."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the statistics are gathered on.

    Attributes:
        record: where the tokens come from, and their hash.
        sequences: int64 [length] each, none empty, none longer than ``record.seq_len``.
    """

    record: CalibrationRecord
    sequences: list[torch.Tensor]

    def batches(self, tokens_per_batch: int) -> list[Batch]:
        """Deal the sequences into batches, longest first, ties in the order of ``sequences``.

        A batch holds as many rows as fit into ``tokens_per_batch`` at its longest row's length, and at least one.
        """
        order = sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i]))
        batches, start = [], 0
        while start < len(order):
            rows = max(1, tokens_per_batch // len(self.sequences[order[start]]))
            batches.append(_pad([self.sequences[i] for i in order[start : start + rows]]))
            start += rows
        return batches


def _pad(rows: Sequence[torch.Tensor]) -> Batch:
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
    token_ids = torch.full((len(rows), int(lengths.max())), PADDING_ID, dtype=torch.int64)
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
    return Batch(token_ids=token_ids, lengths=lengths)


def digest_of_sequences(sequences: Iterable[torch.Tensor]) -> str:
    """sha256 over each sequence in turn: its length, then its token ids, all as little-endian int64."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()
