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
    ],
)
def test_bits_per_weight(fmt: WeightFormat, in_features: int, bits: float) -> None:
    assert fmt.bits_per_weight(in_features) == bits


def test_bits_per_weight_with_float32_scales() -> None:
    assert WeightFormat(num_bits=4, group_size=128).bits_per_weight(4096, scale_bits=32) == 4.25


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -128, 127)])
def test_code_range(bits: int, low: int, high: int) -> None:
    fmt = WeightFormat(num_bits=bits)
    assert (fmt.q_min, fmt.q_max) == (low, high)


@pytest.mark.parametrize(("columns", "bits", "words"), [(16, 4, 2), (17, 4, 3), (1, 4, 1), (4, 8, 1), (5, 8, 2)])
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
        preset("W3A16")
    assert str(caught.value) == (
        "--scheme: unknown scheme 'W3A16'. Use one of W4A16, W4A16_ASYM, W8A16, W8A8, FP8_DYNAMIC."
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
