"""``convert`` may be killed at any write, or find the disk full: ``--resume`` ends in the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from conftest import Models
from halfbyte.checkpoint.layout import Layout
from halfbyte.conversion import run
from halfbyte.conversion.awq import AwqEncoder
from halfbyte.conversion.coded import CodedWeight
from halfbyte.conversion.source import Entry
from halfbyte.errors import OutputError, ResumeError
from halfbyte.records import CONVERT_NAME, ConvertRecord, read_record
from interrupted import finish, start

KILLED = -signal.SIGKILL
# Little enough that the journal is written after almost every tensor.
OPTIONS: dict[str, Any] = {"to": "awq", "max_shard_bytes": 60_000, "stage_bytes": 10_000}


@pytest.fixture(scope="module")
def source(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "source"
    halfbyte.quantize(tiny_model("llama"), out, scheme="W4A16_ASYM", group_size=32, method="rtn", device="cpu")
    return out


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finish(start(source, out, **OPTIONS)) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    record = json.loads(found.pop(CONVERT_NAME))
    del record["run"]
    return found | {CONVERT_NAME: json.dumps(record).encode()}


def writes_of(source: Path, folder: Path) -> int:
    log = folder / "writes"
    assert finish(start(source, folder / "counted", trap=("count", 0, log), **OPTIONS)) == 0
    return len(log.read_text().splitlines())


def test_killed_or_torn_at_any_write(source: Path, whole: Path, tmp_path: Path) -> None:
    count = writes_of(source, tmp_path)
    assert count > 60
    resumed = 0
    for number in range(0, count, max(1, count // 12)):
        out = tmp_path / "out"
        kind = ("kill", "tear")[number % 2]
        assert finish(start(source, out, trap=(kind, number), **OPTIONS)) == KILLED
        partial = out.with_name("out.partial")
        assert not out.exists() or not (partial / "checkpoint").exists()
        again = partial.exists() and not (out.exists() and not (partial / "checkpoint").exists())
        resumed += again
        assert finish(start(source, out, resume=partial.exists(), **OPTIONS)) == 0
        assert contents(out) == contents(whole), f"{kind} at write {number}"
        shutil.rmtree(out)
    assert resumed > 6


@pytest.mark.parametrize(("processors", "held"), [(1, 1 << 30), (4, 1 << 30), (4, 1)])
def test_threads_change_no_byte_and_keep_to_the_memory_that_they_have(
    processors: int, held: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tensors at a time as processors, one where there is room for one; torch keeps its threads."""
    at_once, most, lock, encode = 0, 0, threading.Lock(), AwqEncoder.encode

    def counted(self: AwqEncoder, entry: Entry, weight: CodedWeight) -> dict[str, torch.Tensor]:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        try:
            return encode(self, entry, weight)
        finally:
            with lock:
                at_once -= 1

    before = torch.get_num_threads()
    torch.set_num_threads(processors)
    try:
        monkeypatch.setattr(AwqEncoder, "encode", counted)
        monkeypatch.setattr(run, "HELD_BYTES", held)
        halfbyte.convert(source, tmp_path / "out", to="awq", max_shard_bytes=OPTIONS["max_shard_bytes"])
        assert torch.get_num_threads() == processors
    finally:
        torch.set_num_threads(before)
    assert most == (1 if held == 1 else processors)
    assert contents(tmp_path / "out") == contents(whole)


def test_an_error_in_one_thread_ends_the_run_which_can_be_resumed(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = 0, Layout.write

    def failing(self: Layout, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal written
        written += 1
        if written == 7:
            raise OutputError("the disk has had enough")
        write(self, folder, tensors)

    options = {key: OPTIONS[key] for key in ("to", "max_shard_bytes")}
    with monkeypatch.context() as patched:
        patched.setattr(Layout, "write", failing)
        with pytest.raises(OutputError, match="had enough"):
            halfbyte.convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    halfbyte.convert(source, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_write_that_fails_behind_a_sync_in_mid_run_is_told(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are synced beside the writing, over and over; the kernel tells only one of these calls that it failed: here
    the first that comes from the thread beside, while all but what each writer wrote first is still to be written."""
    failed, local, later = threading.Event(), threading.local(), 0
    sync, write = Layout.sync, Layout.write

    def failing(self: Layout, folder: Path) -> None:
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise OutputError("the disk lost a page")
        sync(self, folder)

    def waiting(self: Layout, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal later
        if getattr(local, "wrote", False):
            assert failed.wait(60)
            later += 1
        local.wrote = True
        write(self, folder, tensors)

    options = {key: OPTIONS[key] for key in ("to", "max_shard_bytes")}
    with monkeypatch.context() as patched:
        patched.setattr(Layout, "sync", failing)
        patched.setattr(Layout, "write", waiting)
        with pytest.raises(OutputError, match="lost a page"):
            halfbyte.convert(source, tmp_path / "out", **options)
    assert failed.is_set()
    assert later > 0
    assert not (tmp_path / "out").exists()
    halfbyte.convert(source, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(whole)


def test_killed_again_and_again(source: Path, whole: Path, tmp_path: Path) -> None:
    out, kills = tmp_path / "out", 0
    while finish(start(source, out, resume=kills > 0, trap=("kill", 25), **OPTIONS)) == KILLED:
        kills += 1
        assert kills < 60
    assert kills > 2
    assert contents(out) == contents(whole)


def test_the_disk_is_full(source: Path, whole: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    count = writes_of(source, tmp_path)
    for number in (0, count // 2):
        assert finish(start(source, out, trap=("full", number), said=said, **OPTIONS)) == 1
        assert "the disk is full" in said.read_text()
        assert not out.exists()
        assert finish(start(source, out, resume=True, **OPTIONS)) == 0
        assert contents(out) == contents(whole)
        shutil.rmtree(out)


def test_what_a_run_may_not_be_continued_with(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finish(start(source, out, trap=("kill", 30), **OPTIONS)) == KILLED
    with pytest.raises(OutputError, match="unfinished run"):
        halfbyte.convert(source, out, to="awq")
    with pytest.raises(ResumeError, match='to was "awq", is "gptq"'):
        halfbyte.convert(source, out, to="gptq", resume=True, max_shard_bytes=60_000)
    assert finish(start(source, out, resume=True, **OPTIONS)) == 0
    with pytest.raises(OutputError, match="exists already"):
        halfbyte.convert(source, out, to="awq")
    with pytest.raises(ResumeError, match="there is no unfinished run"):
        halfbyte.convert(source, tmp_path / "other", to="awq", resume=True)
    assert read_record(ConvertRecord, out / CONVERT_NAME).exact == 14
