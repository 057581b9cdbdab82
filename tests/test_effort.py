"""``--effort high`` from end to end: tuned blocks are better blocks, and the file is as plain as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
import tiny
from conftest import Models
from halfbyte import pipeline
from halfbyte.activations import fake_quantize_activations
from halfbyte.errors import UsageError
from halfbyte.methods import tuning
from halfbyte.methods.tuning import TuningOptions, samples_chosen
from halfbyte.records import Manifest
from halfbyte.schemes import PRESETS


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "TOKENS_PER_BATCH", 80)
    monkeypatch.setattr(tuning, "HIGH", TuningOptions(steps=20, code_rate=0.0, scale_rate=0.005))


def run(source: Path, out: Path, text: Path, **options: Any) -> Manifest:
    settings: dict[str, Any] = {"calibration": f"text:{text}", "samples": 8, "seq_len": 40, "device": "cpu"}
    return halfbyte.quantize(
        source, out, **(settings | {"scheme": "W4A16", "group_size": 32, "effort": "high"} | options)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_blocks_are_tuned_and_verify(family: str, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source = tiny_model(family)
    manifest = run(source, tmp_path / "high", text_file, samples=24)  # with fewer, unseen ones do not gain
    assert [r.block for r in manifest.tuning] == [0, 1]
    assert any(r.kept for r in manifest.tuning)
    assert all(r.kept == (r.loss_after < r.loss_before) for r in manifest.tuning)
    assert manifest.recipe["effort"] == "high"
    checked = halfbyte.verify(tmp_path / "high", source=source)
    assert checked.passed, [c for c in checked.checks if c.status == "failed"]
    low = run(source, tmp_path / "low", text_file, samples=24, effort="low")
    assert low.tuning == []
    before, after = tiny.stored(tmp_path / "low"), tiny.stored(tmp_path / "high")
    assert [(n, t.shape, t.dtype) for n, t in before.items()] == [(n, t.shape, t.dtype) for n, t in after.items()]


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "W4A8", "W2A16"])
def test_the_recorded_loss_is_that_of_the_written_block(
    scheme: str, tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    """Block 0's loss on the held-out batch, by transformers' own model with the written weights."""
    source = tiny_model("llama")
    group = None if scheme == "W8A8" else 32
    manifest = run(source, tmp_path / "out", text_file, scheme=scheme, group_size=group)
    dense = tiny.decoded(tmp_path / "out")
    ids = tiny.windows(source, 8)
    outputs = []
    for weights in (None, {n: w for n, w in dense.items() if n.startswith("model.layers.0.")}):
        model = tiny.load(source)
        if weights is not None:
            model.load_state_dict(weights, strict=False)
            activations = PRESETS[scheme].activations
            if activations is not None:
                for module in model.model.layers[0].modules():
                    if isinstance(module, torch.nn.Linear):
                        module.register_forward_pre_hook(
                            lambda _, a, fmt=activations: (fake_quantize_activations(a[0], fmt),)
                        )
        with torch.no_grad():
            outputs.append(model(ids, output_hidden_states=True).hidden_states[1])
    gain = tiny.stored(source)["model.layers.1.input_layernorm.weight"].float()
    shares = ((outputs[1] - outputs[0]) * gain).square().sum(-1) / outputs[0].square().sum(-1)
    batches = shares.reshape(4, -1).mean(1)  # two sequences in each of four batches
    wanted = manifest.tuning[0].loss_after if manifest.tuning[0].kept else manifest.tuning[0].loss_before
    assert min(abs(float(b) / wanted - 1) for b in batches) < 2e-2


@pytest.mark.parametrize("offload", [False, True])
def test_an_interrupted_run_ends_in_the_same_bytes(
    offload: bool, tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("llama")
    whole = run(source, tmp_path / "whole", text_file)
    tune = pipeline.tune_block
    calls = 0

    def dies_in_the_second(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return tune(*args, **kwargs)

    monkeypatch.setattr(pipeline, "tune_block", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", text_file, offload=offload)
    monkeypatch.setattr(pipeline, "tune_block", tune)
    assert list((tmp_path / "cut.partial" / "state").glob("original-*.bin"))
    resumed = run(source, tmp_path / "cut", text_file, offload=offload, resume=True)
    assert resumed.files == whole.files
    assert resumed.tuning == whole.tuning


def test_rounding_cannot_be_tuned(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="effort high tunes what GPTQ has found"):
        halfbyte.quantize(tiny_model("llama"), tmp_path / "out", scheme="FP8_DYNAMIC", effort="high")
    recipe = tmp_path / "r.toml"
    recipe.write_text('scheme = "W4A16"\nmethod = "rtn"\neffort = "high"\n')
    with pytest.raises(halfbyte.errors.RecipeError, match=r"r\.toml, line 3: effort high"):
        halfbyte.quantize(tiny_model("llama"), tmp_path / "out", recipe=recipe)


def test_a_recipe_can_ask_for_it(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('scheme = "W4A16"\ngroup_size = 32\neffort = "high"\n')
    options: dict[str, Any] = {"scheme": "W4A16", "group_size": None, "effort": None, "recipe": recipe}
    manifest = run(tiny_model("llama"), tmp_path / "out", text_file, **options)
    assert len(manifest.tuning) == 2
    assert run(tiny_model("llama"), tmp_path / "plain", text_file, **(options | {"effort": "low"})).tuning == []


@pytest.mark.parametrize(
    ("scheme", "effort", "tuned"),
    [
        ("W4A16", None, True),
        ("W4A16", "standard", True),
        ("W4A16", "low", False),
        ("W8A8", None, False),
        ("W8A8", "high", True),
    ],
)
def test_what_is_tuned(
    scheme: str, effort: str | None, tuned: bool, tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    group = 32 if scheme == "W4A16" else None
    manifest = run(
        tiny_model("llama"), tmp_path / "out", text_file, scheme=scheme, group_size=group, effort=effort, samples=3
    )
    assert bool(manifest.tuning) == tuned
    made = halfbyte.plan(tiny_model("llama"), scheme=scheme, effort=effort, calibration="random-tokens")  # type: ignore[arg-type]
    assert ("tuning" in made.estimates["time"].parts) == tuned


def test_a_short_tuning_looks_at_some_batches_only(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps need three of six batches to learn from and one to judge by: so many are kept in both models."""
    options = TuningOptions(steps=3, held_out=4)
    assert [samples_chosen(options, n) for n in (1, 3, 4, 6, 20)] == [
        [0],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 3, 4],
        [0, 5, 10, 15],
    ]
    monkeypatch.setattr(tuning, "STANDARD", options)
    seen = []
    tune = pipeline.tune_block

    def looks(block: Any, linears: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([(s.hidden(), s.target()) for s in samples])
        return tune(block, linears, samples, *args, **kwargs)

    monkeypatch.setattr(pipeline, "tune_block", looks)
    source = tiny_model("llama")
    run(source, tmp_path / "out", text_file, samples=12, effort="standard", dtype="float32")
    ids = tiny.windows(source, 12)
    model = tiny.load(source)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for batch, (hidden, target) in zip((0, 1, 3, 4), seen[0], strict=True):
        rows = slice(2 * batch, 2 * batch + 2)
        assert torch.equal(hidden, states[0][rows])
        assert torch.allclose(target, states[1][rows], atol=1e-5)
