"""Experts that the source holds in stacks, as the Linears that the checkpoint has instead.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side; the writer has its
own word on what is in a stack (``checkpoint/stacks.py``), and this must come to the same by itself.

Llama 4, Qwen3-VL's mixtures and Granite's keep the experts of a layer in two tensors of three dimensions,
``experts.gate_up_proj`` and ``experts.down_proj`` (Granite: ``input_linear.weight``, ``output_linear.weight``). Gate
comes before up, each in one piece. Matrices are ``[out, in]`` or ``[in, out]``, for both tensors alike, which their
shapes tell: one of the two may be square, but never both.

Nothing is loaded: an expert's Linear is a place in the file, read slice by slice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from halfbyte.errors import CheckpointError
from halfbyte.reference import STORED, StoredTensor
from halfbyte.verifier_experts import transposed_pair

STACK = re.compile(
    r"(?P<parent>.+?)(\.experts)?\.(?P<leaf>gate_up_proj|down_proj|input_linear|output_linear)(\.weight)?"
)
PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "output_linear": ("down_proj",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned(StoredTensor):
    """A matrix ``[out, in]`` that the file holds as some columns of ``[in, width]``; ``offset`` is that of its first.

    Attributes:
        width: elements in a stored row.
    """

    width: int

    @staticmethod
    def of(place: StoredTensor, width: int) -> Turned:
        return Turned(
            name=place.name,
            dtype=place.dtype,
            shape=place.shape,
            path=place.path,
            offset=place.offset,
            size_bytes=place.size_bytes,
            width=width,
        )

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of the matrix, row by row of ``[out, in]``."""
        out_features, in_features = self.shape
        item = np.dtype(STORED[self.dtype]).itemsize
        row_bytes = in_features * item
        first, last = start // row_bytes, min(-(-stop // row_bytes), out_features)
        span = (last - first) * item
        file = os.open(self.path, os.O_RDONLY)
        try:
            begin = self.offset + first * item
            data = b"".join(os.pread(file, span, begin + i * self.width * item) for i in range(in_features))
        finally:
            os.close(file)
        if len(data) != span * in_features:
            raise CheckpointError(f"ends inside tensor {self.name}", where=self.path.name)
        rows = np.frombuffer(data, f"V{item}").reshape(in_features, last - first).T
        return rows.tobytes()[start - first * row_bytes : stop - first * row_bytes]


@dataclass(slots=True)
class Stacks:
    """The source's stacks that the checkpoint has as single experts.

    Attributes:
        weights: the source's weight of every expert's Linear, by name (``...experts.3.up_proj.weight``).
        replaced: names of the stacks, which are not expected among the copies.
        transposed: how many of them hold ``[in, out]``.
        problems: stacks of which the checkpoint has a part, or which it has twice.
    """

    weights: dict[str, StoredTensor] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    transposed: int = 0
    problems: list[str] = field(default_factory=list)


def stacks_of(
    source: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor], quantized: Collection[str]
) -> Stacks:
    """Hold the source's stacks against what a checkpoint has.

    Args:
        source: tensors of the source.
        found: tensors of the checkpoint.
        quantized: names that the weights of its quantised modules would have if they were dense.
    """
    result = Stacks()
    for layer, stacks in _by_layer(source).items():
        turned = _transposed(stacks)
        for leaf, stack in stacks.items():
            views = _views(stack, layer, PARTS[leaf], transposed=turned)
            there = [n for n in views if n in quantized or n in found]
            if not there:
                continue
            result.weights |= views
            result.replaced.add(stack.name)
            result.transposed += turned
            absent = [n for n in views if n not in quantized and n not in found]
            if absent:
                lost = f"{len(absent)} of {len(views)} Linears of its experts are not there, such as {absent[0]}"
                result.problems.append(f"{stack.name} of the source is lost in part: {lost}")
            if stack.name in found:
                result.problems.append(f"{stack.name} is there whole and as {len(there)} Linears of experts too")
    return result


def _by_layer(source: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Stacks by the path of their experts and their last name."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in source.items():
        match = STACK.fullmatch(name)
        if match is not None and len(tensor.shape) == 3:
            layers.setdefault(f"{match['parent']}.experts", {})[match["leaf"]] = tensor
    return layers


def _transposed(stacks: Mapping[str, StoredTensor]) -> bool:
    """Whether the stacks of a layer hold ``[in, out]``; not where shapes tell nothing, since the error then will."""
    shapes = {len(PARTS[leaf]): t.shape[1:] for leaf, t in stacks.items()}
    return len(shapes) == 2 and transposed_pair(shapes[2], shapes[1]) is True


def _views(stack: StoredTensor, layer: str, leaves: Sequence[str], *, transposed: bool) -> dict[str, StoredTensor]:
    """Every expert's part of a stack, by the name of its weight."""
    experts, first, second = stack.shape
    item = np.dtype(STORED[stack.dtype]).itemsize
    height, in_features = (second, first) if transposed else (first, second)
    rows = height // len(leaves)
    views: dict[str, StoredTensor] = {}
    for expert in range(experts):
        for i, leaf in enumerate(leaves):
            before = i * rows * (1 if transposed else in_features)
            view = replace(
                stack,
                name=f"{layer}.{expert}.{leaf}.weight",
                shape=(rows, in_features),
                offset=stack.offset + (expert * first * second + before) * item,
                size_bytes=rows * in_features * item,
            )
            views[view.name] = Turned.of(view, second) if transposed else view
    return views
