"""How a module's weight is stored, from tensor headers and ``quantization_config`` alone.

Knows compressed-tensors (packed, int8, float8), AutoAWQ and AutoGPTQ, and block-scaled float8. Shapes are believed over
the config where both say something, because a config describes intentions. Does not cover: reading the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.checkpoint.reader import Checkpoint, TensorInfo, element_bytes
from halfbyte.recipe import matches
from halfbyte.recipe.model import pattern_problem

CODE_DTYPES = ("I8", "F8_E4M3", "F8_E5M2")
SIDE_LEAVES = frozenset(
    {
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        "input_global_scale",
        "input_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
        "k_scale",
        "v_scale",
        "q_scale",
        "qzeros",
        "scales",
        "g_idx",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """The weight of one module.

    Attributes:
        scheme: in words, ``W4A16 g128 sym``, or the dtype of a dense weight.
        quantized: whether the tensor holds codes.
        shape: ``[out_features, in_features]``, of the weight that the codes stand for.
        code_bytes: bytes of the codes, or of the dense weight.
        scale_bytes: bytes of scales, zero points and group indices (``weight_shape`` is not counted).
    """

    scheme: str
    quantized: bool
    shape: tuple[int, ...]
    code_bytes: int
    scale_bytes: int

    @property
    def parameters(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


def quantization_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config's ``quantization_config`` (older files: ``compression_config``), or an empty mapping."""
    for holder in (checkpoint.config, checkpoint.text_config):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, dict):
                return found
    return {}


def stored_weight(
    name: str, leaves: Mapping[str, TensorInfo], config: Mapping[str, Any], checkpoint: Checkpoint
) -> StoredWeight | None:
    """The weight of module ``name``, whose tensors are ``leaves``; ``None`` when it has none."""
    side = sum(t.size_bytes for leaf, t in leaves.items() if leaf in SIDE_LEAVES and leaf != "weight_shape")
    if "qweight" in leaves:
        return _awq_or_gptq(leaves, config, side)
    if "weight_packed" in leaves:
        return _packed(name, leaves, config, checkpoint, side)
    if "weight" not in leaves:
        return None
    weight = leaves["weight"]
    if weight.dtype in CODE_DTYPES and any(leaf in leaves for leaf in ("weight_scale", "weight_scale_inv")):
        return _plain_codes(name, leaves, config, side)
    return StoredWeight(
        scheme=weight.dtype, quantized=False, shape=weight.shape, code_bytes=weight.size_bytes, scale_bytes=0
    )


def _awq_or_gptq(leaves: Mapping[str, TensorInfo], config: Mapping[str, Any], side: int) -> StoredWeight:
    """``qweight`` is ``[in, out/8]`` for AWQ's gemm layout and ``[in/8, out]`` for GPTQ (8 codes a word at 4 bits).

    Which of the two shows in ``scales [groups, out]``: GPTQ keeps a column for each output.
    """
    codes, scales = leaves["qweight"], leaves.get("scales")
    index = leaves.get("g_idx")
    empty = not codes.numel or (index is not None and not index.numel) or (scales is not None and not scales.numel)
    if empty or len(codes.shape) != 2 or (scales is not None and len(scales.shape) != 2):
        return _unknown(codes)
    bits = _bits(config.get("bits", config.get("w_bit")))
    word = 8 * element_bytes(codes.dtype)
    rows, columns = codes.shape
    out_features = scales.shape[1] if scales is not None else columns
    if scales is not None and index is None and columns != out_features:
        in_features = rows
        bits = columns * word // out_features
        symmetric = config.get("zero_point") is False
    else:
        in_features = index.numel if index is not None else rows * word // bits
        bits = rows * word // in_features
        symmetric = config.get("sym") is not False
    groups = scales.shape[0] if scales is not None else 1
    return StoredWeight(
        scheme=_words("int", bits, {}, in_features // groups if groups > 1 else None, "channel", symmetric),
        quantized=True,
        shape=(out_features, in_features),
        code_bytes=codes.size_bytes,
        scale_bytes=side,
    )


def _packed(
    name: str, leaves: Mapping[str, TensorInfo], config: Mapping[str, Any], checkpoint: Checkpoint, side: int
) -> StoredWeight:
    """``weight_packed [..., out, words]``; padding in the last word is told by ``weight_shape`` or by the groups."""
    codes, scale, shape = leaves["weight_packed"], leaves.get("weight_scale"), leaves.get("weight_shape")
    group = config_group(name, config)
    weights = _mapping(group.get("weights"))
    size, bits = _integer(weights.get("group_size")), _bits(weights.get("num_bits"))
    if len(codes.shape) < 2 or not codes.numel:
        return _unknown(codes)
    groups = 1 if scale is None or not scale.shape else scale.shape[-1]
    in_features = codes.shape[-1] * 8 * element_bytes(codes.dtype) // bits
    if shape is not None and shape.numel and (checkpoint.path / shape.file).exists():
        in_features = int(checkpoint.read(shape.name).reshape(-1)[-1])
    elif size and size > 0 and groups > 1:
        in_features = groups * size
    size = in_features // groups if groups > 1 else size
    return StoredWeight(
        scheme=_scheme(group, symmetric="weight_zero_point" not in leaves, bits=bits, kind="int", group_size=size),
        quantized=True,
        shape=(*codes.shape[:-1], in_features),
        code_bytes=codes.size_bytes,
        scale_bytes=side,
    )


def _plain_codes(name: str, leaves: Mapping[str, TensorInfo], config: Mapping[str, Any], side: int) -> StoredWeight:
    weight = leaves["weight"]
    kind = "int" if weight.dtype == "I8" else "float"
    group = config_group(name, config)
    if not group:
        block = config.get("weight_block_size")
        strategy = "block " + "x".join(map(str, block)) if isinstance(block, list) else "tensor"
        scheme_words = config.get("activation_scheme")
        inputs = {"num_bits": 8, "type": kind, "dynamic": scheme_words == "dynamic"} if scheme_words else None
        group = {"weights": {"strategy": strategy}, "input_activations": inputs}
    return StoredWeight(
        scheme=_scheme(group, symmetric="weight_zero_point" not in leaves, bits=8, kind=kind),
        quantized=True,
        shape=weight.shape,
        code_bytes=weight.size_bytes,
        scale_bytes=side,
    )


def config_group(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The compressed-tensors group for a module that is known to be quantised: exact name, pattern, class; else any."""
    listed = [_mapping(g) for g in _mapping(config.get("config_groups")).values()]
    ranked = [(_rank(t), i) for i, g in enumerate(listed) for t in _targets(g) if matches(t, name)]
    if ranked:
        return listed[min(ranked)[1]]
    return listed[0] if len(listed) == 1 else {}


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    listed = targets if isinstance(targets, list) else []
    return [t for t in listed if isinstance(t, str) and pattern_problem(t) is None]


def _mapping(value: Any) -> Mapping[str, Any]:
    """A config entry that ought to be an object; anything else counts as absent, since shapes tell enough."""
    return value if isinstance(value, dict) else {}


def _rank(target: str) -> int:
    return 1 if target.startswith("re:") else 2 if target == "Linear" else 0


def _scheme(group: Mapping[str, Any], *, symmetric: bool, bits: int, kind: str, group_size: int | None = None) -> str:
    weights, inputs = _mapping(group.get("weights")), _mapping(group.get("input_activations"))
    size = group_size or _integer(weights.get("group_size"))
    strategy = str(weights.get("strategy") or ("group" if size else "tensor"))
    if strategy == "block" and isinstance(weights.get("block_structure"), list):
        strategy += " " + "x".join(map(str, weights["block_structure"]))
    grouped = size if size and size > 0 and "group" in strategy else None
    return _words(str(weights.get("type") or kind), bits, inputs, grouped, strategy, symmetric)


def _words(
    kind: str, bits: int, inputs: Mapping[str, Any], group_size: int | None, strategy: str, symmetric: bool
) -> str:
    """``W4A16 g128 sym``, ``W8A8 channel sym, dynamic token inputs``, ``FP8A8 channel, dynamic token inputs``."""
    label = ("FP" if kind == "float" else "W") + str(bits)
    label += f"A{inputs.get('num_bits', 8)}" if inputs else "A16"
    label += f" g{group_size}" if group_size else f" {strategy}"
    if kind != "float":
        label += " sym" if symmetric else " asym"
    if inputs:
        label += ", dynamic" if inputs.get("dynamic") else ", static"
        label += f" {inputs['strategy']}" if inputs.get("strategy") else ""
        label += " inputs"
    return label


def _unknown(codes: TensorInfo) -> StoredWeight:
    """Codes whose shape fits no layout known here: counted as they lie."""
    return StoredWeight(
        scheme=f"{codes.dtype} (layout unknown)",
        quantized=False,
        shape=codes.shape,
        code_bytes=codes.size_bytes,
        scale_bytes=0,
    )


def _bits(value: Any) -> int:
    """Bits of a code by the config; 4, by far the commonest, where it says nothing that makes sense."""
    bits = _integer(value)
    return bits if bits is not None and 1 <= bits <= 8 else 4


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
