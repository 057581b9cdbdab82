"""Records through JSON and back, what is refused on reading, and writing without halves."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from halfbyte import records
from halfbyte.errors import CheckpointError
from halfbyte.records import (
    CalibrationRecord,
    Check,
    CompareRecord,
    ConvertRecord,
    DeployRecord,
    EndToEndRecord,
    Estimate,
    LinearRecord,
    Manifest,
    MixedPlan,
    PairRecord,
    Plan,
    RequantizedRecord,
    Sensitivity,
    SmoothingRecord,
    TensorPlan,
    TuningRecord,
    UnitSensitivity,
    VerifyRecord,
    WindowSums,
    read_json,
    read_record,
    to_json,
    write_json,
)

TENSOR = TensorPlan(
    name="model.layers.0.mlp.down_proj.weight",
    action="quantize",
    shape=[64, 128],
    dtype="BF16",
    bytes_before=16384,
    bytes_after=4224,
    block=0,
    scheme="W4A16",
    group_size=128,
    bits_per_weight=4.125,
)
COPIED = TensorPlan(
    name="lm_head.weight", action="copy", shape=[], dtype="F32", bytes_before=4, bytes_after=4, reason="outside"
)
ESTIMATE = Estimate(value=2.0, unit="bytes", how="added up", parts={"a": 0.5, "b": 1.5})
LINEAR = LinearRecord(
    name="model.layers.0.mlp.down_proj",
    block=0,
    scheme="W4A16",
    group_size=None,
    method="gptq",
    bits_per_weight=4.125,
    relative_error=0.1 + 0.2,
    damp_fraction=0.1,
    damp_raises=1,
    tokens=4096,
    dead_columns=3,
)
CALIBRATION = CalibrationRecord(
    spec="text:fähre.txt", samples=8, tokens=4096, seq_len=512, seed=7, sha256="ab" * 32, description="“prose”"
)
SMOOTHED = SmoothingRecord(norm="a.norm.weight", offset=1.0, linears=["a.q", "a.k"], strength=0.5)
PAIR = PairRecord(source="a.up", linears=["a.down"], strength=0.5, channels="0-1", factors="AACAPwAAAEA=")
REQUANTIZED = RequantizedRecord(name="a.b", grid="int4", relative_error=0.125)
TUNED = TuningRecord(block=3, loss_before=0.25, loss_after=0.125, kept=True, norms=["a.norm.weight"])
TOGETHER = EndToEndRecord(steps=56, kl_before=0.125, kl_after=0.0625, kept=True)
MIXED = MixedPlan(
    target_bits=4.5, lowest_bits=4.125, highest_bits=8.125, wider="W8A16", units=4, sequences=4, tokens=1024
)
UNIT = UnitSensitivity(
    linears=["a.q", "a.k"], block=1, kl_nats=1e-5, scheme="W8A16", group_size=None, bits_per_weight=8.125
)
SENSITIVITY = Sensitivity(target_bits=4.5, bits_per_weight=4.49, sequences=4, tokens=1000, positions=256, units=[UNIT])
WINDOW_SUMS = WindowSums(tokens=100, kl=0.5, nll_base=300.0, nll=310.5, agreements=90)
CHECK = Check(name="names", status="failed", detail="1 of 2", problems=["model.norm.weight: absent"])
EVERY: list[Any] = [
    TENSOR,
    COPIED,
    ESTIMATE,
    LINEAR,
    CALIBRATION,
    SMOOTHED,
    PAIR,
    TUNED,
    TOGETHER,
    MIXED,
    UNIT,
    SENSITIVITY,
    CHECK,
    Plan(
        source="org/model",
        architecture="LlamaForCausalLM",
        block_prefix="model.layers",
        num_blocks=1,
        scheme="W4A16 g128",
        method="gptq",
        tensors=[TENSOR, COPIED],
        quantized_parameters=8192,
        copied_parameters=1,
        bits_per_weight=4.125,
        bits_per_parameter=4.2,
        bytes_before=16388,
        bytes_after=4228,
        estimates={"peak_memory": ESTIMATE},
        problems=["one"],
        notes=[],
        mixed=MIXED,
    ),
    Manifest(
        format_version=1,
        source={"name": "org/model", "sha256": "00" * 32},
        recipe={"groups": [{"scheme": "W4A16", "group_size": None}], "seed": None},
        calibration=CALIBRATION,
        linears=[LINEAR],
        bits_per_weight=4.125,
        bytes_before=2,
        bytes_after=1,
        files={"model.safetensors": "11" * 32},
        versions={"torch": "2.13.0"},
        smoothing=[SMOOTHED],
        pairs=[PAIR],
        tuning=[TUNED],
        end_to_end=TOGETHER,
        sensitivity=SENSITIVITY,
        run={"seconds": 1.5, "hosts": ["a"]},
    ),
    Manifest(
        format_version=1,
        source={},
        recipe={},
        calibration=None,
        linears=[],
        bits_per_weight=8.0,
        bytes_before=2,
        bytes_after=1,
        files={},
        versions={},
    ),
    VerifyRecord(
        checkpoint="out", source=None, passed=False, checks=[CHECK], tensors=2, bytes_read=10, versions={"a": "1"}
    ),
    CompareRecord(
        base="org/model",
        checkpoint="out",
        text="text.txt",
        text_sha256="22" * 32,
        tokens=100,
        window=512,
        metrics={"kl_mean_nats": 1e-300, "ratio": 1.0},
        versions={},
        by_window=[WINDOW_SUMS],
    ),
    WINDOW_SUMS,
    REQUANTIZED,
    ConvertRecord(
        format_version=1,
        source={"name": "a", "format": "awq", "sha256": "33" * 32},
        target="gptq",
        sha256="44" * 32,
        tensors=3,
        quantized=2,
        grids={"int4": 2},
        exact=1,
        requantized=[REQUANTIZED],
        notes=["so"],
        versions={"a": "1"},
        run={"seconds": 0.5},
    ),
    DeployRecord(
        target="kserve",
        name="a",
        source="org/A",
        format="dense",
        engine="vllm",
        port=8080,
        context=4096,
        estimates={"memory": Estimate(value=3.0, unit="bytes", how="so", parts={"a": 1.0, "b": 2.0})},
        files={"README.md": "55" * 32},
        notes=["so"],
    ),
]


def test_every_record_type_is_covered() -> None:
    kinds = {v for v in vars(records).values() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    assert {type(r) for r in EVERY} == kinds


@pytest.mark.parametrize("record", EVERY, ids=lambda r: type(r).__name__)
def test_records_come_back_as_they_were(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, record)
    again = read_record(type(record), path)
    assert again == record
    assert to_json(again) == path.read_text(encoding="utf-8")
    assert list(json.loads(path.read_text())) == [f.name for f in dataclasses.fields(record)]


def test_whole_numbers_are_read_as_floats_where_floats_belong(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text('{"value": 3, "unit": "bytes", "how": "", "parts": {"a": 3}}')
    read = read_record(Estimate, path)
    assert isinstance(read.value, float)
    assert isinstance(read.parts["a"], float)


@pytest.mark.parametrize("record", EVERY, ids=lambda r: type(r).__name__)
def test_unknown_fields_are_named(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(dataclasses.asdict(record) | {"zeal": 1, "extra": 2}))
    kind = type(record).__name__
    with pytest.raises(CheckpointError) as caught:
        read_record(type(record), path)
    assert str(caught.value) == f"{path}: is not a {kind} record: unknown fields extra, zeal in {kind}."


def test_unknown_fields_deeper_down_are_named(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    plain = dataclasses.asdict(next(r for r in EVERY if isinstance(r, Plan)))
    plain["tensors"][1]["colour"] = "red"
    path.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="is not a Plan record: unknown fields colour in TensorPlan"):
        read_record(Plan, path)


@pytest.mark.parametrize("record", EVERY, ids=lambda r: type(r).__name__)
def test_missing_fields_are_named(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    first = dataclasses.fields(record)[0].name
    plain = dataclasses.asdict(record)
    del plain[first]
    path.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=f"is not a {type(record).__name__} record.*{first}"):
        read_record(type(record), path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', '{"checks": 3}'])
def test_other_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="is not a VerifyRecord record"):
        read_record(VerifyRecord, path)


def test_malformed_json_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n  "a": 1,\n  b\n}')
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(caught.value) == (
        f"{path}: not valid JSON at line 3, column 3: Expecting property name enclosed in double quotes. "
        "Repair the file or download it again."
    )


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json: the file is missing"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "latin.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_writing_leaves_one_file_that_everybody_may_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_json(tmp_path / "a.json", {"b": 1})
        write_json(tmp_path / "a.json", {"b": 2})
    finally:
        os.umask(before)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 2\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_refused_before_writing(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"b": value})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"b": 1}


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fsync`` is replaced by a stand-in that reports a full disk: a real one cannot be had in a test."""
    path = tmp_path / "a.json"
    write_json(path, {"b": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"b": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert read_json(path) == {"b": 1}
