"""Experts that a checkpoint holds in one three-dimensional tensor, seen as the Linears that they are.

``experts.gate_up_proj [experts, hidden, 2 intermediate]`` and its like are what gpt-oss, Llama 4, Qwen3-VL's mixtures
and Granite's are stored as. Engines read quantised experts one by one, so here each stack is given as views:
``experts.3.gate_proj.weight [intermediate, hidden]``, ``experts.3.up_proj.weight`` and ``experts.3.down_proj.weight``
(and ``.bias``). Nothing is copied: a view is a :class:`TensorInfo` that knows its place, and reading it reads one
expert's bytes.

Three things differ between families: whether a matrix is stored ``[out, in]`` or transposed, whether gate and up stand
one behind the other or row by row in turns, and the names. Orientation shows in the shapes, but where both dimensions
are the model's width; the rest is in :data:`INTERLEAVED`, :data:`TRANSPOSED` and :data:`STACKS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.checkpoint.reader import Checkpoint, Slab, TensorInfo, element_bytes

# model_type of configs whose stacks hold gate and up in turns: row 0 is gate's first, row 1 is up's first.
INTERLEAVED = frozenset({"gpt_oss"})
# Those that store [in, out]; asked only where shapes do not tell.
TRANSPOSED = frozenset({"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack's place among names: the path of its experts, and which of their Linears it holds."""

    parent: str
    leaves: tuple[str, ...]
    bias: bool


# How stacks are named: pattern of the whole name, with a group for the parent; the Linears, in the order of their rows.
GATED = ("gate_proj", "up_proj")
STACKS: tuple[tuple[re.Pattern[str], str, tuple[str, ...], bool], ...] = (
    (re.compile(r"(?P<parent>.+\.experts)\.gate_up_proj(\.weight)?"), "{parent}", GATED, False),
    (re.compile(r"(?P<parent>.+\.experts)\.down_proj(\.weight)?"), "{parent}", ("down_proj",), False),
    (re.compile(r"(?P<parent>.+\.experts)\.gate_up_proj(_|\.)bias"), "{parent}", GATED, True),
    (re.compile(r"(?P<parent>.+\.experts)\.down_proj(_|\.)bias"), "{parent}", ("down_proj",), True),
    (re.compile(r"(?P<parent>.+\.block_sparse_moe)\.input_linear\.weight"), "{parent}.experts", GATED, False),
    (re.compile(r"(?P<parent>.+\.block_sparse_moe)\.output_linear\.weight"), "{parent}.experts", ("down_proj",), False),
)


def stack_of(name: str, shape: tuple[int, ...]) -> Stack | None:
    """What a tensor stacks, by its name and rank; ``None`` where it is no stack of experts."""
    for pattern, parent, leaves, bias in STACKS:
        match = pattern.fullmatch(name)
        if match is not None and len(shape) == (2 if bias else 3):
            return Stack(parent.format(parent=match["parent"]), leaves, bias)
    return None


def unstacked(checkpoint: Checkpoint, *, keep: frozenset[str] = frozenset()) -> Checkpoint:
    """The same checkpoint with every stack replaced by its views, in the stack's place.

    Args:
        checkpoint: as it is on disk.
        keep: stacks to leave as they are.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        stack = None if name in keep else stack_of(name, info.shape)
        if stack is None:
            tensors[name] = info
        else:
            tensors |= {view.name: view for view in views_of(info, stack, checkpoint.text_config)}
    if tensors.keys() == checkpoint.tensors.keys():
        return checkpoint
    return replace(checkpoint, tensors=tensors)


def views_of(info: TensorInfo, stack: Stack, config: Mapping[str, Any]) -> list[TensorInfo]:
    """One view for each Linear of each expert, expert by expert."""
    experts, piece = info.shape[0], info.shape[1:]
    transposed = not stack.bias and is_transposed(piece, stack.leaves, config)
    height = piece[1] if transposed else piece[0]
    rows = height // len(stack.leaves)
    step = info.size_bytes // experts if experts else 0
    views = []
    for expert in range(experts):
        for i, leaf in enumerate(stack.leaves):
            if len(stack.leaves) > 1 and config.get("model_type") in INTERLEAVED:
                span = (i, height, len(stack.leaves))
            else:
                span = (i * rows, (i + 1) * rows, 1)
            shape: tuple[int, ...] = (rows,) if stack.bias else (rows, piece[0] if transposed else piece[1])
            size = element_bytes(info.dtype) * math.prod(shape)
            views.append(
                TensorInfo(
                    name=f"{stack.parent}.{expert}.{leaf}.{'bias' if stack.bias else 'weight'}",
                    dtype=info.dtype,
                    shape=shape,
                    file=info.file,
                    offset=info.offset + expert * step,
                    size_bytes=size,
                    slab=Slab(info.name, piece, transposed, span),
                )
            )
    return views


def is_transposed(piece: tuple[int, ...], leaves: tuple[str, ...], config: Mapping[str, Any]) -> bool:
    """Whether an expert's matrix is stored ``[in, out]``: gate and up read the model's width, down writes it."""
    hidden = config.get("hidden_size")
    reads = "down_proj" not in leaves
    first, second = piece[0] == hidden, piece[1] == hidden
    if first != second:
        return first if reads else second
    return config.get("model_type") in TRANSPOSED
