"""Checkpoint folders in the Hugging Face layout as sources: what all of their formats share.

What a format says about one module's tensors is a :class:`Decoder`'s; everything about folders, names and order is
here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from halfbyte.checkpoint.reader import (
    DTYPE_NAMES,
    Checkpoint,
    TensorInfo,
    combined_digest,
    companion_files,
    digest_of,
)
from halfbyte.conversion.coded import CodedWeight, Grid, Steps
from halfbyte.conversion.source import Entry
from halfbyte.errors import CheckpointError, HalfbyteError, raise_all

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Files that say how the source was quantised, and would say it of the target.
STALE = frozenset({"quantize_config.json", "quant_config.json", "quantization_config.json"})
# What engines round activations and caches by; no part of a weight, and of no other format.
LEFT_BEHIND = frozenset(
    {
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        "output_zero_point",
        "k_scale",
        "v_scale",
        "q_scale",
    }
)
NESTED_CONFIGS = ("text_config", "llm_config", "language_config")


class Reading:
    """Reads tensors of a checkpoint, in whichever thread, and hashes them on the way."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._digests: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.read(name)
        if name not in self._digests:
            self._digests[name] = digest_of(tensor)
        return tensor

    def sha256(self) -> str:
        """:func:`combined_digest` of all tensors; those not read so far are read."""
        for name in self.checkpoint.tensors:
            if name not in self._digests:
                self.read(name)
        return combined_digest(self._digests)


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module by their last names."""

    name: str
    leaves: Mapping[str, TensorInfo]
    reading: Reading

    def read(self, leaf: str) -> torch.Tensor:
        return self.reading.read(f"{self.name}.{leaf}")

    def require(self, leaf: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Refuse a tensor of another shape or dtype."""
        info = self.info(leaf)
        if info.shape != shape:
            raise CheckpointError(f"{leaf} has shape {list(info.shape)}, not {list(shape)}", where=self.name)
        if dtypes and info.dtype not in dtypes:
            raise CheckpointError(f"{leaf} has dtype {info.dtype}, not {' or '.join(dtypes)}", where=self.name)

    def info(self, leaf: str) -> TensorInfo:
        if leaf not in self.leaves:
            raise CheckpointError(f"tensor {leaf} is missing", where=self.name, remedy="Download it again.")
        return self.leaves[leaf]


class Decoder(Protocol):
    """How one format stores one Linear."""

    @property
    def format(self) -> str: ...

    @property
    def scale_leaf(self) -> str:
        """Last name of the tensor that stands for the module's place in the file."""

    @property
    def leaves(self) -> frozenset[str]:
        """Last names of tensors that belong to a quantised module."""

    def is_coded(self, leaves: Mapping[str, TensorInfo]) -> bool:
        """Whether these are the tensors of a quantised module."""

    def grid(self, module: Module) -> tuple[Grid, tuple[int, int]]:
        """Number format and dense shape; :class:`CheckpointError` where the tensors contradict each other."""

    def steps(self, module: Module, entry: Entry) -> Steps:
        """Scales, zero points and groups."""

    def words(self, module: Module, entry: Entry) -> torch.Tensor:
        """Codes packed along rows, see :attr:`CodedWeight.words`."""


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A :class:`~halfbyte.conversion.source.Source` over a folder."""

    checkpoint: Checkpoint
    reading: Reading
    decoder: Decoder | None
    entries: Mapping[str, Entry]
    modules: Mapping[str, Module]
    quantization: Mapping[str, Any]
    config: Mapping[str, Any]
    notes: Sequence[str] = ()
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    concurrent: bool = True

    @property
    def format(self) -> str:
        return "dense" if self.decoder is None else self.decoder.format

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def companions(self) -> Sequence[Path]:
        return tuple(f for f in companion_files(self.checkpoint.path) if f.name not in STALE)

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    def sha256(self) -> str:
        return self.reading.sha256()

    def dense(self, name: str) -> torch.Tensor:
        return self.reading.read(name)

    def steps(self, name: str) -> Steps:
        assert self.decoder is not None
        entry = self.entries[name]
        return self.decoder.steps(self.modules[entry.module], entry)

    def coded(self, name: str) -> CodedWeight:
        assert self.decoder is not None
        entry = self.entries[name]
        assert entry.grid is not None
        return CodedWeight(
            grid=entry.grid,
            in_features=entry.shape[1],
            words=self.decoder.words(self.modules[entry.module], entry),
            steps=self.steps(name),
        )


def open_folder(
    checkpoint: Checkpoint, decoder: Decoder | None, quantization: Mapping[str, Any], spare: Collection[str] = ()
) -> FolderSource:
    """List a folder's tensors by their dense names; all modules that contradict themselves are named together.

    The order is that of the files, a quantised module standing where its scales are: scales are as wide as most dense
    tensors, so their place among these is the only one that sorting by element size leaves alone. Tensors in
    ``spare`` are left behind.
    """
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        found[module][leaf] = info
    modules: dict[str, Module] = {}
    reading = Reading(checkpoint)
    if decoder is not None:
        modules = {n: Module(n, leaves, reading) for n, leaves in found.items() if decoder.is_coded(leaves)}
    entries: dict[str, Entry] = {}
    problems: list[HalfbyteError] = []
    for module, coded in modules.items():
        assert decoder is not None
        if decoder.scale_leaf not in coded.leaves:
            problems.append(CheckpointError(f"tensor {decoder.scale_leaf} is missing", where=module))
    left: list[str] = []
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in spare:
            continue
        if decoder is not None and leaf in LEFT_BEHIND:
            left.append(name)
        elif decoder is None or module not in modules or leaf not in decoder.leaves:
            entries[name] = Entry(name=name, dtype=info.dtype, shape=info.shape)
        elif leaf == decoder.scale_leaf:
            try:
                grid, shape = decoder.grid(modules[module])
            except CheckpointError as e:
                problems.append(CheckpointError(e.what, where=f"{checkpoint.name}: {module}", remedy=e.remedy))
                continue
            dense = f"{module}.weight"
            entries[dense] = Entry(name=dense, dtype=DTYPE_NAMES[checkpoint.dtype], shape=shape, grid=grid)
    raise_all(problems[:10])
    notes = [f"{len(left)} scales of activations or caches are left behind, such as {left[0]}"] if left else []
    if spare:
        notes.append(
            f"{len(spare)} biases of zeros that the architecture does not have are left behind, such as {min(spare)}"
        )
    return FolderSource(
        checkpoint=checkpoint,
        reading=reading,
        decoder=decoder,
        entries=entries,
        modules=modules,
        quantization=quantization,
        config=dense_config(checkpoint.config),
        notes=notes,
    )


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says about quantisation, at the top or in the language model's part."""
    plain = {k: v for k, v in config.items() if k not in QUANTIZATION_KEYS}
    for key in NESTED_CONFIGS:
        if isinstance(plain.get(key), dict):
            plain[key] = {k: v for k, v in plain[key].items() if k not in QUANTIZATION_KEYS}
    return plain
