"""Number formats and preset schemes, as data.

A :class:`WeightFormat` says how one Linear's weight is represented, a :class:`Scheme` adds what the engine does with
activations and how the bytes are laid out on disk. Adding a scheme means adding a row to :data:`PRESETS` (and a test);
no other code branches on a scheme's name.

Names and fields follow the presets of compressed-tensors (``compressed_tensors.quantization.quant_scheme``), which
is also the vocabulary of llm-compressor recipes and of vLLM.

Does not cover: packing (``packing``), choosing scales and codes (``methods``). Never imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from halfbyte.errors import UsageError

StorageFormat = Literal["pack-quantized", "int-quantized", "float-quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How one weight ``[out_features, in_features]`` is represented.

    An integer weight is ``w = (q - z) * s`` with ``q_min <= q <= q_max`` and, for symmetric formats, ``z = 0``.
    A float weight (``kind="float"``) is ``w = q * s`` with ``q`` in float8_e4m3fn.

    Attributes:
        num_bits: bits of one code.
        kind: ``"int"`` (two's complement) or ``"float"`` (8 bits: e4m3).
        symmetric: whether the zero point is fixed to 0.
        group_size: consecutive input features that share one scale; ``None`` means one scale for a whole row
            (compressed-tensors' ``channel`` strategy), or for a block.
        block: ``(rows, columns)`` of the weight that share one scale (``block`` strategy); the last block of a column
            of blocks may have fewer rows, and then ``group_size`` is ``None``.
    """

    num_bits: int
    kind: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None

    @property
    def strategy(self) -> Literal["group", "channel", "block"]:
        if self.block is not None:
            return "block"
        return "channel" if self.group_size is None else "group"

    @property
    def q_min(self) -> int:
        """Smallest code, ``-2**(b-1)`` (symmetric and asymmetric codes are both stored signed)."""
        return -(1 << (self.num_bits - 1))

    @property
    def q_max(self) -> int:
        """Largest code, ``2**(b-1) - 1``."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def _width(self) -> int | None:
        """Columns that share one scale, ``None`` where all do."""
        return self.group_size if self.block is None else self.block[1]

    def groups(self, in_features: int) -> int:
        """Number of scales in one row."""
        return 1 if self._width is None else in_features // self._width

    def fits(self, in_features: int) -> bool:
        """Whether ``in_features`` divides into whole groups, or whole blocks."""
        return self._width is None or in_features % self._width == 0

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the stored scales: ``[out, groups]``, or ``[ceil(out / rows), groups]`` for blocks."""
        rows = out_features if self.block is None else math.ceil(out_features / self.block[0])
        return rows, self.groups(in_features)

    def bits_per_weight(self, in_features: int, out_features: int | None = None, *, scale_bits: int = 16) -> float:
        """Stored bits for one weight, scales and zero points included.

        ``b + (scale_bits + zero_bits) / n`` with ``zero_bits = b`` for asymmetric formats, else 0, and n weights to a
        scale. How many there are to a block's depends on ``out_features``; unless given, all blocks are whole.
        """
        per_group = scale_bits + (0 if self.symmetric else self.num_bits)
        rows = out_features or (1 if self.block is None else self.block[0])
        scales, groups = self.scale_shape(rows, in_features)
        return self.num_bits + per_group * scales * groups / (rows * in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationFormat:
    """How an engine quantises a Linear's input at run time: dynamically, symmetric, one scale for a token or for each
    ``group_size`` features of it.

    ``s = max|x| / q_max`` over these features; nothing about it is stored in the checkpoint.
    """

    num_bits: int
    kind: Literal["int", "float"] = "int"
    group_size: int | None = None

    @property
    def strategy(self) -> Literal["token", "group"]:
        return "token" if self.group_size is None else "group"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A weight format, an optional activation format and the layout on disk, under compressed-tensors' name.

    ``note`` says which engines load it, where not all do; ``plan`` prints it.
    """

    name: str
    weights: WeightFormat
    activations: ActivationFormat | None
    storage: StorageFormat
    note: str = ""

    def with_group_size(self, group_size: int | Literal["channel"] | None) -> Scheme:
        """The same scheme with another group size; ``"channel"`` is one scale a row, ``None`` keeps the preset's."""
        if group_size is None:
            return self
        if self.storage != "pack-quantized":
            block = self.weights.block
            if group_size == "channel" and block is None:
                return self
            unit = "output channel" if block is None else f"block of {block[0]} x {block[1]}"
            raise UsageError(
                f"scheme {self.name} has one scale for each {unit} and takes no group size",
                where=f"--group-size {group_size}",
                remedy="Leave --group-size out, or choose W4A16 or W8A16.",
            )
        if group_size == "channel":
            if not self.weights.symmetric:
                raise UsageError(
                    f"scheme {self.name} is asymmetric, and asymmetric weights are stored in groups",
                    where="--group-size channel",
                    remedy="Use --group-size 128, 64 or 32.",
                )
            return replace(self, weights=replace(self.weights, group_size=None))
        if group_size not in GROUP_SIZES:
            raise UsageError(
                f"group size {group_size} is not supported by the engines",
                where="--group-size",
                remedy=f"Use {', '.join(map(str, GROUP_SIZES))} or 'channel'.",
            )
        return replace(self, weights=replace(self.weights, group_size=group_size))


GROUP_SIZES = (32, 64, 128)

# What the source of vLLM 0.32 says (compressed_tensors/schemes, kernels/linear/mixed_precision).
_FEW_BITS = (
    "vLLM serves {name} on NVIDIA GPUs alone, and only where the humming kernels are installed; its CPU, AMD and Intel "
    "backends have no kernel for it (as of 0.32). transformers loads it anywhere, with compressed-tensors 0.19 or newer"
)
_W8A16 = (
    "vLLM serves W8A16 on GPUs; its CPU backend has no kernel for it (as of 0.32), nor for mixtures with it. "
    "transformers loads it anywhere"
)
_W4A8 = (
    "vLLM reads packed W4A8 in recent versions (0.32 does) on NVIDIA GPUs and on CPUs with AVX512. Which kernel it "
    "takes decides whether inputs are rounded to 8 bits (humming) or left as they are (Marlin, Machete)"
)

PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme(
            name="W4A16",
            weights=WeightFormat(num_bits=4, group_size=128),
            activations=None,
            storage="pack-quantized",
        ),
        Scheme(
            name="W4A16_ASYM",
            weights=WeightFormat(num_bits=4, symmetric=False, group_size=128),
            activations=None,
            storage="pack-quantized",
        ),
        Scheme(
            name="W3A16",
            weights=WeightFormat(num_bits=3, group_size=128),
            activations=None,
            storage="pack-quantized",
            note=_FEW_BITS.format(name="W3A16"),
        ),
        Scheme(
            name="W2A16",
            weights=WeightFormat(num_bits=2, group_size=128),
            activations=None,
            storage="pack-quantized",
            note=_FEW_BITS.format(name="W2A16"),
        ),
        Scheme(
            name="W8A16",
            weights=WeightFormat(num_bits=8, group_size=128),
            activations=None,
            storage="pack-quantized",
            note=_W8A16,
        ),
        Scheme(
            name="W8A8",
            weights=WeightFormat(num_bits=8),
            activations=ActivationFormat(num_bits=8),
            storage="int-quantized",
        ),
        Scheme(
            name="W4A8",
            weights=WeightFormat(num_bits=4, group_size=128),
            activations=ActivationFormat(num_bits=8),
            storage="pack-quantized",
            note=_W4A8,
        ),
        Scheme(
            name="FP8_DYNAMIC",
            weights=WeightFormat(num_bits=8, kind="float"),
            activations=ActivationFormat(num_bits=8, kind="float"),
            storage="float-quantized",
        ),
        Scheme(
            name="FP8_BLOCK",
            weights=WeightFormat(num_bits=8, kind="float", block=(128, 128)),
            activations=ActivationFormat(num_bits=8, kind="float", group_size=128),
            storage="float-quantized",
        ),
    )
}
ALIASES = {"INT8": "W8A8"}


def preset(name: str) -> Scheme:
    """Look a scheme up by its compressed-tensors name, in any case; ``INT8`` is ``W8A8``."""
    key = name.upper().replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in PRESETS:
        raise UsageError(f"unknown scheme {name!r}", where="--scheme", remedy=f"Use one of {', '.join(PRESETS)}.")
    return PRESETS[key]


def group_size_problem(in_features: int, group_size: int) -> str:
    """The remedy for an ``in_features`` that ``group_size`` does not divide, in words."""
    fitting = [g for g in reversed(GROUP_SIZES) if in_features % g == 0]
    choice = f"Use group_size {' or '.join(map(str, fitting))}, or skip" if fitting else "Skip"
    return f"in_features {in_features} is not divisible by group_size {group_size} (remainder {in_features % group_size}). {choice} it with --ignore."  # noqa: E501


def block_problem(shape: tuple[int, ...], block: tuple[int, int], *, fused: bool) -> str | None:
    """Why engines cannot run a weight ``[out, in]`` cut into blocks, with the remedy, in words; ``None`` if they can.

    Inputs are quantised in groups as wide as a block, so ``in`` must divide. The last block of rows may be cut short,
    unless the weight is one of several that vLLM fuses: the next one's blocks would then begin inside a block.
    """
    (out_features, in_features), (rows, columns) = shape, block
    remedy = "Use FP8_DYNAMIC, or skip it with --ignore."
    if in_features % columns:
        return f"in_features {in_features} is not divisible by {columns}, the width of a block and of a group of inputs. {remedy}"  # noqa: E501
    if fused and out_features % rows:
        return f"out_features {out_features} is not divisible by {rows}, the height of a block, and vLLM fuses this weight with its neighbours. {remedy}"  # noqa: E501
    return None


def packed_columns(in_features: int, num_bits: int) -> int:
    """int32 words that hold one row of codes, without gaps between them: ``ceil(in_features * num_bits / 32)``."""
    return math.ceil(in_features * num_bits / 32)


def config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One entry of ``quantization_config.config_groups`` (FORMATS: field for field what compressed-tensors writes)."""
    w, a = scheme.weights, scheme.activations
    weights: dict[str, Any] = {
        "num_bits": w.num_bits,
        "type": w.kind,
        "symmetric": w.symmetric,
        "group_size": w.group_size,
        "strategy": w.strategy,
        "dynamic": False,
        "actorder": None,
        "block_structure": None if w.block is None else list(w.block),
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations: dict[str, Any] | None = None
    if a is not None:
        activations = {
            "num_bits": a.num_bits,
            "type": a.kind,
            "symmetric": True,
            "group_size": a.group_size,
            "strategy": a.strategy,
            "dynamic": True,
            "actorder": None,
            "block_structure": None,
            "observer": None,
            "observer_kwargs": {},
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": scheme.storage,
    }


def quantization_config(groups: list[tuple[Scheme, list[str]]], ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed-tensors checkpoint.

    Args:
        groups: schemes with their targets (class names, exact names or ``re:`` patterns), in order.
        ignore: modules to leave alone, exact names or ``re:`` patterns.
    """
    formats = {scheme.storage for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {f"group_{i}": config_group(s, targets) for i, (s, targets) in enumerate(groups)},
    }
