"""Second moments of Linear inputs, one for each distinct input.

Linears that are called with the same tensor (q/k/v; gate/up) share one statistic. That is seen from the tensor objects
themselves while a block runs, not guessed from names. Padded positions never enter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.arithmetic import fast_bfloat16
from halfbyte.heap import mapped
from halfbyte.ranks import Ranks

STRIP = 256
# On a GPU narrower strips would be over before they fill it; at 14336 these are 0.54 of the full product.
STRIP_ON_GPU = 1024


@dataclass(slots=True)
class SecondMoment:
    """``H = sum_t x_t x_t^T`` over tokens, float32.

    Only strips on and above the diagonal are accumulated (``H[i:i+256, i:]``); :meth:`finish` mirrors them. For
    ``in = 2048`` that is 0.56 of the full product's arithmetic. On a GPU strips are 1024 wide.

    Attributes:
        names: the Linears that share this input.
        hessian: ``[in, in]`` float32; below the strips undefined until :meth:`finish`.
        tokens: how many entered.
        pooled: for how many more the tokens of an expert's whole layer count, see ``methods.pooled``.
        rare: whether it is that of an expert that few tokens reach.
    """

    names: list[str]
    hessian: torch.Tensor
    tokens: int = 0
    pooled: int = 0
    rare: bool = False

    @staticmethod
    def empty(in_features: int, device: torch.device) -> SecondMoment:
        with mapped():
            hessian = torch.zeros(in_features, in_features, device=device)
        return SecondMoment(names=[], hessian=hessian)

    def add(self, x: torch.Tensor) -> None:
        """Add tokens ``x [tokens, in]``, multiplied in float32, but for what processors do faster:

        - The tensor cores of a GPU multiply bfloat16 and float16 to float32 sums; nothing is rounded.
        - A CPU's instructions for bfloat16 sum up in float32, too, but torch returns each call's sum rounded to
          bfloat16, by 2^-8 of itself at most. Sums of calls are float32, so that roundings cancel out as calls add up.
          An entry of H is off from that of endless text by ``sqrt(H_ii H_jj / tokens)`` or so, and :func:`shrinkage`
          is as large; what rounding adds is a small part of either (docs/log.md).
        """
        mixed, n, strip = multiplies_mixed(x), x.shape[1], self._strip
        rounded = x.dtype == torch.bfloat16 and not x.is_cuda and fast_bfloat16()
        if not mixed and not rounded:
            x = x.float()
        transposed = x.T
        for i in range(0, n, strip):
            block, rows, columns = self.hessian[i : i + strip, i:], transposed[i : i + strip], x[:, i:]
            if mixed:
                block += torch.mm(rows, columns, out_dtype=torch.float32)
            elif rounded:
                block += torch.mm(rows, columns)
            else:
                block.addmm_(rows, columns)
        self.tokens += x.shape[0]

    @property
    def _strip(self) -> int:
        return STRIP_ON_GPU if self.hessian.is_cuda else STRIP

    def unite(self, ranks: Ranks) -> None:
        """Make it the moment of all ranks' tokens."""
        ranks.add_(self.hessian)
        self.tokens = sum(ranks.gather(self.tokens))

    def take(self) -> torch.Tensor:
        """The symmetric ``H``, given away: the moment keeps no reference to it, so that it is freed once used."""
        result = self.finish()
        self.hessian = torch.empty(0)
        return result

    def finish(self) -> torch.Tensor:
        """The symmetric ``H``."""
        n, strip = self.hessian.shape[0], self._strip
        for i in range(0, n, strip):
            end = min(i + strip, n)
            self.hessian[end:, i:end] = self.hessian[i:end, end:].T
        return self.hessian


def multiplies_mixed(x: torch.Tensor) -> bool:
    """Whether ``torch.mm`` gives float32 for this input as it is: on a GPU with bfloat16 tensor cores (compute
    capability 8.0), from torch 2.8."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and "dtype" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


@dataclass(slots=True)
class Collector:
    """Forward hooks on a block's Linears that accumulate one :class:`SecondMoment` for each distinct input.

    Use::

        with Collector(linears, device) as collector:
            for batch: collector.run(lambda: block(...), rows)
    """

    linears: Mapping[str, nn.Module]
    device: torch.device
    moments: list[SecondMoment] = field(default_factory=list)
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    _moment_of: dict[str, SecondMoment] = field(default_factory=dict)
    _seen: list[tuple[torch.Tensor, SecondMoment]] = field(default_factory=list)
    _rows: torch.Tensor | None = None

    def __enter__(self) -> Collector:
        for name, module in self.linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def run(self, forward: Callable[[], object], rows: torch.Tensor | None) -> None:
        """Run one batch through ``forward()``.

        Args:
            forward: a callable without arguments.
            rows: bool ``[batch * tokens]``, true where a position is not padding; ``None`` when none is padded.
        """
        self._rows = rows
        self._seen.clear()
        try:
            forward()
        finally:
            self._seen.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._record(name, arguments[0])

        return record

    def _record(self, name: str, x: torch.Tensor) -> None:
        shared = next((moment for tensor, moment in self._seen if tensor is x), None)
        known = self._moment_of.get(name)
        if shared is not None and known in (None, shared):
            if known is None:
                self._join(name, shared)
        else:
            if known is None:
                known = SecondMoment.empty(x.shape[-1], self.device)
                self.moments.append(known)
                self._join(name, known)
            flat = x.reshape(-1, x.shape[-1])
            known.add(flat if self._rows is None else flat[self._rows])
            self._seen.append((x, known))

    def _join(self, name: str, moment: SecondMoment) -> None:
        moment.names.append(name)
        self._moment_of[name] = moment

    def never_called(self) -> Sequence[str]:
        """Linears that no batch reached."""
        return [n for n in self.linears if n not in self._moment_of]
