"""The records that commands leave on disk, and their JSON.

    plan.json       Plan           what will be done to every tensor, and what it will cost
    halfbyte.json   Manifest       what was done, to what, with what error; travels with the checkpoint
    verify.json     VerifyRecord   what was checked in the written bytes, and the outcome
    compare.json    CompareRecord  divergence of a checkpoint from its baseline
    convert.json    ConvertRecord  what a checkpoint was converted from, and what could not be carried over exactly
    (printed)       DeployRecord   what ``deploy`` wrote; beside manifests it would be taken for one

Every number that a report or a model card prints is read from one of these. Fields that differ between two runs of the
same work (seconds, memory, dates) live under ``Manifest.run`` and nowhere else, so that everything else can be compared
byte for byte. Never imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from halfbyte.errors import CheckpointError

T = TypeVar("T")

MANIFEST_NAME = "halfbyte.json"
VERIFY_NAME = "verify.json"
COMPARE_NAME = "compare.json"
CONVERT_NAME = "convert.json"
BENCH_NAME = "bench.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What happens to one source tensor.

    Attributes:
        name: name in the source checkpoint.
        action: ``"quantize"`` or ``"copy"`` (byte for byte, same name).
        shape: source shape; dtype: safetensors dtype name (``"BF16"``).
        bytes_before, bytes_after: on disk, scales included.
        block: index of the decoder block it belongs to, ``None`` outside the blocks.
        scheme: preset name when quantised; group_size: ``None`` for one scale a row.
        bits_per_weight: stored bits a weight, scales included, when quantised.
        reason: why a tensor is copied.
    """

    name: str
    action: str
    shape: list[int]
    dtype: str
    bytes_before: int
    bytes_after: int
    block: int | None = None
    scheme: str | None = None
    group_size: int | None = None
    bits_per_weight: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An amount with the reckoning behind it: ``value`` is the sum (or the quotient) of ``parts``."""

    value: float
    unit: str
    how: str
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPlan:
    """What is known of mixed precision before sensitivities are measured.

    Attributes:
        target_bits: stored bits a weight, at most, as asked for.
        lowest_bits, highest_bits: what can be asked for: no unit in ``wider``, or all.
        wider: the scheme that units may get instead of the recipe's.
        units: how many there are to choose among (Linears that engines need alike are one).
        sequences, tokens: of calibration text that sensitivities are measured on, at most.
    """

    target_bits: float
    lowest_bits: float
    highest_bits: float
    wider: str
    units: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is known before any work starts. ``problems`` empty means the work can start.

    With ``mixed``, which Linears get more bits is not known yet: ``tensors`` have the fewest that they can have,
    ``bits_per_weight``, ``bits_per_parameter`` and ``bytes_after`` are the most that all can have together.
    """

    source: str
    architecture: str
    block_prefix: str
    num_blocks: int
    scheme: str
    method: str
    tensors: list[TensorPlan]
    quantized_parameters: int
    copied_parameters: int
    bits_per_weight: float
    bits_per_parameter: float
    bytes_before: int
    bytes_after: int
    estimates: dict[str, Estimate]
    problems: list[str]
    notes: list[str]
    mixed: MixedPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """How the quantisation of one Linear went.

    Attributes:
        name: module name in the source checkpoint (without ``.weight``).
        block: index of its decoder block.
        scheme, group_size, method: what was applied.
        bits_per_weight: stored bits, scales included.
        relative_error: ``tr(E H E^T) / tr(W H W^T)`` with ``E = W_q - W`` and ``H`` the calibration inputs' second
            moment, i.e. the share of the output's energy that is error; with no calibration, ``H = I``. Where the block
            was tuned afterwards, that of GPTQ's solution.
        damp_fraction: share of H's mean diagonal added before factoring (0 where none was factored).
        damp_raises: how often damping had to be raised before H could be factored.
        tokens: calibration tokens that entered its statistic.
        pooled: for experts, how many tokens the moment of the whole layer's tokens counted for beside them.
        rare: whether it belongs to an expert that few calibration tokens reached.
        dead_columns: input features that were zero in all of them.
    """

    name: str
    block: int
    scheme: str
    group_size: int | None
    method: str
    bits_per_weight: float
    relative_error: float
    damp_fraction: float = 0.0
    damp_raises: int = 0
    tokens: int = 0
    pooled: int = 0
    rare: bool = False
    dead_columns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingRecord:
    """A norm whose gain was rewritten, its Linears' columns making up for it (SmoothQuant).

    Attributes:
        norm: name of the norm's weight tensor.
        offset: the gain is ``offset + weight`` (1 for Gemma's norms, else 0).
        linears: modules that read its output.
        strength: how much of the outliers moved into the weights, 0 to 1.
    """

    norm: str
    offset: float
    linears: list[str]
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """A Linear whose output channels were divided, the columns that read them making up for it.

    Attributes:
        source: the module whose rows (and bias) were divided.
        linears: modules whose columns were multiplied.
        strength: how much of the outliers moved into their weights, 0 to 1.
        channels: for each column, in order, the row that it reads, see :func:`ranges_of`.
        factors: by what row after row was divided when its codes were chosen: float32, little-endian, in base64.
    """

    source: str
    linears: list[str]
    strength: float
    channels: str
    factors: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRecord:
    """How the tuning of one block went (effort standard or high).

    Attributes:
        block: its index.
        loss_before, loss_after: the block's relative output error on calibration samples that it was not tuned on, see
            :mod:`halfbyte.methods.tuning`.
        kept: whether the tuned values are the ones written.
        norms: names of the norms' weight tensors that were tuned, too, and are no longer the source's.
    """

    block: int
    loss_before: float
    loss_after: float
    kept: bool
    norms: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndRecord:
    """How the tuning of all scales together went (effort high), see :mod:`halfbyte.end_to_end`.

    Attributes:
        steps: updates of all scales.
        kl_before, kl_after: mean KL(original || quantised) of next-token distributions, in nats, on calibration samples
            that it was not tuned on; logits were computed in the dtype of the run.
        kept: whether the tuned scales are the ones written.
    """

    steps: int
    kl_before: float
    kl_after: float
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSensitivity:
    """What one unit of mixed precision does to the model's predictions, and what it got.

    Attributes:
        linears: modules that share the choice, because engines fuse them.
        block: index of their decoder block.
        kl_nats: mean KL(original || perturbed) over next-token distributions, with these Linears rounded to the
            recipe's scheme and everything else original.
        scheme, group_size: what they got.
        bits_per_weight: what they store in it.
    """

    linears: list[str]
    block: int
    kl_nats: float
    scheme: str
    group_size: int | None
    bits_per_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How ``target_bits`` was spent, and on what grounds.

    Attributes:
        target_bits: stored bits a quantised weight, at most, as asked for; bits_per_weight: as reached.
        sequences, tokens: of calibration text that it was measured on; positions: at which predictions were compared.
        units: in the order of the blocks.
    """

    target_bits: float
    bits_per_weight: float
    sequences: int
    tokens: int
    positions: int
    units: list[UnitSensitivity]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """Which tokens the statistics come from.

    ``sha256`` is over the token ids and lengths, in order, and then over the files of pictures where there are any.
    ``image_samples`` is how many of the samples have pictures, and ``images`` how many pictures these have together.
    """

    spec: str
    samples: int
    tokens: int
    seq_len: int
    seed: int
    sha256: str
    description: str = ""
    image_samples: int = 0
    images: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """``halfbyte.json``: how a checkpoint was made.

    ``source`` holds ``name``, ``origin`` (whether the name is that of a ``folder`` or a model on the ``hub``),
    ``architecture`` and ``sha256`` (over the sorted names and contents of all its tensors, see
    :func:`halfbyte.checkpoint.reader.combined_digest`). ``recipe`` holds every option that shaped the output.
    ``files`` maps each written safetensors file to its sha256. ``smoothing`` lists the norms that are not the source's:
    a Linear behind one holds ``W diag(s)``, with ``s`` the old gain over the new. ``pairs`` lists Linears that took
    such factors from a Linear before them, which holds ``diag(1/s) W``. ``tuning`` says for each block how its tuning
    went, and which norms are not the source's because they were tuned. ``rare_experts`` names experts that few
    calibration tokens reached. ``sensitivity`` says how bits were dealt out where the recipe has ``target_bits``,
    ``end_to_end`` how all scales were tuned together. ``run`` alone varies between equal runs.
    """

    format_version: int
    source: dict[str, str]
    recipe: dict[str, Any]
    calibration: CalibrationRecord | None
    linears: list[LinearRecord]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    files: dict[str, str]
    versions: dict[str, str]
    smoothing: list[SmoothingRecord] = field(default_factory=list)
    pairs: list[PairRecord] = field(default_factory=list)
    tuning: list[TuningRecord] = field(default_factory=list)
    rare_experts: list[str] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    end_to_end: EndToEndRecord | None = None
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that ``verify`` looked at. ``status``: ``"passed"``, ``"failed"`` or ``"skipped"``."""

    name: str
    status: str
    detail: str
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRecord:
    """``verify.json``. ``passed`` is true when no check failed."""

    checkpoint: str
    source: str | None
    passed: bool
    checks: list[Check]
    tensors: int
    bytes_read: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSums:
    """Sums over the scored tokens of one window: all that the standard error of a difference needs.

    Attributes:
        tokens: how many were scored.
        kl: KL(P || Q), in nats.
        nll_base, nll: negative log-likelihoods under P and Q, in nats.
        agreements: tokens at which both predict the same.
    """

    tokens: int
    kl: float
    nll_base: float
    nll: float
    agreements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRecord:
    """``compare.json``: divergence of Q (``checkpoint``) from P (``base``) on the same tokens, in nats.

    ``by_window`` is in the text's order. Two checkpoints that were compared with one base on one text met the same
    tokens, so the difference between the two has an error of its own, far smaller than either's: text that is hard for
    one is hard for the other. Empty in records of versions that did not keep it.
    """

    base: str
    checkpoint: str
    text: str
    text_sha256: str
    tokens: int
    window: int
    metrics: dict[str, float]
    versions: dict[str, str]
    by_window: list[WindowSums] = field(default_factory=list)


def ranges_of(channels: Sequence[int]) -> str:
    """Numbers as ranges, such as ``0-63 0-63 64-127``; ``none`` for -1, ``none*12`` for twelve in a row."""
    parts: list[list[int]] = []  # first, count
    for c in channels:
        last = parts[-1] if parts else None
        if last is not None and c == (-1 if last[0] < 0 else last[0] + last[1]):
            last[1] += 1
        else:
            parts.append([c, 1])
    return " ".join(
        (f"none*{n}" if n > 1 else "none") if first < 0 else f"{first}-{first + n - 1}" if n > 1 else str(first)
        for first, n in parts
    )


def numbers_of(ranges: str, most: int) -> list[int]:
    """The numbers that :func:`ranges_of` has written; :class:`ValueError` for anything else, or more than ``most``."""
    numbers: list[int] = []
    for part in ranges.split(" "):
        found = re.fullmatch(r"none(?:\*(\d+))?|(\d+)(?:-(\d+))?", part)
        if found is None:
            raise ValueError(f"{part!r} is no range of channels")
        count, first, last = (None if g is None else int(g) for g in found.groups())
        length = (1 if count is None else count) if first is None else (first if last is None else last) - first + 1
        if length < 1 or len(numbers) + length > most:
            raise ValueError(f"there are other than {most} channels")
        numbers += [-1] * length if first is None else range(first, first + length)
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class RequantizedRecord:
    """A weight that the target could not hold as it was.

    Attributes:
        name: module name; grid: the number format that it was rounded to.
        relative_error: ``||W' - W|| / ||W||`` (Frobenius) against the weight that the source's codes stand for.
    """

    name: str
    grid: str
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRecord:
    """What ``convert`` did.

    Attributes:
        source: ``name``, ``format`` and ``sha256`` (over the names and contents of its tensors).
        target: format written; sha256: over the names and contents of the tensors written.
        tensors: of the dense model; quantized: how many of them have codes in the source.
        grids: number formats of these, with how many have each.
        exact: how many codes and scales were carried over without any change of value.
        requantized: the others; none of either where the target is dense.
        notes: what a user ought to know.
        versions: of packages.
        run: seconds, bytes written.
    """

    format_version: int
    source: dict[str, Any]
    target: str
    sha256: str
    tensors: int
    quantized: int
    grids: dict[str, int]
    exact: int
    requantized: list[RequantizedRecord]
    notes: list[str]
    versions: dict[str, str]
    run: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRecord:
    """What ``deploy`` wrote.

    Attributes:
        target: ``triton``, ``kserve``, ...; name: the model's, there.
        source, format: the checkpoint.
        engine: what serves it; port: of its HTTP API; context: tokens of prompt and answer, at most.
        estimates: memory of the host and of each GPU, with the reckoning.
        files: sha256 of every file written, weights excepted, by its path in the folder.
        notes: what a user ought to know.
    """

    target: str
    name: str
    source: str
    format: str
    engine: str
    port: int
    context: int
    estimates: dict[str, Estimate]
    files: dict[str, str]
    notes: list[str]


def to_json(record: Any) -> str:
    """Indented JSON of a record (or of plain containers), newline-terminated, keys in field order."""
    plain = dataclasses.asdict(record) if dataclasses.is_dataclass(record) and not isinstance(record, type) else record
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, record: Any) -> None:
    """Write a record; see :func:`write_text`."""
    write_text(path, to_json(record))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part: temporary, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and creations in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or malformed one is a :class:`CheckpointError` that names line and column."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(path)) from None
    except OSError as e:
        raise CheckpointError(f"cannot be read: {e}", where=str(path)) from None


def parse_json(content: bytes, where: str) -> Any:
    """Parse a JSON file's content; malformed, it is a :class:`CheckpointError` that names line and column."""
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as e:
        raise CheckpointError(
            f"not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}",
            where=where,
            remedy="Repair the file or download it again.",
        ) from None
    except RecursionError:
        raise CheckpointError("its JSON is nested too deeply to be read", where=where) from None
    except UnicodeDecodeError as e:
        raise CheckpointError(f"cannot be read: {e}", where=where) from None


def parse_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in one of some files, by name; empty where there is no such file."""
    found = parse_json(files.get(name, b"{}"), name)
    if not isinstance(found, dict):
        raise CheckpointError("holds no JSON object", where=name, remedy="Repair the file or download it again.")
    return found


def read_record(kind: type[T], path: Path) -> T:
    """Read a record back; unknown or missing fields are errors that name them."""
    try:
        record: T = from_plain(kind, read_json(path))
        return record
    except (TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"is not a {kind.__name__} record: {e}", where=str(path)) from None


def from_plain(kind: Any, value: Any) -> Any:
    """Rebuild ``kind`` (a dataclass, container or scalar annotation) from plain JSON values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return from_plain(next(a for a in arguments if a is not type(None)), value)
    if origin is list:
        return [from_plain(arguments[0], v) for v in value]
    if origin is dict:
        return {k: from_plain(arguments[1], v) for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object for {kind.__name__}, found {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            raise TypeError(f"unknown fields {', '.join(unknown)} in {kind.__name__}")
        return kind(**{k: from_plain(hints[k], v) for k, v in value.items()})
    if kind is float and isinstance(value, int):
        return float(value)
    return value
