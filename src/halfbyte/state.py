"""A run in progress on disk: what makes it resumable after ``kill -9``, and invisible under the final name until done.

    OUT.partial/
      checkpoint/             the output as it grows; renamed to OUT when the last byte is in place
      state/journal.json      options, finished blocks and their records; replaced atomically after each block
      state/calibration.safetensors
      state/sensitivity.json  which Linears get how many bits, where that is measured; measured once
      state/hidden-0007.bin   what enters block 7; written before the journal says that blocks 0 to 6 are finished
      state/original-0007.bin likewise in the original model, where blocks are tuned
      state/entering-0000.bin what enters block 0, until all scales have been tuned together, see ``end_to_end``
      state/scales-0007-0003.safetensors  block 7's scales after three steps of that
      state/lock              held by the running process; of several (see ``ranks``), by the first
      state/rank-1/           what belongs to the second of them: its own hidden states

At any moment the journal names a stage whose inputs are complete on disk. Everything after it is computed again and,
being deterministic, ends in the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from halfbyte.checkpoint.layout import write_error
from halfbyte.checkpoint.reader import bytes_of
from halfbyte.errors import HalfbyteError, OutputError, ResumeError
from halfbyte.records import fsync_folder, read_json, write_json

# What options mean that a journal does not mention.
UNSAID: dict[str, Any] = {"ranks": 1, "target_bits": None}


@dataclass(slots=True)
class RunFolder:
    """The folder of one run, locked.

    Attributes:
        out: the final folder; partial: where the run works until then.
        journal: ``options`` (what must not change), ``stage`` (finished blocks; -1 before the first copy) and whatever
            the pipeline keeps about finished blocks.

    Only the process that holds the lock changes anything here, except in the folder of :meth:`state_of`.
    """

    out: Path
    partial: Path
    journal: dict[str, Any]
    _lock: IO[bytes] | None

    @property
    def checkpoint(self) -> Path:
        return self.partial / "checkpoint"

    @property
    def state(self) -> Path:
        return self.partial / "state"

    def state_of(self, rank: int) -> Path:
        """Where a rank keeps its hidden states."""
        if rank == 0:
            return self.state
        folder = self.state / f"rank-{rank}"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def fresh(self) -> bool:
        """Whether no stage has been finished yet."""
        return int(self.journal["stage"]) < 0

    @staticmethod
    def open(out: Path, options: dict[str, Any], *, resume: bool) -> RunFolder:
        """Start a run, or continue one.

        Raises:
            OutputError: OUT exists, a partial run exists and ``resume`` is false, or the folder cannot be written.
            ResumeError: options, source or machine differ from those the run was started with; all are named.
        """
        RunFolder.require(out, resume=resume)
        partial = out.with_name(out.name + ".partial")
        try:
            (partial / "state").mkdir(parents=True, exist_ok=True)
            (partial / "checkpoint").mkdir(exist_ok=True)
            lock = open(partial / "state" / "lock", "wb")  # noqa: SIM115
        except OSError as e:
            raise write_error(e, partial, 0) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise OutputError("another process is working there", where=str(partial), remedy="Wait for it.") from None
        journal: dict[str, Any] = {"options": options, "stage": -1}
        if (partial / "state" / "journal.json").exists():
            try:
                journal = read_json(partial / "state" / "journal.json")
                _refuse_changes(partial, journal["options"], options)
            except HalfbyteError:
                lock.close()
                raise
        run = RunFolder(out, partial, journal, lock)
        if run.fresh:
            run.record(-1)
        return run

    @staticmethod
    def require(out: Path, *, resume: bool) -> None:
        """Refuse what :meth:`open` would, before any work: OUT or a run that is there, none where one should be."""
        partial = out.with_name(out.name + ".partial")
        if out.exists():
            raise OutputError(
                "exists already",
                where=str(out),
                remedy="Choose another folder, or remove this one; it is left untouched.",
            )
        if partial.exists() and not resume:
            raise OutputError(
                "holds an unfinished run",
                where=str(partial),
                remedy="Add --resume to continue it, or remove it to start again.",
            )
        if resume and not partial.exists():
            raise ResumeError("there is no unfinished run", where=str(partial), remedy="Start it without --resume.")

    @staticmethod
    def beside(out: Path, journal: dict[str, Any]) -> RunFolder:
        """The run that another process has opened, for one that works on it too."""
        partial = out.with_name(out.name + ".partial")
        if not (partial / "state" / "journal.json").exists():
            raise OutputError(
                "cannot be seen from every machine of the run",
                where=str(partial),
                remedy="Write to a folder that all of them share.",
            )
        return RunFolder(out, partial, journal, None)

    @staticmethod
    def options_of(out: Path) -> dict[str, Any]:
        """What the unfinished run for ``out`` was started with; empty where there is none."""
        journal = out.with_name(out.name + ".partial") / "state" / "journal.json"
        return dict(read_json(journal)["options"]) if journal.exists() else {}

    def record(self, stage: int, **facts: Any) -> None:
        """Declare blocks ``0 .. stage - 1`` finished, atomically, with facts about them."""
        self.journal |= {"stage": stage, **facts}
        if self._lock is None:
            return
        try:
            write_json(self.state / "journal.json", self.journal)
        except OSError as e:
            raise write_error(e, self.state, 0) from None

    def publish(self) -> None:
        """Give the finished checkpoint its final name and remove the state."""
        if self._lock is None:
            return
        fsync_folder(self.checkpoint)
        os.rename(self.checkpoint, self.out)
        fsync_folder(self.out.parent)
        self._lock.close()
        shutil.rmtree(self.partial)

    def leave(self) -> None:
        """Let go of the run as it is, so that another may continue it, in this process too."""
        if self._lock is not None:
            self._lock.close()

    def discard(self) -> None:
        """Remove the run and everything in it."""
        if self._lock is None:
            return
        self._lock.close()
        shutil.rmtree(self.partial, ignore_errors=True)


def already_published(out: Path) -> bool:
    """Whether a run was killed between taking its final name and removing its state; if so, the state is removed."""
    partial = out.with_name(out.name + ".partial")
    if out.exists() and partial.exists() and not (partial / "checkpoint").exists():
        shutil.rmtree(partial)
        return True
    return False


def _refuse_changes(partial: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    before, plain = UNSAID | before, UNSAID | json.loads(json.dumps(now))
    changed = [k for k in sorted(before.keys() | plain.keys()) if before.get(k) != plain.get(k)]
    if changed:
        listed = "; ".join(f"{k} was {_short(before.get(k))}, is {_short(plain.get(k))}" for k in changed)
        raise ResumeError(
            f"the run cannot be continued, because it would end in other bytes: {listed}",
            where=str(partial),
            remedy="Run with what it was started with, or remove the folder to start again.",
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(slots=True)
class HiddenStates:
    """What enters the next block, for every batch: ``[batch, tokens, hidden]`` each.

    In memory by default and saved after each block; with ``offload`` only on disk, read and written batch by batch
    (plain reads and writes: pages of a mapping would count as resident memory).

    Attributes:
        folder: where stages are kept.
        shapes: ``(batch, tokens)`` of each batch; width: hidden size; dtype: of the states.
        offload: keep none of it in memory.
        kind: how its files begin.
    """

    folder: Path
    shapes: Sequence[tuple[int, int]]
    width: int
    dtype: torch.dtype
    offload: bool
    kind: str = "hidden"
    _stage: int = 0
    _held: list[torch.Tensor] = field(default_factory=list)

    def _file(self, stage: int) -> Path:
        return self.folder / f"{self.kind}-{stage:04d}.bin"

    def _offset(self, batch: int) -> int:
        return sum(b * t for b, t in self.shapes[:batch]) * self.width * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        return self._offset(len(self.shapes))

    def resume(self, stage: int) -> None:
        """Take up what enters block ``stage`` from disk."""
        self._stage = stage
        self._held = [] if self.offload else [self._load(b) for b in range(len(self.shapes))]

    def read(self, batch: int) -> torch.Tensor:
        """What enters the current block, on the CPU; pinned where it came from a GPU and stays in memory."""
        return self._load(batch) if self.offload else self._held[batch]

    def write(self, batch: int, states: torch.Tensor, *, stage: int) -> None:
        """Set what enters block ``stage``. Batches in order; the current stage stays readable until its own is set."""
        states = self._on_cpu(states)
        if self.offload:
            self._store(batch, states, stage)
        elif batch < len(self._held):
            self._held[batch] = states
        else:
            self._held.append(states)

    def _on_cpu(self, states: torch.Tensor) -> torch.Tensor:
        if states.is_cuda and not self.offload:
            return torch.empty(states.shape, dtype=self.dtype, pin_memory=True).copy_(states)
        return states.to("cpu", self.dtype)

    def saver(self, stage: int) -> Callable[[], None]:
        """What makes ``stage``, as it is now, complete and durable on disk; it may be called while the next is made."""
        held = list(self._held)

        def save() -> None:
            for b, states in enumerate(held):
                self._store(b, states, stage)
            descriptor = os.open(self._file(stage), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            fsync_folder(self.folder)

        return save

    def turn(self, stage: int) -> None:
        """From now on the current block is ``stage``."""
        self._stage = stage

    def release(self) -> None:
        """Keep none of it in memory any more; it cannot be read after that, but for what is on disk."""
        self._held = []

    def forget(self, stage: int) -> None:
        """Remove a stage that is no longer needed."""
        self._file(stage).unlink(missing_ok=True)

    def _store(self, batch: int, states: torch.Tensor, stage: int) -> None:
        try:
            descriptor = os.open(self._file(stage), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                data, offset, done = bytes_of(states), self._offset(batch), 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], offset + done)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise write_error(e, self._file(stage), 2 * self.size_bytes) from None

    def _load(self, batch: int) -> torch.Tensor:
        b, t = self.shapes[batch]
        buffer = torch.empty(b * t * self.width * self.dtype.itemsize, dtype=torch.uint8)
        with open(self._file(self._stage), "rb", buffering=0) as f:
            f.seek(self._offset(batch))
            view, done = buffer.numpy().data, 0
            while done < len(view):
                count = f.readinto(view[done:])
                if not count:
                    raise ResumeError("hidden states are cut short", where=str(self._file(self._stage)))
                done += count
        return buffer.view(self.dtype).reshape(b, t, self.width)
