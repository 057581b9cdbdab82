"""``verify``: read a written checkpoint again, with code that did not write it, and say what is wrong with it.

    files     config, weights, index and manifest are there, readable by everybody, and hash to what the manifest says
    headers   every tensor is there once, whole, where its header and the index say
    config    quantization_config parses, and names as quantised exactly what is quantised
    linears   every quantised Linear has the right tensors, dtypes and shapes
    scales    finite and positive
    codes     codes and zero points within their range, no NaN
    copies    every other tensor is byte for byte that of the source
    error     relative Frobenius error ||W_q - W|| / ||W|| of each Linear against the source is plausible
    reload    transformers loads it without a missing, unexpected or mismatched key
    weights   its dequantised weights are those of :mod:`halfbyte.reference`, bit for bit
    logits    on a few prompts they equal those of the same model built dense from the reference weights
    activations  with activations quantised as transformers does it, likewise (schemes that quantise activations)

All but the last four stream, one slice of one tensor at a time. Nothing is imported from the writing side, pickles are
refused and remote code is never run. A check that cannot be made is ``skipped`` and says why.

Does not check that an engine other than transformers serves the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError, raise_all
from halfbyte.progress import Reporter, Silent
from halfbyte.records import (
    MANIFEST_NAME,
    VERIFY_NAME,
    Check,
    Manifest,
    VerifyRecord,
    read_json,
    read_record,
    write_json,
)
from halfbyte.reference import FLOATS, StoredTensor, read_header
from halfbyte.verifier_layout import (
    QuantizedModule,
    Rules,
    Skeleton,
    config_problems,
    module_problems,
    parse_rules,
    quantized_parts,
)
from halfbyte.verifier_numbers import copy_problems, scan
from halfbyte.verifier_reload import build_skeleton, reload_checks

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HASH_CHUNK_BYTES = 16 << 20
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
PACKAGES = ("halfbyte", "compressed-tensors", "numpy", "torch", "transformers")


@dataclass(slots=True)
class Inventory:
    """What a folder holds, and what is wrong with its files and headers."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    file_problems: list[str] = field(default_factory=list)
    header_problems: list[str] = field(default_factory=list)


def verify(
    checkpoint: str | Path,
    *,
    source: str | Path | None = None,
    reload: bool | None = None,
    prompts: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> VerifyRecord:
    """Check a quantised compressed-tensors checkpoint and write ``verify.json`` into it.

    Args:
        checkpoint: local folder; halfbyte's own, or another tool's as far as the checks apply.
        source: local folder of the checkpoint it was made from; without it ``copies`` and ``error`` are skipped.
        reload: whether to load it with transformers; ``None`` does so where two dense copies fit in free memory.
        prompts: texts for the logits; by default three short ones, or fixed token ids where there is no tokenizer.
        reporter: listener for progress.

    Returns:
        The record; ``passed`` is false when any check failed, and the check's ``problems`` name the culprits.

    Raises:
        CheckpointError: there is no checkpoint, nothing in it is quantised, it is in another format than
            compressed-tensors, it holds only pickles, or the source itself is broken.
    """
    reporter = reporter or Silent()
    found = take_inventory(_folder(checkpoint))
    original = None if source is None else _sound_source(_folder(source))
    parts = quantized_parts(found.tensors)
    _require_compressed_tensors(found, parts)
    manifest = _manifest(found)
    checks = [
        _check(
            "files", found.file_problems + _manifest_problems(found, manifest, reporter), _files_detail(found, manifest)
        ),
        _check("headers", found.header_problems, f"{len(found.tensors)} tensors in {len(found.files)} files"),
    ]
    skeleton, unknown = (
        build_skeleton(found.folder) if found.config else (Skeleton({}, {}), "config.json is unreadable")
    )
    rules, config_check = _config_check(found, parts, skeleton, unknown)
    checks.append(config_check)
    modules = [
        QuantizedModule(n, p, rules.group_of(n, skeleton.classes_of(n) or frozenset({"Linear"})) if rules else None)
        for n, p in parts.items()
    ]
    checks.append(linears := _linears_check(modules, found, skeleton, original, strict=manifest is not None))
    broken = {
        m.name
        for m in modules
        if any(p.startswith((f"{m.name}.", f"{m.name} ", f"{m.name}:")) for p in linears.problems)
    }
    readable = [m for m in modules if m.decodable and m.name not in broken]
    checks += scan(readable, original.tensors if original else None, len(modules) - len(readable), reporter)
    checks.append(_copies_check(found, original, modules, reporter))
    checks.sort(key=lambda c: ORDER.index(c.name))
    if any(c.status == "failed" for c in checks if c.name in ("files", "headers", "config", "linears")) or not rules:
        reason = "skipped, since the checks above failed"
        checks += [Check(name=n, status="skipped", detail=reason) for n in ("reload", "weights", "logits")]
    else:
        checks += reload_checks(found.folder, found.tensors, modules, wanted=reload, prompts=prompts, reporter=reporter)
    record = VerifyRecord(
        checkpoint=str(checkpoint),
        source=None if source is None else str(source),
        passed=all(c.status != "failed" for c in checks),
        checks=checks,
        tensors=len(found.tensors),
        bytes_read=sum((found.folder / f).stat().st_size for f in found.files),
        versions={p: version(p) for p in PACKAGES},
    )
    try:
        write_json(found.folder / VERIFY_NAME, record)
    except OSError as e:
        unwritten = Check(name="record", status="skipped", detail=f"{VERIFY_NAME} could not be written: {e.strerror}")
        record.checks.append(unwritten)
    return record


ORDER = ("files", "headers", "config", "linears", "scales", "codes", "copies", "error")


def _check(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems)


def _folder(name: str | Path) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(name), remedy="Give a local checkpoint folder.")
    return folder


def _sound_source(folder: Path) -> Inventory:
    source = take_inventory(folder)
    problems = source.header_problems + [p for p in source.file_problems if "mode" not in p]
    raise_all([CheckpointError(p, where=str(folder), remedy="Restore the source first.") for p in problems[:5]])
    return source


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
            found.file_problems.append(
                f"{path.name} has mode {mode:04o}, which a server under another user cannot read"
            )
    return found


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


def _require_compressed_tensors(found: Inventory, parts: Mapping[str, object]) -> None:
    quantization = found.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method != "compressed-tensors":
        raise CheckpointError(
            f"the checkpoint is quantised with {method!r}, and verify reads compressed-tensors",
            where=str(found.folder),
            remedy="Use `halfbyte inspect` on it.",
        )
    if found.config and quantization is None and not parts and not found.header_problems:
        raise CheckpointError(
            "the checkpoint is dense: there is nothing to verify",
            where=str(found.folder),
            why="config.json has no quantization_config and no tensor is quantised",
            remedy="Quantise it with `halfbyte quantize`, then verify the result.",
        )


def _manifest(found: Inventory) -> Manifest | None:
    if not (found.folder / MANIFEST_NAME).exists():
        return None
    try:
        return read_record(Manifest, found.folder / MANIFEST_NAME)
    except CheckpointError as e:
        found.file_problems.append(f"{MANIFEST_NAME} {e.what}")
        return None


def _manifest_problems(found: Inventory, manifest: Manifest | None, reporter: Reporter) -> list[str]:
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


def _files_detail(found: Inventory, manifest: Manifest | None) -> str:
    hashed = (
        f"{len(manifest.files)} hashed against {MANIFEST_NAME}" if manifest else f"no {MANIFEST_NAME} to hash against"
    )
    return f"{len(found.files)} weight files, {hashed}"


def _config_check(
    found: Inventory, parts: Mapping[str, dict[str, StoredTensor]], skeleton: Skeleton, unknown: str
) -> tuple[Rules | None, Check]:
    try:
        rules = parse_rules(found.config.get("quantization_config"))
    except CheckpointError as e:
        return None, _check("config", [e.what], "quantization_config cannot be used")
    modules = [
        QuantizedModule(n, p, rules.group_of(n, skeleton.classes_of(n) or frozenset({"Linear"})))
        for n, p in parts.items()
    ]
    owned = {t.name for m in modules for t in m.parts.values()}
    dense = [t for n, t in found.tensors.items() if n not in owned]
    problems = config_problems(rules, modules, dense, skeleton)
    if not modules:
        problems.append("quantization_config is there, but no tensor is quantised")
    detail = f"{len(rules.groups)} groups, {len(rules.ignore)} ignore entries, {len(modules)} quantised modules"
    return rules, _check("config", problems, f"{detail}; {unknown}" if unknown else detail)


def _linears_check(
    modules: Sequence[QuantizedModule],
    found: Inventory,
    skeleton: Skeleton,
    original: Inventory | None,
    *,
    strict: bool,
) -> Check:
    """Tensors, dtypes and shapes; ``strict`` (halfbyte's own output) holds scales to the model's dtype."""
    dtype = _model_dtype(found) if strict else None
    problems, beyond = [], []
    for m in modules:
        if not m.decodable:
            beyond.append(f"{m.name} ({m.group.unsupported})" if m.group else m.name)
            continue
        weight = original.tensors.get(f"{m.name}.weight") if original else None
        shape = weight.shape if weight else skeleton.shapes.get(m.name)
        problems += module_problems(m, model_dtype=dtype, expected_shape=shape)
    detail = f"{len(modules) - len(beyond)} of {len(modules)} quantised modules"
    if beyond:
        detail += f"; beyond this decoder: {', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''}"
    if modules and len(beyond) == len(modules) and not problems:
        return Check(name="linears", status="skipped", detail=detail)
    return _check("linears", problems, detail)


def _model_dtype(found: Inventory) -> str | None:
    """safetensors name of the model's dtype: the config's, else that of most of the dense bytes."""
    text = found.config.get("text_config")
    for config in (found.config, text if isinstance(text, dict) else {}):
        name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        if name in DTYPE_NAMES:
            return DTYPE_NAMES[name]
    sizes: dict[str, int] = {}
    for t in found.tensors.values():
        if t.dtype in FLOATS and not t.name.endswith("weight_scale"):
            sizes[t.dtype] = sizes.get(t.dtype, 0) + t.size_bytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else None


def _copies_check(
    found: Inventory, original: Inventory | None, modules: Sequence[QuantizedModule], reporter: Reporter
) -> Check:
    if original is None:
        return Check(name="copies", status="skipped", detail="no source was given (--source)")
    owned = {t.name for m in modules for t in m.parts.values()}
    quantized = {f"{m.name}.weight" for m in modules}
    kept = {n: t for n, t in found.tensors.items() if n not in owned}
    expected = {n: t for n, t in original.tensors.items() if n not in quantized}
    problems = copy_problems(kept, expected, reporter)
    problems += [
        f"{n} is quantised, but the source has no such tensor" for n in sorted(quantized - original.tensors.keys())
    ]
    size = sum(t.size_bytes for t in kept.values())
    return _check(
        "copies", problems, f"{len(kept)} tensors, {size / 1e6:.1f} MB, compared with the source byte for byte"
    )
