"""The verifier on mixtures of experts: sound ones of each kind, and such as were spoilt one way each."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny
from attacks.checkpoints import Pair, Shard, edit_config
from attacks.mixtures import build, packed, unstacked
from halfbyte.records import Check, VerifyRecord
from halfbyte.reference import read_header
from halfbyte.verifier import verify
from halfbyte.verifier_experts import fused_of, numbers_in, place_of
from halfbyte.verifier_fused import fill
from halfbyte.verifier_layout import QuantizedModule
from halfbyte.verifier_models import predictors
from halfbyte.verifier_stacks import stacks_of

FILE = "model.safetensors"
INT8 = "has no loader for int8 experts"
STACKED = "knows the experts of this architecture in one stack only"
MIXTRAL, LLAMA4 = "model.layers.0.block_sparse_moe.experts", "model.layers.1.feed_forward.experts"
GRANITE, QWEN3 = "model.layers.1.block_sparse_moe.experts", "model.layers.1.mlp.experts"

Made = Callable[..., Pair]


def outcome(record: VerifyRecord, name: str) -> Check:
    (check,) = [c for c in record.checks if c.name == name]
    return check


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Sound pairs, each made once."""

    @functools.cache
    def make(family: str, scheme: str = "W4A16", **options: Any) -> Pair:
        return build(tmp_path_factory.mktemp(family), family, scheme, **options)

    return make


@pytest.fixture
def pair(made: Made, tmp_path: Path) -> Made:
    """A copy to spoil."""

    def copy(*names: str, **options: Any) -> Pair:
        sound = made(*names, **options)
        shutil.copytree(sound.quantized, tmp_path / "quantized")
        return Pair(sound.source, tmp_path / "quantized")

    return copy


@pytest.mark.parametrize(
    ("family", "scheme", "lacks"),
    [
        ("mixtral", "W4A16", ""),
        ("mixtral", "W8A8", INT8),
        ("mixtral", "FP8_DYNAMIC", ""),
        ("mixtral", "W4A16_ASYM", "leaves out the zero points of experts"),
        ("deepseek-v3", "W4A16", ""),
        ("deepseek-v2", "W8A8", INT8),
        ("llama4-text", "W4A16", ""),
        ("llama4-text", "W8A8", ""),
        ("llama4", "W8A8", ""),
        ("granite-moe", "W4A16", STACKED),
        ("granite-moe-shared", "W8A8", STACKED),
        ("qwen3-vl-moe", "W4A16", STACKED),
        ("phimoe", "W8A8", INT8),
    ],
)
def test_a_sound_mixture_passes_every_check(made: Made, family: str, scheme: str, lacks: str) -> None:
    """What transformers cannot load is said in ``reload``, and compared all the same."""
    p = made(family, scheme)
    record = verify(p.quantized, source=p.source, reload=True)
    others = {c.name: (c.status, c.problems) for c in record.checks if c.status != "passed"}
    assert others == ({"reload": ("skipped", [])} if lacks else {})
    reload = outcome(record, "reload").detail
    assert lacks in reload
    assert ("vLLM reads them one by one" in reload) == bool(lacks)
    assert ("as compressed-tensors decodes them" in outcome(record, "weights").detail) == bool(lacks)
    assert outcome(record, "logits").detail.endswith("relative difference 0 (limit 0.001), largest 0")


def test_what_is_said_of_stacks(made: Made) -> None:
    p = made("qwen3-vl-moe", "W4A16")
    copies = outcome(verify(p.quantized, source=p.source, reload=False), "copies").detail
    assert "4 stacks of experts became 24 Linears, transposed: 4" in copies
    p = made("granite-moe", "W4A16")
    copies = outcome(verify(p.quantized, source=p.source, reload=False), "copies").detail
    assert copies.endswith("4 stacks of experts became 24 Linears")


def test_what_is_said_of_layers_behind_the_last(made: Made) -> None:
    p = made("deepseek-v3", "W4A16")
    detail = outcome(verify(p.quantized, reload=True), "reload").detail
    assert "does not read 22 tensors of layers behind the last (multi-token prediction)" in detail


def test_layers_of_experts_by_different_schemes(made: Made) -> None:
    """transformers decodes all experts by one group: that is no fault of the checkpoint."""
    p = made("qwen3-moe", "W4A16", wider=r".*layers\.1\.mlp\.experts\..*")
    record = verify(p.quantized, source=p.source, reload=True)
    assert record.passed, [c for c in record.checks if c.problems]
    assert "decodes all experts by one config group" in outcome(record, "reload").detail
    assert outcome(record, "weights").status == outcome(record, "logits").status == "passed"


def test_a_stack_that_was_kept_is_compared_byte_for_byte(pair: Made) -> None:
    p = pair("llama4-text", stays=r".*\.experts\..*")
    shard = Shard(p.quantized / FILE)
    kept = {n: t for n, t in shard.tensors().items() if ".experts." not in n}
    stacks = {n: t for n, t in tiny.stored(p.source).items() if ".experts." in n}
    save_file(kept | stacks, p.quantized / FILE)
    (p.quantized / FILE).chmod(0o644)
    record = verify(p.quantized, source=p.source, reload=True)
    assert outcome(record, "copies").status == "passed"
    assert "stacks" not in outcome(record, "copies").detail
    shard.flip(f"{LLAMA4}.down_proj", at=77)
    problems = outcome(verify(p.quantized, source=p.source, reload=False), "copies").problems
    assert problems == [
        f"{LLAMA4}.down_proj differs from the source from byte 77 of {stacks[f'{LLAMA4}.down_proj'].nbytes} on"
    ]


def test_experts_that_were_only_taken_apart_are_compared_with_the_stack(pair: Made) -> None:
    """Dense matrices of single experts, transposed in the source's stack."""
    p = pair("llama4-text", stays=r".*\.experts\..*")
    assert outcome(verify(p.quantized, source=p.source, reload=False), "copies").status == "passed"
    Shard(p.quantized / FILE).flip(f"{LLAMA4}.2.up_proj.weight", at=1001)
    problems = outcome(verify(p.quantized, source=p.source, reload=False), "copies").problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{LLAMA4}.2.up_proj.weight differs from the source from byte 1001 of ")


# Attacks. Each spoils a sound checkpoint; the named check must fail and name the culprit.
def _drop(*names: str) -> Callable[[Path], None]:
    """Drop all tensors whose names start so."""

    def attack(folder: Path) -> None:
        shard = Shard(folder / FILE)
        dropped = {n: None for n in shard.tensors() if n.startswith(names)}
        assert dropped
        shard.replace(**dropped)

    return attack


def _swap(first: str, second: str) -> Callable[[Path], None]:
    """Give two modules each other's tensors."""

    def attack(folder: Path) -> None:
        shard = Shard(folder / FILE)
        tensors = shard.tensors()
        changes = {}
        for one, other in ((first, second), (second, first)):
            changes |= {n.replace(f"{one}.", f"{other}."): t for n, t in tensors.items() if n.startswith(f"{one}.")}
        assert changes
        shard.replace(**changes)

    return attack


def _add(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: Shard(folder / FILE).replace(**tensors)


def _dense(module: str, *shape: int) -> Callable[[Path], None]:
    """One Linear dense, and ignored."""

    def attack(folder: Path) -> None:
        _drop(f"{module}.")(folder)
        _add(**{f"{module}.weight": torch.zeros(shape, dtype=torch.bfloat16)})(folder)
        edit_config(folder, lambda c: c["quantization_config"]["ignore"].append(module))

    return attack


@pytest.mark.parametrize(
    ("family", "attack", "check", "named"),
    [
        ("mixtral", _drop(f"{MIXTRAL}.2.w1.weight_scale"), "linears", f"{MIXTRAL}.2.w1.weight_scale is missing"),
        ("mixtral", _drop(f"{MIXTRAL}.2.w1."), "linears", f"{MIXTRAL}: experts lack Linears that others have: 2.w1"),
        ("mixtral", _drop(f"{MIXTRAL}.2.w1."), "copies", f"{MIXTRAL}.2.w1.weight of the source is lost"),
        ("mixtral", _drop(f"{MIXTRAL}.3."), "linears", f"{MIXTRAL}: 1 of 4 experts are missing: 3"),
        ("mixtral", _swap(f"{MIXTRAL}.0.w1", f"{MIXTRAL}.0.w3"), "error", f"{MIXTRAL}.0.w3 has relative error 1.4"),
        ("mixtral", _swap(f"{MIXTRAL}.0.w2", f"{MIXTRAL}.1.w2"), "error", f"{MIXTRAL}.1.w2 has relative error 1.4"),
        (
            "mixtral",
            _dense(f"{MIXTRAL}.1.w1", 64, 128),
            "config",
            f"{MIXTRAL}: engines read all experts of a layer by one",
        ),
        ("granite-moe", _drop(f"{GRANITE}.1.up_proj."), "copies", f"such as {GRANITE}.1.up_proj.weight"),
        ("granite-moe", _drop(f"{GRANITE}.3."), "linears", f"{GRANITE}: 1 of 4 experts are missing: 3"),
        ("granite-moe", _swap(f"{GRANITE}.2.gate_proj", f"{GRANITE}.2.up_proj"), "error", f"{GRANITE}.2.up_proj has"),
        ("llama4-text", _drop(f"{LLAMA4}.0.down_proj."), "copies", f"{LLAMA4}.down_proj of the source is lost in part"),
        ("llama4-text", _drop(f"{LLAMA4}."), "copies", f"{LLAMA4}.gate_up_proj of the source is lost"),
        ("llama4-text", _swap(f"{LLAMA4}.0.up_proj", f"{LLAMA4}.3.up_proj"), "error", f"{LLAMA4}.3.up_proj has"),
        ("llama4-text", _swap(f"{LLAMA4}.0.up_proj", f"{LLAMA4}.0.gate_proj"), "error", f"{LLAMA4}.0.gate_proj has"),
        (
            "llama4-text",
            _add(**{f"{LLAMA4}.down_proj": torch.zeros(4, 192, 128, dtype=torch.bfloat16)}),
            "copies",
            f"{LLAMA4}.down_proj is there whole and as 4 Linears of experts too",
        ),
    ],
)
def test_a_spoilt_mixture_fails_and_names_the_culprit(
    pair: Made, family: str, attack: Callable[[Path], None], check: str, named: str
) -> None:
    p = pair(family)
    attack(p.quantized)
    record = verify(p.quantized, source=p.source, reload=False)
    failed = outcome(record, check)
    assert failed.status == "failed"
    assert any(named in problem for problem in failed.problems), failed.problems


def test_an_expert_too_many(pair: Made) -> None:
    p = pair("granite-moe")
    tensors = Shard(p.quantized / FILE).tensors()
    more = {n.replace(f"{GRANITE}.0.", f"{GRANITE}.4."): t for n, t in tensors.items() if n.startswith(f"{GRANITE}.0.")}
    _add(**more)(p.quantized)
    record = verify(p.quantized, source=p.source, reload=False)
    assert f"{GRANITE}: the model has 4 experts, and there are more: 4" in outcome(record, "linears").problems
    named = f"{GRANITE}.4.up_proj.weight is quantised, but the source has no such tensor"
    assert named in outcome(record, "copies").problems


def test_square_matrices_do_not_hide_a_transposition(made: Made, tmp_path: Path) -> None:
    """down is square here; that it lies [in, out] in the source is told by gate and up."""
    sound = made("llama4-text", "W8A8", intermediate_size=128)
    assert verify(sound.quantized, source=sound.source, reload=True).passed
    shutil.copytree(sound.quantized, tmp_path / "quantized")
    config = tiny.config_of(sound.quantized)["quantization_config"]
    dense = unstacked(tiny.stored(sound.source), transposed=True)
    names = [f"{LLAMA4}.{e}.down_proj" for e in range(4)]
    turned = [packed(n, dense[f"{n}.weight"].T.contiguous(), config) for n in names]
    _add(**{n: t for module in turned for n, t in module.items()})(tmp_path / "quantized")
    problems = outcome(verify(tmp_path / "quantized", source=sound.source, reload=False), "error").problems
    assert [x.partition(" has relative error 1.4")[0] for x in problems] == names


def test_attention_that_engines_fuse_must_agree(made: Made) -> None:
    p = made("deepseek-v2", "W4A16", wider=r".*layers\.1\.self_attn\.q_a_proj")
    problems = outcome(verify(p.quantized, source=p.source, reload=False), "config").problems
    named = "model.layers.1.self_attn: engines fuse q_a_proj/kv_a_proj_with_mqa, which must agree"
    assert [x for x in problems if x.startswith(named)] == problems != []


def test_an_ignore_entry_for_names_on_disk_alone(made: Made) -> None:
    """Phi's router is ``block_sparse_moe.gate`` on disk and ``mlp.router`` in transformers."""
    p = made("phimoe", "W4A16", ignore=("lm_head", r"re:.*block_sparse_moe\.gate$"))
    problems = outcome(verify(p.quantized, source=p.source, reload=False), "config").problems
    named = "mlp.router is not quantised, but transformers takes it to be: no ignore entry covers it"
    assert problems == [f"model.layers.{i}.{named}" for i in range(2)]


class TestWhatTransformersCannotLoad:
    """Only the experts are excused."""

    @pytest.mark.parametrize(("family", "scheme"), [("mixtral", "W8A8"), ("granite-moe", "W4A16")])
    def test_a_missing_tensor_elsewhere(self, pair: Made, family: str, scheme: str) -> None:
        p = pair(family, scheme)
        _drop("model.norm.weight")(p.quantized)
        check = outcome(verify(p.quantized, reload=True), "reload")
        assert (check.status, check.problems[0]) == ("failed", "missing key model.norm.weight")

    @pytest.mark.parametrize(("family", "scheme"), [("mixtral", "W8A8"), ("qwen3-vl-moe", "W4A16")])
    def test_an_unexpected_tensor(self, pair: Made, family: str, scheme: str) -> None:
        p = pair(family, scheme)
        _add(**{"model.extra.weight": torch.zeros(3)})(p.quantized)
        check = outcome(verify(p.quantized, reload=True), "reload")
        assert check.status == "failed"
        assert [x for x in check.problems if x.startswith("unexpected key") and "extra.weight" in x]

    @pytest.mark.parametrize(("family", "scheme"), [("mixtral", "W8A8"), ("granite-moe", "W4A16")])
    def test_an_expert_that_is_decoded_otherwise(
        self, pair: Made, monkeypatch: pytest.MonkeyPatch, family: str, scheme: str
    ) -> None:
        """A reference decoder with one wrong weight in one expert must not agree with compressed-tensors."""
        import halfbyte.verifier_models as module

        right = module.decode

        def wrong(parts, fmt):  # type: ignore[no-untyped-def]
            weight = right(parts, fmt)
            name = parts["weight_scale"].name
            weight[0, 0] += name.startswith("model.layers.1.block_sparse_moe.experts.2.")
            return weight

        monkeypatch.setattr(module, "decode", wrong)
        record = verify(pair(family, scheme).quantized, reload=True)
        problems = outcome(record, "weights").problems
        assert problems
        assert all(".1." in x and "experts" in x for x in problems)

    def test_a_further_layer_that_is_none_of_prediction(self, pair: Made) -> None:
        p = pair("deepseek-v3", "W4A16")
        _drop("model.layers.3.eh_proj.")(p.quantized)
        check = outcome(verify(p.quantized, reload=True), "reload")
        assert check.status == "failed"
        assert "unexpected key model.layers.3.enorm.weight" in check.problems


# Parts


def test_places_and_numbers() -> None:
    place = place_of("model.layers.3.mlp.experts.17.gate_proj")
    assert place is not None
    assert (place.layer, place.number, place.leaf) == ("model.layers.3.mlp.experts", 17, "gate_proj")
    assert place_of("model.layers.3.mlp.shared_experts.gate_proj") is None
    assert place_of("model.layers.3.mlp.shared_expert.0.gate_proj") is None
    assert numbers_in("model.layers.3.mlp.experts") == ("3",)
    assert numbers_in("a.10.b2.c.7") == ("10", "7")


def test_orientation_is_told_by_both_shapes() -> None:
    straight, turned = fused_of("x", (4, 384, 128), (4, 128, 192)), fused_of("x", (4, 128, 384), (4, 192, 128))
    assert straight is not None
    assert turned is not None
    assert (straight.transposed, turned.transposed) == (False, True)
    for fused in (straight, turned):
        assert (fused.count, fused.hidden, fused.intermediate) == (4, 128, 192)
        assert fused.shape_of("w1") == fused.shape_of("up_proj") == (192, 128)
        assert fused.shape_of("down_proj") == (128, 192)
    # One of the two square: H = I, and H = 2 I.
    assert [f.transposed for f in (fused_of("x", (2, 64, 128), (2, 64, 64)),) if f] == [True]
    assert [f.transposed for f in (fused_of("x", (2, 128, 128), (2, 128, 64)),) if f] == [False]
    assert fused_of("x", (2, 64, 128), (2, 96, 64)) is None
    assert fused_of("x", (3, 64, 128), (2, 64, 64)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_bytes_of_a_transposed_expert(tmp_path: Path, dtype: torch.dtype) -> None:
    experts, hidden, intermediate = 3, 10, 6
    both = torch.randn(experts, hidden, 2 * intermediate).to(dtype)
    down = torch.randn(experts, intermediate, hidden).to(dtype)
    save_file({"m.experts.gate_up_proj": both, "m.experts.down_proj": down}, tmp_path / FILE)
    source = {t.name: t for t in read_header(tmp_path / FILE).tensors}
    views = stacks_of(source, {}, {"m.experts.0.up_proj.weight", "m.experts.0.down_proj.weight"}).weights
    expected = {
        "m.experts.2.gate_proj.weight": both[2].T[:intermediate],
        "m.experts.1.up_proj.weight": both[1].T[intermediate:],
        "m.experts.0.down_proj.weight": down[0].T,
    }
    for name, matrix in expected.items():
        data = matrix.contiguous().view(torch.uint8).numpy().tobytes()
        view = views[name]
        assert view.shape == tuple(matrix.shape)
        assert view.size_bytes == len(data)
        for start in range(0, len(data), 7):
            for stop in (start, start + 1, start + 33, len(data)):
                assert view.read_bytes(start, min(stop, len(data))) == data[start : min(stop, len(data))]
        rows = view.rows(2, 5)
        assert rows.shape == (3, matrix.shape[1])
        assert np.ascontiguousarray(rows).tobytes() == matrix[2:5].contiguous().view(torch.uint8).numpy().tobytes()


def test_keys_of_layers_behind_the_last() -> None:
    keys = [
        "model.layers.4.eh_proj.weight",
        "model.layers.4.mlp.experts.0.up_proj.weight",
        "model.layers.5.enorm.weight",
        "model.layers.3.eh_proj.weight",
        "vision.layers.4.mlp.fc1.weight",
    ]
    assert predictors(keys, 4) == set(keys[:2])


def test_experts_that_do_not_fit_a_model_are_named() -> None:
    """Filling stacks leaves nothing at random without saying so."""
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 12, 8))
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 8, 6))
    shapes = {"0.gate_proj": (6, 8), "0.up_proj": (6, 8), "0.down_proj": (8, 6), "1.w1": (6, 8), "1.w2": (6, 8)}
    shapes |= {"2.up_proj": (6, 8), "1.other": (6, 8)}
    modules = [QuantizedModule(f"experts.{name}", {}, None) for name in shapes]
    weights = {f"experts.{name}": torch.randn(shape) for name, shape in shapes.items()}
    assert fill(model, modules, lambda m: weights[m.name]) == [
        "experts.1.w2 is [6, 8], the model's is [8, 6]",
        "the model has no place for experts.2.up_proj",
        "the model has no place for experts.1.other",
        "2 Linears of the experts in experts are missing",
    ]
    parts = [weights[f"experts.{name}"] for name in ("0.gate_proj", "0.up_proj", "1.w1")]
    assert torch.equal(
        model.experts.gate_up_proj.data, torch.stack([torch.cat(parts[:2]), torch.cat([parts[2], torch.zeros(6, 8)])])
    )
    assert torch.equal(model.experts.down_proj.data[0], weights["experts.0.down_proj"])
