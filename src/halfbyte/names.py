"""Which tensor of a checkpoint is which parameter of the module tree that transformers builds.

The two spell the same weight differently: ``model.layers.0.mlp.up_proj.weight`` on disk may be
``model.language_model.layers.0...`` in the tree, and Mixtral's ``block_sparse_moe.experts.3.w1`` is a slice of
``mlp.experts.gate_up_proj``. transformers has rules for it, which are applied here to names alone: nothing is read.

Experts are named as :mod:`halfbyte.experts` makes them, one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfbyte.checkpoint.reader import Checkpoint

EXPERT = re.compile(r"(?P<parent>.+)\.(?P<number>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>\w+)")
LEAF_OF = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True, slots=True)
class Names:
    """Both spellings of every tensor that the module tree has a parameter or buffer for.

    Attributes:
        on_disk: dense names in the checkpoint by path in the tree.
        in_model: the other way round.
    """

    on_disk: Mapping[str, str]
    in_model: Mapping[str, str]

    @staticmethod
    def of(model: nn.Module, names: Iterable[str], fused: Iterable[str], checkpoint: Checkpoint) -> Names:
        """Match names.

        Args:
            model: with experts unfused.
            names: dense names of the checkpoint, views of stacks included.
            fused: paths that parameters had before experts were unfused.
            checkpoint: its views tell which stack they are of.
        """
        rules = _Rules.of(model, fused)
        own = model.state_dict(keep_vars=True).keys()
        on_disk: dict[str, str] = {}
        for name in names:
            path = rules.path_of(name, checkpoint)
            if path in own and (path not in on_disk or name == path):
                on_disk[path] = name
        return Names(on_disk, {name: path for path, name in on_disk.items()})


@dataclass(slots=True)
class _Rules:
    renamings: list[Any]
    converters: list[Any]
    prefix: str
    known: dict[str, bool]

    @staticmethod
    def of(model: nn.Module, fused: Iterable[str]) -> _Rules:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(model)
        known = dict.fromkeys([*model.state_dict(keep_vars=True), *fused], True)
        return _Rules(
            renamings=[r for r in rules if not isinstance(r, WeightConverter)],
            converters=[r for r in rules if isinstance(r, WeightConverter)],
            prefix=str(getattr(model, "base_model_prefix", "")),
            known=known,
        )

    def path_of(self, name: str, checkpoint: Checkpoint) -> str:
        """Where a tensor belongs in the tree; a path that is not there where it belongs nowhere."""
        info = checkpoint.tensors.get(name)
        if info is not None and info.slab is not None:
            expert = EXPERT.fullmatch(name)
            assert expert is not None
            parent = self._renamed(info.slab.stack)[0].removesuffix(".weight").rpartition(".")[0]
            return f"{parent}.{expert['number']}.{expert['leaf']}.{expert['kind']}"
        path, pattern = self._renamed(name)
        if pattern is None:
            expert = EXPERT.fullmatch(path)
            if path not in self.known and expert is not None:
                leaf = LEAF_OF.get(expert["leaf"], expert["leaf"])
                return f"{expert['parent']}.{expert['number']}.{leaf}.{expert['kind']}"
            return path
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        if [type(o).__name__ for o in converter.operations][:1] != ["MergeModulelist"]:
            return path
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), self._without_converters(name))
        if number is None:
            return path
        parent, _, leaf = path.rpartition(".")
        if len(converter.source_patterns) == 2:
            leaf = ("gate_proj", "up_proj")[converter.source_patterns.index(pattern)]
        return f"{parent}.{number[1]}.{leaf}.weight"

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        path, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.known)
        if path not in self.known and name in self.known:
            path, pattern = rename_source_key(name, [], [], self.prefix, self.known)
        return path, pattern

    def _without_converters(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self.renamings, [], self.prefix, self.known)[0])
