"""Files written range by range: read back by the safetensors library, byte by byte, and full disks in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.layout import Layout, TensorSpec
from halfbyte.checkpoint.reader import DTYPE_NAMES, DTYPES, TensorInfo, element_bytes, open_checkpoint
from halfbyte.errors import OutputError
from halfbyte.records import read_json

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, a scalar, an empty tensor, names that are not ASCII."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (3 + i, 5 * dtype.itemsize), generator=generator)
        made[f"model.{name}"] = raw.to(torch.uint8).view(dtype)
    made["scalar"] = torch.tensor(3.5)
    made["empty"] = torch.empty(0, 4, dtype=torch.bfloat16)
    made["größe"] = torch.arange(7, dtype=torch.int8)
    return made


def specs(of: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=n, dtype=DTYPE_NAMES[t.dtype], shape=tuple(t.shape)) for n, t in of.items()]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def written(folder: Path, of: dict[str, torch.Tensor], limit: int) -> Layout:
    layout = Layout.of(specs(of), limit)
    layout.create(folder)
    for name in reversed(of):  # the order of writing is free
        layout.write(folder, {name: of[name]})
    layout.sync(folder)
    return layout


def assert_holds(folder: Path, of: dict[str, torch.Tensor]) -> None:
    found: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}
            for name in f.keys():  # noqa: SIM118
                assert name not in found
                t = f.get_tensor(name)
                assert t.dtype == of[name].dtype
                assert t.shape == of[name].shape
                found[name] = raw(t)
    assert found == {n: raw(t) for n, t in of.items()}


@pytest.mark.parametrize("limit", [10**9, 400, 64, 1])
def test_the_library_reads_what_was_written(limit: int, tmp_path: Path) -> None:
    of = tensors()
    layout = written(tmp_path, of, limit)
    assert_holds(tmp_path, of)
    assert layout.size_bytes == sum(len(raw(t)) for t in of.values())
    for file, infos in layout.shards.items():
        held = sum(t.size_bytes for t in infos)
        assert held <= limit or sum(t.size_bytes > 0 for t in infos) == 1, file
    if limit == 10**9:
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        return
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = read_json(tmp_path / INDEX)
    assert index["metadata"]["total_size"] == layout.size_bytes
    assert set(index["weight_map"]) == set(of)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as f:
            assert name in f.keys()  # noqa: SIM118
    assert (tmp_path / INDEX).stat().st_mode & 0o777 == 0o644


def test_our_reader_agrees(tmp_path: Path) -> None:
    of = tensors()
    layout = written(tmp_path, of, 200)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors == layout.tensors
    for name, t in of.items():
        again = checkpoint.read(name)
        assert again.dtype == t.dtype
        assert again.shape == t.shape
        assert raw(again) == raw(t)


@pytest.mark.parametrize("limit", [10**9, 200])
def test_headers_and_offsets_are_aligned(limit: int, tmp_path: Path) -> None:
    layout = written(tmp_path, tensors(), limit)
    for file, infos in layout.shards.items():
        data = (tmp_path / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert (8 + length) % 8 == 0
        header = json.loads(data[8 : 8 + length])
        end = 0
        for info in infos:
            start, stop = header[info.name]["data_offsets"]
            assert info.offset == 8 + length + start
            assert info.offset % element_bytes(info.dtype) == 0
            assert start == end  # without holes
            end = stop
        assert len(data) == 8 + length + end


def test_files_are_readable_by_everybody(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        written(tmp_path, tensors(), 200)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    of = {
        "a": torch.zeros(10, dtype=torch.uint8),
        "large": torch.arange(100, dtype=torch.uint8),
        "b": torch.ones(10, dtype=torch.uint8),
        "c": torch.full((10,), 2, dtype=torch.uint8),
    }
    layout = written(tmp_path, of, 50)
    assert [[t.name for t in infos] for infos in layout.shards.values()] == [["a"], ["large"], ["b", "c"]]
    assert_holds(tmp_path, of)


def test_a_shard_may_be_exactly_full() -> None:
    layout = Layout.of([TensorSpec(name=n, dtype="U8", shape=(25,)) for n in "abcd"], 50)
    assert [[t.name for t in infos] for infos in layout.shards.values()] == [["a", "b"], ["c", "d"]]


def test_space_is_taken_before_anything_is_computed(tmp_path: Path) -> None:
    layout = Layout.of([TensorSpec(name="a", dtype="F32", shape=(1000, 1000))])
    layout.create(tmp_path)
    stat = (tmp_path / "model.safetensors").stat()
    assert stat.st_size == layout.tensors["a"].offset + 4_000_000
    assert stat.st_blocks * 512 >= 4_000_000
    with safe_open(tmp_path / "model.safetensors", framework="pt") as f:
        assert (f.get_tensor("a") == 0).all()


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    of = tensors()
    layout = written(tmp_path, of, 200)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    layout.write(tmp_path, of)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    turned = torch.arange(12, dtype=torch.int32).reshape(3, 4).T
    written(tmp_path, {"turned": turned}, 10**9)
    assert_holds(tmp_path, {"turned": turned.contiguous()})


@pytest.mark.parametrize("given", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16)])
def test_what_was_not_announced_is_not_written(given: torch.Tensor, tmp_path: Path) -> None:
    layout = Layout.of([TensorSpec(name="a", dtype="F32", shape=(2, 3))])
    layout.create(tmp_path)
    with pytest.raises(AssertionError, match=r"^a: .* was announced as"):
        layout.write(tmp_path, {"a": given})


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_copies_are_byte_for_byte_and_hashed(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.checkpoint.layout.COPY_CHUNK_BYTES", chunk)
    of = tensors()
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    save_file(of, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    source = open_checkpoint(tmp_path / "source")
    layout = Layout.of(specs(of), 300)
    layout.create(tmp_path / "out")
    for name, t in of.items():
        assert layout.copy(tmp_path / "out", source, name) == hashlib.sha256(raw(t)).hexdigest()
    assert_holds(tmp_path / "out", of)


def test_a_copy_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    save_file({"a": torch.arange(1.0, 101.0)}, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    source, stop, write = open_checkpoint(tmp_path / "source"), threading.Event(), Layout._write_at
    layout = Layout.of([TensorSpec(name="a", dtype="F32", shape=(100,))])
    layout.create(tmp_path / "out")

    def once(self: Layout, folder: Path, info: TensorInfo, start: int, data: memoryview) -> None:
        write(self, folder, info, start, data)
        stop.set()

    monkeypatch.setattr("halfbyte.checkpoint.layout.COPY_CHUNK_BYTES", 40)
    monkeypatch.setattr(Layout, "_write_at", once)
    with pytest.raises(CancelledError):
        layout.copy(tmp_path / "out", source, "a", stop)
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [*range(1, 11), *[0] * 90]


def test_a_source_that_shrinks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    file = tmp_path / "source" / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    (tmp_path / "source" / "config.json").write_text("{}")
    source = open_checkpoint(tmp_path / "source")
    layout = Layout.of([TensorSpec(name="a", dtype="F32", shape=(100,))])
    layout.create(tmp_path / "out")
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(OutputError, match=r"model\.safetensors: source file ends inside tensor a"):
        layout.copy(tmp_path / "out", source, "a")


def refuse(code: int) -> Callable[..., int]:
    """A stand-in for a system call that fails: a disk is not filled in a test."""

    def call(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


SPEC = TensorSpec(name="a", dtype="F32", shape=(1000, 250))


def test_a_disk_too_small_shows_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(OutputError) as caught:
        Layout.of([TensorSpec(name="a", dtype="F32", shape=(50_000, 50_000))]).create(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'}: the disk is full: 10.00 GB are needed there "
        "(No space left on device). Free space or choose another folder, then run again."
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_later(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of([SPEC])
    layout.create(tmp_path)
    monkeypatch.setattr(os, "pwrite", refuse(code))
    with pytest.raises(OutputError, match="the disk is full") as caught:
        layout.write(tmp_path, {"a": torch.zeros(1000, 250)})
    assert os.strerror(code) in str(caught.value)


def test_other_failures_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of([SPEC])
    layout.create(tmp_path)
    monkeypatch.setattr(os, "pwrite", refuse(errno.EIO))
    with pytest.raises(OutputError) as caught:
        layout.write(tmp_path, {"a": torch.zeros(1000, 250)})
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'}: cannot be written: Input/output error. "
        "Choose a folder that you may write to."
    )


def test_an_index_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of([TensorSpec(name=n, dtype="U8", shape=(10,)) for n in "ab"], 10)
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"index\.json: the disk is full"):
        layout.create(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_that_cannot_reserve(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(code))
    of = tensors()
    written(tmp_path, of, 10**9)
    assert_holds(tmp_path, of)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:3]), offset))
    of = tensors()
    written(tmp_path, of, 200)
    assert_holds(tmp_path, of)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        Layout.of([SPEC]).create(tmp_path / "absent")
