"""Lazy reading of a safetensors checkpoint folder.

Headers are read once; a tensor's bytes are fetched with ``pread`` when asked for, into memory that the caller owns.
Nothing is memory-mapped while data are used: mapped pages count as resident memory, and would make the peak grow with
the model instead of with one block.

The safetensors library validates every file (offsets, overlaps, truncation). Pickle files are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import CheckpointError, HalfbyteError, raise_all
from halfbyte.records import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PART_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")  # one of several, whatever else it is called
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a safetensors dtype."""
    return DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class Slab:
    """How a tensor that is part of a larger one lies in it.

    Attributes:
        stack: name of the larger tensor.
        shape: of the contiguous piece that holds the part; the part is ``piece[rows]``, or ``piece.T[rows]``.
        transposed: whether the piece's rows are the part's columns.
        rows: start, stop and step.
    """

    stack: str
    shape: tuple[int, ...]
    transposed: bool
    rows: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor's bytes are: ``size_bytes`` bytes at ``offset`` of ``file``.

    Where ``slab`` is given, the tensor is part of a larger one: ``offset`` is where the piece that holds it begins.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size_bytes: int
    slab: Slab | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder: its config and the headers of all its tensors.

    Attributes:
        path: the folder (for headers fetched from a hub: a folder that holds just the JSON files).
        name: what the user called it, a folder or a hub id.
        config: the parsed ``config.json``.
        tensors: headers by tensor name, in the order of files and offsets.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures") or ["unknown"]
        return str(names[0])

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config (multimodal configs nest it)."""
        for key in ("text_config", "llm_config", "language_config"):
            nested = self.config.get(key)
            if isinstance(nested, dict):
                return nested
        return self.config

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are meant to be computed in, by the config; bfloat16 where it does not say."""
        configs = (self.text_config, self.config)
        name = next((c[k] for c in configs for k in ("dtype", "torch_dtype") if c.get(k)), None)
        return {"float16": torch.float16, "float32": torch.float32}.get(str(name), torch.bfloat16)

    @property
    def size_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype on disk, in freshly allocated memory."""
        info = self.tensors[name]
        shape = info.shape if info.slab is None else info.slab.shape
        size = math.prod(shape) * element_bytes(info.dtype)
        buffer = torch.empty(size, dtype=torch.uint8)
        with open(self.path / info.file, "rb", buffering=0) as f:
            f.seek(info.offset)
            view = memoryview(buffer.numpy().data)
            done = 0
            while done < size:
                count = f.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"ends {size - done} bytes short of tensor {name}",
                        where=str(self.path / info.file),
                        remedy="The file changed while it was being read; restore it and run again.",
                    )
                done += count
        piece = buffer.view(DTYPES[info.dtype]).reshape(shape)
        if info.slab is None:
            return piece
        start, stop, step = info.slab.rows
        whole = piece.T if info.slab.transposed else piece
        return whole[start:stop:step].clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a 2-D tensor, ``[n]`` sorted int64 -> ``[n, columns]`` in the dtype on disk."""
        info = self.tensors[name]
        width = info.size_bytes // info.shape[0]
        buffer = torch.empty((rows.numel(), width), dtype=torch.uint8)
        target = buffer.numpy()
        descriptor = os.open(self.path / info.file, os.O_RDONLY)
        try:
            for i, row in enumerate(rows.tolist()):
                if os.preadv(descriptor, [target[i]], info.offset + row * width) != width:
                    raise CheckpointError(f"ends inside tensor {name}", where=str(self.path / info.file))
        finally:
            os.close(descriptor)
        return buffer.view(DTYPES[info.dtype]).reshape(rows.numel(), *info.shape[1:])

    def fingerprint(self) -> str:
        """sha256 over config, headers, sizes and modification times: equal means unchanged since, at the cost of stat.

        Used to decide whether a run may be resumed. The manifest carries the hash of the contents instead.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for info in self.tensors.values():
            digest.update(f"{info.name} {info.dtype} {info.shape} {info.file} {info.offset}\n".encode())
        for file in sorted({t.file for t in self.tensors.values()}):
            stat = os.stat(self.path / file)
            digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a CPU tensor, without a copy when it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's raw bytes."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One sha256 for a set of tensors: over the lines ``name sha256``, sorted by name. Independent of sharding."""
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(f"{name} {digests[name]}\n".encode())
    return total.hexdigest()


def open_checkpoint(path: Path, name: str | None = None, found: list[HalfbyteError] | None = None) -> Checkpoint:
    """Read config and all headers of a local checkpoint.

    Args:
        path: the folder.
        name: what to call it in messages.
        found: a list that takes what is wrong with the weight files, so that a plan can go on and find more; without
            it, all of that is raised in one error.
    """
    name = name or str(path)
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder", where=str(path), remedy="Give a checkpoint folder or a hub id."
        )
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    if config is None:
        raise CheckpointError(
            "config.json is missing", where=str(path), remedy="Give a folder in the Hugging Face layout."
        )
    if not isinstance(config, dict):
        raise CheckpointError("holds no JSON object", where=str(path / "config.json"))
    problems: list[HalfbyteError] = []
    files, listed, missing = _weight_files(path)
    if missing:
        problems.append(
            CheckpointError(
                f"{len(missing)} of {len(files)} shards are missing: {', '.join(missing)}",
                where=str(path),
                remedy="Download them again.",
            )
        )
    tensors: dict[str, TensorInfo] = {}
    for file in (f for f in files if f not in missing):
        try:
            for info in read_header(path, file):
                if info.name in tensors:
                    problems.append(
                        CheckpointError(f"tensor {info.name} is also in {tensors[info.name].file}", where=file)
                    )
                tensors[info.name] = info
        except CheckpointError as e:
            problems.append(e)
    if not problems and listed is not None:
        problems += _index_problems(path, listed, tensors)
    if found is None:
        raise_all(problems)
    else:
        found += problems
    return Checkpoint(path=path, name=name, config=config, tensors=tensors)


def _weight_files(path: Path) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """Names of the safetensors files, the index's weight map when there is one, and which files are missing."""
    if (path / INDEX_NAME).exists():
        index = read_json(path / INDEX_NAME)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError("has no weight_map from tensor names to files", where=str(path / INDEX_NAME))
        files = sorted(set(weight_map.values()))
        outside = [f for f in files if Path(f).name != f]
        if outside:
            raise CheckpointError(
                f"weight_map names a file outside the folder: {outside[0]}", where=str(path / INDEX_NAME)
            )
        return files, weight_map, [f for f in files if not (path / f).exists()]
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if SINGLE_NAME in files:
        return [SINGLE_NAME], None, []
    if len(files) == 1 and not PART_NAME.search(files[0]):
        return files, None, []
    if files:
        raise CheckpointError(
            f"holds {len(files)} safetensors files but neither {SINGLE_NAME} nor {INDEX_NAME}",
            where=str(path),
            remedy="Restore the index; without it a missing shard could not be noticed.",
        )
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"holds only pickle files ({', '.join(pickles[:3])}), and loading a pickle runs code",
            where=str(path),
            remedy="Use a revision with .safetensors files, or convert it with transformers' save_pretrained in a sandbox.",  # noqa: E501
        )
    raise CheckpointError("holds no .safetensors file", where=str(path), remedy="Give a folder with model weights.")


def _index_problems(path: Path, listed: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> list[CheckpointError]:
    where = str(path / INDEX_NAME)
    problems = [
        CheckpointError(f"lists {name} in {file}, which does not hold it", where=where)
        for name, file in listed.items()
        if name not in tensors or tensors[name].file != file
    ]
    problems += [
        CheckpointError(f"does not list {n} of {tensors[n].file}", where=where) for n in tensors if n not in listed
    ]
    return problems[:10]


def read_header(path: Path, file: str) -> list[TensorInfo]:
    """Validate one safetensors file with the safetensors library and return its tensors' headers by offset."""
    full = path / file
    try:
        with safe_open(full, framework="pt"):
            pass
        with open(full, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, struct.error, ValueError) as e:
        size = full.stat().st_size if full.exists() else 0
        raise CheckpointError(
            f"is not a whole safetensors file: {e}",
            where=str(full),
            why=f"{size} bytes on disk",
            remedy="Download it again.",
        ) from None
    return header_tensors(header, file, data_start=8 + length)


def header_tensors(header: Mapping[str, Any], file: str, *, data_start: int) -> list[TensorInfo]:
    """Tensor infos of one parsed safetensors header, ordered by offset; dtypes we do not know are errors."""
    infos = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"tensor {name} has dtype {entry['dtype']}, which halfbyte cannot read", where=file)
        infos.append(
            TensorInfo(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                file=file,
                offset=data_start + start,
                size_bytes=end - start,
            )
        )
    return sorted(infos, key=lambda t: t.offset)


TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' name


def licence_files(path: Path) -> list[Path]:
    """Files with the terms that a model comes under."""
    names = ("LICENSE", "LICENCE", "NOTICE", "TERMS")
    return sorted(f for f in path.iterdir() if f.is_file() and f.stem.upper() in names)


def companion_files(path: Path) -> Iterable[Path]:
    """Files that travel with the weights unchanged: tokenizer, chat template, processor, generation config, licence.

    Weights, the index, ``config.json`` and earlier records of halfbyte are left out; so are pickles, code, hidden
    files, and folders other than that of further chat templates.
    """
    records = {f"{n}.json" for n in ("halfbyte", "verify", "compare", "convert", "plan", "eval", "bench")}
    skipped = {"config.json", INDEX_NAME, "README.md"} | records
    suffixes = {".json", ".jinja", ".model", ".txt", ".md", ".tiktoken", ".spm", ".vocab", ""}
    for entry in sorted(path.iterdir()):
        if not entry.is_file() or entry.name.startswith(".") or entry.name in skipped:
            continue
        if entry.suffix.lower() in suffixes:
            yield entry
    yield from sorted((path / TEMPLATES_FOLDER).glob("*.jinja"))


def companion_name(file: Path) -> str:
    """A companion's name in its checkpoint: ``tokenizer.json``, ``additional_chat_templates/tool_use.jinja``."""
    return f"{TEMPLATES_FOLDER}/{file.name}" if file.parent.name == TEMPLATES_FOLDER else file.name
