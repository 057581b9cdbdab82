"""``--effort`` from end to end: tuned blocks are better blocks, and the file is as plain as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import halfbyte
import tiny
from conftest import Models
from halfbyte import pipeline
from halfbyte.activations import fake_quantize_activations
from halfbyte.calibration import sequences as dealt
from halfbyte.errors import UsageError
from halfbyte.methods import tuning
from halfbyte.methods.tuning import TuningOptions, samples_chosen
from halfbyte.records import Manifest, numbers_of, read_record
from halfbyte.schemes import PRESETS
from interrupted import finish, start
from test_ranks import codes_of
from test_resume import KILLED, complete, contents, stage_of, wait_for
from test_smoothing import factors_in, with_outliers

BOTH = {"tune_codes": True, "tune_norms": True}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealt, "TOKENS_PER_STEP", 80)
    monkeypatch.setattr(tuning, "HIGH", TuningOptions(steps=20, code_rate=0.002, scale_rate=0.005))


def run(source: Path, out: Path, text: Path, steps: dict[str, bool] | None = None, **options: Any) -> Manifest:
    """Quantise; with ``steps``, by a recipe that has them."""
    settings: dict[str, Any] = {"calibration": f"text:{text}", "samples": 8, "seq_len": 40, "device": "cpu"}
    settings |= {"scheme": "W4A16", "group_size": 32, "effort": "high"} | options
    if steps:
        said = {key: settings.pop(key) for key in ("scheme", "group_size", "effort")}
        settings["recipe"] = out.with_name(f"{out.name}.json")
        settings["recipe"].write_text(json.dumps({k: v for k, v in said.items() if v is not None} | {"gptq": steps}))
    return halfbyte.quantize(source, out, **settings)


def listen(monkeypatch: pytest.MonkeyPatch, heard: Any) -> None:
    """Have ``heard(linears, samples, gain)`` called with what each block is tuned by."""
    tune = pipeline.tune_block

    def looks(block: Any, linears: Any, samples: Any, *args: Any, gain: Any = None, **kwargs: Any) -> Any:
        heard(linears, samples, gain)
        return tune(block, linears, samples, *args, gain=gain, **kwargs)

    monkeypatch.setattr(pipeline, "tune_block", looks)


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


@pytest.mark.parametrize(
    ("scheme", "steps"), [("W4A16", {}), ("W8A8", {}), ("W4A8", {}), ("W2A16", {}), ("W4A16", BOTH)]
)
def test_the_recorded_loss_is_that_of_the_written_block(
    scheme: str, steps: dict[str, bool], tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    """Block 0's loss on the held-out batch, by transformers' own model with the written weights."""
    source = tiny_model("llama")
    group = None if scheme == "W8A8" else 32
    manifest = run(source, tmp_path / "out", text_file, steps, scheme=scheme, group_size=group)
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


@pytest.mark.parametrize("steps", [{}, BOTH])
@pytest.mark.parametrize("offload", [False, True])
def test_an_interrupted_run_ends_in_the_same_bytes(
    offload: bool,
    steps: dict[str, bool],
    tiny_model: Models,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny_model("llama")
    whole = run(source, tmp_path / "whole", text_file, steps)
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
        run(source, tmp_path / "cut", text_file, steps, offload=offload)
    monkeypatch.setattr(pipeline, "tune_block", tune)
    assert list((tmp_path / "cut.partial" / "state").glob("original-*.bin"))
    resumed = run(source, tmp_path / "cut", text_file, steps, offload=offload, resume=True)
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
    seen: list[Any] = []
    listen(monkeypatch, lambda linears, samples, gain: seen.append([(s.hidden(), s.target()) for s in samples]))
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [{}, {"true_sequential": False}])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "mixtral", "deepseek-v3"])
def test_channels_count_by_the_gain_of_the_norm_behind_the_block(
    family: str,
    steps: dict[str, bool],
    tiny_model: Models,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of dense blocks and of mixtures, walked stage by stage or observed at once."""
    gains: list[Any] = []
    listen(monkeypatch, lambda linears, samples, gain: gains.append(gain))
    source = tiny_model(family)
    run(source, tmp_path / "out", text_file, steps, effort="standard", dtype="float32")
    stored, offset = tiny.stored(source), float(family == "gemma3")
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(1, len(gains))] + ["model.norm.weight"]
    assert len(gains) == tiny.config_of(source)["num_hidden_layers"]
    for gain, name in zip(gains, names, strict=True):
        assert gain is not None
        torch.testing.assert_close(gain, stored[name].float() + offset, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("effort", ["standard", "high"])
def test_codes_move_where_a_recipe_says_so(
    effort: str, tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are GPTQ's but for a few, and the block is better on batches that were not tuned on."""
    monkeypatch.setattr(dealt, "TOKENS_PER_STEP", 1024)
    source = tiny_model("llama")
    settings: dict[str, Any] = {"calibration": "random-tokens", "samples": 16, "seq_len": 256, "dtype": "float32"}
    run(source, tmp_path / "gptq", text_file, effort="low", **settings)
    made = {
        name: run(source, tmp_path / name, text_file, steps, effort=effort, **settings)
        for name, steps in (("scales", {"end_to_end": False}), ("codes", {"end_to_end": False, "tune_codes": True}))
    }
    gptq, scales, codes = (codes_of(tmp_path / name) for name in ("gptq", *made))
    first = [n for n in gptq if n.startswith("model.layers.0.")]  # the next block sees other inputs
    assert all(torch.equal(gptq[n], scales[n]) for n in first)
    moved = sum(int((gptq[n] != codes[n]).sum()) for n in first)
    assert 0 < moved < 0.05 * sum(gptq[n].numel() for n in first)
    record = made["codes"].tuning[0]
    assert record.kept
    assert record.loss_after < record.loss_before == made["scales"].tuning[0].loss_before
    assert all(r.norms == [] for r in made["codes"].tuning)
    before, after = tiny.stored(source), tiny.stored(tmp_path / "codes")
    assert all(torch.equal(after[n], before[n]) for n in before if "norm" in n)
    checked = halfbyte.verify(tmp_path / "codes", source=source)
    assert checked.passed, [c for c in checked.checks if c.status == "failed"]


def test_codes_are_tuned_from_what_was_rounded(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's weights, with columns multiplied and rows divided by smoothing: each lies next to its code."""
    source = with_outliers(tmp_path / "source", "llama")
    seen: dict[str, Any] = {}
    listen(monkeypatch, lambda linears, samples, gain: seen.update(linears))
    steps = {"tune_codes": True, "end_to_end": False}
    manifest = run(source, tmp_path / "out", text_file, steps, scheme="W8A8", group_size=None)
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    expected = {name: before[f"{name}.weight"].float() for name in seen}
    assert len(expected) == 14
    assert manifest.smoothing
    assert manifest.pairs
    for smoothed in manifest.smoothing:
        for name in smoothed.linears:
            expected[name] *= before[smoothed.norm].float() / after[smoothed.norm].float()
    for pair in manifest.pairs:
        factors = factors_in(pair)
        expected[pair.source] /= factors[:, None]
        for name in pair.linears:
            channels = torch.tensor(numbers_of(pair.channels, expected[name].shape[1]))
            expected[name] *= torch.where(channels < 0, 1.0, factors[channels])
    for name, spec in seen.items():
        torch.testing.assert_close(spec.weight, expected[name], rtol=1e-5, atol=1e-7)
        apart = spec.weight / spec.quantized.scales.float() - spec.quantized.codes
        assert float(apart.abs().median()) < 0.5, name


def norms_in(record: Any) -> list[str]:
    return [name for tuned in record.tuning for name in tuned.norms]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_norms_move_where_a_recipe_says_so(family: str, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, out = tiny_model(family), tmp_path / "out"
    manifest = run(source, out, text_file, {"tune_norms": True, "end_to_end": False}, samples=24)
    before, after = tiny.stored(source), tiny.stored(out)
    tuned = norms_in(manifest)
    assert manifest.tuning[0].kept
    for record in manifest.tuning:
        of_block = {n for n in before if n.startswith(f"model.layers.{record.block}.") and "norm" in n}
        assert set(record.norms) == (of_block if record.kept else set())
    assert {n for n in before if n in after and not torch.equal(before[n], after[n])} == set(tuned)
    assert all(after[n].dtype == before[n].dtype for n in tuned)
    checked = halfbyte.verify(out, source=source)
    assert checked.passed, [c for c in checked.checks if c.status == "failed"]
    (copies,) = [c for c in checked.checks if c.name == "copies"]
    assert copies.detail.endswith(f"; {len(tuned)} tuned norms are not")

    # A norm that is further from the source's than tuning goes, and norms that nothing is said of.
    save_file(after | {tuned[0]: 2 * after[tuned[0]]}, out / "model.safetensors", metadata={"format": "pt"})
    (problem,) = copy_problems(out, source)
    assert problem.startswith(f"{tuned[0]} is recorded as tuned, which does not move it by ")
    save_file(after, out / "model.safetensors", metadata={"format": "pt"})
    plain = json.loads((out / "halfbyte.json").read_text())
    for entry in plain["tuning"]:
        entry["norms"] = []
    (out / "halfbyte.json").write_text(json.dumps(plain))
    assert sorted(p.split(" ")[0] for p in copy_problems(out, source)) == sorted(tuned)


def copy_problems(out: Path, source: Path) -> list[str]:
    checks = halfbyte.verify(out, source=source, reload=False).checks
    return next(c.problems for c in checks if c.name == "copies")


def test_smoothed_norms_stay_as_they_are(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_outliers(tmp_path / "source", "qwen3")
    offered: set[str] = set()
    tune = pipeline.tune_block

    def looks(*args: Any, vectors: Any, **kwargs: Any) -> Any:
        offered.update(vectors)
        return tune(*args, vectors=vectors, **kwargs)

    monkeypatch.setattr(pipeline, "tune_block", looks)
    steps = {"tune_norms": True, "end_to_end": False}
    manifest = run(source, tmp_path / "out", text_file, steps, scheme="W8A8", group_size=None)
    smoothed = {r.norm for r in manifest.smoothing}
    assert smoothed
    norms = {n for n in tiny.stored(source) if n.startswith("model.layers.") and "norm" in n}
    assert offered == norms - smoothed
    assert any("q_norm" in n for n in offered)
    assert set(norms_in(manifest)) <= offered
    assert halfbyte.verify(tmp_path / "out", source=source).passed


def test_the_next_block_sees_tuned_codes_and_norms(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("llama")
    seen: list[Any] = []
    listen(monkeypatch, lambda linears, samples, gain: seen.append([s.hidden().clone() for s in samples[:4]]))
    manifest = run(source, tmp_path / "out", text_file, BOTH | {"end_to_end": False}, samples=24, dtype="float32")
    assert manifest.tuning[0].norms
    model = tiny.load(source)
    dense = {n: w for n, w in tiny.decoded(tmp_path / "out").items() if n.startswith("model.layers.0.")}
    model.load_state_dict(dense, strict=False)
    with torch.no_grad():
        hidden = model(tiny.windows(source, 8), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(torch.cat(seen[1]), hidden, rtol=1e-4, atol=1e-5)


def test_a_killed_run_ends_in_the_same_codes_and_norms(tiny_model: Models, tmp_path: Path) -> None:
    source, out, recipe = tiny_model("llama", num_hidden_layers=4), tmp_path / "out", tmp_path / "r.json"
    recipe.write_text(json.dumps({"scheme": "W4A16", "group_size": 32, "gptq": BOTH}))
    options: dict[str, Any] = {"recipe": recipe, "calibration": "random-tokens", "samples": 16, "seq_len": 256}
    assert finish(start(source, tmp_path / "whole", **options)) == 0
    assert norms_in(read_record(Manifest, tmp_path / "whole" / "halfbyte.json"))
    for stage in (1, 2):
        process = start(source, out, resume=stage > 1, **options)
        wait_for(lambda stage=stage: stage_of(out) >= stage, process)
        process.kill()
        assert finish(process) == KILLED
    complete(source, out, options)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_not_smoothed_is_noted(tiny_model: Models, tmp_path: Path) -> None:
    recipe = tmp_path / "r.json"
    words = "nothing is smoothed: true_sequential = false in the recipe observes all inputs of a block at once"
    for scheme, steps, noted in (
        ("W8A8", {"true_sequential": False}, True),
        ("W8A8", {"true_sequential": False, "smoothing": False}, False),
        ("W8A8", {}, False),
        ("W8A16", {"true_sequential": False}, False),
    ):
        size = {} if scheme == "W8A8" else {"group_size": 32}
        recipe.write_text(json.dumps({"scheme": scheme, "gptq": steps} | size))
        made = halfbyte.plan(tiny_model("llama"), recipe=recipe, calibration="random-tokens")
        assert (words in made.notes) is noted


def test_what_is_not_tuned_is_noted(tiny_model: Models, tmp_path: Path) -> None:
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"scheme": "W4A16", "group_size": 32, "gptq": BOTH}))
    words = "tune_codes and tune_norms in the recipe change nothing, because blocks are not tuned"
    options: dict[str, Any] = {"recipe": recipe, "calibration": "random-tokens"}
    assert words in halfbyte.plan(tiny_model("llama"), effort="low", **options).notes
    assert words not in halfbyte.plan(tiny_model("llama"), **options).notes
