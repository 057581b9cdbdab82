"""What a format can hold, and how a checkpoint is written in it.

A target first says what it cannot express (:meth:`Target.obstacles`), before a byte is written; then which files it
will write (:meth:`Target.files`); then it is given one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from halfbyte.conversion.coded import CodedWeight, Grid
from halfbyte.conversion.source import Entry, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a quantised weight's scales and zero points before its codes are read.

    Attributes:
        exact_in: safetensors dtypes among F16, BF16 and F32 that hold every scale exactly.
        finite_in: those in which no scale becomes infinite, or zero where it is not.
        zero_points: the lowest and the highest, signed; ``None`` where there are none.
    """

    exact_in: frozenset[str]
    finite_in: frozenset[str]
    zero_points: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why a tensor cannot be carried over exactly.

    Attributes:
        name: dense name of the tensor; empty where it concerns the checkpoint.
        reason: in words.
        grid: the nearest that the target can express, for ``--allow-requantize``; ``None`` where there is none.
        remedy: what else could be done.
    """

    name: str
    reason: str
    grid: Grid | None = None
    remedy: str = ""


class Files(Protocol):
    """Weight files whose every byte has its place beforehand (:class:`halfbyte.checkpoint.layout.Layout`)."""

    @property
    def size_bytes(self) -> int: ...

    def create(self, folder: Path) -> None:
        """Allocate all of them."""

    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors to their places, by the names that they have in the files."""

    def sync(self, folder: Path) -> None:
        """Make everything written so far durable."""


class Target(Protocol):
    """A format to write.

    Attributes:
        format: its name, as ``--to`` takes it.
    """

    @property
    def format(self) -> str: ...

    def obstacles(self, source: Source, facts: Mapping[str, Facts]) -> list[Obstacle]:
        """All that cannot be carried over exactly; ``facts`` by dense name of the quantised tensors."""

    def entries(self, source: Source, facts: Mapping[str, Facts]) -> list[Entry]:
        """All entries of the source, in order, as the target will hold what can be carried over exactly.

        A quantised one keeps its grid but for the dtype of its scales, or has none where the target is dense.
        """

    def files(self, source: Source, entries: Sequence[Entry], max_shard_bytes: int) -> Files:
        """The files to be; ``entries`` as :meth:`entries` gives them, with other grids where they are requantised."""

    def encode(self, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        """The tensors of a quantised entry, by their names in the files."""

    def keep(self, entry: Entry, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of an entry that is not quantised."""

    def finish(self, folder: Path, source: Source, entries: Sequence[Entry]) -> None:
        """Write what belongs beside the weights: config.json, companions."""

    def notes(self, source: Source, entries: Sequence[Entry]) -> list[str]:
        """What a reader of the record ought to know: what engines do, what was left behind."""
