"""What is inside a checkpoint, from its headers, its config and the records beside it.

Works on halfbyte's own checkpoints and on other tools' (compressed-tensors, AutoAWQ, AutoGPTQ, GGUF, dense, Gemma 3 for
Flax). No weight is read. Does not cover: whether the bytes are right (``verifier``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte.architectures import EMBEDDING, HEAD, NOT_LANGUAGE, NUMBERED, find_block_prefix
from halfbyte.checkpoint.reader import Checkpoint, TensorInfo
from halfbyte.checkpoint.source import open_headers
from halfbyte.errors import CheckpointError
from halfbyte.inspection_formats import SIDE_LEAVES, StoredWeight, quantization_config, stored_weight
from halfbyte.records import (
    COMPARE_NAME,
    MANIFEST_NAME,
    VERIFY_NAME,
    CalibrationRecord,
    CompareRecord,
    LinearRecord,
    Manifest,
    Sensitivity,
    VerifyRecord,
    read_record,
)

if TYPE_CHECKING:
    from halfbyte.conversion.headers import Headers

T = TypeVar("T")

PARTS = (
    "embeddings",
    "decoder linears",
    "decoder scales",
    "norms",
    "lm_head",
    "vision, audio and projector",
    "multi-token prediction",
    "other",
)
# A projection that only layers of multi-token prediction have, behind the last block.
PREDICTOR = "eh_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleGroup:
    """Modules whose names differ only in their indices, stored alike.

    Attributes:
        modules: their name with ``*`` for each index, e.g. ``model.layers.*.self_attn.q_proj``; of experts in one
            tensor, that tensor's.
        count: how many there are.
        scheme: how the weight is stored: ``W4A16 g128 sym``, or ``BF16`` when it is dense.
        shape: ``[out_features, in_features]`` of each; of experts in one tensor as it is stored.
        parameters: of all of them; bytes: codes, scales and zero points of all of them.
        bits_per_weight: ``8 * bytes / parameters``.
    """

    modules: str
    count: int
    scheme: str
    quantized: bool
    shape: list[int]
    parameters: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A share of the checkpoint's tensors. Codes count as the parameters they stand for, scales as none."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError:
    """Quantisation error in one decoder block, from the manifest: the mean over its Linears, and the worst of them."""

    block: int
    linears: int
    mean_relative_error: float
    worst: str
    worst_relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        quantization: ``none``, or the config's ``quant_method`` (``compressed-tensors``, ``awq``, ``gptq``, ``fp8``),
            or ``gguf``.
        format: the storage format, where the method has several: of GGUF, the commonest type.
        parameters: logical ones; a tied output matrix that is not stored counts once.
        bits_per_weight: over quantised weights, scales included; ``None`` when none is quantised.
        bits_per_parameter: all tensor bytes over all parameters.
        blocks: decoder blocks, without layers of multi-token prediction behind them.
        errors, rare_experts, calibration, recipe, sensitivity, verify, compare: from ``halfbyte.json`` and the
            records beside it, where present.
        notes: contradictions between config and tensors, and records that could not be read.
    """

    name: str
    architecture: str
    model_type: str
    blocks: int
    quantization: str
    format: str | None
    parameters: int
    quantized_parameters: int
    bits_per_weight: float | None
    bits_per_parameter: float
    size_bytes: int
    files: int
    groups: list[ModuleGroup]
    parts: list[Part]
    errors: list[BlockError]
    rare_experts: list[str]
    recipe: dict[str, Any] | None
    calibration: CalibrationRecord | None
    sensitivity: Sensitivity | None
    verify: VerifyRecord | None
    compare: CompareRecord | None
    notes: list[str]


def inspect(path_or_id: str | Path) -> Inspection:
    """Describe a checkpoint folder, a GGUF file, or a hub id of which only headers and JSON files are fetched.

    Raises:
        CheckpointError: the checkpoint is missing, truncated or inconsistent.
        MissingDependencyError: it is a GGUF file or for Flax, and the package that reads these is not installed.
    """
    path = Path(path_or_id)
    if path.suffix == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors"))):
        from halfbyte.conversion.headers import headers_of

        headers = headers_of(path)
        if headers is not None:
            return _inspect_headers(headers, str(path_or_id))
    return inspect_checkpoint(open_headers(path_or_id))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Describe an opened checkpoint."""
    config = quantization_config(checkpoint)
    modules = _modules(checkpoint)
    weights: dict[str, StoredWeight] = {}
    for module, leaves in modules.items():
        found = stored_weight(module, leaves, config, checkpoint)
        if found is not None:
            weights[module] = found
    quantized = [w for w in weights.values() if w.quantized]
    notes = _contradictions(checkpoint, config, weights)
    return _described(checkpoint, modules, weights, _method(config, quantized), _format(config), notes)


def _inspect_headers(headers: Headers, name: str) -> Inspection:
    """Describe a GGUF file or a Flax checkpoint."""
    folder = headers.path if headers.path.is_dir() else headers.path.parent
    config = {"architectures": [headers.architecture], "model_type": headers.model_type}
    checkpoint = Checkpoint(path=folder, name=name, config=config, tensors=dict(headers.tensors))
    modules = _modules(checkpoint)
    weights = {
        module: StoredWeight(
            scheme=info.dtype,
            quantized=f"{module}.weight" in headers.quantized,
            shape=info.shape,
            code_bytes=info.size_bytes,
            scale_bytes=0,
        )
        for module, leaves in modules.items()
        for leaf, info in leaves.items()
        if leaf == "weight"
    }
    method = headers.format if headers.quantized else "none"
    return _described(checkpoint, modules, weights, method, headers.kind or headers.format, list(headers.notes))


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = info
    return modules


def _described(
    checkpoint: Checkpoint,
    modules: Mapping[str, Mapping[str, TensorInfo]],
    weights: Mapping[str, StoredWeight],
    quantization: str,
    form: str | None,
    notes: list[str],
) -> Inspection:
    quantized = [w for w in weights.values() if w.quantized]
    quantized_parameters = sum(w.parameters for w in quantized)
    quantized_bytes = sum(w.code_bytes + w.scale_bytes for w in quantized)
    predictors = _predictors(checkpoint.tensors)
    parts = _parts(modules, weights, find_block_prefix(checkpoint.tensors), predictors)
    parameters = sum(p.parameters for p in parts)
    manifest = _record(Manifest, checkpoint.path / MANIFEST_NAME, notes)
    return Inspection(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        model_type=str(checkpoint.config.get("model_type", "unknown")),
        blocks=_num_blocks(checkpoint, predictors),
        quantization=quantization,
        format=form,
        parameters=parameters,
        quantized_parameters=quantized_parameters,
        bits_per_weight=8 * quantized_bytes / quantized_parameters if quantized_parameters else None,
        bits_per_parameter=8 * checkpoint.size_bytes / parameters if parameters else 0.0,
        size_bytes=checkpoint.size_bytes,
        files=len({t.file for t in checkpoint.tensors.values()}),
        groups=_groups({**weights, **_stacks(modules)}),
        parts=parts,
        errors=block_errors(manifest.linears) if manifest else [],
        rare_experts=manifest.rare_experts if manifest else [],
        recipe=manifest.recipe if manifest else None,
        calibration=manifest.calibration if manifest else None,
        sensitivity=manifest.sensitivity if manifest else None,
        verify=_record(VerifyRecord, checkpoint.path / VERIFY_NAME, notes),
        compare=_record(CompareRecord, checkpoint.path / COMPARE_NAME, notes),
        notes=notes,
    )


def _stacks(modules: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, StoredWeight]:
    """Experts in one tensor (``experts.gate_up_proj [experts, ...]``), which is no module's ``weight``."""
    return {
        f"{module}.{leaf}": StoredWeight(
            scheme=info.dtype, quantized=False, shape=info.shape, code_bytes=info.size_bytes, scale_bytes=0
        )
        for module, leaves in modules.items()
        for leaf, info in leaves.items()
        if module.endswith("experts") and leaf != "weight" and len(info.shape) == 3
    }


def _groups(weights: Mapping[str, StoredWeight]) -> list[ModuleGroup]:
    """Fold modules with matrix weights over the indices in their names, in file order."""
    folded: dict[tuple[str, StoredWeight], int] = {}
    for module, weight in weights.items():
        if len(weight.shape) >= 2:
            key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), weight)
            folded[key] = folded.get(key, 0) + 1
    return [
        ModuleGroup(
            modules=modules,
            count=count,
            scheme=w.scheme,
            quantized=w.quantized,
            shape=list(w.shape),
            parameters=count * w.parameters,
            bytes=count * (w.code_bytes + w.scale_bytes),
            bits_per_weight=8 * (w.code_bytes + w.scale_bytes) / w.parameters if w.parameters else 0.0,
        )
        for (modules, w), count in folded.items()
    ]


def _parts(
    modules: Mapping[str, Mapping[str, TensorInfo]],
    weights: Mapping[str, StoredWeight],
    prefix: str | None,
    predictors: frozenset[str],
) -> list[Part]:
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in PARTS}
    for module, leaves in modules.items():
        coded = module in weights and weights[module].quantized
        for leaf, info in leaves.items():
            side = leaf in SIDE_LEAVES and (coded or "scale" in leaf)
            codes = coded and leaf in ("weight", "weight_packed", "qweight")
            further = any(f"{module}.".startswith(f"{path}.") for path in predictors)
            part = _part(module, leaf, info, prefix, side=side, codes=codes)
            total = counts["multi-token prediction" if further else part]
            total[0] += 1
            total[1] += weights[module].parameters if codes else 0 if side else info.numel
            total[2] += info.size_bytes
    return [Part(name=n, tensors=t, parameters=p, bytes=b) for n, (t, p, b) in counts.items() if t]


def _part(module: str, leaf: str, info: TensorInfo, prefix: str | None, *, side: bool, codes: bool) -> str:
    """Which of :data:`PARTS` a tensor belongs to."""
    match = NUMBERED.match(f"{module}.{leaf}")
    in_block = match is not None and prefix is not None and match["prefix"] == prefix
    if not in_block:
        if NOT_LANGUAGE.search(module):
            return "vision, audio and projector"
        if HEAD.search(module):
            return "lm_head"
        if EMBEDDING.search(module):
            return "embeddings"
    if in_block and side:
        return "decoder scales"
    if "norm" in module.rpartition(".")[2] or re.search(r"(^|\.)ln_\w+$", module):
        return "norms"
    if in_block and (codes or len(info.shape) >= 2):
        return "decoder linears"
    return "other"


def _num_blocks(checkpoint: Checkpoint, predictors: frozenset[str]) -> int:
    prefix = find_block_prefix(checkpoint.tensors)
    found = (NUMBERED.match(name) for name in checkpoint.tensors)
    blocks = {m["index"] for m in found if m is not None and m["prefix"] == prefix}
    return len(blocks - {path.rpartition(".")[2] for path in predictors})


def _predictors(names: Iterable[str]) -> frozenset[str]:
    """Paths of the layers that predict further tokens than the next, such as ``model.layers.61`` of DeepSeek-V3."""
    return frozenset(n.removesuffix(f".{PREDICTOR}.weight") for n in names if n.endswith(f".{PREDICTOR}.weight"))


def _method(config: Mapping[str, Any], quantized: list[StoredWeight]) -> str:
    if config:
        return str(config.get("quant_method") or "unknown")
    return "unknown" if quantized else "none"


def _format(config: Mapping[str, Any]) -> str | None:
    for key in ("format", "checkpoint_format", "version", "fmt"):
        if isinstance(config.get(key), str):
            return str(config[key])
    return None


def _contradictions(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, StoredWeight]
) -> list[str]:
    quantized = any(w.quantized for w in weights.values())
    notes = []
    if quantized and not config:
        notes.append(
            "quantised tensors are there, but config.json has no quantization_config: engines cannot load them"
        )
    if config and not quantized:
        notes.append("config.json has a quantization_config, but no tensor is stored in a quantised form known here")
    odd = [n for n, t in checkpoint.tensors.items() if t.dtype == "U8" and not n.endswith("weight_packed")]
    if odd:
        notes.append(
            f"{len(odd)} tensors are raw bytes (U8) of a format unknown here, e.g. {odd[0]}: a byte is counted as a"
            " parameter"
        )
    return notes


def block_errors(linears: list[LinearRecord]) -> list[BlockError]:
    """Mean and worst relative error of each block's Linears."""
    blocks: dict[int, list[LinearRecord]] = defaultdict(list)
    for linear in linears:
        blocks[linear.block].append(linear)
    found = []
    for index in sorted(blocks):
        worst = max(blocks[index], key=lambda linear: linear.relative_error)
        found.append(
            BlockError(
                block=index,
                linears=len(blocks[index]),
                mean_relative_error=sum(x.relative_error for x in blocks[index]) / len(blocks[index]),
                worst=worst.name,
                worst_relative_error=worst.relative_error,
            )
        )
    return found


def _record(kind: type[T], path: Path, notes: list[str]) -> T | None:
    """A record beside the weights; one that cannot be read is noted, since the weights can still be described."""
    if not path.exists():
        return None
    try:
        return read_record(kind, path)
    except CheckpointError as e:
        notes.append(str(e))
        return None
