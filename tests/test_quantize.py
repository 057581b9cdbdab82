"""``quantize`` from end to end on tiny models of every family: what it writes is what was asked for, bit for bit.

The codes are held against two oracles: compressed-tensors' own quantisation for round-to-nearest, and for GPTQ a
float64 derivation from the inputs that transformers' model sees, with the code column by column forced to the written
ones, so that a difference can only be a tie.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.quantization.utils import calculate_qparams

import halfbyte
import tiny
from conftest import Models
from halfbyte import reference
from halfbyte.calibration import sequences as dealt
from halfbyte.checkpoint.layout import Layout, TensorSpec
from halfbyte.kernels import gptq_reference
from halfbyte.methods.scales import shares
from halfbyte.recipe import GptqSteps
from halfbyte.records import CalibrationRecord, LinearRecord, Manifest, read_record
from halfbyte.schemes import WeightFormat

SCHEMES = {
    "W4A16-g32": ("W4A16", 32),
    "W4A16-g64": ("W4A16", 64),
    "W4A16-channel": ("W4A16", "channel"),
    "W4A16_ASYM-g32": ("W4A16_ASYM", 32),
    "W8A16-g64": ("W8A16", 64),
    "W8A8": ("W8A8", None),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", None),
    "W4A8-g32": ("W4A8", 32),
    "W3A16-g32": ("W3A16", 32),
    "W3A16-channel": ("W3A16", "channel"),
    "W2A16-g64": ("W2A16", 64),
    "FP8_BLOCK": ("FP8_BLOCK", None),
}
LINEARS = 2 * 7


@pytest.fixture(scope="module")
def quantized(
    tiny_model: Models, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """``quantized(family, scheme, method)``: source and output, made once for equal arguments.

    ``left_out`` names steps of GPTQ that are not taken.
    """

    @functools.cache
    def make(
        family: str, scheme: str, method: str | None = None, tied: bool | None = None, left_out: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        options: dict[str, Any] = {} if tied is None else {"tied": tied}
        options |= tiny.WIDE if scheme == "FP8_BLOCK" else {}
        source = tiny_model(family, **options)
        folder = tmp_path_factory.mktemp("quantized")
        if left_out:
            run_without(left_out, source, folder / "out", text_file, scheme=scheme)
        else:
            run(source, folder / "out", text_file, scheme=scheme, method=method)
        return source, folder / "out"

    return make


def run(
    source: Path, out: Path, text: Path, *, scheme: str = "W4A16-g32", method: str | None = None, **options: Any
) -> Manifest:
    name, group_size = SCHEMES[scheme]
    settings: dict[str, Any] = {"calibration": f"text:{text}", "samples": 6, "seq_len": 40, "device": "cpu"}
    return halfbyte.quantize(source, out, scheme=name, group_size=group_size, method=method, **(settings | options))


# With these left out every code can be derived from those before it.
AFTER_COLUMNS = ("scale_refit", "code_descent", "smoothing")


def run_without(
    steps: tuple[str, ...], source: Path, out: Path, text: Path, *, scheme: str = "W4A16-g32", **options: Any
) -> Manifest:
    name, group_size = SCHEMES[scheme]
    values = {"scheme": name, "group_size": group_size, "effort": "low", "gptq": dict.fromkeys(steps, False)}
    recipe = out.with_name(f"{out.name}-recipe.json")
    recipe.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    settings: dict[str, Any] = {"calibration": f"text:{text}", "samples": 6, "seq_len": 40, "device": "cpu"}
    # What codes are derived from is float64, and bfloat16 inputs lie too far from that to be told apart from errors.
    settings["dtype"] = "float32"
    return halfbyte.quantize(source, out, recipe=recipe, **(settings | options))


# Every family and scheme


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_and_scheme_verifies_and_reloads(
    family: str, scheme: str, quantized: Callable[..., tuple[Path, Path]]
) -> None:
    source, out = quantized(family, scheme)
    record = halfbyte.verify(out, source=source, reload=True)
    assert record.passed
    assert [c.name for c in record.checks if c.status != "passed"] == []
    assert {"copies", "error", "weights", "logits"} <= {c.name for c in record.checks}

    # The same model, built here from the original's architecture and the reference decoder's weights, which
    # transformers rounds to the checkpoint's dtype.
    weights = {n: w.to(torch.bfloat16) for n, w in tiny.decoded(out).items()}
    expected = tiny.load(source, dtype="auto").float()  # Gemma's embedding scale, too, is rounded to that dtype
    missing, unexpected = expected.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    expected.tie_weights()
    config = transformers.AutoConfig.from_pretrained(out)
    config.quantization_config["dequantize"] = True
    actual = tiny.load(out, config=config, dtype="auto").float()
    ids = tiny.token_ids(source)
    with torch.no_grad():
        a, b = actual(ids).logits, expected(ids).logits
        original = tiny.load(source)(ids).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a, original, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "scheme", ["W4A16-g32", "W4A16-channel", "W4A16_ASYM-g32", "W8A16-g64", "W8A8", "W4A8-g32", "W2A16-g64"]
)
def test_round_to_nearest_verifies(scheme: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized("qwen2", scheme, "rtn")
    assert halfbyte.verify(out, source=source, reload=True).passed
    manifest = read_record(Manifest, out / "halfbyte.json")
    assert manifest.calibration is None
    assert {r.method for r in manifest.linears} == {"rtn"}
    assert {r.tokens for r in manifest.linears} == {0}


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma3", False), ("qwen2", False), ("qwen3", True)])
def test_heads_the_other_way_round(family: str, tied: bool, quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized(family, "W4A16-g64", None, tied)
    assert ("lm_head.weight" in tiny.stored(source)) is not tied
    assert halfbyte.verify(out, source=source, reload=True).passed


def test_float16_and_float32_checkpoints_keep_their_dtype(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        source, out = tiny_model("llama", dtype=dtype), tmp_path / str(dtype)
        run(source, out, text_file)
        assert halfbyte.verify(out, source=source, reload=True).passed
        kinds = {t.dtype for n, t in tiny.stored(out).items() if n.endswith("weight_scale")}
        assert kinds == {dtype}


# What is in the folder


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_everything_but_the_linears_is_copied_byte_for_byte(
    family: str, quantized: Callable[..., tuple[Path, Path]]
) -> None:
    source, out = quantized(family, "W4A16-g32")
    before, after = tiny.stored(source), tiny.stored(out)
    linears = {n for n in before if n.endswith("_proj.weight")}
    assert len(linears) == LINEARS
    kept = before.keys() - linears
    assert {n for n in after if not re.search(r"_proj\.weight", n)} == kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert after[name].shape == before[name].shape
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    if family == "qwen2":
        assert "model.layers.0.self_attn.q_proj.bias" in kept
    leaves = {n.rpartition(".")[2] for n in after if re.search(r"_proj\.weight", n)}
    assert leaves == {"weight_packed", "weight_scale", "weight_shape"}


def test_companions_are_copied_and_everybody_may_read(quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized("llama", "W4A16-g32")
    companions = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in companions:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    written = {p.name for p in out.iterdir()} - {"verify.json"}
    assert written == companions | {"config.json", "halfbyte.json", "model.safetensors"}
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "How deep?"}], tokenize=False)
    assert said == "<s><user>How deep?</s>"


def test_the_config_gains_one_key(quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized("llama", "W4A16-g32")
    config = tiny.config_of(out)
    quantization = config.pop("quantization_config")
    assert config == tiny.config_of(source)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "group_size": 32,
        "strategy": "group",
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    assert quantization == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
    }


def test_the_config_of_quantised_activations(quantized: Callable[..., tuple[Path, Path]]) -> None:
    for scheme, kind, storage in (("W8A8", "int", "int-quantized"), ("FP8_DYNAMIC", "float", "float-quantized")):
        quantization = tiny.config_of(quantized("llama", scheme)[1])["quantization_config"]
        group = quantization["config_groups"]["group_0"]
        assert (quantization["format"], group["format"]) == (storage, storage)
        weights, inputs = group["weights"], group["input_activations"]
        assert (weights["strategy"], weights["group_size"], weights["type"]) == ("channel", None, kind)
        assert inputs == {
            "num_bits": 8,
            "type": kind,
            "symmetric": True,
            "group_size": None,
            "strategy": "token",
            "dynamic": True,
            "actorder": None,
            "block_structure": None,
            "observer": None,
            "observer_kwargs": {},
        }


def test_blocks_on_disk(quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized("llama", "FP8_BLOCK")
    before, after = tiny.stored(source), tiny.stored(out)
    for name in (n for n in before if n.endswith("_proj.weight")):
        assert after[name].dtype == torch.float8_e4m3fn
        assert after[name].shape == before[name].shape
        scale = after[f"{name}_scale"]
        assert scale.dtype == before[name].dtype
        assert scale.shape == tuple(n // 128 for n in before[name].shape)
    manifest = read_record(Manifest, out / "halfbyte.json")
    assert {(r.scheme, r.group_size, r.method) for r in manifest.linears} == {("FP8_BLOCK", None, "rtn")}
    assert {r.bits_per_weight for r in manifest.linears} == {8 + 16 / 128**2}


def test_the_manifest_says_how_each_linear_went(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, out = tiny_model("gemma3"), tmp_path / "out"
    manifest = run(source, out, text_file, seed=5)
    assert manifest == read_record(Manifest, out / "halfbyte.json")
    expected = [n.removesuffix(".weight") for n in tiny.stored(source) if n.endswith("_proj.weight")]
    assert sorted(r.name for r in manifest.linears) == sorted(expected)
    for r in manifest.linears:
        assert r.block == int(r.name.split(".")[2])
        assert (r.scheme, r.group_size, r.method, r.tokens) == ("W4A16", 32, "gptq", 6 * 40)
        assert r.bits_per_weight == 4.5
        assert 0 < r.relative_error < 0.1
        assert (r.damp_fraction, r.damp_raises, r.dead_columns) == (0.01, 0, 0)
    calibration = manifest.calibration
    assert isinstance(calibration, CalibrationRecord)
    assert (calibration.samples, calibration.tokens, calibration.seq_len, calibration.seed) == (6, 240, 40, 5)
    assert manifest.bytes_after == sum(t.numel() * t.element_size() for t in tiny.stored(out).values())
    assert manifest.bytes_before == sum(t.numel() * t.element_size() for t in tiny.stored(source).values())
    assert manifest.files.keys() == {"model.safetensors"}
    assert manifest.recipe["seed"] == 5
    assert [b["block"] for b in manifest.run["blocks"]] == [0, 1]


def test_two_equal_runs_differ_in_nothing_but_run(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tiny_model("gemma3"), tmp_path / name, text_file, offload=name == "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    manifests = [json.loads((tmp_path / n / "halfbyte.json").read_text()) for n in "ab"]
    for m in manifests:
        del m["run"]
    assert manifests[0] == manifests[1]


def test_shards_on_either_side_change_no_tensor(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sharded = tiny_model("qwen2"), tiny_model("qwen2", shard="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    first = run(whole, tmp_path / "whole", text_file)
    of = Layout.of

    def small(specs: Sequence[TensorSpec], max_shard_bytes: int = 20_000) -> Layout:
        return of(specs, max_shard_bytes)

    monkeypatch.setattr(Layout, "of", staticmethod(small))
    second = run(sharded, tmp_path / "sharded", text_file)
    files = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert halfbyte.verify(tmp_path / "sharded", source=sharded, reload=True).passed
    a, b = tiny.stored(tmp_path / "whole"), tiny.stored(tmp_path / "sharded")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)
    assert first.source["sha256"] == second.source["sha256"]
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == b.keys()
    assert index["metadata"]["total_size"] == second.bytes_after


# Ignoring and recipes


def test_ignored_linears_stay_as_they_are(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, out = tiny_model("llama"), tmp_path / "out"
    patterns = ["re:.*o_proj", "model.layers.1.mlp.down_proj"]
    manifest = run(source, out, text_file, ignore=patterns)
    left = {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}
    assert len(manifest.linears) == LINEARS - len(left)
    assert left.isdisjoint(r.name for r in manifest.linears)
    before, after = tiny.stored(source), tiny.stored(out)
    assert all(torch.equal(before[f"{m}.weight"], after[f"{m}.weight"]) for m in left)
    assert set(patterns) <= set(tiny.config_of(out)["quantization_config"]["ignore"])
    assert halfbyte.verify(out, source=source, reload=True).passed


def test_whole_blocks_can_be_ignored(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, out = tiny_model("mistral"), tmp_path / "out"
    manifest = run(source, out, text_file, ignore=[r"re:.*layers\.0\..*"])
    assert {r.block for r in manifest.linears} == {1}
    assert halfbyte.verify(out, source=source, reload=True).passed


def test_a_recipe_file_gives_what_the_options_give(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'scheme = "W4A16"\ngroup_size = 32\nignore = ["re:.*o_proj"]\n'
        f'[calibration]\nsource = "text:{text_file}"\nsamples = 6\nseq_len = 40\n'
    )
    source = tiny_model("qwen3")
    a = halfbyte.quantize(source, tmp_path / "a", recipe=recipe, device="cpu")
    b = run(source, tmp_path / "b", text_file, ignore=["re:.*o_proj"])
    assert a.files == b.files
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_several_groups_load_in_transformers(family: str, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: W4A16\ngroup_size: 32\n"
        "groups:\n- {scheme: W8A16, group_size: channel, targets: ['re:.*down_proj']}\n"
        f"calibration: {{source: 'text:{text_file}', samples: 6, seq_len: 40}}\n"
    )
    source, out = tiny_model(family), tmp_path / "out"
    manifest = halfbyte.quantize(source, out, recipe=recipe, device="cpu")
    assert {(r.name.rpartition(".")[2] == "down_proj", r.scheme, r.group_size) for r in manifest.linears} == {
        (True, "W8A16", None),
        (False, "W4A16", 32),
    }
    record = halfbyte.verify(out, source=source, reload=True)
    assert [c for c in record.checks if c.status != "passed"] == []
    expected, actual = tiny.load(source, dtype=torch.bfloat16), tiny.load(out, dtype="auto")
    expected.load_state_dict({n: w.to(torch.bfloat16) for n, w in tiny.decoded(out).items()}, strict=False)
    ids = tiny.token_ids(source)
    with torch.no_grad():
        a, b = actual(ids).logits.float(), expected(ids).logits.float()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Round to nearest against compressed-tensors


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_round_to_nearest_is_compressed_tensors_own(scheme: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized("llama", scheme, "rtn")
    before, weights = tiny.stored(source), tiny.decoded(out)
    group = tiny.config_of(out)["quantization_config"]["config_groups"]["group_0"]
    args = QuantizationArgs.model_validate(group["weights"])
    for name in (n for n in before if n.endswith("_proj.weight")):
        weight = before[name].float()
        grouped = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
        if args.block_structure:
            rows, columns = (n // size for n, size in zip(weight.shape, args.block_structure, strict=True))
            grouped = weight.reshape(rows, 128, columns, 128).transpose(1, 2).flatten(-2)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        scale = scale.to(before[name].dtype).float()
        if not args.symmetric:  # its zero point is reckoned from the scale before rounding; ours fits the stored one
            low = grouped.amin(-1).clamp(max=0)
            zero = (-8 - torch.round(low / scale)).clamp(-8, 7).to(zero.dtype)
        codes = library_quantize(weight, scale, zero, args).float()
        if args.block_structure:
            scale, zero = (t.repeat_interleave(128, dim=0) for t in (scale, zero))
        steps = codes - zero.float().repeat_interleave(weight.shape[1] // zero.shape[1], dim=1)
        wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        differ = weights[name] != steps * wide
        if args.symmetric:
            assert not differ.any(), name
        else:  # it rounds w / s + z, we round w / s: ties go to other neighbours, nothing else does
            to_tie = (weight / wide - (weight / wide).floor() - 0.5).abs()
            assert (to_tie[differ] < 1e-5).all(), name
            assert differ.float().mean() < 0.01, name


# GPTQ against a float64 derivation


def inputs_of(model: Any, sequences: list[torch.Tensor], block: int) -> dict[str, np.ndarray]:
    """What the Linears of one block see, ``[tokens, in]`` float64 each, one sequence at a time without padding."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for path, module in model.model.layers[block].named_modules():
        if isinstance(module, torch.nn.Linear):

            def look(_: Any, inputs: Any, path: str = path) -> None:
                seen.setdefault(path, []).append(inputs[0][0].double())

            handles.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts).numpy() for path, parts in seen.items()}


STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def stage_inputs(source: Path, out: Path, sequences: list[torch.Tensor], block: int) -> dict[str, np.ndarray]:
    """What each Linear of a block sees where everything before it, in its own block too, is as written in ``out``."""
    after = tiny.decoded(out)
    group = tiny.config_of(out)["quantization_config"]["config_groups"]["group_0"]
    model, seen = tiny.load(source), {}
    done = {n for n in after if any(n.startswith(f"model.layers.{i}.") for i in range(block))}
    for names in STAGES:
        model.load_state_dict({n: after[n] for n in done}, strict=False)
        handles = []
        for path, module in model.named_modules():
            if group["input_activations"] and f"{path}.weight" in done and isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(round_to_int8))
        looks = inputs_of(model, sequences, block)
        for handle in handles:
            handle.remove()
        for path in [p for p in looks if p.rpartition(".")[2] in names]:
            seen[path] = looks[path]
            done.add(f"model.layers.{block}.{path}.weight")
    return seen


def round_to_int8(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (torch.round(inputs[0] / scale) * scale,)


def check_block(
    source: Path, out: Path, fmt: WeightFormat, sequences: list[torch.Tensor], block: int, records: list[LinearRecord]
) -> None:
    """Codes, scales and recorded errors of a block, given that all Linears before each are as written."""
    before = tiny.stored(source)
    files = {t.name: t for f in out.glob("*.safetensors") for t in reference.read_header(f).tensors}
    looks = stage_inputs(source, out, sequences, block)
    assert len(looks) == 7
    for path, x in looks.items():
        name = f"model.layers.{block}.{path}"
        w = before[f"{name}.weight"].double().numpy()
        parts = {n.rpartition(".")[2]: t for n, t in files.items() if n.rpartition(".")[0] == name}
        written = reference.decode_rows(parts, fmt, 0, w.shape[0])
        n = w.shape[1]
        h = x.T @ x
        order = np.argsort(-np.diag(h), kind="stable")
        damping = 0.01 * np.diag(h).mean() + GptqSteps().shrinkage * np.sqrt(n / len(x)) * np.diag(h)
        damped = (h + np.diag(damping))[order][:, order]
        r = np.linalg.cholesky(np.linalg.inv(damped)).T
        importance = np.empty(n)
        importance[order] = 1 / np.diag(r) ** 2
        scales = written.scales.astype(np.float64)
        zeros = np.zeros_like(scales) if written.zero_points is None else written.zero_points.astype(np.float64)

        # Scales: the search over shares of the range ends where the float64 one does, up to what float32 can tell.
        assert_scales_are_searched(w, importance, scales, zeros, fmt, before[f"{name}.weight"].dtype)

        # Codes: each is the nearest to its exact value, the codes before it given.
        group_of = (np.arange(n) // (n // scales.shape[1]))[order]
        codes = written.codes.astype(np.int8)[:, order]
        _, exact, loss = gptq_reference.solve_columns(
            w[:, order], r, scales, zeros, group_of, fmt.q_min, fmt.q_max, forced_codes=codes
        )
        distance = np.abs(np.clip(exact, fmt.q_min, fmt.q_max) - codes)
        assert distance.max() <= 0.5 + 2e-3, f"{name}: {distance.max()}"

        # The recorded error is that of the written weight, and less than rounding's.
        e = written.weight.astype(np.float64) - w
        energy = np.einsum("ij,jk,ik->", w, h, w)
        (record,) = [x for x in records if x.name == name]
        assert record.tokens == len(x)
        error = np.einsum("ij,jk,ik->", e, h, e)
        assert record.relative_error == pytest.approx(error / energy, rel=2e-2)
        assert loss.sum() == pytest.approx(error + (e**2 @ damping).sum(), rel=1e-6)
        e = nearest(w, fmt, before[f"{name}.weight"].dtype) - w
        assert error < np.einsum("ij,jk,ik->", e, h, e)


def nearest(w: np.ndarray, fmt: WeightFormat, dtype: torch.dtype) -> np.ndarray:
    grouped = w.reshape(w.shape[0], fmt.groups(w.shape[1]), -1)
    s, z = candidates(w, fmt, dtype, 1.0)
    q = np.clip(np.rint(grouped / s[..., None]) + z[..., None], fmt.q_min, fmt.q_max)
    return ((q - z[..., None]) * s[..., None]).reshape(w.shape)


def candidates(w: np.ndarray, fmt: WeightFormat, dtype: torch.dtype, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Scales (in float64, but representable in ``dtype``) and zero points of a share of the range."""
    grouped = w.reshape(w.shape[0], fmt.groups(w.shape[1]), -1).astype(np.float32)
    low, high = np.minimum(grouped.min(-1), 0) * np.float32(share), np.maximum(grouped.max(-1), 0) * np.float32(share)
    levels = np.float32(fmt.q_max - fmt.q_min)
    raw = np.maximum(-low, high) / (levels / 2) if fmt.symmetric else (high - low) / levels
    scale = torch.from_numpy(raw).to(dtype).double().numpy()
    if fmt.symmetric:
        return scale, np.zeros_like(scale)
    return scale, np.clip(fmt.q_min - np.rint(low / scale), fmt.q_min, fmt.q_max)


def assert_scales_are_searched(
    w: np.ndarray, importance: np.ndarray, scales: np.ndarray, zeros: np.ndarray, fmt: WeightFormat, dtype: torch.dtype
) -> None:
    rows, groups = scales.shape
    grouped, h = w.reshape(rows, groups, -1), importance.reshape(1, groups, -1)

    def error(s: np.ndarray, z: np.ndarray) -> np.ndarray:
        q = np.clip(np.rint(grouped / s[..., None]) + z[..., None], fmt.q_min, fmt.q_max)
        return (h * (grouped - (q - z[..., None]) * s[..., None]) ** 2).sum(-1)

    grid = [candidates(w, fmt, dtype, float(share)) for share in shares(fmt)]
    best = np.min([error(s, z) for s, z in grid], axis=0)
    assert (error(scales, zeros) <= best * (1 + 1e-3)).all()
    assert (np.abs(np.array([s for s, _ in grid]) - scales).min(0) == 0).all()


@pytest.mark.parametrize(
    "scheme",
    [
        "W4A16-g32",
        "W4A16-channel",
        "W4A16_ASYM-g32",
        "W8A16-g64",
        "W8A8",
        "W4A8-g32",
        "W3A16-g32",
        "W3A16-channel",
        "W2A16-g64",
    ],
)
def test_gptq_codes_are_those_of_a_float64_derivation(
    scheme: str, quantized: Callable[..., tuple[Path, Path]], text_file: Path
) -> None:
    source, out = quantized("llama", scheme, left_out=AFTER_COLUMNS)
    check_codes(source, out, windows(source))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_gptq_codes_in_every_family(family: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    source, out = quantized(family, "W4A16-g32", left_out=AFTER_COLUMNS)
    check_codes(source, out, windows(source))


@pytest.mark.parametrize(
    "scheme", ["W4A16-g32", "W4A16-channel", "W4A16_ASYM-g32", "W8A16-g64", "W8A8", "W3A16-g32", "W2A16-g64"]
)
def test_refinement_lowers_every_error_of_the_first_block(
    scheme: str, quantized: Callable[..., tuple[Path, Path]]
) -> None:
    """Recorded errors are those of the written weights, derived in float64; what sees the same inputs in both runs
    (q, k and v) has lost error."""
    source, columns = quantized("llama", scheme, left_out=AFTER_COLUMNS)
    _, refined = quantized("llama", scheme, left_out=("smoothing",))
    looks = stage_inputs(source, refined, windows(source), 0)
    before, after = tiny.stored(source), tiny.decoded(refined)
    recorded = [
        {r.name: r.relative_error for r in read_record(Manifest, o / "halfbyte.json").linears}
        for o in (columns, refined)
    ]
    fallen = []
    for path, x in looks.items():
        name = f"model.layers.0.{path}"
        w, h = before[f"{name}.weight"].double().numpy(), x.T @ x
        e = after[f"{name}.weight"].double().numpy() - w
        error = np.einsum("ij,jk,ik->", e, h, e) / np.einsum("ij,jk,ik->", w, h, w)
        assert recorded[1][name] == pytest.approx(error, rel=2e-2)
        # what falls is the error with damping, so without it a Linear may gain nothing, but not lose
        if path.rpartition(".")[2] in STAGES[0]:
            assert recorded[1][name] < recorded[0][name] * 1.001
            fallen.append((recorded[1][name], recorded[0][name]))
    assert sum(new for new, _ in fallen) < 0.99 * sum(old for _, old in fallen)


def windows(source: Path) -> list[torch.Tensor]:
    """Six windows of 40 tokens, each opened with BOS, as ``text:`` deals them."""
    ids = transformers.AutoTokenizer.from_pretrained(source)(tiny.TEXT, add_special_tokens=False).input_ids
    return [torch.tensor([1, *ids[i * 39 : (i + 1) * 39]]) for i in range(6)]


def check_codes(source: Path, out: Path, sequences: list[torch.Tensor]) -> None:
    group = tiny.config_of(out)["quantization_config"]["config_groups"]["group_0"]
    records = read_record(Manifest, out / "halfbyte.json").linears
    for block in range(2):
        check_block(source, out, tiny.format_of(group), sequences, block, records)


def test_torchs_thread_count_is_left_alone(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    """numba shares torch's OpenMP runtime; a count changed on the way would change sums after a resume."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            manifest = run(tiny_model("llama"), tmp_path / str(threads), text_file)
            assert torch.get_num_threads() == threads
            assert manifest.run["threads"] == threads
    finally:
        torch.set_num_threads(before)


# Padding


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Rows of very different lengths, so that most of a batch is padding."""
    path = tmp_path / "rows.jsonl"
    starts = [0, 200, 400, 800, 1000, 1300, 1600, 1700]
    lengths = [120, 7, 60, 33, 90, 15, 70, 110]
    rows: list[dict[str, Any]] = [{"text": tiny.TEXT[s : s + n]} for s, n in zip(starts, lengths, strict=True)]
    rows.append({"messages": [{"role": "user", "content": "How deep?"}, {"role": "assistant", "content": "Enough."}]})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def rows_of(source: Path, path: Path) -> list[torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "text" in row:
            ids = tokenizer(row["text"]).input_ids
        else:
            rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(rendered, add_special_tokens=False).input_ids
        found.append(torch.tensor(ids[:40]))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens_per_batch", [4096, 100, 1])
def test_padding_enters_no_statistic(
    family: str,
    tokens_per_batch: int,
    tiny_model: Models,
    uneven: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dealt, "TOKENS_PER_BATCH", tokens_per_batch)
    source, out = tiny_model(family), tmp_path / "out"
    manifest = run_without(AFTER_COLUMNS, source, out, uneven, calibration=f"jsonl:{uneven}", samples=9)
    sequences = rows_of(source, uneven)
    assert manifest.calibration is not None
    assert manifest.calibration.tokens == sum(map(len, sequences))
    assert len({len(s) for s in sequences}) > 5
    check_codes(source, out, sequences)


def test_dead_inputs_get_code_zero(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    """A norm with a weight of zero shuts an input off: its column cannot matter, and is written as zero."""
    source = tiny.build(tmp_path / "source")
    tensors = tiny.stored(source)
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    manifest = run(source, tmp_path / "out", text_file)
    dead = {r.name.rpartition(".")[2]: r.dead_columns for r in manifest.linears if r.block == 0}
    assert dead == {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 0, "gate_proj": 0, "up_proj": 0, "down_proj": 0}
    assert (tiny.decoded(tmp_path / "out")["model.layers.0.self_attn.k_proj.weight"][:, 5] == 0).all()
