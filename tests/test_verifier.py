"""The verifier on sound checkpoints of every scheme, and on checkpoints that were spoilt one way each."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from attacks.checkpoints import Pair, Shard, build, edit_config
from halfbyte.cli.verify import command
from halfbyte.errors import CheckpointError, GateFailed
from halfbyte.records import MANIFEST_NAME, VERIFY_NAME, Check, Manifest, VerifyRecord, read_record, write_json
from halfbyte.schemes import PRESETS
from halfbyte.verifier import verify
from halfbyte.verifier_reload import available_bytes

Q0 = "model.layers.0.self_attn.q_proj"
GATE0 = "model.layers.0.mlp.gate_proj"
NORM = "model.norm.weight"


def outcome(record: VerifyRecord, name: str) -> Check:
    (check,) = [c for c in record.checks if c.name == name]
    return check


def write_manifest(folder: Path) -> None:
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
    manifest = Manifest(
        format_version=1,
        source={},
        recipe={},
        calibration=None,
        linears=[],
        bits_per_weight=4.25,
        bytes_before=1,
        bytes_after=1,
        files=files,
        versions={},
    )
    write_json(folder / MANIFEST_NAME, manifest)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Sound pairs, made once; tests spoil copies."""
    root = tmp_path_factory.mktemp("made")
    pairs = {
        "w4": build(root / "w4", "W4A16", group_size=64),
        "asym": build(root / "asym", "W4A16_ASYM", group_size=32),
        "w8a8": build(root / "w8a8", "W8A8"),
        "fp8": build(root / "fp8", "FP8_DYNAMIC"),
        "block": build(root / "block", "FP8_BLOCK"),
        "w3": build(root / "w3", "W3A16", group_size=64),
        "sharded": build(root / "sharded", "W4A16", shards=3),
    }
    for pair in pairs.values():
        write_manifest(pair.quantized)
    return pairs


@pytest.fixture
def pair(made: dict[str, Pair], tmp_path: Path) -> Callable[[str], Pair]:
    def copy(name: str) -> Pair:
        shutil.copytree(made[name].quantized, tmp_path / "quantized")
        return Pair(made[name].source, tmp_path / "quantized")

    return copy


@pytest.mark.parametrize(
    ("scheme", "group_size", "shards", "tied"),
    [
        ("W4A16", 32, 1, False),
        ("W4A16", "channel", 1, True),
        ("W4A16_ASYM", None, 2, False),
        ("W8A16", None, 1, False),
        ("W8A8", None, 1, False),
        ("FP8_DYNAMIC", None, 1, True),
        ("W4A8", None, 1, False),
        ("W3A16", 64, 1, False),
        ("W2A16", "channel", 1, True),
        ("FP8_BLOCK", None, 2, False),
    ],
)
def test_a_sound_checkpoint_passes_every_check(
    tmp_path: Path, scheme: str, group_size: int | str | None, shards: int, tied: bool
) -> None:
    pair = build(tmp_path, scheme, group_size=group_size, shards=shards, tied=tied)
    write_manifest(pair.quantized)
    record = verify(pair.quantized, source=pair.source, reload=True)
    assert {c.name: (c.status, c.problems) for c in record.checks if c.status != "passed"} == {}
    names = [c.name for c in record.checks]
    assert names[:8] == ["files", "headers", "config", "linears", "scales", "codes", "copies", "error"]
    with_activations = ["activations"] if PRESETS[scheme].activations else []
    assert names[8:] == ["reload", "weights", "logits", *with_activations]
    assert record.passed
    assert read_record(VerifyRecord, pair.quantized / VERIFY_NAME) == record
    assert (pair.quantized / VERIFY_NAME).stat().st_mode & 0o777 == 0o644


def test_float16_and_float32_models(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        pair = build(tmp_path / str(dtype), "W4A16_ASYM", group_size=64, dtype=dtype)
        record = verify(pair.quantized, source=pair.source, reload=True)
        assert record.passed, [c for c in record.checks if c.problems]


def test_verifying_twice_gives_the_same_record(pair: Callable[[str], Pair]) -> None:
    p = pair("w4")
    assert verify(p.quantized, reload=False) == verify(p.quantized, reload=False)


# Each attack spoils a sound checkpoint; the named check must fail and name the culprit.
def _flip_copy(folder: Path) -> None:
    Shard(folder / "model.safetensors").flip(NORM, at=5)


def _flip_code(folder: Path) -> None:
    Shard(folder / "model.safetensors").flip(f"{Q0}.weight_packed", at=100)


def _drop_scale(folder: Path) -> None:
    Shard(folder / "model.safetensors").replace(**{f"{Q0}.weight_scale": None})


def _drop_norm(folder: Path) -> None:
    Shard(folder / "model.safetensors").replace(**{NORM: None})


def _set(suffix: str, change: Callable[[torch.Tensor], torch.Tensor], module: str = Q0) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        shard = Shard(folder / "model.safetensors")
        name = f"{module}.{suffix}"
        shard.replace(**{name: change(shard.tensors()[name])})

    return attack


def _with(value: float, index: int = 3) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(-1)[index] = value
        return t

    return change


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _header_garbage(folder: Path) -> None:
    Shard(folder / "model.safetensors").rewrite_header(b"{not json")


def _mode(folder: Path) -> None:
    os.chmod(folder / "model.safetensors", 0o600)


def _ignore_quantized(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["ignore"].append("re:.*layers\\.0\\.self_attn.*"))


def _forget_ignore(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"].update(ignore=[]))


def _bad_regex(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["ignore"].append("re:*lm_head"))


def _extra_key(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(colour=1))


def _no_quantization_config(folder: Path) -> None:
    edit_config(folder, lambda c: c.pop("quantization_config"))


def _wrong_group_size(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=32))


def _other_blocks(folder: Path) -> None:
    edit_config(
        folder,
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(block_structure=[128, 96]),
    )


def _swap_rows(folder: Path) -> None:
    _set("weight_packed", lambda t: t.flip(0))(folder)


def _config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def _dense_tensor(folder: Path) -> None:
    """Put one Linear back dense, as a half-finished writer would."""
    shard = Shard(folder / "model.safetensors")
    drop = {f"{Q0}.{s}": None for s in ("weight_packed", "weight_scale", "weight_shape")}
    shard.replace(**drop, **{f"{Q0}.weight": torch.zeros(128, 128, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("kind", "attack", "check", "named"),
    [
        ("w4", _flip_copy, "copies", "model.norm.weight differs from the source from byte 5"),
        ("w4", _drop_norm, "copies", "model.norm.weight of the source is lost"),
        ("w4", _drop_scale, "linears", f"{Q0}.weight_scale is missing"),
        ("w4", _set("weight_scale", lambda t: t.float()), "linears", f"{Q0}.weight_scale has dtype F32, not BF16"),
        (
            "w4",
            _set("weight_scale", _with(float("nan"))),
            "scales",
            "1 of 256 scales are not finite",
        ),
        (
            "w4",
            _set("weight_scale", _with(float("inf"))),
            "scales",
            "1 of 256 scales are not finite",
        ),
        ("w4", _set("weight_scale", _with(0.0)), "scales", f"{Q0}.weight_scale: 1 of 256 scales are zero"),
        ("w4", _set("weight_scale", _with(-0.25)), "scales", f"{Q0}.weight_scale: 1 of 256 scales are negative"),
        (
            "w4",
            _set("weight_scale", lambda t: t[:, :1]),
            "linears",
            f"{Q0}.weight_scale has shape [128, 1], not [128, 2]",
        ),
        ("w4", _set("weight_scale", lambda t: t * 8), "error", f"{Q0} has relative error"),
        ("w4", _swap_rows, "error", f"{Q0} has relative error"),
        ("w4", _set("weight_packed", lambda t: t[:-1]), "linears", f"{Q0}.weight_packed has shape [127, 16]"),
        ("w4", _set("weight_packed", lambda t: t.long()), "linears", f"{Q0}.weight_packed has dtype I64, not I32"),
        ("w4", _set("weight_shape", _with(64, 1)), "linears", f"{Q0} is stored as [128, 64]"),
        ("w4", _set("weight_shape", _with(-1, 1)), "linears", f"{Q0}.weight_shape holds [128, -1]"),
        ("w4", _set("weight_shape", lambda t: t[:1]), "linears", f"{Q0}.weight_shape has shape [1]"),
        ("w4", _wrong_group_size, "linears", f"{Q0}.weight_scale has shape [128, 2], not [128, 4]"),
        ("w4", _dense_tensor, "config", f"{Q0} is dense on disk"),
        ("w4", _ignore_quantized, "config", f"{Q0} is quantised on disk, but config.json ignores it"),
        ("w4", _forget_ignore, "config", "lm_head is dense on disk"),
        ("w4", _bad_regex, "config", "re:*lm_head is not a regular expression"),
        ("w4", _extra_key, "config", "colour"),
        ("w4", _no_quantization_config, "config", "quantization_config is not an object"),
        ("w4", _config_text("{"), "files", "config.json not valid JSON"),
        ("w4", _config_text("[]"), "files", "config.json is not a JSON object"),
        ("w4", _mode, "files", "model.safetensors has mode 0600"),
        ("w4", _truncate, "headers", "model.safetensors: truncated, the file ends inside tensor"),
        ("w4", _empty, "headers", "model.safetensors: is too short"),
        ("w4", _header_garbage, "headers", "not JSON"),
        ("w4", _flip_code, "files", "model.safetensors has changed since it was written"),
        ("asym", _set("weight_zero_point", lambda t: t[:4]), "linears", f"{Q0}.weight_zero_point has shape [4, 4]"),
        ("asym", _set("weight_zero_point", torch.zeros_like), "error", f"{Q0} has relative error"),
        ("w8a8", _set("weight", lambda t: t.to(torch.int32)), "linears", Q0),
        ("w8a8", _set("weight_scale", _with(float("nan"))), "scales", f"{Q0}.weight_scale"),
        ("fp8", _set("weight", _with(float("nan"))), "codes", f"{Q0}.weight holds NaN codes"),
        ("block", _set("weight_scale", lambda t: t * 8), "error", f"{Q0} has relative error"),
        (
            "block",
            _set("weight_scale", _with(float("nan"), 1), GATE0),
            "scales",
            f"{GATE0}.weight_scale: 1 of 2 scales",
        ),
        (
            "block",
            _set("weight_scale", lambda t: t.repeat_interleave(128, 0), GATE0),
            "linears",
            f"{GATE0}.weight_scale has shape [256, 1], not [2, 1]",
        ),
        ("block", _other_blocks, "linears", f"{Q0}: 128 input features do not divide into blocks of 128 x 96"),
        (
            "w3",
            _set("weight_packed", lambda t: torch.cat([t, t[:, :1]], 1)),
            "linears",
            f"{Q0}.weight_packed has shape [128, 13], not [128, 12]",  # ten codes to a word, as older libraries packed
        ),
        ("w3", _swap_rows, "error", f"{Q0} has relative error"),
    ],
)
def test_a_spoilt_checkpoint_fails_and_names_the_culprit(
    pair: Callable[[str], Pair], kind: str, attack: Callable[[Path], None], check: str, named: str
) -> None:
    p = pair(kind)
    attack(p.quantized)
    record = verify(p.quantized, source=p.source, reload=False)
    assert not record.passed
    failed = outcome(record, check)
    assert failed.status == "failed"
    assert any(named in problem for problem in failed.problems), failed.problems


def test_codes_and_zero_points_outside_their_bits(pair: Callable[[str], Pair]) -> None:
    """Four-bit codes in int8 (W4A8 of other tools) can leave their range."""
    p = pair("w8a8")

    def four_bits(config: dict) -> None:  # type: ignore[type-arg]
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=4, symmetric=False)

    edit_config(p.quantized, four_bits)
    shard = Shard(p.quantized / "model.safetensors")
    changes = {}
    for name, tensor in shard.tensors().items():
        if tensor.dtype == torch.int8:
            changes[name] = tensor.clamp(-8, 7)
            changes[f"{name}_zero_point"] = torch.zeros(tensor.shape[0], 1, dtype=torch.int8)
    shard.replace(**changes)
    assert outcome(verify(p.quantized, reload=False), "codes").status == "passed"
    changes[f"{Q0}.weight"][3, 4] = 8
    changes[f"{Q0}.weight_zero_point"][5] = 9
    shard.replace(**changes)
    assert outcome(verify(p.quantized, reload=False), "codes").problems == [
        f"{Q0}.weight holds codes outside -8..7",
        f"{Q0}.weight_zero_point holds values outside -8..7",
    ]


class TestShards:
    def index(self, folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    def test_a_missing_shard(self, pair: Callable[[str], Pair]) -> None:
        p = pair("sharded")
        (p.quantized / "model-00002-of-00003.safetensors").unlink()
        problems = outcome(verify(p.quantized, reload=False), "files").problems
        assert "model.safetensors.index.json names model-00002-of-00003.safetensors, which is missing" in problems

    def test_an_index_that_names_a_file_elsewhere(self, pair: Callable[[str], Pair]) -> None:
        p = pair("sharded")
        self.index(p.quantized, lambda i: i["weight_map"].update({NORM: "../source/model.safetensors"}))
        problems = outcome(verify(p.quantized, reload=False), "files").problems
        assert any("../source/model.safetensors" in x for x in problems)

    def test_an_index_that_lies_about_places_and_size(self, pair: Callable[[str], Pair]) -> None:
        p = pair("sharded")
        first = json.loads((p.quantized / "model.safetensors.index.json").read_text())["weight_map"][NORM]
        wrong = next(f.name for f in sorted(p.quantized.glob("model-*.safetensors")) if f.name != first)
        self.index(p.quantized, lambda i: (i["weight_map"].update({NORM: wrong}), i["metadata"].update(total_size=1)))
        problems = outcome(verify(p.quantized, reload=False), "headers").problems
        assert f"model.safetensors.index.json puts {NORM} in {wrong}, but it is in {first}" in problems
        assert any("total_size 1" in x for x in problems)

    def test_a_tensor_in_two_shards(self, pair: Callable[[str], Pair]) -> None:
        p = pair("sharded")
        weight_map = json.loads((p.quantized / "model.safetensors.index.json").read_text())["weight_map"]
        other = next(f for f in sorted(set(weight_map.values())) if f != weight_map[NORM])
        Shard(p.quantized / other).replace(**{NORM: torch.ones(128, dtype=torch.bfloat16)})
        problems = outcome(verify(p.quantized, reload=False), "headers").problems
        assert any(f"tensor {NORM} is in" in x and "again in" in x for x in problems)

    def test_a_tensor_that_the_index_forgets(self, pair: Callable[[str], Pair]) -> None:
        p = pair("sharded")
        self.index(p.quantized, lambda i: i["weight_map"].pop(NORM))
        problems = outcome(verify(p.quantized, reload=False), "headers").problems
        assert f"model.safetensors.index.json does not list {NORM}" in problems

    def test_a_truncated_shard_leaves_the_rest_readable(self, pair: Callable[[str], Pair]) -> None:
        p = pair("sharded")
        shard = p.quantized / "model-00003-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        record = verify(p.quantized, source=p.source, reload=True)
        assert outcome(record, "headers").status == "failed"
        assert outcome(record, "reload").status == "skipped"
        assert outcome(record, "scales").status == "passed"


def test_a_tensor_named_twice_in_one_header(pair: Callable[[str], Pair]) -> None:
    p = pair("w4")
    shard = Shard(p.quantized / "model.safetensors")
    header, _ = shard.header()
    text = json.dumps(header)
    entry = json.dumps({NORM: header[NORM]})[1:-1]
    shard.rewrite_header((text[:-1] + ", " + entry + "}").encode())
    assert any(f"names {NORM} twice" in x for x in outcome(verify(p.quantized, reload=False), "headers").problems)


class TestReload:
    def test_a_scale_that_transformers_reads_otherwise_is_found(
        self, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A reference decoder with one wrong nibble must not agree with transformers."""
        import halfbyte.verifier_models as module

        right = module.decode

        def wrong(parts, fmt):  # type: ignore[no-untyped-def]
            weight = right(parts, fmt)
            weight[0, 0] += 1
            return weight

        monkeypatch.setattr(module, "decode", wrong)
        record = verify(pair("w4").quantized, reload=True)
        assert not record.passed
        assert any(f"{Q0}.weight" in x for x in outcome(record, "weights").problems)
        assert outcome(record, "logits").status == "failed"

    def test_other_activation_arithmetic_is_found(
        self, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import halfbyte.verifier_reload as module

        monkeypatch.setattr(module, "_fake_quantize", lambda x, floating, dims: x)
        monkeypatch.setattr(module, "ACTIVATION_TOLERANCE", 1e-4)
        record = verify(pair("w8a8").quantized, reload=True)
        assert outcome(record, "activations").status == "failed"
        assert outcome(record, "logits").status == "passed"

    def test_a_missing_dense_tensor_is_a_missing_key(self, pair: Callable[[str], Pair]) -> None:
        p = pair("w4")
        (p.quantized / MANIFEST_NAME).unlink()
        _drop_norm(p.quantized)
        problems = outcome(verify(p.quantized, reload=True), "reload").problems
        assert f"missing key {NORM}" in problems

    def test_skipped_when_memory_is_short(self, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
        import halfbyte.verifier_reload as module

        monkeypatch.setattr(module, "available_bytes", lambda: 10**9)
        check = outcome(verify(pair("w4").quantized), "reload")
        assert check.status == "skipped"
        assert "1.0 GB of memory are free" in check.detail

    def test_available_memory_is_plausible(self) -> None:
        assert 1 << 20 < available_bytes() < 1 << 50

    def test_an_unknown_architecture_is_not_a_traceback(self, pair: Callable[[str], Pair]) -> None:
        p = pair("w4")
        edit_config(p.quantized, lambda c: c.update(model_type="nobody-knows", architectures=["Nobody"]))
        record = verify(p.quantized, source=p.source, reload=True)
        assert outcome(record, "error").status == "passed"
        assert outcome(record, "reload").status == "skipped"
        assert "nobody-knows" in outcome(record, "reload").detail

    def test_remote_code_is_not_run(self, pair: Callable[[str], Pair]) -> None:
        p = pair("w4")
        marker = p.quantized.parent / "was-run"
        (p.quantized / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
        os.chmod(p.quantized / "evil.py", 0o644)
        auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        edit_config(p.quantized, lambda c: c.update(auto_map=auto_map, model_type="evil"))
        verify(p.quantized, reload=True)
        assert not marker.exists()


def test_two_groups_are_decoded_each_by_its_own(tmp_path: Path) -> None:
    """Attention in groups of 64, the rest in channels: transformers must be led round its first-group-only path."""
    from safetensors.torch import load_file

    from attacks.checkpoints import quantized_tensors, save
    from halfbyte import schemes

    pair = build(tmp_path, "W4A16", group_size=64)
    dense = load_file(pair.source / "model.safetensors")
    config = json.loads((pair.source / "config.json").read_text())
    attention = schemes.preset("W4A16").with_group_size(64)
    mlp = schemes.preset("W8A16").with_group_size("channel")
    ignore = ["re:.*lm_head.*"]
    first = quantized_tensors(
        {n: t for n, t in dense.items() if ".mlp." not in n},
        schemes.quantization_config([(attention, ["Linear"])], ignore),
    )
    second = quantized_tensors(
        {n: t for n, t in dense.items() if ".mlp." in n}, schemes.quantization_config([(mlp, ["Linear"])], ignore)
    )
    both = schemes.quantization_config([(attention, ["re:.*self_attn.*"]), (mlp, ["re:.*mlp.*"])], ignore)
    save(tmp_path / "mixed", {**first, **second}, {**config, "quantization_config": both})
    record = verify(tmp_path / "mixed", source=pair.source, reload=True)
    assert {c.name: (c.status, c.problems) for c in record.checks if c.status != "passed"} == {}


def test_fused_shards_must_agree(pair: Callable[[str], Pair]) -> None:
    p = pair("w4")
    edit_config(p.quantized, lambda c: c["quantization_config"]["ignore"].append(Q0))
    _dense_tensor(p.quantized)
    problems = outcome(verify(p.quantized, reload=False), "config").problems
    assert any("fuse q_proj/k_proj/v_proj" in x and "q_proj: dense" in x for x in problems)


def test_other_tools_scales_may_have_another_float_dtype(pair: Callable[[str], Pair]) -> None:
    p = pair("fp8")
    (p.quantized / MANIFEST_NAME).unlink()
    shard = Shard(p.quantized / "model.safetensors")
    shard.replace(**{n: t.float() for n, t in shard.tensors().items() if n.endswith("weight_scale")})
    assert outcome(verify(p.quantized, reload=False), "linears").status == "passed"


def test_formats_beyond_the_decoder_are_skipped_not_failed(pair: Callable[[str], Pair]) -> None:
    p = pair("w4")

    def five_bits(config: dict) -> None:  # type: ignore[type-arg]
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 5

    edit_config(p.quantized, five_bits)
    record = verify(p.quantized, reload=True)
    for name in ("linears", "scales", "codes", "reload"):
        assert outcome(record, name).status == "skipped"
    assert "packed int5" in outcome(record, "linears").detail


def test_a_private_file_does_not_keep_the_rest_from_being_checked(pair: Callable[[str], Pair]) -> None:
    """safetensors' own save_file leaves mode 0600, so other tools' checkpoints often have it."""
    p = pair("w4")
    _mode(p.quantized)
    record = verify(p.quantized, reload=True)
    assert [c.name for c in record.checks if c.status == "failed"] == ["files"]
    assert outcome(record, "weights").status == "passed"


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_is_described_not_raised(pair: Callable[[str], Pair], seed: int) -> None:
    """Random bytes of the header (or of a JSON file) replaced: a failed check or a clear error, never a traceback."""
    p = pair("sharded" if seed % 3 == 0 else "w4")
    rng = random.Random(seed)
    if seed % 3 == 0:
        target = p.quantized / "model.safetensors.index.json"
    else:
        target = p.quantized / ("config.json" if seed % 3 == 1 else "model.safetensors")
    original = target.read_bytes()
    data = bytearray(original)
    for _ in range(rng.choice([1, 3, 10])):
        data[rng.randrange(min(len(data), 5000))] = rng.choice(b'0123456789",:{}[]ax\xff\x00')
    target.write_bytes(bytes(data))
    try:
        record = verify(p.quantized, source=p.source, reload=False)
    except CheckpointError:
        return
    if record.passed and bytes(data) != original:  # only where what is left means the same, or is another valid config
        assert target.suffix == ".json"
        if target.name != "config.json":
            assert json.loads(data)["weight_map"] == json.loads(original)["weight_map"]


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": []},
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": 3}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": [1]}}}},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"dtype": 5},
    ],
)
def test_configs_of_the_wrong_type(pair: Callable[[str], Pair], change: dict[str, object]) -> None:
    p = pair("w4")
    edit_config(p.quantized, lambda c: c.update(change))
    record = verify(p.quantized, reload=True)
    assert not record.passed or "dtype" in change


class TestInputErrors:
    def test_a_dense_checkpoint(self, made: dict[str, Pair]) -> None:
        with pytest.raises(CheckpointError, match="the checkpoint is dense: there is nothing to verify"):
            verify(made["w4"].source)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such folder"):
            verify(tmp_path / "absent")

    def test_only_pickles(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match="only pickle files"):
            verify(tmp_path)

    def test_another_format(self, pair: Callable[[str], Pair]) -> None:
        p = pair("w4")
        edit_config(p.quantized, lambda c: c.update(quantization_config={"quant_method": "aqlm", "bits": 4}))
        with pytest.raises(CheckpointError, match="quantised with 'aqlm'"):
            verify(p.quantized)

    def test_a_broken_source(self, pair: Callable[[str], Pair], tmp_path: Path) -> None:
        p = pair("w4")
        shutil.copytree(p.source, tmp_path / "source")
        _truncate(tmp_path / "source")
        with pytest.raises(CheckpointError, match="truncated"):
            verify(p.quantized, source=tmp_path / "source")


def test_an_unwritable_folder_is_said(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, record: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("halfbyte.verifier.write_json", refuse)
    record = verify(pair("w4").quantized, reload=False)
    assert record.passed
    assert outcome(record, "record").detail == "verify.json could not be written: Permission denied"


class TestCommand:
    def test_a_table_and_success(self, pair: Callable[[str], Pair]) -> None:
        p = pair("w4")
        result = CliRunner().invoke(command, [str(p.quantized), "--source", str(p.source), "--no-reload"])
        assert result.exit_code == 0, result.output
        assert "relative error: mean" in result.stdout
        assert "not wanted (--no-reload)" in result.stdout

    def test_json_and_the_failed_gate(self, pair: Callable[[str], Pair]) -> None:
        p = pair("w4")
        _flip_copy(p.quantized)
        result = CliRunner().invoke(command, [str(p.quantized), "--source", str(p.source), "--no-reload", "--json"])
        assert isinstance(result.exception, GateFailed)
        assert result.exception.exit_status == 1
        assert "model.safetensors has changed" in str(result.exception)
        record = json.loads(result.stdout)
        assert not record["passed"]
        assert [c["name"] for c in record["checks"] if c["status"] == "failed"] == ["files", "copies"]
