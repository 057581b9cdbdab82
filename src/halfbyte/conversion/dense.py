"""Dense checkpoints: bfloat16, float16 or float32 weights, as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from halfbyte.checkpoint.layout import Layout, TensorSpec
from halfbyte.checkpoint.reader import DTYPES as STORED
from halfbyte.conversion.coded import CodedWeight
from halfbyte.conversion.folder_target import write_companions
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Obstacle
from halfbyte.errors import NumericsError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def rounded(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """A tensor in a safetensors dtype; :class:`NumericsError` where numbers become infinite in it."""
    found = tensor.to(STORED[dtype])
    if found.dtype != tensor.dtype and not bool(torch.isfinite(found).all()):
        lost = int((torch.isfinite(tensor) & ~torch.isfinite(found)).sum())
        if lost:
            raise NumericsError(
                f"{lost} of its numbers become infinite in {dtype}",
                where=name,
                remedy="Use --dtype bfloat16, or float32 for numbers that it does not hold either.",
            )
    return found


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """Every quantised weight as ``(q - z) * s``, reckoned in float32 and rounded once to ``dtype``.

    Attributes:
        dtype: safetensors dtype name; ``None`` keeps what the config says. Given, tensors that the source has in
            another float dtype are rounded to it too.
    """

    dtype: str | None = None
    format: str = "dense"

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        return []

    def entries(self, source: Source, facts: Mapping[str, Facts]) -> list[Entry]:
        def given(e: Entry) -> Entry:
            floats = e.grid is not None or e.dtype in DTYPES.values()
            return replace(e, grid=None, dtype=self.dtype if self.dtype is not None and floats else e.dtype)

        return [given(e) for e in source.entries.values()]

    def files(self, source: Source, entries: Sequence[Entry], max_shard_bytes: int) -> Layout:
        return Layout.of([TensorSpec(name=e.name, dtype=e.dtype, shape=e.shape) for e in entries], max_shard_bytes)

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        raise AssertionError(f"{entry.name} is to be dense")

    def keep(self, entry: Entry, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {entry.name: tensor}

    def finish(self, folder: Path, source: Source, entries: Sequence[Entry]) -> None:
        config = dict(source.config)
        if self.dtype is not None:
            name = next(k for k, v in DTYPES.items() if v == self.dtype)
            config |= {"torch_dtype" if "torch_dtype" in config else "dtype": name}
            for part in ("text_config", "llm_config", "language_config"):
                if isinstance(config.get(part), dict):
                    said = {k: name for k in ("dtype", "torch_dtype") if k in config[part]}
                    config[part] = config[part] | said
        write_companions(folder, source, config)

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        return []
