"""The files of a checkpoint folder: which there are, what their headers and index say, whether they changed.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side. Problems are
collected, so that a damaged checkpoint is described as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.progress import Reporter
from halfbyte.records import CONVERT_NAME, MANIFEST_NAME, ConvertRecord, Manifest, read_json, read_record
from halfbyte.reference import StoredTensor, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# How older tools call a quantization_config that is a file of its own, and its quant_method.
LOOSE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HASH_CHUNK_BYTES = 16 << 20


@dataclass(slots=True)
class Inventory:
    """What a folder holds, and what is wrong with its files and headers.

    ``quantization`` is what config.json, or a file of its own beside it, says of it; ``None`` for a dense checkpoint.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    quantization: Any = None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    file_problems: list[str] = field(default_factory=list)
    mode_problems: list[str] = field(default_factory=list)
    header_problems: list[str] = field(default_factory=list)


def take_inventory(folder: Path) -> Inventory:
    """List a checkpoint folder and parse every header; whatever is wrong is collected, not raised.

    Raises:
        CheckpointError: the folder holds no safetensors file at all.
    """
    found = Inventory(folder)
    present = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if not present and not (folder / INDEX_NAME).exists():
        held = f"only pickle files ({', '.join(pickles[:3])})" if pickles else "no .safetensors file"
        why = "loading a pickle runs code, so they are not opened" if pickles else ""
        raise CheckpointError(
            f"holds {held}", where=str(folder), why=why, remedy="Give a folder with safetensors files."
        )
    try:
        config = read_json(folder / CONFIG_NAME)
        found.config = config if isinstance(config, dict) else {}
        found.file_problems += [] if isinstance(config, dict) else [f"{CONFIG_NAME} is not a JSON object"]
    except CheckpointError as e:
        found.file_problems.append(f"{CONFIG_NAME} {e.what}")
    found.quantization = _read_quantization(found)
    listed = _read_index(found)
    found.files = sorted(set(listed.values())) if listed else ([SINGLE_NAME] if SINGLE_NAME in present else present)
    if not listed and SINGLE_NAME not in present:
        found.file_problems.append(f"there is neither {SINGLE_NAME} nor a readable {INDEX_NAME}")
    missing = [f for f in found.files if f not in present]
    found.file_problems += [f"{INDEX_NAME} names {f}, which is missing" for f in missing]
    found.file_problems += [
        f"{f} belongs to no index" for f in present if f not in found.files and f.startswith("model")
    ]
    found.files = [f for f in found.files if f in present]
    for file in found.files:
        _add_header(found, file)
    if listed:
        _compare_index(found, listed)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.stat().st_mode & 0o044 != 0o044:
            mode = path.stat().st_mode & 0o777
            found.mode_problems.append(f"{path.name} has mode {mode:04o}, unreadable for a server under another user")
    return found


def _read_quantization(found: Inventory) -> Any:
    text = found.config.get("text_config")
    for holder in (found.config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key) is not None:
                return holder[key]
    for name, method in LOOSE_CONFIGS.items():
        if not (found.folder / name).exists():
            continue
        try:
            loose = read_json(found.folder / name)
        except CheckpointError as e:
            found.file_problems.append(f"{name} {e.what}")
            continue
        if isinstance(loose, dict):
            return {"quant_method": method} | loose
        found.file_problems.append(f"{name} is not a JSON object")
    return None


def _add_header(found: Inventory, file: str) -> None:
    try:
        header = read_header(found.folder / file)
    except (CheckpointError, OSError) as e:
        found.header_problems.append(str(e))
        return
    found.header_problems += header.problems
    for tensor in header.tensors:
        if tensor.name in found.tensors:
            other = found.tensors[tensor.name].path.name
            found.header_problems.append(f"tensor {tensor.name} is in {other} and again in {file}")
        found.tensors.setdefault(tensor.name, tensor)


def _read_index(found: Inventory) -> dict[str, str]:
    """The index's map from tensors to files; a file outside the folder is a problem and left out."""
    if not (found.folder / INDEX_NAME).exists():
        return {}
    try:
        index = read_json(found.folder / INDEX_NAME)
    except CheckpointError as e:
        found.file_problems.append(f"{INDEX_NAME} {e.what}")
        return {}
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        found.file_problems.append(f"{INDEX_NAME} has no weight_map from tensors to files")
        return {}
    outside = sorted({f for f in listed.values() if Path(f).name != f or not f.endswith(".safetensors")})
    found.file_problems += [f"{INDEX_NAME} names {f!r}, which is no safetensors file of this folder" for f in outside]
    return {n: f for n, f in listed.items() if f not in outside}


def _compare_index(found: Inventory, listed: Mapping[str, str]) -> None:
    for name, file in listed.items():
        held = found.tensors.get(name)
        if held is None:
            found.header_problems.append(f"{INDEX_NAME} puts {name} in {file}, which does not hold it whole")
        elif held.path.name != file:
            found.header_problems.append(f"{INDEX_NAME} puts {name} in {file}, but it is in {held.path.name}")
    found.header_problems += [f"{INDEX_NAME} does not list {n}" for n in found.tensors if n not in listed]
    metadata = read_json(found.folder / INDEX_NAME).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(t.size_bytes for t in found.tensors.values())
    if total is not None and total != actual:
        found.header_problems.append(f"{INDEX_NAME} gives total_size {total}, the tensors have {actual} bytes")


def read_manifest(found: Inventory) -> Manifest | None:
    if not (found.folder / MANIFEST_NAME).exists():
        return None
    try:
        return read_record(Manifest, found.folder / MANIFEST_NAME)
    except CheckpointError as e:
        found.file_problems.append(f"{MANIFEST_NAME} {e.what}")
        return None


def manifest_problems(found: Inventory, manifest: Manifest | None, reporter: Reporter) -> list[str]:
    """Files that are not those that were written."""
    if manifest is None:
        return []
    problems = [f"{f} is not in {MANIFEST_NAME}" for f in found.files if f not in manifest.files]
    reporter.start("hashing files", len(manifest.files))
    for file, expected in sorted(manifest.files.items()):
        path = found.folder / file
        if Path(file).name != file or not path.is_file():
            problems.append(f"{MANIFEST_NAME} lists {file}, which is missing")
        elif (actual := _sha256(path)) != expected:
            problems.append(f"{file} has changed since it was written: sha256 {actual[:12]}, not {expected[:12]}")
        reporter.advance()
    reporter.finish()
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_detail(found: Inventory, manifest: Manifest | None, converted: ConvertRecord | None) -> str:
    hashed = f"no {MANIFEST_NAME} to hash against"
    if manifest is not None:
        hashed = f"{len(manifest.files)} hashed against {MANIFEST_NAME}"
    elif converted is not None:
        hashed = f"tensors hashed against {CONVERT_NAME}"
    return f"{len(found.files)} weight files, {hashed}"
