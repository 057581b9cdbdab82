"""``verify`` for GGUF: tensors as the gguf package decodes them against the source, tokens against tokenizer.json.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side: file, blocks and
names are read by the gguf package, the source by the reference decoders, and what llama.cpp wants changed (rows of q
and k, 1 added to norms) is written out here once more.

    files    they are readable by everybody and hash to what convert.json says
    headers  the gguf package reads them, no tensor is there twice
    config   sizes in the metadata are config.json's; tokens, their number and the chat template are the tokenizer's
             (where these files are beside it)
    copies   every tensor that is not quantised has the source's values, rounded to its type, and none is missing
    error    every quantised one has the source's values, bit for bit unless convert.json lists it

Does not check that llama.cpp computes what transformers does: the tests do, in llama.cpp itself.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import CheckpointError, MissingDependencyError
from halfbyte.progress import Reporter
from halfbyte.records import CONVERT_NAME, Check, ConvertRecord, read_json
from halfbyte.reference import FLOATS, Float32
from halfbyte.verifier_converted import SLACK, Contents, Plain, Weight, read_convert_record, rounded
from halfbyte.verifier_files import Inventory
from halfbyte.verifier_numbers import MAX_RELATIVE_ERROR

MODEL = "model.gguf"
PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
TURNED = ("llama", "mistral3", "granite")  # architectures whose q and k have neighbouring rows turned together
ONE_ADDED = ("gemma2", "gemma3")  # architectures whose norms multiply by the weight itself
MADE = ("rope_freqs.weight", "v.token_embd.img_break")  # tensors that stand for no tensor of the source
STEP_ELEMENTS = 4 << 20
SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of one of the files; ``data`` is mapped, rows first."""

    name: str
    kind: str
    data: Any
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int, index: int | None) -> Float32:
        import gguf

        data = self.data if index is None else self.data[index]
        part = data[start:stop] if data.ndim > 1 else data[None]
        decoded = gguf.dequantize(np.ascontiguousarray(part), gguf.GGMLQuantizationType[self.kind])
        return np.asarray(decoded, dtype=np.float32).reshape(part.shape[0], -1)


def library() -> Any:
    """The gguf package."""
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError(
            "GGUF files need the package gguf", remedy="Install it with: pip install 'halfbyte[llamacpp]'."
        ) from None
    return gguf


@dataclass(frozen=True, slots=True)
class GgufOriginal:
    """The metadata and tensors of all files of a model, its vision tower's among them."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


Comparison = Callable[[GgufOriginal, ConvertRecord | None], tuple[Check, Check]]


def holds_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with one and no safetensors."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf"


def model_files(path: Path) -> list[Path]:
    """The files of the one model that a GGUF file or a folder is, vision tower last.

    Raises:
        CheckpointError: there is no such file, or the folder holds several models.
    """
    if not path.exists():
        raise CheckpointError("there is no such file", where=str(path), remedy="Give a GGUF file or a folder.")
    if path.is_file():
        match = PART.fullmatch(path.name)
        parts = sorted(
            p for p in path.parent.glob("*.gguf") if (m := PART.fullmatch(p.name)) and match and m[1] == match[1]
        )
        return parts or [path]
    files = sorted(path.glob("*.gguf"), key=lambda p: (_is_tower(p), p.name))
    models = {m[1] if (m := PART.fullmatch(p.name)) else p.name for p in files if not _is_tower(p)}
    if len(models) > 1:
        names = ", ".join(sorted(models)[:3])
        raise CheckpointError(f"holds several models: {names}", where=str(path), remedy="Name the file of one.")
    return files


def _is_tower(file: Path) -> bool:
    return "mmproj" in file.name


def _read_file(file: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata (of a tower, what it says of the tower) and tensors; whatever the package raises."""
    reader = library().GGUFReader(str(file))
    fields = {k: f.contents() for k, f in reader.fields.items() if not _is_tower(file) or k.startswith("clip.")}
    return fields, [
        GgufTensor(t.name, t.tensor_type.name, t.data, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors
    ]


def read_gguf(path: Path) -> GgufOriginal:
    """Open a GGUF file with all of its parts, or those of a folder, as a source.

    Raises:
        CheckpointError: there is no such file, or the gguf package cannot read it.
        MissingDependencyError: the package gguf is not installed.
    """
    library()
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for file in model_files(path):
        try:
            fields, listed = _read_file(file)
        except Exception as e:  # whatever the package raises is the finding
            raise CheckpointError(
                f"cannot be read: {type(e).__name__}: {e}", where=str(file), remedy="Restore the source first."
            ) from None
        metadata |= fields
        tensors |= {t.name: t for t in listed}
    return GgufOriginal(metadata, tensors)


def gguf_checks(path: Path, compared: Comparison | None, reporter: Reporter) -> tuple[list[Check], Inventory, int]:
    """All checks, and for the record an inventory of the files and the number of tensors in them.

    Args:
        path: a GGUF file, or a folder of one model.
        compared: makes the checks ``copies`` and ``error``; ``None`` without a source.
        reporter: listener for progress.

    Raises:
        CheckpointError: there is no such file, or the folder holds several models.
        MissingDependencyError: the package gguf is not installed.
    """
    library()
    if path.is_file() and path.name == MODEL and (path.parent / CONVERT_NAME).exists():
        path = path.parent
    files = model_files(path)
    found = Inventory(files[0].parent, files=[f.name for f in files])
    for file in sorted(path.iterdir()) if path.is_dir() else files:
        if file.is_file() and file.stat().st_mode & 0o044 != 0o044:
            found.mode_problems.append(f"{file.name} has mode {file.stat().st_mode & 0o777:04o}")
    record = read_convert_record(found) if path.is_dir() else None
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        try:
            fields, listed = _read_file(file)
        except Exception as e:  # whatever the package raises is the finding
            found.header_problems.append(f"{file.name}: {type(e).__name__}: {e}")
            continue
        metadata |= fields
        found.header_problems += [
            f"{file.name} holds {t.name}, which is in another file too" for t in listed if t.name in tensors
        ]
        tensors |= {t.name: t for t in listed}
    if record is not None and not found.header_problems:
        found.file_problems += _hash_problems(tensors, record)
    detail = f"{len(tensors)} tensors in {len(found.files)} files"
    hashed = "hashed against convert.json" if record else "no convert.json to hash against"
    checks = [
        check_of("files", found.file_problems + found.mode_problems, f"{len(found.files)} weight files, {hashed}"),
        check_of("headers", found.header_problems, detail),
    ]
    if found.header_problems:
        reason = "the structure of the files has to be right first"
        checks += [Check(name=n, status="skipped", detail=reason) for n in ("config", "copies", "error")]
        return checks, found, len(tensors)
    missing = [n for n in ("config.json", "tokenizer.json") if not (found.folder / n).exists()]
    if record is None and missing:
        reason = f"there is no {' and no '.join(missing)} beside it to hold its metadata against"
        checks.append(Check(name="config", status="skipped", detail=reason))
    else:
        problems = _config_problems(found.folder, metadata, tensors)
        checks.append(check_of("config", problems, "sizes, tokens and chat template"))
    if compared is None:
        checks += [
            Check(name=n, status="skipped", detail="no source was given (--source)") for n in ("copies", "error")
        ]
    else:
        checks += compared(GgufOriginal(metadata, tensors), record)
    reason = "verify does not start llama.cpp"
    return [*checks, Check(name="reload", status="skipped", detail=reason)], found, len(tensors)


def check_of(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, status="failed" if problems else "passed", detail=detail, problems=problems[:20])


def _hash_problems(tensors: Mapping[str, GgufTensor], record: ConvertRecord) -> list[str]:
    """convert.json's hash: sha256 over lines ``name sha256``, sorted; of a stack of experts each is a line."""
    lines = []
    for name, tensor in tensors.items():
        if name in MADE:
            continue
        parts = enumerate(tensor.data) if len(tensor.shape) == 3 else [(None, tensor.data)]
        for index, data in parts:
            digest = hashlib.sha256(np.ascontiguousarray(data).view(np.uint8).data).hexdigest()
            lines.append(f"{name if index is None else f'{name}[{index}]'} {digest}\n")
    actual = hashlib.sha256("".join(sorted(lines, key=lambda line: line.rsplit(" ", 1)[0])).encode()).hexdigest()
    if actual == record.sha256:
        return []
    return [f"the tensors have changed since they were written: sha256 {actual[:12]}, not {record.sha256[:12]}"]


def _config_problems(folder: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> list[str]:
    from transformers import CONFIG_MAPPING

    problems: list[str] = []
    try:
        config = read_json(folder / "config.json")
        text = CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config()
    except (CheckpointError, KeyError, TypeError) as e:
        return [f"config.json cannot be used: {e}"]
    prefix = metadata.get("general.architecture")
    for key, expected in (
        ("block_count", text.num_hidden_layers),
        ("embedding_length", text.hidden_size),
        ("attention.head_count", text.num_attention_heads),
        ("attention.head_count_kv", text.num_key_value_heads),
    ):
        given = metadata.get(f"{prefix}.{key}")
        if given != expected:
            problems.append(f"metadata {prefix}.{key} is {given}, config.json says {expected}")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    table = tensors.get("token_embd.weight")
    if table is None or len(tokens) != table.shape[0]:
        problems.append(f"{len(tokens)} tokens for an embedding table of {table.shape[0] if table else 0} rows")
    problems += _token_problems(folder, metadata, tokens)
    return problems


def _token_problems(folder: Path, metadata: Mapping[str, Any], tokens: list[str]) -> list[str]:
    try:
        whole = read_json(folder / "tokenizer.json")
    except CheckpointError as e:
        return [f"tokenizer.json {e.what}"]
    vocabulary = {**whole["model"]["vocab"], **{t["content"]: t["id"] for t in whole.get("added_tokens") or []}}
    wrong = [t for t, i in vocabulary.items() if i >= len(tokens) or tokens[i] not in (t, t.replace(SPACE, " "))]
    problems = [f"{len(wrong)} tokens differ from tokenizer.json's, such as {wrong[0]!r}"] if wrong else []
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is not None:
        theirs = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
        problems += [] if list(merges) == theirs else ["merges differ from tokenizer.json's"]
    template = folder / "chat_template.jinja"
    if template.exists() and metadata.get("tokenizer.chat_template") != template.read_text(encoding="utf-8"):
        problems.append("the chat template is not that of chat_template.jinja")
    return problems


def named(names: Any, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str | None, int | None]]:
    """Dense names with the tensor that holds each, by the gguf package's tables, and the expert's number in a stack."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = metadata["general.architecture"]
    language = gguf.get_tensor_name_map(numbers[architecture], metadata[f"{architecture}.block_count"])
    tower = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, metadata.get("clip.vision.block_count", 0))
    endings = (".weight", ".bias")
    for name in names:
        plain = re.sub(r"^language_model\.(?=model\.|lm_head)", "", re.sub(r"^model\.language_model\.", "model.", name))
        expert = re.search(r"\.experts\.(\d+)\.", plain)
        stacked = plain.replace(f".experts.{expert[1]}.", ".experts.") if expert else plain
        held = language.get_name(stacked, try_suffixes=endings)
        if held is None:
            inner = r"^(?:model\.)?vision_tower\.(?=encoder|embeddings|post_layernorm)"
            seen = re.sub(inner, "vision_tower.vision_model.", plain).removeprefix("model.")
            held = tower.get_name(seen.replace("_projection_weight", "_projection.weight"), try_suffixes=endings)
        yield name, held, int(expert[1]) if expert else None


def compare_files(
    found: GgufOriginal, original: GgufOriginal, record: ConvertRecord | None, reporter: Reporter
) -> tuple[Check, Check]:
    """The checks ``copies`` and ``error`` of two GGUF models, tensor by tensor under the same names."""
    copies = [f"{n} of the source is lost" for n in original.tensors if n not in found.tensors and n not in MADE]
    copies += [f"{n} is not in the source" for n in found.tensors if n not in original.tensors and n not in MADE]
    codes: list[str] = []
    both = [n for n in found.tensors if n in original.tensors and n not in MADE]
    allowed = {f"{r.name}.weight" for r in record.requantized} if record else set()
    held = {h: n for n, h, expert in named(allowed, found.metadata) if expert is None or expert == 0}
    quantised = equal = 0
    reporter.start("comparing weights", len(both))
    for name in both:
        reporter.advance()
        ours, theirs = found.tensors[name], original.tensors[name]
        quantised += ours.kind not in FLOATS
        if ours.shape != theirs.shape:
            copies.append(f"{name} is {list(ours.shape)}, the source's {list(theirs.shape)}")
            continue
        same, error = _tensor_distance(ours, theirs)
        equal += same and ours.kind not in FLOATS
        if not same and not (name in held and error <= MAX_RELATIVE_ERROR):
            into = copies if ours.kind in FLOATS else codes
            into.append(f"{name} differs from the source's (relative error {error:.3g})")
    reporter.finish()
    detail = f"{equal} of {quantised} quantised weights equal the source's bit for bit"
    return (
        check_of("copies", copies, f"{len(both) - quantised} tensors against the source, rounded to their types"),
        check_of("error", codes, f"{detail}; {len(allowed)} on record as rounded again"),
    )


def _tensor_distance(ours: GgufTensor, theirs: GgufTensor) -> tuple[bool, float]:
    same, squares, distance = True, 0.0, 0.0
    rows = ours.shape[-2] if len(ours.shape) > 1 else 1
    step = max(1, STEP_ELEMENTS // ours.shape[-1])
    for index in range(ours.shape[0]) if len(ours.shape) == 3 else [None]:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            a, b = ours.rows(start, stop, index), theirs.rows(start, stop, index)
            same = same and bool(np.array_equal(a, rounded(b, ours.kind)))
            squares += float(np.sum(b.astype(np.float64) ** 2))
            distance += float(np.sum((a.astype(np.float64) - b) ** 2))
    return same, math.sqrt(distance / squares) if squares else (0.0 if distance == 0 else math.inf)


def compare_gguf(
    found: GgufOriginal, source: Contents, record: ConvertRecord | None, reporter: Reporter
) -> tuple[Check, Check]:
    """The checks ``copies`` and ``error`` of a GGUF model and a checkpoint of another format."""
    metadata, tensors = found.metadata, found.tensors
    allowed = {f"{r.name}.weight" for r in record.requantized} if record else set()
    copies: list[str] = []
    codes: list[str] = []
    equal, used = 0, set(MADE)
    others: dict[str, Weight] = {**source.given, **{n: Plain(t) for n, t in source.dense.items()}}
    names = [*others, *source.quantized]
    reporter.start("comparing weights", len(names))
    for name, held, expert in named(names, metadata):
        reporter.advance()
        quantized = name in source.quantized
        into = codes if quantized else copies
        if held not in tensors:
            if not _may_be_missing(name, tensors):
                into.append(
                    f"{name} is in neither file" if held is None else f"{name} should be {held}, which is missing"
                )
            continue
        assert held is not None
        used.add(held)
        stored = source.quantized[name] if quantized else others[name]
        same, error = _distance(tensors[held], expert, stored, held, metadata)
        equal += same and quantized
        excused = name in allowed or (quantized and bool(stored.grain) and error <= SLACK)
        if not same and (not quantized or not excused or not error <= MAX_RELATIVE_ERROR):
            into.append(f"{held} differs from the source's {name} (relative error {error:.3g})")
    reporter.finish()
    copies += [f"{n} stands for no tensor of the source" for n in tensors if n not in used]
    detail = f"{equal} of {len(source.quantized)} quantised weights equal the source's bit for bit"
    return (
        check_of("copies", copies, f"{len(others)} tensors against the source, rounded to their types"),
        check_of("error", codes, f"{detail}; {len(allowed)} on record as rounded again"),
    )


def _may_be_missing(name: str, tensors: Mapping[str, GgufTensor]) -> bool:
    """Heads that are the embedding table, tables that are computed, towers without a file of their own."""
    if name.endswith("lm_head.weight"):
        return "output.weight" not in tensors
    blind = not any(n.startswith("v.") for n in tensors)
    language = re.search(r"(^|\.)(layers|embed_tokens|norm|lm_head)\b", name) and not re.search("vision|visual", name)
    return name.endswith("rotary_emb.inv_freq") or (blind and not language)


def _distance(
    found: GgufTensor, expert: int | None, stored: Weight, held: str, metadata: Mapping[str, Any]
) -> tuple[bool, float]:
    """Whether a tensor has the source's values as llama.cpp wants them, and ``||a - b|| / ||b||``."""
    shape = tuple(stored.shape)
    if math.prod(found.shape[1:] if expert is not None else found.shape) != math.prod(shape):
        return False, math.inf
    rows = shape[0] if len(shape) > 1 else 1
    heads = turned_heads(held, metadata)
    width = rows // heads if heads and len(shape) > 1 else 1
    step = max(1, STEP_ELEMENTS // (math.prod(shape) // rows) // width) * width
    same, squares, distance = True, 0.0, 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        want = stored.rows(start, stop if len(shape) > 1 else shape[0]).reshape(stop - start, -1)
        if heads:
            want = turn(want, heads if len(shape) == 1 else (stop - start) // width, len(shape) == 1)
        plus = np.float32(1 if one_added(held, metadata) else 0)
        have = found.rows(start, stop, expert).reshape(want.shape)
        # Flax stores float32 that is published as bfloat16, and products that were rounded to it.
        values = [want, rounded(np.ascontiguousarray(want), "BF16")] if stored.grain else [want]
        good = [have == rounded(np.ascontiguousarray(v + plus), found.kind) for v in values]
        good += [rounded(have, stored.grain) == want] if stored.grain and not plus else []
        same = same and bool(np.logical_or.reduce(good).all())
        want = want + plus
        squares += float(np.sum(want.astype(np.float64) ** 2))
        distance += float(np.sum((have.astype(np.float64) - want) ** 2))
    return same, math.sqrt(distance / squares) if squares else (0.0 if distance == 0 else math.inf)


def turned_heads(held: str, metadata: Mapping[str, Any]) -> int:
    """Heads in which rows of a tensor are turned together as neighbours, 0 for the others."""
    part = held.split(".")[-2]
    if held.startswith("v."):
        pixtral = metadata.get("clip.projector_type") == "pixtral" and part in ("attn_q", "attn_k")
        return int(metadata["clip.vision.attention.head_count"]) if pixtral else 0
    architecture = metadata["general.architecture"]
    if architecture not in TURNED or part not in ("attn_q", "attn_k"):
        return 0
    return int(metadata[f"{architecture}.attention.head_count{'_kv' if part == 'attn_k' else ''}"])


def turn(rows: Float32, heads: int, vector: bool) -> Float32:
    """Row i of a head's first half, then row i of its second, and so on."""
    values = rows.reshape(-1, 1) if vector else rows
    parts = [np.stack(np.split(h, 2), axis=1).reshape(h.shape) for h in np.split(values, heads)]
    return np.concatenate(parts).reshape(rows.shape)


def one_added(held: str, metadata: Mapping[str, Any]) -> bool:
    if held == "mm.soft_emb_norm.weight":
        return True
    return metadata["general.architecture"] in ONE_ADDED and held.endswith("norm.weight") and not held.startswith("mm.")
