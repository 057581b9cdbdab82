"""Writing a checkpoint whose every byte has its place before the first one is computed.

The plan knows the name, shape and dtype of each tensor that will be written, so the shards' headers are written first,
the files are allocated at full size (a full disk shows at once), and each tensor is written to its final offset when
it is ready. An interrupted run leaves complete headers and some unwritten ranges; writing the same tensors again gives
the same file. Nothing is buffered beyond the tensor at hand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.checkpoint.reader import (
    DTYPE_NAMES,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    TensorInfo,
    bytes_of,
    companion_name,
    digest_of,
    element_bytes,
)
from halfbyte.errors import OutputError
from halfbyte.records import write_json

MAX_SHARD_BYTES = 5 * 10**9
COPY_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor to be written: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        n = element_bytes(self.dtype)
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True, slots=True)
class Layout:
    """The shards of a checkpoint and the place of every tensor in them."""

    shards: dict[str, list[TensorInfo]]
    tensors: dict[str, TensorInfo]

    @staticmethod
    def of(specs: Sequence[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> Layout:
        """Deal tensors to shards in the order given; a shard is closed before it would exceed the limit.

        Inside a shard, tensors are laid out by descending element size, then in the order given, so that each starts
        at a multiple of its element size (the header is padded to 8 bytes).
        """
        bins: list[list[TensorSpec]] = [[]]
        used = 0
        for spec in specs:
            if bins[-1] and used + spec.size_bytes > max_shard_bytes:
                bins.append([])
                used = 0
            bins[-1].append(spec)
            used += spec.size_bytes
        shards: dict[str, list[TensorInfo]] = {}
        for i, content in enumerate(bins):
            file = SINGLE_NAME if len(bins) == 1 else f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors"
            ordered = sorted(content, key=lambda s: -element_bytes(s.dtype))
            start = len(_header(ordered))
            infos = []
            for s in ordered:
                infos.append(
                    TensorInfo(
                        name=s.name, dtype=s.dtype, shape=s.shape, file=file, offset=start, size_bytes=s.size_bytes
                    )
                )
                start += s.size_bytes
            shards[file] = infos
        return Layout(shards=shards, tensors={t.name: t for infos in shards.values() for t in infos})

    @property
    def size_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors.values())

    def create(self, folder: Path) -> None:
        """Write headers and the index, and allocate every shard at its full size.

        Raises:
            OutputError: the disk is too small or the folder cannot be written.
        """
        for file, infos in self.shards.items():
            header = _header([TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in infos])
            total = infos[-1].offset + infos[-1].size_bytes if infos else len(header)
            try:
                with open(folder / file, "wb") as f:
                    f.write(header)
                    f.flush()
                    allocate(f.fileno(), total)
                os.chmod(folder / file, 0o644)
            except OSError as e:
                raise write_error(e, folder / file, self.size_bytes) from None
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_size": self.size_bytes},
                "weight_map": {name: self.tensors[name].file for name in sorted(self.tensors)},
            }
            try:
                write_json(folder / INDEX_NAME, index)
            except OSError as e:
                raise write_error(e, folder / INDEX_NAME, self.size_bytes) from None

    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors to their places. Shapes and dtypes must be those announced."""
        for name, tensor in tensors.items():
            info = self.tensors[name]
            if tuple(tensor.shape) != info.shape or DTYPE_NAMES[tensor.dtype] != info.dtype:
                raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was announced as {info}")
            self._write_at(folder, info, 0, bytes_of(tensor.cpu()))

    def copy(self, folder: Path, source: Checkpoint, name: str, stop: threading.Event | None = None) -> str:
        """Copy one tensor's bytes from the source under its own name, in chunks; returns their sha256.

        Raises:
            CancelledError: ``stop`` was set meanwhile.
        """
        origin, info = source.tensors[name], self.tensors[name]
        if origin.slab is not None:
            part = source.read(name)
            self._write_at(folder, info, 0, bytes_of(part))
            return digest_of(part)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(COPY_CHUNK_BYTES, origin.size_bytes)))
        with open(source.path / origin.file, "rb", buffering=0) as f:
            f.seek(origin.offset)
            done = 0
            while done < origin.size_bytes:
                if stop is not None and stop.is_set():
                    raise CancelledError
                count = f.readinto(buffer[: origin.size_bytes - done])
                if not count:
                    raise OutputError(f"source file ends inside tensor {name}", where=str(source.path / origin.file))
                digest.update(buffer[:count])
                self._write_at(folder, info, done, buffer[:count])
                done += count
        return digest.hexdigest()

    def _write_at(self, folder: Path, info: TensorInfo, start: int, data: memoryview) -> None:
        try:
            descriptor = os.open(folder / info.file, os.O_WRONLY)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], info.offset + start + done)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise write_error(e, folder / info.file, self.size_bytes) from None

    def sync(self, folder: Path) -> None:
        """Make everything written so far durable."""
        for file in self.shards:
            descriptor = os.open(folder / file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as e:
                raise write_error(e, folder / file, self.size_bytes) from None
            finally:
                os.close(descriptor)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """The length prefix and JSON header of a safetensors file, padded with spaces to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for s in specs:
        entries[s.name] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [start, start + s.size_bytes]}
        start += s.size_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def allocate(descriptor: int, size: int) -> None:
    """Reserve ``size`` bytes; where the file system cannot reserve, extend the file (it is then sparse)."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        os.ftruncate(descriptor, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copy companions into a checkpoint, for everybody to read."""
    for file in files:
        target = folder / companion_name(file)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
        target.chmod(0o644)


def write_error(error: OSError, path: Path, needed_bytes: int) -> OutputError:
    """An OSError while writing, in words with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            "the disk is full" + (f": {needed_bytes / 1e9:.2f} GB are needed there" if needed_bytes else ""),
            where=str(path),
            why=os.strerror(error.errno),
            remedy="Free space or choose another folder, then run again.",
        )
    return OutputError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        remedy="Choose a folder that you may write to.",
    )
