"""What a source of calibration tokens is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from halfbyte.calibration.pictured import Pictured
from halfbyte.progress import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of a source.

    Attributes:
        argument: what followed the source's name in the spec (``text:ARGUMENT``); empty where nothing did.
        model_path: checkpoint folder: tokenizer, config, and for ``self`` the weights.
        samples: sequences wanted; seq_len: most tokens in one.
        seed: for whatever is drawn at random.
        device: torch device that a model runs on.
    """

    argument: str
    model_path: Path
    samples: int
    seq_len: int
    seed: int
    device: str
    reporter: Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Token sequences (int64, 1-D) and one sentence that says where they come from.

    ``pictured`` has, by their numbers among the sequences, the samples with pictures.
    """

    sequences: list[torch.Tensor]
    description: str
    pictured: Mapping[int, Pictured] = field(default_factory=dict)
