"""A checkpoint as an ordinary, dense transformers model: what ``from_pretrained`` gives, where that can read it.

It cannot read every quantised checkpoint: int8 experts, and experts of families whose fused parameters it has no
conversion for, are beyond transformers 5.23 (docs/models.md), though vLLM serves them. Here each parameter is put
together from the tensors that it is on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from halfbyte.blocks import build_on_meta
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.checkpoint.source import resolve
from halfbyte.checkpoint.stacks import unstacked
from halfbyte.errors import CheckpointError
from halfbyte.experts import Experts, unfuse
from halfbyte.names import Names
from halfbyte.weights import Weights


def load(checkpoint: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """Load a dense or compressed-tensors checkpoint into transformers' model class for it, dequantised.

    Args:
        checkpoint: a folder or a hub id.
        dtype: of the parameters; ``None`` is the checkpoint's.
        device: where they go.

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: a parameter has no tensor, or one of another shape.
        ArchitectureError: transformers does not know the architecture.
    """
    opened = open_checkpoint(resolve(checkpoint), str(checkpoint))
    dtype = dtype or opened.dtype
    weights = Weights.of(unstacked(opened))
    model, apart = build_on_meta(opened, dtype), build_on_meta(opened, dtype)
    parameters = list(apart.state_dict(keep_vars=True))
    experts = unfuse(apart)
    names = Names.of(apart, weights.names(), parameters, weights.checkpoint)

    def value(path: str) -> torch.Tensor:
        return weights.dense(names.on_disk[path]).to(device, dtype)

    missing = []
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        if path in names.on_disk:
            found = value(path)
        elif owner in experts:
            found = fused(experts[owner], owner, leaf, value)
        else:
            missing.append(path)
            continue
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"{path} has shape {tuple(found.shape)}, the config asks for {tuple(parameter.shape)}",
                where=opened.name,
            )
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(found, requires_grad=False)
    for path, buffer in list(model.named_buffers()):
        owner, _, leaf = path.rpartition(".")
        stored = weights.dense(names.on_disk[path]) if path in names.on_disk else buffer
        model.get_submodule(owner)._buffers[leaf] = stored.to(device, buffer.dtype)
    model.tie_weights()  # type: ignore[operator]
    absent = [path for path in missing if model.get_parameter(path).is_meta]
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors are absent that {type(model).__name__} needs: {', '.join(absent[:3])}",
            where=opened.name,
            remedy="The checkpoint is incomplete or of another architecture than its config says.",
        )
    return model


def fused(experts: Experts, path: str, leaf: str, value: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """One parameter of a layer of experts, in the layout that transformers has it in.

    Args:
        experts: the layer, unfused.
        path: where it is; leaf: ``gate_up_proj``, ``down_proj``, or their ``_bias``.
        value: gives a parameter of the unfused tree.
    """
    bias = leaf.endswith("_bias")
    kind = "bias" if bias else "weight"
    parts = ["down_proj"] if leaf.startswith("down_proj") else ["gate_proj", "up_proj"]
    layers = []
    for number in range(len(experts)):
        rows = [value(f"{path}.{number}.{part}.{kind}") for part in parts]
        joined = torch.cat(rows) if experts.concatenated else torch.stack(rows, 1).flatten(0, 1)
        layers.append(joined.T if experts.transposed and not bias else joined)
    return torch.stack(layers)
