"""Block tuning: the scales of a block moved by gradient against the block's own output.

GPTQ looks at one Linear at a time. What the model hears of a block is the hidden state it leaves behind, so with ``x``
what the original model feeds the block, ``x_q`` what the quantised model feeds it, f the block and t a token, this
moves the quantised weights Q to make

    L(Q) = mean_t |f_Q(x_q)_t - f_W(x)_t|^2 / |f_W(x)_t|^2

small: Linears make good each other's errors, and those of the blocks before. Errors count relative to each token's
size, because the norms that follow divide by it (and because a few tokens are a thousand times larger than the rest).

Scales move by Adam, as ratios of where they stood; they are few, so they learn from little text. Codes can be moved
too, by signed gradients straight through the rounding, as in SignRound (Cheng et al., arXiv 2309.05516). Where we
differ from the paper: the start is the solution that is given (GPTQ's), not rounding to nearest; scales are tuned
themselves, instead of a clipping range; and the outcome is kept only where it is better than the start on samples that
were not tuned on. What is tuned has the values that the file will hold, in every step.

Codes stay by default: started at GPTQ's solution, signed steps undid more than they found (docs/log.md).

Does not cover: where samples come from, or packing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.tuned_parts import LinearState, TunedLinear, TunedVector, VectorState

BETAS = (0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A few sequences, read when they are needed.

    Attributes:
        hidden: gives ``x_q [batch, tokens, hidden]``, what the quantised model feeds the block.
        target: gives ``f_W(x)``, the original block's output in the original model, of the same shape.
        arguments: what the block is called with besides, positional and by keyword.
        rows: bool ``[batch * tokens]``, true where a position is a token and not padding; ``None`` when all are.
    """

    hidden: Callable[[], torch.Tensor]
    target: Callable[[], torch.Tensor]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOptions:
    """How long and how fast. All rates fall linearly to 0 over the steps.

    Attributes:
        steps: updates; 0 tunes nothing.
        samples_per_step: samples whose gradients are summed for an update. A thousand tokens are enough.
        code_rate: what a latent moves in the first step, in units of a code; 0 keeps the codes.
        scale_rate: Adam's rate for scales, relative to the scale.
        vector_rate: Adam's rate for vectors, relative to their size.
        held_out: one sample of so many is kept for the verdict.
        seed: orders the samples.
    """

    steps: int = 50
    samples_per_step: int = 1
    code_rate: float = 0.0
    scale_rate: float = 6e-3
    vector_rate: float = 1e-3
    held_out: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """What came of it.

    Attributes:
        weights: by the names of the Linears; the ones given where tuning was no gain.
        vectors: by their names, as stored; empty where tuning was no gain.
        loss_before, loss_after: L over the held-out samples, untuned and tuned (whether kept or not).
        kept: whether the tuned values are the ones returned.
    """

    weights: dict[str, QuantizedWeight]
    vectors: dict[str, torch.Tensor]
    loss_before: float
    loss_after: float
    kept: bool


def tune_block(
    block: nn.Module,
    linears: Mapping[str, TunedLinear],
    samples: Sequence[Sample],
    options: TuningOptions,
    vectors: Mapping[str, TunedVector] | None = None,
) -> TuningResult:
    """Tune a block's quantised Linears together, see the module's docstring.

    Memory beside the block's weights: one sample's graph, and the gradient of one Linear at a time; where codes are
    tuned, a latent and a gradient of the size of all weights.

    Args:
        block: computes ``block(hidden, *args, **kwargs)``. On return its Linears hold what the result stands for.
        linears: those to tune, by the caller's names.
        samples: at least 2, or nothing is tuned: one in ``held_out`` judges, the others teach.
        options: how long and how fast.
        vectors: small dense parameters to tune along, by the caller's names.

    Returns:
        the better of start and outcome on the held-out samples; the same for the same arguments.
    """
    taught, judges = divide(samples, options.held_out)
    states = {name: LinearState.of(spec, tune_codes=options.code_rate > 0) for name, spec in linears.items()}
    moving = {name: VectorState.of(spec) for name, spec in (vectors or {}).items()}
    parts: list[LinearState | VectorState] = [*states.values(), *moving.values()]
    with _input_quantization(linears.values()):
        for part in parts:
            part.place()
        before = mean_loss(block, judges)
        if taught and judges and options.steps:
            _descend(block, states, moving, taught, options)
            after = mean_loss(block, judges)
        else:
            after = before
    if after < before:
        return TuningResult(
            weights={name: state.result() for name, state in states.items()},
            vectors={name: state.value().cpu() for name, state in moving.items()},
            loss_before=before,
            loss_after=after,
            kept=True,
        )
    for spec in linears.values():
        spec.module.weight.data.copy_(spec.quantized.dense())
    for vector in moving.values():
        vector.parameter().data.copy_(vector.start)
    return TuningResult(
        weights={name: spec.quantized for name, spec in linears.items()},
        vectors={},
        loss_before=before,
        loss_after=after,
        kept=False,
    )


def divide(samples: Sequence[Sample], held_out: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from and samples to judge by: every ``held_out``-th, spread evenly, at least one of two."""
    first = min(held_out // 2, len(samples) - 1)
    judges = set(range(first, len(samples), held_out)) if len(samples) > 1 else set()
    return [s for i, s in enumerate(samples) if i not in judges], [samples[i] for i in sorted(judges)]


def loss_of(block: nn.Module, sample: Sample) -> torch.Tensor:
    """L over one sample's tokens, float32 ``[]``."""
    args, kwargs = sample.arguments
    output = block(sample.hidden(), *args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    target = sample.target().float()
    errors = (output.float() - target).square().sum(dim=-1).flatten()
    sizes = target.square().sum(dim=-1).flatten().clamp(min=torch.finfo(torch.float32).tiny)
    shares: torch.Tensor = errors / sizes
    return shares.mean() if sample.rows is None else shares[sample.rows].mean()


@torch.no_grad()
def mean_loss(block: nn.Module, samples: Sequence[Sample]) -> float:
    """Mean of L over samples; 0 of none."""
    return sum(float(loss_of(block, s)) for s in samples) / max(1, len(samples))


def _descend(
    block: nn.Module,
    states: Mapping[str, LinearState],
    moving: Mapping[str, VectorState],
    samples: Sequence[Sample],
    options: TuningOptions,
) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    waiting: list[int] = []
    linears, vectors = list(states.values()), list(moving.values())
    parts: list[LinearState | VectorState] = [*linears, *vectors]
    adam = torch.optim.Adam(
        [
            {"params": [s.ratio for s in linears], "rate": options.scale_rate},
            {"params": [v.ratio for v in vectors], "rate": options.vector_rate},
        ],
        betas=BETAS,
    )
    with _differentiated(parts):
        for step in range(options.steps):
            left = 1.0 - step / options.steps
            for _ in range(options.samples_per_step):
                if not waiting:
                    waiting = torch.randperm(len(samples), generator=generator).tolist()
                with torch.enable_grad():
                    loss_of(block, samples[waiting.pop()]).backward()  # type: ignore[no-untyped-call]
            for group in adam.param_groups:
                group["lr"] = group["rate"] * left
            adam.step()
            adam.zero_grad()
            for linear in linears:
                linear.descend(options.code_rate * left)
            for part in parts:
                part.place()


@contextlib.contextmanager
def _differentiated(parts: Sequence[LinearState | VectorState]) -> Iterator[None]:
    """Gradients for these parameters and no others; each is taken as soon as it is made, and its memory freed."""
    parameters = [part.parameter() for part in parts]
    before = [p.requires_grad for p in parameters]
    handles = []
    try:
        for part, p in zip(parts, parameters, strict=True):
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(lambda _, part=part: part.absorb()))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, old in zip(parameters, before, strict=True):
            p.requires_grad_(old)


@contextlib.contextmanager
def _input_quantization(linears: Iterable[TunedLinear]) -> Iterator[None]:
    """Linears see their inputs as an engine would quantise them; gradients go straight through."""
    handles = []
    for linear in linears:
        if linear.quantize_input is not None:

            def hook(
                _: nn.Module,
                inputs: tuple[torch.Tensor, ...],
                quantize: Callable[[torch.Tensor], torch.Tensor] = linear.quantize_input,
            ) -> tuple[torch.Tensor, ...]:
                x = inputs[0]
                return (x + (quantize(x.detach()) - x.detach()), *inputs[1:])

            handles.append(linear.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
