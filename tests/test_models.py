"""Every family of :mod:`zoo`: planned, quantised, verified, and loaded by transformers with the right numbers.

What is expected is derived without halfbyte: the Linears from the module tree that transformers builds, each found
among the checkpoint's tensors by its bytes; the logits from a dense checkpoint of weights that the reference decoder
made.

With HALFBYTE_MODEL_RECORDS=FILE, each step that passed is appended to that file; ``tests/model_records.py``
makes docs/models.md of it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import halfbyte
import model_records
import pictures
import tiny
import zoo
from conftest import Models
from halfbyte.architectures import KNOWN_ARCHITECTURES
from halfbyte.calibration.processing import load_processor
from halfbyte.records import Manifest

SCHEMES: dict[str, dict[str, Any]] = {"W4A16": {"scheme": "W4A16", "group_size": 32}, "W8A8": {"scheme": "W8A8"}}
ROUTERS = ("gate", "router", "shared_expert_gate", "layer")
# Stacks that hold an expert's matrix as [in, out], as published checkpoints have them.
TRANSPOSED = ("llama4", "qwen3-vl-moe")
# No engine reads these experts once they are quantised: they stay as they are.
EXPERTS_STAY = ("gpt-oss",)

# What transformers cannot load, and why; tests fail when it can.
NO_STACKS = "transformers knows this family's experts in one tensor only, vLLM reads them one by one"
NO_INT8 = "transformers has no loader for int8 experts"
NOT_LOADED = {("granite-moe", s): NO_STACKS for s in SCHEMES} | {("granite-moe-shared", s): NO_STACKS for s in SCHEMES}
NOT_LOADED |= {("qwen3-vl-moe", s): NO_STACKS for s in SCHEMES}
NOT_LOADED |= {
    (f, "W8A8"): NO_INT8
    for f in ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "olmoe", "phimoe")
}

EVERY = [pytest.param(family, scheme, id=f"{family}-{scheme}") for family in zoo.FAMILIES for scheme in SCHEMES]
SEEING = [p for p in EVERY if zoo.FAMILIES[str(p.values[0])].vision is not None]
PUBLISHED = [p for p in SEEING if not str(p.values[0]).endswith("-nested")]

Quantized = Callable[[str, str], tuple[Path, Path, Manifest]]


@pytest.fixture(scope="module")
def quantized(tiny_model: Models, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """``quantized(family, scheme)``: source, output and manifest, made once."""

    @functools.cache
    def make(family: str, scheme: str) -> tuple[Path, Path, Manifest]:
        source, out = tiny_model(family), tmp_path_factory.mktemp("quantized") / "out"
        return source, out, quantize(source, out, scheme, f"text:{text_file}")

    return make


def quantize(source: Path, out: Path, scheme: str, calibration: str) -> Manifest:
    options = SCHEMES[scheme] | {"samples": 4, "seq_len": 40, "effort": "low", "device": "cpu"}
    return halfbyte.quantize(source, out, calibration=calibration, **options)


def model_of(folder: Path, family: str, **options: Any) -> Any:
    """What transformers makes of a folder, and what it has to say about its tensors."""
    kind = getattr(transformers, zoo.FAMILIES[family].model)
    with model_records.quiet():
        model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    return model.eval(), info


def reloaded(out: Path, family: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(out)
    config.quantization_config["dequantize"] = True
    return model_of(out, family, config=config)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The language model's blocks, by the names that transformers' classes give them."""
    parts = dict(model.named_modules())
    paths = ("transformer.h", "model.layers", "model.language_model.layers", "model.text_model.layers")
    return next(parts[p] for p in (*paths, "language_model.model.layers") if p in parts)


def expected_linears(source: Path, family: str) -> set[str]:
    """Names on disk of all Linears of the blocks but routers, experts one by one."""
    tensors = tiny.stored(source)
    named = {digest(t): n for n, t in tensors.items()}
    model, _ = model_of(source, family)
    wanted: set[str] = set()
    for path, module in decoder_layers(model).named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and leaf not in ROUTERS:
            wanted.add(named[digest(module.weight)].removesuffix(".weight"))
    stacks = {n: t for n, t in tensors.items() if t.dim() == 3 and re.search(r"experts\.|block_sparse_moe\.", n)}
    if stacks and family not in EXPERTS_STAY:
        return wanted | {m for n, t in stacks.items() for m in unstacked(n, len(t))}
    for _, module in decoder_layers(model).named_modules():
        fused, down = (getattr(module, n, None) for n in ("gate_up_proj", "down_proj"))
        if not stacks and isinstance(fused, torch.nn.Parameter):
            for pair, back in zip(fused, down, strict=True):
                wanted |= {named[digest(w)].removesuffix(".weight") for w in (*pair.chunk(2), back)}
    return wanted


def unstacked(name: str, experts: int) -> list[str]:
    """The modules that a stack of experts is written as."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = parent if parent.endswith("experts") else f"{parent}.experts"
    leaves = ("gate_proj", "up_proj") if leaf in ("gate_up_proj", "input_linear") else ("down_proj",)
    return [f"{parent}.{e}.{leaf}" for e in range(experts) for leaf in leaves]


def by_hand(source: Path, out: Path, family: str, folder: Path) -> Path:
    """A dense checkpoint with the source's names and the values that the reference decoder reads in ``out``."""
    shutil.copytree(source, folder)
    decoded = tiny.decoded(out)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    made = {}
    for name, tensor in tiny.stored(source).items():
        if name in decoded:
            value = decoded.pop(name)
        else:
            parts = [decoded.pop(f"{m}.weight") for m in unstacked(name, len(tensor))]
            count = len(parts) // len(tensor)
            rows = [torch.cat(parts[e * count : (e + 1) * count]) for e in range(len(tensor))]
            value = torch.stack([r.T if family.startswith(TRANSPOSED) else r for r in rows])
        assert value.shape == tensor.shape
        made[name] = value.to(tensor.dtype).contiguous()
    assert not decoded
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Steps


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_the_plan_covers_the_language_models_linears(family: str, scheme: str, tiny_model: Models) -> None:
    source = tiny_model(family)
    plan = halfbyte.plan(source, **SCHEMES[scheme])
    assert plan.problems == []
    assert not [n for n in plan.notes if "not among those tested" in n]
    planned = {t.name.removesuffix(".weight") for t in plan.tensors if t.action == "quantize"}
    expected = expected_linears(source, family)
    assert planned == expected
    (path,) = {re.split(r"\.\d+\.", name)[0] for name in expected}
    model_records.passed(family, scheme, "plan", blocks=path)


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_all_else_is_copied_byte_for_byte(family: str, scheme: str, quantized: Quantized) -> None:
    source, out, manifest = quantized(family, scheme)
    written, original = tiny.stored(out), tiny.stored(source)
    modules = {n.removesuffix(".weight_scale") for n in written if n.endswith(".weight_scale")}
    expected = expected_linears(source, family)
    assert modules == expected
    parts = re.compile(r"\.(weight|weight_packed|weight_scale|weight_shape)$")
    others = {n: t for n, t in written.items() if parts.sub("", n) not in modules or n.endswith(".bias")}
    stacks = {m for n, t in original.items() if t.dim() == 3 for m in [n] if set(unstacked(n, len(t))) <= modules}
    kept = {n for n in original if parts.sub("", n) not in modules or n.endswith(".bias")} - stacks
    assert others.keys() == kept
    changed = {s.norm for s in manifest.smoothing}
    biases = {
        n for n in others if n.endswith(".bias") and parts.sub("", n.removesuffix(".bias") + ".weight") in modules
    }
    differing = {n for n in kept if digest(others[n]) != digest(original[n])}
    assert differing <= changed | (biases if manifest.pairs else set())
    if scheme == "W4A16":
        assert differing == set()
    model_records.passed(family, scheme, "quantize")


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_verify(family: str, scheme: str, quantized: Quantized) -> None:
    source, out, _ = quantized(family, scheme)
    record = halfbyte.verify(out, source=source, reload=True)
    wanted = [c for c in record.checks if c.status != "passed"]
    if (family, scheme) in NOT_LOADED:
        # verify says so, and compares what it can without transformers' loader of experts.
        assert [(c.name, c.status) for c in wanted] == [("reload", "skipped")]
    else:
        assert [(c.name, c.status, c.detail, c.problems[:3]) for c in wanted] == []
        assert {"copies", "error", "weights", "logits"} <= {c.name for c in record.checks}
    model_records.passed(family, scheme, "verify")


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_logits_are_those_of_the_model_dequantised_by_hand(
    family: str, scheme: str, quantized: Quantized, tmp_path: Path
) -> None:
    source, out, _ = quantized(family, scheme)
    dense = by_hand(source, out, family, tmp_path / "dense")
    expected, _ = model_of(dense, family)
    ids = torch.tensor([tiny.token_ids(source)[0].tolist()])
    with torch.no_grad():
        b, original = expected(ids).logits, model_of(source, family)[0](ids).logits
    assert not torch.allclose(b.float(), original.float(), rtol=1e-3, atol=1e-3)
    if (family, scheme) in NOT_LOADED:
        require_not_loaded(out, family)
        model_records.passed(family, scheme, "reload", NOT_LOADED[family, scheme])
    else:
        actual, info = reloaded(out, family)
        assert not info["missing_keys"]
        assert all(is_predictor(k, family) for k in info["unexpected_keys"])
        model_records.passed(family, scheme, "reload")
        with torch.no_grad():
            torch.testing.assert_close(actual(ids).logits, b, rtol=1e-4, atol=1e-4)
        model_records.passed(family, scheme, "logits")
    with torch.no_grad():
        torch.testing.assert_close(halfbyte.load(out)(ids).logits, b, rtol=1e-4, atol=1e-4)
    model_records.passed(family, scheme, "halfbyte.load")


@pytest.mark.parametrize(("family", "scheme"), SEEING)
def test_logits_with_pictures(family: str, scheme: str, quantized: Quantized, tmp_path: Path) -> None:
    source, out, _ = quantized(family, scheme)
    expected, _ = model_of(by_hand(source, out, family, tmp_path / "dense"), family)
    actual = halfbyte.load(out) if (family, scheme) in NOT_LOADED else reloaded(out, family)[0]
    inputs = pictured(source, family, 0), pictured(source, family, 1)
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    with torch.no_grad():
        for values in inputs:
            torch.testing.assert_close(actual(**values).logits, expected(**values).logits, rtol=1e-4, atol=1e-4)
        # The pictures are seen.
        one, other = (expected(**values).logits.float() for values in inputs)
    assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)
    model_records.passed(family, scheme, "logits with pictures")


@pytest.mark.parametrize(("family", "scheme"), PUBLISHED)
def test_calibration_with_pictures(
    family: str, scheme: str, tiny_model: Models, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not processed(family):
        model_records.passed(family, scheme, "calibrated with pictures", "its processor exists for torchvision alone")
        pytest.skip("its processor exists for torchvision alone")
    folder = tmp_path_factory.mktemp("pictured")
    rows = pictures.save_pictured_rows(folder / "rows.jsonl")
    source, out = tiny_model(family), folder / "out"
    quantize(source, out, scheme, f"vlm:{rows}")
    record = halfbyte.verify(out, source=source, reload=False)
    assert record.passed
    assert {n for n in tiny.stored(out) if n.endswith("weight_scale")} == {
        f"{m}.weight_scale" for m in expected_linears(source, family)
    }
    model_records.passed(family, scheme, "calibrated with pictures")


def is_predictor(name: str, family: str) -> bool:
    """Whether a tensor belongs to a layer behind the last, which transformers leaves out."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    layers = (zoo.COMMON | dict(zoo.FAMILIES[family].text))["num_hidden_layers"]
    return zoo.FAMILIES[family].predictors > 0 and match is not None and int(match[1]) >= layers


def require_not_loaded(out: Path, family: str) -> None:
    """transformers raises, or says that experts are missing."""
    try:
        _, info = reloaded(out, family)
    except RuntimeError as e:
        assert "conversion" in str(e)  # noqa: PT017
        return
    assert any("experts" in k for k in info["missing_keys"])


def processed(family: str) -> bool:
    """Whether its processor can be made here: without torchvision there is none for Llama 4."""
    name = zoo.FAMILIES[family].pictures
    return not pictures.FAMILIES[name].torchvision


def pictured(source: Path, family: str, seed: int) -> dict[str, torch.Tensor]:
    """What a model is called with for a text with pictures; by hand where there is no processor."""
    if processed(family):
        processor = load_processor(source)
        parts = [{"type": "image"}, {"type": "text", "text": "What is seen from the ferry?"}, {"type": "image"}]
        text = processor.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        shown = [pictures.picture(40, 30, seed=seed), pictures.picture(60, 80, seed=seed + 2)]
        values = dict(processor(images=[shown], text=[text], return_tensors="pt"))
        dtype = torch.bfloat16
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    assert family == "llama4"
    noise = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    ids = [1, *range(20, 30), zoo.IMAGE_START, zoo.IMAGE, zoo.IMAGE, zoo.IMAGE_END, *range(30, 40)]
    return {"input_ids": torch.tensor([ids]), "pixel_values": noise}


def test_known_architectures_are_those_tested() -> None:
    assert {family.published or family.model for family in zoo.FAMILIES.values()} == KNOWN_ARCHITECTURES


def test_records_are_of_the_families_that_there_are() -> None:
    """And each family was quantised and loaded, in both schemes: a record that is missing was not run."""
    records = model_records.read()
    assert {family for family, _, _ in records} == zoo.FAMILIES.keys()
    for family in zoo.FAMILIES:
        for scheme in SCHEMES:
            for step in ("plan", "quantize", "verify", "reload", "halfbyte.load"):
                record = records[family, scheme, step]
                possible = step != "reload" or (family, scheme) not in NOT_LOADED
                assert (record["outcome"] == "passed") == possible
                assert record["outcome"] in ("passed", NOT_LOADED.get((family, scheme)))


def test_records_make_the_page() -> None:
    """docs/models.md is what the records give."""
    assert model_records.page() == model_records.PAGE.read_text(encoding="utf-8")
