"""Block tuning: the scales of a block moved by gradient against the block's own output.

GPTQ looks at one Linear at a time. What the model hears of a block is the hidden state it leaves behind, so with ``x``
what the original model feeds the block, ``x_q`` what the quantised model feeds it, f the block and t a token, this
moves the quantised weights Q to make

    L(Q) = mean_t |g * (f_Q(x_q)_t - f_W(x)_t)|^2 / |f_W(x)_t|^2

small: Linears make good each other's errors, and those of the blocks before. Errors count relative to each token's
size, because the norm that reads them divides by it (and because a few tokens are a thousand times larger than the
rest), and channel by channel times g, which that norm multiplies by: see :func:`norm_gain`.

Scales move by Adam, as ratios of where they stood; they are few, so they learn from little text. Codes can be moved
too, by signed gradients straight through the rounding, as in SignRound (Cheng et al., arXiv 2309.05516). Where we
differ from the paper: the start is the solution that is given (GPTQ's), not rounding to nearest; scales are tuned
themselves, instead of a clipping range; and the outcome is kept only where it is better than the start on samples that
were not tuned on. What is tuned has the values that the file will hold, in every step.

Codes and norms stay by default (docs/log.md): started at GPTQ's solution, signed steps undid more than they found but
at small rates, and norms added nothing that scales had not found. A recipe's ``tune_codes`` and ``tune_norms`` move
them.

Does not cover: where samples come from, or packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.tuned_parts import (
    LinearState,
    TunedLinear,
    TunedVector,
    VectorState,
    differentiated,
    input_quantization,
    told_by,
)
from halfbyte.ranks import Ranks
from halfbyte.recipe import Recipe

BETAS = (0.9, 0.99)
# STANDARD, HIGH and EndToEndOptions count samples of so many tokens.
SAMPLE_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A few sequences, read when they are needed.

    Attributes:
        hidden: gives ``x_q [batch, tokens, hidden]``, what the quantised model feeds the block.
        target: gives ``f_W(x)``, the original block's output in the original model, of the same shape.
        run: gives a block's output ``[batch, tokens, hidden]`` for an input, called as this sample calls it.
        rows: bool ``[batch * tokens]``, true where a position is a token and not padding; ``None`` when all are.
        owner: the rank that has it; the others cannot read it.
    """

    hidden: Callable[[], torch.Tensor]
    target: Callable[[], torch.Tensor]
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    rows: torch.Tensor | None = None
    owner: int = 0

    @staticmethod
    def elsewhere(owner: int) -> Sample:
        """One that another rank has."""

        def missing(*_: Any) -> torch.Tensor:
            raise AssertionError(f"rank {owner} has this sample")

        return Sample(hidden=missing, target=missing, run=missing, owner=owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOptions:
    """How long and how fast. All rates fall linearly to 0 over the steps.

    Attributes:
        steps: updates; 0 tunes nothing.
        samples_per_step: samples whose gradients are summed for an update. A thousand tokens are enough, and half of
            them where the steps are few.
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
class EndToEndOptions:
    """How all scales are tuned together, see :mod:`halfbyte.end_to_end`. The rate falls linearly to 0 over the steps.

    Attributes:
        steps: updates; batches_per_step: calibration batches whose gradients are summed for one.
        scale_rate: Adam's rate, relative to the scale.
        held_out: one batch of so many is kept for the verdict.
        seed: orders the batches.
        chunk_bytes: of one set of logits in float32, at most: enough rows at a time for the head's product to be fast.
    """

    steps: int = 56
    batches_per_step: int = 2
    scale_rate: float = 2e-3
    held_out: int = 8
    seed: int = 0
    chunk_bytes: int = 32 << 20


# With these rates of codes, where a recipe asks for them, latents go no further than 0.014 and 0.05 of a code in all:
# GPTQ's solution is kept but for codes next to a border.
STANDARD = TuningOptions(steps=8, scale_rate=1e-2, code_rate=3e-3)
HIGH = TuningOptions(steps=100, samples_per_step=2, code_rate=1e-3)


def tuning_of(recipe: Recipe, sample_tokens: int = SAMPLE_TOKENS) -> TuningOptions | None:
    """How blocks are tuned; ``None``: not at all.

    Codes of 8 bits leave a block so little error that only ``high`` tunes them. Rates of codes and vectors are 0 unless
    the recipe wants these tuned. Where samples are longer than :data:`SAMPLE_TOKENS`, fewer of them make a step, and at
    least one.

    Args:
        sample_tokens: tokens in one of the samples that it will get.
    """
    if recipe.method != "gptq" or recipe.effort == "low":
        return None
    if recipe.effort != "high" and all(group.scheme.weights.num_bits >= 8 for group in recipe.groups):
        return None
    options, steps = HIGH if recipe.effort == "high" else STANDARD, recipe.gptq
    return replace(
        options,
        samples_per_step=_fewer(options.samples_per_step, sample_tokens),
        code_rate=options.code_rate if steps.tune_codes else 0.0,
        vector_rate=options.vector_rate if steps.tune_norms else 0.0,
    )


def end_to_end_of(recipe: Recipe, sample_tokens: int = SAMPLE_TOKENS) -> EndToEndOptions | None:
    """How all scales are tuned together at the end; ``None``: not at all. Arguments as in :func:`tuning_of`."""
    if recipe.effort != "high" or not recipe.gptq.end_to_end or tuning_of(recipe) is None:
        return None
    options = EndToEndOptions()
    return replace(options, batches_per_step=_fewer(options.batches_per_step, sample_tokens))


def _fewer(samples: int, tokens: int) -> int:
    """How many samples of so many tokens stand for those of :data:`SAMPLE_TOKENS`, at least one."""
    return max(1, samples * SAMPLE_TOKENS // max(SAMPLE_TOKENS, tokens))


def samples_wanted(options: TuningOptions, available: int) -> int:
    """How many of the samples there are one tuning looks at, those held out included."""
    taught = options.steps * options.samples_per_step
    return min(available, -(-taught * options.held_out // (options.held_out - 1)))


def samples_chosen(options: TuningOptions, available: int) -> list[int]:
    """Which samples: the same for all blocks, spread evenly."""
    wanted = samples_wanted(options, available)
    return [i * available // wanted for i in range(wanted)]


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
    gain: torch.Tensor | None = None,
    ranks: Ranks | None = None,
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
        gain: ``g [hidden]`` float32, of the norm that reads the block's output; ``None`` is 1.
        ranks: the processes that share the samples. Each step is taken by the one that has its sample, and told to the
            others, so that all end with what one process would.

    Returns:
        the better of start and outcome on the held-out samples; the same for the same arguments.
    """
    ranks = ranks or Ranks()
    taught, judges = divide(samples, options.held_out)
    states = {name: LinearState.of(spec, tune_codes=options.code_rate > 0) for name, spec in linears.items()}
    moving = {name: VectorState.of(spec) for name, spec in (vectors or {}).items()}
    parts: list[LinearState | VectorState] = [*states.values(), *moving.values()]
    with input_quantization(linears.values()):
        for part in parts:
            part.place()
        before = mean_loss(block, judges, gain, ranks)
        if taught and judges and options.steps:
            _descend(block, states, moving, taught, options, gain, ranks)
            after = mean_loss(block, judges, gain, ranks)
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


@torch.no_grad()
def norm_gain(norm: nn.Module, width: int) -> torch.Tensor:
    """What a norm multiplies each channel by, ``[width]`` float32, whatever the sign and offset it stores it with.

    For the next block's input norm, or the model's last one. With ``p = (1, -1, 1, ...)``, which has mean 0 and size 1
    already, it is ``p (norm(p) - norm(-p)) / 2``, for RMS norms and layer norms alike. An even ``width``.
    """
    parameter = next(norm.parameters())
    probe = torch.ones(width, dtype=parameter.dtype, device=parameter.device)
    probe[1::2] = -1.0
    difference: torch.Tensor = norm(probe) - norm(-probe)
    return (probe * difference / 2).float()


def divide(samples: Sequence[Sample], held_out: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from and samples to judge by: every ``held_out``-th, spread evenly, at least one of two."""
    taught, judges = split_numbers(len(samples), held_out)
    return [samples[i] for i in taught], [samples[i] for i in judges]


def split_numbers(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """Numbers of samples to learn from, and of those to judge by; see :func:`divide`."""
    first = min(held_out // 2, count - 1)
    judges = list(range(first, count, held_out)) if count > 1 else []
    return sorted(set(range(count)) - set(judges)), judges


def schedule(numbers: Sequence[int], count: int, seed: int) -> list[int]:
    """So many of some numbers, in a random order: each once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += [numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]
    return order[:count]


def loss_of(block: nn.Module, sample: Sample, gain: torch.Tensor | None = None) -> torch.Tensor:
    """L over one sample's tokens, float32 ``[]``."""
    output = sample.run(block, sample.hidden())
    target = sample.target().float()
    difference = output.float() - target
    if gain is not None:
        difference = difference * gain
    errors = difference.square().sum(dim=-1).flatten()
    sizes = target.square().sum(dim=-1).flatten().clamp(min=torch.finfo(torch.float32).tiny)
    shares: torch.Tensor = errors / sizes
    return shares.mean() if sample.rows is None else shares[sample.rows].mean()


@torch.no_grad()
def mean_loss(
    block: nn.Module, samples: Sequence[Sample], gain: torch.Tensor | None = None, ranks: Ranks | None = None
) -> float:
    """Mean of L over samples; 0 of none."""
    ranks = ranks or Ranks()
    losses = [ranks.decide(lambda s=s: float(loss_of(block, s, gain)), s.owner) for s in samples]  # type: ignore[misc]
    return sum(losses) / max(1, len(samples))


def _descend(
    block: nn.Module,
    states: Mapping[str, LinearState],
    moving: Mapping[str, VectorState],
    samples: Sequence[Sample],
    options: TuningOptions,
    gain: torch.Tensor | None,
    ranks: Ranks,
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
    with differentiated(parts):
        for step in range(options.steps):
            left = 1.0 - step / options.steps
            for _ in range(options.samples_per_step):
                if not waiting:
                    waiting = torch.randperm(len(samples), generator=generator).tolist()
                sample = samples[waiting.pop()]
                with told_by(ranks, sample.owner, parts), torch.enable_grad():
                    if sample.owner == ranks.rank:
                        loss_of(block, sample, gain).backward()  # type: ignore[no-untyped-call]
            for group in adam.param_groups:
                group["lr"] = group["rate"] * left
            adam.step()
            adam.zero_grad()
            for linear in linears:
                linear.descend(options.code_rate * left)
            for part in parts:
                part.place()
