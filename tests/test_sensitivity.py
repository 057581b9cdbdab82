"""Sensitivities against perturbing one unit of a whole model in transformers; whole runs with target bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import halfbyte
import tiny
from conftest import Models
from halfbyte.architectures import map_blocks
from halfbyte.blocks import StreamedModel
from halfbyte.calibration import Calibration, calibrate
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.distributions import kl_rows
from halfbyte.errors import NumericsError, RecipeError, ResumeError, UsageError
from halfbyte.estimates import MEASURED_POSITIONS
from halfbyte.methods.rtn import nearest
from halfbyte.methods.scales import searched
from halfbyte.mixing import MEASURED_SEQ_LEN, budget_of, choose
from halfbyte.progress import Silent
from halfbyte.records import CalibrationRecord, Manifest, Sensitivity, read_record
from halfbyte.schemes import preset
from halfbyte.sensitivity import Measured, measure
from halfbyte.weights import Weights
from interrupted import finish, finish_ranks, start, start_ranks
from test_cli import Said
from test_cli import halfbyte as command  # noqa: F401
from test_resume import KILLED, contents, partial_of, stage_of, wait_for

LAYERS = 3
FOUR_BITS = preset("W4A16").with_group_size(32)


# KL


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0, 400.0])
def test_kl_is_exact_also_where_it_is_small(size: float) -> None:
    torch.manual_seed(0)
    p = 8 * torch.randn(7, 1000)
    q = p + size * torch.randn(7, 1000) + 5
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl_rows(p, q).dtype == torch.float64
    torch.testing.assert_close(kl_rows(p, q), exact, rtol=1e-3, atol=2e-11)
    assert torch.equal(kl_rows(p, p), torch.zeros(7, dtype=torch.float64))


# The measurement


def sequences(lengths: list[int], vocabulary: int = tiny.VOCAB) -> Calibration:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(5, vocabulary, (n,), generator=generator) for n in lengths]
    record = CalibrationRecord(spec="", samples=len(made), tokens=sum(lengths), seq_len=max(lengths), seed=0, sha256="")
    return Calibration(record=record, sequences=made)


def measured(source: Path, calibration: Calibration, folder: Path, **options: Any) -> tuple[list[list[str]], Measured]:
    checkpoint = open_checkpoint(source)
    blocks = map_blocks(checkpoint)
    schemes = {n: FOUR_BITS for b in blocks.linears for n in b}
    units = budget_of(blocks, schemes, checkpoint.tensors, 5).units
    model = StreamedModel.of(Weights.of(checkpoint), torch.device("cpu"))
    settings = {"offload": False, "search": True, "reporter": Silent()} | options
    return [list(u.linears) for u in units], measure(model, units, schemes, calibration, folder, **settings)


def by_hand(
    source: Path, units: list[list[str]], texts: list[torch.Tensor], *, search: bool, every: int = 1
) -> list[float]:
    """Each unit rounded in a whole model, each text on its own, KL in float64."""
    model = tiny.load(source)
    squares: dict[str, torch.Tensor] = {}
    handles = []
    for name in (n for unit in units for n in unit):

        def hook(_: Any, inputs: Any, name: str = name) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].flatten(0, 1).square().sum(0)

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        original = [torch.log_softmax(model(t[None]).logits[0].double(), -1) for t in texts]
    for handle in handles:
        handle.remove()
    found = []
    for unit in units:
        kept = {n: model.get_submodule(n).weight.data for n in unit}
        for name, weight in kept.items():
            if search:
                scales, zeros = searched(weight, squares[name], FOUR_BITS.weights, torch.bfloat16)
            else:
                scales = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5).bfloat16().float()
                zeros = torch.zeros_like(scales)
            codes = nearest(weight, scales, zeros, FOUR_BITS.weights).float().unflatten(1, (-1, 32))
            model.get_submodule(name).weight.data = (codes * scales[..., None]).flatten(1)
        with torch.no_grad():
            rounded = [torch.log_softmax(model(t[None]).logits[0].double(), -1) for t in texts]
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(original, rounded, strict=True)]
        found.append(float(torch.cat(kl)[::every].mean()))
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight
    return found


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_unit_alone_is_rounded(family: str, search: bool, tiny_model: Models, tmp_path: Path) -> None:
    """Sequences of several lengths, so that there is padding; the longest four count."""
    source = tiny_model(family, num_hidden_layers=LAYERS)
    calibration = sequences([9, 40, 23, 33, 31, 8])
    units, found = measured(source, calibration, tmp_path, search=search)
    assert len(units) == 4 * LAYERS
    texts = [calibration.sequences[i] for i in (1, 3, 4, 2)]
    expected = by_hand(source, units, texts, search=search)
    assert (found.sequences, found.tokens, found.positions) == (4, 127, 127)
    assert found.kl_nats == pytest.approx(expected, rel=2e-3)
    assert len(set(found.kl_nats)) == len(units)


def test_long_sequences_are_cut(tiny_model: Models, tmp_path: Path) -> None:
    """And of their positions some are looked at: of 512, every other."""
    source = tiny_model("llama", max_position_embeddings=512)
    units, found = measured(source, sequences([300, 280]), tmp_path)
    assert (found.sequences, found.tokens, found.positions) == (2, 2 * MEASURED_SEQ_LEN, MEASURED_POSITIONS)
    texts = [s[:MEASURED_SEQ_LEN] for s in sequences([300, 280]).sequences]
    assert found.kl_nats == pytest.approx(by_hand(source, units, texts, search=True, every=2), rel=2e-3)


def test_states_on_disk_give_the_same(tiny_model: Models, tmp_path: Path) -> None:
    source = tiny_model("gemma3", num_hidden_layers=LAYERS)
    calibration = sequences([40, 33])
    kept, again = (measured(source, calibration, tmp_path, offload=offload)[1] for offload in (False, True))
    assert kept == again
    assert list(tmp_path.iterdir()) == []


def test_weights_are_what_they_were(tiny_model: Models, tmp_path: Path) -> None:
    """Measuring twice with one model in memory, and the source's own predictions between."""
    source = tiny_model("llama")
    assert measured(source, sequences([20]), tmp_path)[1] == measured(source, sequences([20]), tmp_path)[1]


def test_a_weight_that_is_not_finite_is_named(tiny_model: Models, tmp_path: Path) -> None:
    source = tiny.build(tmp_path / "source", "llama")
    file = source / "model.safetensors"
    tensors = tiny.stored(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: the source weight holds NaN"):
        measured(source, sequences([20]), tmp_path)


# From start to end


@pytest.fixture(scope="module")
def source(tiny_model: Models) -> Path:
    return tiny_model("gemma3", num_hidden_layers=6)


@pytest.fixture(scope="module")
def options(text_file: Path) -> dict[str, Any]:
    calibration = {"calibration": f"text:{text_file}", "samples": 8, "seq_len": 40}
    return {"scheme": "W4A16", "group_size": 32, "target_bits": 5.5, **calibration}


@pytest.fixture(scope="module")
def whole(source: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finish(start(source, out, **options)) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same, for commands that leave their records beside it."""
    return Path(shutil.copytree(whole, tmp_path / "whole"))


def require_as_promised(out: Path, source: Path) -> Sensitivity:
    """Bits, patterns and records of a finished run agree with the files, and the checkpoint verifies and reloads."""
    manifest = read_record(Manifest, out / "halfbyte.json")
    found = manifest.sensitivity
    assert found is not None
    tensors = tiny.stored(out)
    scheme_of = {n: u.scheme for u in found.units for n in u.linears}
    assert scheme_of == {r.name: r.scheme for r in manifest.linears}
    size = sum(tensors[f"{n}.weight_{leaf}"].nbytes for n in scheme_of for leaf in ("packed", "scale", "shape"))
    weights = sum(tensors[f"{n}.weight_shape"].prod().item() for n in scheme_of)
    assert 8 * size / weights == pytest.approx(found.bits_per_weight, rel=1e-12)
    assert manifest.bits_per_weight == pytest.approx(found.bits_per_weight, rel=1e-12)
    assert found.bits_per_weight <= found.target_bits
    for name, scheme in scheme_of.items():
        bits = 32 * tensors[f"{name}.weight_packed"].shape[1] // int(tensors[f"{name}.weight_shape"][1])
        assert bits == {"W4A16": 4, "W8A16": 8}[scheme]
    verified = halfbyte.verify(out, source=source)
    assert verified.passed
    assert {c.name for c in verified.checks if c.status == "passed"} >= {
        "config",
        "copies",
        "reload",
        "weights",
        "logits",
    }
    return found


def test_a_run_with_target_bits(source: Path, copy: Path) -> None:
    found = require_as_promised(copy, source)
    wide = {i for i, u in enumerate(found.units) if u.scheme == "W8A16"}
    assert 0 < len(wide) < len(found.units) == 24
    # The choice is that of the sensitivities in the record.
    checkpoint = open_checkpoint(source)
    blocks = map_blocks(checkpoint)
    budget = budget_of(blocks, {n: FOUR_BITS for b in blocks.linears for n in b}, checkpoint.tensors, 5.5)
    assert choose([u.kl_nats for u in found.units], [u.extra_bytes for u in budget.units], budget.extra_bytes) == wide
    config = tiny.config_of(copy)["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert [g["weights"]["num_bits"] for g in config["config_groups"].values()] == [4, 8]
    assert all(t.startswith("re:") for g in config["config_groups"].values() for t in g["targets"])
    assert read_record(Manifest, copy / "halfbyte.json").recipe["target_bits"] == 5.5


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_what_was_measured_is_what_the_record_says(
    method: str, source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = halfbyte.quantize(source, out, method=method, device="cpu", **options)  # type: ignore[arg-type]
    found = require_as_promised(out, source)
    assert {r.method for r in manifest.linears} == {method}
    calibration = calibrate(
        options["calibration"], model_path=source, samples=8, seq_len=40, seed=0, device="cpu", reporter=Silent()
    )
    expected = by_hand(source, [u.linears for u in found.units], calibration.sequences[:4], search=method == "gptq")
    assert [u.kl_nats for u in found.units] == pytest.approx(expected, rel=2e-3)
    assert manifest.calibration is not None


def test_more_bits_are_nearer_to_the_original(
    source: Path, options: dict[str, Any], copy: Path, text_file: Path, tmp_path: Path
) -> None:
    """Spending the same bits on the least sensitive units instead of the most is worse."""
    found = read_record(Manifest, copy / "halfbyte.json").sensitivity
    assert found is not None
    wide = [u for u in found.units if u.scheme == "W8A16"]
    spent = sum(len(u.linears) for u in wide)
    calm = sorted(found.units, key=lambda u: u.kl_nats)
    worst: list[str] = []
    for u in calm:
        if len(worst) < spent:
            worst += u.linears
    listed = ", ".join(f"'{n}'" for n in worst)
    recipe = tmp_path / "calm.toml"
    recipe.write_text(
        f'scheme = "W4A16"\ngroup_size = 32\n[[groups]]\nscheme = "W8A16"\ngroup_size = 32\ntargets = [{listed}]\n'
    )
    plain = {k: v for k, v in options.items() if k not in ("scheme", "group_size", "target_bits")}
    halfbyte.quantize(source, tmp_path / "calm", recipe=recipe, device="cpu", **plain)
    kl = [
        halfbyte.compare(source, out, text=text_file, window=64, device="cpu").metrics["kl_mean"]
        for out in (copy, tmp_path / "calm")
    ]
    assert kl[0] < kl[1]


def test_the_ends_of_the_range_need_no_second_group(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    made = halfbyte.plan(source, **options)
    assert made.mixed is not None
    for target, scheme in ((made.mixed.lowest_bits, "W4A16"), (made.mixed.highest_bits, "W8A16")):
        out = tmp_path / scheme
        halfbyte.quantize(source, out, device="cpu", **(options | {"target_bits": target}))
        found = require_as_promised(out, source)
        assert {u.scheme for u in found.units} == {scheme}
        assert len(tiny.config_of(out)["quantization_config"]["config_groups"]) == 1


def test_a_recipe_with_exceptions_and_effort(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Linears that a recipe ignores stay, those that it gives 8 bits have them, the others are chosen among."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        """
scheme = "W4A16"
group_size = 32
target_bits = 6.5
effort = "high"
ignore = ['re:.*layers\\.0\\..*']
[[groups]]
scheme = "W8A16"
group_size = 64
targets = ['re:.*down_proj']
"""
    )
    plain = {k: v for k, v in options.items() if k not in ("scheme", "group_size", "target_bits")}
    out = tmp_path / "out"
    manifest = halfbyte.quantize(source, out, recipe=recipe, device="cpu", **plain)
    found = manifest.sensitivity
    assert found is not None
    assert manifest.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert found.bits_per_weight <= 6.5
    assert len(found.units) == 5 * 3
    schemes = {r.name: (r.scheme, r.group_size) for r in manifest.linears}
    assert not any(".0." in n for n in schemes)
    assert {s for n, s in schemes.items() if "down_proj" in n} == {("W8A16", 64)}
    assert {s for n, s in schemes.items() if "down_proj" not in n} == {("W4A16", 32), ("W8A16", 32)}
    assert halfbyte.verify(out, source=source).passed


def test_several_groups_are_read_alike_by_every_loader(source: Path, tmp_path: Path) -> None:
    """Where a group names q/k/v and another is ``Linear``, vLLM would take its fused layer for a ``Linear``."""
    recipe = tmp_path / "r.toml"
    names = ", ".join(f"'model.layers.1.self_attn.{p}_proj'" for p in "qkv")
    recipe.write_text(f"""
scheme = "W4A16"
group_size = 32
method = "rtn"
[[groups]]
scheme = "W8A16"
group_size = 32
targets = [{names}]
""")
    out = tmp_path / "out"
    halfbyte.quantize(source, out, recipe=recipe, device="cpu")
    four, eight = tiny.config_of(out)["quantization_config"]["config_groups"].values()
    assert (four["weights"]["num_bits"], eight["weights"]["num_bits"]) == (4, 8)
    assert eight["targets"] == [r"re:.*\blayers\.1\.(?:self_attn\.k_proj|self_attn\.q_proj|self_attn\.v_proj)$"]
    assert "Linear" not in four["targets"]
    assert halfbyte.verify(out, source=source).passed


# Resumed


@pytest.mark.parametrize("offload", [False, True])
def test_killed_and_resumed(offload: bool, source: Path, options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Before, while and after sensitivities are measured: the same bytes."""
    out, options = tmp_path / "out", options | {"offload": offload}
    log = tmp_path / "writes"
    assert finish(start(source, tmp_path / "counted", trap=("count", 0, log), **options)) == 0
    writes = log.read_text().split()
    for number in (1, 3, 5, 8, 30, 60):
        process = start(source, out, resume=partial_of(out).exists(), trap=("kill", number), **options)
        assert finish(process) == KILLED
        assert not out.exists()
    process = start(source, out, resume=True, trap=("kill", len(writes) // 2), **options)
    finish(process)
    if not out.exists():
        assert finish(start(source, out, resume=True, **options)) == 0
    assert contents(out) == contents(whole)
    assert contents(tmp_path / "counted") == contents(whole)


def test_a_resumed_run_does_not_measure_again(
    source: Path, options: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    process = start(source, out, **options)
    wait_for(lambda: stage_of(out) >= 1, process)
    process.kill()
    assert finish(process) == KILLED

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("halfbyte.sensitivity.measure", refuse)
    halfbyte.quantize(source, out, device="cpu", resume=True, **options)
    assert contents(out) == contents(whole)


def test_another_target_is_refused(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out, **options)
    wait_for(lambda: stage_of(out) >= 1, process)
    process.kill()
    assert finish(process) == KILLED
    for target, words in ((5.25, r"target_bits was 5\.5, is 5\.25"), (None, r"target_bits was 5\.5, is null")):
        with pytest.raises(ResumeError, match=words):
            halfbyte.quantize(source, out, device="cpu", resume=True, **(options | {"target_bits": target}))


def test_several_processes_share_one_choice(tiny_model: Models, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(tiny.TEXT * 4)
    source = tiny_model("llama", num_hidden_layers=2)
    options = {"group_size": 32, "target_bits": 6, "calibration": f"text:{text}", "samples": 12, "seq_len": 200}
    assert finish(start(source, tmp_path / "one", **options)) == 0
    assert finish_ranks(start_ranks(2, source, tmp_path / "two", **options)) == [0, 0]
    one, two = (read_record(Manifest, tmp_path / n / "halfbyte.json").sensitivity for n in ("one", "two"))
    assert one == two
    require_as_promised(tmp_path / "two", source)


# What is said


def test_the_plan(source: Path, options: dict[str, Any]) -> None:
    made, plain = (halfbyte.plan(source, **(options | {"target_bits": t})) for t in (5.5, None))
    assert made.problems == []
    assert made.mixed is not None
    assert plain.mixed is None
    assert (made.mixed.units, made.mixed.sequences, made.mixed.tokens, made.mixed.wider) == (24, 4, 160, "W8A16")
    assert made.mixed.lowest_bits == plain.bits_per_weight
    assert 5.49 < made.bits_per_weight <= 5.5
    assert made.bytes_after - plain.bytes_after == pytest.approx(
        (made.bits_per_weight - plain.bits_per_weight) * made.quantized_parameters / 8
    )
    assert {t.scheme for t in made.tensors if t.action == "quantize"} == {"W4A16 or W8A16"}
    assert "measuring sensitivities" in made.estimates["time"].parts
    assert "measuring 24 units on 160 calibration tokens" in made.notes[0]
    assert made.notes[1:] == [preset("W8A16").note]
    assert "no kernel" in made.notes[1]


def test_rounding_to_nearest_needs_a_little_text(source: Path, options: dict[str, Any]) -> None:
    plain = {"group_size": 32, "method": "rtn"}
    made = halfbyte.plan(source, target_bits=5.5, calibration=options["calibration"], **plain)
    assert made.mixed is not None
    assert (made.mixed.sequences, made.mixed.tokens) == (4, 4 * MEASURED_SEQ_LEN)
    assert "for this alone, rounding to nearest needs calibration text" in made.notes[0]
    assert "second moments" in made.estimates["time"].parts
    assert made.estimates["time"].parts["second moments"] == 0
    assert "measuring sensitivities" not in halfbyte.plan(source, **plain).estimates["time"].parts


def test_rounding_to_nearest_is_not_shared(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    said = tmp_path / "said"
    processes = start_ranks(2, source, tmp_path / "out", said=said, **(options | {"method": "rtn"}))
    assert finish_ranks(processes) == [2, 2]
    assert "--method rtn: rounding to nearest needs calibration only for the target bits, so" in said.read_text()


def test_the_command_line(
    command: Callable[..., Said],  # noqa: F811
    source: Path,
    options: dict[str, Any],
    whole: Path,
    tmp_path: Path,
) -> None:
    calibration = ["--calibration", options["calibration"], "--samples", "8", "--seq-len", "40"]
    said = command("plan", source, "--group-size", "32", "--target-bits", "5.5", *calibration)
    assert said.status == 0
    assert "quantised by gptq to W4A16 or W8A16 g32: at most 5.500 bits each" in said.out
    assert "mixed precision: target 5.5 bits, between 4.518 (as in the table) and 8.518" in said.out
    said = command("plan", source, "--group-size", "32", "--target-bits", "4.4", "--json", *calibration)
    assert said.status == 2
    assert said.record["problems"] == [
        "--target-bits 4.4: 4.4 bits a weight, scales included, cannot be reached (the recipe's schemes take 4.519, "
        "and 8 bits everywhere 8.518). Choose between 4.519 and 8.518."
    ]
    said = command("quantize", source, tmp_path / "out", "--target-bits", "9", *calibration)
    assert said.status == 2
    assert "9 bits a weight" in said.err
    assert list(tmp_path.iterdir()) == []
    said = command("quantize", source, tmp_path / "out", "--target-bits", "few")
    assert said.status == 2
    assert "'few' is not a valid float" in said.err
    said = command("quantize", source, tmp_path / "out", "--group-size", "32", "--target-bits", "5.5", *calibration)
    assert said.status == 0
    assert "mixed precision: target 5.5 bits; " in said.out
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (whole / "model.safetensors").stat().st_size
    said = command("inspect", whole)
    assert said.status == 0
    assert "W4A16 g32 sym" in said.out
    assert "W8A16 g32 sym" in said.out
    assert "mixed precision: target 5.5 bits, 5." in said.out
    assert json.loads(command("inspect", whole, "--json").out)["sensitivity"]["target_bits"] == 5.5


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "W8A16"])
def test_schemes_that_cannot_be_mixed(scheme: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"--target-bits 5: --target-bits .*{scheme}.*leave --target-bits out"):
        halfbyte.quantize(source, tmp_path / "out", scheme=scheme, target_bits=5)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_cannot_be_mixed(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for text, words in (
        ("scheme: W8A8\ntarget_bits: 6\n", "line 2: target_bits mixes symmetric packed integers with W8A16, and W8A8"),
        ("scheme: W4A16\ntarget_bits: few\n", "line 2: target_bits must be a number, not 'few'"),
    ):
        recipe.write_text(text)
        with pytest.raises(RecipeError, match=words):
            halfbyte.plan(source, recipe=recipe)
