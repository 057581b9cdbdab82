"""Experts in the models that transformers makes: where they are fused, and what to do where it cannot load them.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.

transformers computes most mixtures with fused experts, ``gate_up_proj [experts, 2 I, H]`` and ``down_proj
[experts, H, I]``, which it merges while loading. Of quantised experts it can merge some: symmetric packed codes and
float8 with a scale for each row, all of one config group, and for families whose checkpoints name experts one by one
(:func:`lack` says what is known of the others, as of transformers 5.23). Where it cannot, everything else is loaded by
transformers, and the experts are decoded by compressed-tensors, the library that it would call, and put in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from halfbyte.reference import StoredTensor
from halfbyte.verifier_experts import DOWNS, GATES, Fused, Place, fused_of, numbers_in, place_of
from halfbyte.verifier_layout import QuantizedModule

STACKS = ("gate_up_proj", "down_proj")
Decoder = Callable[[QuantizedModule], torch.Tensor]


def fused_modules(model: torch.nn.Module) -> dict[tuple[str, ...], Fused]:
    """Modules that hold experts in two stacks, by the indices in their path."""
    found: dict[tuple[str, ...], Fused] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if all(name in own for name in STACKS):
            fused = fused_of(path, *(tuple(own[name].shape) for name in STACKS))
            if fused is not None:
                found[numbers_in(path)] = fused
    return found


def experts_among(modules: Sequence[QuantizedModule]) -> list[tuple[Place, QuantizedModule]]:
    """The modules that are an expert's Linear, with their places."""
    return [(place, m) for m in modules if (place := place_of(m.name)) is not None]


def lack(modules: Sequence[QuantizedModule], groups: int) -> str:
    """What transformers is known not to do with experts stored like this; empty where nothing is known.

    Args:
        modules: quantised modules, with decodable groups.
        groups: how many the config has.
    """
    experts = [m for _, m in experts_among(modules)]
    formats = [(m.group.storage, m.group.format) for m in experts if m.group and m.group.format]
    if any(storage == "plain" and fmt.kind == "int" for storage, fmt in formats):
        return "has no loader for int8 experts"
    if any(not fmt.symmetric for _, fmt in formats):
        return "leaves out the zero points of experts"
    if any(fmt.block is not None for _, fmt in formats):
        return "does not read experts' scales of blocks"
    return "decodes all experts by one config group" if experts and groups > 1 else ""


def stack_names(model: torch.nn.Module, modules: Sequence[QuantizedModule]) -> set[str]:
    """Parameters of a model that the quantised experts belong in."""
    fused = fused_modules(model)
    found = (fused.get(numbers_in(place.layer)) for place, _ in experts_among(modules))
    return {f"{f.path}.{name}" for f in found if f is not None for name in STACKS}


def is_expert(key: str) -> bool:
    """Whether a tensor is of an expert that stands by itself."""
    return place_of(key.rpartition(".")[0]) is not None


def fill(model: torch.nn.Module, modules: Sequence[QuantizedModule], decoded: Decoder) -> list[str]:
    """Put experts into a model's stacks, one by one; returns what does not fit or is missing.

    Args:
        model: whose experts are fused.
        modules: quantised modules; those that are no experts are left alone.
        decoded: gives a module's weight ``[out, in]``.
    """
    fused = fused_modules(model)
    problems = []
    filled: dict[str, set[tuple[int, str]]] = {}
    for place, module in experts_among(modules):
        layer = fused.get(numbers_in(place.layer))
        expected = layer.shape_of(place.leaf) if layer and place.number < layer.count else None
        if layer is None or expected is None:
            problems.append(f"the model has no place for {module.name}")
            continue
        weight = decoded(module)
        if tuple(weight.shape) != expected:
            problems.append(f"{module.name} is {list(weight.shape)}, the model's is {list(expected)}")
            continue
        _part(model.get_submodule(layer.path), layer, place).copy_(weight)
        part = STACKS[1] if place.leaf in DOWNS else "gate" if place.leaf in GATES else "up"
        filled.setdefault(layer.path, set()).add((place.number, part))
    for layer in fused.values():
        lost = 3 * layer.count - len(filled[layer.path]) if layer.path in filled else 0
        problems += [f"{lost} Linears of the experts in {layer.path} are missing"] if lost else []
    return problems


def _part(module: torch.nn.Module, layer: Fused, place: Place) -> torch.Tensor:
    """One expert's Linear ``[out, in]`` as a view of the stack."""
    stack = module.get_parameter(STACKS[place.leaf in DOWNS]).data[place.number]
    matrix = stack.T if layer.transposed else stack
    if place.leaf in DOWNS:
        return matrix
    return matrix[: layer.intermediate] if place.leaf in GATES else matrix[layer.intermediate :]


def library_decoder(
    quantization: Mapping[str, Any], dtype: torch.dtype, as_torch: Callable[[StoredTensor], torch.Tensor]
) -> Decoder:
    """compressed-tensors' own decoding of a module, by the config group that it belongs to."""
    fields = {k: v for k, v in quantization.items() if k != "dequantize"}
    parsed = QuantizationConfig.model_validate(fields)

    def decoded(module: QuantizedModule) -> torch.Tensor:
        assert module.group is not None
        scheme = parsed.config_groups[module.group.name]
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format or parsed.format))
        state = {last: as_torch(tensor) for last, tensor in module.parts.items()}
        weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        return weight.to(dtype)

    return decoded
