"""Checkpoint folders in the Hugging Face layout as targets: what all of their formats share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from halfbyte.checkpoint.layout import Layout, TensorSpec, copy_companions, write_error
from halfbyte.conversion.coded import CodedWeight
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Obstacle
from halfbyte.records import write_json


class Encoder(Protocol):
    """How one format stores one Linear, and how its config says so."""

    @property
    def format(self) -> str: ...

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        """See :class:`halfbyte.conversion.target.Target`."""

    def scale_dtype(self, source: Source, facts: Mapping[str, Facts]) -> str | None:
        """What all scales are stored in; ``None``: each in what it has."""

    def stored(self, entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Leaf -> (safetensors dtype, shape) of a quantised entry."""

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        """Leaf -> tensor."""

    def config(self, source: Source, entries: Sequence[Entry]) -> Mapping[str, Any]:
        """The ``quantization_config``."""

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        """See :class:`halfbyte.conversion.target.Target`."""


@dataclass(frozen=True, slots=True)
class FolderTarget:
    """A :class:`~halfbyte.conversion.target.Target` that writes a folder of safetensors files."""

    encoder: Encoder

    @property
    def format(self) -> str:
        return self.encoder.format

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        if not facts:
            reason = "none of its weights is quantised, and convert carries codes over, it does not choose them"
            return [Obstacle(name="", reason=reason, remedy="Use `halfbyte quantize` instead.")]
        return self.encoder.obstacles(source, facts)

    def entries(self, source: Source, facts: Mapping[str, Facts]) -> list[Entry]:
        dtype = self.encoder.scale_dtype(source, facts)
        if dtype is None:
            return list(source.entries.values())
        return [
            e if e.grid is None else replace(e, grid=replace(e.grid, scale_dtype=dtype))
            for e in source.entries.values()
        ]

    def files(self, source: Source, entries: Sequence[Entry], max_shard_bytes: int) -> Layout:
        specs: list[TensorSpec] = []
        for entry in entries:
            if entry.grid is None:
                specs.append(TensorSpec(name=entry.name, dtype=entry.dtype, shape=entry.shape))
            else:
                stored = self.encoder.stored(entry)
                specs += [TensorSpec(name=f"{entry.module}.{n}", dtype=d, shape=s) for n, (d, s) in stored.items()]
        return Layout.of(specs, max_shard_bytes)

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        return {f"{entry.module}.{n}": t for n, t in self.encoder.encode(entry, weight).items()}

    def keep(self, entry: Entry, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {entry.name: tensor}

    def finish(self, folder: Path, source: Source, entries: Sequence[Entry]) -> None:
        config = dict(source.config)
        quantization = self.encoder.config(source, entries)
        write_companions(folder, source, config | {"quantization_config": dict(quantization)})

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        return self.encoder.notes(source, entries)


def write_companions(folder: Path, source: Source, config: Mapping[str, Any]) -> None:
    """Write config.json, and the files that travel unchanged: tokenizer, chat template, processor, licence."""
    try:
        copy_companions(source.companions, folder)
        for name, content in source.extra_files.items():
            (folder / name).write_bytes(content)
            os.chmod(folder / name, 0o644)
        write_json(folder / "config.json", config)
    except OSError as e:
        raise write_error(e, folder, 0) from None
