"""What a checkpoint of any format holds, by the names that its dense form has.

A source is opened once and read one tensor at a time. ``entries`` lists every tensor of the dense model in the order in
which a target writes them; a quantised one has a :class:`~halfbyte.conversion.coded.Grid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from halfbyte.conversion.coded import CodedWeight, Grid, Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of the dense model.

    Attributes:
        name: its dense name, ``model.layers.0.mlp.up_proj.weight``.
        dtype: safetensors dtype name; of a quantised one, what it would have if it were dense.
        shape: of the dense tensor.
        grid: number format of a quantised one, else ``None``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: Grid | None = None

    @property
    def module(self) -> str:
        """``model.layers.0.mlp.up_proj``."""
        return self.name.removesuffix(".weight")


class Source(Protocol):
    """An opened checkpoint.

    Attributes:
        format: its name, as ``--from`` takes it.
        name: what the user called it; path: the folder or file.
        config: contents of the dense checkpoint's ``config.json``, without a quantisation config.
        entries: by dense name, in the order to be written.
        companions: files that travel unchanged; generated files by name are in ``extra_files``.
        quantization: the quantisation config as it was found, for targets that know it; empty where there is none.
        notes: what was found odd, and what is left behind.
        concurrent: whether several threads may read at once.
    """

    @property
    def format(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def entries(self) -> Mapping[str, Entry]: ...
    @property
    def companions(self) -> Sequence[Path]: ...
    @property
    def extra_files(self) -> Mapping[str, bytes]: ...
    @property
    def quantization(self) -> Mapping[str, Any]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def concurrent(self) -> bool: ...

    def fingerprint(self) -> str:
        """Equal means unchanged since, at the cost of stat; what a resumed run compares."""

    def sha256(self) -> str:
        """Hash of everything that the checkpoint holds, for the record; asked for after the last tensor was read."""

    def dense(self, name: str) -> torch.Tensor:
        """A tensor that is not quantised, ``entry.dtype`` and ``entry.shape``."""

    def steps(self, name: str) -> Steps:
        """Scales, zero points and groups of a quantised one, without its codes."""

    def coded(self, name: str) -> CodedWeight:
        """A quantised one."""
