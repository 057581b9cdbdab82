"""Several processes quantise one model together: ``torchrun --nproc-per-node N -m halfbyte quantize ...``.

Every process (a *rank*) walks through all blocks with its share of the calibration batches. Statistics are summed,
each Linear is solved by one rank, and its codes go to all, so that all hold the same quantised block. Rank 0 alone
speaks and writes the checkpoint.

What one rank raises, all raise: every exchange between them begins with the question whether one has failed, and a
failing rank answers it (:meth:`Ranks.sharing`). A rank that is killed answers nothing; the others see its connections
close, or torchrun tells them to end, and one of them says so. CPU tensors travel by gloo, Hessians on GPUs by nccl.

Not covered: a machine that vanishes without closing its connections is missed only after :data:`PATIENCE`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from halfbyte.errors import HalfbyteError, RankError, UsageError

T = TypeVar("T")

# Rank 0 may be writing calibration text for as long.
PATIENCE = datetime.timedelta(hours=12)
# How long a rank that was told to end may take to find out by itself why, and then to tidy up.
NOTICE_S = 2.0
TIDYING_S = 15.0


@dataclass(slots=True)
class _Peers:
    """What a rank knows of the others besides what they exchange.

    Attributes:
        store: torchrun's key-value store, which outlives every rank; processes: ``(host, pid)`` of each rank.
        missed: set once it is known that one has ended without a word.
    """

    store: Store
    processes: list[tuple[str, int]]
    missed: threading.Event = field(default_factory=threading.Event)

    def gone(self, wait_s: float = 1.0) -> list[int]:
        """Ranks on this machine whose processes are no more; looked for until there is one."""
        deadline = time.monotonic() + wait_s
        while True:
            found = [r for r, (host, pid) in enumerate(self.processes) if host == socket.gethostname() and ended(pid)]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def error(self) -> RankError:
        """What to say where one has ended without a word."""
        self.missed.set()
        gone = self.gone()
        listed = ", ".join(f"{r} (process {self.processes[r][1]})" for r in gone) or "another one"
        return RankError(
            f"rank {listed} of {len(self.processes)} has ended without a word" if gone else "a rank has ended",
            why="killed, or out of memory",
            remedy="Run the same command again with --resume.",
        )

    def may_speak(self) -> bool:
        """True for the first rank that asks."""
        try:
            return int(self.store.add("halfbyte/spoken", 1)) == 1
        except RuntimeError:
            return True


@dataclass(slots=True)
class Ranks:
    """This process among those that work on a run. Without arguments: the only one, and nothing is exchanged.

    All ranks must call the same methods in the same order. Threads need a :class:`Ranks` each, see :attr:`aside`.

    Attributes:
        rank: 0 to ``world - 1``; world: how many there are.
    """

    rank: int = 0
    world: int = 1
    _group: Any = None
    _aside: Any = None
    _peers: _Peers | None = None
    _over: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def aside(self) -> Ranks:
        """The same ranks with a line of their own, for one other thread."""
        return Ranks(self.rank, self.world, self._aside, None, self._peers)

    def agree(self) -> None:
        """Wait until all ranks are here; raise what one of them has raised instead."""
        if self.world > 1:
            self._ask(None)

    def decide(self, make: Callable[[], T], owner: int = 0) -> T:
        """What ``make`` returns on one rank (anything that can be pickled), for all; it is not called on the others."""
        if self.world == 1:
            return make()
        said: list[Any] = [make() if self.rank == owner else None]
        self._ask(None)
        with self._line():
            dist.broadcast_object_list(said, src=owner, group=self._group)
        value: T = said[0]
        return value

    def spread(self, value: torch.Tensor | None, owner: int) -> torch.Tensor | None:
        """One rank's CPU tensor, of any dtype, or ``None``, for all."""
        if self.world == 1:
            return value
        kind = self.decide(lambda: None if value is None else (value.shape, value.dtype), owner)
        if kind is None:
            return None
        shape, dtype = kind
        mine = self.rank == owner and value is not None
        sent = value.contiguous() if mine and value is not None else torch.empty(shape, dtype=dtype)
        with self._line():
            dist.broadcast(sent.view(-1).view(torch.uint8), src=owner, group=self._group)
        return value if mine else sent

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that can be pickled), in the order of ranks."""
        if self.world == 1:
            return [value]
        self._ask(None)
        found: list[Any] = [None] * self.world
        with self._line():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def add_(self, value: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks; the same bits on each."""
        self._reduce(value, dist.ReduceOp.SUM)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list that all have: every ``world``-th."""
        return list(items[self.rank :: self.world])

    def whole(self, items: list[T]) -> list[T]:
        """The list that :meth:`share` was taken from, or one of something made of each item."""
        parts = self.gather(items)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Who takes which piece of work: dearest first, to whoever has least."""
        load, owners = [0] * self.world, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = load.index(min(load))
            load[owners[i]] += costs[i]
        return owners

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """What is raised inside is raised by all ranks, at their next exchange."""
        try:
            yield
        except Exception as e:
            if self.world > 1 and not self._over:
                with contextlib.suppress(RankError):
                    self._ask(e)
            raise

    def _ask(self, error: Exception | None) -> None:
        """Has anybody failed? Every exchange begins with this, so a failing rank can answer whichever comes next."""
        failed = torch.tensor([error is not None], dtype=torch.int32)
        said: list[Any] = [None] * self.world
        with self._line():
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
            if not int(failed):
                return
            self._over = True
            dist.all_gather_object(said, None if error is None else _parts(error), group=self._group)
        if error is None:
            rank = next(r for r, parts in enumerate(said) if parts is not None)
            kind, what, where, why, remedy = said[rank]
            raise kind(what, where=f"rank {rank}: {where}" if where else f"rank {rank}", why=why, remedy=remedy)

    def _reduce(self, value: torch.Tensor, how: Any) -> None:
        if self.world > 1:
            self._ask(None)
            with self._line():
                dist.all_reduce(value, how, group=None if value.is_cuda else self._group)

    @contextlib.contextmanager
    def _line(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            self._over = True
            assert self._peers is not None
            raise self._peers.error() from None

    def quietly(self, error: BaseException) -> bool:
        """Whether another rank says what went wrong; this one then waits for it, so that torchrun does not end it."""
        assert self._peers is not None
        if self._peers.missed.is_set():
            return not self._peers.may_speak()
        if self.first:
            return False
        if isinstance(error, Exception):
            with contextlib.suppress(RuntimeError):
                dist.barrier(group=self._group)  # ends when rank 0 does
        return isinstance(error, HalfbyteError | KeyboardInterrupt)


def _parts(error: Exception) -> tuple[type[HalfbyteError], str, str, str, str]:
    if isinstance(error, HalfbyteError):
        return type(error), error.what, error.where, error.why, error.remedy
    return RankError, f"{type(error).__name__}: {error}", "", "", "This is a bug in halfbyte; please report it."


def ended(pid: int) -> bool:
    """Whether a process of this machine is no more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Work together with the other processes that torchrun started; alone where it started none.

    Inside, errors of one rank are raised by all. On leaving with an error all ranks but one end the process without a
    word.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``: each rank takes the GPU of its number on the machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield Ranks()
        return
    ranks = _join(device)
    try:
        with ranks.sharing():
            yield ranks
            ranks.agree()
    except (Exception, KeyboardInterrupt) as e:
        if ranks.quietly(e):
            raise SystemExit(e.exit_status if isinstance(e, HalfbyteError) else 130) from None
        raise
    dist.destroy_process_group()


def _join(device: str) -> Ranks:
    """Connect to the other ranks."""
    local, on_gpu = int(os.environ.get("LOCAL_RANK", "0")), device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"rank {local} of this machine has no GPU; there are {torch.cuda.device_count()}",
                where="--nproc-per-node",
                remedy="Start as many processes as there are GPUs, or use --device cpu.",
            )
        torch.cuda.set_device(local)
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    main, aside = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    processes: list[Any] = [None] * world
    dist.all_gather_object(processes, (socket.gethostname(), os.getpid()), group=main)
    peers = _Peers(store, processes)
    _heed_sigterm(peers)
    return Ranks(rank, world, main, aside, peers)


def _heed_sigterm(peers: _Peers) -> None:
    """On SIGTERM, which torchrun sends when a rank has ended: say why and end, also in the middle of long arithmetic.

    Python runs handlers only between its own instructions and in the main thread, which may be waiting for a dead
    rank; so a thread listens. It is safe to end anywhere, see ``state``.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while ours.recv(1) != bytes([signal.SIGTERM]):
            pass
        if peers.missed.wait(NOTICE_S):
            time.sleep(TIDYING_S)  # the main thread knows, and ends the process before
            os._exit(2)
        message = str(peers.error()) if peers.gone() else "told to end (SIGTERM). Run again with --resume to continue."
        if peers.may_speak():
            print(f"halfbyte: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    threading.Thread(target=listen, daemon=True).start()
    # The thread's end of the pair lives with it, the other with the process.
    _SOCKETS.append(theirs)


_SOCKETS: list[socket.socket] = []
