"""GGUF files: header and metadata, lazily read tensors, and files written tensor by tensor at fixed places.

A file is magic, version, two counts, metadata (key, type, value), then one entry a tensor (name, dimensions, type,
offset) and, from the next multiple of the alignment on, the tensors' bytes. Dimensions are stored the innermost first;
here shapes are rows first, as everywhere else. Source: ggml's ``docs/gguf.md``.

Reading checks counts, lengths, types, offsets and ends against the size of the file before it believes them. A model
that is split over several files (``...-00001-of-00003.gguf``) is read as one. Metadata are written by the gguf package,
which also knows the sizes of blocks. Does not cover: big-endian files, version 1.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from halfbyte.checkpoint.layout import allocate, write_error
from halfbyte.checkpoint.reader import bytes_of
from halfbyte.errors import CheckpointError, MissingDependencyError

MAGIC = b"GGUF"
ALIGNMENT = 32
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
INSTALL = "Install it with: pip install 'halfbyte[llamacpp]'."

# Value types of metadata, by their number in the file: struct's letter for scalars.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_CHUNK_ELEMENTS = 1 << 24  # decoded at a time; in float32 this is 64 MiB


def library() -> Any:
    """The gguf package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError("GGUF files need the package gguf", remedy=INSTALL) from None
    return gguf


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where one tensor's bytes are. ``kind`` is ggml's name of its type, ``shape`` has the rows first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened GGUF file, or all files of a split one.

    Attributes:
        path: the (first) file.
        metadata: values by key; arrays are lists.
        tensors: by name, in the order of the files.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def raw(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor's bytes, uint8 ``[rows, bytes a row]``, or those of its part ``index`` along the first dimension.

        A tensor of one dimension is one row.
        """
        info = self.tensors[name]
        parts = 1 if index is None else info.shape[0]
        size = info.size_bytes // parts
        buffer = torch.empty(size, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data)
        with open(info.path, "rb", buffering=0) as f:
            f.seek(info.offset + size * (index or 0))
            done = 0
            while done < size:
                count = f.readinto(view[done:])
                if not count:
                    raise _broken(info.path, f"ends inside tensor {name}")
                done += count
        return buffer.reshape(math.prod(info.shape[:-1]) // parts, -1)

    def floats(self, name: str, dtype: torch.dtype, raw: torch.Tensor) -> torch.Tensor:
        """What :meth:`raw` gave as floats, ``[rows, columns]``; decoded in float32, some rows at a time."""
        info = self.tensors[name]
        as_is = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(info.kind)
        if as_is is not None:
            return raw.view(as_is).to(dtype)
        gguf = library()
        kind = gguf.GGMLQuantizationType[info.kind]
        out = torch.empty((raw.shape[0], info.shape[-1]), dtype=dtype)
        step = max(1, _CHUNK_ELEMENTS // info.shape[-1])
        for start in range(0, raw.shape[0], step):
            decoded = gguf.dequantize(raw[start : start + step].numpy(), kind)
            out[start : start + step] = torch.from_numpy(np.ascontiguousarray(decoded))
        return out

    def part(self, prefix: str) -> dict[str, Any]:
        """Metadata below a prefix, which is taken away: ``part("tokenizer.")["ggml.model"]``."""
        return {k.removeprefix(prefix): v for k, v in self.metadata.items() if k.startswith(prefix)}


def open_gguf(path: Path) -> GgufFile:
    """Read the metadata and tensor entries of a GGUF file, and of all others where it is one of several.

    Raises:
        CheckpointError: it is not a GGUF file, is truncated or contradicts itself, or a part is missing.
        MissingDependencyError: the package gguf is not installed.
    """
    paths = [path]
    if split := SPLIT_NAME.fullmatch(path.name):
        count = int(split[3])
        paths = [path.with_name(f"{split[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
        missing = [p.name for p in paths if not p.exists()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {count} parts are missing: {', '.join(missing)}",
                where=str(path),
                remedy="Download them into the same folder.",
            )
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for part in paths:
        found, listed = _read_one(part)
        metadata = found | metadata
        for tensor in listed:
            if tensor.name in tensors:
                raise _broken(part, f"holds tensor {tensor.name} twice")
            tensors[tensor.name] = tensor
    return GgufFile(path=paths[0], metadata=metadata, tensors=tensors)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(path), remedy="Download it again.")


class _Cursor:
    """Numbers and strings from the head of a file, none longer than what is left of it."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.place = path, file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.place:
            raise _broken(
                self.path, f"is not a whole GGUF file: {count} bytes announced, {self.size - self.place} left"
            )
        data = self.file.read(count)
        if len(data) != count:
            raise _broken(self.path, "is not a whole GGUF file: its header is cut short")
        self.place += count
        return data

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        return data.decode("utf-8", errors="surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or depth > 1:
            raise _broken(self.path, f"has metadata of type {kind}, which GGUF does not know")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            letter = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))
        if count > self.size:
            raise _broken(self.path, f"announces {count} values, more than it has bytes")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _read_one(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    gguf = library()
    try:
        size = path.stat().st_size
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise CheckpointError(f"cannot be read: {e.strerror}", where=str(path), remedy="Give a GGUF file.") from None
    with file:
        cursor = _Cursor(path, io.BufferedReader(file.raw, 1 << 20), size)
        if size < 24 or cursor.take(4) != MAGIC:
            raise CheckpointError("is not a GGUF file", where=str(path), remedy="Give a file that begins with GGUF.")
        version = cursor.number("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"is GGUF version {version}",
                where=str(path),
                why="versions 2 and 3 are read, little-endian ones alone",
                remedy="Convert it with a recent llama.cpp.",
            )
        tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.text()
            if key in metadata:
                raise _broken(path, f"has metadata {key} twice")
            metadata[key] = cursor.value(cursor.number("I"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _broken(path, f"has alignment {alignment}, not a power of two")
        entries = [_entry(cursor, gguf) for _ in range(tensor_count)]
        start = -(-cursor.place // alignment) * alignment
    tensors = []
    end = 0
    for name, kind, shape, offset, length in sorted(entries, key=lambda e: e[3]):
        if offset % alignment or offset < end:
            raise _broken(path, f"tensor {name} begins at {offset}, inside another or off the alignment of {alignment}")
        end = offset + length
        if start + end > size:
            raise _broken(path, f"ends inside tensor {name}: {start + end} bytes expected, {size} on disk")
        tensors.append(
            GgufTensor(name=name, kind=kind, shape=shape, path=path, offset=start + offset, size_bytes=length)
        )
    return metadata, tensors


def _entry(cursor: _Cursor, gguf: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, offset and bytes of one tensor."""
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _broken(cursor.path, f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"tensor {name} has type {number}, which this version of gguf does not know",
            where=str(cursor.path),
            remedy="Update the package: pip install -U gguf.",
        ) from None
    if shape[-1] % block:
        raise _broken(cursor.path, f"tensor {name} has rows of {shape[-1]}, not whole blocks of {block}")
    return name, kind.name, shape, offset, math.prod(shape) // block * block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSpec:
    """A tensor to be written: ggml's name of its type, shape with the rows first.

    A tensor of three dimensions may be written in parts along the first: part i by the name ``name[i]``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        gguf = library()
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return int(math.prod(self.shape) // block * block_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One GGUF file to be.

    Attributes:
        file: its name.
        architecture: ``general.architecture``.
        metadata: the rest, key -> value and gguf's name of its type.
        tensors: in order.
        constants: contents of tensors that are known beforehand.
    """

    file: str
    architecture: str
    metadata: Mapping[str, tuple[Any, str]]
    tensors: Sequence[GgufSpec]
    constants: Mapping[str, torch.Tensor]


class GgufFiles:
    """GGUF files whose every byte has its place before the first is written, as ``checkpoint.layout.Layout`` is.

    Equal arguments give equal bytes, so that an interrupted run can be continued.
    """

    def __init__(self, planned: Sequence[Planned]) -> None:
        self._planned = list(planned)
        self._places: dict[str, tuple[Planned, GgufSpec, int]] = {}
        self._starts: dict[str, int] = {}
        for plan in self._planned:
            offset = 0
            for spec in plan.tensors:
                self._places[spec.name] = (plan, spec, offset)
                offset += _padded(spec.size_bytes)

    @property
    def size_bytes(self) -> int:
        return sum(_padded(spec.size_bytes) for _, spec, _ in self._places.values())

    def create(self, folder: Path) -> None:
        """Write headers, metadata and constants, and allocate every file at its full size.

        Raises:
            OutputError: the disk is too small or the folder cannot be written.
        """
        for plan in self._planned:
            path = folder / plan.file
            try:
                self._write_head(path, plan)
                total = self._start(folder, plan) + sum(_padded(spec.size_bytes) for spec in plan.tensors)
                with open(path, "r+b") as f:
                    allocate(f.fileno(), total)
                os.chmod(path, 0o644)
            except OSError as e:
                raise write_error(e, path, self.size_bytes) from None
            self.write(folder, dict(plan.constants))

    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors to their places: floats in the type announced, blocks as their bytes (uint8)."""
        for name, tensor in tensors.items():
            whole, bracket, index = name.partition("[")
            plan, spec, offset = self._places[whole]
            data = bytes_of(tensor.cpu())
            expected = spec.size_bytes
            if bracket:
                expected //= spec.shape[0]
                offset += int(index.removesuffix("]")) * expected
            if len(data) != expected:
                raise AssertionError(f"{name}: {len(data)} bytes were announced as {spec}")
            path = folder / plan.file
            try:
                descriptor = os.open(path, os.O_WRONLY)
                try:
                    done, start = 0, self._start(folder, plan) + offset
                    while done < len(data):
                        done += os.pwrite(descriptor, data[done:], start + done)
                finally:
                    os.close(descriptor)
            except OSError as e:
                raise write_error(e, path, self.size_bytes) from None

    def sync(self, folder: Path) -> None:
        """Make everything written so far durable."""
        for plan in self._planned:
            descriptor = os.open(folder / plan.file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as e:
                raise write_error(e, folder / plan.file, self.size_bytes) from None
            finally:
                os.close(descriptor)

    def _write_head(self, path: Path, plan: Planned) -> None:
        gguf = library()
        writer = gguf.GGUFWriter(path, plan.architecture)
        for key, (value, kind) in plan.metadata.items():
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])
        for spec in plan.tensors:
            writer.add_tensor_info(
                spec.name, spec.shape, np.dtype(np.float32), spec.size_bytes, gguf.GGMLQuantizationType[spec.kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()

    def _start(self, folder: Path, plan: Planned) -> int:
        """Where the tensors' bytes begin; found from the head on disk, which a resumed run did not write itself."""
        if plan.file not in self._starts:
            with open(folder / plan.file, "rb") as f:
                self._starts[plan.file] = _padded(head_bytes(folder / plan.file, f))
        return self._starts[plan.file]


def head_bytes(path: Path, file: BinaryIO) -> int:
    """Length of a GGUF file's header, metadata and tensor entries."""
    cursor = _Cursor(path, file, path.stat().st_size)
    cursor.take(8)
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    for _ in range(value_count):
        cursor.text()
        cursor.value(cursor.number("I"))
    gguf = library()
    for _ in range(tensor_count):
        _entry(cursor, gguf)
    return cursor.place


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
