"""What will happen to every tensor, what it will cost, and every reason why it cannot: before any work starts.

Works on headers and the config alone: no weights are read, no model code runs, so a 70B checkpoint (or a hub id whose
headers alone are fetched) is planned in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from halfbyte.architectures import (
    EXPERT_MODULE,
    EXPERTS_AS_THEY_ARE,
    FUSED,
    KEPT_MODULES,
    KNOWN_ARCHITECTURES,
    NOT_LANGUAGE,
    OTHER_SPELLINGS,
    BlockMap,
    map_blocks,
)
from halfbyte.arithmetic import COMPUTE_DTYPES, ComputeDtype, compute_dtype
from halfbyte.calibration import (
    absent_sources,
    calibration_problems,
    default_spec,
    parse_spec,
    tokens_per_batch,
)
from halfbyte.checkpoint.layout import TensorSpec
from halfbyte.checkpoint.reader import DTYPES, Checkpoint, TensorInfo
from halfbyte.checkpoint.source import open_headers
from halfbyte.checkpoint.stacks import stack_of, unstacked
from halfbyte.errors import ArchitectureError, CheckpointError, HalfbyteError, RecipeError, UsageError
from halfbyte.estimates import RESIDENT_EXPERTS, CalibrationWork, estimate, largest_experts, settle_offload
from halfbyte.methods.tuning import end_to_end_of, tuning_of
from halfbyte.mixing import MEASURED_SEQ_LEN, MEASURED_SEQUENCES, Budget, budget_of, measured_sequences
from halfbyte.packing import stored_tensors
from halfbyte.recipe import EFFORTS, WIDER, Effort, Recipe, load_recipe, mixing_problem, wider
from halfbyte.records import MixedPlan, Plan, TensorPlan
from halfbyte.schemes import PRESETS, Scheme, block_problem, group_size_problem, preset

GroupSize = int | Literal["channel"] | None
WEIGHT_DTYPES = ("BF16", "F16", "F32")
UNREAD_EXPERTS = "this family's experts stay as they are: vLLM would silently leave out quantised ones"
UNKNOWN_STACKS = "three-dimensional weights whose layout is not known stay as they are"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPlan:
    """The plan with what the pipeline needs to carry it out.

    ``checkpoint`` is the source with stacked experts that will be quantised seen one by one.
    ``budget`` is there while ``target_bits`` has not been spent: ``schemes`` and ``outputs`` are then the recipe's.
    """

    plan: Plan
    checkpoint: Checkpoint
    blocks: BlockMap
    schemes: dict[str, Scheme]
    outputs: list[TensorSpec]
    calibration: CalibrationWork
    problems: list[HalfbyteError]
    ignore_patterns: list[str]
    budget: Budget | None = None


def plan(
    source: str | Path,
    *,
    scheme: str = "W4A16",
    group_size: GroupSize = None,
    method: Literal["gptq", "rtn"] | None = None,
    ignore: Sequence[str] = (),
    recipe: Path | None = None,
    effort: Effort | None = None,
    target_bits: float | None = None,
    all_experts: bool | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    offload: bool | None = None,
    dtype: ComputeDtype = "auto",
) -> Plan:
    """Plan a quantisation.

    Args:
        source: a checkpoint folder or a hub id.
        scheme, group_size, method, ignore: what to do, unless a recipe says so.
        recipe: a recipe file; ``scheme``, ``group_size`` and ``method`` must then be left alone.
        effort, target_bits, all_experts: as for :func:`halfbyte.quantize`.
        calibration, samples, seq_len, offload, dtype: as for :func:`halfbyte.quantize`; the estimates depend on them.

    Returns:
        the plan; ``problems`` lists everything that would stop it, all at once.

    Raises:
        CheckpointError: the source is no checkpoint at all.
        UsageError, RecipeError: options or recipe make no sense.
    """
    chosen = choose_recipe(
        scheme=scheme,
        group_size=group_size,
        method=method,
        ignore=ignore,
        recipe=recipe,
        effort=effort,
        target_bits=target_bits,
        all_experts=all_experts,
    )
    require_calibration(chosen, calibration)
    found: list[HalfbyteError] = []
    checkpoint = open_headers(source, found)
    size = calibration_work(chosen, checkpoint, calibration, samples, seq_len, offload=offload, dtype=dtype)
    if size.spec is not None:
        found += absent_sources(size.spec)
    return make_plan(checkpoint, chosen, size, found=found).plan


def choose_recipe(
    *,
    scheme: str,
    group_size: GroupSize,
    method: Literal["gptq", "rtn"] | None,
    ignore: Sequence[str],
    recipe: Path | None,
    effort: Effort | None,
    target_bits: float | None = None,
    all_experts: bool | None = None,
) -> Recipe:
    """The recipe of a file, or one made of options; ``effort`` and those after it go before the recipe's."""
    chosen = _recipe_of(scheme, group_size, method, ignore, recipe)
    if all_experts is not None:
        chosen = replace(chosen, experts=replace(chosen.experts, all_tokens=all_experts))
    if target_bits is not None:
        unmixable = mixing_problem([group.scheme for group in chosen.groups])
        if unmixable:
            raise UsageError(
                unmixable.replace("target_bits", "--target-bits"),
                where=f"--target-bits {target_bits:g}",
                remedy="Use --scheme W4A16, or leave --target-bits out.",
            )
        chosen = replace(chosen, target_bits=target_bits)
    if effort is None:
        return chosen
    if effort not in EFFORTS:
        raise UsageError(f"unknown effort {effort!r}", where="--effort", remedy=f"Use {' or '.join(EFFORTS)}.")
    if effort == "high" and chosen.method != "gptq":
        raise UsageError(
            "effort high tunes what GPTQ has found, and this is round-to-nearest",
            where="--effort high",
            remedy="Use --method gptq with an integer scheme, or leave --effort out.",
        )
    return replace(chosen, effort=effort)


def _recipe_of(
    scheme: str,
    group_size: GroupSize,
    method: Literal["gptq", "rtn"] | None,
    ignore: Sequence[str],
    recipe: Path | None,
) -> Recipe:
    if recipe is None:
        return Recipe.of_options(preset(scheme).with_group_size(group_size), method=method, ignore=list(ignore))
    if group_size is not None or method is not None or ignore:
        raise UsageError(
            "a recipe already says scheme, group size, method and what to ignore",
            where="--recipe",
            remedy="Put them into the recipe, or leave the recipe out.",
        )
    return load_recipe(recipe)


def require_calibration(recipe: Recipe, calibration: str | None) -> None:
    """Stop at a calibration spec that cannot be, before anything is opened."""
    spec = calibration or recipe.calibration
    if spec is not None:
        parse_spec(spec)


def calibration_work(
    recipe: Recipe,
    checkpoint: Checkpoint,
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    *,
    offload: bool | None,
    device: str = "cpu",
    dtype: ComputeDtype = "auto",
) -> CalibrationWork:
    """Options before recipe before defaults: 128 samples of 512 tokens that the model writes, where it fits.

    Rounding to nearest needs none, or with a target for bits the few that sensitivities are measured on.
    """
    if dtype not in COMPUTE_DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", where="--dtype", remedy=f"Use {', '.join(COMPUTE_DTYPES)}.")
    observed = recipe.method != "rtn"
    if not observed and recipe.target_bits is None:
        return CalibrationWork(spec=None, samples=0, seq_len=0, observed=False)
    usual = (128, 512) if observed else (MEASURED_SEQUENCES[1], MEASURED_SEQ_LEN)
    count = next(n for n in (samples, recipe.samples, usual[0]) if n is not None)
    length = next(n for n in (seq_len, recipe.seq_len, usual[1]) if n is not None)
    spec, reason = calibration or recipe.calibration, ""
    if spec is None:
        spec, reason = default_spec(checkpoint.size_bytes, checkpoint.text_config, count, length, device)
    schemes = [group.scheme for group in recipe.groups] + ([] if recipe.target_bits is None else [preset(WIDER)])
    sample_tokens = max(length, tokens_per_batch(device, tuned=True))
    return CalibrationWork(
        spec=spec,
        samples=count,
        seq_len=length,
        observed=observed,
        offload=offload,
        dtype=compute_dtype(dtype, stored_dtype(checkpoint, device), device, max(s.weights.num_bits for s in schemes)),
        tuning=tuning_of(recipe, sample_tokens),
        end_to_end=end_to_end_of(recipe, sample_tokens),
        reason=reason,
    )


def stored_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """What engines compute in; on a CPU bfloat16 only where all matrices are stored so."""
    matrices = {t.dtype for t in checkpoint.tensors.values() if len(t.shape) > 1}
    return checkpoint.dtype if device != "cpu" or matrices <= {"BF16"} else torch.float32


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, size: CalibrationWork, *, found: Iterable[HalfbyteError] = ()
) -> WorkPlan:
    """Sort tensors, collect problems, add up bytes. ``found`` are problems that reading the headers brought up."""
    problems = list(found)
    if size.spec is not None:
        problems += calibration_problems(size.spec, checkpoint.path, checkpoint.config)
    notes = [size.reason] if size.reason else []
    if isinstance(checkpoint.config.get("quantization_config"), dict):
        problems.append(
            CheckpointError(
                f"is quantised already ({checkpoint.config['quantization_config'].get('quant_method')})",
                where=checkpoint.name,
                remedy="Start from the original checkpoint.",
            )
        )
    checkpoint = with_experts(checkpoint, recipe)
    try:
        blocks = map_blocks(checkpoint, problems)
    except ArchitectureError as e:
        problems.append(e)
        blocks = BlockMap("", (), (), tuple(checkpoint.tensors), ())
    if blocks.num_blocks and checkpoint.architecture not in KNOWN_ARCHITECTURES:
        notes.append(
            f"architecture {checkpoint.architecture} is not among those tested; its {blocks.num_blocks} blocks were "
            "found by the general rule"
        )
    if blocks.unsupported:
        notes.append(f"{UNREAD_EXPERTS if is_unread(checkpoint) else UNKNOWN_STACKS} ({blocks.unsupported[0]})")
    schemes: dict[str, Scheme] = {}
    outputs: list[TensorSpec] = []
    tensors: list[TensorPlan] = []
    linear_of = {f"{m}.weight": (m, i) for i, block in enumerate(blocks.linears) for m in block}
    block_of = {n: i for i in range(blocks.num_blocks) for n in blocks.others[i]}
    everything = [m for block in blocks.linears for m in block]
    if blocks.num_blocks:
        strays = [p for p in recipe.unmatched(everything) if "lm_head" not in p]
        notes += [f"pattern {p!r} matches no Linear of the decoder blocks" for p in strays]
    for name, info in checkpoint.tensors.items():
        module, index = linear_of.get(name, ("", block_of.get(name)))
        scheme = recipe.scheme_for(module) if module else None
        problem = _linear_problem(info, module, scheme) if scheme is not None else None
        if problem is not None:
            problems.append(problem)
        if scheme is None or problem is not None:
            reason = "problem" if problem else _copy_reason(module, name, index)
            outputs.append(TensorSpec(name=name, dtype=info.dtype, shape=info.shape))
            tensors.append(_copied(info, index, reason))
            continue
        schemes[module] = scheme
        out_features, in_features = info.shape
        stored = stored_tensors(scheme, (out_features, in_features), info.dtype)
        specs = [TensorSpec(name=f"{module}.{leaf}", dtype=d, shape=s) for leaf, (d, s) in stored.items()]
        outputs += specs
        after = sum(s.size_bytes for s in specs)
        tensors.append(
            TensorPlan(
                name=name,
                action="quantize",
                shape=list(info.shape),
                dtype=info.dtype,
                bytes_before=info.size_bytes,
                bytes_after=after,
                block=index,
                scheme=scheme.name,
                group_size=scheme.weights.group_size,
                bits_per_weight=8 * after / info.numel,
            )
        )
    notes += dict.fromkeys(s.note for s in schemes.values() if s.note)
    problems += _pattern_problems(blocks, recipe)
    if blocks.num_blocks and not schemes and not problems:
        problems.append(
            UsageError(
                "nothing is left to quantise: every Linear is ignored or untargeted",
                where="--ignore",
                remedy="Narrow it.",
            )
        )
    budget = None
    if recipe.target_bits is not None and schemes:
        budget = budget_of(blocks, schemes, checkpoint.tensors, recipe.target_bits)
        problems += [p for p in (budget.problem(),) if p is not None]
        sequences, length = measured_sequences(len(budget.units)), min(MEASURED_SEQ_LEN, size.seq_len)
        measured = min(sequences, size.samples) * length
        size = replace(size, units=len(budget.units), measured_tokens=measured)
        tensors = [_undecided(t, schemes) for t in tensors]
        notes.append(
            f"which Linears get {WIDER}, up to {recipe.target_bits:g} bits a weight, `quantize` finds out by measuring "
            f"{size.units} units on {measured} calibration tokens"
            + ("" if size.observed else "; for this alone, rounding to nearest needs calibration text")
        )
        notes += {preset(WIDER).note}.difference(notes)
    if size.tuning is not None and largest_experts(tensors) * size.dtype.itemsize > RESIDENT_EXPERTS:
        size = replace(size, tuning=None, end_to_end=None)
        notes.append("blocks are not tuned after GPTQ: their experts are too many to be in memory together")
    unused = [key for key in ("tune_codes", "tune_norms") if getattr(recipe.gptq, key)]
    if size.tuning is None and unused:
        notes.append(f"{' and '.join(unused)} in the recipe change nothing, because blocks are not tuned")
    rounded = any(s.activations is not None and s.activations.kind == "int" for s in schemes.values())
    if rounded and recipe.method == "gptq" and recipe.gptq.smoothing and not recipe.gptq.true_sequential:
        notes.append(
            "nothing is smoothed: true_sequential = false in the recipe observes all inputs of a block at once"
        )
    size = settle_offload(checkpoint, tensors, size)
    summary = _summary(checkpoint, blocks, recipe, tensors, size, problems, notes, budget)
    return WorkPlan(
        plan=summary,
        checkpoint=checkpoint,
        blocks=blocks,
        schemes=schemes,
        outputs=outputs,
        calibration=size,
        problems=problems,
        ignore_patterns=ignore_patterns(blocks, recipe, schemes),
        budget=budget,
    )


def with_experts(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with those stacks of experts seen one by one of which the recipe quantises something."""
    if is_unread(checkpoint):
        return checkpoint
    layer_of = {n: s.parent for n, t in checkpoint.tensors.items() if (s := stack_of(n, t.shape)) is not None}
    used = {
        layer_of[info.slab.stack]
        for name, info in unstacked(checkpoint).tensors.items()
        if info.slab is not None
        and info.slab.stack in layer_of
        and recipe.scheme_for(name.removesuffix(".weight")) is not None
    }
    return unstacked(checkpoint, keep=frozenset(n for n, layer in layer_of.items() if layer not in used))


def is_unread(checkpoint: Checkpoint) -> bool:
    """Whether no engine would read this family's experts once they are quantised."""
    return str(checkpoint.text_config.get("model_type")) in EXPERTS_AS_THEY_ARE


def ignore_patterns(blocks: BlockMap, recipe: Recipe, schemes: dict[str, Scheme]) -> list[str]:
    """The ``ignore`` list of the written config: what loaders must leave unquantised, as ``re:.*NAME.*``.

    vLLM, transformers and the files spell the same module with different prefixes, so patterns name the part that all
    of them share; the head is listed under its plain name too, which is what loaders look for.
    """
    patterns = ["lm_head"]
    if blocks.decoder_prefix not in ("model.", ""):
        patterns.append("re:.*lm_head.*")
    # Heads that predict further tokens are numbered like blocks, after the last one.
    numbered = re.compile(re.escape(blocks.prefix) + r"\.(\d+)\.")
    for name in blocks.outside:
        further = numbered.match(name) if blocks.prefix else None
        if further is not None:
            patterns.append(f"re:.*{re.escape(blocks.prefix.rpartition('.')[2])}\\.{further[1]}\\..*")
        match = NOT_LANGUAGE.search(name)
        if match is not None:
            component = next(part for part in name.split(".") if NOT_LANGUAGE.search(part))
            patterns.append(f"re:.*{re.escape(component)}.*")
    for i in range(blocks.num_blocks):
        for name in blocks.others[i]:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and KEPT_MODULES.search(module):
                tail = module.removeprefix(f"{blocks.prefix}.{i}.")
                spellings = (tail, OTHER_SPELLINGS[tail]) if tail in OTHER_SPELLINGS else (tail,)
                patterns += [f"re:.*{re.escape(spelling)}$" for spelling in spellings]
            if ".experts." in name and EXPERT_MODULE.match(module) is None:
                tail = name.partition(".experts.")[0].removeprefix(f"{blocks.prefix}.{i}.")
                patterns.append(f"re:.*{re.escape(tail)}\\.experts.*")
    patterns += recipe.ignore
    covered = Recipe(groups=recipe.groups, ignore=tuple(patterns))
    targeted = [m for block in blocks.linears for m in block if m not in schemes]
    patterns += [m for m in targeted if covered.scheme_for(m) is not None]
    return list(dict.fromkeys(patterns))


def _linear_problem(info: TensorInfo, module: str, scheme: Scheme) -> HalfbyteError | None:
    if info.dtype not in WEIGHT_DTYPES:
        return CheckpointError(
            f"is stored as {info.dtype}, not as one of {', '.join(WEIGHT_DTYPES)}",
            where=info.name,
            remedy="Start from the original checkpoint.",
        )
    size = scheme.weights.group_size
    if size is not None and not scheme.weights.fits(info.shape[1]):
        return UsageError(group_size_problem(info.shape[1], size), where=module)
    block = scheme.weights.block
    if block is not None:
        leaf = module.rpartition(".")[2]
        reason = block_problem(info.shape, block, fused=any(leaf in members for members in FUSED))
        return None if reason is None else UsageError(reason, where=module)
    if not scheme.weights.symmetric and info.shape[0] % (32 // scheme.weights.num_bits):
        return UsageError(
            f"out_features {info.shape[0]} is not divisible by 8, which packed zero points need",
            where=module,
            remedy="Use the symmetric W4A16, or skip it with --ignore.",
        )
    return None


def _pattern_problems(blocks: BlockMap, recipe: Recipe) -> list[HalfbyteError]:
    """Linears that engines would read otherwise than they were written."""
    problems: list[HalfbyteError] = [
        RecipeError(
            "patterns of two groups cover it with different schemes, and loaders disagree on which one wins",
            where=name,
            remedy="Write patterns that do not overlap.",
        )
        for name in recipe.contested([m for block in blocks.linears for m in block])[:1]
    ]
    split: dict[str, list[str]] = {}
    for block in blocks.linears:
        for members in FUSED:
            together: dict[str, list[str]] = {}
            for module in block:
                parent, _, leaf = module.rpartition(".")
                if leaf in members:
                    together.setdefault(parent, []).append(module)
            for parent, parts in together.items():
                if len({recipe.scheme_for(m) for m in parts}) > 1:
                    listed = ", ".join(f"{m.rpartition('.')[2]} {_name_of(recipe.scheme_for(m))}" for m in parts)
                    split.setdefault(listed, []).append(parent)
    problems += _mixed_experts(blocks, recipe)
    problems += [
        UsageError(
            f"vLLM fuses these into one layer, so they must share one scheme: {listed}",
            where=parents[0] + (f" and {len(parents) - 1} more" if len(parents) > 1 else ""),
            remedy="Treat them alike in --ignore and in the recipe's targets.",
        )
        for listed, parents in split.items()
    ]
    return problems


def _mixed_experts(blocks: BlockMap, recipe: Recipe) -> list[HalfbyteError]:
    """Layers whose experts would not all be treated alike: vLLM holds them in one tensor, and asks for the first's."""
    for block in blocks.linears:
        layers: dict[str, dict[str, str]] = {}
        for module in block:
            match = EXPERT_MODULE.match(module)
            if match is not None:
                layers.setdefault(match["layer"], {}).setdefault(_name_of(recipe.scheme_for(module)), module)
        for layer, found in layers.items():
            if len(found) > 1:
                listed = ", ".join(f"{module.removeprefix(layer + '.')} {scheme}" for scheme, module in found.items())
                return [
                    UsageError(
                        f"vLLM keeps a layer's experts in one tensor, so they must share one scheme: {listed}",
                        where=layer,
                        remedy="Treat all experts of a layer alike in --ignore and in the recipe's targets.",
                    )
                ]
    return []


def _name_of(scheme: Scheme | None) -> str:
    if scheme is None:
        return "unquantised"
    return f"{scheme.name} g{scheme.weights.group_size}" if scheme.weights.group_size else scheme.name


def _copy_reason(module: str, name: str, index: int | None) -> str:
    if module:
        return "ignored by the recipe"
    if index is not None:
        return "not a Linear weight"
    return "vision, audio or projector" if NOT_LANGUAGE.search(name) else "outside the decoder blocks"


def _copied(info: TensorInfo, index: int | None, reason: str) -> TensorPlan:
    return TensorPlan(
        name=info.name,
        action="copy",
        shape=list(info.shape),
        dtype=info.dtype,
        bytes_before=info.size_bytes,
        bytes_after=info.size_bytes,
        block=index,
        reason=reason,
    )


def _undecided(t: TensorPlan, schemes: dict[str, Scheme]) -> TensorPlan:
    """A Linear's tensor, where it is not known yet which of two schemes it will have."""
    scheme = schemes.get(t.name.removesuffix(".weight")) if t.action == "quantize" else None
    other = wider(scheme) if scheme is not None else None
    return t if other is None else replace(t, scheme=f"{t.scheme} or {other.name}")


def _mixed(budget: Budget, size: CalibrationWork) -> MixedPlan:
    return MixedPlan(
        target_bits=budget.target_bits,
        lowest_bits=budget.lowest_bits,
        highest_bits=budget.highest_bits,
        wider=WIDER,
        units=size.units,
        sequences=min(measured_sequences(size.units), size.samples),
        tokens=size.measured_tokens,
    )


def _summary(
    checkpoint: Checkpoint,
    blocks: BlockMap,
    recipe: Recipe,
    tensors: list[TensorPlan],
    size: CalibrationWork,
    problems: list[HalfbyteError],
    notes: list[str],
    budget: Budget | None,
) -> Plan:
    quantized = [t for t in tensors if t.action == "quantize"]
    parameters = sum(_numel(t) for t in quantized)
    total = sum(_numel(t) for t in tensors)
    extra = 0 if budget is None else budget.extra_bytes
    after = sum(t.bytes_after for t in tensors) + extra
    names = dict.fromkeys(_scheme_label(t) for t in quantized)
    return Plan(
        source=checkpoint.name,
        architecture=checkpoint.architecture,
        block_prefix=blocks.prefix,
        num_blocks=blocks.num_blocks,
        scheme=" + ".join(names),
        method=recipe.method,
        tensors=tensors,
        quantized_parameters=parameters,
        copied_parameters=total - parameters,
        bits_per_weight=8 * (sum(t.bytes_after for t in quantized) + extra) / parameters if parameters else 0.0,
        bits_per_parameter=8 * after / total if total else 0.0,
        bytes_before=sum(t.bytes_before for t in tensors),
        bytes_after=after,
        estimates=estimate(checkpoint, tensors, size, after) if quantized else {},
        problems=[str(p) for p in problems],
        notes=notes,
        mixed=None if budget is None else _mixed(budget, size),
    )


def _scheme_label(t: TensorPlan) -> str:
    if t.group_size:
        return f"{t.scheme} g{t.group_size}"
    blocks = t.scheme in PRESETS and PRESETS[t.scheme].weights.block is not None
    return str(t.scheme) if blocks else f"{t.scheme} per channel"


def _numel(t: TensorPlan) -> int:
    return t.bytes_before // DTYPES[t.dtype].itemsize
