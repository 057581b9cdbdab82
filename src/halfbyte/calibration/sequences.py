"""Calibration sequences, how they are hashed, and how they are dealt into batches."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from halfbyte.calibration.pictured import Pictured, Processing, Shapes
from halfbyte.errors import CalibrationError
from halfbyte.records import CalibrationRecord

PADDING_ID = 0
# Few enough that a batch's activations stay in a CPU's cache: 4096 run a third slower (docs/log.md).
TOKENS_PER_BATCH = 1024
# Where blocks are tuned: a step of effort standard, half the time for a few per cent of divergence (docs/log.md).
TOKENS_PER_STEP = 512
# Enough that a matrix product of a batch keeps a large GPU busy, and that its second moment costs more than adding it.
TOKENS_PER_BATCH_ON_GPU = 4096


def tokens_per_batch(device: str, *, tuned: bool = False) -> int:
    """As many as a device needs to be busy. Tuning holds a whole block's activations of a batch, so it takes few."""
    few, many = (TOKENS_PER_STEP, TOKENS_PER_BATCH) if device == "cpu" else (TOKENS_PER_BATCH, TOKENS_PER_BATCH_ON_GPU)
    return few if tuned else many


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of similar length, padded on the right with :data:`PADDING_ID`.

    In a causal model a token never sees what stands to its right, so the padding needs no attention mask; it must only
    be kept out of the statistics, which ``lengths`` is for. Rows with pictures are never padded, and never share a
    batch with rows without.

    Attributes:
        token_ids: int64 [batch, longest].
        lengths: int64 [batch], the real tokens of each row.
        inputs: where the rows have pictures, makes what the model takes besides tokens and their mask: ``pixel_values``
            and whatever else its processor makes, by name, rows joined along the first dimension. Each call decodes
            the pictures anew. ``None`` for text.
        samples: the number of each row in the calibration set.
    """

    token_ids: torch.Tensor
    lengths: torch.Tensor
    inputs: Callable[[], dict[str, torch.Tensor]] | None = None
    samples: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Real tokens in the batch, padding not counted."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the statistics are gathered on.

    Attributes:
        record: where the tokens come from, and their hash.
        sequences: int64 [length] each, none empty, none longer than ``record.seq_len``. Where a sample has pictures,
            each of their placeholders is as many tokens as the picture takes.
        pictured: by number in ``sequences``, the samples that have pictures.
        processing: the checkpoint's processor, which makes inputs of them; needed where there are any.
    """

    record: CalibrationRecord
    sequences: list[torch.Tensor]
    pictured: Mapping[int, Pictured] = field(default_factory=dict)
    processing: Processing | None = None

    @property
    def texts(self) -> list[int]:
        """Numbers of the samples without pictures."""
        return [i for i in range(len(self.sequences)) if i not in self.pictured]

    def batches(self, tokens_per_batch: int) -> list[Batch]:
        """Deal the sequences into batches, longest first, ties in the order of ``sequences``.

        A batch holds as many rows as fit into ``tokens_per_batch`` at its longest row's length, and at least one.
        Samples with pictures come after all others; those in one batch have the same length, and their pictures become
        tensors of the same shapes, so that there is nothing to pad or to mask.
        """
        batches = [self._batch(rows) for rows in self._dealt(self.texts, tokens_per_batch)]
        alike: defaultdict[tuple[int, Shapes], list[int]] = defaultdict(list)
        for i in sorted(self.pictured, key=lambda i: (-len(self.sequences[i]), i)):
            alike[len(self.sequences[i]), self.pictured[i].shapes].append(i)
        return batches + [
            self._batch(rows) for group in alike.values() for rows in self._dealt(group, tokens_per_batch)
        ]

    def _dealt(self, numbers: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
        order = sorted(numbers, key=lambda i: -len(self.sequences[i]))
        dealt, start = [], 0
        while start < len(order):
            rows = max(1, tokens_per_batch // len(self.sequences[order[start]]))
            dealt.append(order[start : start + rows])
            start += rows
        return dealt

    def _batch(self, numbers: list[int]) -> Batch:
        token_ids, lengths = _pad([self.sequences[i] for i in numbers])
        inputs = None
        if numbers[0] in self.pictured:
            if self.processing is None:
                raise CalibrationError("the calibration set has pictures, and there is no processor to prepare them")
            inputs = partial(self.processing.inputs, [self.pictured[i] for i in numbers], token_ids)
        return Batch(token_ids=token_ids, lengths=lengths, inputs=inputs, samples=tuple(numbers))


def _pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
    token_ids = torch.full((len(rows), int(lengths.max())), PADDING_ID, dtype=torch.int64)
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
    return token_ids, lengths


def digest_of_sequences(sequences: Iterable[torch.Tensor], pictured: Mapping[int, Pictured] | None = None) -> str:
    """sha256 over each sequence in turn: its length, then its token ids, all as little-endian int64.

    For each sample with pictures, in order, follow its number, how many there are, and for each the length of its file
    and the file.
    """
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    for number, sample in sorted((pictured or {}).items()):
        digest.update(number.to_bytes(8, "little") + len(sample.pictures).to_bytes(8, "little"))
        for picture in sample.pictures:
            digest.update(len(picture).to_bytes(8, "little") + picture)
    return digest.hexdigest()
