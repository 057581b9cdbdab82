"""A calibration sample with pictures: what is kept of it, and the model's inputs that are made of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration.pictures import decode
from halfbyte.calibration.processing import load_processor
from halfbyte.calibration.tokenizing import first_line, quiet
from halfbyte.errors import CalibrationError

TEXT_INPUTS = ("input_ids", "attention_mask")
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictured:
    """All that the model's inputs follow from, given the checkpoint's processor.

    Attributes:
        where: the row it comes from, for messages.
        text: what the chat template made of it, each picture a placeholder still.
        special: whether the tokenizer adds its own special tokens to ``text``.
        pictures: files as they were found (JPEG, PNG, ...), in the order of the placeholders: pixels would take a
            hundred times as much room.
        shapes: for each tensor that pictures become, its name and its shape without the first dimension; samples can
            share a batch where these agree.
    """

    where: str
    text: str
    special: bool
    pictures: tuple[bytes, ...]
    shapes: Shapes = ()


class Processing:
    """A checkpoint's processor, loaded when the first sample needs it."""

    def __init__(self, model_path: Path, processor: Any = None) -> None:
        self._model_path = model_path
        self._processor = processor

    @property
    def processor(self) -> Any:
        if self._processor is None:
            self._processor = load_processor(self._model_path)
        return self._processor

    def run(self, sample: Pictured) -> dict[str, torch.Tensor]:
        """What the processor makes of a sample: ``input_ids`` [1, tokens] and all that pictures become.

        Raises:
            CalibrationError: a picture cannot be read, or the processor refuses the sample.
        """
        images = [decode(data, f"{sample.where}, picture {i}") for i, data in enumerate(sample.pictures, 1)]
        try:
            with quiet():
                made = self.processor(
                    text=[sample.text],
                    images=[images] if images else None,
                    return_tensors="pt",
                    add_special_tokens=sample.special,
                )
        except Exception as e:  # processors raise whatever their steps raise
            raise CalibrationError(
                f"the model's processor refuses this row: {type(e).__name__}: {first_line(e)}",
                where=sample.where,
                remedy="Check the sizes of its pictures (very long or flat ones are refused by some models).",
            ) from None
        strange = [k for k, v in made.items() if not isinstance(v, torch.Tensor)]
        if strange:
            raise CalibrationError(
                f"the model's processor makes no tensor of {', '.join(strange)}",
                where=sample.where,
                remedy="Calibrate this model with text.",
            )
        return dict(made)

    def inputs(self, samples: Sequence[Pictured], token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a model takes besides ``input_ids`` and ``attention_mask`` for a batch.

        Tensors of several rows are joined along their first dimension. Those that hold one number for a token (such as
        ``token_type_ids``) are cut to the length of ``token_ids`` [rows, tokens].

        Raises:
            CalibrationError: tokens are not those that the calibration set was made with.
        """
        rows = [self.run(s) for s in samples]
        length = token_ids.shape[1]
        for sample, row, wanted in zip(samples, rows, token_ids, strict=True):
            if not torch.equal(row["input_ids"][0, :length], wanted):
                raise CalibrationError(
                    "the processor makes other tokens of this row than when the calibration set was made",
                    where=sample.where,
                    remedy="The checkpoint's tokenizer or processor files, or transformers, changed since: start anew.",
                )
        names = [k for k in rows[0] if k not in TEXT_INPUTS]
        return {k: torch.cat([_cut(row, k, length) for row in rows]) for k in names}


def picture_shapes(made: Mapping[str, torch.Tensor]) -> Shapes:
    """:attr:`Pictured.shapes` of what a processor made."""
    return tuple((k, tuple(v.shape[1:])) for k, v in sorted(made.items()) if not _one_a_token(made, k))


def _one_a_token(made: Mapping[str, torch.Tensor], name: str) -> bool:
    return made[name].shape[:2] == made["input_ids"].shape


def _cut(made: Mapping[str, torch.Tensor], name: str, length: int) -> torch.Tensor:
    return made[name][:, :length] if _one_a_token(made, name) else made[name]
