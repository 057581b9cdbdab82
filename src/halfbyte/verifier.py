"""``verify``: read a written checkpoint again, with code that did not write it, and say what is wrong with it.

    files     config, weights, index and manifest are there, readable by everybody, and hash to what the manifest says
    headers   every tensor is there once, whole, where its header and the index say
    config    quantization_config parses, and names as quantised exactly what is quantised
    linears   every quantised Linear has the right tensors, dtypes and shapes, and no expert of a layer is missing
    scales    finite and positive
    codes     codes and zero points within their range, no NaN
    copies    every other tensor is byte for byte that of the source, but for norms that the manifest says were smoothed
              or tuned (the latter are no further from the source's than tuning goes) and biases that it says were
              divided, which are the source's over the recorded factors
              (experts that the source holds in stacks count as what they are stacked from)
    error     relative Frobenius error ||W_q - W|| / ||W|| of each Linear against the source is plausible; behind a
              smoothed norm the source's W with its columns multiplied by the old gain over the new; where Linears
              traded factors, the source's W with rows divided and columns multiplied by those recorded, and no row
              of a size that says otherwise
    reload    transformers loads it without a missing, unexpected or mismatched key
    weights   its dequantised weights are those of :mod:`halfbyte.reference`, bit for bit
    logits    on a few prompts they equal those of the same model built dense from the reference weights
    activations  each Linear with activations quantised as transformers does it, likewise (schemes that quantise them)

All but the last four stream, one slice of one tensor at a time. Nothing is imported from the writing side, pickles are
refused and remote code is never run. A check that cannot be made is ``skipped`` and says why. Where transformers cannot
load a mixture's experts as they are stored, ``reload`` is, and those after it take them as compressed-tensors decodes
them.

Does not check that an engine other than transformers serves the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from halfbyte.errors import CheckpointError, raise_all
from halfbyte.progress import Reporter, Silent
from halfbyte.records import CONVERT_NAME, VERIFY_NAME, Check, ConvertRecord, Manifest, VerifyRecord, write_json
from halfbyte.reference import FLOATS, StoredTensor
from halfbyte.verifier_columns import METHODS, column_modules, scan_columns
from halfbyte.verifier_columns import config_problems as column_config_problems
from halfbyte.verifier_converted import (
    compare,
    contents_of,
    hash_problems,
    method_of,
    read_convert_record,
    reload_columns,
)
from halfbyte.verifier_experts import missing_experts
from halfbyte.verifier_files import Inventory, files_detail, manifest_problems, read_manifest, take_inventory
from halfbyte.verifier_flax import FlaxOriginal, is_flax_source, read_flax
from halfbyte.verifier_gguf import (
    Comparison,
    GgufOriginal,
    compare_files,
    compare_gguf,
    gguf_checks,
    holds_gguf,
    read_gguf,
)
from halfbyte.verifier_gguf_source import compare_with_original
from halfbyte.verifier_layout import (
    QuantizedModule,
    Rules,
    Skeleton,
    config_problems,
    module_problems,
    parse_rules,
    quantized_parts,
)
from halfbyte.verifier_models import build_skeleton
from halfbyte.verifier_numbers import (
    Traded,
    copy_problems,
    pair_factors,
    scan,
    smoothing_factors,
    tuned_norm_problems,
)
from halfbyte.verifier_reload import RELOAD_CHECKS, reload_checks
from halfbyte.verifier_stacks import Stacks, stacks_of

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
LINEAR = frozenset({"Linear"})
STRUCTURE = ("headers", "config", "linears")
STRUCTURE_FIRST = "the structure of the checkpoint has to be right first"
PACKAGES = ("halfbyte", "compressed-tensors", "numpy", "torch", "transformers")


def verify(
    checkpoint: str | Path,
    *,
    source: str | Path | None = None,
    reload: bool | None = None,
    prompts: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> VerifyRecord:
    """Check a checkpoint (compressed-tensors, AutoAWQ, AutoGPTQ, AutoRound, GGUF) and write ``verify.json`` into it.

    Args:
        checkpoint: local folder or GGUF file (beside which nothing is written); halfbyte's own, or another tool's as
            far as the checks apply. A dense one that ``convert`` made, or beside a quantised source, is checked too.
        source: local folder (or GGUF file) of the checkpoint it was made from, in any of these formats, Flax or dense;
            without it ``copies`` and ``error`` are skipped.
        reload: whether to load it with transformers; ``None`` does so where two dense copies fit in free memory.
        prompts: texts for the logits; by default three short ones, or fixed token ids where there is no tokenizer.
        reporter: listener for progress.

    Returns:
        The record; ``passed`` is false when any check failed, and the check's ``problems`` name the culprits.

    Raises:
        CheckpointError: there is no checkpoint, nothing in it is quantised, it is in a format that is not read, it
            holds only pickles, or the source itself is broken.
        MissingDependencyError: gguf or tensorstore is needed and not installed.
    """
    reporter = reporter or Silent()
    path = Path(checkpoint)
    if holds_gguf(path):
        checks, found, count = gguf_checks(path, _beside_gguf(source, reporter), reporter)
        return _recorded(checks, checkpoint, source, found, count, write=path.is_dir())
    found = take_inventory(_folder(checkpoint))
    other = None if source is None else _foreign_source(Path(source))
    original = None if source is None or other is not None else _sound_source(_folder(source))
    converted = read_convert_record(found)
    found.file_problems += hash_problems(found, converted, reporter)
    quantised = other is not None or (original is not None and method_of(original) is not None)
    quantised = quantised or (converted is not None and converted.target == "dense")
    if method_of(found) in METHODS or (method_of(found) is None and quantised):
        checks = _converted_checks(found, original, converted, reload, reporter)
        return _recorded(_beside_other(checks, found, other, converted, reporter), checkpoint, source, found)
    beside = original if original is not None and method_of(original) is not None else None
    original = original if beside is None else None
    parts = quantized_parts(found.tensors)
    _require_compressed_tensors(found, quantized=bool(parts))
    manifest = read_manifest(found)
    changed = manifest_problems(found, manifest, reporter)
    skeleton, unknown = build_skeleton(found.folder)
    rules, problems = _rules(found)
    modules = []
    for name, owned in parts.items():
        group = rules.group_of(name, skeleton.classes_of(name) or LINEAR) if rules else None
        modules.append(QuantizedModule(name, owned, group))
    if rules:
        problems += config_problems(rules, modules, _dense(found, modules), skeleton)
    stacks = stacks_of(original.tensors, found.tensors, {f"{n}.weight" for n in parts}) if original else Stacks()
    dense = None if original is None else {**original.tensors, **stacks.weights}
    misfits = _misfits(modules, found, skeleton, dense or {}, strict=manifest is not None)
    readable = [m for m in modules if m.decodable and not misfits[m.name]]
    structure = [
        _check("files", found.file_problems + found.mode_problems + changed, files_detail(found, manifest, converted)),
        _check("headers", found.header_problems, f"{len(found.tensors)} tensors in {len(found.files)} files"),
        _check("config", problems, _config_detail(rules, modules, unknown)),
        _linears_check(modules, misfits, missing_experts(parts, _dense_modules(found, modules), skeleton.fused)),
    ]
    changes = _changes(found, dense, manifest)
    signed = converted is not None
    scales, codes, error = scan(readable, dense, len(modules) - len(readable), changes.traded, reporter, signed=signed)
    copies = _copies_check(found, original, stacks, modules, changes, reporter)
    if beside is not None and not any(c.status == "failed" for c in structure[1:]):
        copies, error = compare(contents_of(found), contents_of(beside), converted, reporter)
    checks = [*structure, scales, codes, copies, error]
    if found.file_problems or any(c.status == "failed" for c in structure[1:]):
        checks += [Check(name=n, status="skipped", detail=STRUCTURE_FIRST) for n in RELOAD_CHECKS]
    else:
        checks += reload_checks(
            found.folder,
            found.tensors,
            modules,
            model_type=str(found.config.get("model_type")),
            wanted=reload,
            prompts=prompts,
            reporter=reporter,
        )
    return _recorded(_beside_other(checks, found, other, converted, reporter), checkpoint, source, found)


def _foreign_source(path: Path) -> GgufOriginal | FlaxOriginal | None:
    """A source that is no folder of safetensors files, opened."""
    if holds_gguf(path):
        return read_gguf(path)
    return read_flax(path) if is_flax_source(path) else None


def _beside_gguf(source: str | Path | None, reporter: Reporter) -> Comparison | None:
    """How a GGUF is compared with its source, of whatever format; ``None`` without one."""
    if source is None:
        return None
    other = _foreign_source(Path(source))
    original = _sound_source(_folder(source)) if other is None else None

    def compared(found: GgufOriginal, record: ConvertRecord | None) -> tuple[Check, Check]:
        if isinstance(other, GgufOriginal):
            return compare_files(found, other, record, reporter)
        if original is not None:
            return compare_gguf(found, contents_of(original), record, reporter)
        assert other is not None
        table = found.tensors.get("token_embd.weight")
        return compare_gguf(found, other.contents(table.shape[0] if table else 0), record, reporter)

    return compared


def _beside_other(
    checks: list[Check],
    found: Inventory,
    other: GgufOriginal | FlaxOriginal | None,
    converted: ConvertRecord | None,
    reporter: Reporter,
) -> list[Check]:
    """The checks with ``copies`` and ``error`` against a GGUF or a Flax checkpoint, where that is the source."""
    if other is None:
        return checks
    if any(c.status == "failed" for c in checks if c.name in STRUCTURE):
        names = ("copies", "error")
        compared = {n: Check(name=n, status="skipped", detail=STRUCTURE_FIRST) for n in names}
    elif isinstance(other, GgufOriginal):
        compared = {c.name: c for c in compare_with_original(contents_of(found), other, converted, reporter)}
    else:
        contents = contents_of(found)
        table = next((t for n, t in contents.dense.items() if n.endswith("embed_tokens.weight")), None)
        rows = table.shape[0] if table is not None and table.shape else 0
        compared = {c.name: c for c in compare(contents, other.contents(rows), converted, reporter)}
    return [compared.get(c.name, c) for c in checks]


def _converted_checks(
    found: Inventory,
    original: Inventory | None,
    converted: ConvertRecord | None,
    reload: bool | None,
    reporter: Reporter,
) -> list[Check]:
    """The checks of AutoAWQ's and AutoGPTQ's, and of dense copies of quantised checkpoints."""
    quantization = found.quantization
    hashed = f"tensors hashed against {CONVERT_NAME}" if converted else f"no {CONVERT_NAME} to hash against"
    detail = f"{len(found.files)} weight files, {hashed}"
    checks = [_check("files", found.file_problems + found.mode_problems, detail)]
    checks.append(_check("headers", found.header_problems, f"{len(found.tensors)} tensors in {len(found.files)} files"))
    if isinstance(quantization, dict):
        try:
            modules = column_modules(found.tensors, quantization)
        except CheckpointError as e:
            return [*checks, _check("config", [e.what], "quantization_config cannot be used")]
        owned = {t.name for m in modules for t in m.parts.values()}
        dense = {n: t for n, t in found.tensors.items() if n not in owned}
        problems = column_config_problems(quantization, modules, dense, build_skeleton(found.folder)[0])
        checks.append(_check("config", problems, f"transformers reads it; quantised modules: {len(modules)}"))
        checks += scan_columns(modules, reporter)
    if any(c.status == "failed" for c in checks[1:]):
        return checks + [Check(name=n, status="skipped", detail=STRUCTURE_FIRST) for n in ("copies", "error", "reload")]
    contents = contents_of(found)
    if original is None:
        no_source = "no source was given (--source)"
        checks += [Check(name=n, status="skipped", detail=no_source) for n in ("copies", "error")]
    else:
        checks += compare(contents, contents_of(original), converted, reporter)
    if reload is False or not contents.modules:
        reason = "not wanted (--no-reload)" if reload is False else "the checkpoint is dense"
        checks.append(Check(name="reload", status="skipped", detail=reason))
    else:
        checks.append(reload_columns(found.folder, contents, reporter))
    return checks


def _recorded(
    checks: list[Check],
    checkpoint: str | Path,
    source: str | Path | None,
    found: Inventory,
    tensors: int | None = None,
    *,
    write: bool = True,
) -> VerifyRecord:
    """The record of some checks, written into the checkpoint where that is a folder; ``tensors`` counts them where the
    inventory does not."""
    record = VerifyRecord(
        checkpoint=str(checkpoint),
        source=None if source is None else str(source),
        passed=all(c.status != "failed" for c in checks),
        checks=checks,
        tensors=len(found.tensors) if tensors is None else tensors,
        bytes_read=sum((found.folder / f).stat().st_size for f in found.files),
        versions={p: version(p) for p in PACKAGES},
    )
    try:
        if write:
            write_json(found.folder / VERIFY_NAME, record)
    except OSError as e:
        unwritten = Check(name="record", status="skipped", detail=f"{VERIFY_NAME} could not be written: {e.strerror}")
        record.checks.append(unwritten)
    return record


def _check(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems)


def _folder(name: str | Path) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(name), remedy="Give a local checkpoint folder.")
    return folder


def _sound_source(folder: Path) -> Inventory:
    source = take_inventory(folder)
    problems = source.header_problems + source.file_problems
    raise_all([CheckpointError(p, where=str(folder), remedy="Restore the source first.") for p in problems[:5]])
    return source


def _require_compressed_tensors(found: Inventory, *, quantized: bool) -> None:
    quantization = found.quantization
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method != "compressed-tensors":
        raise CheckpointError(
            f"the checkpoint is quantised with {method!r}, which verify does not read",
            where=str(found.folder),
            why="it reads compressed-tensors, awq, gptq, auto-round and GGUF",
            remedy="Use `halfbyte inspect` on it.",
        )
    if found.config and quantization is None and not quantized and not found.header_problems:
        raise CheckpointError(
            "the checkpoint is dense: there is nothing to verify",
            where=str(found.folder),
            why="config.json has no quantization_config and no tensor is quantised",
            remedy="Quantise it with `halfbyte quantize`, then verify the result.",
        )


def _rules(found: Inventory) -> tuple[Rules | None, list[str]]:
    try:
        return parse_rules(found.quantization), []
    except CheckpointError as e:
        return None, [e.what]


def _dense(found: Inventory, modules: Sequence[QuantizedModule]) -> dict[str, StoredTensor]:
    """Every tensor that belongs to no quantised weight."""
    owned = {t.name for m in modules for t in m.parts.values()}
    return {n: t for n, t in found.tensors.items() if n not in owned}


def _dense_modules(found: Inventory, modules: Sequence[QuantizedModule]) -> list[str]:
    """Modules that are dense on disk and have a weight."""
    return [n.removesuffix(".weight") for n in _dense(found, modules) if n.endswith(".weight")]


def _config_detail(rules: Rules | None, modules: Sequence[QuantizedModule], unknown: str) -> str:
    if rules is None:
        return "quantization_config cannot be used"
    detail = (
        f"config groups: {len(rules.groups)}, ignore entries: {len(rules.ignore)}, quantised modules: {len(modules)}"
    )
    return f"{detail}; {unknown}" if unknown else detail


def _misfits(
    modules: Sequence[QuantizedModule],
    found: Inventory,
    skeleton: Skeleton,
    source: Mapping[str, StoredTensor],
    *,
    strict: bool,
) -> dict[str, list[str]]:
    """Wrong tensors, dtypes and shapes by module; ``strict`` (halfbyte's output) holds scales to the model's dtype."""
    dtype = _model_dtype(found) if strict else None
    misfits: dict[str, list[str]] = {m.name: [] for m in modules}
    for m in modules:
        if m.decodable:
            weight = source.get(f"{m.name}.weight")
            shape = weight.shape if weight else skeleton.shape_of(m.name)
            misfits[m.name] = module_problems(m, model_dtype=dtype, expected_shape=shape)
    return misfits


def _linears_check(modules: Sequence[QuantizedModule], misfits: Mapping[str, list[str]], missing: list[str]) -> Check:
    beyond = [f"{m.name} ({m.group.unsupported if m.group else 'no group'})" for m in modules if not m.decodable]
    detail = f"{len(modules) - len(beyond)} of {len(modules)} quantised modules"
    if beyond:
        detail += f"; beyond this decoder: {', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''}"
    if len(beyond) == len(modules) and not missing:
        return Check(name="linears", status="skipped", detail=detail)
    return _check("linears", [p for problems in misfits.values() for p in problems] + missing, detail)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How the manifest says the model was changed before it was rounded.

    Attributes:
        traded: by module, the factors that it took or gave.
        norms, tuned, biases: tensors that were not copied: norms that were smoothed, norms that were tuned, and biases;
            problems: what is wrong with them, or with the records.
    """

    traded: Mapping[str, Traded] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()
    tuned: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    problems: Sequence[str] = ()


def _changes(found: Inventory, source: Mapping[str, StoredTensor] | None, manifest: Manifest | None) -> Changes:
    if source is None or manifest is None:
        return Changes()
    columns, misshapen = smoothing_factors(manifest.smoothing, found.tensors, source)
    traded, biases, problems = pair_factors(manifest.pairs, found.tensors, source, columns)
    norms = frozenset(s.norm for s in manifest.smoothing)
    tuned = frozenset(n for record in manifest.tuning for n in record.norms) - norms
    problems = [*misshapen, *problems, *tuned_norm_problems(sorted(tuned), found.tensors, source)]
    return Changes(traded=traded, norms=norms, tuned=tuned, biases=frozenset(biases), problems=problems)


def _copies_check(
    found: Inventory,
    original: Inventory | None,
    stacks: Stacks,
    modules: Sequence[QuantizedModule],
    changes: Changes,
    reporter: Reporter,
) -> Check:
    if original is None:
        return Check(name="copies", status="skipped", detail="no source was given (--source)")
    quantized = {f"{m.name}.weight" for m in modules}
    changed = changes.norms | changes.tuned | changes.biases
    kept = {n: t for n, t in _dense(found, modules).items() if n not in changed}
    expected = {n: t for n, t in original.tensors.items() if n not in quantized | changed | stacks.replaced}
    expected |= {n: t for n, t in stacks.weights.items() if n in kept}
    kept = {n: t for n, t in kept.items() if n not in stacks.replaced}
    problems = [*changes.problems, *stacks.problems, *copy_problems(kept, expected, reporter)]
    orphans = sorted(quantized - original.tensors.keys() - stacks.weights.keys())
    problems += [f"{n} is quantised, but the source has no such tensor" for n in orphans]
    size = sum(t.size_bytes for t in kept.values())
    detail = f"{len(kept)} tensors, {size / 1e6:.1f} MB, equal to the source byte for byte"
    detail += f"; {len(changes.norms)} smoothed norms are not" if changes.norms else ""
    detail += f"; {len(changes.tuned)} tuned norms are not" if changes.tuned else ""
    detail += f"; {len(changes.biases)} biases are divided" if changes.biases else ""
    if stacks.replaced:
        detail += f"; {len(stacks.replaced)} stacks of experts became {len(stacks.weights)} Linears"
        detail += f", transposed: {stacks.transposed}" if stacks.transposed else ""
    return _check("copies", problems, detail)
