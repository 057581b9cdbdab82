"""What a compressed-tensors checkpoint must hold, worked out from its config, against what it does hold.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side. The config is parsed
by the compressed-tensors library; the classes of the modules come from the model that transformers builds on the meta
device; names, shapes and dtypes come from the headers of the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic
from compressed_tensors.quantization import QuantizationConfig

from halfbyte.errors import CheckpointError
from halfbyte.reference import FLOATS, PACKED_BITS, StoredTensor
from halfbyte.schemes import WeightFormat
from halfbyte.verifier_experts import Fused, numbers_in, place_of, scheme_problems

Storage = Literal["packed", "plain"]

# last names of tensors that belong to a quantised weight ...
WEIGHT_COMPANIONS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
)
# ... and to the activations around it, which other tools may store
ACTIVATION_COMPANIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
PLAIN_CODES = ("I8", "F8_E4M3")
# Linears that engines fuse into one: all of a row are quantised alike, or none
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One config group: what it targets, how it stores a weight; ``unsupported`` says why it is not decoded."""

    name: str
    targets: list[str]
    format: WeightFormat | None
    storage: Storage
    strategy: str
    unsupported: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """The quantisation config as the engines read it: exact names first, then ``re:`` patterns, then class names."""

    groups: list[Group]
    ignore: list[str]

    def group_of(self, module: str, classes: frozenset[str]) -> Group | None:
        """The group whose target fits best, ``None`` where none does."""
        for fits in (lambda t: t == module, lambda t: _pattern_fits(t, module), lambda t: t in classes):
            for group in self.groups:
                if any(fits(t) for t in group.targets):
                    return group
        return None

    def ignored_by(self, module: str, classes: frozenset[str]) -> str | None:
        """The first ignore entry that covers a module."""
        return next((i for i in self.ignore if i == module or _pattern_fits(i, module) or i in classes), None)


def _pattern_fits(pattern: str, module: str) -> bool:
    return pattern.startswith("re:") and re.match(pattern[3:], module) is not None


def parse_rules(quantization: Any) -> Rules:
    """Parse ``quantization_config``; what the library or a regular expression rejects is a :class:`CheckpointError`."""
    where = "config.json"
    if not isinstance(quantization, dict):
        raise CheckpointError("quantization_config is not an object", where=where)
    try:
        parsed = QuantizationConfig.model_validate(quantization)
    except (pydantic.ValidationError, ValueError, NotImplementedError, KeyError, TypeError) as e:
        raise CheckpointError(f"quantization_config is rejected by compressed-tensors: {e}", where=where) from None
    ignore = list(parsed.ignore or [])
    for entry in [*ignore, *(t for g in parsed.config_groups.values() for t in g.targets)]:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as e:
                raise CheckpointError(f"{entry} is not a regular expression: {e}", where=where) from None
    return Rules([_group(n, g, parsed.format) for n, g in parsed.config_groups.items()], ignore)


def _group(name: str, scheme: Any, overall: str) -> Group:
    layout = str(scheme.format or overall)
    args, reason = scheme.weights, ""
    storage: Storage = "packed" if layout == "pack-quantized" else "plain"
    if args is None:
        return Group(
            name=name,
            targets=scheme.targets,
            format=None,
            storage=storage,
            strategy="",
            unsupported="does not quantise weights",
        )
    if layout not in ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"):
        reason = f"format {layout}"
    elif args.strategy not in ("group", "channel", "tensor", "block") or (storage == "packed" and args.block_structure):
        reason = f"strategy {args.strategy}"
    elif storage == "packed" and (args.type != "int" or args.num_bits not in PACKED_BITS):
        reason = f"packed {args.type}{args.num_bits}"
    elif storage == "plain" and (args.num_bits > 8 or (args.type == "float" and args.num_bits != 8)):
        reason = f"{args.type}{args.num_bits}"
    fmt = WeightFormat(
        num_bits=args.num_bits,
        kind="float" if args.type == "float" else "int",
        symmetric=args.symmetric,
        group_size=args.group_size if args.strategy == "group" else None,
        block=None if args.block_structure is None else (args.block_structure[0], args.block_structure[1]),
    )
    return Group(
        name=name,
        targets=list(scheme.targets),
        format=fmt,
        storage=storage,
        strategy=str(args.strategy),
        unsupported=reason,
    )


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """A module that is quantised on disk: its tensors by last name, and its config group (``None`` if none fits)."""

    name: str
    parts: dict[str, StoredTensor]
    group: Group | None

    @property
    def decodable(self) -> bool:
        return self.group is not None and self.group.format is not None and not self.group.unsupported


def quantized_parts(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors of every module that is quantised on disk, by module and last name; biases do not belong."""
    modules = set()
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in WEIGHT_COMPANIONS or (last == "weight" and tensor.dtype in PLAIN_CODES):
            modules.add(module)
    parts: dict[str, dict[str, StoredTensor]] = {m: {} for m in sorted(modules)}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if module in parts and last in ("weight", *WEIGHT_COMPANIONS, *ACTIVATION_COMPANIONS):
            parts[module][last] = tensor
    return parts


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What transformers' model has, by module name; empty where it is unknown.

    Attributes:
        classes: of its modules; shapes: of its Linears' weights.
        fused: experts in stacks, by the indices in their path.
    """

    classes: Mapping[str, frozenset[str]]
    shapes: Mapping[str, tuple[int, ...]]
    fused: Mapping[tuple[str, ...], Fused] = field(default_factory=dict)

    def classes_of(self, module: str) -> frozenset[str]:
        """Class names of a module; where disk and transformers differ in prefixes, those of modules that end alike."""
        if module in self.classes:
            return self.classes[module]
        tail = module.split(".")[-2:]
        alike = {c for n, c in self.classes.items() if n.split(".")[-2:] == tail}
        return alike.pop() if len(alike) == 1 else frozenset()

    def shape_of(self, module: str) -> tuple[int, ...] | None:
        """Shape of a Linear's weight, of one in a stack too; ``None`` where it is unknown."""
        place = place_of(module)
        if module in self.shapes or place is None:
            return self.shapes.get(module)
        fused = self.fused.get(numbers_in(place.layer))
        return fused.shape_of(place.leaf) if fused else None


def config_problems(
    rules: Rules, modules: Sequence[QuantizedModule], dense: Mapping[str, StoredTensor], skeleton: Skeleton
) -> list[str]:
    """Where config and disk disagree about what is quantised."""
    problems = []
    groups: dict[str, str] = {}
    for m in modules:
        ignored = rules.ignored_by(m.name, skeleton.classes_of(m.name) or frozenset({"Linear"}))
        if ignored is not None:
            problems.append(f"{m.name} is quantised on disk, but config.json ignores it ({ignored!r})")
        elif m.group is None:
            problems.append(f"{m.name} is quantised on disk, but no config group targets it")
        groups[m.name] = m.group.name if m.group else ""
    quantized_tails = {m.name.rpartition(".")[2] for m in modules}
    for name, tensor in dense.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or len(tensor.shape) != 2:
            continue
        classes = skeleton.classes_of(module)
        if not classes and module.rpartition(".")[2] in quantized_tails:
            classes = frozenset({"Linear"})
        group = rules.group_of(module, classes)
        if group is not None and group.format is not None and rules.ignored_by(module, classes) is None:
            problems.append(
                f"{module} is dense on disk, but config group {group.name} targets it and no ignore entry covers it"
            )
        groups.setdefault(module, "dense")
    if not modules:
        problems.append("quantization_config is there, but no tensor is quantised")
    for fused in FUSED:
        for module in groups:
            parent, _, last = module.rpartition(".")
            if last == fused[0]:
                kinds = {s: groups[f"{parent}.{s}"] for s in fused if f"{parent}.{s}" in groups}
                if len(set(kinds.values())) > 1:
                    listed = ", ".join(f"{s}: {k or 'no group'}" for s, k in kinds.items())
                    problems.append(f"{parent}: engines fuse {'/'.join(fused)}, which must agree ({listed})")
    return problems + scheme_problems(groups) + _unforeseen(rules, modules, skeleton)


def _unforeseen(rules: Rules, modules: Sequence[QuantizedModule], skeleton: Skeleton) -> list[str]:
    """Linears that the config makes transformers take for quantised, and that are not, under whatever name on disk.

    An ignore entry that is written for the names on disk need not cover transformers' names. Modules are counted by the
    indices in their names, which both have alike.
    """
    targeted: dict[tuple[str, ...], list[str]] = {}
    for name, classes in skeleton.classes.items():
        group = rules.group_of(name, classes) if "Linear" in classes and place_of(name) is None else None
        if group is not None and group.format is not None and rules.ignored_by(name, classes) is None:
            targeted.setdefault(numbers_in(name), []).append(name)
    stored: dict[tuple[str, ...], list[str]] = {}
    for m in modules:
        if place_of(m.name) is None:
            stored.setdefault(numbers_in(m.name), []).append(m.name.rpartition(".")[2])
    problems = []
    for numbers, names in targeted.items():
        leaves = stored.get(numbers, [])
        if len(names) > len(leaves):
            others = [n for n in names if n.rpartition(".")[2] not in leaves] or names
            problems += [
                f"{n} is not quantised, but transformers takes it to be: no ignore entry covers it" for n in others
            ]
    return problems


def _scale_shape(fmt: WeightFormat, out_features: int, in_features: int) -> tuple[int, int]:
    """``[out, groups]``; of blocks ``[ceil(out / rows), in / columns]``. Not the planner's own word for it."""
    if fmt.block is None:
        return out_features, fmt.groups(in_features)
    height, width = fmt.block
    return -(-out_features // height), in_features // width


def module_problems(
    module: QuantizedModule, *, model_dtype: str | None, expected_shape: tuple[int, ...] | None
) -> list[str]:
    """Missing, unexpected, mistyped or misshapen tensors of one quantised module.

    Args:
        module: the module, whose group must be decodable.
        model_dtype: dtype that scales must have; ``None`` accepts every float dtype (other tools' checkpoints).
        expected_shape: ``(out, in)`` from the source or the model, where known.
    """
    assert module.group is not None
    assert module.group.format is not None
    name, parts, fmt, packed = module.name, module.parts, module.group.format, module.group.storage == "packed"
    needed = {"weight_packed", "weight_scale", "weight_shape"} if packed else {"weight", "weight_scale"}
    needed |= set() if fmt.symmetric else {"weight_zero_point"}
    problems = [f"{name}.{n} is missing" for n in sorted(needed - parts.keys())]
    unexpected = parts.keys() - needed - set(ACTIVATION_COMPANIONS)
    problems += [f"{name}.{n} does not belong to {module.group.name}" for n in sorted(unexpected)]
    if needed - parts.keys():
        return problems

    def check(last: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> None:
        t = parts[last]
        if t.dtype not in dtypes:
            problems.append(f"{name}.{last} has dtype {t.dtype}, not {' or '.join(dtypes)}")
        if t.shape not in shapes:
            problems.append(f"{name}.{last} has shape {list(t.shape)}, not {list(shapes[0])}")

    body = parts["weight_packed" if packed else "weight"]
    if len(body.shape) != 2:
        return [*problems, f"{body.name} has shape {list(body.shape)}, not two dimensions"]
    if packed:
        stated = parts["weight_shape"]
        check("weight_shape", ("I64",) if model_dtype else ("I64", "I32"), (2,))
        if stated.shape != (2,) or stated.dtype not in ("I64", "I32"):
            return problems
        out_features, in_features = (int(n) for n in stated.rows())
        if min(out_features, in_features) < 1:
            return [*problems, f"{stated.name} holds {[out_features, in_features]}, not a shape"]
        check("weight_packed", ("I32",), (out_features, -(-in_features * fmt.num_bits // 32)))
    else:
        out_features, in_features = body.shape
        check("weight", ("F8_E4M3",) if fmt.kind == "float" else ("I8",), body.shape)
    if expected_shape is not None and (out_features, in_features) != expected_shape:
        problems.append(f"{name} is stored as {[out_features, in_features]}, the model has {list(expected_shape)}")
    if not fmt.fits(in_features):
        unit = f"groups of {fmt.group_size}" if fmt.block is None else f"blocks of {fmt.block[0]} x {fmt.block[1]}"
        return [*problems, f"{name}: {in_features} input features do not divide into {unit}"]
    shapes = (
        ((1,), (), (1, 1)) if module.group.strategy == "tensor" else (_scale_shape(fmt, out_features, in_features),)
    )
    check("weight_scale", (model_dtype,) if model_dtype else FLOATS, *shapes)
    if not fmt.symmetric and packed:
        check("weight_zero_point", ("I32",), (-(-out_features * fmt.num_bits // 32), fmt.groups(in_features)))
    elif not fmt.symmetric:
        check("weight_zero_point", ("I8",), *shapes)
    return problems
