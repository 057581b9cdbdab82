"""Reading ahead and writing behind, as on a GPU, made to happen on the CPU: the same bytes, and no error is lost."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Models
from halfbyte import blocks, pipeline, quantize
from halfbyte.checkpoint.layout import Layout
from halfbyte.checkpoint.reader import Checkpoint, open_checkpoint
from halfbyte.errors import ArchitectureError, OutputError
from halfbyte.gpu import full_float32, to_host, works_ahead
from halfbyte.read_ahead import ReadAhead
from halfbyte.weights import Weights

CPU = torch.device("cpu")
WORK = {"group_size": 32, "calibration": "random-tokens", "samples": 4, "seq_len": 32}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, pipeline):
        monkeypatch.setattr(module, "works_ahead", lambda _: True)


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_cpu_does_not_work_ahead() -> None:
    assert not works_ahead(CPU)
    assert works_ahead(torch.device("cuda"))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_working_ahead_ends_in_the_same_bytes(
    method: str, tiny_model: Models, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = tiny_model("llama", num_hidden_layers=3)
    work = WORK if method == "gptq" else {"group_size": 32}
    plain = quantize(source, tmp_path / "plain", method=method, **work)
    request.getfixturevalue("ahead")
    overlapped = quantize(source, tmp_path / "ahead", method=method, **work)
    assert digest(tmp_path / "plain") == digest(tmp_path / "ahead")
    assert overlapped.source == plain.source
    assert [r.name for r in overlapped.linears] == [r.name for r in plain.linears]


@pytest.mark.usefixtures("ahead")
def test_what_fails_while_writing_behind_stops_the_run_and_it_resumes(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny_model("llama", num_hidden_layers=3), tmp_path / "out"
    write, full = Layout.write, OutputError("the disk is full", where="somewhere")

    def failing(self: Layout, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        if any(".layers.1." in name for name in tensors):
            raise full
        write(self, folder, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "write", failing)
        with pytest.raises(OutputError, match="the disk is full") as raised:
            quantize(source, out, **WORK)
    assert "continues after 1 finished block." in raised.value.remedy
    quantize(source, out, resume=True, **WORK)
    quantize(source, tmp_path / "whole", **WORK)
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize("offload", [False, True])
def test_a_stage_is_saved_while_the_next_block_is_worked_on(
    offload: bool, tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = tiny_model("llama", num_hidden_layers=3), {**WORK, "samples": 64, "offload": offload}
    plain = quantize(source, tmp_path / "plain", **work)
    assert plain.tuning, "two batches are enough to tune by"
    reached, found, sync, aim = threading.Event(), [], Layout.sync, pipeline.Stream.aim

    def waiting(self: Layout, folder: Path) -> None:
        found.append(len(found) != 1 or reached.wait(60))  # the second is that of block 0
        sync(self, folder)

    def reaching(self: pipeline.Stream, block: torch.nn.Module, index: int) -> None:
        aim(self, block, index)
        if index == 1:
            reached.set()

    monkeypatch.setattr(Layout, "sync", waiting)
    monkeypatch.setattr(pipeline.Stream, "aim", reaching)
    quantize(source, tmp_path / "out", **work)
    assert len(found) == 4
    assert all(found), "block 1 was not begun before block 0 was saved"
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")


def test_a_block_read_ahead_is_the_block(tiny_model: Models) -> None:
    checkpoint = open_checkpoint(tiny_model("llama", num_hidden_layers=3))
    read: list[str] = []

    def counted(name: str) -> torch.Tensor:
        read.append(name)
        return Weights.of(checkpoint).dense(name)

    model = blocks.StreamedModel.of(Weights.of(checkpoint), CPU)
    assert model.ahead is None
    model.ahead = ReadAhead.onto(counted, CPU, torch.float32)
    for index in (0, 1, 0, 2):  # 0 is not what follows 1, so what was fetched is of no use
        with model.block(index) as block:
            for name, parameter in block.named_parameters():
                stored = Weights.of(checkpoint).dense(model.disk_name(index, name))
                assert torch.equal(parameter, stored.float()), name
        model.ahead._thread.submit(bool).result()  # all that was asked for is read, also where the machine is busy
    assert {n.split(".")[2] for n in read} == {"1", "2"}
    assert model.ahead.take("model.layers.1.mlp.up_proj.weight") is None


def test_an_error_while_reading_ahead_is_raised_where_the_tensor_is_needed() -> None:
    def fail(name: str) -> torch.Tensor:
        raise OSError(f"cannot read {name}")

    ahead = ReadAhead.onto(fail, CPU, torch.float32)
    ahead.ask(["a"])
    with pytest.raises(OSError, match="cannot read a"):
        ahead.take("a")
    assert ahead.take("a") is None


def test_tensors_on_the_cpu_stay_as_they_are() -> None:
    x = torch.ones(3)
    assert to_host(x) is x
    before = torch.get_float32_matmul_precision()
    with full_float32(CPU):
        assert torch.get_float32_matmul_precision() == before


def test_float32_is_kept_whole_on_a_gpu_and_given_back() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_is_not_quantised_is_copied_while_the_model_is_built(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, copy, build = threading.Event(), Layout.copy, blocks.build_on_meta

    def copied(*given: Any, **more: Any) -> str:
        copying.set()
        return copy(*given, **more)

    def built(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.nn.Module:
        assert copying.wait(60)
        return build(checkpoint, dtype)

    monkeypatch.setattr(Layout, "copy", copied)
    monkeypatch.setattr(blocks, "build_on_meta", built)
    quantize(tiny_model("llama"), tmp_path / "out", **WORK)


def test_a_disk_that_fills_while_copying_leaves_nothing(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> str:
        raise OutputError("the disk is full", where="somewhere")

    monkeypatch.setattr(Layout, "copy", failing)
    with pytest.raises(OutputError, match="the disk is full"):
        quantize(tiny_model("llama"), tmp_path / "out", **WORK)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_built_does_not_wait_for_all_copies(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, copied = threading.Event(), []

    def slow(self: Layout, folder: Path, source: Checkpoint, name: str, stop: threading.Event) -> str:
        copied.append(name)
        copying.set()
        assert stop.wait(60)
        raise CancelledError

    def failing(*_: object) -> torch.nn.Module:
        assert copying.wait(60)
        raise ArchitectureError("no such architecture", where="somewhere")

    monkeypatch.setattr(Layout, "copy", slow)
    monkeypatch.setattr(blocks, "build_on_meta", failing)
    with pytest.raises(ArchitectureError, match="no such architecture"):
        quantize(tiny_model("llama"), tmp_path / "out", **WORK)
    assert len(copied) == 1
    assert list(tmp_path.iterdir()) == []
