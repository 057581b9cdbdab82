"""All scales tuned together against the original model's predictions: the gradient, the verdict, kills, the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halfbyte
import tiny
from conftest import Models
from halfbyte import end_to_end, pipeline, planner
from halfbyte.activations import fake_quantize_activations
from halfbyte.calibration import sequences as dealt
from halfbyte.checkpoint.layout import Layout
from halfbyte.end_to_end import EndToEnd
from halfbyte.methods import tuning
from halfbyte.methods.tuned_parts import LinearState
from halfbyte.methods.tuning import EndToEndOptions, TuningOptions, schedule, split_numbers
from halfbyte.records import Manifest
from halfbyte.schemes import PRESETS

STEPS = 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences in a batch; a step of two batches, of which logits are looked at a few rows at a time."""
    monkeypatch.setattr(dealt, "TOKENS_PER_STEP", 80)
    monkeypatch.setattr(tuning, "HIGH", TuningOptions(steps=8))  # which look at all batches
    options = EndToEndOptions(steps=STEPS, batches_per_step=2, scale_rate=1e-2, held_out=4, chunk_bytes=60_000)
    monkeypatch.setattr(planner, "end_to_end_of", lambda recipe, _: options if recipe.gptq.end_to_end else None)


def run(source: Path, out: Path, text: Path, **options: Any) -> Manifest:
    settings: dict[str, Any] = {"calibration": f"text:{text}", "samples": 16, "seq_len": 40, "device": "cpu"}
    settings |= {"scheme": "W4A16", "group_size": 32, "effort": "high", "dtype": "float32"}
    return halfbyte.quantize(source, out, **(settings | options))


def divergence(source: Path, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, scheme: str) -> torch.Tensor:
    """D by transformers' own model, of the sequences given; differentiable by the weights."""
    original, model = tiny.load(source), tiny.load(source)
    activations = PRESETS[scheme].activations
    modules = dict(model.named_modules())
    if activations is not None:
        for name in (n for n in weights if "_proj" in n):
            modules[name.removesuffix(".weight")].register_forward_pre_hook(
                lambda _, a, fmt=activations: (a[0] + (fake_quantize_activations(a[0], fmt) - a[0]).detach(),)
            )
    with torch.no_grad():
        p = torch.log_softmax(original(ids).logits.double(), -1)
    q = torch.log_softmax(torch.func.functional_call(model, dict(weights), (ids,)).logits.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "W4A16"), ("gemma3", "W4A16"), ("llama", "W4A8"), ("llama", "W8A8")]
)
def test_gradients_are_those_of_the_whole_model(
    family: str, scheme: str, tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first step, block by block from the last to the first, against autograd through all of transformers."""
    source, found = tiny_model(family), {}

    def note(self: EndToEnd, parts: Mapping[str, tuple[LinearState, Any, Any]], index: int, step: int) -> None:
        found.update({n: (s.spec.quantized, s.ratio.grad) for n, (s, *_) in parts.items()})
        if index == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(EndToEnd, "_update", note)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text_file, scheme=scheme, group_size=None if scheme == "W8A8" else 32)
    taught, _ = split_numbers(8, 4)
    batches = schedule(taught, STEPS * 2, 0)[:2]
    ids = tiny.windows(source, 16)[[2 * b + i for b in batches for i in (0, 1)]]
    ratios = {n: torch.zeros_like(q.scales, dtype=torch.float32, requires_grad=True) for n, (q, _) in found.items()}
    weights = {}
    for name, (quantized, _) in found.items():
        width = quantized.codes.shape[1] // quantized.scales.shape[1]
        spread = (1 + ratios[name]).repeat_interleave(width, dim=1)
        weights[f"{name}.weight"] = quantized.dense() * spread
    assert len(weights) == 14
    stored = {n: t.float() for n, t in tiny.stored(tmp_path / "out.partial/checkpoint").items() if "norm" in n}
    divergence(source, weights | stored, ids, scheme).backward()
    positions = ids.numel()
    for name, (_, gradient) in found.items():
        expected = ratios[name].grad
        assert expected is not None
        assert gradient is not None
        difference = (gradient / positions - expected).norm() / expected.norm()
        assert float(difference) < 1e-3, (name, float(difference))


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16", "W4A8", "W8A8"])
def test_the_verdict_is_about_predictions_that_were_not_tuned_on(
    scheme: str, tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    group = None if scheme == "W8A8" else 32
    manifest = run(source, tmp_path / "out", text_file, scheme=scheme, group_size=group)
    made = manifest.end_to_end
    assert made is not None
    assert made.steps == STEPS
    assert made.kept == (made.kl_after < made.kl_before)
    _, judges = split_numbers(8, 4)
    ids = tiny.windows(source, 16)[[2 * b + i for b in judges for i in (0, 1)]]
    dense = {n: t for n, t in tiny.decoded(tmp_path / "out").items() if "_proj" in n or "norm" in n}
    with torch.no_grad():
        written = float(divergence(source, dense, ids, scheme))
    assert written == pytest.approx(min(made.kl_after, made.kl_before), rel=2e-3)
    without = tmp_path / "without.toml"
    size = f"group_size = {group}\n" if group else ""
    without.write_text(f'scheme = "{scheme}"\n{size}effort = "high"\n[gptq]\nend_to_end = false\n')
    plain = run(source, tmp_path / "plain", text_file, recipe=without, scheme="W4A16", group_size=None, effort=None)
    assert plain.end_to_end is None
    with torch.no_grad():
        before = {n: t for n, t in tiny.decoded(tmp_path / "plain").items() if "_proj" in n or "norm" in n}
        assert float(divergence(source, before, ids, scheme)) == pytest.approx(made.kl_before, rel=2e-3)
    same = {n for n, t in tiny.stored(tmp_path / "out").items() if torch.equal(t, tiny.stored(tmp_path / "plain")[n])}
    changed = {n for n in tiny.stored(tmp_path / "out") if n not in same}
    assert all(n.endswith(".weight_scale") for n in changed)
    assert bool(changed) == made.kept
    assert halfbyte.verify(tmp_path / "out", source=source).passed


def test_at_two_bits_it_gains(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    made = run(tiny_model("llama"), tmp_path / "out", text_file, scheme="W2A16").end_to_end
    assert made is not None
    assert made.kept


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("where", ["first verdict", "a step", "between blocks", "last verdict", "writing", "manifest"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    where: str, offload: bool, tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("llama")
    options: dict[str, Any] = {"scheme": "W2A16"}
    whole = run(source, tmp_path / "whole", text_file, **options)
    assert whole.end_to_end is not None
    assert whole.end_to_end.kept, "nothing is written, so nothing is shown"
    owner, name, last = {
        "first verdict": (EndToEnd, "_divergence", 1),
        "a step": (EndToEnd, "_step", 3),
        "between blocks": (EndToEnd, "_update", 4),
        "last verdict": (EndToEnd, "_divergence", 2),
        "writing": (EndToEnd, "scales", 2),
        "manifest": (pipeline, "finish_checkpoint", 1),
    }[where]
    calls, real = 0, getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "cut", text_file, offload=offload, **options)
    journal = json.loads((tmp_path / "cut.partial/state/journal.json").read_text())
    assert journal["stage"] == 2
    assert journal.get("end_to_end", {}).get("step", 0) == (
        {"first verdict": 0, "a step": 2, "between blocks": 1}.get(where, STEPS)
    )
    resumed = run(source, tmp_path / "cut", text_file, offload=offload, resume=True, **options)
    assert resumed.files == whole.files
    assert resumed.end_to_end == whole.end_to_end
    assert (tmp_path / "cut/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()


def test_one_step_s_files_make_room_for_the_next_s(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, seen = tmp_path / "out.partial/state", []
    real = EndToEnd._record

    def look(self: EndToEnd, known: Mapping[str, Any]) -> None:
        seen.append(sorted({p.name.split("-")[0] for p in state.glob("*-*")}))
        assert len(list(state.glob("scales-*"))) <= 2 * 2
        assert not list(state.glob("step-*")), "what a step was made of goes with it"
        real(self, known)

    monkeypatch.setattr(EndToEnd, "_record", look)
    run(tiny_model("llama"), tmp_path / "out", text_file)
    assert len(seen) == STEPS + 2
    assert not state.exists()


def test_low_memory_is_kept_to(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block's weights at a time, in both directions, and neither head beside one."""
    from halfbyte.blocks import StreamedModel

    loaded: list[str] = []

    def most(self: EndToEnd) -> None:
        at_once = {
            name.split(".")[2] if name.startswith("model.layers.") else name
            for name, p in self.model.model.named_parameters()
            if not p.is_meta
        }
        loaded.append(",".join(sorted(n for n in at_once if n.isdigit() or "head" in n)))

    run_block, logits = end_to_end.run_block, StreamedModel.logits
    work: list[EndToEnd] = []
    real = EndToEnd.tune
    monkeypatch.setattr(EndToEnd, "tune", lambda self: (work.append(self), real(self))[1])
    monkeypatch.setattr(end_to_end, "run_block", lambda *a: (most(work[0]), run_block(*a))[1])
    monkeypatch.setattr(StreamedModel, "logits", lambda *a, **k: (most(work[0]), logits(*a, **k))[1])
    run(tiny_model("llama"), tmp_path / "out", text_file)
    assert set(loaded) == {"0", "1", "lm_head.weight"}


def test_a_full_disk_is_told(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = run(tiny_model("llama"), tmp_path / "whole", text_file)
    with monkeypatch.context() as patched:
        patched.setattr(end_to_end, "save_file", full)
        with pytest.raises(halfbyte.errors.OutputError, match=r"the disk is full.*--resume.* after 2 finished blocks"):
            run(tiny_model("llama"), tmp_path / "cut", text_file)
    assert run(tiny_model("llama"), tmp_path / "cut", text_file, resume=True).files == whole.files


def test_order_of_batches() -> None:
    numbers = [3, 5, 9]
    order = schedule(numbers, 8, seed=1)
    assert len(order) == 8
    assert sorted(order[:3]) == sorted(order[3:6]) == numbers
    assert order == schedule(numbers, 8, seed=1) != schedule(numbers, 8, seed=2)


def test_the_scales_that_are_kept_are_those_of_the_file(
    tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last step leaves, rounded to the dtype of the file and positive, is what is written."""
    written: dict[str, torch.Tensor] = {}
    real = Layout.write

    def note(self: Layout, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        if all(n.endswith("_scale") for n in tensors):
            for file in sorted((folder.parent / "state").glob(f"scales-*-{STEPS:04d}.safetensors")):
                for name, value in load_file(file).items():
                    if name.endswith(".ratio"):
                        start = load_file(file)[name.replace(".ratio", ".start")].float()
                        written[name.replace(".ratio", ".weight_scale")] = start * (1 + value)
        real(self, folder, tensors)

    monkeypatch.setattr(Layout, "write", note)
    manifest = run(tiny_model("llama"), tmp_path / "out", text_file, scheme="W2A16")
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.kept
    stored = tiny.stored(tmp_path / "out")
    assert len(written) == 14
    for name, value in written.items():
        assert torch.equal(stored[name], value.to(stored[name].dtype)), name
        assert bool((stored[name].float() > 0).all())


@pytest.mark.parametrize("estimate", ["time", "disk"])
def test_the_plan_knows_of_it(estimate: str, tiny_model: Models, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    parts = []
    for wanted in ("true", "false"):
        recipe.write_text(f'scheme = "W4A16"\ngroup_size = 32\neffort = "high"\n[gptq]\nend_to_end = {wanted}\n')
        made = halfbyte.plan(tiny_model("llama"), recipe=recipe, calibration="random-tokens")
        parts.append(made.estimates[estimate].parts)
    (extra,) = parts[0].keys() - parts[1].keys()
    assert "together" in extra
    assert parts[0][extra] > 0
