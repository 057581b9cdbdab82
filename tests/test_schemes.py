"""Presets and configs against compressed-tensors' own, and the words of what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from halfbyte.errors import UsageError
from halfbyte.schemes import (
    ALIASES,
    PRESETS,
    WeightFormat,
    block_problem,
    config_group,
    group_size_problem,
    packed_columns,
    preset,
    quantization_config,
)

# What compressed-tensors compares when it reads a checkpoint; observers and dtypes concern calibration only.
WEIGHT_FIELDS = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "actorder", "block_structure")


def test_presets_carry_the_librarys_names() -> None:
    assert set(PRESETS) <= set(PRESET_SCHEMES)
    for alias, name in ALIASES.items():
        assert PRESET_SCHEMES[alias] == PRESET_SCHEMES[name]
        assert preset(alias) is PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_librarys_field_by_field(name: str) -> None:
    theirs = PRESET_SCHEMES[name]
    ours = config_group(PRESETS[name], ["Linear"])
    for field in WEIGHT_FIELDS:
        assert ours["weights"][field] == getattr(theirs["weights"], field), field
    activations = theirs.get("input_activations")
    assert (ours["input_activations"] is None) == (activations is None)
    if activations is not None:
        for field in WEIGHT_FIELDS:
            assert ours["input_activations"][field] == getattr(activations, field), field
    assert theirs.get("output_activations") is None
    assert ours["output_activations"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_configs_are_read_by_the_library(name: str) -> None:
    config = quantization_config([(PRESETS[name], ["Linear"])], ["lm_head", "re:.*vision_tower.*"])
    read = QuantizationConfig.model_validate(config)
    assert read.quant_method == "compressed-tensors"
    assert read.format == PRESETS[name].storage
    assert read.quantization_status == "compressed"
    assert read.ignore == ["lm_head", "re:.*vision_tower.*"]
    group = read.config_groups["group_0"]
    assert not isinstance(group, list)
    assert group.targets == ["Linear"]
    assert group.format == PRESETS[name].storage
    assert group.weights is not None
    for field in WEIGHT_FIELDS:
        assert getattr(group.weights, field) == config["config_groups"]["group_0"]["weights"][field]


def test_w8a8_config_in_full() -> None:
    group = config_group(PRESETS["W8A8"], ["Linear"])
    assert group["format"] == "int-quantized"
    assert {k: group["weights"][k] for k in ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")} == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": "channel",
        "dynamic": False,
    }
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": "token",
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


def test_fp8_block_config_in_full() -> None:
    group = config_group(PRESETS["FP8_BLOCK"], ["Linear"])
    assert group["format"] == "float-quantized"
    assert group["weights"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": "block",
        "dynamic": False,
        "actorder": None,
        "block_structure": [128, 128],
        "observer": "minmax",
        "observer_kwargs": {},
    }
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["type"], inputs["strategy"], inputs["group_size"]) == (8, "float", "group", 128)
    assert (inputs["dynamic"], inputs["symmetric"], inputs["block_structure"]) == (True, True, None)


def test_w4a8_is_w4a16_with_the_inputs_of_w8a8() -> None:
    group = config_group(PRESETS["W4A8"], ["Linear"])
    assert group["weights"] == config_group(PRESETS["W4A16"], ["Linear"])["weights"]
    assert group["input_activations"] == config_group(PRESETS["W8A8"], ["Linear"])["input_activations"]
    assert group["format"] == "pack-quantized"


def test_two_storage_formats_make_a_mixed_config() -> None:
    config = quantization_config([(PRESETS["W4A16"], ["re:.*mlp.*"]), (PRESETS["W8A8"], ["Linear"])], [])
    assert config["format"] == "mixed-precision"
    read = QuantizationConfig.model_validate(config)
    assert [g.format for g in read.config_groups.values() if not isinstance(g, list)] == [
        "pack-quantized",
        "int-quantized",
    ]


@pytest.mark.parametrize(
    ("fmt", "in_features", "bits"),
    [
        (WeightFormat(num_bits=4, group_size=128), 4096, 4.125),
        (WeightFormat(num_bits=4, group_size=64), 576, 4.25),
        (WeightFormat(num_bits=4, group_size=32), 4096, 4.5),
        (WeightFormat(num_bits=4, group_size=128, symmetric=False), 4096, 4.15625),
        (WeightFormat(num_bits=8, group_size=128), 1024, 8.125),
        (WeightFormat(num_bits=8), 1024, 8 + 1 / 64),
        (WeightFormat(num_bits=4), 512, 4 + 1 / 32),
        (WeightFormat(num_bits=3, group_size=128), 4096, 3.125),
        (WeightFormat(num_bits=2, group_size=64), 4096, 2.25),
        (WeightFormat(num_bits=8, kind="float", block=(128, 128)), 256, 8 + 16 / 128**2),
    ],
)
def test_bits_per_weight(fmt: WeightFormat, in_features: int, bits: float) -> None:
    assert fmt.bits_per_weight(in_features) == bits


def test_bits_per_weight_with_float32_scales() -> None:
    assert WeightFormat(num_bits=4, group_size=128).bits_per_weight(4096, scale_bits=32) == 4.25


def test_a_block_cut_short_costs_a_whole_scale() -> None:
    fmt = WeightFormat(num_bits=8, kind="float", block=(128, 128))
    assert fmt.scale_shape(130, 384) == (2, 3)
    assert fmt.bits_per_weight(384, 130) == 8 + 16 * 6 / (130 * 384)
    assert (fmt.strategy, fmt.groups(384), fmt.fits(384), fmt.fits(300)) == ("block", 3, True, False)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)])
def test_code_range(bits: int, low: int, high: int) -> None:
    fmt = WeightFormat(num_bits=bits)
    assert (fmt.q_min, fmt.q_max) == (low, high)


@pytest.mark.parametrize(
    ("columns", "bits", "words"),
    [
        (16, 4, 2),
        (17, 4, 3),
        (1, 4, 1),
        (4, 8, 1),
        (5, 8, 2),
        (128, 3, 12),
        (11, 3, 2),
        (10, 3, 1),
        (32, 2, 2),
        (33, 2, 3),
    ],
)
def test_packed_columns(columns: int, bits: int, words: int) -> None:
    assert packed_columns(columns, bits) == words


@pytest.mark.parametrize("name", ["w4a16", "W4A16-asym", "fp8-dynamic", "int8"])
def test_names_in_any_case(name: str) -> None:
    assert preset(name).name in ("W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "W8A8")


@pytest.mark.parametrize("size", [32, 64, 128])
def test_group_size_replaces_the_presets(size: int) -> None:
    scheme = PRESETS["W4A16_ASYM"].with_group_size(size)
    assert scheme.weights == WeightFormat(num_bits=4, symmetric=False, group_size=size)
    assert scheme.name == "W4A16_ASYM"


def test_one_scale_a_row() -> None:
    scheme = PRESETS["W4A16"].with_group_size("channel")
    assert scheme.weights.strategy == "channel"
    assert scheme.weights.groups(2880) == 1
    assert scheme.weights.fits(2880)
    assert PRESETS["W8A8"].with_group_size("channel") is PRESETS["W8A8"]
    assert PRESETS["W8A8"].with_group_size(None) is PRESETS["W8A8"]


REFUSED: list[tuple[str, Any, str]] = [
    (
        "W8A8",
        128,
        "--group-size 128: scheme W8A8 has one scale for each output channel and takes no group size. "
        "Leave --group-size out, or choose W4A16 or W8A16.",
    ),
    (
        "FP8_DYNAMIC",
        64,
        "--group-size 64: scheme FP8_DYNAMIC has one scale for each output channel and takes no group size. "
        "Leave --group-size out, or choose W4A16 or W8A16.",
    ),
    (
        "FP8_BLOCK",
        "channel",
        "--group-size channel: scheme FP8_BLOCK has one scale for each block of 128 x 128 and takes no group size. "
        "Leave --group-size out, or choose W4A16 or W8A16.",
    ),
    (
        "W4A16_ASYM",
        "channel",
        "--group-size channel: scheme W4A16_ASYM is asymmetric, and asymmetric weights are stored in groups. "
        "Use --group-size 128, 64 or 32.",
    ),
    (
        "W4A16",
        100,
        "--group-size: group size 100 is not supported by the engines. Use 32, 64, 128 or 'channel'.",
    ),
    (
        "W4A16",
        0,
        "--group-size: group size 0 is not supported by the engines. Use 32, 64, 128 or 'channel'.",
    ),
]


@pytest.mark.parametrize(("name", "size", "words"), REFUSED)
def test_refused_group_sizes(name: str, size: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        PRESETS[name].with_group_size(size)
    assert str(caught.value) == words


def test_unknown_scheme() -> None:
    with pytest.raises(UsageError) as caught:
        preset("W5A16")
    assert str(caught.value) == (
        "--scheme: unknown scheme 'W5A16'. Use one of "
        "W4A16, W4A16_ASYM, W3A16, W2A16, W8A16, W8A8, W4A8, FP8_DYNAMIC, FP8_BLOCK."
    )


@pytest.mark.parametrize(
    ("in_features", "size", "words"),
    [
        (
            2880,
            128,
            "in_features 2880 is not divisible by group_size 128 (remainder 64). "
            "Use group_size 64 or 32, or skip it with --ignore.",
        ),
        (
            96,
            64,
            "in_features 96 is not divisible by group_size 64 (remainder 32). "
            "Use group_size 32, or skip it with --ignore.",
        ),
        (100, 32, "in_features 100 is not divisible by group_size 32 (remainder 4). Skip it with --ignore."),
    ],
)
def test_indivisible_group_size(in_features: int, size: int, words: str) -> None:
    assert group_size_problem(in_features, size) == words
    assert not WeightFormat(num_bits=4, group_size=size).fits(in_features)
    assert str(UsageError(words, where="model.layers.0.mlp.down_proj")) == f"model.layers.0.mlp.down_proj: {words}"


@pytest.mark.parametrize(
    ("shape", "fused", "words"),
    [
        (
            (512, 576),
            False,
            "in_features 576 is not divisible by 128, the width of a block and of a group of inputs. "
            "Use FP8_DYNAMIC, or skip it with --ignore.",
        ),
        (
            (192, 512),
            True,
            "out_features 192 is not divisible by 128, the height of a block, and vLLM fuses this weight with its "
            "neighbours. Use FP8_DYNAMIC, or skip it with --ignore.",
        ),
        ((192, 512), False, None),
        ((256, 512), True, None),
    ],
)
def test_weights_that_do_not_divide_into_blocks(shape: tuple[int, int], fused: bool, words: str | None) -> None:
    assert block_problem(shape, (128, 128), fused=fused) == words
