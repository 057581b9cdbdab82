"""A checkpoint's weights by their dense names, whatever form they have on disk.

``model.layers.0.mlp.up_proj.weight`` can be asked for whether the file holds it as bfloat16 or as packed codes; this is
what lets one loop run original and quantised models alike. Reads compressed-tensors checkpoints in the formats of
``schemes`` (ours, llm-compressor's) and dense ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.packing import dequantize, unpack
from halfbyte.schemes import ActivationFormat, WeightFormat

LEAVES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")


@dataclass(frozen=True, slots=True)
class Group:
    """One ``config_groups`` entry: targets with their number formats."""

    targets: tuple[str, ...]
    weights: WeightFormat
    activations: ActivationFormat | None


@dataclass(frozen=True, slots=True)
class Weights:
    """Dense views of a checkpoint's tensors.

    Attributes:
        checkpoint: the files.
        groups: number formats by target, empty for a dense checkpoint.
    """

    checkpoint: Checkpoint
    groups: tuple[Group, ...]

    @staticmethod
    def of(checkpoint: Checkpoint) -> Weights:
        """Interpret a checkpoint's ``quantization_config``; one in a format that cannot be decoded is an error."""
        config = checkpoint.config.get("quantization_config")
        if not isinstance(config, dict):
            return Weights(checkpoint, ())
        if config.get("quant_method") != "compressed-tensors":
            raise CheckpointError(
                f"its weights are in {config.get('quant_method')} format, which cannot be run here",
                where=checkpoint.name,
                remedy="Give a dense or compressed-tensors checkpoint; `halfbyte inspect` shows what it holds.",
            )
        return Weights(checkpoint, tuple(_group(checkpoint, g) for g in config["config_groups"].values()))

    def names(self) -> list[str]:
        """Dense names of all tensors."""
        names = []
        for name in self.checkpoint.tensors:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_packed":
                names.append(f"{module}.weight")
            elif leaf not in ("weight_scale", "weight_shape", "weight_zero_point"):
                names.append(name)
        return names

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that dense name."""
        return name in self.checkpoint.tensors or self._packed(name)

    def dense(self, name: str) -> torch.Tensor:
        """The tensor in float: as stored when dense, dequantised to float32 when stored as codes."""
        module, _, leaf = name.rpartition(".")
        coded = self.coded(module) if leaf == "weight" else None
        return self.checkpoint.read(name) if coded is None else dequantize(*coded[1:])

    def coded(self, module: str) -> tuple[WeightFormat, torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """A Linear's format, codes ``[out, in]``, scales ``[out, groups]`` and zero points; ``None`` where
        its weight is dense."""
        if f"{module}.weight_scale" not in self.checkpoint.tensors:
            return None
        group = self._group_of(module)
        present = {leaf: f"{module}.{leaf}" for leaf in LEAVES if f"{module}.{leaf}" in self.checkpoint.tensors}
        stored = {leaf: self.checkpoint.read(full) for leaf, full in present.items()}
        return group.weights, *unpack(group.weights, stored)

    def activation_format(self, module: str) -> ActivationFormat | None:
        """How an engine quantises that module's input, ``None`` when it does not."""
        if f"{module}.weight_scale" not in self.checkpoint.tensors:
            return None
        return self._group_of(module).activations

    def _packed(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and f"{module}.weight_packed" in self.checkpoint.tensors

    def _group_of(self, module: str) -> Group:
        for group in self.groups:
            if any(_targets(t, module) for t in group.targets):
                return group
        raise CheckpointError(
            f"{module} holds codes, but no entry of quantization_config targets it",
            where=self.checkpoint.name,
            remedy="Repair config_groups in config.json.",
        )


def _targets(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (module, "Linear")


def _group(checkpoint: Checkpoint, entry: Mapping[str, Any]) -> Group:
    w, a = entry["weights"], entry.get("input_activations")
    if w["strategy"] not in ("group", "channel", "block"):
        raise _unsupported(checkpoint, f"weights with strategy {w['strategy']}")
    if a is not None and (not a["dynamic"] or a.get("strategy") not in ("token", "group")):
        raise _unsupported(checkpoint, f"{'' if a['dynamic'] else 'static '}activations by {a.get('strategy')}")
    block = w.get("block_structure") if w["strategy"] == "block" else None
    return Group(
        targets=tuple(entry["targets"]),
        weights=WeightFormat(
            num_bits=w["num_bits"],
            kind=w["type"],
            symmetric=w["symmetric"],
            group_size=w.get("group_size"),
            block=None if block is None else (block[0], block[1]),
        ),
        activations=None
        if a is None
        else ActivationFormat(num_bits=a["num_bits"], kind=a["type"], group_size=a.get("group_size")),
    )


def _unsupported(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} cannot be run here",
        where=f"{checkpoint.name}: quantization_config",
        remedy="Supported are group, channel and block weights with dynamic activations by token or group.",
    )
