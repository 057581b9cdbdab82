"""Linears that can trade a factor for each channel: one's output channel goes, times something, into another's input.

Up's output goes into down's input as ``act(gate) up``, v's into o's as an average over tokens: divided by s there, an
output channel can be multiplied by s in the columns that read it, and nothing else of the block changes. Which Linears
are wired like that, and which channel goes where, is not read from names but found by trying, as in ``sequential``:

- Every Linear's output is replaced by positive noise, so that no channel is zero and none cancels out. Then one
  Linear's is multiplied by powers of two, and the inputs of all others and the block's result are looked at. It is a
  source where only one later stage's input changes, and each of its channels by one power of two over all tokens.
- Of a fused Linear (q/k/v; gate/up) only the last channels may be such: how many is found by halving.
- Channels get numbers, and the powers of two are their digits: a few passes tell for every input channel which output
  channel it depends on. Several may depend on one (heads that share keys and values).
- At last all of it has to hold for the outputs that the Linears really have, which may be large enough to be clipped.

Products with powers of two are exact, so that what is looked for shows to the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.forwards import replaced_forwards

# Powers of two by which channels are told apart in one pass: 2^0 to 2^7.
DIGIT = 8
# With real outputs: powers of two from 2^-2 to 2^2.
REAL_EXPONENT = 2
# Beyond that nothing is a multiple that any pass asks for.
LARGEST_EXPONENT = DIGIT
_POWERS = torch.tensor([2.0**e for e in range(-LARGEST_EXPONENT, LARGEST_EXPONENT + 1)])


@dataclass(frozen=True, slots=True)
class Pair:
    """Where the channels of a stage's input come from.

    Attributes:
        source: the Linear whose output they are linear in.
        channels: for each input channel the output channel of ``source`` that it is a multiple of; -1 for none.
    """

    source: str
    channels: tuple[int, ...]

    def renamed(self, prefix: str) -> Pair:
        return Pair(prefix + self.source, self.channels)

    def to_columns(self, of_source: torch.Tensor, fill: float) -> torch.Tensor:
        """Values of output channels ``[out]``, for the input channels that depend on them ``[in]``."""
        index = torch.tensor(self.channels, device=of_source.device)
        return torch.where(index < 0, torch.full_like(of_source[:1], fill), of_source[index.clamp(min=0)])

    def to_source(self, of_columns: torch.Tensor, width: int) -> torch.Tensor:
        """For each output channel the sum ``[width]`` over the input channels behind it."""
        index = torch.tensor(self.channels, device=of_columns.device)
        read = index >= 0
        return of_columns.new_zeros(width).index_add(0, index[read], of_columns[read])


def find_pairs(
    linears: Mapping[str, nn.Linear], stages: Sequence[Sequence[str]], run: Callable[[], torch.Tensor]
) -> dict[int, Pair]:
    """Stages whose inputs are linear in some Linear's output, channel by channel.

    Args:
        linears: of a block, each called once, by name.
        stages: their names, by shared input, in the order of their calls.
        run: runs a batch through the block and returns its output.

    Returns:
        by stage, the pair that covers most of its input channels.
    """
    noise = _Trial(linears, stages, run, _noise)
    names = [name for stage in stages[:-1] for name in stage]
    candidates = [c for name in names if (c := _pair_from(name, linears[name].out_features, noise)) is not None]
    del noise
    if not candidates:
        return {}
    found: dict[int, Pair] = {}
    real = _Trial(linears, stages, run, _product)
    for stage, pair in sorted(candidates, key=lambda c: -sum(channel >= 0 for channel in c[1].channels)):
        if stage not in found and _holds(pair, stage, linears[pair.source].out_features, real):
            found[stage] = pair
    return found


def _noise(number: int, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(number)
    return (0.5 + torch.rand((*x.shape[:-1], module.out_features), generator=generator)).to(x)


def _product(_: int, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


@dataclass(slots=True)
class _Trial:
    """A block whose Linears have fixed outputs.

    Attributes:
        make: a Linear's output in the first pass, from its number and its input.
    """

    linears: Mapping[str, nn.Linear]
    stages: Sequence[Sequence[str]]
    run: Callable[[], torch.Tensor]
    make: Callable[[int, nn.Linear, torch.Tensor], torch.Tensor]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: list[torch.Tensor] = field(default_factory=list)
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.inputs, self.result = self._pass({})

    def changed(self, name: str, exponents: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """What becomes of the inputs when one Linear's output channels are multiplied by ``2^e``.

        Args:
            exponents: e ``[out]``.

        Returns:
            the only stage whose input changes, and for each of its channels the e by whose power it does; ``None``
            where that is not all that changes, or it is no such change, or nothing changes.
        """
        inputs, result = self._pass({name: exponents})
        if not torch.equal(result, self.result):
            return None
        others = [i for i, (x, y) in enumerate(zip(self.inputs, inputs, strict=True)) if not torch.equal(x, y)]
        if len(others) != 1:
            return None
        before, after = (x[others[0]].flatten(0, -2) for x in (self.inputs, inputs))
        sizes = [x.abs().sum(0, dtype=torch.float64) for x in (before, after)]
        if not all(bool((torch.isfinite(size) & (size > 0)).all()) for size in sizes):
            return None
        found = (sizes[1] / sizes[0]).log2().round()
        if bool((found.abs() > LARGEST_EXPONENT).any()):
            return None
        exponents = found.long().cpu()
        return (others[0], exponents) if _is_multiple(after, before, exponents) else None

    def holds(self, name: str, exponents: torch.Tensor, stage: int, expected: torch.Tensor) -> bool:
        """Whether the input of ``stage`` is multiplied by ``2^expected [in]`` and nothing else changes."""
        inputs, result = self._pass({name: exponents})
        same = [torch.equal(x, y) for i, (x, y) in enumerate(zip(self.inputs, inputs, strict=True)) if i != stage]
        as_before = all(same) and torch.equal(result, self.result)
        return as_before and _is_multiple(inputs[stage], self.inputs[stage], expected)

    def _pass(self, exponents: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        stage_of = {names[0]: i for i, names in enumerate(self.stages)}
        inputs: dict[int, torch.Tensor] = {}

        def stand_in(number: int, name: str, module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
            def forward(x: torch.Tensor) -> torch.Tensor:
                if name in stage_of:
                    inputs[stage_of[name]] = x.clone()
                if name not in self.outputs:
                    self.outputs[name] = self.make(number, module, x)
                y = self.outputs[name]
                return y * _powers(exponents[name]).to(y) if name in exponents else y.clone()

            return forward

        stand_ins: dict[nn.Module, Callable[..., torch.Tensor]] = {
            m: stand_in(i, n, m) for i, (n, m) in enumerate(self.linears.items())
        }
        with replaced_forwards(stand_ins):
            result = self.run()
        return [inputs[i] for i in range(len(self.stages))], result.clone()


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """``2^e``, exactly, float32."""
    return _POWERS[exponents + LARGEST_EXPONENT]


def _is_multiple(after: torch.Tensor, before: torch.Tensor, exponents: torch.Tensor) -> bool:
    """Whether ``after`` is ``before 2^e``, up to the last bits."""
    expected = before.float() * _powers(exponents).to(before.device)
    return torch.allclose(after.float(), expected, rtol=2 * torch.finfo(before.dtype).eps, atol=0.0)


def _pair_from(name: str, width: int, noise: _Trial) -> tuple[int, Pair] | None:
    """The stage that a Linear's output goes into, channel by channel; ``None`` where it does not, or not alone."""
    first = _first_channel(name, width, noise)
    if first is None:
        return None
    numbers = (torch.arange(width) - first + 1).clamp(min=0)
    stage, found, place = -1, torch.zeros(1, dtype=torch.int64), 1
    while place <= width - first:
        seen = noise.changed(name, numbers // place % DIGIT)
        if seen is None or bool(((seen[1] < 0) | (seen[1] >= DIGIT)).any()):
            return None
        stage, found = seen[0], found + seen[1] * place
        place *= DIGIT
    channels = torch.where(found == 0, -1, found - 1 + first)
    return (stage, Pair(name, tuple(channels.tolist()))) if bool((channels < width).all()) else None


def _first_channel(name: str, width: int, noise: _Trial) -> int | None:
    """From which channel on the output goes into one later stage's input and nowhere else; ``None`` for none."""

    def good(first: int) -> bool:
        seen = noise.changed(name, (torch.arange(width) >= first).long())
        return seen is not None and bool(((seen[1] == 0) | (seen[1] == 1)).all()) and bool((seen[1] == 1).any())

    if good(0):
        return 0
    bad, first = 0, width - 1
    if first == 0 or not good(first):
        return None
    while first - bad > 1:
        middle = (first + bad) // 2
        bad, first = (bad, middle) if good(middle) else (middle, first)
    return first


def _holds(pair: Pair, stage: int, width: int, real: _Trial) -> bool:
    """Whether it is so with the outputs that the Linears really have."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-REAL_EXPONENT, REAL_EXPONENT + 1, (width,), generator=generator)
    read = torch.zeros(width, dtype=torch.bool)
    read[[c for c in pair.channels if c >= 0]] = True
    exponents = torch.where(read, exponents, 0)
    return real.holds(pair.source, exponents, stage, pair.to_columns(exponents, 0))
