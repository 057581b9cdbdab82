"""One block's inputs, stage by stage: a Linear's statistic is taken where everything before it is quantised already.

GPTQ calls this true-sequential. Done plainly it costs one pass through the block for every stage (q/k/v; o; gate/up;
down). Here every Linear's product is computed once in all: a stage keeps what it saw, and the next goes on from there.
So a block costs one forward pass and its second moments, where observing the original block first and running the
quantised one after it costs two passes.

Nothing of this is read from names. For the first batch a :class:`Route` is learnt by trying:

- Linears that receive the same tensor object are one *stage*; stages follow in the order in which they are called;
- each Linear's output is replaced by ones, all others' left as they were: where nothing changes behind the next stage
  (q, k and v act through o's input alone), its output need not be remembered; else it is *lasting* (o and down, which
  go into the residual stream);
- with all lasting outputs in place and ones for all others, a stage whose input comes out right is cheap to reach
  (q/k/v and gate/up lie behind a norm); the input of another is *kept* (o's, down's);
- a module that returns a lasting output as it is (the attention, the MLP) need not run again once that is there;
- a norm that only feeds what a pass does not look at any more is left out of it.

A layer of experts is a stage of its own, which :mod:`halfbyte.routed` walks through. A block whose Linears are not each
called once a batch, in one order, is observed at once: :class:`AtOnce`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from halfbyte.checkpoint.layout import write_error
from halfbyte.checkpoint.reader import bytes_of
from halfbyte.errors import ArchitectureError, ResumeError
from halfbyte.experts import Experts
from halfbyte.forwards import replaced_forwards
from halfbyte.pairs import Pair
from halfbyte.ranks import Ranks
from halfbyte.routed import Entering, ExpertLayer, RoutedWalk, linear
from halfbyte.schemes import ActivationFormat
from halfbyte.statistics import Collector, SecondMoment

# A Linear, or a layer of experts as a whole.
Leaf = nn.Linear | Experts
# More Linears than this make trying each one dear, and are experts of a kind that is not known in all likelihood.
MOST_LINEARS = 32
# Tokens that strengths of smoothing are tried on.
SAMPLED_TOKENS = 256


class InputSeen(Exception):
    """Raised inside a block when the stage's input has been recorded: the rest of the pass is not needed."""


@dataclass(frozen=True, slots=True)
class Route:
    """How data flows from Linear to Linear in a block. Names are the caller's.

    Attributes:
        stages: Linears by shared input, in the order of their first calls.
        kept: stages whose inputs have to be kept.
        lasting: Linears whose outputs have to be remembered.
        owners: a lasting Linear's outermost module that returns its output as it is (path in the block), and how many
            ``None`` follow it there in a tuple; -1: no tuple.
        norms: for stages whose input is a norm's output that goes nowhere else: the norm's path.
        idle: for each stage, and at last for the pass that makes the outputs: paths of norms that do not matter there.
    """

    stages: tuple[tuple[str, ...], ...]
    kept: frozenset[int]
    lasting: frozenset[str]
    owners: Mapping[str, tuple[str, int]]
    norms: Mapping[int, str] = field(default_factory=dict)
    idle: tuple[frozenset[str], ...] = ()

    def stage_of(self, name: str) -> int:
        return next(i for i, names in enumerate(self.stages) if name in names)

    def renamed(self, prefix: str) -> Route:
        """The same with a prefix before every Linear's name."""
        return Route(
            stages=tuple(tuple(prefix + n for n in names) for names in self.stages),
            kept=self.kept,
            lasting=frozenset(prefix + n for n in self.lasting),
            owners={prefix + n: owner for n, owner in self.owners.items()},
            norms=self.norms,
            idle=self.idle,
        )

    def kept_bytes(self, linears: Mapping[str, Leaf], tokens: int, itemsize: int) -> int:
        """The most that is kept at a time: inputs of a stage and the one before it, and lasting outputs up to there."""
        most = 0
        for stage in range(len(self.stages)):
            inputs = [self.stages[i][0] for i in (stage - 1, stage) if i in self.kept]
            before = [n for earlier in self.stages[:stage] for n in earlier if n in self.lasting]
            width = sum(linears[n].in_features for n in inputs) + sum(linears[n].out_features for n in before)
            most = max(most, width)
        return most * tokens * itemsize


@dataclass(slots=True)
class _Recorded:
    """What one plain pass through a block showed."""

    order: list[str] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    besides: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    owners: dict[str, tuple[str, int]] = field(default_factory=dict)
    gains: dict[str, torch.Tensor] = field(default_factory=dict)
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, slots=True)
class Norms:
    """A block's norms: modules with a ``weight`` for each channel. Paths in the block.

    Attributes:
        paths: in the order in which they were called.
        reads: the one that reads what enters the block; ``None`` where there is none.
    """

    paths: tuple[str, ...]
    reads: str | None


def learn_route(block: nn.Module, linears: Mapping[str, Leaf], run: Callable[[], torch.Tensor]) -> Route | None:
    """Find out how a block's Linears follow each other, from one batch.

    Args:
        block: with its weights in place.
        linears: those that are to be observed, and layers of experts, by name.
        run: runs the batch through the block and returns its output.

    Returns:
        the route; ``None`` where the Linears are too many, or not each called once.
    """
    if len(linears) > MOST_LINEARS:
        return None
    seen = _record(block, linears, run)
    if sorted(seen.order) != sorted(linears):
        return None
    stages: list[list[str]] = []
    for name in seen.order:
        alone = isinstance(linears[name], Experts)
        known = next((s for s in stages if not alone and _shares(linears[s[0]], seen, s[0], name)), None)
        if known is None:
            stages.append([name])
        else:
            known.append(name)
    stage_of = {name: i for i, names in enumerate(stages) for name in names}
    lasting = set()
    for name in linears:
        right, same_result = _try(linears, run, seen, {name})
        later = [n for n in linears if stage_of[n] >= stage_of[name] + 2]
        if not same_result or not all(right[n] for n in later) or isinstance(linears[name], Experts):
            lasting.add(name)
    right, same_result = _try(linears, run, seen, set(linears) - lasting)
    if not same_result:
        return None
    kept = {i for i, names in enumerate(stages) if not right[names[0]]}
    norms = {}
    felt: dict[str, tuple[set[str], bool]] = {}
    for path, gain in seen.gains.items():
        right, same_result = _try(linears, run, seen, set(), {path: torch.ones_like}, block)
        felt[path] = {n for n in linears if not right[n]}, not same_result
        stage = next((i for i, names in enumerate(stages) if seen.inputs[names[0]] is gain), None)
        if stage is not None and felt[path][0] <= set(stages[stage]) and same_result:
            norms[stage] = path
    idle = []
    for i in range(len(stages) + 1):
        # What this pass may look at: its own stage's input, and of Linears whose outputs it may have to compute.
        wanted = {n for n in linears if stage_of[n] == i}
        wanted |= {n for n, j in stage_of.items() if j < i and j not in kept and (j == i - 1 or n in lasting)}
        left_out = {path for path, (at, result) in felt.items() if not (at & wanted or (result and i == len(stages)))}
        right, same_result = _try(linears, run, seen, set(), dict.fromkeys(left_out, _as_it_is), block)
        good = all(right[n] for n in wanted) and (same_result or i < len(stages))
        idle.append(frozenset(left_out) if good else frozenset())
    return Route(
        stages=tuple(tuple(names) for names in stages),
        kept=frozenset(kept),
        lasting=frozenset(lasting),
        owners={name: owner for name, owner in seen.owners.items() if name in lasting},
        norms=norms,
        idle=tuple(idle),
    )


def find_norms(block: nn.Module, run: Callable[[], torch.Tensor]) -> Norms:
    """Find a block's norms in one pass of one batch, whatever is quantised.

    Args:
        block: with its weights in place.
        run: runs the batch through the block and returns its output.
    """
    paths: dict[str, None] = {}
    reads: list[str] = []
    entering: list[Any] = []
    handles = [block.register_forward_pre_hook(lambda _, given: entering.extend(given[:1]))]

    def look(path: str, module: nn.Module, given: tuple[Any, ...], more: dict[str, Any], out: Any) -> None:
        if _multiplies_channels(module, given, more, out):
            paths[path] = None
            if entering and given[0] is entering[0]:
                reads.append(path)

    for path, module in block.named_modules():
        if module is not block and not isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(partial(look, path), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return Norms(tuple(paths), reads[-1] if reads else None)


def _shares(first: Leaf, seen: _Recorded, one: str, other: str) -> bool:
    return not isinstance(first, Experts) and seen.inputs[one] is seen.inputs[other]


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _multiplies_channels(module: nn.Module, given: tuple[Any, ...], more: Mapping[str, Any], out: Any) -> bool:
    """Whether a call looks like a norm's: one tensor in, one of its shape out, a weight for each channel."""
    weight = module._parameters.get("weight")
    plain = len(given) == 1 and not more and isinstance(given[0], torch.Tensor) and isinstance(out, torch.Tensor)
    return weight is not None and weight.dim() == 1 and plain and out.shape == given[0].shape


def _record(block: nn.Module, linears: Mapping[str, Leaf], run: Callable[[], torch.Tensor]) -> _Recorded:
    seen = _Recorded()
    returned: dict[str, torch.Tensor] = {}
    handles = []

    def recorder(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *besides: torch.Tensor) -> torch.Tensor:
            y = original(x, *besides)
            seen.order.append(name)
            seen.inputs[name], seen.outputs[name], returned[name] = x, y.clone(), y
            seen.besides[name] = besides
            return y

        return forward

    def owner(path: str, module: nn.Module) -> None:
        def look(_: nn.Module, given: tuple[Any, ...], more: dict[str, Any], out: Any) -> None:
            if _multiplies_channels(module, given, more, out):
                seen.gains[path] = out
            first, rest = (out[0], out[1:]) if isinstance(out, tuple) and out else (out, None)
            for name, y in returned.items():
                if y is first and all(r is None for r in rest or ()):
                    seen.owners[name] = (path, -1 if rest is None else len(rest))  # outer modules end later

        handles.append(module.register_forward_hook(look, with_kwargs=True))

    within = {id(m) for leaf in linears.values() for m in leaf.modules()}
    for path, module in block.named_modules():
        if module is not block and id(module) not in within and not isinstance(module, nn.Linear):
            owner(path, module)
    try:
        with replaced_forwards({m: recorder(n, m.forward) for n, m in linears.items()}):
            seen.result = run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _try(
    linears: Mapping[str, Leaf],
    run: Callable[[], torch.Tensor],
    seen: _Recorded,
    replaced: set[str],
    norms: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType({}),
    block: nn.Module | None = None,
) -> tuple[dict[str, bool], bool]:
    """Run with ones for the outputs of ``replaced``, the recorded outputs for all other Linears, and other norms.

    Args:
        norms: what norms of the block do instead, by path.

    Returns:
        for each Linear whether its input was as recorded, and whether the result was.
    """
    right: dict[str, bool] = dict.fromkeys(linears, False)

    def stand_in(name: str) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *besides: torch.Tensor) -> torch.Tensor:
            given = zip((x, *besides), (seen.inputs[name], *seen.besides[name]), strict=True)
            right[name] = all(torch.equal(a, b) for a, b in given)
            return torch.ones_like(seen.outputs[name]) if name in replaced else seen.outputs[name].clone()

        return forward

    forwards: dict[nn.Module, Callable[..., Any]] = {m: stand_in(n) for n, m in linears.items()}
    if block is not None:
        forwards |= {block.get_submodule(path): forward for path, forward in norms.items()}
    with replaced_forwards(forwards):
        result = run()
    return right, torch.equal(result, seen.result)


@dataclass(slots=True)
class Shelf:
    """Tensors put aside for each batch, in memory or, with a folder, in files (plain reads and writes, no mapping)."""

    folder: Path | None
    _held: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    _filed: dict[tuple[str, int], tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    _divisors: dict[str, torch.Tensor] = field(default_factory=dict)

    def put(self, key: str, batch: int, value: torch.Tensor) -> None:
        if self.folder is None:
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            self._held[key, batch] = value if whole else value.clone()
            return
        path = self._file(key, batch)
        try:
            path.write_bytes(bytes_of(value.cpu()))
        except OSError as e:
            raise write_error(e, path, value.numel() * value.element_size()) from None
        self._filed[key, batch] = (value.shape, value.dtype)

    def get(self, key: str, batch: int) -> torch.Tensor | None:
        value = self._get(key, batch)
        if value is None or key not in self._divisors:
            return value
        return (value.float() / self._divisors[key].to(value.device)).to(value.dtype)

    def divide(self, key: str, by: torch.Tensor) -> None:
        """Divide what is there under a key, all batches or none, by a value for each channel ``[channels]`` float32."""
        if any(k == key for k, _ in (*self._held, *self._filed)):
            self._divisors[key] = by

    def _get(self, key: str, batch: int) -> torch.Tensor | None:
        if (key, batch) in self._held:
            return self._held[key, batch]
        if (key, batch) not in self._filed:
            return None
        shape, dtype = self._filed[key, batch]
        buffer = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        with open(self._file(key, batch), "rb", buffering=0) as f:
            if f.readinto(buffer.numpy().data) != buffer.numel():
                raise ResumeError("what was put aside is cut short", where=str(self._file(key, batch)))
        return buffer.view(dtype).reshape(shape)

    def drop(self, key: str) -> None:
        """Forget all batches of a key."""
        self._divisors.pop(key, None)
        for k, batch in [i for i in self._held if i[0] == key]:
            del self._held[k, batch]
        for k, batch in [i for i in self._filed if i[0] == key]:
            del self._filed[k, batch]
            self._file(k, batch).unlink(missing_ok=True)

    def clear(self) -> None:
        for key in {k for k, _ in (*self._held, *self._filed)}:
            self.drop(key)

    def _file(self, key: str, batch: int) -> Path:
        assert self.folder is not None
        return self.folder / f"aside-{key}-{batch:05d}.bin"


@dataclass(slots=True)
class Outliers:
    """What smoothing needs to know of a stage's input.

    Attributes:
        origin: where it comes from: the norm, by its path in the block, or the Linear that it is linear in.
        fourth: ``sum_t x_tj^4 [in]`` float64.
        sample: some tokens ``[tokens, in]``, spread over the batches.
    """

    origin: str | Pair
    fourth: torch.Tensor
    sample: list[torch.Tensor] = field(default_factory=list)

    def add(self, x: torch.Tensor, batches: int) -> None:
        self.fourth += x.float().square().square_().sum(0)
        wanted = max(1, SAMPLED_TOKENS // batches)
        self.sample.append(x[:: max(1, x.shape[0] // wanted)][:wanted].float().cpu())

    def unite(self, ranks: Ranks) -> None:
        """Make it that of all ranks' batches, in the order that one process would have."""
        ranks.add_(self.fourth)
        self.sample = ranks.whole(self.sample)


class Walk(Protocol):
    """A way through one block: observe its Linears, have them quantised by the caller, then run what came of it."""

    def moments(self) -> Iterator[list[SecondMoment]]:
        """Second moments, over the batches of all ranks, in the order in which they are wanted; the caller quantises
        before taking the next. Several at a time are of one shape, those of a group of experts."""
        ...

    def outliers(self) -> Outliers | None:
        """Of the input whose moment was given last; ``None`` where nothing can be smoothed."""
        ...

    def divided(self, pair: Pair, by: torch.Tensor) -> None:
        """Learn that the output channels of a pair's source were divided by ``[out]``, the columns that read them in
        the Linears whose moment was given last being multiplied."""
        ...

    def outputs(self) -> Iterator[torch.Tensor]:
        """The quantised block's output for each batch of this rank."""
        ...


@dataclass(slots=True)
class AtOnce:
    """All Linears observed in one pass of the original block; then a pass of the quantised one.

    Attributes:
        run: runs batch ``i`` through the block; rows: which positions are tokens, ``None`` for all.
        linears: what is observed; device: where statistics are kept.
        formats: Linears whose input an engine will quantise: once solved, they see it so here.
        ranks: who has the other batches.
        layers: of experts, by name; shelf: where what enters them waits; rare, everything: see :class:`RoutedWalk`.
    """

    run: Callable[[int], torch.Tensor]
    rows: Sequence[torch.Tensor | None]
    linears: Mapping[str, nn.Linear]
    device: torch.device
    formats: Mapping[str, ActivationFormat]
    ranks: Ranks = field(default_factory=Ranks)
    layers: Mapping[str, ExpertLayer] = field(default_factory=dict)
    shelf: Shelf = field(default_factory=lambda: Shelf(None))
    rare: int | None = None
    everything: bool = False

    def moments(self) -> Iterator[list[SecondMoment]]:
        with Collector(self.linears, self.device) as collector:
            for i, rows in enumerate(self.rows):
                with replaced_forwards({e.module: self._watched(n, e.module, i) for n, e in self.layers.items()}):
                    collector.run(lambda i=i: self.run(i), rows)  # type: ignore[misc]
        found = united(collector.moments, self.linears, self.device, self.ranks)
        idle = [n for n in self.linears if not any(n in m.names for m in found)]
        if idle:
            raise ArchitectureError(
                f"{len(idle)} of the block's Linears saw no calibration token",
                where=idle[0],
                remedy="Leave them out with --ignore, or use more calibration text.",
            )
        collector.moments.clear()
        found.reverse()
        while found:
            yield [found.pop()]
        for name, layer in self.layers.items():
            walk = RoutedWalk(
                layer,
                lambda batch, name=name: entering(self.shelf, name, batch, self.device),  # type: ignore[misc]
                self.rows,
                lambda batch, part: None,
                self.device,
                self.formats,
                self.ranks,
                self.rare,
                self.everything,
            )
            yield from walk.moments()
            for key in entering_keys(name):
                self.shelf.drop(key)

    def _watched(self, name: str, module: Experts, batch: int) -> Callable[..., torch.Tensor]:
        original = module.forward

        def forward(*given: torch.Tensor) -> torch.Tensor:
            for key, value in zip(entering_keys(name), given, strict=True):
                self.shelf.put(key, batch, value)
            return original(*given)

        return forward

    def outliers(self) -> Outliers | None:
        return None

    def divided(self, pair: Pair, by: torch.Tensor) -> None:
        """Nothing: what is computed later is computed from the weights there are then."""

    def outputs(self) -> Iterator[torch.Tensor]:
        known = dict(self.linears)
        for layer in self.layers.values():
            for number in range(len(layer.names)):
                known |= layer.linears(number)
        for i in range(len(self.rows)):
            with replaced_forwards({m: self._quantized(n, m) for n, m in known.items() if n in self.formats}):
                output = self.run(i)
            yield output

    def _quantized(self, name: str, module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: linear(module, x, self.formats[name])


@dataclass(slots=True)
class Sequential:
    """Stage by stage along a :class:`Route`, each product computed once.

    Attributes:
        block, linears, route: what is walked; linears hold layers of experts, too.
        run: runs batch ``i`` through the block; rows: which positions are tokens, ``None`` for all.
        device: where statistics are kept.
        shelf: where inputs and outputs wait.
        formats: Linears whose input an engine will quantise: once solved, they see it so here.
        ranks: who has the other batches.
        pairs: stages whose input is linear in an earlier Linear's output, where that is wanted.
        layers: what is known of the layers of experts; rare, everything: see :class:`RoutedWalk`.
    """

    block: nn.Module
    linears: Mapping[str, Leaf]
    route: Route
    run: Callable[[int], torch.Tensor]
    rows: Sequence[torch.Tensor | None]
    device: torch.device
    shelf: Shelf
    formats: Mapping[str, ActivationFormat]
    ranks: Ranks = field(default_factory=Ranks)
    pairs: Mapping[int, Pair] = field(default_factory=dict)
    layers: Mapping[str, ExpertLayer] = field(default_factory=dict)
    rare: int | None = None
    everything: bool = False
    _batches: int = 0
    _stage: int = 0
    _batch: int = 0
    _moment: SecondMoment | None = None
    _outliers: Outliers | None = None

    def moments(self) -> Iterator[list[SecondMoment]]:
        self._batches = sum(self.ranks.gather(len(self.rows)))
        for stage, names in enumerate(self.route.stages):
            self._stage = stage
            self._outliers = None
            if names[0] in self.layers:
                yield from self._of_experts(names[0])
                continue
            self._moment = SecondMoment.empty(self.linears[names[0]].in_features, self.device)
            self._moment.names.extend(names)
            origin = self._origin(stage)
            if origin is not None and all(n in self.formats for n in names):
                width = self.linears[names[0]].in_features
                self._outliers = Outliers(origin, torch.zeros(width, dtype=torch.float64, device=self.device))
            with self._active():
                for batch in range(len(self.rows)):
                    self._run_to_stage(batch, names[0])
            self._forget()
            moment, self._moment = self._moment, None
            moment.unite(self.ranks)
            if self._outliers is not None:
                self._outliers.unite(self.ranks)
            yield [moment]

    def _of_experts(self, name: str) -> Iterator[list[SecondMoment]]:
        """A layer of experts, whose output is remembered once it is there."""
        with self._active():
            for batch in range(len(self.rows)):
                self._run_to_stage(batch, name)
        self._forget()
        walk = RoutedWalk(
            self.layers[name],
            lambda batch: entering(self.shelf, name, batch, self.device),
            self.rows,
            lambda batch, part: self._add_to(name, batch, part),
            self.device,
            self.formats,
            self.ranks,
            self.rare,
            self.everything,
        )
        yield from walk.moments()
        for key in entering_keys(name):
            self.shelf.drop(key)

    def _add_to(self, name: str, batch: int, part: torch.Tensor) -> None:
        before = self.shelf.get(f"out-{name}", batch)
        self.shelf.put(f"out-{name}", batch, part if before is None else part + before.to(part))

    def outliers(self) -> Outliers | None:
        return self._outliers

    def divided(self, pair: Pair, by: torch.Tensor) -> None:
        self.shelf.divide(f"out-{pair.source}", by)
        self.shelf.divide(f"in-{self._stage}", pair.to_columns(by, 1.0))

    def outputs(self) -> Iterator[torch.Tensor]:
        self._stage = len(self.route.stages)
        for batch in range(len(self.rows)):
            self._batch = batch
            with self._active():
                output = self.run(batch)
            yield output
        self.shelf.clear()

    def _origin(self, stage: int) -> str | Pair | None:
        """What could take factors from a stage's input."""
        if stage in self.route.norms and stage not in self.route.kept:
            return self.route.norms[stage]
        return self.pairs.get(stage)

    def _run_to_stage(self, batch: int, name: str) -> None:
        self._batch = batch
        try:
            self.run(batch)
        except InputSeen:
            return
        raise another_order(name, batch)

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        replaced: dict[nn.Module, Callable[..., Any]] = {m: self._linear(n) for n, m in self.linears.items()}
        for name, (path, nones) in self.route.owners.items():
            module = self.block.get_submodule(path)
            replaced[module] = self._owner(name, module.forward, nones)
        replaced |= {self.block.get_submodule(path): _as_it_is for path in self.route.idle[self._stage]}
        with replaced_forwards(replaced):
            yield

    def _linear(self, name: str) -> Callable[..., torch.Tensor]:
        stage = self.route.stage_of(name)

        def forward(x: torch.Tensor, *besides: torch.Tensor) -> torch.Tensor:
            if stage >= self._stage:
                if name in self.layers:
                    self._enter(name, stage, (x, *besides))
                else:
                    self._observe(stage, x)
                raise InputSeen
            return self._output(name, stage, x)

        return forward

    def _owner(self, name: str, original: Callable[..., Any], nones: int) -> Callable[..., Any]:
        stage = self.route.stage_of(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            remembered = self.shelf.get(f"out-{name}", self._batch) is not None
            if stage >= self._stage or not (remembered or stage in self.route.kept):
                return original(*args, **kwargs)
            y = self._output(name, stage, None)
            return y if nones < 0 else (y, *[None] * nones)

        return forward

    def _enter(self, name: str, stage: int, given: tuple[torch.Tensor, ...]) -> None:
        if stage != self._stage:
            raise another_order(name, self._batch)
        for key, value in zip(entering_keys(name), given, strict=True):
            self.shelf.put(key, self._batch, value)

    def _observe(self, stage: int, x: torch.Tensor) -> None:
        if self._moment is None or stage != self._stage:
            raise another_order(self.route.stages[stage][0], self._batch)
        rows = self.rows[self._batch]
        flat = x.reshape(-1, x.shape[-1])
        real = flat if rows is None else flat[rows]
        self._moment.add(real)
        if self._outliers is not None:
            self._outliers.add(real, self._batches)
        if stage in self.route.kept:
            self.shelf.put(f"in-{stage}", self._batch, x)

    def _output(self, name: str, stage: int, x: torch.Tensor | None) -> torch.Tensor:
        """A solved Linear's output: remembered, or computed from its kept input or, where that is not kept, from x."""
        last = self._stage == len(self.route.stages)
        if name in self.route.lasting:
            remembered = self.shelf.get(f"out-{name}", self._batch)
            if remembered is not None:
                return remembered.to(self.device, copy=True)
        elif self._stage > stage + 1:
            assert x is not None
            return x.new_ones((*x.shape[:-1], self.linears[name].out_features))
        if stage in self.route.kept:
            x = self.shelf.get(f"in-{stage}", self._batch)
        module = self.linears[name]
        assert x is not None
        assert isinstance(module, nn.Linear)
        y = linear(module, x.to(self.device), self.formats.get(name))
        if name in self.route.lasting and not last:
            self.shelf.put(f"out-{name}", self._batch, y.clone())
        return y

    def _forget(self) -> None:
        """Drop kept inputs that no later pass needs: each Linear there is done with or its output remembered."""
        for stage in self.route.kept:
            names = self.route.stages[stage]
            done = [
                self.shelf.get(f"out-{n}", 0) is not None if n in self.route.lasting else self._stage > stage + 1
                for n in names
            ]
            if stage < self._stage and all(done):
                self.shelf.drop(f"in-{stage}")


def entering_keys(layer: str) -> tuple[str, str, str]:
    """Where on a shelf tokens, experts and weights wait that enter a layer."""
    return f"tokens-{layer}", f"experts-{layer}", f"weights-{layer}"


def entering(shelf: Shelf, layer: str, batch: int, device: torch.device) -> Entering:
    """What enters a layer of experts in a batch."""
    x, index, weights = (shelf.get(key, batch) for key in entering_keys(layer))
    assert x is not None
    assert index is not None
    assert weights is not None
    return x.to(device), index.to(device), weights.to(device)


def united(
    moments: Sequence[SecondMoment], linears: Mapping[str, nn.Linear], device: torch.device, ranks: Ranks
) -> list[SecondMoment]:
    """Second moments over all ranks' batches; a Linear that no batch of this rank has reached may be in some."""
    groups: list[list[str]] = []
    for found in ranks.gather([m.names for m in moments]):
        for names in found:
            known = next((g for g in groups if not set(g).isdisjoint(names)), None)
            if known is None:
                groups.append(list(names))
            else:
                known += [n for n in names if n not in known]
    result = []
    for names in groups:
        own = next((m for m in moments if not set(names).isdisjoint(m.names)), None)
        moment = own or SecondMoment.empty(linears[names[0]].in_features, device)
        moment.names[:] = names
        moment.unite(ranks)
        result.append(moment)
    return result


def another_order(name: str, batch: int) -> ArchitectureError:
    return ArchitectureError(
        f"calibration batch {batch} goes through the block's Linears in another order than batch 0",
        where=name,
        remedy="Set true_sequential = false under [gptq] in a recipe.",
    )
