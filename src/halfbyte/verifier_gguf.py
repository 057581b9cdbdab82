"""``verify`` for GGUF: tensors as the gguf package decodes them against the source, tokens against tokenizer.json.

Part of :mod:`halfbyte.verifier`, with which it shares the rule to use no code of the writing side: file, blocks and
names are read by the gguf package, the source by the reference decoders, and what llama.cpp wants changed (rows of q
and k, 1 added to norms) is written out here once more.

    files    model.gguf and mmproj.gguf are readable by everybody and hash to what convert.json says
    headers  the gguf package reads them, no tensor is there twice
    config   sizes in the metadata are config.json's; tokens, their number and the chat template are the tokenizer's
    copies   every tensor that is not quantised has the source's values, rounded to its type, and none is missing
    error    every quantised one has the source's values, bit for bit unless convert.json lists it

Does not check that llama.cpp computes what transformers does: the tests do, in llama.cpp itself.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import CheckpointError, MissingDependencyError
from halfbyte.progress import Reporter
from halfbyte.records import Check, ConvertRecord, read_json
from halfbyte.reference import FLOATS, Float32
from halfbyte.verifier_converted import Contents, Plain, Weight, contents_of, read_convert_record, rounded
from halfbyte.verifier_files import Inventory
from halfbyte.verifier_numbers import MAX_RELATIVE_ERROR

MODEL, VISION = "model.gguf", "mmproj.gguf"
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


def is_gguf_folder(folder: Path) -> bool:
    """Whether this is what ``convert --to gguf`` writes."""
    return (folder / MODEL).exists() and not any(folder.glob("*.safetensors"))


def gguf_checks(folder: Path, source: Inventory | None, reporter: Reporter) -> tuple[list[Check], Inventory, int]:
    """All checks, and for the record an inventory of the files and the number of tensors in them.

    Raises:
        MissingDependencyError: the package gguf is not installed.
    """
    gguf = library()
    found = Inventory(folder, files=[n for n in (MODEL, VISION) if (folder / n).exists()])
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_mode & 0o044 != 0o044:
            found.mode_problems.append(f"{path.name} has mode {path.stat().st_mode & 0o777:04o}")
    record = read_convert_record(found)
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for name in found.files:
        try:
            reader = gguf.GGUFReader(str(folder / name))
            metadata |= {k: f.contents() for k, f in reader.fields.items() if name == MODEL or k.startswith("clip.")}
            listed = [
                GgufTensor(t.name, t.tensor_type.name, t.data, tuple(int(n) for n in reversed(t.shape)))
                for t in reader.tensors
            ]
        except Exception as e:  # whatever the package raises is the finding
            found.header_problems.append(f"{name}: {type(e).__name__}: {e}")
            continue
        found.header_problems += [
            f"{name} holds {t.name}, which is in {MODEL} too" for t in listed if t.name in tensors
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
    checks.append(check_of("config", _config_problems(folder, metadata, tensors), "sizes, tokens and chat template"))
    if source is None:
        checks += [
            Check(name=n, status="skipped", detail="no source was given (--source)") for n in ("copies", "error")
        ]
    else:
        checks += _compare(metadata, tensors, contents_of(source), record, reporter)
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


def _compare(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    source: Contents,
    record: ConvertRecord | None,
    reporter: Reporter,
) -> tuple[Check, Check]:
    allowed = {f"{r.name}.weight" for r in record.requantized} if record else set()
    copies: list[str] = []
    codes: list[str] = []
    equal, used = 0, set(MADE)
    names = [*source.dense, *source.quantized]
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
        stored: Weight = source.quantized[name] if quantized else Plain(source.dense[name])
        same, error = _distance(tensors[held], expert, stored, held, metadata)
        equal += same and quantized
        if not same and (not quantized or name not in allowed or not error <= MAX_RELATIVE_ERROR):
            into.append(f"{held} differs from the source's {name} (relative error {error:.3g})")
    reporter.finish()
    copies += [f"{n} stands for no tensor of the source" for n in tensors if n not in used]
    detail = f"{equal} of {len(source.quantized)} quantised weights equal the source's bit for bit"
    return (
        check_of("copies", copies, f"{len(source.dense)} tensors against the source, rounded to their types"),
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
        if one_added(held, metadata):
            want = want + np.float32(1)
        have = found.rows(start, stop, expert).reshape(want.shape)
        want = rounded(np.ascontiguousarray(want), found.kind) if found.kind in FLOATS else want
        same = same and bool(np.array_equal(have, want))
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
