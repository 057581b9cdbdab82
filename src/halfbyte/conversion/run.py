"""``convert``: read a checkpoint in one format and write it in another, a few tensors in memory at a time.

    open source -> survey of scales -> obstacles (stop, or grids to requantise to) -> files at full size -> tensors
    -> config and companions -> record -> final name

Codes and scales are carried over as they are. What a target cannot express is found before a byte is written. A killed
run is continued by ``resume`` and ends in the same bytes.

Every tensor is read, hashed, converted, hashed and written by one thread, as many at a time as there are processors:
with nothing to hand over there is nothing to wait for, and all of these steps leave Python's lock to the others.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.checkpoint.layout import MAX_SHARD_BYTES, write_error
from halfbyte.checkpoint.reader import DTYPES, combined_digest, digest_of, element_bytes
from halfbyte.conversion.coded import Grid, Steps
from halfbyte.conversion.dense import rounded
from halfbyte.conversion.formats import Beside, open_source, target_of
from halfbyte.conversion.requantize import requantized, with_scales
from halfbyte.conversion.source import Entry, Source
from halfbyte.conversion.target import Facts, Files, Obstacle, Target
from halfbyte.errors import HalfbyteError, NumericsError, UsageError, raise_all
from halfbyte.progress import Reporter, Silent
from halfbyte.records import CONVERT_NAME, ConvertRecord, RequantizedRecord, read_record, write_json
from halfbyte.state import RunFolder, already_published

# Bytes written between two entries in the journal: what a killed run does again, at most.
STAGE_BYTES = 1 << 30
# Of memory, for what is converted at the same time; a tensor that needs more is converted by itself.
HELD_BYTES = 2 << 30
MOST_THREADS = 8  # memory is as fast as it gets
NAMED = 3


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    source_format: str = "auto",
    dtype: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    allow_requantize: bool = False,
    resume: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    reporter: Reporter | None = None,
) -> ConvertRecord:
    """Write a checkpoint in another format, without loss where none is needed.

    Args:
        source: folder, GGUF file, or hub id of a checkpoint in safetensors.
        out: folder that does not exist yet.
        to: a name of :data:`halfbyte.conversion.formats.TARGETS`.
        source_format: a name of :data:`halfbyte.conversion.formats.SOURCES`, or ``auto``.
        dtype: of a dense target: ``bfloat16``, ``float16``, ``float32``; ``None`` is what the config says. With a Flax
            source, of everything that is not quantised; a GGUF's floats are decoded to it.
        config: of a source that comes without one, where it cannot be told: a file, or its folder.
        tokenizer: likewise.
        allow_requantize: round again what the target cannot express; the record says what and how far it is off.
        resume: continue an unfinished run.
        max_shard_bytes: size of a weight file, at most.
        reporter: listener for progress.

    Returns:
        The record, also in the output as ``convert.json``.

    Raises:
        CheckpointError: the source is broken or in a format that cannot be read.
        NumericsError: a scale of the source is not finite, or a number becomes infinite in the target's dtype.
        UsageError: the target cannot express the source, and ``allow_requantize`` is false or would not help.
        OutputError, ResumeError: as ``quantize``.
    """
    reporter = reporter or Silent()
    begun = time.monotonic()
    out = Path(out)
    if already_published(out):
        return read_record(ConvertRecord, out / CONVERT_NAME)
    if out.suffix == ".gguf":
        raise UsageError(
            "OUT is a folder, in which the GGUF is called model.gguf", where=str(out), remedy="Give a folder's name."
        )
    RunFolder.require(out, resume=resume)
    beside = Beside(
        dtype=dtype,
        config=None if config is None else Path(config),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        near=allow_requantize,
    )
    opened = open_source(source, source_format, beside)
    target = target_of(to, dtype if to in ("dense", "gguf") or opened.format != "flax" else None)
    facts = survey(opened, reporter)
    regrids = settle(opened, target, facts, allow_requantize=allow_requantize)
    entries = [replace(e, grid=regrids[e.name]) if e.name in regrids else e for e in target.entries(opened, facts)]
    options = {
        "source": opened.name,
        "fingerprint": opened.fingerprint(),
        "to": to,
        "dtype": dtype,
        "config": None if config is None else str(config),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "allow_requantize": allow_requantize,
        "max_shard_bytes": max_shard_bytes,
        "halfbyte": version("halfbyte"),
    }
    files = target.files(opened, entries, max_shard_bytes)
    run = RunFolder.open(out, options, resume=resume)
    try:
        work = _Conversion(opened, target, entries, frozenset(regrids), files, run, reporter)
        work.write_tensors()
        record = work.finish(begun)
        run.publish()
    except NumericsError:  # to resume would end in the same
        run.discard()
        raise
    except BaseException:
        run.leave()
        raise
    return record


def survey(source: Source, reporter: Reporter) -> dict[str, Facts]:
    """Read every quantised weight's scales and zero points, without codes.

    Raises:
        NumericsError: scales are NaN or infinite; the first tensors are named.
    """
    coded = [e for e in source.entries.values() if e.grid is not None]
    reporter.start("reading scales", len(coded))
    facts: dict[str, Facts] = {}
    broken: list[str] = []

    def look(entry: Entry) -> Facts | None:
        steps = source.steps(entry.name)
        return facts_of(steps) if bool(torch.isfinite(distinct(steps.scales)).all()) else None

    with threads(source) as pool:
        for entry, found in zip(coded, pool.map(look, coded), strict=True):
            if found is None:
                broken.append(entry.module)
            else:
                facts[entry.name] = found
            reporter.advance()
    reporter.finish()
    if broken:
        raise NumericsError(
            f"scales of {len(broken)} weights are NaN or infinite: {', '.join(broken[:NAMED])}",
            where=source.name,
            remedy="The checkpoint is broken; download or quantise it again.",
        )
    return facts


def thread_count(source: Source) -> int:
    """How many tensors are converted at a time; asked in the thread that started the run."""
    return min(MOST_THREADS, torch.get_num_threads()) if source.concurrent else 1


@contextlib.contextmanager
def threads(source: Source) -> Iterator[ThreadPoolExecutor]:
    """Threads for a source's tensors. Where there are several, torch does not start more in each of them."""
    count, before = thread_count(source), torch.get_num_threads()
    alone: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)} if count > 1 else {}
    with ThreadPoolExecutor(max_workers=count, **alone) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)  # a thread's own affair, but for threads that start later


def facts_of(steps: Steps) -> Facts:
    """What :class:`Facts` says, of one weight."""
    scales = distinct(steps.scales).to(torch.float32)
    exact, finite = set(), set()
    for name in ("F16", "BF16", "F32"):
        rounded = scales.to(DTYPES[name]).to(torch.float32)
        if bool((rounded == scales).all()):
            exact.add(name)
        if bool((torch.isfinite(rounded) & ((rounded != 0) | (scales == 0))).all()):
            finite.add(name)
    zeros = steps.zero_points
    span = None if zeros is None else (int(zeros.min()), int(zeros.max()))
    return Facts(exact_in=frozenset(exact), finite_in=frozenset(finite), zero_points=span)


def distinct(scales: torch.Tensor) -> torch.Tensor:
    """The values that occur in a tensor, where there can be only so many of them; of wider dtypes all of it."""
    if scales.element_size() > 2:
        return scales
    seen = np.zeros(1 << 16, dtype=bool)
    seen[scales.contiguous().view(torch.int16).numpy().reshape(-1).view(np.uint16)] = True
    return torch.from_numpy(np.flatnonzero(seen).astype(np.uint16).view(np.int16)).view(scales.dtype)


def settle(source: Source, target: Target, facts: Mapping[str, Facts], *, allow_requantize: bool) -> dict[str, Grid]:
    """What has to be requantised, and to which grid; an error where that is not allowed or not possible."""
    obstacles = target.obstacles(source, facts)
    hard = [o for o in obstacles if o.grid is None]
    if hard:
        raise_all([_refusal(target, source, o) for o in hard[:NAMED]])
    if obstacles and not allow_requantize:
        raise _listed(obstacles, source, target)
    return {o.name: o.grid for o in obstacles if o.grid is not None}


def _listed(obstacles: Sequence[Obstacle], source: Source, target: Target) -> HalfbyteError:
    """One error for all obstacles, by reason, the first tensors named."""
    by_reason: dict[str, list[str]] = {}
    for o in obstacles:
        by_reason.setdefault(o.reason, []).append(o.name.removesuffix(".weight"))
    parts = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{', '.join(names[:NAMED])}{more}: {reason}")
    remedies = list(dict.fromkeys(o.remedy for o in obstacles if o.remedy))
    rounding = "dd --allow-requantize to round these again; convert.json then has the error of each."
    return UsageError(
        f"{target.format} cannot hold {len(obstacles)} of its weights exactly: {'; '.join(parts)}",
        where=source.name,
        remedy=" ".join([*remedies, ("Or a" if remedies else "A") + rounding]),
    )


def _refusal(target: Target, source: Source, obstacle: Obstacle) -> HalfbyteError:
    where = f"{source.name}: {obstacle.name}" if obstacle.name else source.name
    return UsageError(f"cannot be converted to {target.format}: {obstacle.reason}", where=where, remedy=obstacle.remedy)


@dataclass(slots=True)
class _Conversion:
    """A run after everything is settled."""

    source: Source
    target: Target
    entries: Sequence[Entry]
    requantize: frozenset[str]
    files: Files
    run: RunFolder
    reporter: Reporter
    _digests: dict[str, str] = field(default_factory=dict)
    _errors: dict[str, float] = field(default_factory=dict)

    def write_tensors(self) -> None:
        """Write every entry from where the journal says on."""
        folder = self.run.checkpoint
        if self.run.fresh:
            self.files.create(folder)
            self.files.sync(folder)
            self.run.record(0, digests={}, errors={})
        done = int(self.run.journal["stage"])
        self._digests |= self.run.journal["digests"]
        self._errors |= self.run.journal["errors"]
        self.reporter.start("converting", len(self.entries))
        self.reporter.advance(done)
        with threads(self.source) as pool, ThreadPoolExecutor(max_workers=1) as syncer:
            while done < len(self.entries):
                done = self._write_stage(pool, syncer, done)
                self.files.sync(folder)
                self.run.record(done, digests=self._digests, errors=self._errors)
        self.reporter.finish()

    def _write_stage(self, pool: ThreadPoolExecutor, syncer: ThreadPoolExecutor, first: int) -> int:
        """Write entries from ``first`` on until :data:`STAGE_BYTES` are written; the number of the next."""
        most, number, held, written = 2 * thread_count(self.source), first, 0, 0
        running: deque[tuple[int, Future[int]]] = deque()
        synced: Future[None] | None = None
        while running or (number < len(self.entries) and written < STAGE_BYTES):
            wanted = number < len(self.entries) and written < STAGE_BYTES and len(running) < most
            cost = self._cost(self.entries[number]) if wanted else 0
            if wanted and (not running or held + cost <= HELD_BYTES):
                running.append((cost, pool.submit(self._write_one, self.entries[number])))
                held, number = held + cost, number + 1
            else:
                cost, future = running.popleft()
                held, written = held - cost, written + future.result()
                self.reporter.advance()
                if synced is None or synced.done():  # the disk works meanwhile, and has less to do at the end
                    if synced is not None:
                        synced.result()  # the kernel tells of a failed write once
                    synced = syncer.submit(self.files.sync, self.run.checkpoint)
        if synced is not None:
            synced.result()
        return number

    def _write_one(self, entry: Entry) -> int:
        """Convert an entry, write and hash it; its bytes."""
        tensors = self._converted(entry)
        self.files.write(self.run.checkpoint, tensors)
        self._digests |= {name: digest_of(tensor) for name, tensor in tensors.items()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _cost(self, entry: Entry) -> int:
        """Bytes of memory that converting an entry takes, about: what is read, what is written, and between them the
        like of either, or floats where codes become numbers."""
        grid, count = self.source.entries[entry.name].grid, math.prod(entry.shape)
        if grid is None:
            return 3 * count * element_bytes(entry.dtype)
        if entry.grid is None or entry.name in self.requantize:
            return 12 * count
        return 3 * count * grid.weights.num_bits // 8

    def _converted(self, entry: Entry) -> dict[str, torch.Tensor]:
        held = self.source.entries[entry.name]
        if held.grid is None:
            tensor = self.source.dense(entry.name)
            return self.target.keep(entry, rounded(tensor, entry.dtype, entry.name))
        weight = self.source.coded(entry.name)
        if entry.grid is None:
            return self.target.keep(entry, rounded(weight.dense(), entry.dtype, entry.name))
        if entry.name in self.requantize:
            weight, error = requantized(weight, entry.grid)
            if not math.isfinite(error):
                raise NumericsError(
                    f"cannot be rounded to {entry.grid.words()}: its scales overflow",
                    where=entry.name,
                    remedy="Convert to dense.",
                )
            self._errors[entry.module] = error
        return self.target.encode(entry, with_scales(weight, entry.grid))

    def finish(self, begun: float) -> ConvertRecord:
        """Write config, companions and the record."""
        folder = self.run.checkpoint
        self.target.finish(folder, self.source, self.entries)
        coded = [e for e in self.source.entries.values() if e.grid is not None]
        grids: dict[str, int] = {}
        for e in coded:
            assert e.grid is not None
            grids[e.grid.words()] = grids.get(e.grid.words(), 0) + 1
        record = ConvertRecord(
            format_version=1,
            source={"name": self.source.name, "format": self.source.format, "sha256": self.source.sha256()},
            target=self.target.format,
            sha256=combined_digest(self._digests),
            tensors=len(self.entries),
            quantized=len(coded),
            grids=grids,
            exact=sum(e.name not in self.requantize for e in coded) if self._is_quantized() else 0,
            requantized=[
                RequantizedRecord(name=n, grid=g.words(), relative_error=self._errors[n])
                for n, g in ((e.module, e.grid) for e in self.entries if e.name in self.requantize)
                if g is not None
            ],
            notes=[*self.source.notes, *self.target.notes(self.source, self.entries)],
            versions={p: version(p) for p in ("halfbyte", "torch")},
            run={"seconds": round(time.monotonic() - begun, 3), "bytes_after": self.files.size_bytes},
        )
        try:
            write_json(folder / CONVERT_NAME, record)
        except OSError as e:
            raise write_error(e, folder, 0) from None
        return record

    def _is_quantized(self) -> bool:
        return any(e.grid is not None for e in self.entries)
