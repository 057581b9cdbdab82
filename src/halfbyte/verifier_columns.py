"""AutoAWQ, AutoGPTQ and AutoRound checkpoints as ``verify`` sees them: what their config says, and their modules.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np

from halfbyte.errors import CheckpointError
from halfbyte.progress import Reporter
from halfbyte.records import Check
from halfbyte.reference import StoredTensor
from halfbyte.reference_columns import ColumnLayout, ColumnWeight, column_problems
from halfbyte.verifier_layout import Skeleton

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
METHODS = ("awq", "gptq", "auto-round")
BITS = {"awq": (4,), "gptq": (2, 3, 4, 8)}
# AutoRound's packing_format: whose layout it is, and what is added to a stored zero point.
PACKINGS: dict[str, tuple[Literal["awq", "gptq"], int]] = {
    "auto_round": ("gptq", 0),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:auto_awq": ("awq", 0),
}
PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")
UNQUANTIZED_BITS = 16
STEP_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ColumnModule:
    """A quantised module, its tensors by last name, and what the config says of it."""

    name: str
    parts: dict[str, StoredTensor]
    layout: ColumnLayout

    def load(self) -> ColumnWeight:
        return ColumnWeight.of(self.parts, self.layout)


def column_modules(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> list[ColumnModule]:
    """Modules with a ``qweight``; :class:`CheckpointError` where the config cannot be followed."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in LEAVES and f"{module}.qweight" in tensors:
            parts.setdefault(module, {})[last] = tensor
    return [ColumnModule(n, parts[n], layout_of(n, quantization)) for n in sorted(parts)]


def layout_of(module: str, quantization: Mapping[str, Any]) -> ColumnLayout:
    """The layout that the config announces for a module."""
    kind, plus = _kind(quantization)
    said = {**quantization, **_override(module, quantization)}
    bits, size = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
    if not _is_group_size(bits) or bits not in BITS[kind] or not _is_group_size(size):
        raise CheckpointError(f"quantization_config says {bits!r} bits in groups of {size!r}")
    return ColumnLayout(kind=kind, bits=bits, group_size=size, plus=plus)


def _kind(quantization: Mapping[str, Any]) -> tuple[Literal["awq", "gptq"], int]:
    """Whose layout it is, and what is added to a stored zero point."""
    if quantization["quant_method"] == "auto-round":
        packing = str(quantization.get("packing_format") or "auto_round")
        if packing not in PACKINGS:
            raise CheckpointError(f"AutoRound's packing_format {packing!r} is not decoded")
        return PACKINGS[packing]
    if quantization["quant_method"] == "awq":
        if str(quantization.get("version", "gemm")).lower() != "gemm":
            raise CheckpointError(f"AutoAWQ's layout {quantization['version']!r} is not decoded")
        return "awq", 0
    stated = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    if stated not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"GPTQ's checkpoint_format {stated!r} is not decoded")
    return "gptq", int(stated == "gptq")


def _override(module: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What GPTQModel's ``dynamic`` or AutoRound's ``extra_config`` says of a module instead of the rest."""
    for pattern, override in _mapping(quantization.get("dynamic")).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
            return _mapping(override)
    extra = _mapping(quantization.get("extra_config"))
    if module in extra:
        return _mapping(extra[module])
    fits = (o for p, o in extra.items() if PATTERN.search(p) and re.search(p, module))
    return _mapping(next(fits, None))


def _is_group_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value == -1)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def config_problems(
    quantization: Mapping[str, Any],
    modules: Sequence[ColumnModule],
    dense: Mapping[str, StoredTensor],
    skeleton: Skeleton,
) -> list[str]:
    """Where config and disk disagree about what is quantised, and what transformers says of the config."""
    problems = []
    if not modules:
        problems.append("quantization_config is there, but no tensor is quantised")
    try:
        from transformers.quantizers.auto import AutoQuantizationConfig

        AutoQuantizationConfig.from_dict(dict(quantization))
    except Exception as e:  # whatever transformers raises is the finding
        problems.append(f"quantization_config is rejected by transformers: {type(e).__name__}: {e}")
    leaves = {m.name.rpartition(".")[2] for m in modules}
    for m in modules:
        covering = _covering(m.name, quantization)
        if covering is not None:
            problems.append(f"{m.name} is quantised on disk, but config.json leaves it alone ({covering!r})")
    for name, tensor in dense.items():
        module, _, last = name.rpartition(".")
        known = "Linear" in skeleton.classes_of(module) or module.rpartition(".")[2] in leaves
        alike = last == "weight" and len(tensor.shape) == 2 and known and module.rpartition(".")[2] != "lm_head"
        if alike and _covering(module, quantization) is None:
            problems.append(f"{module} is dense on disk, and config.json does not say that it is left alone")
    symmetric = quantization.get("quant_method") == "gptq" and quantization.get("sym") is True
    if symmetric and not any(_mapping(o).get("sym") is False for o in _mapping(quantization.get("dynamic")).values()):
        problems += [f"{m.name} has zero points, and config.json says sym" for m in modules if _is_asymmetric(m)]
    return problems


def _is_asymmetric(module: ColumnModule) -> bool:
    if column_problems(module.parts, module.layout):
        return False
    return bool((module.load().zeros != 1 << (module.layout.bits - 1)).any())


def _covering(module: str, quantization: Mapping[str, Any]) -> str | None:
    """What of the config takes a module out: transformers' rules for AutoAWQ's list, or vLLM's, or ``dynamic``, or
    AutoRound's lists."""
    for entry in quantization.get("modules_to_not_convert") or []:
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        if module.endswith(entry) or entry in module or re.match(f"(?:{entry}){boundary}", module):
            return str(entry)
    for pattern in _mapping(quantization.get("dynamic")):
        if pattern.startswith("-:") and re.match(pattern.removeprefix("-:"), module):
            return pattern
    override = _override(module, quantization)
    if "bits" in override:
        return "extra_config" if override["bits"] >= UNQUANTIZED_BITS else None
    blocks = quantization.get("block_name_to_quantize") if quantization["quant_method"] == "auto-round" else None
    listed = blocks.split(",") if isinstance(blocks, str) else blocks if isinstance(blocks, list) else []
    return "block_name_to_quantize" if listed and not module.startswith(tuple(map(str, listed))) else None


def scan_columns(modules: Sequence[ColumnModule], reporter: Reporter) -> tuple[Check, Check, Check]:
    """The checks ``linears``, ``scales`` and ``codes``; every module is read once."""
    misfits: list[str] = []
    scales: list[str] = []
    codes: list[str] = []
    reporter.start("decoding", len(modules))
    for m in modules:
        reporter.advance()
        found = column_problems(m.parts, m.layout)
        misfits += [f"{m.name}: {p}" for p in found]
        if found:
            continue
        weight = m.load()
        bad = int(np.count_nonzero(~np.isfinite(weight.scales)))
        scales += [f"{m.name}.scales: {bad} of {weight.scales.size} scales are not finite"] if bad else []
        beyond = int(np.count_nonzero(weight.zeros > (1 << m.layout.bits) - 1))
        if beyond:
            top = (1 << m.layout.bits) - 1
            codes.append(f"{m.name}.qzeros: {beyond} stored zero points are {top}, read as {top + 1} or as 0")
    reporter.finish()
    counted = f"{len(modules)} modules"
    return (
        _check("linears", misfits, f"{len(modules)} of {counted} have the right tensors, dtypes and shapes"),
        _check("scales", scales, f"finite in {counted}"),
        _check("codes", codes, f"zero points within range in {counted}"),
    )


def _check(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems)
