"""Orbax checkpoints, read with tensorstore alone: one array at a time, headers first, nothing unpickled, no code run.

Orbax writes each array as zarr (version 2, or 3), in a folder of its own or, as Kaggle ships them, all of them in an
OCDBT database (``manifest.ocdbt``, ``d/``, ``ocdbt.process_*``). An array's key is the names of the levels of the tree,
joined by dots; the levels of Flax parameters contain slashes themselves: ``transformer/layer_0/attn/q_einsum.w``. Here
dots become slashes, so that flat and nested trees have the same names.

Missing chunks of a zarr array are read as zeros. So every chunk is looked for when the folder is opened, and a
checkpoint that lost some of its files is refused.

Does not cover: remote storage; Flax's msgpack files from before orbax; parts that several hosts wrote and never merged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.reader import DTYPES, element_bytes
from halfbyte.errors import CheckpointError, MissingDependencyError

METADATA, MANIFEST = "_METADATA", "manifest.ocdbt"
TEMPORARY = ".orbax-checkpoint-tmp"
AGAIN = "Download or unpack it again."
# What zarr 2 and zarr 3 call the dtypes that weights come in.
_FLOATS = {"bfloat16": "BF16", "<f2": "F16", "float16": "F16", "<f4": "F32", "float32": "F32"}
_HEADERS = {".zarray": "zarr", "zarr.json": "zarr3"}
_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayInfo:
    """Header of one array.

    Attributes:
        name: ``transformer/layer_0/attn/q_einsum/w``.
        key: of its folder, in the database or on disk.
        driver: tensorstore's, ``zarr`` or ``zarr3``.
        dtype: safetensors dtype name; empty for what is no weight (integers, such as a step counter).
        shape: as stored.
    """

    name: str
    key: str
    driver: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * element_bytes(self.dtype) if self.dtype else 0


@dataclass(frozen=True, slots=True)
class OrbaxCheckpoint:
    """An opened checkpoint folder: headers of all arrays, by name."""

    path: Path
    arrays: Mapping[str, ArrayInfo]
    database: bool

    def read(self, name: str, rows: int | None = None) -> torch.Tensor:
        """One array, in the dtype on disk, in memory of its own.

        Orbax stores an array as a single chunk unless it was sharded, so there is nothing smaller to be read; while it
        is decoded it takes its size twice.

        Args:
            name: of the array.
            rows: give the first axis this many rows at least; those behind the array's own are zeros.
        """
        tensorstore = _tensorstore()
        info = self.arrays[name]
        shape = info.shape if rows is None else (max(rows, info.shape[0]), *info.shape[1:])
        out = torch.empty(shape, dtype=DTYPES[info.dtype])
        if rows is not None:
            out[info.shape[0] :].zero_()
        view = out.view(torch.int16).numpy() if info.dtype == "BF16" else out.numpy()
        dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[info.dtype]
        try:
            stored = tensorstore.open(
                {"driver": info.driver, "kvstore": self._store(info.key)}, read=True, open=True
            ).result()
            if stored.dtype.name != dtype or tuple(stored.shape) != info.shape:
                raise CheckpointError(f"changed while it was read: {name}", where=str(self.path), remedy=AGAIN)
            target = tensorstore.array(view.view(stored.dtype.numpy_dtype), copy=False)
            target[: info.shape[0]].write(stored).result() if info.shape else target.write(stored).result()
        except (ValueError, OSError, NotImplementedError) as e:
            raise _unreadable(self.path, name, e) from None
        return out

    def fingerprint(self) -> str:
        """Of names, sizes and times of all files: equal means unchanged."""
        listed = [(str(p.relative_to(self.path)), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(self.path)]
        return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()

    def _store(self, key: str) -> dict[str, Any]:
        return _store(self.path, key, database=self.database)


def is_orbax(path: Path) -> bool:
    """Whether a folder looks like an orbax checkpoint, finished or not."""
    return path.is_dir() and (any((path / n).exists() for n in (METADATA, MANIFEST)) or bool(_unmerged(path)))


def holds_orbax(path: Path) -> bool:
    """Whether a folder is an orbax checkpoint or has one in it, and no config of its own."""
    if not path.is_dir() or (path / "config.json").exists():
        return False
    return is_orbax(path) or any(is_orbax(p) for p in path.iterdir())


def find_checkpoint(path: Path) -> Path:
    """The orbax folder that is meant by ``path``: itself, or the only one among its folders.

    Kaggle's archives unpack to a tokenizer beside a folder; orbax' managers put a folder for each item into a step's.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    if not path.is_dir():
        raise CheckpointError("is not a folder" if path.exists() else "does not exist", where=str(path))
    if is_orbax(path):
        return path
    inside = sorted(p for p in path.iterdir() if is_orbax(p))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(p.name for p in inside)
        raise CheckpointError(f"holds several orbax checkpoints: {names}", where=str(path), remedy="Name one of them.")
    if (path / "checkpoint").is_file():
        raise CheckpointError(
            "holds a Flax checkpoint of the time before orbax (msgpack)", where=str(path), remedy="It cannot be read."
        )
    raise CheckpointError(
        f"holds no orbax checkpoint (no {METADATA}, no {MANIFEST})",
        where=str(path),
        remedy="Name the folder that Kaggle's archive unpacks to, or the one inside it.",
    )


def open_orbax(path: Path) -> OrbaxCheckpoint:
    """Read the headers of all arrays and see that all their chunks are there.

    Raises:
        CheckpointError: unfinished, truncated, or without arrays.
        MissingDependencyError: tensorstore is not installed.
    """
    if TEMPORARY in path.name:
        raise CheckpointError("was never finished: the run that wrote it ended early", where=str(path), remedy=AGAIN)
    if not (path / MANIFEST).exists() and _unmerged(path):
        raise CheckpointError(
            f"has no {MANIFEST}, only the parts that single processes wrote", where=str(path), remedy=AGAIN
        )
    metadata = _metadata(path)
    database = (path / MANIFEST).exists()
    if not database and metadata.get("use_ocdbt") is True:
        raise CheckpointError(
            f"has no {MANIFEST}, though {METADATA} says that it should", where=str(path), remedy=AGAIN
        )
    keys, read = _database(path) if database else _folders(path)
    arrays, lost = {}, []
    held = _Counted(keys)
    for key in keys:
        folder, _, leaf = key.rpartition("/")
        if leaf in _HEADERS and folder:
            info, chunks = _header(path, folder, _HEADERS[leaf], read(key))
            arrays[info.name] = info
            # A database writes all or nothing; orbax may have left out chunks of zeros, unless it says that it did not.
            sparse = database and metadata.get("store_array_data_equal_to_fill_value") is not True
            if held.below(folder) - 1 < chunks and not sparse:
                lost.append(info.name)
    expected = {_name([str(k["key"]) for k in e["key_metadata"]]) for e in _tree(metadata, path)}
    lost += sorted(expected - set(arrays))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise CheckpointError(f"lacks data of {', '.join(lost[:3])}{more}", where=str(path), remedy=AGAIN)
    if not arrays:
        raise CheckpointError("holds no arrays", where=str(path), remedy=AGAIN)
    return OrbaxCheckpoint(path=path, arrays=dict(sorted(arrays.items())), database=database)


class _Counted:
    """How many keys lie below each folder."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._counts: Counter[str] = Counter()
        for key in keys:
            parts = key.split("/")
            self._counts.update("/".join(parts[:n]) for n in range(1, len(parts)))

    def below(self, folder: str) -> int:
        return self._counts[folder]


def _name(levels: Iterable[str]) -> str:
    return "/".join(levels).replace(".", "/")


def _header(path: Path, key: str, driver: str, raw: bytes) -> tuple[ArrayInfo, int]:
    """Parse a zarr header, and reckon how many chunks the array has."""
    try:
        header = json.loads(raw)
        shape = header["shape"]
        chunks = header["chunks"] if driver == "zarr" else header["chunk_grid"]["configuration"]["chunk_shape"]
        stated = header["dtype"] if driver == "zarr" else header["data_type"]
        sizes = [*shape, *chunks]
        if len(shape) != len(chunks) or not all(type(n) is int and n >= 0 for n in sizes) or 0 in chunks:
            raise ValueError("odd shape")
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"header of {_name([key])} is broken ({e!r})", where=str(path), remedy=AGAIN) from None
    info = ArrayInfo(name=_name([key]), key=key, driver=driver, dtype=_FLOATS.get(str(stated), ""), shape=tuple(shape))
    return info, math.prod(math.ceil(s / c) for s, c in zip(shape, chunks, strict=True))


def _metadata(path: Path) -> dict[str, Any]:
    file = path / METADATA
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as e:
        raise CheckpointError(f"cannot be read ({e})", where=str(file), remedy=AGAIN) from None
    return found


def _tree(metadata: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """The leaves that hold arrays."""
    try:
        leaves = list(metadata.get("tree_metadata", {}).values())
        return [
            leaf
            for leaf in leaves
            if [str(k["key"]) for k in leaf["key_metadata"]]
            and leaf.get("value_metadata", {}).get("value_type") in ("jax.Array", "np.ndarray")
        ]
    except (AttributeError, KeyError, TypeError) as e:
        raise CheckpointError(f"is not as orbax writes it ({e!r})", where=str(path / METADATA), remedy=AGAIN) from None


def _database(path: Path) -> tuple[list[str], Any]:
    tensorstore = _tensorstore()
    try:
        store = tensorstore.KvStore.open(_store(path, "", database=True)).result()
        keys = [bytes(k).decode() for k in store.list().result()]
    except (ValueError, OSError, NotImplementedError, UnicodeDecodeError) as e:
        raise _unreadable(path, MANIFEST, e) from None

    def read(key: str) -> bytes:
        try:
            return bytes(store.read(key).result().value)
        except (ValueError, OSError, NotImplementedError) as e:
            raise _unreadable(path, key, e) from None

    return keys, read


def _folders(path: Path) -> tuple[list[str], Any]:
    keys = [p.relative_to(path).as_posix() for p in _files(path)]

    def read(key: str) -> bytes:
        with open(path / key, "rb") as f:
            return f.read(_HEADER_BYTES)

    return keys, read


def _files(path: Path) -> Iterable[Path]:
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / n for n in names)


def _unmerged(path: Path) -> list[Path]:
    return [p for p in path.glob("ocdbt.process_*") if p.is_dir()] if path.is_dir() else []


def _store(path: Path, key: str, *, database: bool) -> dict[str, Any]:
    folder = f"{path.resolve()}/"
    prefix = f"{key}/" if key else ""
    if database:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": folder}, "path": prefix}
    return {"driver": "file", "path": folder + prefix}


def _unreadable(path: Path, name: str, error: Exception) -> CheckpointError:
    reason = str(error).split(" [")[0].splitlines()[0][:200].rstrip(".")
    return CheckpointError(f"{name} cannot be read", where=str(path), why=reason, remedy=AGAIN)


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError:
        raise MissingDependencyError(
            "reading orbax checkpoints needs tensorstore", remedy="Install it with: pip install 'halfbyte[flax]'."
        ) from None
    return tensorstore
