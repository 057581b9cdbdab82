"""The next block's weights, on their way to the GPU while a block is worked on.

A thread reads them, puts them into pinned memory and copies them on a stream of its own. That takes the memory of one
more block on both sides. So it is not used on a CPU, where memory is what halfbyte saves and reading takes little time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class ReadAhead:
    """Tensors asked for in advance.

    Attributes:
        read: reads a tensor by its name.
        device, dtype: what it is brought to.
    """

    read: Callable[[str], torch.Tensor]
    device: torch.device
    dtype: torch.dtype
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "read-ahead"))
    _coming: dict[str, Future[torch.Tensor]] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None

    @staticmethod
    def onto(read: Callable[[str], torch.Tensor], device: torch.device, dtype: torch.dtype) -> ReadAhead:
        ahead = ReadAhead(read, device, dtype)
        if device.type == "cuda":  # another thread's current GPU is the first one, so ours goes by its number
            ahead.device = torch.device("cuda", torch.cuda.current_device())
            ahead._stream = torch.cuda.Stream(ahead.device)  # type: ignore[no-untyped-call]
        return ahead

    def ask(self, names: Iterable[str]) -> None:
        """Begin to fetch these and forget what was asked for before."""
        for stale in self._coming.values():
            stale.cancel()
        self._coming = {name: self._thread.submit(self._fetch, name) for name in names}

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor that was asked for, given away; ``None`` where it was not. Raises what reading it raised."""
        future = self._coming.pop(name, None)
        if future is None:
            return None
        value = future.result()
        if value.is_cuda:  # so that its memory is not handed out again before our stream is done with it
            value.record_stream(torch.cuda.current_stream(self.device))
        return value

    def _fetch(self, name: str) -> torch.Tensor:
        value = self.read(name).to(self.dtype)
        if self._stream is None:
            return value.to(self.device)
        with torch.cuda.stream(self._stream):
            arrived = value.pin_memory().to(self.device, non_blocking=True)
        self._stream.synchronize()
        return arrived
