"""Recipes: what is read from each dialect, what is refused and in which words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import RecipeError, UsageError
from halfbyte.methods.tuning import end_to_end_of, tuning_of
from halfbyte.recipe import GptqSteps, Recipe, load_recipe, matches
from halfbyte.recipe.document import TomlLines
from halfbyte.recipe.llmcompressor import METHOD_OF_MODIFIER, UNSUPPORTED_MODIFIERS, WITHOUT_EFFECT
from halfbyte.recipe.section import kind_of
from halfbyte.schemes import PRESETS, Scheme, config_group, preset

DOWN = "model.layers.3.mlp.down_proj"
QUERY = "model.layers.3.self_attn.q_proj"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def run(text: str, name: str = "recipe.yaml") -> Recipe:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)

    return run


def complaint(load: Any, text: str, name: str = "recipe.yaml") -> str:
    """The error's words, with the folder left out."""
    with pytest.raises(RecipeError) as caught:
        load(text, name)
    return str(caught.value).replace(str(caught.value.where).rpartition("/")[0] + "/", "")


FULL_TOML = r"""
description = "four bits, eight where it hurts"
scheme = "W4A16"
group_size = 64
method = "gptq"
damp_fraction = 0.02
ignore = ['re:.*\.0\.mlp\.down_proj']

[gptq]
static_order = false
scale_refit = false
sweeps = 5

[calibration]
source = "text:notes.txt"
samples = 16
seq_len = 256
seed = 7

[[groups]]
scheme = "W8A16"
group_size = "channel"
targets = ["re:.*down_proj"]
"""


def test_toml_says_everything(load: Any) -> None:
    recipe = load(FULL_TOML, "r.toml")
    assert recipe.scheme_for(QUERY) == PRESETS["W4A16"].with_group_size(64)
    assert recipe.scheme_for(DOWN) == PRESETS["W8A16"].with_group_size("channel")
    assert recipe.scheme_for("model.layers.0.mlp.down_proj") is None
    assert (recipe.method, recipe.damp_fraction) == ("gptq", 0.02)
    assert recipe.gptq == GptqSteps(static_order=False, scale_refit=False, sweeps=5)
    assert (recipe.calibration, recipe.samples, recipe.seq_len, recipe.seed) == ("text:notes.txt", 16, 256, 7)
    assert recipe.description == "four bits, eight where it hurts"


def test_yaml_and_json_have_the_same_keys(load: Any) -> None:
    values = tomllib.loads(FULL_TOML)
    expected = load(FULL_TOML, "r.toml")
    assert load(yaml.safe_dump(values), "r.yaml") == expected
    assert load(json.dumps(values, indent=1), "r.json") == expected


def test_what_tuning_moves_besides_scales(load: Any) -> None:
    plain = load('scheme = "W4A16"', "r.toml")
    assert (plain.gptq.tune_codes, plain.gptq.tune_norms) == (False, False)
    for effort in ("standard", "high"):
        text = f'scheme = "W4A16"\neffort = "{effort}"\n[gptq]\n'
        rates = {}
        for keys in ("", "tune_codes = true\n", "tune_norms = true\n", "tune_codes = true\ntune_norms = true\n"):
            options = tuning_of(load(text + keys, "r.toml"))
            assert options is not None
            rates[keys] = (options.code_rate > 0, options.vector_rate > 0)
        assert list(rates.values()) == [(False, False), (True, False), (False, True), (True, True)]
    steps = {n: tuning_of(load('scheme = "W4A16"\neffort = "high"', "r.toml"), n) for n in (40, 512, 513, 1024, 4096)}
    assert {n: o and o.samples_per_step for n, o in steps.items()} == {40: 2, 512: 2, 513: 1, 1024: 1, 4096: 1}
    together = {n: end_to_end_of(load('scheme = "W4A16"\neffort = "high"', "r.toml"), n) for n in steps}
    assert {n: o and o.batches_per_step for n, o in together.items()} == {40: 2, 512: 2, 513: 1, 1024: 1, 4096: 1}
    assert tuning_of(load('scheme = "W4A16"\neffort = "low"\n[gptq]\ntune_codes = true', "r.toml")) is None


def test_defaults(load: Any) -> None:
    recipe = load('scheme = "W4A16"', "r.toml")
    assert recipe == Recipe.of_options(preset("W4A16"))
    assert (recipe.method, recipe.damp_fraction, recipe.ignore) == ("gptq", 0.01, ())
    assert (recipe.calibration, recipe.samples, recipe.seq_len, recipe.seed) == (None, None, None, None)
    assert load("scheme: fp8_dynamic").method == "rtn"


def test_groups_alone_leave_the_rest_unquantised(load: Any) -> None:
    recipe = load("groups: [{scheme: W4A16, targets: ['re:.*mlp.*']}]")
    assert recipe.scheme_for(DOWN) == PRESETS["W4A16"]
    assert recipe.scheme_for(QUERY) is None


def test_to_plain_is_json_and_tells_recipes_apart(load: Any) -> None:
    one, other = load(FULL_TOML, "a.toml"), load(FULL_TOML.replace("64", "32"), "b.toml")
    assert json.loads(json.dumps(one.to_plain())) == one.to_plain()
    assert one.to_plain() != other.to_plain()
    assert one.to_plain()["gptq"]["sweeps"] == 5
    assert one.to_plain()["description"] == "four bits, eight where it hurts"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("Linear", DOWN, True),
        (DOWN, DOWN, True),
        ("model.layers.3", DOWN, False),
        ("down_proj", DOWN, False),
        ("re:.*down_proj", DOWN, True),
        ("re:down_proj", DOWN, False),
        ("re:model", DOWN, True),
        (DOWN, DOWN + "_extra", False),
        ("re:.*down", DOWN + "_extra", True),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


PATTERNS = st.sampled_from(
    [DOWN, QUERY, "re:.*proj", "re:.*down_proj", "re:model", "re:down", "re:.*[qk]_proj$", "model.layers.3"]
)


@given(pattern=PATTERNS, name=st.sampled_from([DOWN, QUERY, "model.layers.30.mlp.down_proj", "lm_head"]))
def test_matches_as_compressed_tensors_does(pattern: str, name: str) -> None:
    assert matches(pattern, name) == match_name(name, pattern)


def test_unmatched_finds_misspelt_patterns(load: Any) -> None:
    recipe = load("{scheme: W4A16, ignore: [lm_head, 're:.*dwon_proj', 're:.*q_proj']}")
    assert recipe.unmatched([DOWN, QUERY]) == ["lm_head", "re:.*dwon_proj"]


def test_contested_names_are_those_that_loaders_would_read_differently(load: Any) -> None:
    groups = """
    groups:
    - {scheme: W8A16, targets: ['re:.*mlp.*']}
    - {scheme: W4A16, targets: ['re:.*down_proj', '%s']}
    scheme: W4A16_ASYM
    """
    recipe = load(groups % "a.b")
    assert recipe.contested([DOWN, QUERY, "model.layers.3.mlp.up_proj"]) == [DOWN]
    assert load(groups.replace("W8A16", "W4A16") % "a.b").contested([DOWN]) == []


# What is wrong in halfbyte's own keys -------------------------------------------------------------------------------

WRONG_TOML = [
    ('scheme = "W4A16"\ngruop_size = 128', "r.toml, line 2: unknown key 'gruop_size'. Did you mean 'group_size'?"),
    (
        '\nscheme = "W4A61"',
        "r.toml, line 2: unknown scheme 'W4A61'. Did you mean 'W4A16'? "
        "halfbyte writes W4A16, W4A16_ASYM, W3A16, W2A16, W8A16, W8A8, W4A8, FP8_DYNAMIC, FP8_BLOCK.",
    ),
    (
        "ignore = ['lm_head']",
        "r.toml, line 1: no scheme is given. Add scheme, one of "
        "W4A16, W4A16_ASYM, W3A16, W2A16, W8A16, W8A8, W4A8, FP8_DYNAMIC, FP8_BLOCK.",
    ),
    (
        'scheme = "W4A16"\ngroup_size = 96',
        "r.toml, line 2: group size 96 is not supported by the engines. Use 32, 64, 128 or 'channel'.",
    ),
    (
        'scheme = "W8A8"\ngroup_size = 64',
        "r.toml, line 2: scheme W8A8 has one scale for each output channel and takes no group size. "
        "Leave group_size out, or choose W4A16 or W8A16.",
    ),
    (
        'scheme = "W4A16"\ngroup_size = true',
        "r.toml, line 2: group_size must be a whole number or 'channel', not True.",
    ),
    (
        'scheme = "W4A16"\nignore = [\n  "lm_head",\n  "re:(",\n]',
        "r.toml, line 4: 're:(' is not a regular expression: missing ), unterminated subpattern at position 0.",
    ),
    ('scheme = "W4A16"\nignore = ["re:"]', "r.toml, line 2: an empty pattern covers nothing that can be meant."),
    ('scheme = "W4A16"\nignore = [1]', "r.toml, line 2: ignore must be a list of strings, not 1."),
    ('scheme = "W4A16"\nmethod = "gtpq"', "r.toml, line 2: unknown method 'gtpq'. Did you mean 'gptq'?"),
    (
        'scheme = "FP8_DYNAMIC"\nmethod = "gptq"',
        "r.toml, line 2: method gptq works on integer codes, and scheme FP8_DYNAMIC stores floats. "
        "Set method to rtn, or use integer schemes only.",
    ),
    ('scheme = "W4A16"\ndamp_fraction = 1.5', "r.toml, line 2: damp_fraction must be between 0 and 1, not 1.5."),
    ('scheme = "W4A16"\n[gptq]\nsweeps = -1', "r.toml, line 3: sweeps must be at least 0, not -1."),
    (
        'scheme = "W4A16"\n[gptq]\nshrinkage = -0.5',
        "r.toml, line 3: shrinkage must be at least 0 and finite, not -0.5.",
    ),
    ('scheme = "W4A16"\n[gptq]\nshrinkage = true', "r.toml, line 3: shrinkage must be a number, not True."),
    ('scheme = "W4A16"\n[gptq]\nshrinkage = inf', "r.toml, line 3: shrinkage must be at least 0 and finite, not inf."),
    ('scheme = "W4A16"\n[gptq]\nscale_search = 1', "r.toml, line 3: scale_search must be true or false, not 1."),
    (
        'scheme = "W4A16"\n[gptq]\ncode_decent = true',
        "r.toml, line 3: unknown key 'code_decent'. Did you mean 'code_descent'?",
    ),
    ('scheme = "W4A16"\ngptq = 3', "r.toml, line 2: gptq must be a table of keys, not 3."),
    ('scheme = "W4A16"\ndamp_fraction = nan', "r.toml, line 2: damp_fraction must be between 0 and 1, not nan."),
    ('scheme = "W4A16"\ndescription = 3', "r.toml, line 2: description must be a string, not 3."),
    ('scheme = "W4A16"\n[calibration]\nsamples = 0', "r.toml, line 3: samples must be at least 1, not 0."),
    ('scheme = "W4A16"\n[calibration]\nseed = "0"', "r.toml, line 3: seed must be a whole number, not '0'."),
    (
        'scheme = "W4A16"\n[calibration]\nlength = 3',
        "r.toml, line 3: unknown key 'length'. Known here: samples, seed, seq_len, source.",
    ),
    (
        'calibration = "text:a.txt"\nscheme = "W4A16"',
        "r.toml, line 1: calibration must be a table of keys, not 'text:a.txt'.",
    ),
    (
        'scheme = "W4A16"\n[[groups]]\nscheme = "W8A16"',
        "r.toml, line 2: a group needs targets. Add targets, e.g. targets = ['re:.*down_proj'].",
    ),
    (
        'scheme = "W4A16"\n[[groups]]\nscheme = "W8A16"\ntargets = ["down_proj"]',
        "r.toml, line 4: target 'down_proj' is neither a full module name nor a pattern, and would cover nothing. "
        "Write 're:.*down_proj'.",
    ),
    (
        '[[groups]]\nscheme = "W4A16"\ntargets = ["Linear"]\n[[groups]]\nscheme = "W8A16"\ntargets = ["re:.*v_proj"]',
        "r.toml, line 6: target 're:.*v_proj' is never reached ('Linear' in line 3 comes first and covers it). "
        "Put the more specific group first.",
    ),
    (
        '[[groups]]\nscheme="W4A16"\ntargets=["re:a"]\n[[groups]]\nscheme="W8A16"\ntargets = ["a.b"]',
        "r.toml, line 6: target 'a.b' is never reached ('re:a' in line 3 comes first and covers it). "
        "Put the more specific group first.",
    ),
    ('scheme = "W4A16"\ngroups = 3', "r.toml, line 2: groups must be a list of tables ([[groups]]), not 3."),
    ('scheme = "W4A16"\ntargets = []', "r.toml, line 2: targets is empty, so the scheme applies to nothing."),
    ('scheme = "W4A16"\nscheme =', "r.toml, line 2: is not valid TOML: Invalid value."),
    ("", 'r.toml: is empty. The shortest recipe is: scheme = "W4A16".'),
]


@pytest.mark.parametrize(("text", "expected"), WRONG_TOML, ids=[w.split(": ")[1][:40] for _, w in WRONG_TOML])
def test_wrong_toml(load: Any, text: str, expected: str) -> None:
    assert complaint(load, text, "r.toml") == expected


WRONG_YAML = [
    ("scheme: W4A16\ngruop_size: 128", "recipe.yaml, line 2: unknown key 'gruop_size'. Did you mean 'group_size'?"),
    ("scheme: W4A16\nscheme: W8A16", "recipe.yaml, line 2: key 'scheme' is given twice. Keep one of them."),
    ("scheme: W4A16\nignore: &a [*a]", "recipe.yaml, line 2: an alias stands inside the value it repeats."),
    (
        "scheme: W4A16\nignore: [lm_head",
        "recipe.yaml, line 2: is not valid YAML: expected ',' or ']', but got '<stream end>'.",
    ),
    (
        "scheme: !!python/object/apply:os.getcwd []",
        "recipe.yaml, line 1: is not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd'.",
    ),
    ("[1, 2]: 3", "recipe.yaml, line 1: a key must be a plain word."),
    ("just words", "recipe.yaml, line 1: a recipe must be a table of keys, not 'just words'."),
    ("[" * 3000, "recipe.yaml: is nested too deeply to be a recipe."),
]


@pytest.mark.parametrize(("text", "expected"), WRONG_YAML, ids=[w.split(": ")[1][:40] for _, w in WRONG_YAML])
def test_wrong_yaml(load: Any, text: str, expected: str) -> None:
    assert complaint(load, text).startswith(expected)


def test_all_problems_are_told_at_once_in_the_order_of_lines(load: Any) -> None:
    text = 'scheme = "W4A61"\ngruop_size = 1\n[calibration]\nsamples = 0\n'
    with pytest.raises(RecipeError, match=r"^3 problems: \(1\) .*line 1: .* \(2\) .*line 2: .* \(3\) .*line 4: "):
        load(text, "r.toml")


def test_files_that_are_no_recipes(load: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read: No such file or directory\."):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"recipes are read by suffix, and '\.ini' is none of them"):
        load("", "r.ini")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.toml: is not UTF-8 text \(byte 5\)\."):
        load_recipe(tmp_path / "latin.toml")


def test_options_are_checked_like_recipes() -> None:
    with pytest.raises(UsageError, match=r"--method gptq: .* scheme FP8_DYNAMIC stores floats\. Use --method rtn"):
        Recipe.of_options(preset("FP8_DYNAMIC"), method="gptq")
    with pytest.raises(UsageError, match=r"--ignore re:\(: 're:\(' is not a regular expression"):
        Recipe.of_options(preset("W4A16"), ignore=["re:("])
    with pytest.raises(UsageError, match=r"2 problems: .*damp_fraction -1 is not between 0 and 1"):
        Recipe.of_options(preset("W4A16"), ignore=["re:["], damp_fraction=-1)
    assert Recipe.of_options(preset("FP8_DYNAMIC")).method == "rtn"


# Lines in TOML ------------------------------------------------------------------------------------------------------


def test_toml_lines_of_every_construct() -> None:
    text = (
        '''# comment with [brackets] and "quotes"
a = """
x = 1
[table]
"""
"quoted key".b = 'it'''
        + """'s'
[t.u]  # trailing
list = [ # one
  1, 2,
  { k = "]}", l = [3,
    4] },
]
date = 1979-05-27 07:32:00
[[g]]
x = '''
y = 1
'''
[[g.h]]
z = 0
[[g]]
x = 2
"""
    )
    lines = TomlLines(text.replace("'it''s'", "'its'")).lines
    assert lines[("a",)] == 2
    assert lines[("quoted key", "b")] == 6
    assert lines[("t", "u", "list", 1)] == 9
    assert lines[("t", "u", "list", 2, "l", 1)] == 11
    assert lines[("t", "u", "date")] == 13
    assert lines[("g", 0, "x")] == 15
    assert lines[("g", 0, "h", 0, "z")] == 19
    assert lines[("g", 1, "x")] == 21


TOML_SCALARS = st.one_of(st.integers(), st.booleans(), st.text("aé#\"'\\[]{}=, ", max_size=6))
TOML_KEYS = st.text("ab.#[]'\"= é", max_size=4)


@given(values=st.dictionaries(TOML_KEYS, st.one_of(TOML_SCALARS, st.lists(TOML_SCALARS, max_size=3)), max_size=5))
def test_toml_lines_agree_with_the_writer(values: dict[str, Any]) -> None:
    text, expected = "", {}
    for key, value in values.items():
        text += "\n" * (len(key) % 3)
        expected[(key,)] = text.count("\n") + 1
        text += f"{toml_string(key)} = "
        if isinstance(value, list):
            text += "["
            for i, item in enumerate(value):
                text += "\n  "
                expected[(key, i)] = text.count("\n") + 1
                text += toml_scalar(item) + ","
            text += "]\n"
        else:
            text += toml_scalar(value) + "\n"
    assert tomllib.loads(text) == values
    assert TomlLines(text).lines == expected


def toml_string(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def toml_scalar(value: int | bool | str) -> str:
    return toml_string(value) if isinstance(value, str) else str(value).lower()


# llm-compressor -----------------------------------------------------------------------------------------------------

SERIALISED = """
default_stage:
  default_modifiers:
    GPTQModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: W4A16
      bypass_divisibility_checks: false
      requires_calibration_data: true
      block_size: 128
      dampening_frac: 0.1
      actorder: static
      batched_quantization: auto
"""


def test_a_serialised_gptq_modifier(load: Any) -> None:
    recipe = load(SERIALISED)
    assert recipe.scheme_for(DOWN) == PRESETS["W4A16"]
    assert recipe.scheme_for("lm_head") is None
    assert (recipe.method, recipe.damp_fraction, recipe.notes) == ("gptq", 0.1, ())


@pytest.mark.parametrize(
    "wrapping",
    [
        "quant_stage:\n  run_type: oneshot\n  quant_modifiers:\n    GPTQModifier: %s",
        "default_stage_0:\n  default_modifiers:\n    GPTQModifier: %s",
        "args: {}\ndefault_stage:\n  default_modifiers:\n  - GPTQModifier: %s",
        "quant_modifiers:\n  GPTQModifier: %s",
        "modifiers:\n- GPTQModifier: %s",
        "GPTQModifier: %s",
        "- GPTQModifier: %s",
    ],
)
def test_wrappings_found_in_the_wild(load: Any, wrapping: str) -> None:
    recipe = load(wrapping % "{scheme: W8A8, targets: Linear, ignore: ['re:.*lm_head']}")
    assert recipe.scheme_for(DOWN) == PRESETS["W8A8"]
    assert recipe.ignore == ("re:.*lm_head",)


def test_quantization_modifier_is_round_to_nearest(load: Any) -> None:
    recipe = load("QuantizationModifier: {scheme: FP8_DYNAMIC, targets: [Linear], ignore: [lm_head]}")
    assert (recipe.method, recipe.scheme_for(DOWN)) == ("rtn", PRESETS["FP8_DYNAMIC"])
    assert load("QuantizationModifier: {scheme: W4A16}").method == "rtn"


@pytest.mark.parametrize("name", ["W4A8", "W3A16", "W2A16", "FP8_BLOCK"])
def test_schemes_that_not_every_engine_loads_are_read_by_name(load: Any, name: str) -> None:
    recipe = load(f"QuantizationModifier: {{scheme: {name}, ignore: [lm_head]}}")
    assert recipe.scheme_for(DOWN) == PRESETS[name]


def test_block_structure_in_its_older_form(load: Any) -> None:
    recipe = load(
        """
        QuantizationModifier:
          config_groups:
            group_0:
              targets: [Linear]
              weights: {num_bits: 8, type: float, strategy: block, block_structure: 128x128}
              input_activations: {num_bits: 8, type: float, strategy: group, group_size: 128, dynamic: true}
        """
    )
    assert recipe.scheme_for(DOWN) == PRESETS["FP8_BLOCK"]


def test_scheme_as_a_mapping(load: Any) -> None:
    recipe = load("GPTQModifier: {scheme: {W4A16: ['re:.*mlp.*'], W8A8: 're:.*self_attn.*'}}")
    assert recipe.scheme_for(DOWN) == PRESETS["W4A16"]
    assert recipe.scheme_for(QUERY) == PRESETS["W8A8"]


def test_an_older_recipe_with_config_groups(load: Any) -> None:
    recipe = load(
        """
        quant_stage:
          quant_modifiers:
            GPTQModifier:
              sequential_update: true
              dampening_frac: 0.0
              ignore: [lm_head]
              config_groups:
                group_0:
                  weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 64,
                            actorder: weight, observer: mse}
                  targets: [Linear]
        """
    )
    assert recipe.scheme_for(DOWN) == PRESETS["W4A16"].with_group_size(64)
    assert recipe.damp_fraction == 0.0
    assert [n.split(":")[0] for n in recipe.notes] == ["sequential_update", "observer"]


def _dumped(scheme: dict[str, Any]) -> str:
    group = {k: v for k, v in scheme.items() if k in ("weights", "input_activations", "targets")}
    return yaml.safe_dump({"QuantizationModifier": {"config_groups": {"group_0": group}}})


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_every_preset_of_compressed_tensors_is_recognised_by_its_fields(load: Any, name: str) -> None:
    text = _dumped(json.loads(preset_name_to_scheme(name, ["Linear"]).model_dump_json()))
    known = "W8A8" if name == "INT8" else name
    if known in PRESETS:
        assert load(text).scheme_for(DOWN) == PRESETS[known]
    else:
        words = "no scheme of halfbyte has|cannot be honoured|is not supported|quantises nothing"
        assert re.search(words, complaint(load, text))


WRITABLE = [PRESETS[n] for n in PRESETS] + [
    PRESETS[n].with_group_size(size)
    for n in ("W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W8A16", "W4A8")
    for size in (32, 64)
]
WRITABLE += [PRESETS[n].with_group_size("channel") for n in ("W4A16", "W3A16", "W2A16", "W8A16", "W4A8")]


@pytest.mark.parametrize("scheme", WRITABLE, ids=[f"{s.name}-{s.weights.group_size}" for s in WRITABLE])
def test_config_groups_that_halfbyte_writes_are_read_back(load: Any, scheme: Scheme) -> None:
    written = yaml.safe_dump({"QuantizationModifier": {"config_groups": {"g": config_group(scheme, ["Linear"])}}})
    assert load(written).scheme_for(DOWN) == scheme


SPECIFIC = st.lists(
    st.lists(st.sampled_from(["Linear", "re:.*mlp.*", DOWN, QUERY]), min_size=1, max_size=2, unique=True),
    min_size=1,
    max_size=3,
)


@given(targets=SPECIFIC)
def test_order_of_config_groups_is_resolved_as_llm_compressor_does(targets: list[list[str]]) -> None:
    """Exact name before pattern before class, whatever the order; a target in two groups is refused."""
    from halfbyte.recipe.document import parse_yaml
    from halfbyte.recipe.llmcompressor import read_llmcompressor

    names = ("W4A16", "W8A16", "W4A16_ASYM")
    groups = {f"group_{i}": config_group(PRESETS[names[i]], t) for i, t in enumerate(targets)}
    root = parse_yaml(yaml.safe_dump({"GPTQModifier": {"config_groups": groups}}, sort_keys=False), "r.yaml")
    flat = [t for group in targets for t in group]
    if len(set(flat)) < len(flat):
        with pytest.raises(RecipeError, match="never reached"):
            read_llmcompressor(root, "r.yaml")
        return
    recipe = read_llmcompressor(root, "r.yaml")
    for name, scheme in _as_compressed_tensors_does(groups, [DOWN, QUERY]).items():
        assert recipe.scheme_for(name) == scheme


def _as_compressed_tensors_does(groups: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Which preset the library itself would apply to Linears of these names."""
    import torch
    from compressed_tensors.utils.match import match_targets

    owner = {t: group for group in groups.values() for t in group["targets"]}
    found = {}
    for name in names:
        first = next(iter(match_targets(name, torch.nn.Linear(1, 1, device="meta"), owner)), None)
        weights = None if first is None else owner[first]["weights"]
        found[name] = (
            None if weights is None else next(s for s in PRESETS.values() if config_group(s, [])["weights"] == weights)
        )
    return found


def test_smoothing_is_what_the_recipe_says(tmp_path: Path) -> None:
    smooth, plain = tmp_path / "smooth.yaml", tmp_path / "plain.yaml"
    smooth.write_text(
        "m_modifiers:\n  SmoothQuantModifier: {smoothing_strength: 0.8}\n  GPTQModifier: {scheme: W8A8}\n"
    )
    plain.write_text("GPTQModifier: {scheme: W8A8}\n")
    assert load_recipe(smooth).gptq.smoothing
    assert [n.split(":")[0] for n in load_recipe(smooth).notes] == ["SmoothQuantModifier"]
    assert not load_recipe(plain).gptq.smoothing


GROUP = "GPTQModifier:\n  config_groups:\n    g:\n      targets: [Linear]\n"
WRONG_LLMC = [
    (
        "default_stage:\n  default_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n"
        "    QuantizationModifier: {scheme: W8A8}",
        "recipe.yaml, line 3: SmoothQuantModifier works together with one GPTQModifier here. Add or remove one.",
    ),
    ("AWQModifier: {scheme: W4A16}", "recipe.yaml, line 1: AWQModifier cannot be honoured (it rescales channels"),
    ("SparseGPTModifier: {sparsity: 0.5}", "recipe.yaml, line 1: SparseGPTModifier cannot be honoured (it prunes"),
    ("GTPQModifier: {scheme: W4A16}", "recipe.yaml, line 1: unknown modifier 'GTPQModifier'. Known: GPTQModifier"),
    (
        "GPTQModifier: {scheme: W4A16}\nQuantizationModifier: {scheme: W8A16, targets: ['re:.*o_proj']}",
        "recipe.yaml, line 2: a second modifier, QuantizationModifier, after GPTQModifier in line 1 (halfbyte "
        "quantises in one pass with one method). Put all schemes into one modifier's scheme mapping or config_groups.",
    ),
    ("quant_stage: {}", "recipe.yaml, line 1: there is no modifier in it. Add a GPTQModifier or a Quantization"),
    ("quant_stage: 3", "recipe.yaml, line 1: stages and modifier groups must be tables of keys, not 3."),
    ("- W4A16", "recipe.yaml, line 1: a modifier must be a table of keys, not 'W4A16'."),
    ("GPTQModifier: W4A16", "recipe.yaml, line 1: GPTQModifier must be a table of keys, not 'W4A16'"),
    ("- !GPTQModifier\n  scheme: W4A16", "recipe.yaml, line 1: is not valid YAML: could not determine a constructor"),
    (
        "quant_stage:\n  epochs: 3\n  quant_modifiers:\n    GPTQModifier: {scheme: W4A16}",
        "recipe.yaml, line 2: unknown key 'epochs'. Expected a stage, a modifier group or a modifier.",
    ),
    (
        "args: {bits: 4}\nGPTQModifier: {scheme: W4A16}",
        "recipe.yaml, line 1: recipe args cannot be honoured. Write the",
    ),
    ("GPTQModifier:\n  scheme: NVFP4", "recipe.yaml, line 2: unknown scheme 'NVFP4'. halfbyte writes W4A16, "),
    (
        "GPTQModifier:\n  ignore: [lm_head]",
        "recipe.yaml, line 1: GPTQModifier names neither scheme nor config_groups. Add a scheme, e.g. scheme: W4A16.",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  config_groups: {g: {targets: [Linear]}}",
        "recipe.yaml, line 2: both scheme and config_groups are given. Keep one of them.",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  dampenning_frac: 0.1",
        "recipe.yaml, line 3: unknown key 'dampenning_frac'. Did you mean 'dampening_frac'?",
    ),
    (
        "QuantizationModifier:\n  scheme: W4A16\n  dampening_frac: 0.1",
        "recipe.yaml, line 3: unknown key 'dampening_frac'.",
    ),
    (
        "GPTQModifier:\n  scheme: FP8_DYNAMIC",
        "recipe.yaml, line 1: method gptq works on integer codes, and scheme FP8_DYNAMIC stores floats. Set method",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  actorder: group",
        "recipe.yaml, line 3: actorder 'group' cannot be honoured (it needs a g_idx in the file, which loaders "
        "reject). Use actorder: static.",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  actorder: up",
        "recipe.yaml, line 3: unknown actorder 'up'. Use static or null.",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  kv_cache_scheme: {num_bits: 8}",
        "recipe.yaml, line 3: kv_cache_scheme cannot be honoured (halfbyte does not quantise the key-value cache).",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  bypass_divisibility_checks: true",
        "recipe.yaml, line 3: bypass_divisibility_checks cannot be honoured (a row that does not divide",
    ),
    (
        "GPTQModifier:\n  scheme: W4A16\n  observer: {weights: imatrix_mse}",
        "recipe.yaml, line 3: unknown weights 'imatrix_mse'.",
    ),
    (
        GROUP + "      weights: {num_bits: 4, strategy: weight, group_size: 128}",
        "recipe.yaml, line 5: unknown strategy 'weight'.",
    ),
    (
        GROUP + "      weights:\n        num_bits: 8\n        strategy: tensor",
        "recipe.yaml, line 7: weight strategy 'tensor' cannot be honoured (halfbyte writes one scale for a "
        "group, for an output channel or for a block). Use strategy: group with group_size, or strategy: channel.",
    ),
    (GROUP + "      weights: {num_bits: 8}", "recipe.yaml, line 5: weight strategy 'tensor' cannot be honoured"),
    (
        GROUP + "      weights: {num_bits: 4, strategy: group, group_size: 256}",
        "recipe.yaml, line 5: group_size 256 is not supported by the engines. Use 32, 64, 128.",
    ),
    (
        GROUP + "      weights: {num_bits: 5, strategy: channel}",
        "recipe.yaml, line 5: no scheme of halfbyte has 5-bit symmetric int weights by channel with 16-bit inputs. "
        "halfbyte writes W4A16, W4A16_ASYM, W3A16, W2A16, W8A16, W8A8, W4A8, FP8_DYNAMIC, FP8_BLOCK.",
    ),
    (
        GROUP + "      weights: {num_bits: 4, symmetric: false, strategy: channel}",
        "recipe.yaml, line 5: no scheme of halfbyte has 4-bit asymmetric int weights by channel with 16-bit inputs.",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n"
        "      input_activations: {num_bits: 8, strategy: tensor, dynamic: false}",
        "recipe.yaml, line 6: static input_activations cannot be honoured (halfbyte stores no activation scales). "
        "Use dynamic: true with strategy: token.",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n"
        "      input_activations: {num_bits: 8, strategy: tensor, dynamic: true}",
        "recipe.yaml, line 6: input_activations strategy 'tensor' cannot be honoured (engines measure one scale",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n"
        "      input_activations: {num_bits: 8, strategy: token, group_size: 128, dynamic: true}",
        "recipe.yaml, line 6: input_activations strategy 'token' cannot be honoured (engines measure one scale for "
        "each token, or for each group of its features).",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n"
        "      input_activations: {num_bits: 8, strategy: group, group_size: 64, dynamic: true}",
        "no scheme of halfbyte has 8-bit symmetric int weights by channel with 8-bit int by groups of 64 inputs",
    ),
    (
        GROUP + "      weights: {num_bits: 8, type: float, strategy: block, block_structure: [64, 64]}\n"
        "      input_activations: {num_bits: 8, type: float, strategy: group, group_size: 128, dynamic: true}",
        "no scheme of halfbyte has 8-bit symmetric float weights by block with 8-bit float by groups of 128 inputs",
    ),
    (
        GROUP + "      weights: {num_bits: 8, type: float, strategy: block}",
        "recipe.yaml, line 5: strategy: block and block_structure go together",
    ),
    (
        GROUP + "      weights: {num_bits: 8, type: float, strategy: block, block_structure: [128]}",
        "recipe.yaml, line 5: block_structure must be two whole numbers. Use block_structure: [128, 128].",
    ),
    (
        GROUP + "      weights: {num_bits: 4, strategy: group, group_size: 128}\n      format: int-quantized\n"
        "      input_activations: {num_bits: 8, strategy: token, dynamic: true}",
        "recipe.yaml, line 6: format 'int-quantized' cannot be honoured (W4A8 is pack-quantized).",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n"
        "      input_activations: {num_bits: 8, strategy: token, dynamic: true, symmetric: false}",
        "recipe.yaml, line 6: asymmetric input_activations cannot be honoured",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n      output_activations: {num_bits: 8}",
        "recipe.yaml, line 6: output_activations cannot be honoured (halfbyte quantises weights and inputs only).",
    ),
    (
        GROUP + "      weights: {num_bits: 8, strategy: channel}\n      format: int-quantized",
        "recipe.yaml, line 6: format 'int-quantized' cannot be honoured (W8A16 is pack-quantized).",
    ),
    (GROUP, "recipe.yaml, line 3: a config group without weights quantises nothing here. Add weights."),
]


@pytest.mark.parametrize(("text", "expected"), WRONG_LLMC, ids=[f"{i}" for i in range(len(WRONG_LLMC))])
def test_what_cannot_be_honoured_is_named_with_its_line(load: Any, text: str, expected: str) -> None:
    assert expected in complaint(load, text).replace("\n", " ")


# Robustness ---------------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    for suffix in (".toml", ".yaml"):
        path = folder / f"any{suffix}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            outcome = load_recipe(path).to_plain()["groups"]
        except RecipeError as e:
            outcome = str(e)
        assert outcome
        assert "\n" not in outcome


def test_aliases_that_multiply_are_cheap(load: Any) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert complaint(load, bomb + "scheme: W4A16").startswith("60 problems: ")


def test_kind_of_prints_no_containers() -> None:
    assert [kind_of({"a": 1}), kind_of([1]), kind_of("a")] == ["a table", "a list", "'a'"]


def test_importing_recipes_is_light() -> None:
    code = "import sys, halfbyte.recipe; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The documentation ----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(toml|yaml)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("suffix", "text"), EXAMPLES, ids=[f"{s}-{i}" for i, (s, _) in enumerate(EXAMPLES)])
def test_examples_of_the_page_load(load: Any, suffix: str, text: str) -> None:
    recipe = load(text, f"r.{suffix}")
    assert any(recipe.scheme_for(f"model.layers.5.{m}") for m in ("self_attn.q_proj", "mlp.down_proj"))
    assert recipe.scheme_for("lm_head") is None or "lm_head" not in text


def test_the_page_has_its_examples_and_names_every_scheme(load: Any) -> None:
    assert len(EXAMPLES) >= 7
    assert all(f"| `{name}`" in PAGE for name in PRESETS)
    (toml,) = [t for s, t in EXAMPLES if s == "toml" and "description" in t]
    (same,) = [t for s, t in EXAMPLES if s == "yaml" and "description" in t]
    assert load(toml, "a.toml") == load(same, "b.yaml")
    assert complaint(load, 'scheme = "W4A16"\ngruop_size = 1', "recipe.toml") in PAGE


def test_the_page_tells_what_is_refused() -> None:
    assert set(re.findall(r"\b\w+Modifier\b", PAGE)) >= {
        *METHOD_OF_MODIFIER,
        *(m for m in UNSUPPORTED_MODIFIERS if not m.endswith("PruningModifier") and m != "SparseGPTModifier"),
    }
    assert all(f"`{key}`" in PAGE for key in WITHOUT_EFFECT[:4])
